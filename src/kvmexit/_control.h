/*
 * What reaches a running vCPU from other threads and from signal handlers: kicks, time-outs and the tick for Ctrl-C.
 * Part of _loop.pyx alone: the thread-local state below must exist once.
 *
 * The protocol, in full (docs/control.md argues it at length; K1, P5 and the like, here and in the code, are lines of the
 * models in docs/protocols, whose table says what breaks without each):
 *
 *   kick():         request |= KICK;  immediate_exit = 1;  tgkill(the thread inside run(), if any)
 *   signal handler: immediate_exit of this thread's current vCPU = 1
 *   run():          unblock the signal;  current = this vCPU;  tid = gettid();  [request set? immediate_exit = 1];  KVM_RUN...
 *   on EINTR:       immediate_exit = 0 (exchange), THEN read request and the deadline
 *
 * No kick is lost. The kicker stores request before immediate_exit; EINTR clears immediate_exit before it reads request.
 * So either the clear comes after the kicker's store, and the read sees the request; or the store comes after the
 * clear, and the next entry returns EINTR at once. An entry that had already sampled immediate_exit as 0 is ended by the
 * signal: the kicker loads tid after its stores, run() stores tid before its first entry samples immediate_exit (both
 * sequentially consistent), so at least one of them sees the other.
 * None is stale. Only request makes run() say "kick", and it is cleared by the return that says so. A left-over
 * immediate_exit costs one EINTR that nobody asked for, which re-enters.
 */
#ifndef KVMEXIT_CONTROL_H
#define KVMEXIT_CONTROL_H

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "_page.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define KVMEXIT_TICK_NS 100000000ull /* how long a Ctrl-C can stay unnoticed on the main thread */
#define KVMEXIT_NEVER UINT64_MAX

/* ---- one thread's side ---- */

#if defined(__GLIBC__)
#define KVMEXIT_TLS static __thread __attribute__((tls_model("initial-exec"))) /* a handler must not allocate TLS */
#else
#define KVMEXIT_TLS static __thread
#endif

struct kvmexit_thread {
    struct kvmexit_vcpu *current; /* whose immediate_exit the handler sets */
    uint64_t armed_ns;            /* first expiry asked of the timer; 0: not armed */
    timer_t timer;
    pid_t timer_pid; /* the process the timer belongs to (timers do not survive fork); 0: none yet */
    pid_t pid, tid;
};

KVMEXIT_TLS struct kvmexit_thread kvmexit_this;
static int kvmexit_signal; /* 0: not installed yet */
static struct sigaction kvmexit_previous;
static pthread_key_t kvmexit_thread_end;
static int kvmexit_poison_users; /* atomic; how many want poison caught: _poison.h */

/* A signal that nobody wants any more stops the timer, so a thread that left run() is disturbed once at most. */
static void kvmexit_on_signal(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    struct kvmexit_vcpu *v = kvmexit_this.current;
    int ours = info->si_code == SI_TIMER && info->si_value.sival_ptr == (void *)&kvmexit_signal;
    if (v)
        __atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    else if (ours && kvmexit_this.armed_ns) {
        struct itimerspec off;
        memset(&off, 0, sizeof off);
        timer_settime(kvmexit_this.timer, 0, &off, NULL);
        kvmexit_this.armed_ns = 0;
    }
    errno = saved;
    /* The signal may have been somebody's before us, and a kick cannot be told from theirs: call on. */
    if (!ours) {
        if (kvmexit_previous.sa_flags & SA_SIGINFO)
            kvmexit_previous.sa_sigaction(number, info, context);
        else if (kvmexit_previous.sa_handler != SIG_DFL && kvmexit_previous.sa_handler != SIG_IGN)
            kvmexit_previous.sa_handler(number);
    }
}

static void kvmexit_delete_timer(void *unused)
{
    (void)unused;
    if (kvmexit_this.timer_pid == getpid())
        timer_delete(kvmexit_this.timer);
    kvmexit_this.timer_pid = 0;
    kvmexit_this.armed_ns = 0;
}

/* Once a process, under the GIL. SA_RESTART: system calls of the embedder's code are not cut short (KVM_RUN always is). */
static int kvmexit_install(int number)
{
    struct sigaction action;
    if (kvmexit_signal)
        return 0;
    if ((errno = pthread_key_create(&kvmexit_thread_end, kvmexit_delete_timer)) != 0)
        return -1;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = kvmexit_on_signal;
    action.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    /* The previous handler must be known before ours can run. */
    if (sigaction(number, NULL, &kvmexit_previous) != 0 || sigaction(number, &action, NULL) != 0) {
        pthread_key_delete(kvmexit_thread_end);
        return -1;
    }
    kvmexit_signal = number;
    return 0;
}

