"""ioctl on KVM's descriptors: no GIL meanwhile, and every failure becomes a KvmError in this one place."""

from libc.errno cimport errno
from posix.unistd cimport close as close_fd

from kvmexit.errors import Error, KvmError

cdef extern from *:
    """
    #include <pthread.h>
    /* How often this process was forked into being: an object made under another count belongs to an ancestor. */
    static unsigned kvmexit_forks;
    static void kvmexit_count_fork(void) { kvmexit_forks++; }
    static int kvmexit_watch_forks(void) { return pthread_atfork(NULL, NULL, kvmexit_count_fork); }
    """
    unsigned kvmexit_forks
    int kvmexit_watch_forks()

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)


if kvmexit_watch_forks() != 0:
    raise ImportError("pthread_atfork failed: out of memory")


cdef unsigned forks() noexcept:
    return kvmexit_forks


cdef const unsigned *forks_counter() noexcept:
    return &kvmexit_forks


cdef int call(int fd, str name, unsigned long number, void *argument) except -1:
    """ioctl with a pointer; the result, never negative."""
    cdef int result, error
    with nogil:
        result = ioctl(fd, number, argument)
        error = errno
    if result < 0:
        raise KvmError(error, name)
    return result


cdef int call_value(int fd, str name, unsigned long number, unsigned long argument) except -1:
    """ioctl with a number; the result, never negative."""
    return call(fd, name, number, <void *>argument)


cdef class Handle:
    """A VM's descriptor, shared by what works on it. Owns `fd`: -1 where no kernel is behind it, and once closed."""

    def __cinit__(self, int fd, str what):
        self.fd = fd
        self.what = what
        self.forks = forks()
        self.owns = fd >= 0

    def __dealloc__(self):
        self.close()

    cdef int check(self) except -1:
        """Raise where the descriptor cannot be used."""
        if self.forks != forks():
            raise Error(f"{self.what} belongs to the parent process; after fork() the child must make one of its own")
        if self.closed:
            raise Error(f"{self.what} is closed")
        return 0

    cdef int call(self, str name, unsigned long number, void *argument) except -1:
        """ioctl on it, with a pointer. Counted: close() must not free the number for somebody else's file meanwhile."""
        self.users += 1
        try:
            return call(self.fd, name, number, argument)
        finally:
            self.users -= 1

    cdef int call_value(self, str name, unsigned long number, unsigned long argument) except -1:
        """The same with a number."""
        return self.call(name, number, <void *>argument)

    cdef void close(self) noexcept:
        """Only once `users` is 0."""
        self.closed = True
        if self.owns:  # not before __cinit__ came to its end: until then fd is 0
            close_fd(self.fd)
            self.owns = False
            self.fd = -1


def generic_ioctl(Handle handle, unsigned long number, argument):
    """ioctl with an int, or with a buffer that is changed in place. The result, never negative.

    The buffer must be as large as the number says (its _IOC_SIZE), and writable where the kernel writes (_IOC_READ).
    """
    cdef const unsigned char[::1] data
    cdef size_t size = (number >> 16) & 0x3fff
    name = f"ioctl {number:#x}"
    if isinstance(argument, int):
        return handle.call_value(name, number, argument)
    view = memoryview(argument).cast("B")
    if <size_t>len(view) < size:
        raise ValueError(f"{name} takes {size} bytes, the buffer has {len(view)}")
    if number >> 31 and view.readonly:
        raise ValueError(f"{name} writes to its argument, and the buffer is read-only: pass a bytearray")
    data = view
    return handle.call(name, number, <void *>&data[0] if len(view) else NULL)
