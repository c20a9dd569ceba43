from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, uint64_t

from kvmexit._exits cimport Exit


cdef enum:
    ANY = -1  # every exit


cdef struct Range:
    int32_t place         # as Exit.place, or ANY
    uint64_t first, last  # of the port, GPA, hypercall number or MSR index; inclusive
    PyObject *handler


cdef class RouteTable:
    cdef Range *ranges
    cdef Py_ssize_t count
    cdef tuple entries      # in the order of ranges; keeps the handlers alive

    cdef PyObject *find(self, Exit e, Py_ssize_t *position) noexcept
