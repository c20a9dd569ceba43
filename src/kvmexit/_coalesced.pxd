from libc.stdint cimport uint64_t

from kvmexit._chain cimport kvmexit_handler
from kvmexit._convert cimport pthread_mutex_t
from kvmexit._ioctl cimport Handle
from kvmexit._page cimport kvmexit_vcpu
from kvmexit._routes cimport Native
from kvmexit._vcpus cimport Vcpus


cdef extern from "_coalesced.h" nogil:
    struct kvmexit_zone:
        uint64_t first, last
        bint pio
        kvmexit_handler call
        void *opaque
        uint64_t posted, declined
    struct kvmexit_coalesced:
        size_t offset
        pthread_mutex_t lock
        kvmexit_zone **zones
        size_t count
    size_t kvmexit_drain_ring(const kvmexit_coalesced *, const kvmexit_vcpu *)


cdef class Coalesced:
    cdef kvmexit_coalesced c
    cdef Handle handle
    cdef Vcpus vcpus
    cdef object __weakref__
    cdef object lock        # of changes
    cdef tuple zones        # what c.zones points into

    cdef int publish(self, tuple zones, size_t offset) except -1


cdef class CoalescedZone:
    cdef kvmexit_zone zone
    cdef readonly Native handler
    cdef object vm, owner   # weak references: a VM that is dropped goes at once
    cdef object entries     # of its route

    cdef int tell(self, Handle handle, bint register) except -1
