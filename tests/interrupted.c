/* Preloaded in front of libc: each second call that a conversion makes is interrupted, and the ioctl of attributes works on any
 * descriptor: it is noted, and changes nothing. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static unsigned calls;
uint64_t noted[4]; /* struct kvm_memory_attributes of the last ioctl */
unsigned interruptions;

static int interrupted(void)
{
    if (calls++ % 2)
        return 0;
    interruptions++;
    errno = EINTR;
    return -1;
}

int madvise(void *address, size_t size, int advice)
{
    if (advice == MADV_DONTNEED && interrupted())
        return -1;
    return (int)syscall(SYS_madvise, address, size, advice);
}

int fallocate(int fd, int mode, off_t offset, off_t size)
{
    return interrupted() ? -1 : (int)syscall(SYS_fallocate, fd, mode, offset, size);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t size) __attribute__((alias("fallocate")));

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    void *argument;
    va_start(arguments, request);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request != 0x4020aed2) /* KVM_SET_MEMORY_ATTRIBUTES */
        return (int)syscall(SYS_ioctl, fd, request, argument);
    if (interrupted())
        return -1;
    memcpy(noted, argument, sizeof noted);
    return 0;
}
