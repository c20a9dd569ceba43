from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from posix.types cimport pid_t

from kvmexit._chain cimport kvmexit_exit, kvmexit_route, kvmexit_table
from kvmexit._ioctl cimport Handle
from kvmexit._uapi cimport kvm_regs, kvm_run


cdef extern from "_page.h" nogil:
    struct kvmexit_coalesced:
        pass
    struct kvmexit_stats:
        pass
    struct kvmexit_trace:
        pass
    struct kvmexit_poison:
        uint64_t gpa, size, flags
    struct kvmexit_vcpu:
        int (*enter)(kvmexit_vcpu *) noexcept nogil
        kvm_run *run
        kvmexit_stats *stats
        const uint64_t *rip
        size_t run_size
        void *script
        kvmexit_trace *trace
        uint32_t said
        int fd
        pid_t pid
        const unsigned *forks
        unsigned born
        int synced, syncable, valid, written, flushed
        uint8_t *value
        uint8_t *mask
        uint32_t request
        int32_t tid
        kvmexit_exit exit
        uint64_t exit_seq
        uint64_t deadline_ns
        kvmexit_vcpu *outer
        int main_thread
        uint64_t seq
        uint32_t reason, place
        int error
        int needs, answered, unsettled, completes
        const void **cell
        const int *fenced
        uint64_t native
        const kvmexit_table *table
        const kvmexit_route *chain
        uint32_t id
        kvmexit_coalesced *coalesced
        void *converter
        uint64_t generation
        int software_protected, rebinds
        uint64_t entries, retried_unwritten, retried_eintr, retried_eagain, retried_enomem, retried_race
        uint32_t unwritten, no_memory
        uint32_t fault_limit, fault_count
        int regs_synced
        uint64_t fault_payload[4]
        kvm_regs fault_regs
    const uint32_t KVMEXIT_REQUEST_KICK, KVMEXIT_REQUEST_PAUSE, KVMEXIT_REQUEST_CLOSED
    bint kvmexit_claim(kvmexit_vcpu *, unsigned long)
    void kvmexit_disown(kvmexit_vcpu *)
    unsigned long kvmexit_owner(const kvmexit_vcpu *)
    uint64_t kvmexit_seq(const kvmexit_vcpu *)
    void kvmexit_set_seq(kvmexit_vcpu *, uint64_t)
    void kvmexit_set_parked(kvmexit_vcpu *, bint)
    bint kvmexit_parked(const kvmexit_vcpu *)
    uint32_t kvmexit_requests(const kvmexit_vcpu *)
    int kvmexit_begin_use(kvmexit_vcpu *)
    void kvmexit_end_use(kvmexit_vcpu *)
    void kvmexit_shut(kvmexit_vcpu *)
    bint kvmexit_in_use(const kvmexit_vcpu *)


cdef enum:
    REGS = 1
    SREGS = 2
    EVENTS = 4


cdef class Page:
    cdef kvmexit_vcpu c
    cdef Handle handle                       # of the vCPU; c.fd is its descriptor
    cdef object __weakref__
    cdef object script                       # what c.script points into
    cdef object recorder                     # what c.stats points into (_stats.pyx)
    cdef object trace                        # what c.trace points into (_record.pyx)
    cdef bint borrowed                       # adopted: the vCPU goes on after us, so leave its page as it was
    cdef uint64_t borrowed_valid_regs

    cdef int check(self) except -1
    cdef int check_mine(self) except -1
    cdef int check_mine_here(self) except -1
    cdef bint hold(self) except -1
    cdef bint hold_current(self, int which) except -1
    cdef int load(self, int which) except -1
    cdef int flush(self) except -1
    cdef void close(self) noexcept


cdef int flush_registers(kvmexit_vcpu *c, unsigned long *call) noexcept nogil
cdef void settle_registers(kvmexit_vcpu *c) noexcept nogil
cdef Page map_vcpu(int fd, size_t run_size)
cdef Page anonymous(size_t run_size)
