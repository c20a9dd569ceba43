/*
 * The part of KVM's ABI that kvmexit uses.
 *
 * A subset of our own, so that a build never depends on the age of the build machine's <linux/kvm.h>. It uses the
 * kernel's names: include one or the other. tests/test_uapi.py compares every name and every offset with the system's
 * headers and with recent ones, for x86-64 and aarch64.
 *
 * Source: Linux include/uapi/linux/kvm.h and arch/{x86,arm64}/include/uapi/asm/kvm.h, 6.12 to 7.3.
 */
#ifndef KVMEXIT_UAPI_H
#define KVMEXIT_UAPI_H

#ifdef __LINUX_KVM_H
#error "kvmexit/uapi.h uses the names of <linux/kvm.h>: include one of the two"
#endif

#include <stddef.h>
#include <stdint.h>

/* ---- ioctl numbers: _IOC of asm-generic/ioctl.h, type 0xae ---- */

#define KVMEXIT_IO(nr) (0xae00u | (nr))
#define KVMEXIT_IOW(nr, type) (0x40000000u | ((uint32_t)sizeof(type) << 16) | 0xae00u | (nr))
#define KVMEXIT_IOR(nr, type) (0x80000000u | ((uint32_t)sizeof(type) << 16) | 0xae00u | (nr))
#define KVMEXIT_IOWR(nr, type) (0xc0000000u | ((uint32_t)sizeof(type) << 16) | 0xae00u | (nr))

#define KVM_API_VERSION 12

/* on /dev/kvm */
#define KVM_GET_API_VERSION KVMEXIT_IO(0x00)
#define KVM_CREATE_VM KVMEXIT_IO(0x01)
#define KVM_CHECK_EXTENSION KVMEXIT_IO(0x03)
#define KVM_GET_VCPU_MMAP_SIZE KVMEXIT_IO(0x04)
#define KVM_GET_SUPPORTED_CPUID KVMEXIT_IOWR(0x05, struct kvm_cpuid2)

/* on a VM */
#define KVM_CREATE_VCPU KVMEXIT_IO(0x41)
#define KVM_GET_DIRTY_LOG KVMEXIT_IOW(0x42, struct kvm_dirty_log)
#define KVM_SET_USER_MEMORY_REGION KVMEXIT_IOW(0x46, struct kvm_userspace_memory_region)
#define KVM_SET_TSS_ADDR KVMEXIT_IO(0x47)
#define KVM_SET_IDENTITY_MAP_ADDR KVMEXIT_IOW(0x48, uint64_t)
#define KVM_SET_USER_MEMORY_REGION2 KVMEXIT_IOW(0x49, struct kvm_userspace_memory_region2)
#define KVM_CREATE_IRQCHIP KVMEXIT_IO(0x60)
#define KVM_IRQ_LINE KVMEXIT_IOW(0x61, struct kvm_irq_level)
#define KVM_REGISTER_COALESCED_MMIO KVMEXIT_IOW(0x67, struct kvm_coalesced_mmio_zone)
#define KVM_UNREGISTER_COALESCED_MMIO KVMEXIT_IOW(0x68, struct kvm_coalesced_mmio_zone)
#define KVM_IRQFD KVMEXIT_IOW(0x76, struct kvm_irqfd)
#define KVM_IOEVENTFD KVMEXIT_IOW(0x79, struct kvm_ioeventfd)
#define KVM_ENABLE_CAP KVMEXIT_IOW(0xa3, struct kvm_enable_cap)
#define KVM_CLEAR_DIRTY_LOG KVMEXIT_IOWR(0xc0, struct kvm_clear_dirty_log)
#define KVM_RESET_DIRTY_RINGS KVMEXIT_IO(0xc7)
#define KVM_SET_MEMORY_ATTRIBUTES KVMEXIT_IOW(0xd2, struct kvm_memory_attributes)
#define KVM_CREATE_GUEST_MEMFD KVMEXIT_IOWR(0xd4, struct kvm_create_guest_memfd)
#if defined(__x86_64__)
#define KVM_X86_SET_MSR_FILTER KVMEXIT_IOW(0xc6, struct kvm_msr_filter)
#endif

