/*
 * Recording: an *enter* in front of a vCPU's own (kvmexit_vcpu.enter), so that it costs nothing while it is off. It sees the
 * page right after KVM_RUN, when the exit is noted, and right before the next, when its answer is in. Part of _record.pyx alone.
 *
 * The vCPU's thread appends to a file that is mapped. It makes no system call as long as a thread of its own (the helper)
 * has allocated and populated what comes next; where that falls behind, the vCPU allocates by itself and takes the page faults.
 * What cannot be allocated ends the recording, never the vCPU.
 *
 * T1  A record is whole when `sizes`, stored last with release, is not 0: what is allocated is zeros. A killed process leaves
 *     its stores in the page cache, in their order (x86 keeps it). So all records before the first 0 are whole.
 * T2  `settled` is stored, with release, after the answer.
 * T3  `ready`, of the present part, grows by whoever has allocated up to there: both may, at once, the same bytes, and
 *     fallocate() leaves what is there as it is. So no lock: a stale value costs one call more.
 * T4  Parts come and go under `lock`: the helper holds it for one step at most (allocating and populating 256 KiB, creating or
 *     closing a file), the vCPU's thread takes it once a part, and would do the same by itself. Nobody waits for anything else
 *     while holding it.
 */
#ifndef KVMEXIT_RECORD_H
#define KVMEXIT_RECORD_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "_stats.h"
#include "_trace_format.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

#define KVMEXIT_TRACE_STEP ((uint64_t)256 << 10) /* bytes allocated, and the vCPU's wake-ups of the helper, at a time */
#define KVMEXIT_TRACE_AHEAD ((uint64_t)4 << 20)  /* bytes the helper keeps ready */
#define KVMEXIT_TRACE_TRUNCATED 10000            /* `failed`: somebody cut the file */

enum { KVMEXIT_PART_EMPTY, KVMEXIT_PART_READY, KVMEXIT_PART_DONE };

struct kvmexit_trace_part {
    int state;
    int fd;
    uint8_t *base;
    uint64_t size;  /* of the mapping: what the file may grow to */
    uint64_t ready; /* atomic; bytes allocated (T3) */
    uint64_t used;  /* when it is DONE */
    uint32_t number;
};

struct kvmexit_trace {
    /* the vCPU's thread's */
    int (*enter)(struct kvmexit_vcpu *); /* the one behind */
    uint8_t *at, *soft;                  /* where the next record goes; beyond `soft` there is something to do first */
    struct kvmexit_trace_record *exit;   /* the one that KVM has not completed, or NULL */
    struct kvmexit_trace_record *other;  /* a return since, of which run() has not said what it is */
    uint8_t *answer;
    struct kvmexit_trace_shape shape;
    int registers;
    uint64_t records, lost; /* atomic; written by the vCPU's thread */
    int failed;             /* atomic; errno, or KVMEXIT_TRACE_TRUNCATED: nothing is recorded any more */

    /* shared with the helper */
    pthread_mutex_t lock;
    struct kvmexit_trace_part parts[2];
    int active;
    uint64_t reached; /* atomic; how far the vCPU is in the present part */
    uint32_t wake;    /* atomic; futex */
    int stop;         /* atomic */
    pthread_t helper;
    int has_helper;

    /* constant */
    char *path; /* of the first part; the others append .1, .2, ... */
    uint32_t keep; /* parts; 0: all */
    uint32_t oldest; /* under `lock`; the first part that is there */
    struct kvmexit_trace_header header;
};

static __thread __attribute__((tls_model("initial-exec"))) struct kvmexit_trace *kvmexit_writing;
static struct sigaction kvmexit_previous_sigbus;
static uint8_t kvmexit_trace_said[16]; /* by Outcome of _loop.pxd: _record.pyx fills it in */

/* Whose file this thread writes to, from here on: told to the signal handler, so in the program's order. */
static inline void kvmexit_trace_touch(struct kvmexit_trace *t)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    kvmexit_writing = t;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

