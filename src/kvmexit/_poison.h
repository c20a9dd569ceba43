/*
 * Poisoned memory under a guest: a SIGBUS that KVM sends becomes an exit. Part of _loop.pyx alone, as _control.h.
 *
 * A page of an ordinary memslot that the hardware has lost: KVM sends SIGBUS (BUS_MCEERR_AR, si_addr the host address) to
 * the vCPU's thread and goes to try again, so KVM_RUN ends with EINTR (arch/x86/kvm/mmu/mmu.c, kvm_send_hwpoison_signal());
 * the kernel does the same where the loss is found while the guest runs (mm/memory-failure.c, kill_proc()). Of a
 * guest_memfd KVM fails with EHWPOISON and says the page. Here the first becomes the second: the handler notes the page,
 * and the entry that ends says EHWPOISON, KVM_EXIT_MEMORY_FAULT. So everything behind the entry knows one kind of poison. A
 * kick or time-out that came with it is in immediate_exit and request, and ends the next entry.
 *
 * Which SIGBUS is ours: the interrupted context says it. It is the end of ioctl(fd of this thread's vCPU, KVM_RUN): behind
 * a syscall instruction, whose arguments the kernel leaves in their registers. An access by user-mode code, a native
 * handler's, a view's, stands at a load or store, so it can never be taken for the guest's, swallowed, and come again for
 * ever. At that point the thread is in the kernel's way out and holds no lock of ours: so the handler may wait for the
 * converter's, as any thread may, and whoever has that waits for no vCPU.
 *
 * The normal path pays nothing: no store says where the thread is, and the note is looked at where KVM_RUN failed.
 */
#ifndef KVMEXIT_POISON_H
#define KVMEXIT_POISON_H

#include <ucontext.h>

#include "_control.h"

/* Whether a host address is in the vCPU's guest memory, and where. span: bytes that are lost around it, a power of two. Set
 * by _loop.pyx, which can look. */
static int (*kvmexit_locate)(const struct kvmexit_vcpu *v, uint64_t hva, uint64_t span, struct kvmexit_poison *found);

static struct {
    pthread_mutex_t lock; /* of catching and letting go */
    int installed;        /* our handler is in the process, perhaps below one that was installed later */
    struct sigaction previous; /* written while ours is not installed */
} kvmexit_sigbus = {.lock = PTHREAD_MUTEX_INITIALIZER};

static inline greg_t kvmexit_register(const void *context, int name)
{
    return ((const ucontext_t *)context)->uc_mcontext.gregs[name];
}

/* Whether the signal came at the end of a system call, and not of an access by user-mode code. */
static int kvmexit_in_system_call(const void *context)
{
    const uint8_t *next = (const uint8_t *)kvmexit_register(context, REG_RIP);
    return next[-2] == 0x0f && next[-1] == 0x05;
}

/*
 * For a SIGBUS handler: whether it is the poison of the guest that this thread runs, and noted then. Touches nothing that a
 * signal handler may not.
 */
static int kvmexit_take_poison(const siginfo_t *info, const void *context)
{
    struct kvmexit_vcpu *v = kvmexit_this.current;
    struct kvmexit_poison found;
    unsigned shift;
    if (!v || v->fd < 0 || info->si_code != BUS_MCEERR_AR || v->forks[0] != v->born)
        return 0;
    if ((int)kvmexit_register(context, REG_RDI) != v->fd || (uint32_t)kvmexit_register(context, REG_RSI) != KVM_RUN
        || !kvmexit_in_system_call(context))
        return 0;
    shift = info->si_addr_lsb < 12 ? 12 : info->si_addr_lsb > 30 ? 30 : (unsigned)info->si_addr_lsb; /* a page to 1 GiB */
    if (!kvmexit_locate(v, (uint64_t)(uintptr_t)info->si_addr, 1ull << shift, &found))
        return 0;
    if (kvmexit_register(context, REG_RAX) == -EINTR) /* else another exit comes first, and after it the access again */
        v->poison = found;
    return 1;
}

