"""Register views: `vcpu.regs`, `vcpu.sregs`, `vcpu.events`.

One descriptor, `Register`, knows an offset into struct kvm_sync_regs and a size; the classes below are lists of them, under
the kernel's names (arch/x86/include/uapi/asm/kvm.h: kvm_regs, kvm_sregs, kvm_vcpu_events).
"""

from operator import index

cimport cython
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy, memset

from kvmexit._page cimport EVENTS, REGS, SREGS, Page, kvmexit_disown
from kvmexit._uapi cimport kvm_dtable, kvm_segment, kvm_sync_regs


cdef kvm_sync_regs _layout  # for offsets only
cdef kvm_segment _segment
cdef kvm_dtable _table


cdef class RegisterView:
    """Registers of one vCPU. Attributes are unsigned integers; reads give what KVM last left, writes reach KVM before
    the next entry.

    A value written while an exit is pending is kept aside and applied after KVM has completed the exit, register by
    register: written before, it would destroy an emulated read's answer. Reading it back gives the value written.

    Raises VcpuBusyError while another thread runs the vCPU, ValueError for a value that does not fit, KvmError where KVM
    refuses to read (protected guests) or, from run(), to set.
    """

    def __init__(self):
        raise TypeError("use vcpu.regs, vcpu.sregs or vcpu.events")

    def __repr__(self):
        fields = []
        for name, register in vars(type(self)).items():
            if isinstance(register, Register):
                fields.append(f"{name}={getattr(self, name):#x}")
            elif isinstance(register, Part):
                fields.append(f"{name}={getattr(self, name)!r}")
        return f"{type(self).__name__}({', '.join(fields)})"


cdef RegisterView _checked(instance, owner):
    """The view, which must be of the descriptor's own class: offsets are relative to it."""
    if type(instance) is not owner:
        raise TypeError(f"a register of {owner.__name__}, not of {type(instance).__name__}")
    return <RegisterView>instance


@cython.final
cdef class Register:
    """A register: `size` bytes at `offset` in its view."""

    cdef size_t offset, size
    cdef object owner

    def __get__(self, instance, owner):
        cdef RegisterView view
        cdef Page page
        cdef uint8_t value[32]
        cdef size_t i, at
        cdef bint held
        if instance is None:
            return self
        view = _checked(instance, self.owner)
        page = view.page
        at = view.start + self.offset
        page.check_mine()
        with cython.critical_section(page):
            held = page.hold_current(view.which)
            for i in range(self.size):
                value[i] = page.c.value[at + i] if page.c.mask[at + i] else (<uint8_t *>&page.c.run.s.regs)[at + i]
            if held:
                kvmexit_disown(&page.c)
        return int.from_bytes(value[:self.size], "little")

    def __set__(self, instance, value):
        cdef RegisterView view = _checked(instance, self.owner)
        cdef Page page = view.page
        cdef bytes data
        cdef bint held
        page.check_mine()
        try:
            data = index(value).to_bytes(self.size, "little")
        except OverflowError:
            raise ValueError(f"{value:#x} does not fit an unsigned register of {8 * self.size} bits") from None
        with cython.critical_section(page):
            held = page.hold()
            memcpy(page.c.value + view.start + self.offset, <const char *>data, self.size)
            memset(page.c.mask + view.start + self.offset, 1, self.size)
            page.c.written |= view.which
            if held:
                kvmexit_disown(&page.c)


@cython.final
cdef class Part:
    """A group of registers in a view: another view, `offset` bytes on."""

    cdef size_t offset
    cdef type view
    cdef object owner

    def __get__(self, instance, owner):
        if instance is None:
            return self
        cdef RegisterView outer = _checked(instance, self.owner)
        return view(self.view, outer.page, outer.which, outer.start + self.offset)

    def __set__(self, instance, value):
        """Copy another view of the same class: `sregs.ds = sregs.es`."""
        if type(value) is not self.view:
            raise TypeError(f"a {self.view.__name__} can be set from a {self.view.__name__}, not {type(value).__name__}")
        mine = self.__get__(instance, None)
        for name, register in vars(self.view).items():
            if isinstance(register, Register):
                setattr(mine, name, getattr(value, name))