/*
 * A page of the file that is not there any more: somebody has cut the file, or the disk fails. The rest of the mapping becomes
 * anonymous memory, the store goes there, and the recording has ended. Any other SIGBUS is who had it before us.
 */
static void kvmexit_on_sigbus(int number, siginfo_t *info, void *context)
{
    struct kvmexit_trace *t = kvmexit_writing;
    const uintptr_t at = (uintptr_t)info->si_addr & ~(uintptr_t)4095;
    const struct kvmexit_trace_part *p = t ? &t->parts[t->active] : NULL;
    const uintptr_t base = p ? (uintptr_t)p->base : 0;
    if (base && at >= base && at < base + p->size
        && syscall(SYS_mmap, at, base + p->size - at, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
            == (long)at) {
        __atomic_store_n(&t->failed, KVMEXIT_TRACE_TRUNCATED, __ATOMIC_RELAXED);
        __atomic_store_n(&t->soft, NULL, __ATOMIC_RELAXED);
        return;
    }
    if (kvmexit_previous_sigbus.sa_flags & SA_SIGINFO)
        kvmexit_previous_sigbus.sa_sigaction(number, info, context);
    else if (kvmexit_previous_sigbus.sa_handler != SIG_DFL && kvmexit_previous_sigbus.sa_handler != SIG_IGN)
        kvmexit_previous_sigbus.sa_handler(number);
    else
        sigaction(SIGBUS, &kvmexit_previous_sigbus, NULL); /* the access comes again, and kills */
}

/* Once a process, under the GIL. */
static int kvmexit_watch_sigbus(void)
{
    static int watching;
    struct sigaction action;
    if (watching)
        return 0;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = kvmexit_on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, NULL, &kvmexit_previous_sigbus) != 0 || sigaction(SIGBUS, &action, NULL) != 0)
        return errno;
    watching = 1;
    return 0;
}

/* ---- parts: files ---- */

