/*
 * Entries on their way from vCPU threads to who drains them: a ring per vCPU, and one eventfd that says when to look. No
 * Python.
 *
 * A lane is a ring with one producer, the thread that runs its vCPU, and one consumer at a time, who holds `lock`. Which
 * lane is a vCPU's is settled by its first entry, for good, with one compare-and-swap; vCPUs beyond the last lane have none.
 * What a lane goes by is the vCPU's mapping of kvm_run: ids are the user's to give where VMs are adopted, and may be given
 * twice. A mapping is one vCPU's at a time, which one thread at a time runs; whoever comes next, thread or vCPU, has had the
 * GIL (or page.owner) in between, and with it all that was stored here.
 *
 * Within a lane. The producer stores an entry and then `tail`; the consumer loads `tail`, copies, and then stores `head`;
 * the producer loads `head` before it uses the place again. Release and acquire make these three an order, so an entry is
 * seen whole, once. Indices only grow; a place is one modulo the lane's length, a power of two.
 *
 * The eventfd. Most writes make no system call: `bell` is ARMED where somebody may be asleep, and who makes it RINGING from
 * that, one of them all, writes to the eventfd, and then makes it RUNG. It stays so, and the eventfd readable, until a drain
 * that finds nothing reads it and makes the bell ARMED again. That nobody sleeps beside an entry is what
 * docs/protocols/ring.pml checks, whose labels are below: in short, the producer stores `tail` and then loads `bell`, the
 * consumer stores `bell` and then loads `tail`, all sequentially consistent, so one of them sees the other's store.
 *
 * A producer that waits for room does the same with `waits` and `head`, and sleeps on `head` (futex(2)), which the kernel
 * compares with what was loaded. Never for long: kicks, pauses and time-outs set immediate_exit, and their signal ends the
 * sleep or, coming just before it, costs a tick; and after PATIENCE_MS it is Python's turn (KVMEXIT_LATER), who sees whether
 * this handler was removed meanwhile.
 */
#ifndef KVMEXIT_RING_H
#define KVMEXIT_RING_H

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "_routes.h"
#include "include/kvmexit/kvmexit.h"
#include "include/kvmexit/uapi.h"

#define KVMEXIT_RING_TICK_MS 50      /* how long a signal just before the futex can stay unnoticed */
#define KVMEXIT_RING_PATIENCE_MS 100 /* at most in one call */

enum { KVMEXIT_ARMED, KVMEXIT_RINGING, KVMEXIT_RUNG };               /* bell */
enum { KVMEXIT_FULL_STOP, KVMEXIT_FULL_DROP, KVMEXIT_FULL_WAIT }; /* what is done where there is no room */

struct kvmexit_entry {
    uint64_t address;
    uint64_t data;
    uint64_t sequence; /* of its vCPU, from 0, those dropped included */
    uint32_t vcpu;
    uint8_t size;
    uint8_t reason;
    uint16_t flags;
};
_Static_assert(sizeof(struct kvmexit_entry) == 32, "as _native_ring.pyx describes it");

struct kvmexit_lane {
    /* stored by the producer */
    uint64_t owner;   /* atomic; its kvm_run, or 0 */
    uint64_t tail;    /* atomic; entries so far */
    uint64_t seen;    /* `head`, as the producer last saw it */
    uint64_t dropped; /* atomic */
    uint32_t waits;   /* atomic; it sleeps until `head` changes, or is about to */
    /* stored by the consumer */
    uint64_t head __attribute__((aligned(64))); /* atomic; entries taken so far */
} __attribute__((aligned(64)));

struct kvmexit_ring {
    struct kvmexit_lane *lanes;    /* of vCPUs, and the last one of posted writes (_coalesced.h) */
    struct kvmexit_entry *entries; /* of the first lane, the second, ... */
    uint64_t room;                 /* of a lane, in entries: a power of two */
    uint32_t lane_count;
    int full;                      /* KVMEXIT_FULL_* */
    int eventfd, is_read;          /* is_read: by us. Else its owner does that */
    uint32_t bell;                 /* atomic */
    uint32_t next;                 /* the lane that is drained first; with the lock */
    pthread_mutex_t lock;          /* of who drains; nothing waits while it is held */
    pthread_mutex_t posted;        /* of the last lane's producer: several VMs' drainers may be at it. A leaf, held for one entry */
};

