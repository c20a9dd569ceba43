/*
 * Who answers which exit, as the burst reads it: without a lock, while other threads swap the table.
 *
 * A table never changes. The VM's cell points to the present one; swapping it and freeing the old one is the protocol of
 * docs/protocols/routes.pml, whose labels are in the comments below. In short: a vCPU's `native` count is odd from the return
 * of KVM_RUN, before it loads the cell, to the last use of the table. A writer swaps the cell, has every thread execute a
 * memory barrier (membarrier(2), which lets the vCPU's side be plain stores), and waits until no count is still the odd one
 * it saw. A vCPU in KVM_RUN, which may be there for ever, is never waited for.
 */
#ifndef KVMEXIT_ROUTES_H
#define KVMEXIT_ROUTES_H

#include <linux/membarrier.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "_page.h"
#include "include/kvmexit/kvmexit.h"

#define KVMEXIT_PLACES 46 /* as _exits.pxd's PLACES */

/* A verdict of kvmexit's own handlers alone: it has not finished, and is to be called again once Python has looked at signals. */
#define KVMEXIT_LATER INT32_MIN

/* One handler in a chain, most specific first. The end of a chain is one with neither. */
struct kvmexit_route {
    kvmexit_handler call; /* a native one, or NULL */
    void *opaque;
    void *handler; /* the Python object, and ... */
    void *entry;   /* ... its Entry; borrowed from the table's owner */
    uint64_t first;
};

/* Keys that have the same chain. Of one place they come in order and leave no gap. */
struct kvmexit_segment {
    uint64_t first, last;
    const struct kvmexit_route *chain;
};

struct kvmexit_segments {
    const struct kvmexit_segment *at;
    size_t count;
};

struct kvmexit_table {
    void *owner;     /* the RouteTable, borrowed */
    uint64_t serial; /* never used twice: an address may be */
    struct kvmexit_segments places[KVMEXIT_PLACES];
    const struct kvmexit_route *const *ports[256]; /* by high byte, then low byte */
};

static inline int kvmexit_membarrier(int command)
{
    return (int)syscall(SYS_membarrier, command, 0, 0);
}

/* Once a process, before there are vCPUs. */
static inline int kvmexit_lacks_membarrier(void)
{
    return kvmexit_membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) != 0;
}

/* ---- the vCPU's side ---- */

static inline const struct kvmexit_table *kvmexit_begin_native(struct kvmexit_vcpu *v)
{
    /* R1: the count before the load of the cell */
    if (__atomic_load_n(v->fenced, __ATOMIC_RELAXED))
        __atomic_fetch_add(&v->native, 1, __ATOMIC_SEQ_CST);
    else
        __atomic_store_n(&v->native, v->native + 1, __ATOMIC_RELAXED);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    /* R2: after each return of KVM_RUN */
    return (const struct kvmexit_table *)__atomic_load_n(v->cell, __ATOMIC_ACQUIRE);
}

/* Whether the table in use still is the present one. It cannot be freed meanwhile, so no other has its address. */
static inline int kvmexit_is_present(const struct kvmexit_vcpu *v)
{
    return __atomic_load_n(v->cell, __ATOMIC_ACQUIRE) == (const void *)v->table;
}

static inline void kvmexit_end_native(struct kvmexit_vcpu *v)
{
    __atomic_store_n(&v->native, v->native + 1, __ATOMIC_RELEASE); /* R3: after the last use */
}

/* What the routes of the exit in hand go by. */
static inline uint64_t kvmexit_key(const struct kvmexit_vcpu *v)
{
    switch (v->place) {
    case KVM_EXIT_IO:
        return v->run->io.port;
    case KVM_EXIT_MMIO:
        return v->run->mmio.phys_addr;
    case KVM_EXIT_MEMORY_FAULT:
        return v->run->memory_fault.gpa;
    case KVM_EXIT_HYPERCALL:
        return v->run->hypercall.nr;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        return v->run->msr.index;
    default:
        return 0;
    }
}

/* Its chain. */
static inline const struct kvmexit_route *kvmexit_find(
    struct kvmexit_vcpu *v, const struct kvmexit_table *table, uint64_t key)
{
    const uint32_t place = v->place;
    const struct kvmexit_segments *segments = &table->places[place];
    const struct kvmexit_segment *at = segments->at;
    size_t low = 0, high = segments->count - 1;
    if (place == KVM_EXIT_IO)
        return table->ports[key >> 8 & 255][key & 255];
    if (high == 0)
        return at->chain;
    if (v->hit_serial == table->serial && v->hit_place == place) {
        at = (const struct kvmexit_segment *)v->hit;
        if (at->first <= key && key <= at->last)
            return at->chain;
        at = segments->at;
    }
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (at[middle].last < key)
            low = middle + 1;
        else
            high = middle;
    }
    v->hit = &at[low];
    v->hit_serial = table->serial;
    v->hit_place = place;
    return at[low].chain;
}

/* ---- the writer's side ---- */

static inline void kvmexit_publish(const void **cell, const struct kvmexit_table *table, int *fenced)
{
    static const struct timespec long_enough = {0, 10000000};
    __atomic_store_n(cell, (const void *)table, __ATOMIC_SEQ_CST); /* R4: before the barrier */
    if (*fenced || kvmexit_membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED) == 0) /* R5 */
        return;
    /* A forked child has to register anew. Or a seccomp filter has come since: stores become visible by themselves in far less
     * than this. */
    __atomic_store_n(fenced, kvmexit_lacks_membarrier(), __ATOMIC_SEQ_CST);
    if (*fenced || kvmexit_membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED) != 0)
        nanosleep(&long_enough, NULL);
}

/* R6: asked after kvmexit_publish(). Odd: it is using a table, perhaps the old one. */
static inline uint64_t kvmexit_native(const struct kvmexit_vcpu *v)
{
    return __atomic_load_n(&v->native, __ATOMIC_ACQUIRE);
}

#endif /* KVMEXIT_ROUTES_H */