cdef RegisterView view(type cls, Page page, int which, size_t start):
    cdef RegisterView made = cls.__new__(cls)
    made.page = page
    made.which = which
    made.start = start
    return made


cdef RegisterView regs_of(Page page):
    return view(Regs, page, REGS, <char *>&_layout.regs - <char *>&_layout)


cdef RegisterView sregs_of(Page page):
    return view(Sregs, page, SREGS, <char *>&_layout.sregs - <char *>&_layout)


cdef RegisterView events_of(Page page):
    return view(Events, page, EVENTS, <char *>&_layout.events - <char *>&_layout)


cdef Register _register(void *base, void *member, size_t size):
    cdef Register made = Register.__new__(Register)
    made.offset = <char *>member - <char *>base
    made.size = size
    return made


cdef Part _part(void *base, void *member, type cls):
    cdef Part made = Part.__new__(Part)
    made.offset = <char *>member - <char *>base
    made.view = cls
    return made


cdef Register _reg(uint64_t *member):
    return _register(&_layout.regs, member, 8)


cdef Register _sreg(uint64_t *member, size_t n=1):
    return _register(&_layout.sregs, member, 8 * n)


cdef Register _event(void *member, size_t size=1):
    return _register(&_layout.events, member, size)


@cython.final
cdef class Regs(RegisterView):
    """General registers, 64 bits each (struct kvm_regs)."""

    rax = _reg(&_layout.regs.rax)
    rbx = _reg(&_layout.regs.rbx)
    rcx = _reg(&_layout.regs.rcx)
    rdx = _reg(&_layout.regs.rdx)
    rsi = _reg(&_layout.regs.rsi)
    rdi = _reg(&_layout.regs.rdi)
    rsp = _reg(&_layout.regs.rsp)
    rbp = _reg(&_layout.regs.rbp)
    r8 = _reg(&_layout.regs.r8)
    r9 = _reg(&_layout.regs.r9)
    r10 = _reg(&_layout.regs.r10)
    r11 = _reg(&_layout.regs.r11)
    r12 = _reg(&_layout.regs.r12)
    r13 = _reg(&_layout.regs.r13)
    r14 = _reg(&_layout.regs.r14)
    r15 = _reg(&_layout.regs.r15)
    rip = _reg(&_layout.regs.rip)
    rflags = _reg(&_layout.regs.rflags)


@cython.final
cdef class Segment(RegisterView):
    """A segment register with its hidden part (struct kvm_segment)."""

    base = _register(&_segment, &_segment.base, 8)
    limit = _register(&_segment, &_segment.limit, 4)
    selector = _register(&_segment, &_segment.selector, 2)
    type = _register(&_segment, &_segment.type, 1)
    present = _register(&_segment, &_segment.present, 1)
    dpl = _register(&_segment, &_segment.dpl, 1)
    db = _register(&_segment, &_segment.db, 1)
    s = _register(&_segment, &_segment.s, 1)
    l = _register(&_segment, &_segment.l, 1)  # no-cython-lint
    g = _register(&_segment, &_segment.g, 1)
    avl = _register(&_segment, &_segment.avl, 1)
    unusable = _register(&_segment, &_segment.unusable, 1)


@cython.final
cdef class DescriptorTable(RegisterView):
    """GDTR or IDTR (struct kvm_dtable)."""

    base = _register(&_table, &_table.base, 8)
    limit = _register(&_table, &_table.limit, 2)


