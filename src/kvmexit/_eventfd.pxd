from libc.stdint cimport uint32_t, uint64_t

from kvmexit._ioctl cimport Handle


cdef class EventFds:
    cdef Handle handle
    cdef object __weakref__
    cdef object lock
    cdef list assigned

    cdef int put(self, Assigned made) except -1


cdef class Assigned:
    cdef object owner     # a weak reference to the EventFds: a VM that is dropped goes at once
    cdef int fd           # ours, of the eventfd: KVM takes back by eventfd

    cdef int tell(self, Handle handle, bint assign) except -1


cdef class IoEventFd(Assigned):
    cdef readonly uint64_t address
    cdef readonly uint32_t size
    cdef readonly bint pio
    cdef readonly object match


cdef class IrqFd(Assigned):
    cdef readonly uint32_t gsi
    cdef int resample