/* on a vCPU */
#define KVM_RUN KVMEXIT_IO(0x80)
#define KVM_SET_SIGNAL_MASK KVMEXIT_IOW(0x8b, struct kvm_signal_mask)
#define KVM_INTERRUPT KVMEXIT_IOW(0x86, struct kvm_interrupt)
#define KVM_NMI KVMEXIT_IO(0x9a)
#if defined(__x86_64__)
#define KVM_GET_REGS KVMEXIT_IOR(0x81, struct kvm_regs)
#define KVM_SET_REGS KVMEXIT_IOW(0x82, struct kvm_regs)
#define KVM_GET_SREGS KVMEXIT_IOR(0x83, struct kvm_sregs)
#define KVM_SET_SREGS KVMEXIT_IOW(0x84, struct kvm_sregs)
#define KVM_SET_CPUID2 KVMEXIT_IOW(0x90, struct kvm_cpuid2)
#define KVM_GET_VCPU_EVENTS KVMEXIT_IOR(0x9f, struct kvm_vcpu_events)
#define KVM_SET_VCPU_EVENTS KVMEXIT_IOW(0xa0, struct kvm_vcpu_events)
#endif

/* ---- capabilities ---- */

#define KVM_CAP_SET_TSS_ADDR 4
#define KVM_CAP_NR_MEMSLOTS 10
#define KVM_CAP_COALESCED_MMIO 15
#define KVM_CAP_IRQ_ROUTING 25
#define KVM_CAP_IRQFD 32
#define KVM_CAP_IOEVENTFD 36
#define KVM_CAP_SET_IDENTITY_MAP_ADDR 37
#define KVM_CAP_SYNC_REGS 74
#define KVM_CAP_READONLY_MEM 81
#define KVM_CAP_IRQFD_RESAMPLE 82
#define KVM_CAP_IOEVENTFD_ANY_LENGTH 122
#define KVM_CAP_IMMEDIATE_EXIT 136
#define KVM_CAP_COALESCED_PIO 162
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 168
#define KVM_CAP_X86_USER_SPACE_MSR 188
#define KVM_CAP_X86_MSR_FILTER 189
#define KVM_CAP_DIRTY_LOG_RING 192
#define KVM_CAP_EXIT_HYPERCALL 201
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#define KVM_CAP_USER_MEMORY2 231
#define KVM_CAP_MEMORY_FAULT_INFO 232
#define KVM_CAP_MEMORY_ATTRIBUTES 233
#define KVM_CAP_GUEST_MEMFD 234
#define KVM_CAP_VM_TYPES 235
#define KVM_CAP_GUEST_MEMFD_FLAGS 244

#define KVM_X86_DEFAULT_VM 0
#define KVM_X86_SW_PROTECTED_VM 1
#define KVM_X86_SEV_VM 2
#define KVM_X86_SEV_ES_VM 3
#define KVM_X86_SNP_VM 4
#define KVM_X86_TDX_VM 5

#define KVM_MEM_LOG_DIRTY_PAGES (1u << 0)
#define KVM_MEM_READONLY (1u << 1)
#define KVM_MEM_GUEST_MEMFD (1u << 2)
#define GUEST_MEMFD_FLAG_MMAP (1ull << 0)
#define GUEST_MEMFD_FLAG_INIT_SHARED (1ull << 1)

#define KVM_MEMORY_ATTRIBUTE_PRIVATE (1ull << 3)

#define KVM_IOEVENTFD_FLAG_DATAMATCH (1u << 0)
#define KVM_IOEVENTFD_FLAG_PIO (1u << 1)
#define KVM_IOEVENTFD_FLAG_DEASSIGN (1u << 2)
#define KVM_IRQFD_FLAG_DEASSIGN (1u << 0)
#define KVM_IRQFD_FLAG_RESAMPLE (1u << 1)

#define KVM_MSR_EXIT_REASON_INVAL (1u << 0)
#define KVM_MSR_EXIT_REASON_UNKNOWN (1u << 1)
#define KVM_MSR_EXIT_REASON_FILTER (1u << 2)
#if defined(__x86_64__)
#define KVM_MSR_FILTER_MAX_RANGES 16
#define KVM_MSR_FILTER_MAX_BITMAP_SIZE 0x600
#define KVM_MSR_FILTER_READ (1u << 0)
#define KVM_MSR_FILTER_WRITE (1u << 1)
#define KVM_MSR_FILTER_DEFAULT_ALLOW 0
#define KVM_MSR_FILTER_DEFAULT_DENY (1u << 0)