@cython.final
cdef class Sregs(RegisterView):
    """Segment, control and descriptor-table registers (struct kvm_sregs)."""

    cs = _part(&_layout.sregs, &_layout.sregs.cs, Segment)
    ds = _part(&_layout.sregs, &_layout.sregs.ds, Segment)
    es = _part(&_layout.sregs, &_layout.sregs.es, Segment)
    fs = _part(&_layout.sregs, &_layout.sregs.fs, Segment)
    gs = _part(&_layout.sregs, &_layout.sregs.gs, Segment)
    ss = _part(&_layout.sregs, &_layout.sregs.ss, Segment)
    tr = _part(&_layout.sregs, &_layout.sregs.tr, Segment)
    ldt = _part(&_layout.sregs, &_layout.sregs.ldt, Segment)
    gdt = _part(&_layout.sregs, &_layout.sregs.gdt, DescriptorTable)
    idt = _part(&_layout.sregs, &_layout.sregs.idt, DescriptorTable)
    cr0 = _sreg(&_layout.sregs.cr0)
    cr2 = _sreg(&_layout.sregs.cr2)
    cr3 = _sreg(&_layout.sregs.cr3)
    cr4 = _sreg(&_layout.sregs.cr4)
    cr8 = _sreg(&_layout.sregs.cr8)
    efer = _sreg(&_layout.sregs.efer)
    apic_base = _sreg(&_layout.sregs.apic_base)
    interrupt_bitmap = _sreg(&_layout.sregs.interrupt_bitmap[0], 4)


@cython.final
cdef class ExceptionEvent(RegisterView):
    """An exception to inject, or pending (kvm_vcpu_events.exception)."""

    injected = _register(&_layout.events.exception, &_layout.events.exception.injected, 1)
    nr = _register(&_layout.events.exception, &_layout.events.exception.nr, 1)
    has_error_code = _register(&_layout.events.exception, &_layout.events.exception.has_error_code, 1)
    pending = _register(&_layout.events.exception, &_layout.events.exception.pending, 1)
    error_code = _register(&_layout.events.exception, &_layout.events.exception.error_code, 4)


@cython.final
cdef class InterruptEvent(RegisterView):
    """An interrupt being delivered (kvm_vcpu_events.interrupt)."""

    injected = _register(&_layout.events.interrupt, &_layout.events.interrupt.injected, 1)
    nr = _register(&_layout.events.interrupt, &_layout.events.interrupt.nr, 1)
    soft = _register(&_layout.events.interrupt, &_layout.events.interrupt.soft, 1)
    shadow = _register(&_layout.events.interrupt, &_layout.events.interrupt.shadow, 1)


@cython.final
cdef class NmiEvent(RegisterView):
    """Non-maskable interrupts (kvm_vcpu_events.nmi)."""

    injected = _register(&_layout.events.nmi, &_layout.events.nmi.injected, 1)
    pending = _register(&_layout.events.nmi, &_layout.events.nmi.pending, 1)
    masked = _register(&_layout.events.nmi, &_layout.events.nmi.masked, 1)


@cython.final
cdef class SmiEvent(RegisterView):
    """System management mode (kvm_vcpu_events.smi)."""

    smm = _register(&_layout.events.smi, &_layout.events.smi.smm, 1)
    pending = _register(&_layout.events.smi, &_layout.events.smi.pending, 1)
    smm_inside_nmi = _register(&_layout.events.smi, &_layout.events.smi.smm_inside_nmi, 1)
    latched_init = _register(&_layout.events.smi, &_layout.events.smi.latched_init, 1)


@cython.final
cdef class Events(RegisterView):
    """Pending and injected events (struct kvm_vcpu_events; `flags` says which of them KVM takes on a write)."""

    exception = _part(&_layout.events, &_layout.events.exception, ExceptionEvent)
    interrupt = _part(&_layout.events, &_layout.events.interrupt, InterruptEvent)
    nmi = _part(&_layout.events, &_layout.events.nmi, NmiEvent)
    smi = _part(&_layout.events, &_layout.events.smi, SmiEvent)
    sipi_vector = _event(&_layout.events.sipi_vector, 4)
    flags = _event(&_layout.events.flags, 4)
    triple_fault_pending = _event(&_layout.events.triple_fault.pending)
    exception_has_payload = _event(&_layout.events.exception_has_payload)
    exception_payload = _event(&_layout.events.exception_payload, 8)


for _class in (Regs, Segment, DescriptorTable, Sregs, ExceptionEvent, InterruptEvent, NmiEvent, SmiEvent, Events):
    for _member in vars(_class).values():
        if isinstance(_member, Register):
            (<Register>_member).owner = _class
        elif isinstance(_member, Part):
            (<Part>_member).owner = _class
