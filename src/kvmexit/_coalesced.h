/*
 * Posted writes: those that KVM notes in a ring instead of exiting (KVM_REGISTER_COALESCED_MMIO), and what drains it.
 *
 * The ring is one a VM, a page in each vCPU's mapping. KVM appends at `last`, under a lock of its own; `first` is ours.
 *
 * What holds: when KVM_RUN returns to a vCPU's thread, every write that was posted before is handled before anything else
 * is done about that return: before the exit is handled, before run() says that it was kicked, before a pause counts the
 * vCPU as stopped. That goes for the vCPU's own writes, and for those of others of which its guest can know: they are in the
 * ring by then. So each thread drains after each return (kvmexit_drain_coalesced, the first thing after enter()).
 *
 * Why a lock that waits, and no try-lock: threads return at the same time, and the ring is to be handled in its order, by
 * one drainer. Who finds another at it cannot go on: that one may be at an entry before his. He waits for what stands in
 * the ring, 169 entries at most, each a call of a handler: as long as these writes would have taken as exits. The lock is a
 * leaf: under it native handlers are called, which take neither the GIL nor a lock of ours and do not enter KVM. Nobody
 * waits for it with the GIL held, nor for the GIL with it held. Kicks and pauses wait for handlers, and so for it.
 *
 * Why an empty ring needs no lock: `first` moves on after its entry's handler has returned (release), and is read after
 * `last` (acquire). If it is where `last` was, everything up to there has been handled, and we see what that did. In the
 * other order the ring could go round between the two loads.
 *
 * A drainer stops where `last` was when it began: or other vCPUs could keep it for ever.
 */
#ifndef KVMEXIT_COALESCED_H
#define KVMEXIT_COALESCED_H

#include <pthread.h>
#include <string.h>

#include "_page.h"
#include "include/kvmexit/kvmexit.h"

/* Addresses whose writes are posted, and who handles them. */
struct kvmexit_zone {
    uint64_t first, last; /* inclusive */
    int pio;
    kvmexit_handler call;
    void *opaque;
    uint64_t posted, declined; /* writes handled; of these, not with KVMEXIT_DONE. Atomic */
};

struct kvmexit_coalesced {
    size_t offset;        /* atomic: of the ring in a vCPU's mapping; 0: there is no zone */
    pthread_mutex_t lock; /* of the ring's `first`, and of what follows */
    struct kvmexit_zone **zones;
    size_t count;
};

/* -> NULL where a vCPU's mapping has no ring: a replay's is as large as its trace says. */
static inline struct kvm_coalesced_mmio_ring *kvmexit_ring(const struct kvmexit_vcpu *v, size_t offset)
{
    const size_t size = offsetof(struct kvm_coalesced_mmio_ring, coalesced_mmio)
                        + KVMEXIT_COALESCED_MMIO_MAX * sizeof(struct kvm_coalesced_mmio);
    if (offset > v->run_size || v->run_size - offset < size)
        return NULL;
    return (struct kvm_coalesced_mmio_ring *)((char *)v->run + offset);
}

/* Call the handler for one entry: a copy, so that nobody changes it meanwhile. KVM's word, and checked all the same. */
static inline void kvmexit_handle_posted(
    const struct kvmexit_coalesced *s, const struct kvmexit_vcpu *v, struct kvm_coalesced_mmio *entry)
{
    struct kvmexit_exit exit;
    struct kvmexit_zone *zone = NULL;
    size_t i;
    if (entry->len == 0 || entry->len > sizeof entry->data)
        return;
    for (i = 0; i < s->count && !zone; i++)
        if (s->zones[i]->pio == (entry->pio != 0) && s->zones[i]->first <= entry->phys_addr
            && entry->phys_addr <= s->zones[i]->last && entry->len - 1 <= s->zones[i]->last - entry->phys_addr)
            zone = s->zones[i];
    if (!zone)
        return;
    memset(&exit, 0, sizeof exit);
    exit.version = KVMEXIT_API_VERSION;
    exit.reason = zone->pio ? KVM_EXIT_IO : KVM_EXIT_MMIO;
    exit.vcpu = v->id; /* whose thread this is: KVM does not note whose write it was */
    exit.address = entry->phys_addr;
    exit.base = zone->first;
    exit.size = entry->len;
    exit.count = 1;
    exit.is_write = 1;
    exit.data = entry->data;
    if (zone->call(&exit, zone->opaque) != KVMEXIT_DONE)
        __atomic_fetch_add(&zone->declined, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&zone->posted, 1, __ATOMIC_RELAXED);
}

/* With the lock held: handle what stands in the ring. -> how many entries that was. */
static inline size_t kvmexit_drain_ring(const struct kvmexit_coalesced *s, const struct kvmexit_vcpu *v)
{
    struct kvm_coalesced_mmio_ring *ring;
    struct kvm_coalesced_mmio entry;
    uint32_t first, last;
    size_t count = 0;
    if (!s->offset)
        return 0;
    ring = kvmexit_ring(v, s->offset);
    if (!ring)
        return 0;
    last = __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE);
    first = __atomic_load_n(&ring->first, __ATOMIC_RELAXED);
    /* SAFETY: the indices are KVM's and ours; but what lies in a mapping is checked before it is followed. */
    if (first >= KVMEXIT_COALESCED_MMIO_MAX || last >= KVMEXIT_COALESCED_MMIO_MAX)
        return 0;
    for (; first != last; count++) {
        entry = ring->coalesced_mmio[first];
        kvmexit_handle_posted(s, v, &entry);
        first = (first + 1) % KVMEXIT_COALESCED_MMIO_MAX;
        __atomic_store_n(&ring->first, first, __ATOMIC_RELEASE);
    }
    return count;
}

static __attribute__((noinline, unused)) void kvmexit_drain_for(
    struct kvmexit_coalesced *s, const struct kvmexit_vcpu *v, size_t offset)
{
    const struct kvm_coalesced_mmio_ring *ring = kvmexit_ring(v, offset);
    uint32_t last;
    if (!ring)
        return;
    last = __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE);
    if (__atomic_load_n(&ring->first, __ATOMIC_ACQUIRE) == last)
        return;
    pthread_mutex_lock(&s->lock);
    kvmexit_drain_ring(s, v);
    pthread_mutex_unlock(&s->lock);
}

/* The first thing after KVM_RUN. A zone comes before KVM posts to it, so who has posted sees the offset. */
static inline void kvmexit_drain_coalesced(const struct kvmexit_vcpu *v)
{
    struct kvmexit_coalesced *s = v->coalesced;
    size_t offset = __atomic_load_n(&s->offset, __ATOMIC_ACQUIRE);
    if (__builtin_expect(offset != 0, 0))
        kvmexit_drain_for(s, v, offset);
}

#endif /* KVMEXIT_COALESCED_H */
