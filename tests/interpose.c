/* Preloaded in front of libc's ioctl: lets something happen just before the real call, where races are lost or won. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { NOTHING, ASK, SLEEP, INTERRUPT };

static volatile int action, ask = -1, acknowledged = -1;
static volatile long performed;
static volatile unsigned long before = 0xae80; /* KVM_RUN */

/* Which system call is preceded, if not KVM_RUN. */
void interpose_before(unsigned long request)
{
    before = request;
}

/* The next such call is preceded by this; one only. */
void interpose(int what, int ask_fd, int acknowledged_fd)
{
    ask = ask_fd;
    acknowledged = acknowledged_fd;
    __atomic_store_n(&action, what, __ATOMIC_SEQ_CST);
}

long interposed(void)
{
    return performed;
}

static void perform(int what)
{
    uint64_t one = 1;
    struct timespec left = {0, 30 * 1000 * 1000};
    switch (what) {
    case ASK: /* another thread does something, to the end, while we stand here */
        while (write(ask, &one, sizeof one) < 0 && errno == EINTR) {}
        while (read(acknowledged, &one, sizeof one) < 0 && errno == EINTR) {}
        break;
    case SLEEP: /* past the deadline: the timer's signal comes now, and not in KVM_RUN */
        while (nanosleep(&left, &left) < 0 && errno == EINTR) {}
        break;
    case INTERRUPT:
        kill(getpid(), SIGINT);
        break;
    default:
        return;
    }
    performed++;
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == before)
        perform(__atomic_exchange_n(&action, NOTHING, __ATOMIC_SEQ_CST));
    return (int)syscall(SYS_ioctl, fd, request, argument);
}
