/* Preloaded in front of libc: the n-th call of a kind that this thread makes fails with an errno. For tests/inject.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* In the order of inject.py's CALLS. */
enum { IOCTL, MMAP, MUNMAP, MADVISE, FALLOCATE, EVENTFD, TIMER_CREATE, CLOSE, OPEN, FCNTL, MEMFD_CREATE, FTRUNCATE, READV, CALLS };

static __thread int kind = -1, error;
static __thread unsigned long wanted; /* of ioctls: the request, or 0 for any */
static __thread long left, struck;
static __thread unsigned long last; /* request of the ioctl that was struck */

/* Arm it: the n-th such call of this thread fails; n <= 0 or a `what` of -1: none does. */
void inject(int what, unsigned long request, long n, int with)
{
    kind = what;
    wanted = request;
    left = n;
    error = with;
    struck = 0;
    last = 0;
}

/* -> whether one has failed. */
long injected(void)
{
    return struck;
}

unsigned long injected_request(void)
{
    return last;
}

static int strikes(int what, unsigned long request)
{
    if (kind != what || (wanted && wanted != request) || left <= 0 || --left)
        return 0;
    struck = 1;
    last = request;
    errno = error;
    return 1;
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    return strikes(IOCTL, request) ? -1 : (int)syscall(SYS_ioctl, fd, request, argument);
}

void *mmap(void *at, size_t size, int prot, int flags, int fd, off_t offset)
{
    return strikes(MMAP, 0) ? MAP_FAILED : (void *)syscall(SYS_mmap, at, size, prot, flags, fd, offset);
}

void *mmap64(void *at, size_t size, int prot, int flags, int fd, off_t offset)
{
    return mmap(at, size, prot, flags, fd, offset);
}

/* These two do what they should all the same: Linux lets go of a descriptor whatever close() says. */
int munmap(void *at, size_t size)
{
    int result = (int)syscall(SYS_munmap, at, size);
    return strikes(MUNMAP, 0) ? -1 : result;
}

int close(int fd)
{
    int result = (int)syscall(SYS_close, fd);
    return strikes(CLOSE, 0) ? -1 : result;
}

int madvise(void *at, size_t size, int advice)
{
    return strikes(MADVISE, 0) ? -1 : (int)syscall(SYS_madvise, at, size, advice);
}

int fallocate(int fd, int mode, off_t offset, off_t size)
{
    return strikes(FALLOCATE, 0) ? -1 : (int)syscall(SYS_fallocate, fd, mode, offset, size);
}

int fallocate64(int fd, int mode, off_t offset, off_t size)
{
    return fallocate(fd, mode, offset, size);
}

int eventfd(unsigned value, int flags)
{
    return strikes(EVENTFD, 0) ? -1 : (int)syscall(SYS_eventfd2, value, flags);
}

int timer_create(clockid_t clock, struct sigevent *event, timer_t *timer)
{
    int id = 0, result;
    if (strikes(TIMER_CREATE, 0))
        return -1;
    result = (int)syscall(SYS_timer_create, clock, event, &id); /* of SIGEV_THREAD_ID glibc makes no more than this */
    *timer = (timer_t)(intptr_t)id;
    return result;
}

int open(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int mode = va_arg(arguments, int);
    va_end(arguments);
    return strikes(OPEN, 0) ? -1 : (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int mode = va_arg(arguments, int);
    va_end(arguments);
    return open(path, flags, mode);
}

int fcntl(int fd, int command, ...)
{
    va_list arguments;
    va_start(arguments, command);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    return strikes(FCNTL, 0) ? -1 : (int)syscall(SYS_fcntl, fd, command, argument);
}

int fcntl64(int fd, int command, ...)
{
    va_list arguments;
    va_start(arguments, command);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    return fcntl(fd, command, argument);
}

int memfd_create(const char *name, unsigned flags)
{
    return strikes(MEMFD_CREATE, 0) ? -1 : (int)syscall(SYS_memfd_create, name, flags);
}

int ftruncate(int fd, off_t size)
{
    return strikes(FTRUNCATE, 0) ? -1 : (int)syscall(SYS_ftruncate, fd, size);
}

int ftruncate64(int fd, off_t size)
{
    return ftruncate(fd, size);
}

ssize_t process_vm_readv(pid_t pid, const struct iovec *local, unsigned long n, const struct iovec *remote, unsigned long m,
                         unsigned long flags)
{
    return strikes(READV, 0) ? -1 : syscall(SYS_process_vm_readv, pid, local, n, remote, m, flags);
}
