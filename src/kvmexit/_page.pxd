from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from posix.types cimport pid_t

from kvmexit._chain cimport kvmexit_route, kvmexit_table
from kvmexit._ioctl cimport Handle
from kvmexit._uapi cimport kvm_regs, kvm_run


cdef extern from "_page.h" nogil:
    struct kvmexit_coalesced:
        pass
    struct kvmexit_stats:
        pass
    struct kvmexit_vcpu:
        int (*enter)(kvmexit_vcpu *) noexcept nogil
        kvm_run *run
        kvmexit_stats *stats
        const uint64_t *rip
        size_t run_size
        void *script
        int fd
        pid_t pid
        const unsigned *forks
        unsigned born
        uint32_t request
        int32_t tid
        int parked
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
        int software_protected
        uint64_t entries, retried_unwritten, retried_eintr, retried_eagain, retried_enomem, retried_race
        uint32_t fault_limit, fault_count
        int regs_synced
        uint64_t fault_payload[4]
        kvm_regs fault_regs


cdef enum:
    REGS = 1
    SREGS = 2
    EVENTS = 4
    REGISTER_BYTES = 520  # kvm_sync_regs: regs, sregs, events


cdef class Page:
    cdef kvmexit_vcpu c
    cdef Handle handle                       # of the vCPU; c.fd is its descriptor
    cdef object __weakref__
    cdef object script                       # what c.script points into
    cdef object recorder                     # what c.stats points into (_stats.pyx)
    cdef readonly unsigned long owner        # thread identity of the run() in progress, or 0
    cdef bint borrowed                       # adopted: the vCPU goes on after us, so leave its page as it was
    cdef uint64_t borrowed_valid_regs
    cdef int synced                          # classes KVM copies on every return (valid_regs)
    cdef int syncable                        # classes it could copy (KVM_CAP_SYNC_REGS)
    cdef int valid                           # classes whose copy in the page is current
    cdef int written                         # classes with values kept aside
    cdef int flushed                         # of these, the ones in the page for KVM to take
    cdef uint8_t value[REGISTER_BYTES]
    cdef uint8_t mask[REGISTER_BYTES]

    cdef int check(self) except -1
    cdef int check_mine(self) except -1
    cdef int load(self, int which) except -1
    cdef int flush(self) except -1
    cdef void settle(self) noexcept
    cdef void close(self) noexcept


cdef Page map_vcpu(int fd, size_t run_size)
cdef Page anonymous(size_t run_size)
