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

cdef extern from * nogil:
    """
    #define kvmexit_load(at) __atomic_load_n(at, __ATOMIC_SEQ_CST)
    #define kvmexit_store(at, value) __atomic_store_n(at, value, __ATOMIC_SEQ_CST)
    #define kvmexit_exchange(at, value) __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST)
    #define kvmexit_add(at, value) ((void)__atomic_fetch_add(at, value, __ATOMIC_SEQ_CST))
    """
    int kvmexit_load(int *)
    bint kvmexit_is_set "kvmexit_load"(bint *)
    void kvmexit_set "kvmexit_store"(bint *, bint)
    int kvmexit_exchange(int *, int)
    void kvmexit_add(int *, int)

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned)

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
    """A VM's descriptor, shared by what works on it. Owns `fd`: -1 where no kernel is behind it, and once closed.

    Whoever uses it counts himself first and looks then, at `closed` or at `fd`; who closes it stores first and looks at the
    count then. So one of them sees the other, whatever threads they are on, with a GIL or without: a use either is waited
    for, or finds it closed. All sequentially consistent.
    """

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
        if kvmexit_is_set(&self.closed):
            raise Error(f"{self.what} is closed")
        return 0

    cdef void shut(self) noexcept:
        """From here on check() and begin_use() raise."""
        kvmexit_set(&self.closed, True)

    cdef int begin_use(self) except -1:
        """Have who closes it wait for end_use(). Raises where it cannot be used."""
        kvmexit_add(&self.users, 1)
        try:
            return self.check()
        except BaseException:
            self.end_use()
            raise

    cdef void end_use(self) noexcept:
        kvmexit_add(&self.users, -1)

    cdef bint in_use(self) noexcept:
        return kvmexit_load(&self.users) != 0

    cdef int call(self, str name, unsigned long number, void *argument) except -1:
        """ioctl on it, with a pointer. Counted: close() must not free the number for somebody else's file meanwhile."""
        cdef int fd
        kvmexit_add(&self.users, 1)
        try:
            fd = kvmexit_load(&self.fd)
            if fd < 0:
                self.check()  # closed since the caller looked
            return call(fd, name, number, argument)
        finally:
            self.end_use()

    cdef int call_value(self, str name, unsigned long number, unsigned long argument) except -1:
        """The same with a number."""
        return self.call(name, number, <void *>argument)

    cdef void close(self) noexcept:
        """Only once who calls sees no use; one that comes meanwhile, which only free-threaded Python has, is waited for."""
        cdef int fd
        self.shut()
        if kvmexit_exchange(&self.owns, False):  # not before __cinit__ came to its end: until then fd is 0
            fd = kvmexit_exchange(&self.fd, -1)
            while self.forks == forks() and kvmexit_load(&self.users):
                with nogil:
                    usleep(100)
            close_fd(fd)


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
