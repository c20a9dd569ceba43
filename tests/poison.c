/* SIGBUS for tests/test_poison.py: sent as the kernel sends it, and handlers of an embedding program. */
#define _GNU_SOURCE
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../src/kvmexit/include/kvmexit/embed.h"

static int calls, poisons; /* atomic */
static void *last_address;
static struct sigaction before;
static const struct kvmexit_api *api;
static struct kvmexit_vcpu *kicked;
static long nap_ns;

/* A thread can send itself what else only the kernel sends, and no other: so this is queued as what it is not, and the topmost
 * handler makes it what it shall be, where the signal was delivered. */
static siginfo_t forged[64];
static unsigned forgeries;
static struct sigaction below;

static void forge(int number, siginfo_t *info, void *context)
{
    const siginfo_t *other = info->si_value.sival_ptr;
    siginfo_t own; /* this thread's: ThreadSanitizer does not know that a signal orders what it says */
    if (info->si_code == SI_QUEUE && other >= forged && other < forged + 64) {
        memset(&own, 0, sizeof own);
        own.si_signo = SIGBUS;
        own.si_code = other->si_code;
        own.si_addr = other->si_addr;
        own.si_addr_lsb = other->si_addr_lsb;
        info = &own;
    }
    if (below.sa_flags & SA_SIGINFO)
        below.sa_sigaction(number, info, context);
    else if (below.sa_handler != SIG_DFL && below.sa_handler != SIG_IGN)
        below.sa_handler(number);
}

static int forges(const struct sigaction *now)
{
    return now->sa_flags & SA_SIGINFO && now->sa_sigaction == forge;
}

/* Take it off the top: before other handlers come or go. */
int down(void)
{
    struct sigaction now;
    sigaction(SIGBUS, NULL, &now);
    return forges(&now) ? sigaction(SIGBUS, &below, NULL) : 0;
}

/* Have a thread get a SIGBUS. -> 0, or -1 and errno. */
long send_bus(int tid, int code, void *address, int shift)
{
    siginfo_t *other = &forged[__atomic_fetch_add(&forgeries, 1, __ATOMIC_SEQ_CST) % 64], info;
    struct sigaction now, action;
    sigaction(SIGBUS, NULL, &now);
    if (!forges(&now)) {
        memset(&action, 0, sizeof action);
        action.sa_sigaction = forge;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        below = now;
        sigaction(SIGBUS, &action, NULL);
    }
    memset(other, 0, sizeof *other);
    other->si_signo = SIGBUS;
    other->si_code = code;
    other->si_addr = address;
    other->si_addr_lsb = (short)shift;
    memset(&info, 0, sizeof info);
    info.si_signo = SIGBUS;
    info.si_code = SI_QUEUE;
    info.si_value.sival_ptr = other;
    return syscall(SYS_rt_tgsigqueueinfo, getpid(), tid, SIGBUS, &info);
}

int gettid_here(void)
{
    return (int)syscall(SYS_gettid);
}

int seen(void)
{
    return __atomic_load_n(&calls, __ATOMIC_SEQ_CST);
}

int poisons_seen(void)
{
    return __atomic_load_n(&poisons, __ATOMIC_SEQ_CST);
}

void *address_seen(void)
{
    return last_address;
}

/* Counts. */
static void count(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    last_address = info->si_addr;
    __atomic_fetch_add(&calls, 1, __ATOMIC_SEQ_CST);
}

/* Counts, and calls on. */
static void count_and_pass(int number, siginfo_t *info, void *context)
{
    count(number, info, context);
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
}

/* Asks kvmexit first. Before that it may kick, or sleep: whatever comes of it, comes with the poison. */
static void ask(int number, siginfo_t *info, void *context)
{
    struct timespec left = {0, nap_ns};
    if (kicked)
        api->kick(kicked);
    while (nap_ns && nanosleep(&left, &left) != 0) {}
    if (api->poison(info, context))
        __atomic_fetch_add(&poisons, 1, __ATOMIC_SEQ_CST);
    else
        count(number, info, context);
}

/* kind: 0 counts, 1 counts and calls on, 2 asks. -> 0, or -1 and errno. */
int install(int kind)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = kind == 0 ? count : kind == 1 ? count_and_pass : ask;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return sigaction(SIGBUS, &action, &before);
}

int uninstall(void)
{
    return sigaction(SIGBUS, &before, NULL);
}

/* Whether `kind` is what SIGBUS comes to first. */
int is_first(int kind)
{
    struct sigaction now;
    return sigaction(SIGBUS, NULL, &now) == 0 && now.sa_flags & SA_SIGINFO
        && now.sa_sigaction == (kind == 0 ? count : kind == 1 ? count_and_pass : ask);
}

void prepare(const struct kvmexit_api *table, struct kvmexit_vcpu *to_kick, long nap)
{
    api = table;
    kicked = to_kick;
    nap_ns = nap;
}

/* What a page can be poisoned with. */
int poison(void *page)
{
    return madvise(page, 4096, 100 /* MADV_HWPOISON */);
}

int block(int how) /* 1: SIGBUS of this thread is blocked, 0: it is not, -1: as it is. -> as it was */
{
    sigset_t set, old;
    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(how == 0 ? SIG_UNBLOCK : SIG_BLOCK, how < 0 ? NULL : &set, &old);
    return sigismember(&old, SIGBUS);
}

/* A native handler that reads guest memory, by user-mode code; opaque: where. */
int read_memory(struct kvmexit_exit *exit, void *opaque)
{
    *(volatile uint8_t *)exit->data = *(volatile uint8_t *)opaque;
    return KVMEXIT_DONE;
}
