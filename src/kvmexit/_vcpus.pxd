from kvmexit._ioctl cimport Handle
from kvmexit._page cimport Page


cdef class Vcpus:
    cdef Handle handle        # of the VM
    cdef object lock
    cdef object weak_pages
    cdef readonly int pauses  # in effect or asked for
    cdef dict granted         # thread identity -> how many of its pauses are in effect

    cdef bint stopped(self, unsigned long me, bint in_handler)
    cdef int ask(self) except -1


cdef int stopped_one() except -1