/* What an entry that failed says. */
static int kvmexit_failed(struct kvmexit_vcpu *v, int error)
{
    struct kvm_run *run = v->run;
    if (error != EINTR || v->poison.size == 0)
        return -error;
    run->exit_reason = KVM_EXIT_MEMORY_FAULT;
    run->memory_fault.flags = v->poison.flags;
    run->memory_fault.gpa = v->poison.gpa;
    run->memory_fault.size = v->poison.size;
    v->poison.size = 0;
    return -EHWPOISON;
}

/* libc's symbol on purpose: it can be interposed. */
static int kvmexit_enter_kvm(struct kvmexit_vcpu *v)
{
    return ioctl(v->fd, KVM_RUN, 0) < 0 ? kvmexit_failed(v, errno) : 0;
}

/* ---- the handler, where an embedder has none of its own ---- */

/*
 * A SIGBUS that is not ours goes to who had it before us. Where that was the default, or a fault that cannot be ignored, the
 * process dies of it as it would have: with this siginfo, and at this place.
 */
static void kvmexit_pass_on(int number, siginfo_t *info, void *context)
{
    const struct sigaction *previous = &kvmexit_sigbus.previous;
    struct sigaction fatal;
    if (previous->sa_flags & SA_SIGINFO) {
        previous->sa_sigaction(number, info, context);
        return;
    }
    if (previous->sa_handler != SIG_DFL && previous->sa_handler != SIG_IGN) {
        previous->sa_handler(number);
        return;
    }
    if (previous->sa_handler == SIG_IGN
        && (info->si_code <= 0 || info->si_code == BUS_MCEERR_AO || kvmexit_in_system_call(context)))
        return;
    memset(&fatal, 0, sizeof fatal);
    fatal.sa_handler = SIG_DFL;
    sigaction(number, &fatal, NULL);
    syscall(SYS_rt_tgsigqueueinfo, getpid(), (pid_t)syscall(SYS_gettid), number, info); /* delivered when this returns */
}

static void kvmexit_on_poison(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    if (!__atomic_load_n(&kvmexit_poison_users, __ATOMIC_RELAXED) || !kvmexit_take_poison(info, context))
        kvmexit_pass_on(number, info, context);
    errno = saved;
}

static int kvmexit_catches(const struct sigaction *now)
{
    return now->sa_flags & SA_SIGINFO && now->sa_sigaction == kvmexit_on_poison;
}

/* Whether SIGBUS comes to our handler first. */
static int kvmexit_catches_first(void)
{
    struct sigaction now;
    return sigaction(SIGBUS, NULL, &now) == 0 && kvmexit_catches(&now);
}

/*
 * Catch poison, until as many let go. A handler that was installed over ours since may call ours on, so ours is never put over
 * it: two that call each other on would not end. Over none at all it is put anew. -> 0, or errno.
 */
static int kvmexit_catch_poison(void)
{
    struct sigaction now, ours;
    int error = 0;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = kvmexit_on_poison;
    ours.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    pthread_mutex_lock(&kvmexit_sigbus.lock);
    if (sigaction(SIGBUS, NULL, &now) != 0)
        error = errno;
    else if (!kvmexit_sigbus.installed
             || (!(now.sa_flags & SA_SIGINFO) && (now.sa_handler == SIG_DFL || now.sa_handler == SIG_IGN))) {
        kvmexit_sigbus.previous = now; /* known before ours can run */
        error = sigaction(SIGBUS, &ours, NULL) != 0 ? errno : 0;
        kvmexit_sigbus.installed = !error;
    }
    if (!error)
        __atomic_fetch_add(&kvmexit_poison_users, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&kvmexit_sigbus.lock);
    return error;
}

/* The last one takes the handler out, where it is the first still. Else it stays, and passes everything on. */
static void kvmexit_release_poison(void)
{
    pthread_mutex_lock(&kvmexit_sigbus.lock);
    if (__atomic_sub_fetch(&kvmexit_poison_users, 1, __ATOMIC_RELAXED) == 0 && kvmexit_catches_first()
        && sigaction(SIGBUS, &kvmexit_sigbus.previous, NULL) == 0)
        kvmexit_sigbus.installed = 0;
    pthread_mutex_unlock(&kvmexit_sigbus.lock);
}

#endif /* KVMEXIT_POISON_H */
