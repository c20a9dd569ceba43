"""KVM's ABI as Cython sees it: declarations over include/kvmexit/uapi.h, no code."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "include/kvmexit/uapi.h" nogil:
    enum:
        KVM_API_VERSION
        KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE, KVM_GET_SUPPORTED_CPUID
        KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2, KVM_SET_TSS_ADDR
        KVM_SET_IDENTITY_MAP_ADDR, KVM_CREATE_IRQCHIP, KVM_IRQ_LINE, KVM_ENABLE_CAP, KVM_CREATE_GUEST_MEMFD
        KVM_SET_MEMORY_ATTRIBUTES
        KVM_IOEVENTFD, KVM_IRQFD, KVM_X86_SET_MSR_FILTER, KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO
        KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, KVM_RESET_DIRTY_RINGS
        KVM_RUN, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS, KVM_SET_SIGNAL_MASK, KVM_SET_CPUID2
        KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, KVM_INTERRUPT, KVM_NMI
        KVM_CAP_SET_TSS_ADDR, KVM_CAP_NR_MEMSLOTS, KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_CAP_SYNC_REGS
        KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_EXIT_HYPERCALL
        KVM_CAP_USER_MEMORY2, KVM_CAP_MEMORY_ATTRIBUTES
        KVM_CAP_IRQ_ROUTING, KVM_CAP_X86_MSR_FILTER, KVM_CAP_COALESCED_MMIO, KVM_CAP_COALESCED_PIO
        KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
        KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_DIRTY_LOG_INITIALLY_SET
        KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM, KVM_X86_SEV_VM, KVM_X86_SEV_ES_VM, KVM_X86_SNP_VM, KVM_X86_TDX_VM
        KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEM_GUEST_MEMFD
        GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED
        KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_HC_MAP_GPA_RANGE
        KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, KVM_SYNC_X86_EVENTS
        KVM_EXIT_IO, KVM_EXIT_HYPERCALL, KVM_EXIT_MMIO, KVM_EXIT_INTR, KVM_EXIT_OSI, KVM_EXIT_PAPR_HCALL, KVM_EXIT_EPR
        KVM_EXIT_HYPERV, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_EXIT_X86_BUS_LOCK, KVM_EXIT_XEN
        KVM_EXIT_MEMORY_FAULT, KVM_EXIT_SET_TPR, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_TDX, KVM_EXIT_SNP_REQ_CERTS
        KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
        KVM_EXIT_HYPERV_SYNIC, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNDBG
        KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        KVM_MEMORY_EXIT_FLAG_PRIVATE
        KVM_IOEVENTFD_FLAG_DATAMATCH, KVM_IOEVENTFD_FLAG_PIO, KVM_IOEVENTFD_FLAG_DEASSIGN
        KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE
        KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_MSR_EXIT_REASON_FILTER
        KVM_MSR_FILTER_MAX_RANGES, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE
        KVM_MSR_FILTER_DEFAULT_ALLOW, KVM_MSR_FILTER_DEFAULT_DENY
        KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET
    const uint32_t KVMEXIT_REASON_SENTINEL

    struct kvm_regs:
        uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags

    struct kvm_segment:
        uint64_t base
        uint32_t limit
        uint16_t selector
        uint8_t type, present, dpl, db, s, l, g, avl, unusable

    struct kvm_dtable:
        uint64_t base
        uint16_t limit

    struct kvm_sregs:
        kvm_segment cs, ds, es, fs, gs, ss, tr, ldt
        kvm_dtable gdt, idt
        uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base
        uint64_t interrupt_bitmap[4]

    struct _events_exception "kvm_vcpu_events_exception":
        uint8_t injected, nr, has_error_code, pending
        uint32_t error_code

    struct _events_interrupt "kvm_vcpu_events_interrupt":
        uint8_t injected, nr, soft, shadow

    struct _events_nmi "kvm_vcpu_events_nmi":
        uint8_t injected, pending, masked

    struct _events_smi "kvm_vcpu_events_smi":
        uint8_t smm, pending, smm_inside_nmi, latched_init

    struct _events_triple_fault "kvm_vcpu_events_triple_fault":
        uint8_t pending

    struct kvm_vcpu_events:
        _events_exception exception
        _events_interrupt interrupt
        _events_nmi nmi
        uint32_t sipi_vector
        uint32_t flags
        _events_smi smi
        _events_triple_fault triple_fault
        uint8_t exception_has_payload
        uint64_t exception_payload

    struct kvm_sync_regs:
        kvm_regs regs
        kvm_sregs sregs
        kvm_vcpu_events events

    struct _run_s "kvm_run_s":
        kvm_sync_regs regs

    struct _run_hw "kvm_run_hw":
        uint64_t hardware_exit_reason

    struct _run_fail_entry "kvm_run_fail_entry":
        uint64_t hardware_entry_failure_reason
        uint32_t cpu

    struct _run_ex "kvm_run_ex":
        uint32_t exception, error_code

    struct _run_io "kvm_run_io":
        uint8_t direction, size
        uint16_t port
        uint32_t count
        uint64_t data_offset

    struct kvm_debug_exit_arch:
        uint32_t exception
        uint64_t pc, dr6, dr7

    struct _run_debug "kvm_run_debug":
        kvm_debug_exit_arch arch

    struct _run_mmio "kvm_run_mmio":
        uint64_t phys_addr
        uint8_t data[8]
        uint32_t len
        uint8_t is_write

    struct _run_hypercall "kvm_run_hypercall":
        uint64_t nr
        uint64_t args[6]
        uint64_t ret, flags

    struct _run_tpr_access "kvm_run_tpr_access":
        uint64_t rip
        uint32_t is_write

    struct _run_s390_sieic "kvm_run_s390_sieic":
        uint8_t icptcode
        uint16_t ipa
        uint32_t ipb

    struct _run_s390_ucontrol "kvm_run_s390_ucontrol":
        uint64_t trans_exc_code
        uint32_t pgm_code

    struct _run_dcr "kvm_run_dcr":
        uint32_t dcrn, data
        uint8_t is_write

    struct _run_internal "kvm_run_internal":
        uint32_t suberror, ndata
        uint64_t data[16]

    struct _run_emulation_failure "kvm_run_emulation_failure":
        uint64_t flags
        uint8_t insn_size
        uint8_t insn_bytes[15]

    struct _run_osi "kvm_run_osi":
        uint64_t gprs[32]

    struct _run_papr_hcall "kvm_run_papr_hcall":
        uint64_t nr, ret
        uint64_t args[9]

    struct _run_s390_tsch "kvm_run_s390_tsch":
        uint16_t subchannel_id, subchannel_nr
        uint32_t io_int_parm, io_int_word, ipb
        uint8_t dequeued

    struct _run_epr "kvm_run_epr":
        uint32_t epr

    struct _run_system_event "kvm_run_system_event":
        uint32_t type, ndata
        uint64_t data[16]

    struct _run_s390_stsi "kvm_run_s390_stsi":
        uint64_t addr
        uint8_t ar, reserved, fc, sel1
        uint16_t sel2

    struct _run_eoi "kvm_run_eoi":
        uint8_t vector

    struct _hyperv_synic "kvm_run_hyperv_synic":
        uint32_t msr
        uint64_t control, evt_page, msg_page

    struct _hyperv_hcall "kvm_run_hyperv_hcall":
        uint64_t input, result
        uint64_t params[2]

    struct _hyperv_syndbg "kvm_run_hyperv_syndbg":
        uint32_t msr
        uint64_t control, status, send_page, recv_page, pending_page

    struct _hyperv_u "kvm_run_hyperv_u":
        _hyperv_synic synic
        _hyperv_hcall hcall
        _hyperv_syndbg syndbg

    struct kvm_hyperv_exit:
        uint32_t type
        _hyperv_u u

    struct _run_arm_nisv "kvm_run_arm_nisv":
        uint64_t esr_iss, fault_ipa

    struct _run_msr "kvm_run_msr":
        uint8_t error
        uint32_t reason, index
        uint64_t data

    struct _xen_hcall "kvm_run_xen_hcall":
        uint32_t longmode, cpl
        uint64_t input, result
        uint64_t params[6]

    struct _xen_u "kvm_run_xen_u":
        _xen_hcall hcall

    struct kvm_xen_exit:
        uint32_t type
        _xen_u u

    struct _run_riscv_sbi "kvm_run_riscv_sbi":
        unsigned long extension_id, function_id
        unsigned long args[6]
        unsigned long ret[2]

    struct _run_riscv_csr "kvm_run_riscv_csr":
        unsigned long csr_num, new_value, write_mask, ret_value

    struct _run_notify "kvm_run_notify":
        uint32_t flags

    struct _run_memory_fault "kvm_run_memory_fault":
        uint64_t flags, gpa, size

    struct _tdx_unknown "kvm_run_tdx_unknown":
        uint64_t ret
        uint64_t data[5]

    struct _tdx_info "kvm_run_tdx_info":
        uint64_t ret, leaf, r11, r12, r13, r14

    struct _tdx_get_quote "kvm_run_tdx_get_quote":
        uint64_t ret, gpa, size

    struct _tdx_setup_event_notify "kvm_run_tdx_setup_event_notify":
        uint64_t ret, vector

    struct _run_tdx "kvm_run_tdx":
        uint64_t flags, nr
        _tdx_unknown unknown
        _tdx_info get_tdvmcall_info
        _tdx_get_quote get_quote
        _tdx_setup_event_notify setup_event_notify

    struct _run_arm_sea "kvm_run_arm_sea":
        uint64_t flags, esr, gva, gpa

    struct kvm_exit_snp_req_certs:
        uint64_t gpa, npages, ret

    struct kvm_run:
        uint8_t request_interrupt_window, immediate_exit, if_flag, ready_for_interrupt_injection
        uint32_t exit_reason
        uint16_t flags
        uint64_t cr8
        _run_hw hw
        _run_fail_entry fail_entry
        _run_ex ex
        _run_io io
        _run_debug debug
        _run_mmio mmio
        _run_mmio iocsr_io
        _run_hypercall hypercall
        _run_tpr_access tpr_access
        _run_s390_sieic s390_sieic
        uint64_t s390_reset_flags
        _run_s390_ucontrol s390_ucontrol
        _run_dcr dcr
        _run_internal internal
        _run_emulation_failure emulation_failure
        _run_osi osi
        _run_papr_hcall papr_hcall
        _run_s390_tsch s390_tsch
        _run_epr epr
        _run_system_event system_event
        _run_s390_stsi s390_stsi
        _run_eoi eoi
        kvm_hyperv_exit hyperv
        _run_arm_nisv arm_nisv
        _run_msr msr
        kvm_xen_exit xen
        _run_riscv_sbi riscv_sbi
        _run_riscv_csr riscv_csr
        _run_notify notify
        _run_memory_fault memory_fault
        _run_tdx tdx
        _run_arm_sea arm_sea
        kvm_exit_snp_req_certs snp_req_certs
        uint64_t kvm_valid_regs, kvm_dirty_regs
        _run_s s

    struct kvm_userspace_memory_region2:
        uint32_t slot, flags
        uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset
        uint32_t guest_memfd

    struct kvm_create_guest_memfd:
        uint64_t size, flags

    struct kvm_memory_attributes:
        uint64_t address, size, attributes, flags

    struct kvm_enable_cap:
        uint32_t cap
        uint64_t args[4]

    struct kvm_irq_level:
        uint32_t irq, level

    struct kvm_interrupt:
        uint32_t irq

    struct kvm_ioeventfd:
        uint64_t datamatch, addr
        uint32_t len
        int fd
        uint32_t flags

    struct kvm_irqfd:
        uint32_t fd, gsi, flags, resamplefd

    struct kvm_msr_filter_range:
        uint32_t flags, nmsrs, base
        uint8_t *bitmap

    struct kvm_msr_filter:
        uint32_t flags
        kvm_msr_filter_range ranges[16]

    struct kvm_coalesced_mmio_zone:
        uint64_t addr
        uint32_t size, pio

    struct kvm_dirty_log:
        uint32_t slot
        void *dirty_bitmap

    struct kvm_clear_dirty_log:
        uint32_t slot, num_pages
        uint64_t first_page
        void *dirty_bitmap

    struct kvm_dirty_gfn:
        uint32_t flags, slot
        uint64_t offset
