"""The exit classes Python sees, and how kvm_run becomes one of them.

An `Exit` is a value: `make()` copies the payload out of kvm_run, and every field is read from that copy. `Field` and
`Answer` are descriptors that know where in the payload a field lies; the classes at the end are lists of them, under the
kernel's names (include/uapi/linux/kvm.h, struct kvm_run). An `Answer` is also written through to kvm_run, for as long as the
exit is pending.
"""

import enum
import types
from operator import index
from typing import NamedTuple

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.ref cimport PyObject
from libc.stdint cimport UINT64_MAX, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kvmexit._page cimport Page, kvmexit_disown, kvmexit_seq, kvmexit_stats, kvmexit_vcpu
from kvmexit._uapi cimport (
    KVM_EXIT_HYPERCALL, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNDBG, KVM_EXIT_HYPERV_SYNIC, KVM_EXIT_INTR,
    KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SET_TPR, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_MEMORY_EXIT_FLAG_PRIVATE,
    KVM_HC_MAP_GPA_RANGE, kvm_run,
)
from kvmexit.errors import NotPendingError

cdef extern from "_stats.h" nogil:  # of _stats.pyx only this: it imports this module
    const int KVMEXIT_CALLER
    void kvmexit_settle(kvmexit_stats *, int)

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject *) nogil
    PyObject *PyList_GetItem(object, Py_ssize_t) except NULL
    unsigned long long PyLong_AsUnsignedLongLong(object) noexcept
    PyObject *PyErr_Occurred()
    void PyErr_Clear()
    enum:
        SHARED_OWNERSHIP "KVMEXIT_NO_UNIQUE_REFERENCE"

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    #define KVMEXIT_NO_UNIQUE_REFERENCE 1  /* a count of one proves nothing there */
    #else
    #define KVMEXIT_NO_UNIQUE_REFERENCE 0
    #endif
    """


class ExitReason(enum.IntEnum):
    """Why KVM_RUN returned: KVM_EXIT_* of include/uapi/linux/kvm.h."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    S390_SIEIC = 13
    S390_RESET = 14
    DCR = 15
    NMI = 16
    INTERNAL_ERROR = 17
    OSI = 18
    PAPR_HCALL = 19
    S390_UCONTROL = 20
    WATCHDOG = 21
    S390_TSCH = 22
    EPR = 23
    SYSTEM_EVENT = 24
    S390_STSI = 25
    IOAPIC_EOI = 26
    HYPERV = 27
    ARM_NISV = 28
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    XEN = 34
    RISCV_SBI = 35
    RISCV_CSR = 36
    NOTIFY = 37
    LOONGARCH_IOCSR = 38
    MEMORY_FAULT = 39
    TDX = 40
    ARM_SEA = 41
    ARM_LDST64B = 42
    SNP_REQ_CERTS = 43


_REASONS = tuple(ExitReason)


class MapGpaRange(NamedTuple):
    """What a guest asks by KVM_HC_MAP_GPA_RANGE. It is the guest's word: nothing of it is checked.

    gpa; size (bytes, up to 2**76); private (bit 4 of the attributes: encrypted); page_size (bytes, the guest's preference,
    or None for an unknown code in bits 3:0); reserved (bits 63:5, which must be 0).
    Source: Documentation/virt/kvm/x86/hypercalls.rst.
    """

    gpa: int
    size: int
    private: bool
    page_size: int | None
    reserved: int

    @property
    def valid(self):
        """Whether the range can be one: whole pages, not empty, within 64 bits, no reserved bit."""
        return self.gpa % 4096 == 0 and 0 < self.size <= (1 << 64) - self.gpa and self.reserved == 0


class DraftMemoryFault(NamedTuple):
    """A memory fault in the layout of the 2022 draft (patch v9 3/8): bit 0 of a 32-bit `flags` says private."""

    gpa: int
    size: int
    flags: int
    private: bool


cdef class Exit:
    """Why a vCPU left KVM_RUN, and with what. A value: it never changes, whatever the vCPU does afterwards.

    reason: the ExitReason; the plain number where kvmexit does not know it; None for an UnexplainedFault.
    errno: of KVM_RUN, 0 where it succeeded.
    run_flags: kvm_run.flags (1 in system management mode, 2 a bus lock was taken, 4 a nested guest was running).

    Fields that answer the exit can be set while it is pending, that is until the vCPU re-enters; later that raises
    NotPendingError.
    """

    __match_args__ = ()

    def __init__(self):
        raise TypeError(f"{type(self).__name__} objects come from Vcpu.run()")

    @property
    def reason(self):
        return _REASONS[self.code] if self.code < KNOWN else self.code

    @property
    def errno(self):
        return self.error_

    @property
    def run_flags(self):
        return self.run_flags_

    def __repr__(self):
        parts = []
        for name in self.__match_args__:
            value = getattr(self, name)
            if isinstance(value, bytes) and len(value) > PAYLOAD:
                shown = f"<{len(value)} bytes, {value[:16]!r}...>"
            elif isinstance(value, int) and not isinstance(value, bool) and value >= 10:
                shown = f"{value:#x}"
            else:
                shown = repr(value)
            parts.append(f"{name}={shown}")
        if self.error_:
            parts.append(f"errno={self.error_}")
        return f"{type(self).__name__}({', '.join(parts)})"

    cdef bint is_current(self) noexcept:
        return self.page is not None and self.seq == kvmexit_seq(&self.page.c)

    cdef int write(self, size_t offset, const void *data, size_t size, bint settles) except -1:
        """Write to kvm_run, `offset` bytes from its start. settles: this is the answer that KVM waits for. On free-threaded
        Python in a critical section on the page and this exit: so what it says it was answered with, it was."""
        cdef kvmexit_vcpu *c
        cdef bint held = False, current = self.is_current()
        if current:
            c = &self.page.c
            if c.forks[0] != c.born:
                self.page.check()  # the child must not store to the parent's page
            held = self.page.hold()
            current = self.is_current()
            if current:
                # SAFETY: callers give offsets inside the union, or the PIO area that is_well_formed_io() checked against
                # run_size.
                memcpy(<uint8_t *>c.run + offset, data, size)
                if settles:
                    c.answered = True
                    if held:
                        kvmexit_settle(c.stats, KVMEXIT_CALLER)
                        c.unsettled = False  # answered by hand after its handler raised, or where a C run left it to Python
            if held:
                kvmexit_disown(c)
        if not current:
            raise NotPendingError(f"{self!r} is no longer pending: the vCPU has been re-entered since")
        return 0


