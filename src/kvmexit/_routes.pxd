from libc.stdint cimport uint64_t

from kvmexit._chain cimport kvmexit_handler, kvmexit_route, kvmexit_table
from kvmexit._page cimport Page, kvmexit_vcpu


cdef extern from "_routes.h" nogil:
    const kvmexit_table *kvmexit_begin_native(kvmexit_vcpu *)
    void kvmexit_end_native(kvmexit_vcpu *)
    bint kvmexit_is_present(const kvmexit_vcpu *)
    uint64_t kvmexit_key(const kvmexit_vcpu *)
    const kvmexit_route *kvmexit_find(kvmexit_vcpu *, const kvmexit_table *, uint64_t key)


cdef enum:
    ANY = -1  # every exit


cdef class Native:
    cdef kvmexit_handler call
    cdef void *opaque

    cdef int check(self, object memory) except -1


cdef class RouteTable:
    cdef kvmexit_table table
    cdef void *memory       # segments, chains and port blocks
    cdef readonly tuple entries      # most specific first; keeps the handlers alive
    cdef tuple plans        # per place: the segments, as [(first, last, chain)]
    cdef tuple blocks       # of ports: see _blocks()

    cdef int build(self) except -1
    cdef bint has(self, const kvmexit_route *route)


cdef class Routing:
    cdef RouteTable table           # the present one
    cdef const void *cell           # the same for the burst
    cdef dict retired               # tables that a burst may still use: serial -> (table, [(page, native)])

    cdef RouteTable present(self)
    cdef int attach(self, Page page) except -1
    cdef int reap(self) except -1
