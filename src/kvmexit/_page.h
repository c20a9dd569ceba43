/* A vCPU as the nogil burst sees it: the page it shares with KVM, and what userspace keeps beside it. */
#ifndef KVMEXIT_PAGE_H
#define KVMEXIT_PAGE_H

#include <errno.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#include "include/kvmexit/kvmexit.h"
#include "include/kvmexit/uapi.h"

/* What others ask of a vCPU's thread. */
#define KVMEXIT_REQUEST_KICK 1u
#define KVMEXIT_REQUEST_PAUSE 2u  /* stays until the VM is resumed */
#define KVMEXIT_REQUEST_CLOSED 4u /* stays: no run() begins any more */

#define KVMEXIT_REGISTER_BYTES 520 /* kvm_sync_regs: regs, sregs, events */

static inline uint64_t kvmexit_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

struct kvmexit_poison { /* what a guest wanted and the hardware has lost: as KVM_EXIT_MEMORY_FAULT says it */
    uint64_t gpa, size, flags;
};

struct kvmexit_vcpu {
    /* the seam: what "KVM_RUN" is; returns 0 or -errno */
    int (*enter)(struct kvmexit_vcpu *);
    struct kvm_run *run;
    struct kvmexit_stats *stats; /* _stats.h */
    const uint64_t *rip;         /* where KVM leaves the guest's on return, else kvmexit_no_rip */

    /* the exit in hand */
    uint64_t seq;    /* grows with every entry from Python: an Exit made under an older one can no longer be answered */
    uint64_t entries;
    uint32_t reason; /* kvm_run.exit_reason, read once */
    uint32_t place;  /* the same as an index: the reason where it is known and makes sense, else as _exits.pxd says */
    int error;       /* errno of KVM_RUN, or 0 */
    int needs;       /* KVM waits for an answer */
    int answered;    /* somebody wrote it */
    int unsettled;   /* not dispatched to its end yet, or its handler raised: to be offered again */
    int completes;   /* KVM finishes the operation only when re-entered */
    uint32_t fault_count; /* of the fault-loop guard, below */

    size_t run_size; /* bytes mapped at run: the page, the PIO data and what follows */
    void *script;    /* of a scripted enter */
    struct kvmexit_trace *trace; /* of one that is recorded: _record.h */
    uint32_t said;   /* what the burst made of the last EINTR, an Outcome of _loop.pxd: for the record */
    int fd;          /* -1: not backed by a kernel vCPU */
    pid_t pid;       /* the process that made it, for tgkill */
    const unsigned *forks; /* how often this process was forked into being, and ... */
    unsigned born;         /* ... how often it had been when this was made: a child must not touch the shared page */

    /* native handlers: _routes.h */
    const void **cell;  /* the VM's table; atomic */
    const int *fenced;
    uint64_t native;    /* atomic; odd while a table is in use */
    const struct kvmexit_table *table; /* the one in use when the burst ended, and ... */
    const struct kvmexit_route *chain; /* ... who comes next there; NULL: begin with the first of the VM's table */
    const void *hit;    /* the segment that was found last */
    uint64_t hit_serial;
    uint32_t hit_place;
    uint32_t id;

    struct kvmexit_coalesced *coalesced; /* the VM's posted writes: _coalesced.h */

    /* what may have repaired a fault: _convert.pxd */
    void *converter;
    uint64_t generation; /* at the last entry */
    int software_protected;
    int rebinds; /* conversions move memslots, and need Python */

    /* registers, as the Page has them: _page.pyx */
    int synced;   /* classes KVM copies on every return (valid_regs) */
    int syncable; /* classes it could copy (KVM_CAP_SYNC_REGS) */
    int valid;    /* classes whose copy in the page is current */
    int written;  /* classes with values kept aside */
    int flushed;  /* of these, the ones in the page for KVM to take */
    uint8_t value[KVMEXIT_REGISTER_BYTES], mask[KVMEXIT_REGISTER_BYTES];

    /* written by other threads */
    uint32_t request; /* atomic */
    int32_t tid;      /* atomic; the thread inside run(), or 0 */
    uint32_t users;   /* atomic; calls of the C API beside run(), which close() waits for */

