from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmexit._page cimport Page, kvmexit_vcpu
from kvmexit._uapi cimport (
    KVM_EXIT_EPR, KVM_EXIT_HYPERCALL, KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNDBG, KVM_EXIT_IO,
    KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, KVM_EXIT_OSI, KVM_EXIT_PAPR_HCALL, KVM_EXIT_SNP_REQ_CERTS,
    KVM_EXIT_TDX, KVM_EXIT_X86_BUS_LOCK, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_EXIT_XEN, KVMEXIT_REASON_SENTINEL,
    kvm_run,
)


cdef enum:
    PAYLOAD = 256      # the union in kvm_run
    INLINE_DATA = 16   # PIO bytes kept in the object; longer strings go into one bytes object
    KNOWN = 44         # exit reasons 0..43
    UNEXPLAINED = 44   # the place of a bare fault
    UNKNOWN = 45       # the place of reasons beyond, and of payloads that contradict themselves
    PLACES = 46


cdef class Exit:
    cdef Page page          # None for an exit that no vCPU stands behind
    cdef uint64_t seq       # page.c.seq when it was made
    cdef uint32_t code      # kvm_run.exit_reason
    cdef uint32_t place     # as kvmexit_vcpu.place
    cdef int error_
    cdef uint16_t run_flags_
    cdef uint64_t payload[32]  # PAYLOAD bytes, aligned as struct kvm_run wants it

    cdef bint is_current(self) noexcept
    cdef int write(self, size_t offset, const void *data, size_t size, bint settles) except -1


cdef class Io(Exit):
    cdef uint8_t inline_data[INLINE_DATA]
    cdef bytes long_data
    cdef bint answered


cdef class Mmio(Exit):
    cdef object slot_
    cdef bint answered


cdef class SetTpr(Exit):
    cdef uint64_t cr8_


cdef class UnexplainedFault(Exit):
    cdef object rip_


cdef class Interrupted(Exit):
    cdef str cause_


cdef kvm_run *as_run(Exit e) noexcept
cdef Exit make(list cache, Page page, bint *fresh)
cdef Interrupted make_interrupted(Page page, str cause)
cdef int answer(Exit e, object value) except -1


cdef inline bint completes_on_entry(uint32_t reason) noexcept nogil:
    """Whether KVM finishes the exit's operation only when re-entered.

    Source: Documentation/virt/kvm/api.rst, below KVM_EXIT_MMIO.
    """
    return reason in (
        KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_HYPERCALL, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_EXIT_XEN,
        KVM_EXIT_HYPERV, KVM_EXIT_TDX, KVM_EXIT_SNP_REQ_CERTS, KVM_EXIT_X86_BUS_LOCK, KVM_EXIT_OSI,
        KVM_EXIT_PAPR_HCALL, KVM_EXIT_EPR)


cdef inline bint is_well_formed_io(kvmexit_vcpu *c) noexcept nogil:
    """Whether the lengths and offsets of a port I/O exit can be used as they are."""
    cdef kvm_run *run = c.run
    cdef uint64_t n = <uint64_t>run.io.size * run.io.count
    return (
        run.io.direction <= KVM_EXIT_IO_OUT and run.io.size in (1, 2, 4) and run.io.count > 0
        and run.io.data_offset >= sizeof(kvm_run) and run.io.data_offset <= c.run_size
        and n <= c.run_size - run.io.data_offset)


cdef inline void classify(kvmexit_vcpu *c) noexcept nogil:
    """Say what the exit in hand is: its place in the tables, and whether KVM waits for an answer."""
    cdef kvm_run *run = c.run
    c.needs = False
    if c.reason == KVM_EXIT_IO:
        # What contradicts itself cannot be answered, and completing it would hand the guest rubbish: it stays owing.
        c.place = KVM_EXIT_IO if is_well_formed_io(c) else <uint32_t>UNKNOWN
        c.needs = c.place == UNKNOWN or run.io.direction == KVM_EXIT_IO_IN
    elif c.reason == KVM_EXIT_MMIO:
        c.place = KVM_EXIT_MMIO if 1 <= run.mmio.len <= 8 and run.mmio.is_write <= 1 else <uint32_t>UNKNOWN
        c.needs = c.place == UNKNOWN or not run.mmio.is_write
    elif c.reason == KVMEXIT_REASON_SENTINEL:
        c.place = UNEXPLAINED
    elif c.reason >= KNOWN:
        c.place = UNKNOWN
    else:
        c.place = c.reason
        if c.reason == KVM_EXIT_HYPERV:
            c.needs = run.hyperv.type == KVM_EXIT_HYPERV_HCALL or run.hyperv.type == KVM_EXIT_HYPERV_SYNDBG
        else:
            c.needs = c.reason in (
                KVM_EXIT_HYPERCALL, KVM_EXIT_X86_RDMSR, KVM_EXIT_XEN, KVM_EXIT_TDX, KVM_EXIT_SNP_REQ_CERTS)