# ---- fields of the payload ----

cdef kvm_run _layout  # for offsets only
cdef size_t UNION = <char *>&_layout.hw - <char *>&_layout


cdef class Field:
    """A field of an exit: an unsigned integer, or a tuple of them.

    `at` is its offset in the payload, `only` the value of the payload's leading `type` under which it exists (-1: always).
    """

    cdef size_t at, size, count
    cdef int only
    cdef bint boolean
    cdef object owner

    def __get__(self, instance, owner):
        cdef Exit e
        if instance is None:
            return self
        e = self.of(instance)
        if self.only >= 0 and (<uint32_t *>e.payload)[0] != <uint32_t>self.only:
            return None
        if self.boolean:
            return self.number(e, 0) != 0
        if self.count == 1:
            return self.number(e, 0)  # one load, if somebody answers on another thread
        with cython.critical_section(e):
            return tuple([self.number(e, i) for i in range(self.count)])

    def __set__(self, instance, value):
        raise AttributeError(f"{type(instance).__name__} has no such answer: this field is what the guest did")

    cdef Exit of(self, instance):
        """The exit, which must be of the field's own class: another's payload means something else."""
        if type(instance) is not self.owner:
            raise TypeError(f"a field of {self.owner.__name__}, not of {type(instance).__name__}")
        return <Exit>instance

    cdef uint64_t number(self, Exit e, size_t i) noexcept:
        cdef uint64_t value = 0
        memcpy(&value, <uint8_t *>e.payload + self.at + i * self.size, self.size)
        return value


@cython.final
cdef class Answer(Field):
    """A field that userspace fills in. `settles`: it is the one that KVM waits for; others go with it."""

    cdef tuple allowed
    cdef bint settles

    def __set__(self, instance, value):
        cdef Exit e = self.of(instance)
        cdef uint64_t numbers[32]
        cdef size_t i
        if self.only >= 0 and (<uint32_t *>e.payload)[0] != <uint32_t>self.only:
            raise AttributeError(f"{e!r} does not ask for this answer")
        # All conversions first, so that a bad value changes nothing.
        if self.count == 1:
            numbers[0] = self.to_allowed(value)
        else:
            values = tuple(value)
            if <size_t>len(values) != self.count:
                raise ValueError(f"{self.count} numbers expected, not {len(values)}")
            for i in range(self.count):
                numbers[i] = self.to_allowed(values[i])
        with cython.critical_section(e.page, e):
            for i in range(self.count):
                e.write(UNION + self.at + i * self.size, &numbers[i], self.size, self.settles)
                memcpy(<uint8_t *>e.payload + self.at + i * self.size, &numbers[i], self.size)

    cdef uint64_t to_allowed(self, value) except? 0:
        cdef uint64_t number = to_number(value, self.size)
        if self.allowed is not None and number not in self.allowed:
            raise ValueError(f"{value!r} is none of {self.allowed}, all that KVM takes here")
        return number


cdef uint64_t to_number(value, size_t size) except? 0:
    """An answer of up to 8 bytes. TypeError for what is no integer, ValueError for what does not fit."""
    cdef uint64_t number
    if isinstance(value, bool):
        raise TypeError("a bool is no data: return an int, bytes, or None for a write")
    integer = value if type(value) is int else index(value)
    number = PyLong_AsUnsignedLongLong(integer)
    if number == UINT64_MAX and PyErr_Occurred() != NULL:
        PyErr_Clear()  # it is negative, or has more than 64 bits
    elif size == 8 or not number >> (8 * size):
        return number
    raise ValueError(f"{integer:#x} does not fit {size} unsigned byte{'s' if size > 1 else ''}")


cdef Field _place(Field field, void *member, size_t size, size_t count, int only):
    field.at = <char *>member - <char *>&_layout.hw
    field.size = size
    field.count = count
    field.only = only
    return field


cdef Field u8(uint8_t *member, size_t n=1):
    return _place(Field.__new__(Field), member, 1, n, -1)


cdef Field flag8(uint8_t *member):
    cdef Field field = u8(member)
    field.boolean = True
    return field