#define KVM_COALESCED_MMIO_PAGE_OFFSET 2 /* in pages, of a vCPU's mapping */
#endif
#define KVMEXIT_COALESCED_MMIO_MAX 170u /* KVM_COALESCED_MMIO_MAX, which needs the kernel's PAGE_SIZE */

#define KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE (1u << 0)
#define KVM_DIRTY_LOG_INITIALLY_SET (1u << 1)

#define KVM_DIRTY_LOG_PAGE_OFFSET 64 /* in pages, of a vCPU's mapping */
#define KVM_DIRTY_GFN_F_DIRTY (1u << 0)
#define KVM_DIRTY_GFN_F_RESET (1u << 1)

#define KVM_HC_MAP_GPA_RANGE 12

#define KVM_SYNC_X86_REGS (1ull << 0)
#define KVM_SYNC_X86_SREGS (1ull << 1)
#define KVM_SYNC_X86_EVENTS (1ull << 2)

/* ---- exit reasons ---- */

#define KVM_EXIT_UNKNOWN 0
#define KVM_EXIT_EXCEPTION 1
#define KVM_EXIT_IO 2
#define KVM_EXIT_HYPERCALL 3
#define KVM_EXIT_DEBUG 4
#define KVM_EXIT_HLT 5
#define KVM_EXIT_MMIO 6
#define KVM_EXIT_IRQ_WINDOW_OPEN 7
#define KVM_EXIT_SHUTDOWN 8
#define KVM_EXIT_FAIL_ENTRY 9
#define KVM_EXIT_INTR 10
#define KVM_EXIT_SET_TPR 11
#define KVM_EXIT_TPR_ACCESS 12
#define KVM_EXIT_S390_SIEIC 13
#define KVM_EXIT_S390_RESET 14
#define KVM_EXIT_DCR 15
#define KVM_EXIT_NMI 16
#define KVM_EXIT_INTERNAL_ERROR 17
#define KVM_EXIT_OSI 18
#define KVM_EXIT_PAPR_HCALL 19
#define KVM_EXIT_S390_UCONTROL 20
#define KVM_EXIT_WATCHDOG 21
#define KVM_EXIT_S390_TSCH 22
#define KVM_EXIT_EPR 23
#define KVM_EXIT_SYSTEM_EVENT 24
#define KVM_EXIT_S390_STSI 25
#define KVM_EXIT_IOAPIC_EOI 26
#define KVM_EXIT_HYPERV 27
#define KVM_EXIT_ARM_NISV 28
#define KVM_EXIT_X86_RDMSR 29
#define KVM_EXIT_X86_WRMSR 30
#define KVM_EXIT_DIRTY_RING_FULL 31
#define KVM_EXIT_AP_RESET_HOLD 32
#define KVM_EXIT_X86_BUS_LOCK 33
#define KVM_EXIT_XEN 34
#define KVM_EXIT_RISCV_SBI 35
#define KVM_EXIT_RISCV_CSR 36
#define KVM_EXIT_NOTIFY 37
#define KVM_EXIT_LOONGARCH_IOCSR 38
#define KVM_EXIT_MEMORY_FAULT 39
#define KVM_EXIT_TDX 40
#define KVM_EXIT_ARM_SEA 41
#define KVM_EXIT_ARM_LDST64B 42
#define KVM_EXIT_SNP_REQ_CERTS 43

#define KVM_EXIT_IO_IN 0
#define KVM_EXIT_IO_OUT 1

#define KVM_EXIT_HYPERV_SYNIC 1
#define KVM_EXIT_HYPERV_HCALL 2
#define KVM_EXIT_HYPERV_SYNDBG 3

#define KVM_INTERNAL_ERROR_EMULATION 1
#define KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES (1ull << 0)

#define KVM_RUN_X86_SMM (1u << 0)
#define KVM_RUN_X86_BUS_LOCK (1u << 1)
#define KVM_RUN_X86_GUEST_MODE (1u << 2)

#define KVM_MEMORY_EXIT_FLAG_PRIVATE (1ull << 3)

/* kvm_run.exit_reason before each entry on x86: no exit has it, so a stale reason is never taken for a new one. */
#define KVMEXIT_REASON_SENTINEL 0xffffffffu

