from kvmexit._ioctl cimport Handle
from kvmexit._page cimport Page


cdef class Vcpus:
    cdef Handle handle        # of the VM
    cdef list weak_pages
    cdef object __weakref__
    cdef readonly int pauses  # in effect or asked for
    cdef dict granted         # thread identity -> how many of its pauses are in effect

    cdef list run_by(self, unsigned long me)
    cdef bint stopped(self, unsigned long me)
    cdef int ask(self) except -1
    cdef int release(self) except -1


cdef void stopped_one() noexcept nogil
cdef bint paused_by(unsigned long me, Page own)
