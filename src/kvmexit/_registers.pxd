from kvmexit._page cimport Page


cdef class RegisterView:
    cdef Page page
    cdef int which
    cdef size_t start


cdef RegisterView regs_of(Page page)
cdef RegisterView sregs_of(Page page)
cdef RegisterView events_of(Page page)