/* ---- registers, x86-64 ---- */

#if defined(__x86_64__)

struct kvm_regs {
    uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rip, rflags;
};

struct kvm_segment {
    uint64_t base;
    uint32_t limit;
    uint16_t selector;
    uint8_t type, present, dpl, db, s, l, g, avl, unusable, padding;
};

struct kvm_dtable {
    uint64_t base;
    uint16_t limit;
    uint16_t padding[3];
};

struct kvm_sregs {
    struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
    struct kvm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base;
    uint64_t interrupt_bitmap[4];
};

struct kvm_vcpu_events {
    struct {
        uint8_t injected, nr, has_error_code, pending;
        uint32_t error_code;
    } exception;
    struct {
        uint8_t injected, nr, soft, shadow;
    } interrupt;
    struct {
        uint8_t injected, pending, masked, pad;
    } nmi;
    uint32_t sipi_vector;
    uint32_t flags;
    struct {
        uint8_t smm, pending, smm_inside_nmi, latched_init;
    } smi;
    struct {
        uint8_t pending;
    } triple_fault;
    uint8_t reserved[26];
    uint8_t exception_has_payload;
    uint64_t exception_payload;
};

struct kvm_sync_regs {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_vcpu_events events;
};

struct kvm_debug_exit_arch {
    uint32_t exception, pad;
    uint64_t pc, dr6, dr7;
};

#elif defined(__aarch64__)

struct kvm_sync_regs {
    uint64_t device_irq_level;
};

struct kvm_debug_exit_arch {
    uint32_t hsr, hsr_high;
    uint64_t far;
};

#else
#error "kvmexit knows KVM's layouts for x86-64 and aarch64"
#endif

/* ---- the page shared with a vCPU ---- */

struct kvm_hyperv_exit {
    uint32_t type, pad1;
    union {
        struct {
            uint32_t msr, pad2;
            uint64_t control, evt_page, msg_page;
        } synic;
        struct {
            uint64_t input, result, params[2];
        } hcall;
        struct {
            uint32_t msr, pad2;
            uint64_t control, status, send_page, recv_page, pending_page;
        } syndbg;
    } u;
};

struct kvm_xen_exit {
    uint32_t type;
    union {
        struct {
            uint32_t longmode, cpl;
            uint64_t input, result, params[6];
        } hcall;
    } u;
};

struct kvm_exit_snp_req_certs {
    uint64_t gpa, npages, ret;
};

