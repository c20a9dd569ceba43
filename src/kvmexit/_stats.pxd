"""`cdef extern` over _stats.h, and the object that owns a vCPU's statistics."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmexit._page cimport kvmexit_stats, kvmexit_vcpu


cdef extern from "_stats.h" nogil:
    const int KVMEXIT_NATIVE, KVMEXIT_PYTHON, KVMEXIT_CALLER, KVMEXIT_RACE, KVMEXIT_ERROR, KVMEXIT_PENDING
    const int KVMEXIT_IN_KVM, KVMEXIT_IN_NATIVE
    enum:
        KVMEXIT_KINDS, KVMEXIT_OUTCOMES, KVMEXIT_PHASES, KVMEXIT_LAST, KVMEXIT_WORDS
    struct kvmexit_record:
        uint64_t rip
        uint64_t payload[3]
        uint32_t reason
        uint16_t error
        uint8_t place, outcome
    const uint64_t KVMEXIT_NO_RIP, kvmexit_no_rip
    void kvmexit_remember(kvmexit_stats *, const kvmexit_vcpu *)
    void kvmexit_hand_over(kvmexit_stats *)
    void kvmexit_settle(kvmexit_stats *, int)
    void kvmexit_enter_phase(kvmexit_stats *, int)
    void kvmexit_leave_native(kvmexit_stats *)
    void kvmexit_enter_python(kvmexit_stats *)
    void kvmexit_leave_python(kvmexit_stats *)


cdef class Recorder:
    cdef kvmexit_stats *c
    cdef bint tsc
    cdef bint timed       # whether times were ever measured
    cdef object baseline  # Stats at the last reset(), or None

    cdef object snapshot(self)