/*
 * Have the signal sent to this thread at `when` or sooner, then every tick for as long as somebody is in run(). Called with
 * `current` set, so the handler cannot be disarming at the same time. The repetition is for a first shot that came to
 * nothing: handlers that a sanitizer or an embedder deferred past the entry.
 */
static int kvmexit_arm(uint64_t when, uint64_t now)
{
    struct kvmexit_thread *t = &kvmexit_this;
    struct itimerspec set;
    if (when == KVMEXIT_NEVER || (t->armed_ns > now && t->armed_ns <= when))
        return 0;
    if (t->timer_pid != t->pid) {
        struct sigevent event;
        memset(&event, 0, sizeof event);
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = kvmexit_signal;
        event.sigev_value.sival_ptr = (void *)&kvmexit_signal;
        event.sigev_notify_thread_id = t->tid;
        if (timer_create(CLOCK_MONOTONIC, &event, &t->timer) != 0)
            return -1;
        t->timer_pid = t->pid;
        pthread_setspecific(kvmexit_thread_end, t);
    }
    set.it_value.tv_sec = (time_t)(when / 1000000000ull);
    set.it_value.tv_nsec = (long)(when % 1000000000ull);
    set.it_interval.tv_sec = 0;
    set.it_interval.tv_nsec = (long)KVMEXIT_TICK_NS;
    if (timer_settime(t->timer, TIMER_ABSTIME, &set, NULL) != 0)
        return -1;
    t->armed_ns = when;
    return 0;
}

static inline uint64_t kvmexit_wake_ns(const struct kvmexit_vcpu *v, uint64_t now)
{
    uint64_t tick = v->main_thread ? now + KVMEXIT_TICK_NS : KVMEXIT_NEVER;
    return v->deadline_ns < tick ? v->deadline_ns : tick;
}

/* Arm for the run() in progress; -1 with errno. Free of system calls while an earlier setting still serves. */
static int kvmexit_watch(struct kvmexit_vcpu *v)
{
    uint64_t now;
    if (v->deadline_ns == KVMEXIT_NEVER && !v->main_thread)
        return 0;
    now = kvmexit_now_ns();
    if (v->deadline_ns <= now) {
        __atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
        return 0;
    }
    return kvmexit_arm(kvmexit_wake_ns(v, now), now);
}

static void kvmexit_end(struct kvmexit_vcpu *v)
{
    __atomic_store_n(&v->tid, 0, __ATOMIC_SEQ_CST);
    kvmexit_this.current = v->outer;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    if (v->was_blocked || v->bus_was_blocked) {
        sigset_t set;
        sigemptyset(&set);
        if (v->was_blocked)
            sigaddset(&set, kvmexit_signal);
        if (v->bus_was_blocked)
            sigaddset(&set, SIGBUS);
        pthread_sigmask(SIG_BLOCK, &set, NULL);
    }
    if (v->outer) /* this run() may have moved the timer past the outer one's deadline */
        kvmexit_watch(v->outer);
    v->outer = NULL;
}

/* Whether this thread is in a run() already. */
static inline int kvmexit_nested(const struct kvmexit_vcpu *v)
{
    return kvmexit_this.pid == v->pid && kvmexit_this.current != NULL;
}

