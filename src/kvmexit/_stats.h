/*
 * What a vCPU's exits were, what became of them and how long they took: counts, histograms and the flight recorder.
 *
 * One writer, the thread inside run(); any thread may read meanwhile. So every word that others read is stored and loaded
 * whole (relaxed: plain moves), a count grows by a load and a store, and nothing ever goes down: a reader that wants to begin
 * anew remembers what it saw, and subtracts. Counts of one snapshot may be a few exits apart.
 */
#ifndef KVMEXIT_STATS_H
#define KVMEXIT_STATS_H

#include <cpuid.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <x86intrin.h>

#include "_page.h"

#define KVMEXIT_KINDS 46 /* of exits: as _exits.pxd's PLACES */
#define KVMEXIT_LAST 64  /* exits that the flight recorder gives out, and ... */
#define KVMEXIT_NO_RIP UINT64_MAX
#define KVMEXIT_RING 128 /* ... has room for: the others may be overwritten while it does */

/*
 * What became of an exit first. In the order of stats.OUTCOMES. As long as nobody says otherwise it is native handlers', so
 * that these cost nothing here; their number is what is left of all exits.
 */
enum { KVMEXIT_NATIVE, KVMEXIT_PYTHON, KVMEXIT_CALLER, KVMEXIT_RACE, KVMEXIT_ERROR, KVMEXIT_OUTCOMES,
    KVMEXIT_PENDING = KVMEXIT_OUTCOMES };
#define KVMEXIT_ALL KVMEXIT_NATIVE /* the column of `counts` */

/* Where time goes. In the order of stats.PHASES. */
enum { KVMEXIT_IN_KVM, KVMEXIT_IN_NATIVE, KVMEXIT_IN_GIL, KVMEXIT_IN_PYTHON, KVMEXIT_PHASES };

/*
 * Log-linear: a bucket a tick up to 32, then 16 an octave, up to 2**42 ticks (20 minutes and more). A value anywhere in a bucket
 * is within 1/16 of the bucket's beginning.
 */
#define KVMEXIT_SUB_BITS 4
#define KVMEXIT_TOP_BITS 42
#define KVMEXIT_BUCKETS ((KVMEXIT_TOP_BITS - KVMEXIT_SUB_BITS + 1) << KVMEXIT_SUB_BITS)

struct kvmexit_histogram {
    uint64_t sum; /* ticks */
    uint64_t buckets[KVMEXIT_BUCKETS];
};

/* An exit as the flight recorder keeps it. The payload is told apart when it is read. */
struct kvmexit_record {
    uint64_t rip;        /* or KVMEXIT_NO_RIP */
    uint64_t payload[3]; /* the union's first bytes */
    uint32_t reason;
    uint16_t error;
    uint8_t place, outcome;
};

static const uint64_t kvmexit_no_rip = KVMEXIT_NO_RIP;

struct kvmexit_stats {
    /* what every exit needs, in one cache line */
    uint64_t recorded; /* exits, ever: that one's record is the next to be written */
    uint32_t timing;   /* written by anyone: 0 while times are not measured, else a number that each switching on makes anew */
    uint32_t switched; /* the last such number */
    uint32_t timed;    /* what `timing` was when the present phase began; another value than it: there is none */
    int phase;
    uint64_t began, left_native; /* ticks */
    uint64_t got_gil; /* ticks; since the last record of a recording: 0 if it did not */
    int tsc; /* ticks of the time stamp counter, else of CLOCK_MONOTONIC */

    /* what a snapshot is: stats.py knows its layout */
    uint64_t counts[KVMEXIT_KINDS][KVMEXIT_OUTCOMES] __attribute__((aligned(64)));
    struct kvmexit_histogram times[KVMEXIT_PHASES];

    struct kvmexit_record ring[KVMEXIT_RING] __attribute__((aligned(64)));
};

#define KVMEXIT_WORDS (KVMEXIT_KINDS * KVMEXIT_OUTCOMES + KVMEXIT_PHASES * (1 + KVMEXIT_BUCKETS))
_Static_assert(offsetof(struct kvmexit_stats, times) == offsetof(struct kvmexit_stats, counts) + 8 * KVMEXIT_KINDS * KVMEXIT_OUTCOMES,
    "a snapshot is one array");

