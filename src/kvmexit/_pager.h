/*
 * Pages on first touch: a userfaultfd, answered by a thread that holds no GIL. No Python, but where the source is.
 *
 * Who does what. One thread, the worker (kvmexit_pager_serve), reads the faults, asks the source and fills pages in. Who
 * calls prefetch() leaves a range with it and waits: the worker fills it between faults, a window at a time. So a page is
 * asked for once, however many vCPUs touch it, the source answers one question at a time, and no fault waits for more of a
 * prefetch than one window.
 *
 * Faults come from the userfaultfd, where who touches a page waits in the kernel; or, `by_faults`, from the handlers of
 * vCPUs whose KVM_RUN failed (kvmexit_pager_bring): the userfaultfd then has no messages, and every access of the kernel's to
 * a page that is not there is EFAULT. Where the VM has memory attributes such pages are PRIVATE, too, so that KVM says which
 * one it was: the slot has no private side, and a page becomes shared (`annotate`) once it is in place, before anybody is
 * told. A handler waits for the worker with `changed`, and never for longer than its caller says. Where the source is memory
 * or a file, and nobody is at it, it does the work itself instead: whoever asks the source and fills has `asking`, and a
 * handler only tries it. `lock` is taken in it.
 *
 * `lock` guards what others see of that: `state`, `missing`, failures, counts, the range wanted, who waits, `sealed`. It is
 * held over system calls on the memory and its attributes, which wait for no page of it; never while the source is asked or
 * the GIL awaited. The converter's lock is taken in it, and never the other way round. The rest is settled before the worker
 * starts, or its own, or theirs who have `asking`.
 *
 * What a guest can see. A page comes whole: UFFDIO_COPY puts it in place in one step, and wakes who waits for it then. A
 * page that is not to be had becomes PROT_NONE *before* who waits is woken, so they get EFAULT and not zeros, and do not fault
 * again and again. At the end (seal) that happens to every page that did not come, before the range is unregistered, which
 * wakes everybody. The worker fills with `lock` and only where not `sealed`, so after seal() nothing changes any more, also
 * where the source answers later.
 *
 * A page that came and is missing again was discarded since (MADV_DONTNEED: a balloon), and is zeros, as without a pager. A
 * fault that was queued before its page came looks the same; there the zeros meet EEXIST, and it only needs to be woken.
 *
 * After fork() the child has the descriptor, and it is still about the *parent's* memory: the child does nothing but close.
 */
#ifndef KVMEXIT_PAGER_H
#define KVMEXIT_PAGER_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* ---- our subset of linux/userfaultfd.h ---- */

struct kvmexit_uffd_range {
    uint64_t start, len;
};
struct kvmexit_uffd_api {
    uint64_t api, features, ioctls;
};
struct kvmexit_uffd_register {
    struct kvmexit_uffd_range range;
    uint64_t mode, ioctls;
};
struct kvmexit_uffd_copy {
    uint64_t dst, src, len, mode;
    int64_t copy; /* bytes done, or -errno */
};
struct kvmexit_uffd_msg {
    uint8_t event, reserved[7];
    uint64_t flags, address;
    uint64_t feature;
};
_Static_assert(sizeof(struct kvmexit_uffd_copy) == 40, "struct uffdio_copy");
_Static_assert(sizeof(struct kvmexit_uffd_msg) == 32, "struct uffd_msg");

#define KVMEXIT_UFFD_API_VERSION 0xaa
#define KVMEXIT_UFFD_USER_MODE_ONLY 1 /* of userfaultfd(2), since 5.11: told of nothing that needs a privilege */
#define KVMEXIT_UFFD_FEATURE_SIGBUS (1 << 7)
#define KVMEXIT_UFFD_MODE_MISSING 1
#define KVMEXIT_UFFD_EVENT_PAGEFAULT 0x12
#define KVMEXIT_UFFD_ZEROPAGE_BIT 4 /* in what may be done with a range: not with huge pages of hugetlbfs */
#define KVMEXIT_UFFD_NEW _IO(0xaa, 0x00)
#define KVMEXIT_UFFDIO_API _IOWR(0xaa, 0x3f, struct kvmexit_uffd_api)
#define KVMEXIT_UFFDIO_REGISTER _IOWR(0xaa, 0x00, struct kvmexit_uffd_register)
#define KVMEXIT_UFFDIO_UNREGISTER _IOR(0xaa, 0x01, struct kvmexit_uffd_range)
#define KVMEXIT_UFFDIO_WAKE _IOR(0xaa, 0x02, struct kvmexit_uffd_range)
#define KVMEXIT_UFFDIO_COPY _IOWR(0xaa, 0x03, struct kvmexit_uffd_copy)