struct kvm_run {
    uint8_t request_interrupt_window;
    uint8_t immediate_exit;
    uint8_t padding1[6];
    uint32_t exit_reason;
    uint8_t ready_for_interrupt_injection;
    uint8_t if_flag;
    uint16_t flags;
    uint64_t cr8;
    uint64_t apic_base;
    union {
        struct {
            uint64_t hardware_exit_reason;
        } hw;
        struct {
            uint64_t hardware_entry_failure_reason;
            uint32_t cpu;
        } fail_entry;
        struct {
            uint32_t exception, error_code;
        } ex;
        struct {
            uint8_t direction, size;
            uint16_t port;
            uint32_t count;
            uint64_t data_offset;
        } io;
        struct {
            struct kvm_debug_exit_arch arch;
        } debug;
        struct {
            uint64_t phys_addr;
            uint8_t data[8];
            uint32_t len;
            uint8_t is_write;
        } mmio;
        struct {
            uint64_t phys_addr;
            uint8_t data[8];
            uint32_t len;
            uint8_t is_write;
        } iocsr_io;
        struct {
            uint64_t nr, args[6], ret;
            union {
                uint32_t longmode;
                uint64_t flags;
            };
        } hypercall;
        struct {
            uint64_t rip;
            uint32_t is_write, pad;
        } tpr_access;
        struct {
            uint8_t icptcode;
            uint16_t ipa;
            uint32_t ipb;
        } s390_sieic;
        uint64_t s390_reset_flags;
        struct {
            uint64_t trans_exc_code;
            uint32_t pgm_code;
        } s390_ucontrol;
        struct {
            uint32_t dcrn, data;
            uint8_t is_write;
        } dcr;
        struct {
            uint32_t suberror, ndata;
            uint64_t data[16];
        } internal;
        struct {
            uint32_t suberror, ndata;
            uint64_t flags;
            union {
                struct {
                    uint8_t insn_size, insn_bytes[15];
                };
            };
        } emulation_failure;
        struct {
            uint64_t gprs[32];
        } osi;
        struct {
            uint64_t nr, ret, args[9];
        } papr_hcall;
        struct {
            uint16_t subchannel_id, subchannel_nr;
            uint32_t io_int_parm, io_int_word, ipb;
            uint8_t dequeued;
        } s390_tsch;
        struct {
            uint32_t epr;
        } epr;
        struct {
            uint32_t type, ndata;
            union {
                uint64_t flags;
                uint64_t data[16];
            };
        } system_event;
        struct {
            uint64_t addr;
            uint8_t ar, reserved, fc, sel1;
            uint16_t sel2;
        } s390_stsi;
        struct {
            uint8_t vector;
        } eoi;
        struct kvm_hyperv_exit hyperv;
        struct {
            uint64_t esr_iss, fault_ipa;
        } arm_nisv;
        struct {
            uint8_t error, pad[7];
            uint32_t reason, index;
            uint64_t data;
        } msr;
        struct kvm_xen_exit xen;
        struct {
            unsigned long extension_id, function_id, args[6], ret[2];
        } riscv_sbi;
        struct {
            unsigned long csr_num, new_value, write_mask, ret_value;
        } riscv_csr;
        struct {
            uint32_t flags;
        } notify;
        struct {
            uint64_t flags, gpa, size;
        } memory_fault;
        struct {
            uint64_t flags, nr;
            union {
                struct {
                    uint64_t ret, data[5];
                } unknown;
                struct {
                    uint64_t ret, gpa, size;
                } get_quote;
                struct {
                    uint64_t ret, leaf, r11, r12, r13, r14;
                } get_tdvmcall_info;
                struct {
                    uint64_t ret, vector;
                } setup_event_notify;
            };
        } tdx;
        struct {
            uint64_t flags, esr, gva, gpa;
        } arm_sea;
        struct kvm_exit_snp_req_certs snp_req_certs;
        char padding[256];
    };
    uint64_t kvm_valid_regs;
    uint64_t kvm_dirty_regs;
    union {
        struct kvm_sync_regs regs;
        char padding[2048];
    } s;
};

/* ---- arguments of ioctls ---- */

struct kvm_userspace_memory_region {
    uint32_t slot, flags;
    uint64_t guest_phys_addr, memory_size, userspace_addr;
};

struct kvm_userspace_memory_region2 {
    uint32_t slot, flags;
    uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
    uint32_t guest_memfd, pad1;
    uint64_t pad2[14];
};

struct kvm_create_guest_memfd {
    uint64_t size, flags, reserved[6];
};

struct kvm_memory_attributes {
    uint64_t address, size, attributes, flags;
};

struct kvm_enable_cap {
    uint32_t cap, flags;
    uint64_t args[4];
    uint8_t pad[64];
};

struct kvm_irq_level {
    union {
        uint32_t irq;
        int32_t status;
    };
    uint32_t level;
};

struct kvm_interrupt {
    uint32_t irq;
};

struct kvm_ioeventfd {
    uint64_t datamatch, addr;
    uint32_t len;
    int32_t fd;
    uint32_t flags;
    uint8_t pad[36];
};

struct kvm_irqfd {
    uint32_t fd, gsi, flags, resamplefd;
    uint8_t pad[16];
};

struct kvm_coalesced_mmio_zone {
    uint64_t addr;
    uint32_t size;
    union {
        uint32_t pad, pio;
    };
};

struct kvm_dirty_log {
    uint32_t slot, padding1;
    union {
        void *dirty_bitmap;
        uint64_t padding2;
    };
};

struct kvm_clear_dirty_log {
    uint32_t slot, num_pages;
    uint64_t first_page;
    union {
        void *dirty_bitmap;
        uint64_t padding2;
    };
};

#if defined(__x86_64__)
struct kvm_msr_filter_range {
    uint32_t flags, nmsrs, base;
    uint8_t *bitmap;
};

struct kvm_msr_filter {
    uint32_t flags;
    struct kvm_msr_filter_range ranges[KVM_MSR_FILTER_MAX_RANGES];
};
#endif

struct kvm_signal_mask {
    uint32_t len;
    uint8_t sigset[];
};

