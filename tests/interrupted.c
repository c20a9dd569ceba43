/* Preloaded in front of libc: each second call that a conversion makes is interrupted, and KVM's ioctls for it work on any
 * descriptor: they are noted, and change nothing. */
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
uint64_t memslots[64]; /* address and host address of each; both 0: there is none */
unsigned interruptions;
unsigned fail_at; /* the call that makes or deletes a memslot, counted from now on; 0: none */

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
    if (request == 0x4020ae46 || request == 0x40a0ae49) { /* KVM_SET_USER_MEMORY_REGION, ..._REGION2 */
        const uint64_t *region = argument; /* slot and flags, address, size, host address */
        uint64_t *slot = &memslots[2 * (uint32_t)region[0]];
        if (request == 0x4020ae46 && interrupted()) /* a conversion's */
            return -1;
        if (fail_at && --fail_at == 0) {
            errno = ENOMEM;
            return -1;
        }
        slot[0] = region[2] ? region[1] : 0;
        slot[1] = region[2] ? region[3] : 0;
        return 0;
    }
    if (request != 0x4020aed2) /* KVM_SET_MEMORY_ATTRIBUTES */
        return (int)syscall(SYS_ioctl, fd, request, argument);
    if (interrupted())
        return -1;
    memcpy(noted, argument, sizeof noted);
    return 0;
}