/* ---- a pager ---- */

#define KVMEXIT_PAGER_PAGE 4096
#define KVMEXIT_PAGER_KEPT 64  /* failures, the last ones */
#define KVMEXIT_PAGER_BATCH 16 /* faults read at once */

enum { KVMEXIT_MISSING, KVMEXIT_PRESENT, KVMEXIT_FAILED }; /* state of a page */
enum { KVMEXIT_FROM_MEMORY, KVMEXIT_FROM_FILE, KVMEXIT_FROM_STREAM, KVMEXIT_FROM_CALL };
enum { /* why a source gave nothing */
    KVMEXIT_GAVE, KVMEXIT_SHORT, KVMEXIT_LONG, KVMEXIT_CLOSED, KVMEXIT_ERRNO, KVMEXIT_RAISED, /* its own doing */
    KVMEXIT_UNFILLED, KVMEXIT_UNSHARED, KVMEXIT_STOPPED
};
enum { KVMEXIT_WANTED, KVMEXIT_FETCHED, KVMEXIT_UNFETCHED, KVMEXIT_SEALED }; /* what becomes of a prefetch */
enum { /* and of a page that a handler waits for */
    KVMEXIT_AWAITED, KVMEXIT_BROUGHT, KVMEXIT_WAS_THERE, KVMEXIT_WITHHELD, KVMEXIT_ENDED
};

struct kvmexit_pager_failure {
    uint64_t page, pages; /* asked for, from the beginning of the memory */
    uint64_t got;         /* bytes */
    uint64_t token;       /* of the exception */
    int why, error;
};

struct kvmexit_pager_waiter { /* on the stack of who waits */
    uint64_t page;
    int outcome;
    struct kvmexit_pager_waiter *next;
};

struct kvmexit_pager {
    char *base; /* of the memory */
    uint64_t pages, window; /* in pages; the window is a power of two */
    int uffd, stop, bell, prot, by_faults;
    int from, in, out;
    const char *source; /* memory */
    uint64_t offset;    /* of the source's first byte */
    char *buffer;
    int (*ask)(void *, uint64_t, uint64_t, char *, struct kvmexit_pager_failure *); /* the source, with the GIL */
    void (*tell)(void *, uint64_t); /* of a failure, by its number, with the GIL; or NULL */
    void *context;
    int (*annotate)(void *, uint64_t, uint64_t, int); /* make pages PRIVATE, or shared: 0, or errno; or NULL */
    void *attributes;

    int broken;       /* the worker's own: why the stream is out of step */
    uint64_t told;    /* likewise: failures */
    sigset_t outside; /* likewise */

    pthread_mutex_t asking;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint8_t *state;
    uint64_t missing;
    int sealed;
    uint64_t faults, fetches, filled, failed; /* since the beginning; filled: pages */
    struct kvmexit_pager_failure failures[KVMEXIT_PAGER_KEPT]; /* failed % KVMEXIT_PAGER_KEPT comes next */
    uint64_t want_number, want_from, want_to;
    int wanted;
    struct kvmexit_pager_failure want_failure;
    struct kvmexit_pager_waiter *waiters; /* first come first */
};

static char kvmexit_pager_zeros[KVMEXIT_PAGER_PAGE] __attribute__((aligned(KVMEXIT_PAGER_PAGE)));

static struct kvmexit_uffd_range kvmexit_pager_range(struct kvmexit_pager *p, uint64_t first, uint64_t pages)
{
    return (struct kvmexit_uffd_range){(uintptr_t)p->base + first * KVMEXIT_PAGER_PAGE, pages * KVMEXIT_PAGER_PAGE};
}

/* -> a userfaultfd, that is told of the kernel's faults, too, which KVM's are, unless it is `by_faults`; or -1. *system_error,
   *device_error: why neither. */