    /* of the run() in progress */
    unsigned long owner; /* atomic; the identity of its thread, or 0 */
    int parked;          /* atomic; its thread stands still while a VM is paused */
    struct kvmexit_exit exit; /* what a run() of the C API returned, and ... */
    uint64_t exit_seq;        /* ... the `seq` it is of */
    uint64_t deadline_ns; /* CLOCK_MONOTONIC, or KVMEXIT_NEVER */
    struct kvmexit_vcpu *outer;
    int main_thread, was_blocked, bus_was_blocked; /* the kick's signal, SIGBUS */
    struct kvmexit_poison poison; /* size 0: none; written by a signal handler of its thread, at the end of KVM_RUN */

    /* what the burst took on itself, for the record */
    uint64_t retried_unwritten, retried_eintr, retried_eagain, retried_enomem, retried_race;
    uint32_t unwritten, no_memory; /* in a row, whatever interrupted it */

    /* the fault-loop guard: the previous fault, and how often it may come in a row */
    uint32_t fault_limit;
    int regs_synced; /* KVM leaves the registers in the page; else they are asked for */
    uint64_t fault_payload[4];
#if defined(__x86_64__)
    struct kvm_regs fault_regs;
#endif
};

/*
 * Whose run it is. Python's run() claims with the GIL held or in a critical section on the page, the C API's without: so what
 * Python does in one section must not rely on nobody claiming meanwhile. It need not: a thread that wants everybody out (pause(), close()) sets a bit of
 * `request` first and looks at owners then, a runner claims first and looks at `request` then, so one of them sees the
 * other. All sequentially consistent.
 */
static inline int kvmexit_claim(struct kvmexit_vcpu *v, unsigned long me)
{
    unsigned long nobody = 0;
    return __atomic_compare_exchange_n(&v->owner, &nobody, me, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static inline void kvmexit_disown(struct kvmexit_vcpu *v)
{
    __atomic_store_n(&v->owner, 0, __ATOMIC_SEQ_CST);
}

static inline unsigned long kvmexit_owner(const struct kvmexit_vcpu *v)
{
    return __atomic_load_n(&v->owner, __ATOMIC_SEQ_CST);
}

/* `seq` is looked at by threads that do not run the vCPU, too. */
static inline uint64_t kvmexit_seq(const struct kvmexit_vcpu *v)
{
    return __atomic_load_n(&v->seq, __ATOMIC_RELAXED);
}

static inline void kvmexit_set_seq(struct kvmexit_vcpu *v, uint64_t seq)
{
    __atomic_store_n(&v->seq, seq, __ATOMIC_RELAXED);
}

static inline void kvmexit_set_parked(struct kvmexit_vcpu *v, int parked)
{
    __atomic_store_n(&v->parked, parked, __ATOMIC_SEQ_CST);
}

static inline int kvmexit_parked(const struct kvmexit_vcpu *v)
{
    return __atomic_load_n(&v->parked, __ATOMIC_SEQ_CST);
}

static inline uint32_t kvmexit_requests(const struct kvmexit_vcpu *v)
{
    return __atomic_load_n(&v->request, __ATOMIC_SEQ_CST);
}

/* For a call beside run() that close() has to wait for: 0, or EBADF where the VM is closed. */
static inline int kvmexit_begin_use(struct kvmexit_vcpu *v)
{
    __atomic_fetch_add(&v->users, 1, __ATOMIC_SEQ_CST); /* then the look, as run() does */
    if (!(kvmexit_requests(v) & KVMEXIT_REQUEST_CLOSED))
        return 0;
    __atomic_fetch_sub(&v->users, 1, __ATOMIC_SEQ_CST);
    return EBADF;
}

static inline void kvmexit_end_use(struct kvmexit_vcpu *v)
{
    __atomic_fetch_sub(&v->users, 1, __ATOMIC_SEQ_CST);
}

/* The VM is being closed: set before close() looks at who is in use. */
static inline void kvmexit_shut(struct kvmexit_vcpu *v)
{
    __atomic_fetch_or(&v->request, KVMEXIT_REQUEST_CLOSED, __ATOMIC_SEQ_CST);
}

static inline int kvmexit_in_use(const struct kvmexit_vcpu *v)
{
    return kvmexit_owner(v) != 0 || __atomic_load_n(&v->users, __ATOMIC_SEQ_CST) != 0;
}

#endif /* KVMEXIT_PAGE_H */
