from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmexit._chain cimport kvmexit_exit
from kvmexit._routes cimport Native


cdef extern from "_ring.h" nogil:
    enum:
        KVMEXIT_FULL_STOP, KVMEXIT_FULL_DROP, KVMEXIT_FULL_WAIT
    struct kvmexit_entry:
        uint64_t address, data, sequence
        uint32_t vcpu
        uint8_t size, reason
        uint16_t flags
    struct kvmexit_lane:
        pass
    struct kvmexit_ring:
        kvmexit_lane *lanes
        uint64_t room
        uint32_t lane_count
        int full, eventfd
        bint is_read
    int kvmexit_ring_admit(kvmexit_ring *, const kvmexit_exit *, uint64_t count, kvmexit_lane **) noexcept
    void kvmexit_ring_put(
        kvmexit_ring *, kvmexit_lane *, const kvmexit_exit *, uint64_t address, const uint8_t *data, uint64_t size,
        uint64_t count, uint16_t flags) noexcept


cdef class RingBatch:
    cdef kvmexit_entry *entries
    cdef Py_ssize_t count, stride


cdef class Ring(Native):
    cdef kvmexit_ring ring
    cdef unsigned forks     # as they were when it was made