static int kvmexit_uffd_open(int by_faults, int *system_error, int *device_error)
{
    int fd = -1, device;
    if (by_faults)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | KVMEXIT_UFFD_USER_MODE_ONLY);
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0)
        return fd;
    *system_error = errno;
    device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
        fd = ioctl(device, KVMEXIT_UFFD_NEW, O_CLOEXEC | O_NONBLOCK);
        *device_error = errno;
        close(device);
    } else {
        *device_error = errno;
    }
    return fd;
}

/* -> 0, or errno; ENOTSUP: memory that it cannot work with. */
static int kvmexit_uffd_register(struct kvmexit_pager *p)
{
    struct kvmexit_uffd_api api = {
        .api = KVMEXIT_UFFD_API_VERSION, .features = p->by_faults ? KVMEXIT_UFFD_FEATURE_SIGBUS : 0};
    struct kvmexit_uffd_register it = {.range = kvmexit_pager_range(p, 0, p->pages), .mode = KVMEXIT_UFFD_MODE_MISSING};
    if (ioctl(p->uffd, KVMEXIT_UFFDIO_API, &api) || ioctl(p->uffd, KVMEXIT_UFFDIO_REGISTER, &it))
        return errno;
    if (it.ioctls >> KVMEXIT_UFFD_ZEROPAGE_BIT & 1)
        return 0;
    ioctl(p->uffd, KVMEXIT_UFFDIO_UNREGISTER, &it.range);
    return ENOTSUP;
}

static int kvmexit_pager_init(struct kvmexit_pager *p)
{
    pthread_condattr_t how;
    pthread_condattr_init(&how);
    pthread_condattr_setclock(&how, CLOCK_MONOTONIC);
    pthread_cond_init(&p->changed, &how);
    pthread_condattr_destroy(&how);
    pthread_mutex_init(&p->asking, NULL);
    pthread_mutex_init(&p->lock, NULL);
    p->missing = p->pages;
    p->state = calloc(p->pages, 1);
    p->buffer = p->from == KVMEXIT_FROM_MEMORY ? NULL : malloc(p->window * KVMEXIT_PAGER_PAGE);
    if (!p->state || (!p->buffer && p->from != KVMEXIT_FROM_MEMORY))
        return ENOMEM;
    p->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return p->stop < 0 || p->bell < 0 ? errno : 0;
}

/* ---- filling; with lock ---- */

static void kvmexit_pager_mark(struct kvmexit_pager *p, uint64_t page, uint8_t state)
{
    p->missing += (state == KVMEXIT_MISSING) - (p->state[page] == KVMEXIT_MISSING);
    p->state[page] = state;
}

static void kvmexit_pager_wake(struct kvmexit_pager *p, uint64_t page)
{
    struct kvmexit_uffd_range range = kvmexit_pager_range(p, page, 1);
    ioctl(p->uffd, KVMEXIT_UFFDIO_WAKE, &range);
}

/* -> 0, or errno. Pages that are there already stay as they are. */
static int kvmexit_pager_fill(struct kvmexit_pager *p, uint64_t first, uint64_t pages, const char *data)
{
    uint64_t done = 0, here;
    int again = 0;
    while (done < pages) {
        struct kvmexit_uffd_range at = kvmexit_pager_range(p, first + done, pages - done);
        struct kvmexit_uffd_copy copy = {
            .dst = at.start, .src = (uintptr_t)data + done * KVMEXIT_PAGER_PAGE, .len = at.len};
        int error = ioctl(p->uffd, KVMEXIT_UFFDIO_COPY, &copy) ? errno : 0;
        if (error && copy.copy <= 0) {
            if (error == EEXIST) {
                kvmexit_pager_mark(p, first + done, KVMEXIT_PRESENT);
                kvmexit_pager_wake(p, first + done);
                done++;
            } else if (error == EAGAIN && again++ < 1000) {
                sched_yield(); /* the mappings are changing */
            } else {
                return error;
            }
            continue;
        }
        here = error ? (uint64_t)copy.copy / KVMEXIT_PAGER_PAGE : pages - done;
        p->filled += here;
        while (here--)
            kvmexit_pager_mark(p, first + done++, KVMEXIT_PRESENT);
    }
    return 0;
}

/* Have who waits for a page get EFAULT, for good. Where the kernel has no room for the mapping they go on waiting. */
static void kvmexit_pager_withhold(struct kvmexit_pager *p, uint64_t page)
{
    if (p->state[page] != KVMEXIT_FAILED)
        kvmexit_pager_mark(p, page, KVMEXIT_FAILED);
    if (!mprotect(p->base + page * KVMEXIT_PAGER_PAGE, KVMEXIT_PAGER_PAGE, PROT_NONE))
        kvmexit_pager_wake(p, page);
}