struct kvm_cpuid_entry2 {
    uint32_t function, index, flags, eax, ebx, ecx, edx, padding[3];
};

struct kvm_cpuid2 {
    uint32_t nent, padding;
    struct kvm_cpuid_entry2 entries[];
};

/* ---- rings shared with KVM ---- */

struct kvm_coalesced_mmio {
    uint64_t phys_addr;
    uint32_t len;
    union {
        uint32_t pad, pio;
    };
    uint8_t data[8];
};

/* One of a VM, in each of its vCPUs' mappings. */
struct kvm_coalesced_mmio_ring {
    uint32_t first, last;
    struct kvm_coalesced_mmio coalesced_mmio[];
};

struct kvm_dirty_gfn {
    uint32_t flags, slot;
    uint64_t offset;
};

/* ---- what must hold wherever this is compiled; the figures are the kernel's, seen in its own headers ---- */

#ifdef __cplusplus
#define KVMEXIT_ASSERT(what) static_assert(what, #what)
#else
#define KVMEXIT_ASSERT(what) _Static_assert(what, #what)
#endif

KVMEXIT_ASSERT(sizeof(struct kvm_run) == 2352);
KVMEXIT_ASSERT(offsetof(struct kvm_run, immediate_exit) == 1);
KVMEXIT_ASSERT(offsetof(struct kvm_run, exit_reason) == 8);
KVMEXIT_ASSERT(offsetof(struct kvm_run, flags) == 14);
KVMEXIT_ASSERT(offsetof(struct kvm_run, cr8) == 16);
KVMEXIT_ASSERT(offsetof(struct kvm_run, hw) == 32);
KVMEXIT_ASSERT(offsetof(struct kvm_run, io.data_offset) == 40);
KVMEXIT_ASSERT(offsetof(struct kvm_run, hypercall.ret) == 88);
KVMEXIT_ASSERT(offsetof(struct kvm_run, mmio.len) == 48);
KVMEXIT_ASSERT(offsetof(struct kvm_run, msr.data) == 48);
KVMEXIT_ASSERT(offsetof(struct kvm_run, memory_fault.gpa) == 40);
KVMEXIT_ASSERT(offsetof(struct kvm_run, tdx.unknown.ret) == 48);
KVMEXIT_ASSERT(offsetof(struct kvm_run, kvm_valid_regs) == 288);
KVMEXIT_ASSERT(offsetof(struct kvm_run, s) == 304);
KVMEXIT_ASSERT(sizeof(struct kvm_userspace_memory_region2) == 160);
KVMEXIT_ASSERT(sizeof(struct kvm_create_guest_memfd) == 64);
KVMEXIT_ASSERT(sizeof(struct kvm_memory_attributes) == 32);
KVMEXIT_ASSERT(sizeof(struct kvm_enable_cap) == 104);
KVMEXIT_ASSERT(sizeof(struct kvm_ioeventfd) == 64);
KVMEXIT_ASSERT(sizeof(struct kvm_irqfd) == 32);
KVMEXIT_ASSERT(sizeof(struct kvm_coalesced_mmio_zone) == 16);
KVMEXIT_ASSERT(sizeof(struct kvm_coalesced_mmio) == 24);
KVMEXIT_ASSERT(offsetof(struct kvm_coalesced_mmio_ring, coalesced_mmio) == 8);
KVMEXIT_ASSERT(sizeof(struct kvm_dirty_log) == 16);
KVMEXIT_ASSERT(sizeof(struct kvm_clear_dirty_log) == 24);
KVMEXIT_ASSERT(sizeof(struct kvm_dirty_gfn) == 16);
#if defined(__x86_64__)
KVMEXIT_ASSERT(sizeof(struct kvm_regs) == 144);
KVMEXIT_ASSERT(sizeof(struct kvm_sregs) == 312);
KVMEXIT_ASSERT(sizeof(struct kvm_vcpu_events) == 64);
KVMEXIT_ASSERT(sizeof(struct kvm_msr_filter) == 392);
KVMEXIT_ASSERT(offsetof(struct kvm_run, s.regs.sregs) == 448);
KVMEXIT_ASSERT(offsetof(struct kvm_run, s.regs.events) == 760);
#endif

#endif /* KVMEXIT_UAPI_H */