/* timeout_ns: KVMEXIT_NEVER for none. On failure -1 with errno, and nothing is changed. */
static int kvmexit_begin(struct kvmexit_vcpu *v, uint64_t timeout_ns, int main_thread)
{
    struct kvmexit_thread *t = &kvmexit_this;
    const int catches_poison = __atomic_load_n(&kvmexit_poison_users, __ATOMIC_RELAXED) != 0;
    sigset_t set, old;
    sigemptyset(&set);
    sigaddset(&set, kvmexit_signal);
    if (catches_poison) /* blocked, it would not end KVM_RUN, which then tries for ever */
        sigaddset(&set, SIGBUS);
    if ((errno = pthread_sigmask(SIG_UNBLOCK, &set, &old)) != 0)
        return -1;
    v->was_blocked = sigismember(&old, kvmexit_signal) == 1;
    v->bus_was_blocked = catches_poison && sigismember(&old, SIGBUS) == 1;
    if (t->pid != v->pid) { /* the first run() of this thread, or of a forked child: the parent's timer and vCPU are not ours */
        t->armed_ns = 0;
        t->current = NULL;
        t->pid = v->pid;
        t->tid = (pid_t)syscall(SYS_gettid);
    }
    v->main_thread = main_thread;
    v->outer = t->current;
    /* Before the clock is read: a timer of an earlier run() that fires from here on sets immediate_exit, and one that
     * fired before is in the past by then and armed anew. */
    t->current = v;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    __atomic_store_n(&v->tid, t->tid, __ATOMIC_SEQ_CST); /* K4: before the first entry */
    v->deadline_ns = KVMEXIT_NEVER;
    if (timeout_ns != KVMEXIT_NEVER) {
        uint64_t now = kvmexit_now_ns();
        v->deadline_ns = timeout_ns < KVMEXIT_NEVER - now ? now + timeout_ns : KVMEXIT_NEVER;
    }
    if (kvmexit_watch(v) != 0) {
        int saved = errno;
        kvmexit_end(v);
        errno = saved;
        return -1;
    }
    return 0;
}

/* ---- any thread's side ---- */

/*
 * Ask for a kick or a pause. 0, or why the thread could not be told: EAGAIN where the signal queue is full. The request stays
 * open then.
 */
static inline int kvmexit_ask(struct kvmexit_vcpu *v, uint32_t request)
{
    int32_t tid;
    __atomic_fetch_or(&v->request, request, __ATOMIC_SEQ_CST);      /* K1: first of all */
    __atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST); /* K3: not left to the signal handler alone */
    tid = __atomic_load_n(&v->tid, __ATOMIC_SEQ_CST);               /* K2: after both stores */
    /* The thread may have left run(), or ended, since: then the signal finds no current vCPU, or nobody (ESRCH). */
    if (tid && syscall(SYS_tgkill, v->pid, tid, kvmexit_signal) != 0 && errno != ESRCH)
        return errno;
    return 0;
}

/* The pause is over. */
static inline void kvmexit_release(struct kvmexit_vcpu *v)
{
    __atomic_fetch_and(&v->request, ~KVMEXIT_REQUEST_PAUSE, __ATOMIC_SEQ_CST); /* P8: before the wake */
    syscall(SYS_futex, &v->request, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/*
 * Wait, in run(), until `v->request` is no longer `seen`, until a signal, the deadline of `own` or a tick. A kick cannot come
 * to nothing between the look at the word and the wait: the kernel compares the word once more (P13). A signal: tid stays
 * published, so a kick's reaches the thread here, too (P16).
 */
static inline void kvmexit_wait(struct kvmexit_vcpu *v, uint32_t seen, const struct kvmexit_vcpu *own)
{
    uint64_t now = kvmexit_now_ns(), ns = KVMEXIT_TICK_NS;
    struct timespec t;
    if (own->deadline_ns <= now)
        ns = v == own ? 0 : ns; /* an outer vCPU's pause outlasts our deadline */
    else if (own->deadline_ns - now < ns)
        ns = own->deadline_ns - now;
    t.tv_sec = 0;
    t.tv_nsec = (long)ns;
    syscall(SYS_futex, &v->request, FUTEX_WAIT_PRIVATE, seen, &t, NULL, 0);
}

/* ---- the burst's side ---- */

/* K5, before each burst: complete() may have spent the immediate_exit of a request that is still open. */
static inline void kvmexit_renew(struct kvmexit_vcpu *v)
{
    if (__atomic_load_n(&v->request, __ATOMIC_SEQ_CST))
        __atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
}

/* On EINTR. K6: the exchange comes first. */
static inline uint32_t kvmexit_acknowledge(struct kvmexit_vcpu *v)
{
    __atomic_exchange_n(&v->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&v->request, __ATOMIC_SEQ_CST);
}

/* K9: the return that says "kick" consumes every kick before it. */
static inline void kvmexit_consume_kick(struct kvmexit_vcpu *v)
{
    __atomic_fetch_and(&v->request, ~KVMEXIT_REQUEST_KICK, __ATOMIC_SEQ_CST);
}

static inline void kvmexit_set_immediate_exit(struct kvmexit_vcpu *v)
{
    __atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
}

#endif /* KVMEXIT_CONTROL_H */
