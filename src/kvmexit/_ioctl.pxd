cdef unsigned forks() noexcept
cdef const unsigned *forks_counter() noexcept
cdef int call(int fd, str name, unsigned long number, void *argument) except -1
cdef int call_value(int fd, str name, unsigned long number, unsigned long argument) except -1


cdef class Handle:
    cdef readonly int fd      # atomic
    cdef int owns             # atomic
    cdef readonly bint closed  # atomic
    cdef unsigned forks
    cdef readonly str what
    cdef int users            # atomic; who is at work on it, with the GIL released

    cdef int check(self) except -1
    cdef void shut(self) noexcept
    cdef int begin_use(self) except -1
    cdef void end_use(self) noexcept
    cdef bint in_use(self) noexcept
    cdef int call(self, str name, unsigned long number, void *argument) except -1
    cdef int call_value(self, str name, unsigned long number, unsigned long argument) except -1
    cdef void close(self) noexcept