#define kvmexit_get(at) __atomic_load_n(at, __ATOMIC_RELAXED)
#define kvmexit_put(at, value) __atomic_store_n(at, value, __ATOMIC_RELAXED)
#define kvmexit_add(at, value) kvmexit_put(at, *(at) + (value)) /* the only writer's */

/* ---- the vCPU's side: exits ---- */

/* An exit or fault has come, and is classified. */
static inline void kvmexit_remember(struct kvmexit_stats *s, const struct kvmexit_vcpu *v)
{
    const uint64_t n = s->recorded, *payload = (const uint64_t *)&v->run->hw;
    struct kvmexit_record *r = &s->ring[n % KVMEXIT_RING];
    __atomic_thread_fence(__ATOMIC_RELEASE); /* F1: `recorded` was stored before the oldest record is overwritten */
    kvmexit_put(&r->rip, *v->rip);
    kvmexit_put(&r->payload[0], payload[0]);
    kvmexit_put(&r->payload[1], payload[1]);
    kvmexit_put(&r->payload[2], payload[2]);
    kvmexit_put(&r->reason, v->reason);
    kvmexit_put(&r->error, (uint16_t)v->error);
    kvmexit_put(&r->place, (uint8_t)v->place);
    kvmexit_put(&r->outcome, KVMEXIT_NATIVE);
    kvmexit_add(&s->counts[v->place][KVMEXIT_ALL], 1);
    __atomic_store_n(&s->recorded, n + 1, __ATOMIC_RELEASE); /* F2: after the record */
}

static inline struct kvmexit_record *kvmexit_in_hand(struct kvmexit_stats *s)
{
    return &s->ring[(s->recorded - 1) % KVMEXIT_RING];
}

/* It leaves the burst, and whose it is will show. */
static inline void kvmexit_hand_over(struct kvmexit_stats *s)
{
    kvmexit_put(&kvmexit_in_hand(s)->outcome, KVMEXIT_PENDING);
}

/* What became of it then. The first word counts: of an exit that run() offers again, the second is passed over. */
static inline void kvmexit_settle(struct kvmexit_stats *s, int outcome)
{
    struct kvmexit_record *r = kvmexit_in_hand(s);
    if (r->outcome != KVMEXIT_PENDING)
        return;
    kvmexit_put(&r->outcome, (uint8_t)outcome);
    if (outcome != KVMEXIT_NATIVE)
        kvmexit_add(&s->counts[r->place][outcome], 1);
}

/* ---- the vCPU's side: times ---- */

static inline uint64_t kvmexit_ticks(const struct kvmexit_stats *s)
{
    return __builtin_expect(s->tsc, 1) ? __rdtsc() : kvmexit_now_ns();
}

static inline unsigned kvmexit_bucket(uint64_t ticks)
{
    const uint64_t most = (1ull << KVMEXIT_TOP_BITS) - 1, v = ticks < most ? ticks : most;
    const unsigned shift = 63 - (unsigned)__builtin_clzll(v | 1u << KVMEXIT_SUB_BITS) - KVMEXIT_SUB_BITS;
    return (shift << KVMEXIT_SUB_BITS) + (unsigned)(v >> shift);
}

static inline void kvmexit_note(struct kvmexit_stats *s, int phase, uint64_t begin, uint64_t end)
{
    struct kvmexit_histogram *h = &s->times[phase];
    const uint64_t ticks = (int64_t)(end - begin) > 0 ? end - begin : 0; /* two processors' counters can be a little apart */
    kvmexit_add(&h->sum, ticks);
    kvmexit_add(&h->buckets[kvmexit_bucket(ticks)], 1);
}

/* The present phase ends, where there is one, and another begins. */
static inline void kvmexit_enter_phase(struct kvmexit_stats *s, int phase)
{
    const uint32_t timing = kvmexit_get(&s->timing);
    uint64_t now;
    if (__builtin_expect(!timing, 1))
        return;
    now = kvmexit_ticks(s);
    if (s->timed == timing)
        kvmexit_note(s, s->phase, s->began, now);
    s->timed = timing;
    s->phase = phase;
    s->began = now;
}

/* The last thing without the GIL. */
static inline void kvmexit_leave_native(struct kvmexit_stats *s)
{
    if (__builtin_expect(kvmexit_get(&s->timing) != 0, 0))
        s->left_native = kvmexit_ticks(s);
}