/* ---- the eventfd ---- */

/* After `tail` was stored (W1). */
static inline void kvmexit_ring_call(struct kvmexit_ring *r)
{
    uint32_t armed = KVMEXIT_ARMED;
    if (__atomic_load_n(&r->bell, __ATOMIC_SEQ_CST) != KVMEXIT_ARMED)
        return;
    /* W2: one of those who saw it ARMED rings, or its late write would make a disarmed eventfd readable */
    if (__atomic_compare_exchange_n(&r->bell, &armed, KVMEXIT_RINGING, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        eventfd_write(r->eventfd, 1);
        __atomic_store_n(&r->bell, KVMEXIT_RUNG, __ATOMIC_RELEASE); /* W3: after the write: now it can be read */
    }
}

/* ---- the producer ---- */

static inline struct kvmexit_lane *kvmexit_ring_lane(struct kvmexit_ring *r, const struct kvmexit_exit *exit)
{
    const uint64_t me = (uint64_t)(uintptr_t)exit->run;
    const uint32_t count = r->lane_count - 1;
    uint32_t at = exit->vcpu < count ? exit->vcpu : exit->vcpu % count, i;
    for (i = 0; i < count; i++) {
        struct kvmexit_lane *lane = &r->lanes[at];
        uint64_t owner = __atomic_load_n(&lane->owner, __ATOMIC_RELAXED);
        if (owner == me)
            return lane;
        if (owner == 0 && __atomic_compare_exchange_n(&lane->owner, &owner, me, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            return lane;
        at = at + 1 == count ? 0 : at + 1;
    }
    return NULL;
}

static inline int kvmexit_ring_has_room(const struct kvmexit_ring *r, struct kvmexit_lane *lane, uint64_t count)
{
    if (r->room - (lane->tail - lane->seen) >= count)
        return 1;
    lane->seen = __atomic_load_n(&lane->head, __ATOMIC_SEQ_CST);
    return r->room - (lane->tail - lane->seen) >= count;
}

static inline int64_t kvmexit_ring_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* 0: there is none yet. */
static inline int kvmexit_ring_wait(
    struct kvmexit_ring *r, struct kvmexit_lane *lane, uint64_t count, const struct kvm_run *run)
{
    const struct timespec tick = {0, KVMEXIT_RING_TICK_MS * 1000000L};
    const int64_t until = kvmexit_ring_now_ms() + KVMEXIT_RING_PATIENCE_MS;
    int found;
    __atomic_store_n(&lane->waits, 1, __ATOMIC_SEQ_CST); /* W7: before the kernel compares `head` */
    while (!(found = kvmexit_ring_has_room(r, lane, count)) && !__atomic_load_n(&run->immediate_exit, __ATOMIC_RELAXED)
           && kvmexit_ring_now_ms() < until)
        /* W8: with the `head` that had no room. SAFETY: its low half, x86 being little-endian; that it comes round to the
           same half within a tick would cost the rest of that tick */
        syscall(SYS_futex, (uint32_t *)&lane->head, FUTEX_WAIT_PRIVATE, (uint32_t)lane->seen, &tick, NULL, 0);
    __atomic_store_n(&lane->waits, 0, __ATOMIC_RELAXED);
    return found;
}

/* Before what is to be noted is done. DONE: put() it into `lane`; there is room for `count`, or the policy is to drop. */
static inline int kvmexit_ring_admit(
    struct kvmexit_ring *r, const struct kvmexit_exit *exit, uint64_t count, struct kvmexit_lane **lane)
{
    *lane = kvmexit_ring_lane(r, exit);
    if (*lane == NULL)
        return KVMEXIT_PASS;
    if (r->full == KVMEXIT_FULL_DROP || kvmexit_ring_has_room(r, *lane, count))
        return KVMEXIT_DONE;
    if (r->full == KVMEXIT_FULL_STOP || count > r->room)
        return KVMEXIT_STOP;
    return kvmexit_ring_wait(r, *lane, count, exit->run) ? KVMEXIT_DONE : KVMEXIT_LATER;
}

/* The producer's `count` accesses of `size` bytes each, at `data`, or none of them. */
static inline void kvmexit_ring_put(
    struct kvmexit_ring *r, struct kvmexit_lane *lane, const struct kvmexit_exit *exit, uint64_t address,
    const uint8_t *data, uint64_t size, uint64_t count, uint16_t flags)
{
    const uint64_t tail = lane->tail, dropped = lane->dropped;
    uint64_t i;
    if (!kvmexit_ring_has_room(r, lane, count)) {
        __atomic_store_n(&lane->dropped, dropped + count, __ATOMIC_RELAXED);
        return;
    }
    for (i = 0; i < count; i++, data += size) {
        struct kvmexit_entry *entry = &r->entries[(uint64_t)(lane - r->lanes) * r->room + ((tail + i) & (r->room - 1))];
        entry->address = address;
        entry->data = 0;
        switch (size) { /* x86 is little-endian */
        case 1: entry->data = *data; break;
        case 4: memcpy(&entry->data, data, 4); break;
        case 8: memcpy(&entry->data, data, 8); break;
        default: memcpy(&entry->data, data, size); break;
        }
        entry->sequence = tail + dropped + i;
        entry->vcpu = exit->vcpu;
        entry->size = (uint8_t)size;
        entry->reason = (uint8_t)exit->reason;
        entry->flags = flags;
    }
    __atomic_store_n(&lane->tail, tail + count, __ATOMIC_SEQ_CST); /* W1: after the entries, before `bell` is looked at */
    kvmexit_ring_call(r);
}

/* The handler: writes to ports, memory and MSRs. A string instruction's accesses go in together, or not at all. */
static inline int kvmexit_ring_take_write(struct kvmexit_exit *exit, void *opaque)
{
    struct kvmexit_ring *r = (struct kvmexit_ring *)opaque;
    struct kvmexit_lane *lane;
    int verdict;
    if (!exit->is_write || exit->data == NULL || exit->size > sizeof(uint64_t))
        return KVMEXIT_PASS;
    if (exit->run == NULL) { /* a posted write: no exit that could wait or be returned, so put() drops what finds no room */
        pthread_mutex_lock(&r->posted);
        kvmexit_ring_put(r, &r->lanes[r->lane_count - 1], exit, exit->address, (const uint8_t *)exit->data, exit->size, 1, 0);
        pthread_mutex_unlock(&r->posted);
        return KVMEXIT_DONE;
    }
    verdict = kvmexit_ring_admit(r, exit, exit->count, &lane);
    if (verdict == KVMEXIT_DONE)
        kvmexit_ring_put(r, lane, exit, exit->address, (const uint8_t *)exit->data, exit->size, exit->count, 0);
    return verdict;
}

/* ---- the consumer ---- */

/* With the lock. At least what there was before; SEQ_CST for W5. */
static inline uint64_t kvmexit_ring_waiting(const struct kvmexit_ring *r)
{
    uint64_t n = 0;
    uint32_t i;
    for (i = 0; i < r->lane_count; i++)
        n += __atomic_load_n(&r->lanes[i].tail, __ATOMIC_SEQ_CST) - r->lanes[i].head;
    return n;
}

static inline uint64_t kvmexit_ring_pending(struct kvmexit_ring *r)
{
    uint64_t n;
    pthread_mutex_lock(&r->lock);
    n = kvmexit_ring_waiting(r);
    pthread_mutex_unlock(&r->lock);
    return n;
}

static inline uint64_t kvmexit_ring_dropped(const struct kvmexit_ring *r)
{
    uint64_t n = 0;
    uint32_t i;
    for (i = 0; i < r->lane_count; i++)
        n += __atomic_load_n(&r->lanes[i].dropped, __ATOMIC_RELAXED);
    return n;
}

/* Take out up to `count` entries, each lane's in order. Where they do not suffice for all, the lanes take turns. */
static inline uint64_t kvmexit_ring_drain(struct kvmexit_ring *r, struct kvmexit_entry *to, uint64_t count)
{
    uint64_t n = 0;
    uint32_t i;
    pthread_mutex_lock(&r->lock);
    for (i = 0; i < r->lane_count && n < count; i++) {
        struct kvmexit_lane *lane = &r->lanes[r->next];
        const struct kvmexit_entry *entries = r->entries + r->next * r->room;
        uint64_t head = lane->head, at = head & (r->room - 1);
        uint64_t k = __atomic_load_n(&lane->tail, __ATOMIC_ACQUIRE) - head, first;
        r->next = r->next + 1 == r->lane_count ? 0 : r->next + 1;
        if (k == 0)
            continue;
        if (k > count - n)
            k = count - n;
        first = k < r->room - at ? k : r->room - at;
        memcpy(to + n, entries + at, first * sizeof *to);
        memcpy(to + n + first, entries, (k - first) * sizeof *to);
        __atomic_store_n(&lane->head, head + k, __ATOMIC_SEQ_CST); /* after the copy; W9: before `waits` is looked at */
        if (__atomic_load_n(&lane->waits, __ATOMIC_SEQ_CST))
            syscall(SYS_futex, (uint32_t *)&lane->head, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
        n += k;
    }
    pthread_mutex_unlock(&r->lock);
    return n;
}

/* Nothing was found: be called when there is something. -> whether there is already. */
static inline int kvmexit_ring_rest(struct kvmexit_ring *r)
{
    const int64_t until = kvmexit_ring_now_ms() + KVMEXIT_RING_PATIENCE_MS;
    int found = 0;
    pthread_mutex_lock(&r->lock);
    /* Who rings has written to the eventfd, or is about to, and stores RUNG next. Who waits for edges may have had this one, and
       comes to no other unless it is armed: so wait. The limit is for an eventfd of the caller's that blocks. */
    while (__atomic_load_n(&r->bell, __ATOMIC_ACQUIRE) == KVMEXIT_RINGING && kvmexit_ring_now_ms() < until)
        sched_yield();
    if (__atomic_load_n(&r->bell, __ATOMIC_ACQUIRE) == KVMEXIT_RUNG) {
        eventfd_t value;
        if (r->is_read)
            eventfd_read(r->eventfd, &value); /* W4: before it is armed: later it would take another's call back */
        __atomic_store_n(&r->bell, KVMEXIT_ARMED, __ATOMIC_SEQ_CST); /* W5: before the lanes are looked at again */
        found = kvmexit_ring_waiting(r) != 0;
        if (found)
            kvmexit_ring_call(r); /* W6: who waits for the eventfd need not be who drains this */
    }
    pthread_mutex_unlock(&r->lock);
    return found;
}

/* ---- coming and going ---- */

/* -> 0 or an errno. `room` is a power of two. What it fails to make is left for kvmexit_ring_free(). */
static inline int kvmexit_ring_init(struct kvmexit_ring *r, uint64_t room, uint32_t vcpus, int full)
{
    const uint64_t lanes = (uint64_t)vcpus + 1;
    int error = pthread_mutex_init(&r->lock, NULL);
    if (error)
        return error;
    error = pthread_mutex_init(&r->posted, NULL);
    if (error)
        return error;
    r->room = room;
    r->full = full;
    if (posix_memalign((void **)&r->lanes, 64, lanes * sizeof *r->lanes) != 0)
        return ENOMEM;
    memset(r->lanes, 0, lanes * sizeof *r->lanes);
    r->entries = malloc(lanes * room * sizeof *r->entries); /* of a lane nobody uses no page is ever touched */
    if (r->entries == NULL)
        return ENOMEM;
    r->lane_count = (uint32_t)lanes;
    return 0;
}

static inline void kvmexit_ring_free(struct kvmexit_ring *r)
{
    free(r->lanes);
    free(r->entries);
    pthread_mutex_destroy(&r->posted);
    pthread_mutex_destroy(&r->lock);
}

#endif /* KVMEXIT_RING_H */
