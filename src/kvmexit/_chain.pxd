"""`cdef extern` over include/kvmexit/kvmexit.h and the tables of _routes.h, no code."""

from libc.stdint cimport uint32_t, uint64_t

from kvmexit._uapi cimport kvm_run


cdef extern from "include/kvmexit/kvmexit.h" nogil:
    struct kvmexit_exit:
        uint32_t version, reason, vcpu, count, is_write, owes, reserved
        int error
        uint64_t address, base, size, flags
        void *data
        kvm_run *run
    ctypedef int (*kvmexit_handler)(kvmexit_exit *, void *) noexcept nogil
    const uint32_t KVMEXIT_API_VERSION
    const char *KVMEXIT_HANDLER
    enum:
        KVMEXIT_DONE, KVMEXIT_PASS, KVMEXIT_STOP


cdef extern from "_routes.h" nogil:
    const int KVMEXIT_LATER
    struct kvmexit_route:
        kvmexit_handler call
        void *opaque
        void *handler
        void *entry
        uint64_t first
    struct kvmexit_segment:
        uint64_t first, last
        const kvmexit_route *chain
    struct kvmexit_segments:
        const kvmexit_segment *at
        size_t count
    struct kvmexit_table:
        void *owner
        uint64_t serial
        kvmexit_segments places[46]
        const kvmexit_route **ports[256]
