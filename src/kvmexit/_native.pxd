from libc.stdint cimport uint8_t, uint64_t

from kvmexit._chain cimport kvmexit_exit
from kvmexit._routes cimport Native


cdef extern from "_serial.h" nogil:
    struct kvmexit_serial:
        int fd
        uint64_t sent, dropped
    int kvmexit_serial_access(kvmexit_exit *, void *) noexcept
    int kvmexit_serial_init(kvmexit_serial *, int fd, bint waits)
    size_t kvmexit_serial_feed(kvmexit_serial *, const uint8_t *, size_t)
    size_t kvmexit_serial_pending(kvmexit_serial *)
    uint64_t kvmexit_serial_counted(const uint64_t *)


cdef int dup_eventfd(fd) except -1


cdef class Function(Native):
    cdef readonly object function, owner
    cdef Py_buffer buffer
    cdef bint exported


cdef class Ignore(Native):
    cdef uint64_t constant


cdef class Stop(Native):
    pass


cdef struct Count:
    uint64_t reads, writes, others


cdef class Counter(Native):
    cdef Count count


cdef struct Device:
    uint8_t *registers
    const uint8_t *read_only  # a byte each, or NULL
    uint64_t size
    int doorbell              # an eventfd, or -1


cdef class EventFd(Native):
    cdef int eventfd


cdef class Registers(Native):
    cdef Device device
    cdef Py_buffer buffer
    cdef bytes mask
    cdef readonly object eventfd


cdef class Serial16550(Native):
    cdef kvmexit_serial serial