/* The first thing with it. The wait is cut out of the phase that began when KVM came back, and that phase is Python's. */
static inline void kvmexit_enter_python(struct kvmexit_stats *s)
{
    const uint32_t timing = kvmexit_get(&s->timing);
    uint64_t now;
    if (__builtin_expect(!timing || s->timed != timing, 1))
        return;
    now = kvmexit_ticks(s);
    s->got_gil = now;
    kvmexit_note(s, KVMEXIT_IN_GIL, s->left_native, now);
    s->began += now - s->left_native;
    s->phase = KVMEXIT_IN_PYTHON;
}

/* What comes now is nobody's time: run() returns, or parks. */
static inline void kvmexit_leave_python(struct kvmexit_stats *s)
{
    kvmexit_enter_phase(s, KVMEXIT_IN_PYTHON);
    s->timed = 0;
}

/* ---- any thread's side ---- */

/* Whether the time stamp counter runs at one rate for ever, and may be read here. */
static inline int kvmexit_has_tsc(void)
{
    unsigned a, b, c, d;
    int mode = 0;
    return __get_cpuid(0x80000007, &a, &b, &c, &d) && d & 1 << 8 /* invariant */
        && prctl(PR_GET_TSC, &mode) == 0 && mode == PR_TSC_ENABLE;
}

static inline struct kvmexit_stats *kvmexit_new_stats(int tsc)
{
    struct kvmexit_stats *s = (struct kvmexit_stats *)aligned_alloc(64, sizeof *s);
    if (s) {
        memset(s, 0, sizeof *s);
        s->tsc = tsc;
    }
    return s;
}

/* With the GIL held: who switches on takes a number that nobody had. */
static inline void kvmexit_set_timing(struct kvmexit_stats *s, int on)
{
    if (on != (kvmexit_get(&s->timing) != 0))
        kvmexit_put(&s->timing, on ? ++s->switched : 0);
}

static inline int kvmexit_timing(const struct kvmexit_stats *s)
{
    return kvmexit_get(&s->timing) != 0;
}

static inline void kvmexit_snapshot(const struct kvmexit_stats *s, uint64_t words[KVMEXIT_WORDS])
{
    const uint64_t *from = &s->counts[0][0], recorded = __atomic_load_n(&s->recorded, __ATOMIC_ACQUIRE);
    const struct kvmexit_record *r = &s->ring[(recorded - 1) % KVMEXIT_RING];
    const int pending = kvmexit_get(&r->outcome) == KVMEXIT_PENDING; /* looked at first: then `counts` has it */
    const size_t at = kvmexit_get(&r->place) * KVMEXIT_OUTCOMES + KVMEXIT_ALL; /* perhaps another's by now, for a slow reader */
    size_t i;
    for (i = 0; i < KVMEXIT_WORDS; i++)
        words[i] = kvmexit_get(&from[i]);
    if (pending && words[at])
        words[at]--;
}

/* Copy the last records, oldest first; -> how many. */
static inline size_t kvmexit_last(const struct kvmexit_stats *s, struct kvmexit_record records[KVMEXIT_LAST])
{
    const uint64_t end = __atomic_load_n(&s->recorded, __ATOMIC_ACQUIRE); /* F2: then what it counts is there */
    const uint64_t begin = end > KVMEXIT_LAST ? end - KVMEXIT_LAST : 0;
    uint64_t i, now, torn;
    for (i = begin; i < end; i++) {
        const struct kvmexit_record *r = &s->ring[i % KVMEXIT_RING];
        struct kvmexit_record *copy = &records[i - begin];
        copy->rip = kvmexit_get(&r->rip);
        copy->payload[0] = kvmexit_get(&r->payload[0]);
        copy->payload[1] = kvmexit_get(&r->payload[1]);
        copy->payload[2] = kvmexit_get(&r->payload[2]);
        copy->reason = kvmexit_get(&r->reason);
        copy->error = kvmexit_get(&r->error);
        copy->place = kvmexit_get(&r->place);
        copy->outcome = kvmexit_get(&r->outcome);
    }
    /* Had a load above seen a store to the record of exit n, which takes the place of n - RING, the load below would see
     * `recorded` at n at least (F1, and this fence). */
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    now = kvmexit_get(&s->recorded);
    torn = now < begin + KVMEXIT_RING ? 0 : now - KVMEXIT_RING + 1 - begin;
    if (torn >= end - begin)
        return 0;
    memmove(records, records + torn, (size_t)(end - begin - torn) * sizeof *records);
    return (size_t)(end - begin - torn);
}

#endif /* KVMEXIT_STATS_H */