/* ---- the source; who has `asking`, without lock ---- */

/* -> 0 once fd is ready, KVMEXIT_STOPPED where the pager is to end. */
static int kvmexit_pager_await(struct kvmexit_pager *p, int fd, short events)
{
    struct pollfd both[2] = {{.fd = fd, .events = events}, {.fd = p->stop, .events = POLLIN}};
    while (poll(both, 2, -1) < 0 && errno == EINTR)
        ;
    return both[1].revents ? KVMEXIT_STOPPED : 0;
}

/* One question: 16 bytes, offset and size, little-endian as x86 is. The answer: size bytes, nothing around them. */
static int kvmexit_pager_ask_stream(struct kvmexit_pager *p, uint64_t offset, uint64_t size, struct kvmexit_pager_failure *f)
{
    uint64_t question[2] = {offset, size}, done;
    struct pollfd early = {.fd = p->in, .events = POLLIN};
    char byte;
    ssize_t n;
    if (poll(&early, 1, 0) > 0) { /* nothing was asked */
        f->error = 0;
        return early.revents & POLLIN && read(p->in, &byte, 1) > 0 ? KVMEXIT_LONG : KVMEXIT_CLOSED;
    }
    for (done = 0; done < sizeof(question); done += (uint64_t)n) {
        if (kvmexit_pager_await(p, p->out, POLLOUT))
            return KVMEXIT_STOPPED;
        n = send(p->out, (char *)question + done, sizeof(question) - done, MSG_NOSIGNAL);
        if (n < 0 && errno == ENOTSOCK)
            n = write(p->out, (char *)question + done, sizeof(question) - done); /* SIGPIPE is blocked */
        if (n < 0 && errno != EAGAIN && errno != EINTR) {
            f->error = errno;
            return f->error == EPIPE || f->error == ECONNRESET ? KVMEXIT_CLOSED : KVMEXIT_ERRNO;
        }
        n = n < 0 ? 0 : n;
    }
    for (done = 0; done < size; done += (uint64_t)n) {
        if (kvmexit_pager_await(p, p->in, POLLIN))
            return KVMEXIT_STOPPED;
        n = read(p->in, p->buffer + done, size - done);
        if (n < 0 && errno != EAGAIN && errno != EINTR) {
            f->error = errno;
            return f->error == ECONNRESET ? KVMEXIT_CLOSED : KVMEXIT_ERRNO;
        }
        if (n == 0) {
            f->got = done;
            return done ? KVMEXIT_SHORT : KVMEXIT_CLOSED;
        }
        n = n < 0 ? 0 : n;
    }
    return KVMEXIT_GAVE;
}

static int kvmexit_pager_ask_file(struct kvmexit_pager *p, uint64_t offset, uint64_t size, struct kvmexit_pager_failure *f)
{
    uint64_t done;
    ssize_t n;
    for (done = 0; done < size; done += (uint64_t)n) {
        n = pread(p->in, p->buffer + done, size - done, (off_t)(offset + done));
        if (n < 0 && errno != EINTR) {
            f->error = errno;
            return KVMEXIT_ERRNO;
        }
        if (n == 0) {
            f->got = done;
            return KVMEXIT_SHORT;
        }
        n = n < 0 ? 0 : n;
    }
    return KVMEXIT_GAVE;
}

static int kvmexit_pager_ask_call(struct kvmexit_pager *p, uint64_t offset, uint64_t size, struct kvmexit_pager_failure *f)
{
    sigset_t blocked;
    int why;
    pthread_sigmask(SIG_SETMASK, &p->outside, &blocked); /* a program that it starts inherits the mask */
    why = p->ask(p->context, offset, size, p->buffer, f);
    pthread_sigmask(SIG_SETMASK, &blocked, NULL);
    return why;
}

