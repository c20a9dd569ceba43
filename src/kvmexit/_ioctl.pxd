cdef unsigned forks() noexcept
cdef const unsigned *forks_counter() noexcept
cdef int call(int fd, str name, unsigned long number, void *argument) except -1
cdef int call_value(int fd, str name, unsigned long number, unsigned long argument) except -1


cdef class Handle:
    cdef readonly int fd
    cdef bint owns
    cdef readonly bint closed
    cdef unsigned forks
    cdef readonly str what
    cdef readonly int users  # ioctls under way, with the GIL released

    cdef int check(self) except -1
    cdef int call(self, str name, unsigned long number, void *argument) except -1
    cdef int call_value(self, str name, unsigned long number, unsigned long argument) except -1
    cdef void close(self) noexcept
