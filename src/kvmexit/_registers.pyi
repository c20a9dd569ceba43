from typing import Generic, Never, Self, TypeVar, final, overload

from typing_extensions import disjoint_base

_V = TypeVar("_V", bound=RegisterView)

@disjoint_base
class RegisterView:
    def __init__(self, _: Never, /) -> None: ...  # a TypeError

# An attribute of a view: an int to read and to write.
@final
class Register:
    @overload
    def __get__(self, instance: None, owner: type[RegisterView], /) -> Self: ...
    @overload
    def __get__(self, instance: RegisterView, owner: type[RegisterView] | None = None, /) -> int: ...
    def __set__(self, instance: RegisterView, value: int, /) -> None: ...

# An attribute of a view that is a view itself. Generic here only.
@final
class Part(Generic[_V]):
    @overload
    def __get__(self, instance: None, owner: type[RegisterView], /) -> Self: ...
    @overload
    def __get__(self, instance: RegisterView, owner: type[RegisterView] | None = None, /) -> _V: ...
    def __set__(self, instance: RegisterView, value: _V, /) -> None: ...

@final
class Regs(RegisterView):
    rax: Register
    rbx: Register
    rcx: Register
    rdx: Register
    rsi: Register
    rdi: Register
    rsp: Register
    rbp: Register
    r8: Register
    r9: Register
    r10: Register
    r11: Register
    r12: Register
    r13: Register
    r14: Register
    r15: Register
    rip: Register
    rflags: Register

@final
class Segment(RegisterView):
    base: Register
    limit: Register
    selector: Register
    type: Register
    present: Register
    dpl: Register
    db: Register
    s: Register
    l: Register
    g: Register
    avl: Register
    unusable: Register

@final
class DescriptorTable(RegisterView):
    base: Register
    limit: Register

@final
class Sregs(RegisterView):
    cs: Part[Segment]
    ds: Part[Segment]
    es: Part[Segment]
    fs: Part[Segment]
    gs: Part[Segment]
    ss: Part[Segment]
    tr: Part[Segment]
    ldt: Part[Segment]
    gdt: Part[DescriptorTable]
    idt: Part[DescriptorTable]
    cr0: Register
    cr2: Register
    cr3: Register
    cr4: Register
    cr8: Register
    efer: Register
    apic_base: Register
    interrupt_bitmap: Register

@final
class ExceptionEvent(RegisterView):
    injected: Register
    nr: Register
    has_error_code: Register
    pending: Register
    error_code: Register

@final
class InterruptEvent(RegisterView):
    injected: Register
    nr: Register
    soft: Register
    shadow: Register

@final
class NmiEvent(RegisterView):
    injected: Register
    pending: Register
    masked: Register

@final
class SmiEvent(RegisterView):
    smm: Register
    pending: Register
    smm_inside_nmi: Register
    latched_init: Register

@final
class Events(RegisterView):
    exception: Part[ExceptionEvent]
    interrupt: Part[InterruptEvent]
    nmi: Part[NmiEvent]
    smi: Part[SmiEvent]
    sipi_vector: Register
    flags: Register
    triple_fault_pending: Register
    exception_has_payload: Register
    exception_payload: Register