/* Ask the source for pages and fill them in; -> KVMEXIT_GAVE, or why not, with *f. */
static int kvmexit_pager_supply(struct kvmexit_pager *p, uint64_t first, uint64_t pages, struct kvmexit_pager_failure *f)
{
    uint64_t offset = p->offset + first * KVMEXIT_PAGER_PAGE, size = pages * KVMEXIT_PAGER_PAGE, i;
    const char *data = p->buffer;
    int why = KVMEXIT_GAVE, error;
    *f = (struct kvmexit_pager_failure){.page = first, .pages = pages};
    if (p->from == KVMEXIT_FROM_MEMORY)
        data = p->source + offset;
    else if (p->from == KVMEXIT_FROM_FILE)
        why = kvmexit_pager_ask_file(p, offset, size, f);
    else if (p->from == KVMEXIT_FROM_CALL)
        why = kvmexit_pager_ask_call(p, offset, size, f);
    else if (p->broken)
        why = p->broken;
    else
        why = p->broken = kvmexit_pager_ask_stream(p, offset, size, f);
    pthread_mutex_lock(&p->lock);
    if (p->sealed) {
        why = KVMEXIT_STOPPED;
    } else if (why == KVMEXIT_GAVE) {
        p->fetches++;
        error = kvmexit_pager_fill(p, first, pages, data);
        if (error)
            why = KVMEXIT_UNFILLED;
        else if (p->annotate && (error = p->annotate(p->attributes, first, pages, 0)))
            why = KVMEXIT_UNSHARED;
        for (i = first; error && p->annotate && i < first + pages; i++)
            kvmexit_pager_mark(p, i, KVMEXIT_MISSING); /* to the guest it is: who asks again finds it in place */
        f->error = error;
    }
    pthread_mutex_unlock(&p->lock);
    return f->why = why;
}

/* ---- answering; who has `asking` ---- */

/* The missing pages around one of them that lie in its window; with lock. */
static uint64_t kvmexit_pager_around(struct kvmexit_pager *p, uint64_t page, uint64_t *pages)
{
    uint64_t low = page & ~(p->window - 1), high = low + p->window < p->pages ? low + p->window : p->pages;
    uint64_t first = page, end = page + 1;
    while (first > low && p->state[first - 1] == KVMEXIT_MISSING)
        first--;
    while (end < high && p->state[end] == KVMEXIT_MISSING)
        end++;
    *pages = end - first;
    return first;
}

static void kvmexit_pager_fault(struct kvmexit_pager *p, uint64_t page)
{
    uint64_t first = page, pages = 0;
    struct kvmexit_pager_failure f;
    int why;
    if (page >= p->pages)
        return;
    pthread_mutex_lock(&p->lock);
    p->faults++;
    if (!p->sealed && p->state[page] == KVMEXIT_PRESENT && kvmexit_pager_fill(p, page, 1, kvmexit_pager_zeros))
        kvmexit_pager_wake(p, page); /* no memory: it asks again */
    else if (!p->sealed && p->state[page] == KVMEXIT_FAILED)
        kvmexit_pager_withhold(p, page);
    else if (!p->sealed && p->state[page] == KVMEXIT_MISSING)
        first = kvmexit_pager_around(p, page, &pages);
    pthread_mutex_unlock(&p->lock);
    if (!pages)
        return;
    why = kvmexit_pager_supply(p, first, pages, &f);
    if (why != KVMEXIT_GAVE && why != KVMEXIT_STOPPED && pages > 1)
        why = kvmexit_pager_supply(p, page, 1, &f); /* nothing else of the window was needed */
    if (why == KVMEXIT_GAVE || why == KVMEXIT_STOPPED)
        return;
    pthread_mutex_lock(&p->lock);
    if (!p->sealed && p->state[page] == KVMEXIT_MISSING) {
        p->failures[p->failed++ % KVMEXIT_PAGER_KEPT] = f; /* before anybody is woken, who may look here */
        kvmexit_pager_withhold(p, page);
    }
    pthread_mutex_unlock(&p->lock);
}

/* A page for a handler; -> what became of it. */
static int kvmexit_pager_settle(struct kvmexit_pager *p, uint64_t page)
{
    uint64_t filled;
    int outcome;
    pthread_mutex_lock(&p->lock);
    filled = p->filled; /* nobody else fills */
    pthread_mutex_unlock(&p->lock);
    kvmexit_pager_fault(p, page);
    pthread_mutex_lock(&p->lock);
    outcome = p->sealed                          ? KVMEXIT_ENDED
              : p->state[page] == KVMEXIT_FAILED ? KVMEXIT_WITHHELD
              : p->filled != filled              ? KVMEXIT_BROUGHT
                                                 : KVMEXIT_WAS_THERE;
    pthread_mutex_unlock(&p->lock);
    return outcome;
}

