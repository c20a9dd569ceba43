from libc.stdint cimport uint32_t, uint64_t

from kvmexit._ioctl cimport Handle
from kvmexit._uapi cimport kvm_dirty_gfn


cdef struct Bits:  # of a slot: a bit a page, set where a ring said so and nobody has asked since
    uint32_t number
    uint64_t pages
    uint64_t *words


cdef struct Ring:
    kvm_dirty_gfn *entries
    uint64_t count         # a power of two
    uint64_t next          # that KVM fills; as it goes, never wrapped


cdef class DirtyLog:
    cdef Handle handle
    cdef object lock            # of everything below, of the rings, and of asking KVM
    cdef object slots           # number -> SlotDirty, which its Slot holds
    cdef list rings
    cdef uint64_t owed          # entries given back that KVM has not taken yet
    cdef readonly uint64_t entries  # of each vCPU's ring; 0: the VM has none

    cdef SlotDirty watch(self, uint32_t number, uint64_t gpa, uint64_t size)
    cdef int forget(self, SlotDirty dirty) except -1


cdef class DirtyRing:
    cdef Ring ring
    cdef object memory     # what it lies in


cdef class SlotDirty:
    cdef object __weakref__
    cdef DirtyLog log
    cdef Bits bits
    cdef uint64_t gpa

    cdef int check(self) except -1
