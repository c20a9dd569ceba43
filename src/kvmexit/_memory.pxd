from libc.stdint cimport uint32_t, uint64_t

from kvmexit._ioctl cimport Handle


cdef struct Span:
    uint64_t first, last  # guest-physical, inclusive


cdef class Slot:
    cdef readonly uint64_t gpa, size, hva
    cdef readonly uint32_t number
    cdef readonly bint readonly, log_dirty
    cdef int gmem_fd         # owned; -1: none
    cdef uint64_t gmem_offset
    cdef object mapping      # the mmap.mmap or GmemMapping that view_ is over, where the slot made one
    cdef bint adopted        # somebody else's memslot
    cdef object view_        # memoryview of bytes; None once gone

    cdef void close_fd(self) noexcept


cdef class Memory:
    cdef Handle handle
    cdef object lock
    cdef object vm_type
    cdef bint region2
    cdef readonly tuple slots  # by gpa
    cdef Span *spans           # of slots, for looking up without touching objects
    cdef object fresh_numbers  # slot numbers never used so far
    cdef list freed_numbers
    cdef readonly uint64_t changes

    cdef object slot_at(self, uint64_t gpa)
    cdef int set_region(self, Slot slot, uint64_t size) except -1
    cdef int change_slots(self, list added, list removed) except -1
    cdef int transfer(self, gpa, char *local, size_t n, bint to_guest) except -1
