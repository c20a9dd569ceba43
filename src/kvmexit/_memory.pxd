from libc.stdint cimport uint32_t, uint64_t

from kvmexit._convert cimport Conversions, Converter, Region, Result
from kvmexit._dirty cimport DirtyLog, SlotDirty
from kvmexit._ioctl cimport Handle
from kvmexit._vcpus cimport Vcpus


cdef struct Span:
    uint64_t first, last  # guest-physical, inclusive


cdef class Slot:
    cdef readonly uint64_t gpa, size, hva
    cdef uint32_t number_
    cdef readonly bint readonly, log_dirty
    cdef readonly object gmem_flags
    cdef Region region       # what the converter knows of it; owns its gmem_fd
    cdef Conversions conversions  # whose converter knows it, or None
    cdef object mapping      # the mmap.mmap or GmemMapping that view_ is over, where the slot made one
    cdef bint adopted        # somebody else's memslot
    cdef object view_        # memoryview of bytes; None once gone
    cdef SlotDirty dirty_    # None: not log_dirty, or gone

    cdef void close_fd(self) noexcept
    cdef SlotDirty log(self)
    cdef SlotDirty logged(self)
    cdef int let_go(self) except -1
    cdef int vacate(self) except -1


cdef class Memory:
    cdef Handle handle
    cdef object lock
    cdef object still          # in whose with block guests find memslots changing
    cdef object vm_type
    cdef bint region2
    cdef tuple slots_          # by gpa
    cdef Span *spans           # of slots, for looking up without touching objects
    cdef Conversions conversions
    cdef Converter *converter  # of conversions
    cdef bint rebinds          # the backend is SlotRebind
    cdef Vcpus vcpus
    cdef readonly DirtyLog dirty_log  # internal

    cdef int convert_steps(self, uint64_t first, uint64_t last, bint private) except -1
    cdef int look_around(self) except -1
    cdef int _reserve_number(self) except -2
    cdef int _release_number(self, uint32_t number) except -1
    cdef tuple present(self)
    cdef object slot_at(self, uint64_t gpa)
    cdef int set_region(self, Slot slot, uint64_t size) except -1
    cdef int change_slots(self, list added, list removed) except -1
    cdef int transfer(self, gpa, char *local, size_t n, bint to_guest) except -1