cdef Field u16(uint16_t *member):
    return _place(Field.__new__(Field), member, 2, 1, -1)


cdef Field u32(uint32_t *member, int only=-1):
    return _place(Field.__new__(Field), member, 4, 1, only)


cdef Field flag32(uint32_t *member):
    cdef Field field = u32(member)
    field.boolean = True
    return field


cdef Field u64(uint64_t *member, size_t n=1, int only=-1):
    return _place(Field.__new__(Field), member, 8, n, only)


cdef Field ulong(unsigned long *member, size_t n=1):
    return _place(Field.__new__(Field), member, sizeof(unsigned long), n, -1)


cdef Answer _answer(void *member, size_t size, size_t n=1, int only=-1):
    cdef Answer field = <Answer>_place(Answer.__new__(Answer), member, size, n, only)
    field.settles = True
    return field


cdef Answer answer8(uint8_t *member):
    return _answer(member, 1)


cdef Answer answer32(uint32_t *member):
    return _answer(member, 4)


cdef Answer answer64(uint64_t *member, int only=-1, tuple allowed=None, size_t n=1):
    cdef Answer field = _answer(member, 8, n, only)
    field.allowed = allowed
    return field


cdef Answer beside64(uint64_t *member, int only=-1):
    cdef Answer field = answer64(member, only)
    field.settles = False
    return field


# ---- exits of x86 guests ----

@cython.final
cdef class Io(Exit):
    """Port I/O. `count` > 1 is one string instruction (rep insb and kin): `data` is then size * count bytes.

    port, size (bytes a unit: 1, 2, 4), count (units), is_write (OUT).
    data: the bytes written; of a read None until answered, and settable: bytes, or an int when count is 1.
    Source: struct kvm_run, member io.
    """

    __match_args__ = ("port", "size", "count", "is_write", "data")
    port = u16(&_layout.io.port)
    size = u8(&_layout.io.size)
    count = u32(&_layout.io.count)
    is_write = flag8(&_layout.io.direction)

    @property
    def data(self):
        cdef kvm_run *run = as_run(self)
        with cython.critical_section(self):
            if not (run.io.direction or self.answered):
                return None
            if self.long_data is not None:
                return self.long_data
            return PyBytes_FromStringAndSize(<char *>self.inline_data, <Py_ssize_t>run.io.size * run.io.count)

    @data.setter
    def data(self, value):
        answer_data(self, value)


@cython.final
cdef class Mmio(Exit):
    """An access KVM could not serve from memory. More than 8 bytes, or two pages, come as several exits of one instruction.

    gpa, size (1 to 8 bytes), is_write.
    data: the bytes written; of a read None until answered, and settable: bytes or an int.
    slot: the memslot that covers `gpa`, or None. There is one for a write to a read-only slot, and for an emulated access
    whose host page cannot be reached.
    Source: struct kvm_run, member mmio.
    """

    __match_args__ = ("gpa", "size", "is_write", "data")
    gpa = u64(&_layout.mmio.phys_addr)
    size = u32(&_layout.mmio.len)
    is_write = flag8(&_layout.mmio.is_write)

    @property
    def data(self):
        cdef kvm_run *run = as_run(self)
        with cython.critical_section(self):
            if not (run.mmio.is_write or self.answered):
                return None
            return PyBytes_FromStringAndSize(<char *>run.mmio.data, run.mmio.len)

    @data.setter
    def data(self, value):
        answer_data(self, value)

    @property
    def slot(self):
        return self.slot_

    def explain(self, vcpu):
        """Why the access did not go to the slot: -> kvmexit.faults.Explanation; as UnexplainedFault.explain()."""
        return vcpu._explain(self)


@cython.final
cdef class Hypercall(Exit):
    """A hypercall that KVM forwards (KVM_CAP_EXIT_HYPERCALL). Answer: `ret`, which becomes the guest's RAX.

    nr, args (six), flags (bit 0: the guest is in 64-bit mode), ret (0 until answered).
    Source: struct kvm_run, member hypercall; Documentation/virt/kvm/x86/hypercalls.rst.
    """

    __match_args__ = ("nr", "args", "ret")
    nr = u64(&_layout.hypercall.nr)
    args = u64(&_layout.hypercall.args[0], 6)
    ret = answer64(&_layout.hypercall.ret)
    flags = u64(&_layout.hypercall.flags)

    @property
    def map_gpa_range(self):
        """The arguments of KVM_HC_MAP_GPA_RANGE: -> MapGpaRange; None for another hypercall."""
        cdef kvm_run *run = as_run(self)
        cdef uint64_t attributes = run.hypercall.args[2]
        if run.hypercall.nr != KVM_HC_MAP_GPA_RANGE:
            return None
        return MapGpaRange(
            run.hypercall.args[0], int(run.hypercall.args[1]) << 12, bool(attributes & 1 << 4),
            {0: 1 << 12, 1: 1 << 21, 2: 1 << 30}.get(attributes & 0xf), attributes >> 5)