/* Allocate a step of a file beyond `from`, perhaps once more. -> 0, or why not, as `failed`. */
static int kvmexit_trace_allocate(struct kvmexit_trace_part *p, uint64_t from, int populate)
{
    const uint64_t to = p->size - from < KVMEXIT_TRACE_STEP ? p->size : from + KVMEXIT_TRACE_STEP;
    uint64_t ready = from;
    struct stat now;
    if (fstat(p->fd, &now) == 0 && (uint64_t)now.st_size < from)
        return KVMEXIT_TRACE_TRUNCATED; /* growing it again would hide that */
    while (fallocate(p->fd, 0, (off_t)from, (off_t)(to - from)) != 0)
        if (errno != EINTR)
            return errno;
    if (populate)
        madvise(p->base + from, to - from, MADV_POPULATE_WRITE); /* an older kernel has the vCPU take the faults */
    while (ready < to && !__atomic_compare_exchange_n(&p->ready, &ready, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        ;
    return 0;
}

static void kvmexit_trace_name(const struct kvmexit_trace *t, uint32_t number, char name[PATH_MAX + 16])
{
    if (number)
        snprintf(name, PATH_MAX + 16, "%s.%u", t->path, number);
    else
        snprintf(name, PATH_MAX + 16, "%s", t->path);
}

/* The file of a part that has ended, cut to what is in use. */
static void kvmexit_trace_retire(struct kvmexit_trace_part *p)
{
    if (ftruncate(p->fd, (off_t)p->used) != 0) { /* then its tail is zeros, which the reader passes over */
    }
    munmap(p->base, p->size);
    close(p->fd);
    p->base = NULL;
    p->state = KVMEXIT_PART_EMPTY;
}

/* Parts that are not to be kept go. With `lock` held, or the helper gone. */
static void kvmexit_trace_prune(struct kvmexit_trace *t)
{
    char name[PATH_MAX + 16];
    while (t->keep && t->oldest + t->keep <= t->parts[t->active].number) {
        kvmexit_trace_name(t, t->oldest++, name);
        unlink(name);
    }
}

/* Have the part that is not in use ready for use. With `lock` held. -> 0, or errno. */
static int kvmexit_trace_prepare(struct kvmexit_trace *t, uint32_t number)
{
    struct kvmexit_trace_part *p = &t->parts[!t->active];
    char name[PATH_MAX + 16];
    int error;
    if (p->state == KVMEXIT_PART_DONE) {
        kvmexit_trace_retire(p);
        kvmexit_trace_prune(t);
    }
    if (p->state == KVMEXIT_PART_READY)
        return 0;
    kvmexit_trace_name(t, number, name);
    p->fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (p->fd < 0)
        return errno;
    p->number = number;
    p->ready = 0;
    p->base = NULL;
    error = kvmexit_trace_allocate(p, 0, 0);
    if (error == EOPNOTSUPP) { /* a file system without: sparse, and a full disk is as a cut file */
        error = ftruncate(p->fd, (off_t)p->size) ? errno : 0;
        __atomic_store_n(&p->ready, p->size, __ATOMIC_RELEASE);
    }
    if (!error) {
        t->header.part = number; /* one writer: `lock` */
        if (pwrite(p->fd, &t->header, sizeof t->header, 0) != (ssize_t)sizeof t->header)
            error = errno ? errno : EIO;
    }
    if (!error) {
        void *base = mmap(NULL, p->size, PROT_READ | PROT_WRITE, MAP_SHARED, p->fd, 0);
        if (base == MAP_FAILED)
            error = errno;
        else
            p->base = (uint8_t *)base;
    }
    if (error) {
        close(p->fd);
        unlink(name);
        return error;
    }
    p->state = KVMEXIT_PART_READY;
    return 0;
}

/* The present part ends: said in its header. */
static void kvmexit_trace_finish(struct kvmexit_trace *t, int ended)
{
    struct kvmexit_trace_part *p = &t->parts[t->active];
    struct kvmexit_trace_header *h = (struct kvmexit_trace_header *)p->base;
    p->used = (uint64_t)(t->at - p->base);
    h->lost = t->lost;
    h->error = (uint32_t)t->failed;
    h->ended = (uint32_t)ended;
    h->size = p->used;
}

static void kvmexit_trace_begin_part(struct kvmexit_trace *t)
{
    struct kvmexit_trace_part *p = &t->parts[t->active];
    t->at = p->base + t->header.header_size;
    t->soft = t->at; /* the first record looks for room */
    t->exit = t->other = NULL; /* of the part before; its answer is in as far as it is known */
    __atomic_store_n(&t->reached, 0, __ATOMIC_RELEASE);
}

/* ---- the helper ---- */

static void kvmexit_trace_ring(struct kvmexit_trace *t)
{
    __atomic_fetch_add(&t->wake, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &t->wake, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* One step of what there is to do. -> whether there may be more. Failures are left to the vCPU, which meets them when it comes
 * there, and says so. */
static int kvmexit_trace_help(struct kvmexit_trace *t)
{
    struct kvmexit_trace_part *p = &t->parts[t->active], *next = &t->parts[!t->active];
    const uint64_t ready = __atomic_load_n(&p->ready, __ATOMIC_ACQUIRE);
    if (next->state == KVMEXIT_PART_DONE) {
        kvmexit_trace_retire(next);
        kvmexit_trace_prune(t);
        return 1;
    }
    if (ready < p->size && ready < __atomic_load_n(&t->reached, __ATOMIC_ACQUIRE) + KVMEXIT_TRACE_AHEAD)
        return kvmexit_trace_allocate(p, ready, 1) == 0;
    if (ready == p->size && next->state == KVMEXIT_PART_EMPTY) {
        if (kvmexit_trace_prepare(t, p->number + 1) == 0)
            madvise(next->base, next->ready, MADV_POPULATE_WRITE);
    }
    return 0;
}

static void *kvmexit_trace_helper(void *argument)
{
    struct kvmexit_trace *t = (struct kvmexit_trace *)argument;
    while (!__atomic_load_n(&t->stop, __ATOMIC_SEQ_CST)) {
        const uint32_t seen = __atomic_load_n(&t->wake, __ATOMIC_SEQ_CST);
        int more;
        pthread_mutex_lock(&t->lock);
        more = kvmexit_trace_help(t);
        pthread_mutex_unlock(&t->lock);
        if (!more && !__atomic_load_n(&t->stop, __ATOMIC_SEQ_CST))
            syscall(SYS_futex, &t->wake, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    }
    return NULL;
}

/* ---- the vCPU's thread ---- */

/* The next part. -> 0, or errno. */
static int kvmexit_trace_rotate(struct kvmexit_trace *t)
{
    int error;
    pthread_mutex_lock(&t->lock); /* T4 */
    error = kvmexit_trace_prepare(t, t->parts[t->active].number + 1);
    if (!error) {
        kvmexit_trace_finish(t, KVMEXIT_TRACE_ROTATED);
        t->parts[t->active].state = KVMEXIT_PART_DONE;
        t->active = !t->active;
        kvmexit_trace_begin_part(t);
    }
    pthread_mutex_unlock(&t->lock);
    return error;
}

/* Whether there is room for `size` bytes at `at`: what is not there yet is made. */
static __attribute__((noinline, cold)) int kvmexit_trace_room(struct kvmexit_trace *t, size_t size)
{
    int error = t->failed;
    while (!error) {
        struct kvmexit_trace_part *p = &t->parts[t->active];
        const uint64_t ready = __atomic_load_n(&p->ready, __ATOMIC_ACQUIRE), reached = (uint64_t)(t->at - p->base);
        const uint64_t next = reached + size + KVMEXIT_TRACE_STEP;
        if (reached + size > p->size) {
            error = kvmexit_trace_rotate(t);
            continue;
        }
        if (reached + size > ready) {
            error = kvmexit_trace_allocate(p, ready, 0); /* the helper has fallen behind */
            continue;
        }
        t->soft = p->base + (next < ready ? next : ready);
        __atomic_store_n(&t->reached, reached, __ATOMIC_RELEASE);
        kvmexit_trace_ring(t);
        return 1;
    }
    kvmexit_put(&t->failed, error);
    t->soft = NULL;
    return 0;
}

/* Before an entry: the answer to the exit in hand, and whose it was. */
static inline void kvmexit_trace_settle(struct kvmexit_trace *t, const struct kvmexit_vcpu *v)
{
    struct kvmexit_trace_record *r = t->exit;
    if (__builtin_expect(t->other != NULL, 0)) {
        t->other->outcome = kvmexit_trace_said[v->said & 15];
        t->other = NULL;
    }
    if (r) {
        if (t->shape.answer[0].size)
            kvmexit_trace_gather(&t->shape, v->run, t->answer);
        r->outcome = kvmexit_get(&kvmexit_in_hand(v->stats)->outcome);
        __atomic_store_n(&r->settled, 1, __ATOMIC_RELEASE); /* T2 */
    }
}

/* After it: what came of it. */
static inline void kvmexit_trace_note(
    struct kvmexit_trace *t, const struct kvmexit_vcpu *v, int error, unsigned how, uint64_t entered, uint64_t left)
{
    const struct kvm_run *run = v->run;
    const uint32_t reason = run->exit_reason;
    struct kvmexit_trace_shape shape;
    struct kvmexit_trace_record *r;
    const uint64_t got_gil = v->stats->got_gil;
    size_t words = sizeof *r / KVMEXIT_TRACE_WORD, data_words;
    uint8_t *at;
    shape.words = shape.data = shape.answer_words = 0;
    shape.answer[0].size = 0;
    if (kvmexit_trace_has_payload(error, reason))
        kvmexit_trace_look(&shape, run, v->run_size);
    data_words = shape.data ? kvmexit_trace_words(shape.data) : shape.answer_words;
    if (t->registers && v->regs_synced)
        how |= KVMEXIT_TRACE_REGISTERS;
    if (__builtin_expect(got_gil != 0, 0))
        how |= KVMEXIT_TRACE_WAITED;
    words += shape.words + data_words + kvmexit_trace_tail(how);
    if (kvmexit_trace_completes(error, reason))
        t->exit = NULL;
    if (__builtin_expect(t->at + words * KVMEXIT_TRACE_WORD > t->soft, 0)
        && !kvmexit_trace_room(t, words * KVMEXIT_TRACE_WORD)) {
        kvmexit_add(&t->lost, 1);
        return;
    }
    r = (struct kvmexit_trace_record *)t->at;
    r->run_flags = run->flags;
    r->outcome = KVMEXIT_TRACE_RETRIED;
    r->settled = 0;
    r->entered = entered;
    r->left = left;
    r->rip = *v->rip;
    r->reason = reason;
    r->error = (uint16_t)error;
    r->state = (uint8_t)((run->cr8 & 15) | (run->if_flag ? 16 : 0) | (run->ready_for_interrupt_injection ? 32 : 0));
    r->how = (uint8_t)how;
    at = (uint8_t *)(r + 1);
    if (shape.words == 2)
        memcpy(at, &run->hw, 16);
    else if (shape.words == 3)
        memcpy(at, &run->hw, 24);
    else
        memcpy(at, &run->hw, shape.words * KVMEXIT_TRACE_WORD);
    at += shape.words * KVMEXIT_TRACE_WORD;
    if (shape.data && !shape.answer[0].size) {
        /* SAFETY: kvmexit_trace_look() has checked both against the mapping. */
        if (shape.data == 1)
            *at = *((const uint8_t *)run + run->io.data_offset);
        else
            memcpy(at, (const uint8_t *)run + run->io.data_offset, shape.data);
    }
    if (kvmexit_trace_is_exit(error, reason)) {
        t->exit = r;
        t->shape.answer[0].size = 0;
        if (shape.answer[0].size) {
            t->answer = at;
            t->shape = shape;
        }
        r->outcome = KVMEXIT_PENDING;
    } else if (error == EINTR)
        t->other = r;
    at += data_words * KVMEXIT_TRACE_WORD;
    if (how & KVMEXIT_TRACE_REGISTERS) {
        memcpy(at, &run->s.regs.regs, sizeof(struct kvm_regs));
        at += sizeof(struct kvm_regs);
    }
    if (__builtin_expect(got_gil != 0, 0)) {
        memcpy(at, &(struct kvmexit_trace_wait){v->stats->left_native, got_gil}, sizeof(struct kvmexit_trace_wait));
        v->stats->got_gil = 0;
    }
    __atomic_store_n(&r->sizes, (uint32_t)words | (uint32_t)shape.words << 16, __ATOMIC_RELEASE); /* T1 */
    t->at += words * KVMEXIT_TRACE_WORD;
    kvmexit_add(&t->records, 1);
}

static int kvmexit_enter_recorded(struct kvmexit_vcpu *v)
{
    struct kvmexit_trace *t = v->trace;
    const unsigned how = __atomic_load_n(&v->run->immediate_exit, __ATOMIC_RELAXED) ? KVMEXIT_TRACE_IMMEDIATE : 0;
    uint64_t entered, left;
    int rc;
    kvmexit_trace_touch(t);
    kvmexit_trace_settle(t, v);
    entered = kvmexit_ticks(v->stats);
    rc = t->enter(v);
    left = kvmexit_ticks(v->stats);
    kvmexit_trace_note(t, v, -rc, how, entered, left);
    kvmexit_trace_touch(NULL);
    return rc;
}

/* ---- beginning and end: who calls has the vCPU to himself ---- */

/* Create the first part, and start the helper. -> 0, or errno. */
static int kvmexit_trace_open(struct kvmexit_trace *t)
{
    sigset_t all, before;
    int error = kvmexit_watch_sigbus();
    if (error)
        return error;
    pthread_mutex_init(&t->lock, NULL);
    t->active = 1;
    error = kvmexit_trace_prepare(t, 0);
    if (error)
        return error;
    t->active = 0;
    madvise(t->parts[0].base, t->parts[0].ready, MADV_POPULATE_WRITE);
    kvmexit_trace_begin_part(t);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* the helper is nobody's to deliver signals to */
    t->has_helper = pthread_create(&t->helper, NULL, kvmexit_trace_helper, t) == 0; /* without, the vCPU does all */
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return 0;
}

static void kvmexit_trace_attach(struct kvmexit_trace *t, struct kvmexit_vcpu *v, int pending)
{
    t->enter = v->enter;
    v->trace = t;
    v->enter = kvmexit_enter_recorded;
    v->stats->got_gil = 0;
    if (pending) {
        const uint64_t now = kvmexit_ticks(v->stats);
        const uint32_t reason = v->run->exit_reason;
        kvmexit_trace_touch(t);
        v->run->exit_reason = v->reason; /* what an entry that failed since has overwritten */
        kvmexit_trace_note(t, v, v->error, KVMEXIT_TRACE_BEGUN, now, now);
        v->run->exit_reason = reason;
        kvmexit_trace_touch(NULL);
    }
}

/* `open`: the exit in hand still waits for its answer. */
static void kvmexit_trace_detach(struct kvmexit_trace *t, struct kvmexit_vcpu *v, int open)
{
    v->enter = t->enter;
    v->trace = NULL;
    kvmexit_trace_touch(t);
    if (t->exit && open) {
        t->exit->outcome = kvmexit_get(&kvmexit_in_hand(v->stats)->outcome);
        t->exit = NULL;
    }
    kvmexit_trace_settle(t, v);
    kvmexit_trace_touch(NULL);
}

/* Close the files. In a forked child, which has no helper and must leave the parent's file as it is, only its own descriptors
 * and mappings. */
static void kvmexit_trace_close(struct kvmexit_trace *t, int forked)
{
    int i;
    if (!forked) {
        struct kvmexit_trace_part *p = &t->parts[t->active], *next = &t->parts[!t->active];
        if (t->has_helper) {
            __atomic_store_n(&t->stop, 1, __ATOMIC_SEQ_CST);
            kvmexit_trace_ring(t);
            pthread_join(t->helper, NULL);
        }
        if (t->failed != KVMEXIT_TRACE_TRUNCATED) { /* else its header may be gone, too */
            kvmexit_trace_touch(t);
            kvmexit_trace_finish(t, t->failed ? KVMEXIT_TRACE_FAILED : KVMEXIT_TRACE_CLOSED);
            kvmexit_trace_touch(NULL);
        }
        if (next->state == KVMEXIT_PART_READY) { /* never begun */
            char name[PATH_MAX + 16];
            kvmexit_trace_name(t, next->number, name);
            unlink(name);
        }
        if (next->state != KVMEXIT_PART_EMPTY)
            kvmexit_trace_retire(next);
        kvmexit_trace_prune(t);
        if (t->failed != KVMEXIT_TRACE_TRUNCATED)
            kvmexit_trace_retire(p);
    }
    for (i = 0; i < 2; i++)
        if (t->parts[i].base) {
            munmap(t->parts[i].base, t->parts[i].size);
            close(t->parts[i].fd);
            t->parts[i].base = NULL;
        }
}

#endif /* KVMEXIT_RECORD_H */