/* ---- the worker ---- */

/* What the source is asked by; nobody asks any more. */
static void kvmexit_pager_close(struct kvmexit_pager *p)
{
    int *fds[] = {&p->uffd, &p->in, &p->out};
    size_t i;
    for (i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
        if (*fds[i] >= 0)
            close(*fds[i]);
        *fds[i] = -1;
    }
}

/* The page that was waited for first, for all who wait for it. */
static void kvmexit_pager_answer(struct kvmexit_pager *p, uint64_t page)
{
    struct kvmexit_pager_waiter **at, *waiter;
    int outcome = kvmexit_pager_settle(p, page);
    pthread_mutex_lock(&p->lock);
    for (at = &p->waiters; (waiter = *at);) {
        if (waiter->page == page) {
            *at = waiter->next;
            waiter->outcome = outcome; /* it may go from its stack once the lock is free */
        } else {
            at = &waiter->next;
        }
    }
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

/* One window of the range wanted. */
static void kvmexit_pager_ahead(struct kvmexit_pager *p)
{
    struct kvmexit_pager_failure f = {0};
    uint64_t number, at, first, pages = 0;
    int why = KVMEXIT_GAVE;
    pthread_mutex_lock(&p->lock);
    number = p->want_number;
    for (at = p->want_from; at < p->want_to && p->state[at] != KVMEXIT_MISSING; at++)
        ;
    if (at < p->want_to) {
        first = kvmexit_pager_around(p, at, &pages);
        pages = first + pages < p->want_to ? first + pages - at : p->want_to - at;
    }
    pthread_mutex_unlock(&p->lock);
    if (pages)
        why = kvmexit_pager_supply(p, at, pages, &f);
    pthread_mutex_lock(&p->lock);
    if (p->want_number == number && p->wanted == KVMEXIT_WANTED) {
        p->want_from = at + pages;
        if (why != KVMEXIT_GAVE && why != KVMEXIT_STOPPED) {
            p->want_failure = f;
            p->wanted = KVMEXIT_UNFETCHED;
        } else if (!pages) {
            p->wanted = KVMEXIT_FETCHED;
        }
        if (p->wanted != KVMEXIT_WANTED)
            pthread_cond_broadcast(&p->changed);
    }
    pthread_mutex_unlock(&p->lock);
}

/* Tell of failures, without a lock. */
static void kvmexit_pager_report(struct kvmexit_pager *p)
{
    sigset_t blocked;
    uint64_t failed;
    pthread_mutex_lock(&p->lock);
    failed = p->failed;
    pthread_mutex_unlock(&p->lock);
    for (; p->tell && p->told < failed; p->told++) {
        pthread_sigmask(SIG_SETMASK, &p->outside, &blocked);
        p->tell(p->context, p->told);
        pthread_sigmask(SIG_SETMASK, &blocked, NULL);
    }
}

/* Until it is sealed; then the other side of a stream sees the end. Signals are other threads' business, but for those that are
   this one's own doing. */
static void kvmexit_pager_serve(struct kvmexit_pager *p)
{
    static const int own[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTRAP};
    sigset_t all;
    size_t s;
    sigfillset(&all);
    for (s = 0; s < sizeof(own) / sizeof(own[0]); s++)
        sigdelset(&all, own[s]);
    pthread_sigmask(SIG_SETMASK, &all, &p->outside);
    for (;;) {
        struct kvmexit_uffd_msg found[KVMEXIT_PAGER_BATCH];
        struct pollfd three[3] = {
            {.fd = p->uffd, .events = POLLIN}, {.fd = p->stop, .events = POLLIN}, {.fd = p->bell, .events = POLLIN}};
        uint64_t rung, page = 0;
        ssize_t i, n;
        int wanted, awaited, sealed;
        pthread_mutex_lock(&p->lock);
        wanted = p->wanted == KVMEXIT_WANTED;
        awaited = p->waiters != NULL;
        if (awaited)
            page = p->waiters->page;
        sealed = p->sealed;
        pthread_mutex_unlock(&p->lock);
        if (sealed)
            break;
        poll(three, 3, wanted || awaited ? 0 : -1);
        if (three[2].revents && read(p->bell, &rung, sizeof(rung)) < 0)
            continue; /* the one reader is us */
        pthread_mutex_lock(&p->asking);
        n = read(p->uffd, found, sizeof(found));
        for (i = 0; i < n / (ssize_t)sizeof(found[0]); i++)
            if (found[i].event == KVMEXIT_UFFD_EVENT_PAGEFAULT)
                kvmexit_pager_fault(p, (found[i].address - (uintptr_t)p->base) / KVMEXIT_PAGER_PAGE);
        if (awaited)
            kvmexit_pager_answer(p, page);
        else if (n <= 0 && wanted)
            kvmexit_pager_ahead(p);
        pthread_mutex_unlock(&p->asking);
        kvmexit_pager_report(p);
    }
    pthread_mutex_lock(&p->asking); /* a handler may be at it */
    kvmexit_pager_close(p);
    pthread_mutex_unlock(&p->asking);
    pthread_sigmask(SIG_SETMASK, &p->outside, NULL);
}

/* ---- everybody else ---- */

static void kvmexit_pager_ring(int bell)
{
    uint64_t one = 1;
    if (write(bell, &one, sizeof(one)) < 0)
        return; /* full: it is readable */
}

/* Have a range fetched; -> its number. One at a time: the caller sees to that. */
static uint64_t kvmexit_pager_want(struct kvmexit_pager *p, uint64_t first, uint64_t pages)
{
    uint64_t number;
    pthread_mutex_lock(&p->lock);
    number = ++p->want_number;
    p->want_from = first;
    p->want_to = first + pages;
    p->wanted = p->sealed ? KVMEXIT_SEALED : KVMEXIT_WANTED;
    pthread_mutex_unlock(&p->lock);
    kvmexit_pager_ring(p->bell);
    return number;
}

static struct timespec kvmexit_pager_in(int ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += ms * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    return until;
}

/* Wait for it, `ms` at most. */
static int kvmexit_pager_wait(struct kvmexit_pager *p, int ms, struct kvmexit_pager_failure *f)
{
    struct timespec until = kvmexit_pager_in(ms);
    int wanted;
    pthread_mutex_lock(&p->lock);
    while (p->wanted == KVMEXIT_WANTED && pthread_cond_timedwait(&p->changed, &p->lock, &until) == 0)
        ;
    wanted = p->wanted;
    *f = p->want_failure;
    pthread_mutex_unlock(&p->lock);
    return wanted;
}

/* The window at work on is still filled. */
static void kvmexit_pager_cancel(struct kvmexit_pager *p)
{
    pthread_mutex_lock(&p->lock);
    p->want_number++;
    p->wanted = KVMEXIT_FETCHED;
    pthread_mutex_unlock(&p->lock);
}

/* Have a page brought, and wait, `ms` at most: KVMEXIT_AWAITED then, and the worker goes on with it. */
static int kvmexit_pager_bring(struct kvmexit_pager *p, uint64_t page, int ms)
{
    struct kvmexit_pager_waiter me = {.page = page, .outcome = KVMEXIT_AWAITED}, **at;
    struct timespec until;
    if ((p->from == KVMEXIT_FROM_MEMORY || p->from == KVMEXIT_FROM_FILE) && pthread_mutex_trylock(&p->asking) == 0) {
        me.outcome = kvmexit_pager_settle(p, page);
        pthread_mutex_unlock(&p->asking);
        if (me.outcome == KVMEXIT_WITHHELD)
            kvmexit_pager_ring(p->bell); /* it may have to be told of */
        return me.outcome;
    }
    until = kvmexit_pager_in(ms);
    pthread_mutex_lock(&p->lock);
    if (p->sealed) {
        me.outcome = KVMEXIT_ENDED;
    } else if (p->state[page] == KVMEXIT_FAILED) {
        me.outcome = KVMEXIT_WITHHELD;
    } else {
        for (at = &p->waiters; *at; at = &(*at)->next)
            ;
        *at = &me;
        kvmexit_pager_ring(p->bell);
    }
    while (me.outcome == KVMEXIT_AWAITED && !p->sealed && pthread_cond_timedwait(&p->changed, &p->lock, &until) == 0)
        ;
    if (me.outcome == KVMEXIT_AWAITED && p->sealed)
        me.outcome = KVMEXIT_ENDED;
    for (at = &p->waiters; *at; at = &(*at)->next)
        if (*at == &me) {
            *at = me.next;
            break;
        }
    pthread_mutex_unlock(&p->lock);
    return me.outcome;
}

/* Read or write memory that is there, as KVM would have; -> 0, or errno. */
static int kvmexit_pager_access(struct kvmexit_pager *p, uint64_t offset, void *data, uint64_t size, int is_write)
{
    struct iovec ours = {data, size}, theirs = {p->base + offset, size};
    ssize_t n = is_write ? process_vm_writev(getpid(), &ours, 1, &theirs, 1, 0)
                         : process_vm_readv(getpid(), &ours, 1, &theirs, 1, 0);
    return n == (ssize_t)size ? 0 : n < 0 ? errno : EFAULT;
}

/* Open again what failed in a range: the next touch asks the source again. -> 0, or errno. */
static int kvmexit_pager_retry(struct kvmexit_pager *p, uint64_t first, uint64_t pages)
{
    uint64_t i;
    int error = 0;
    pthread_mutex_lock(&p->lock);
    for (i = first; i < first + pages && !error && !p->sealed; i++)
        if (p->state[i] == KVMEXIT_FAILED) {
            if (mprotect(p->base + i * KVMEXIT_PAGER_PAGE, KVMEXIT_PAGER_PAGE, p->prot))
                error = errno;
            else
                kvmexit_pager_mark(p, i, KVMEXIT_MISSING);
            kvmexit_pager_wake(p, i); /* who still waits asks again */
        }
    pthread_mutex_unlock(&p->lock);
    return error;
}

/* Whether a page is there though it is not us who filled it: it was before, or came through another mapping of the file. */
static int kvmexit_pager_is_there(struct kvmexit_pager *p, int pagemap, uint64_t page)
{
    char *at = p->base + page * KVMEXIT_PAGER_PAGE;
    uint64_t entry = 0;
    unsigned char resident = 0;
    if (pread(pagemap, &entry, sizeof(entry), (off_t)((uintptr_t)at / KVMEXIT_PAGER_PAGE * sizeof(entry))) < 0)
        entry = 0;
    if (entry >> 62) /* present, or in swap */
        return 1;
    return mincore(at, KVMEXIT_PAGER_PAGE, &resident) == 0 && resident & 1;
}

/* The end: what is missing becomes PROT_NONE; where the kernel has no room for so many mappings, everything. */
static void kvmexit_pager_seal(struct kvmexit_pager *p)
{
    uint64_t at, end;
    struct kvmexit_uffd_range all = kvmexit_pager_range(p, 0, p->pages);
    int pagemap;
    pthread_mutex_lock(&p->lock);
    if (!p->sealed) {
        p->sealed = 1;
        pagemap = p->missing ? open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC) : -1;
        for (at = 0; p->missing && at < p->pages; at++)
            if (p->state[at] == KVMEXIT_MISSING && kvmexit_pager_is_there(p, pagemap, at))
                kvmexit_pager_mark(p, at, KVMEXIT_PRESENT);
        for (at = 0; p->missing && at < p->pages; at = end) {
            for (end = at + 1; end < p->pages && p->state[end] == p->state[at]; end++)
                ;
            if (p->state[at] == KVMEXIT_MISSING &&
                mprotect(p->base + at * KVMEXIT_PAGER_PAGE, (end - at) * KVMEXIT_PAGER_PAGE, PROT_NONE)) {
                mprotect(p->base, p->pages * KVMEXIT_PAGER_PAGE, PROT_NONE);
                break;
            }
        }
        if (pagemap >= 0)
            close(pagemap);
        if (p->annotate)
            p->annotate(p->attributes, 0, p->pages, 0);
        ioctl(p->uffd, KVMEXIT_UFFDIO_UNREGISTER, &all);
        p->wanted = KVMEXIT_SEALED;
        pthread_cond_broadcast(&p->changed);
    }
    pthread_mutex_unlock(&p->lock);
    kvmexit_pager_ring(p->stop);
}

static void kvmexit_pager_free(struct kvmexit_pager *p)
{
    kvmexit_pager_close(p);
    if (p->stop >= 0)
        close(p->stop);
    if (p->bell >= 0)
        close(p->bell);
    free(p->state);
    free(p->buffer);
}

#endif
