from libc.stdint cimport uint8_t, uint64_t

from kvmexit._routes cimport Native


cdef class Function(Native):
    cdef readonly object function
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
