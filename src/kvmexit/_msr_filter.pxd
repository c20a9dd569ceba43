from kvmexit._ioctl cimport Handle
from kvmexit._uapi cimport kvm_msr_filter


cdef class MsrFilter:
    cdef kvm_msr_filter argument
    cdef list bitmaps           # that the argument points into
    cdef readonly bint denies   # anything

    cdef int install(self, Handle handle) except -1