@cython.final
cdef class MemoryFault(Exit):
    """KVM has a memslot for the address and cannot map it: convert or repair the range, and re-enter.

    gpa, size (bytes; always the host's page size so far), flags (raw, unknown bits kept), private (the guest wants it
    private), errno (EFAULT, or EHWPOISON for a poisoned page).
    Source: struct kvm_run, member memory_fault; Documentation/virt/kvm/api.rst, KVM_EXIT_MEMORY_FAULT.
    """

    __match_args__ = ("gpa", "size", "private", "flags")
    gpa = u64(&_layout.memory_fault.gpa)
    size = u64(&_layout.memory_fault.size)
    flags = u64(&_layout.memory_fault.flags)

    @property
    def private(self):
        return (as_run(self).memory_fault.flags & KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0

    def decode_draft(self):
        """The same payload as the 2022 draft laid it out: -> DraftMemoryFault(gpa, size, flags, private)."""
        cdef kvm_run *run = as_run(self)
        cdef uint32_t flags = <uint32_t>run.memory_fault.flags
        return DraftMemoryFault(run.memory_fault.gpa, run.memory_fault.size, flags, bool(flags & 1))

    def explain(self, vcpu):
        """Why KVM cannot map the page: -> kvmexit.faults.Explanation; as UnexplainedFault.explain()."""
        return vcpu._explain(self)


@cython.final
cdef class UnexplainedFault(Exit):
    """KVM_RUN failed with EFAULT and said no more: a page of an ordinary memslot cannot be reached.

    rip: where the guest was, or None where registers are hidden (protected guests). The vCPU is intact: repair the
    mapping and re-enter. Source: arch/x86/kvm/mmu/mmu.c, kvm_handle_error_pfn.
    """

    __match_args__ = ("rip",)

    @property
    def reason(self):
        return None

    @property
    def rip(self):
        return self.rip_

    def explain(self, vcpu):
        """Which page it is, and what to do about it: -> kvmexit.faults.Explanation, as kvmexit.faults.explain(vcpu).

        vcpu: the one that it is from, which has not been entered since; NotPendingError otherwise.
        """
        return vcpu._explain(self)


@cython.final
cdef class Hlt(Exit):
    """The guest executed HLT and no in-kernel interrupt controller waits for it."""


@cython.final
cdef class Shutdown(Exit):
    """Triple fault. On AMD the vCPU has been reset since (INIT); re-entered it may spin until kicked."""


@cython.final
cdef class InternalError(Exit):
    """KVM gave up. suberror: 1 emulation, 2 simultaneous exceptions, 3 delivery, 4 unexpected exit.

    data: what KVM added, up to 16 numbers. insn_bytes: the instruction it could not emulate, or None.
    Source: struct kvm_run, members internal and emulation_failure.
    """

    __match_args__ = ("suberror", "data", "insn_bytes")
    suberror = u32(&_layout.internal.suberror)

    @property
    def data(self):
        cdef kvm_run *run = as_run(self)
        return tuple([run.internal.data[i] for i in range(min(run.internal.ndata, <uint32_t>16))])

    @property
    def insn_bytes(self):
        cdef kvm_run *run = as_run(self)
        if run.internal.suberror != KVM_INTERNAL_ERROR_EMULATION or run.internal.ndata < 3:
            return None
        if not run.emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            return None
        return PyBytes_FromStringAndSize(
            <char *>run.emulation_failure.insn_bytes, min(run.emulation_failure.insn_size, <uint8_t>15))


@cython.final
cdef class FailEntry(Exit):
    """The processor refused the guest's state. hardware_entry_failure_reason: its own code; cpu: the host's."""

    __match_args__ = ("hardware_entry_failure_reason", "cpu")
    hardware_entry_failure_reason = u64(&_layout.fail_entry.hardware_entry_failure_reason)
    cpu = u32(&_layout.fail_entry.cpu)


@cython.final
cdef class SystemEvent(Exit):
    """type: 1 shutdown, 2 reset, 3 crash, 4 wake-up, 5 suspend, 6 SEV termination, 7 TDX fatal. data: up to 16 numbers."""

    __match_args__ = ("type", "data")
    type = u32(&_layout.system_event.type)

    @property
    def data(self):
        cdef kvm_run *run = as_run(self)
        return tuple([run.system_event.data[i] for i in range(min(run.system_event.ndata, <uint32_t>16))])


@cython.final
cdef class Debug(Exit):
    """A breakpoint or single step asked for by KVM_SET_GUEST_DEBUG. exception: the vector; pc, dr6, dr7."""

    __match_args__ = ("exception", "pc", "dr6", "dr7")
    exception = u32(&_layout.debug.arch.exception)
    pc = u64(&_layout.debug.arch.pc)
    dr6 = u64(&_layout.debug.arch.dr6)
    dr7 = u64(&_layout.debug.arch.dr7)


@cython.final
cdef class Rdmsr(Exit):
    """The guest reads an MSR that userspace asked for. Answer: `data`, or `error` = 1 for #GP.

    index; why: as MsrExitReason, 1 invalid, 2 unknown, 4 filtered. Source: struct kvm_run, member msr.
    """

    __match_args__ = ("index", "why", "data", "error")
    index = u32(&_layout.msr.index)
    why = u32(&_layout.msr.reason)
    data = answer64(&_layout.msr.data)
    error = answer8(&_layout.msr.error)


@cython.final
cdef class Wrmsr(Exit):
    """The guest writes `data` to an MSR that userspace asked for; `error` = 1 answers with #GP. index, why: as Rdmsr."""

    __match_args__ = ("index", "why", "data", "error")
    index = u32(&_layout.msr.index)
    why = u32(&_layout.msr.reason)
    data = u64(&_layout.msr.data)
    error = answer8(&_layout.msr.error)


@cython.final
cdef class IrqWindowOpen(Exit):
    """An interrupt can be injected now (asked for by request_irq_window())."""


@cython.final
cdef class IoapicEoi(Exit):
    """End of interrupt for the userspace IOAPIC. vector."""

    __match_args__ = ("vector",)
    vector = u8(&_layout.eoi.vector)


@cython.final
cdef class SetTpr(Exit):
    """The guest wrote the task priority register. cr8: the new value."""

    __match_args__ = ("cr8",)

    @property
    def cr8(self):
        return self.cr8_


@cython.final
cdef class TprAccess(Exit):
    """A TPR access to patch. rip, is_write."""

    __match_args__ = ("rip", "is_write")
    rip = u64(&_layout.tpr_access.rip)
    is_write = flag32(&_layout.tpr_access.is_write)


@cython.final
cdef class DirtyRingFull(Exit):
    """The dirty ring is full: harvest it and KVM_RESET_DIRTY_RINGS, or this exit repeats."""


@cython.final
cdef class BusLock(Exit):
    """The guest took a bus lock."""


@cython.final
cdef class Notify(Exit):
    """The guest ran for a whole notify window without an event. context_invalid: do not resume it. flags: raw."""

    __match_args__ = ("context_invalid", "flags")
    flags = u32(&_layout.notify.flags)

    @property
    def context_invalid(self):
        return (as_run(self).notify.flags & 1) != 0


@cython.final
cdef class Hyperv(Exit):
    """A Hyper-V enlightenment. type: 1 synic, 2 hypercall, 3 synthetic debugger; a field of another type is None.

    synic: msr, control, evt_page, msg_page. Hypercall: input, params, answer `result`.
    Debugger: msr, control, send_page, recv_page, answers `status` and `pending_page`.
    Source: struct kvm_hyperv_exit.
    """

    __match_args__ = ("type", "msr", "input", "params", "result")
    type = u32(&_layout.hyperv.type)
    evt_page = u64(&_layout.hyperv.u.synic.evt_page, 1, KVM_EXIT_HYPERV_SYNIC)
    msg_page = u64(&_layout.hyperv.u.synic.msg_page, 1, KVM_EXIT_HYPERV_SYNIC)
    input = u64(&_layout.hyperv.u.hcall.input, 1, KVM_EXIT_HYPERV_HCALL)
    result = answer64(&_layout.hyperv.u.hcall.result, KVM_EXIT_HYPERV_HCALL)
    params = u64(&_layout.hyperv.u.hcall.params[0], 2, KVM_EXIT_HYPERV_HCALL)
    status = answer64(&_layout.hyperv.u.syndbg.status, KVM_EXIT_HYPERV_SYNDBG)
    send_page = u64(&_layout.hyperv.u.syndbg.send_page, 1, KVM_EXIT_HYPERV_SYNDBG)
    recv_page = u64(&_layout.hyperv.u.syndbg.recv_page, 1, KVM_EXIT_HYPERV_SYNDBG)
    pending_page = beside64(&_layout.hyperv.u.syndbg.pending_page, KVM_EXIT_HYPERV_SYNDBG)

    @property
    def msr(self):
        cdef kvm_run *run = as_run(self)  # at the same place for both
        return run.hyperv.u.synic.msr if run.hyperv.type in (KVM_EXIT_HYPERV_SYNIC, KVM_EXIT_HYPERV_SYNDBG) else None

    @property
    def control(self):
        cdef kvm_run *run = as_run(self)
        return run.hyperv.u.synic.control if run.hyperv.type in (KVM_EXIT_HYPERV_SYNIC, KVM_EXIT_HYPERV_SYNDBG) else None


@cython.final
cdef class Xen(Exit):
    """A Xen hypercall. type, longmode, cpl, input (its number), params (six), answer `result`."""

    __match_args__ = ("type", "input", "params", "result")
    type = u32(&_layout.xen.type)
    longmode = u32(&_layout.xen.u.hcall.longmode)
    cpl = u32(&_layout.xen.u.hcall.cpl)
    input = u64(&_layout.xen.u.hcall.input)
    result = answer64(&_layout.xen.u.hcall.result)
    params = u64(&_layout.xen.u.hcall.params[0], 6)


@cython.final
cdef class Tdx(Exit):
    """A TDVMCALL for userspace. flags, nr, data (the five numbers after `ret`), answers `ret` and `r11` to `r14`.

    leaf, gpa and vector name data[0] as GET_TD_VM_CALL_INFO, GET_QUOTE and SETUP_EVENT_NOTIFY_INTERRUPT do; size is data[1].
    """

    __match_args__ = ("nr", "flags", "data", "ret")
    flags = u64(&_layout.tdx.flags)
    nr = u64(&_layout.tdx.nr)
    ret = answer64(&_layout.tdx.unknown.ret)
    data = u64(&_layout.tdx.unknown.data[0], 5)
    leaf = u64(&_layout.tdx.get_tdvmcall_info.leaf)
    gpa = u64(&_layout.tdx.get_quote.gpa)
    size = u64(&_layout.tdx.get_quote.size)
    vector = u64(&_layout.tdx.setup_event_notify.vector)
    r11 = beside64(&_layout.tdx.get_tdvmcall_info.r11)
    r12 = beside64(&_layout.tdx.get_tdvmcall_info.r12)
    r13 = beside64(&_layout.tdx.get_tdvmcall_info.r13)
    r14 = beside64(&_layout.tdx.get_tdvmcall_info.r14)


@cython.final
cdef class SnpReqCerts(Exit):
    """An SNP guest wants certificates at `gpa`. Answers: `npages` (room needed) and `ret`: 0, ENOSPC, EAGAIN or EIO."""

    __match_args__ = ("gpa", "npages", "ret")
    gpa = u64(&_layout.snp_req_certs.gpa)
    npages = beside64(&_layout.snp_req_certs.npages)
    ret = answer64(&_layout.snp_req_certs.ret, -1, (0, 28, 11, 5))


@cython.final
cdef class HardwareExit(Exit):
    """KVM_EXIT_UNKNOWN: the processor left the guest for a reason KVM does not know."""

    __match_args__ = ("hardware_exit_reason",)
    hardware_exit_reason = u64(&_layout.hw.hardware_exit_reason)


@cython.final
cdef class GuestException(Exit):
    """KVM_EXIT_EXCEPTION (historical). exception, error_code."""

    __match_args__ = ("exception", "error_code")
    exception = u32(&_layout.ex.exception)
    error_code = u32(&_layout.ex.error_code)


@cython.final
cdef class Intr(Exit):
    """KVM_EXIT_INTR with success; KVM reports it with EINTR, which is `Interrupted`."""


@cython.final
cdef class Nmi(Exit):
    """A host NMI."""


@cython.final
cdef class Watchdog(Exit):
    """The guest's watchdog expired."""


@cython.final
cdef class ApResetHold(Exit):
    """An SEV-ES application processor waits for its start-up."""


# ---- exits of other architectures: fields as in struct kvm_run ----

@cython.final
cdef class S390Sieic(Exit):
    """s390 SIE intercept."""

    __match_args__ = ("icptcode", "ipa", "ipb")
    icptcode = u8(&_layout.s390_sieic.icptcode)
    ipa = u16(&_layout.s390_sieic.ipa)
    ipb = u32(&_layout.s390_sieic.ipb)


@cython.final
cdef class S390Reset(Exit):
    """s390 reset."""

    __match_args__ = ("reset_flags",)
    reset_flags = u64(&_layout.s390_reset_flags)


@cython.final
cdef class S390Ucontrol(Exit):
    """s390 user-controlled VM: a translation exception."""

    __match_args__ = ("trans_exc_code", "pgm_code")
    trans_exc_code = u64(&_layout.s390_ucontrol.trans_exc_code)
    pgm_code = u32(&_layout.s390_ucontrol.pgm_code)


@cython.final
cdef class S390Tsch(Exit):
    """s390 TEST SUBCHANNEL."""

    __match_args__ = ("subchannel_id", "subchannel_nr", "io_int_parm", "io_int_word", "ipb", "dequeued")
    subchannel_id = u16(&_layout.s390_tsch.subchannel_id)
    subchannel_nr = u16(&_layout.s390_tsch.subchannel_nr)
    io_int_parm = u32(&_layout.s390_tsch.io_int_parm)
    io_int_word = u32(&_layout.s390_tsch.io_int_word)
    ipb = u32(&_layout.s390_tsch.ipb)
    dequeued = u8(&_layout.s390_tsch.dequeued)


@cython.final
cdef class S390Stsi(Exit):
    """s390 STORE SYSTEM INFORMATION."""

    __match_args__ = ("addr", "ar", "fc", "sel1", "sel2")
    addr = u64(&_layout.s390_stsi.addr)
    ar = u8(&_layout.s390_stsi.ar)
    fc = u8(&_layout.s390_stsi.fc)
    sel1 = u8(&_layout.s390_stsi.sel1)
    sel2 = u16(&_layout.s390_stsi.sel2)


@cython.final
cdef class Dcr(Exit):
    """PowerPC device control register. Answer of a read: `data`."""

    __match_args__ = ("dcrn", "data", "is_write")
    dcrn = u32(&_layout.dcr.dcrn)
    data = answer32(&_layout.dcr.data)
    is_write = flag8(&_layout.dcr.is_write)


@cython.final
cdef class Osi(Exit):
    """PowerPC MacOnLinux interface. Answer: `gprs` (32)."""

    __match_args__ = ("gprs",)
    gprs = answer64(&_layout.osi.gprs[0], -1, None, 32)


@cython.final
cdef class PaprHcall(Exit):
    """PowerPC PAPR hypercall. nr, args (nine), answer `ret`."""

    __match_args__ = ("nr", "args", "ret")
    nr = u64(&_layout.papr_hcall.nr)
    ret = answer64(&_layout.papr_hcall.ret)
    args = u64(&_layout.papr_hcall.args[0], 9)


@cython.final
cdef class Epr(Exit):
    """PowerPC external proxy. Answer: `epr`."""

    __match_args__ = ("epr",)
    epr = answer32(&_layout.epr.epr)


@cython.final
cdef class ArmNisv(Exit):
    """arm64: a data abort without a syndrome. esr_iss, fault_ipa."""

    __match_args__ = ("esr_iss", "fault_ipa")
    esr_iss = u64(&_layout.arm_nisv.esr_iss)
    fault_ipa = u64(&_layout.arm_nisv.fault_ipa)


@cython.final
cdef class ArmLdst64b(Exit):
    """arm64: a 64-byte load or store to a hole. esr_iss, fault_ipa."""

    __match_args__ = ("esr_iss", "fault_ipa")
    esr_iss = u64(&_layout.arm_nisv.esr_iss)
    fault_ipa = u64(&_layout.arm_nisv.fault_ipa)


@cython.final
cdef class ArmSea(Exit):
    """arm64: a synchronous external abort. flags (bit 0: gpa is valid), esr, gva, gpa."""

    __match_args__ = ("flags", "esr", "gva", "gpa")
    flags = u64(&_layout.arm_sea.flags)
    esr = u64(&_layout.arm_sea.esr)
    gva = u64(&_layout.arm_sea.gva)
    gpa = u64(&_layout.arm_sea.gpa)


@cython.final
cdef class RiscvSbi(Exit):
    """RISC-V SBI call. extension_id, function_id, args (six), answer `ret` (two)."""

    __match_args__ = ("extension_id", "function_id", "args", "ret")
    extension_id = ulong(&_layout.riscv_sbi.extension_id)
    function_id = ulong(&_layout.riscv_sbi.function_id)
    args = ulong(&_layout.riscv_sbi.args[0], 6)
    ret = answer64(<uint64_t *>&_layout.riscv_sbi.ret[0], -1, None, 2)


@cython.final
cdef class RiscvCsr(Exit):
    """RISC-V control and status register. csr_num, new_value, write_mask, answer `ret_value`."""

    __match_args__ = ("csr_num", "new_value", "write_mask", "ret_value")
    csr_num = ulong(&_layout.riscv_csr.csr_num)
    new_value = ulong(&_layout.riscv_csr.new_value)
    write_mask = ulong(&_layout.riscv_csr.write_mask)
    ret_value = answer64(<uint64_t *>&_layout.riscv_csr.ret_value)


@cython.final
cdef class LoongarchIocsr(Exit):
    """LoongArch IOCSR access. gpa, size, is_write, data (eight bytes)."""

    __match_args__ = ("gpa", "size", "is_write", "data")
    gpa = u64(&_layout.iocsr_io.phys_addr)
    size = u32(&_layout.iocsr_io.len)
    is_write = flag8(&_layout.iocsr_io.is_write)

    @property
    def data(self):
        return PyBytes_FromStringAndSize(<char *>as_run(self).iocsr_io.data, 8)


# ---- and what is no exit of KVM's, or none we know ----

@cython.final
cdef class Interrupted(Exit):
    """run() came back because it was told to. cause: "kick" or "timeout"."""

    __match_args__ = ("cause",)

    @property
    def cause(self):
        return self.cause_


@cython.final
cdef class UnknownExit(Exit):
    """A reason kvmexit does not know, or a payload that contradicts itself. raw: the 256 bytes of kvm_run's union."""

    __match_args__ = ("reason", "raw")

    @property
    def raw(self):
        return PyBytes_FromStringAndSize(<char *>self.payload, PAYLOAD)


# ---- kvm_run to Exit ----

# By place: the reasons in their order, then UNEXPLAINED and UNKNOWN.
CLASSES = [
    HardwareExit, GuestException, Io, Hypercall, Debug, Hlt, Mmio, IrqWindowOpen, Shutdown, FailEntry, Intr, SetTpr,
    TprAccess, S390Sieic, S390Reset, Dcr, Nmi, InternalError, Osi, PaprHcall, S390Ucontrol, Watchdog, S390Tsch, Epr,
    SystemEvent, S390Stsi, IoapicEoi, Hyperv, ArmNisv, Rdmsr, Wrmsr, DirtyRingFull, ApResetHold, BusLock, Xen, RiscvSbi,
    RiscvCsr, Notify, LoongarchIocsr, MemoryFault, Tdx, ArmSea, ArmLdst64b, SnpReqCerts, UnexplainedFault, UnknownExit,
]


for _class in CLASSES:
    for _field in vars(_class).values():
        if isinstance(_field, Field):
            (<Field>_field).owner = _class


cdef kvm_run *as_run(Exit e) noexcept:
    """The payload seen through struct kvm_run. SAFETY: for the union's members only; what precedes it is not there."""
    return <kvm_run *>(<uint8_t *>e.payload - UNION)


cdef enum:
    SHORT = 72  # bytes of the union that the frequent exits use; a constant, so that copying them is a few instructions


@cython.nonecheck(False)
cdef Exit make(list cache, Page page, bint *fresh):
    """The Exit for what the burst left in `page`. `cache` holds the last one of each place:
    an object that nobody else refers to is filled anew instead of allocated."""
    cdef kvmexit_vcpu *c = &page.c
    cdef Exit e
    cdef PyObject *kept
    cdef uint32_t place = c.place
    kept = PyList_GetItem(cache, place)
    if kept != <PyObject *>None and (<Exit>kept).seq == c.seq:
        return <Exit>kept  # offered again
    if kept != <PyObject *>None and Py_REFCNT(kept) == 1 and not SHARED_OWNERSHIP:
        e = <Exit>kept
    else:
        cls = CLASSES[place]
        e = <Exit>cls.__new__(cls)
        e.page = page
        e.place = place
        cache[place] = e
    fresh[0] = True
    e.code = c.reason
    e.error_ = c.error
    e.run_flags_ = c.run.flags
    if place in (KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_HYPERCALL, KVM_EXIT_MEMORY_FAULT):
        memcpy(e.payload, &c.run.hw, SHORT)
    else:
        memcpy(e.payload, &c.run.hw, PAYLOAD)
    if place == KVM_EXIT_IO:
        fill_io(<Io>e, c)
    elif place == KVM_EXIT_MMIO:
        (<Mmio>e).answered = False
    elif place == KVM_EXIT_HYPERCALL:
        as_run(e).hypercall.ret = 0  # stale bytes in 6.12
    elif place == KVM_EXIT_SET_TPR:
        (<SetTpr>e).cr8_ = c.run.cr8
    e.seq = c.seq  # last: had anything above failed, this would not be the exit in hand
    return e


@cython.nonecheck(False)
cdef int fill_io(Io e, kvmexit_vcpu *c) except -1:
    cdef kvm_run *run = as_run(e)
    cdef char *data
    cdef size_t n
    e.answered = False
    if e.long_data is not None:
        e.long_data = None
    if run.io.direction:
        # SAFETY: is_well_formed_io() has checked the offset and the length against the mapping.
        data = <char *>c.run + run.io.data_offset
        n = <size_t>run.io.size * run.io.count
        if n <= INLINE_DATA and run.io.data_offset + INLINE_DATA <= c.run_size:
            memcpy(e.inline_data, data, INLINE_DATA)  # a constant: two moves instead of a call
        elif n <= INLINE_DATA:
            memcpy(e.inline_data, data, n)
        else:
            e.long_data = PyBytes_FromStringAndSize(data, n)
    return 0


cdef Interrupted make_interrupted(Page page, str cause):
    cdef Interrupted e = Interrupted.__new__(Interrupted)
    e.page = page
    e.seq = page.c.seq
    e.code = KVM_EXIT_INTR
    e.error_ = page.c.error
    e.cause_ = cause
    return e


# ---- answers ----

cdef int answer_data(Exit e, value) except -1:
    """Answer an I/O or MMIO read with bytes, or an int where there is one unit."""
    cdef kvm_run *run = as_run(e)
    cdef Io io
    cdef size_t size, count, offset
    cdef bytes data = None
    cdef uint64_t number
    cdef const char *source
    if run_is_write(e):
        raise AttributeError(f"{e!r} is a write: there is nothing to answer")
    if e.place == KVM_EXIT_IO:
        size, count, offset = run.io.size, run.io.count, run.io.data_offset
    else:
        size, count, offset = run.mmio.len, 1, <char *>&_layout.mmio.data - <char *>&_layout
    if not isinstance(value, int) and isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        if <size_t>len(data) != size * count:
            raise ValueError(f"{e!r} takes {size * count} bytes, not {len(data)}")
        source = <const char *>data
    elif count > 1:
        raise TypeError(f"{e!r} takes bytes ({size} * {count}), not {type(value).__name__}")
    else:
        number = to_number(value, size)
        source = <const char *>&number
    with cython.critical_section(e.page, e):
        e.write(offset, source, size * count, True)
        if e.place == KVM_EXIT_IO:
            io = <Io>e
            io.answered = True
            if size * count > INLINE_DATA:
                io.long_data = data
            else:
                memcpy(io.inline_data, source, size * count)
        else:
            (<Mmio>e).answered = True
            memcpy(run.mmio.data, source, size)
    return 0


cdef bint run_is_write(Exit e) noexcept:
    return as_run(e).io.direction != 0 if e.place == KVM_EXIT_IO else as_run(e).mmio.is_write != 0


cdef int answer(Exit e, value) except -1:
    """What a handler returned for an exit: write it where KVM looks for it, or say why it cannot be an answer."""
    if not isinstance(value, (int, bytes)):
        if isinstance(value, (types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType)):
            if isinstance(value, types.CoroutineType):
                value.close()  # or the interpreter prints that it was never awaited
            raise TypeError(f"a handler answered with a {type(value).__name__}: handlers are plain functions")
    elif isinstance(value, bool):
        raise TypeError(f"a handler returned {value}: return None (done), data for a read, PASS or STOP")
    if e.place == KVM_EXIT_IO or e.place == KVM_EXIT_MMIO:
        if run_is_write(e):
            raise TypeError(f"a handler returned {type(value).__name__} for a write, {e!r}: return None")
        answer_data(e, value)
    elif isinstance(e, (Hypercall, Tdx, SnpReqCerts, PaprHcall)):
        e.ret = value
    elif isinstance(e, Rdmsr):
        e.data = value
    elif isinstance(e, Xen):
        e.result = value
    elif isinstance(e, Hyperv) and e.type == KVM_EXIT_HYPERV_HCALL:
        e.result = value
    elif isinstance(e, Hyperv) and e.type == KVM_EXIT_HYPERV_SYNDBG:
        e.status = value
    else:
        raise TypeError(f"a handler returned {type(value).__name__} for {e!r}, which asks for nothing: return None")
    return 0
