import enum
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Never, TypeAlias, final

from typing_extensions import disjoint_base

from kvmexit._loop import Vcpu
from kvmexit._memory import Slot
from kvmexit.faults import Explanation

_Data: TypeAlias = bytes | bytearray | memoryview
_Two: TypeAlias = tuple[int, int]
_Five: TypeAlias = tuple[int, int, int, int, int]
_Six: TypeAlias = tuple[int, int, int, int, int, int]
_Nine: TypeAlias = tuple[int, int, int, int, int, int, int, int, int]

CLASSES: list[type[Exit]]

class ExitReason(enum.IntEnum):
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

class MapGpaRange(NamedTuple):
    gpa: int
    size: int
    private: bool
    page_size: int | None
    reserved: int
    @property
    def valid(self) -> bool: ...

class DraftMemoryFault(NamedTuple):
    gpa: int
    size: int
    flags: int
    private: bool

@disjoint_base
class Exit:
    __match_args__ = ()
    def __init__(self, _: Never, /) -> None: ...  # a TypeError
    @property
    def reason(self) -> ExitReason | int | None: ...
    @property
    def errno(self) -> int: ...
    @property
    def run_flags(self) -> int: ...

# The descriptors behind the fields below, which are declared as the properties they act as.
@disjoint_base
class Field:
    def __get__(self, instance: Exit | None, owner: type[Exit] | None = None, /) -> Any: ...
    def __set__(self, instance: Exit, value: Any, /) -> None: ...

@final
class Answer(Field): ...

@final
class Io(Exit):
    __match_args__ = ("port", "size", "count", "is_write", "data")
    @property
    def port(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def is_write(self) -> bool: ...
    @property
    def data(self) -> bytes | None: ...
    @data.setter
    def data(self, value: int | _Data) -> None: ...

@final
class Mmio(Exit):
    __match_args__ = ("gpa", "size", "is_write", "data")
    @property
    def gpa(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_write(self) -> bool: ...
    @property
    def data(self) -> bytes | None: ...
    @data.setter
    def data(self, value: int | _Data) -> None: ...
    @property
    def slot(self) -> Slot | None: ...
    def explain(self, vcpu: Vcpu) -> Explanation: ...

@final
class Hypercall(Exit):
    __match_args__ = ("nr", "args", "ret")
    @property
    def nr(self) -> int: ...
    @property
    def args(self) -> _Six: ...
    @property
    def ret(self) -> int: ...
    @ret.setter
    def ret(self, value: int) -> None: ...
    @property
    def flags(self) -> int: ...
    @property
    def map_gpa_range(self) -> MapGpaRange | None: ...

@final
class MemoryFault(Exit):
    __match_args__ = ("gpa", "size", "private", "flags")
    @property
    def gpa(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def private(self) -> bool: ...
    def decode_draft(self) -> DraftMemoryFault: ...
    def explain(self, vcpu: Vcpu) -> Explanation: ...

@final
class UnexplainedFault(Exit):
    __match_args__ = ("rip",)
    @property
    def reason(self) -> None: ...
    @property
    def rip(self) -> int | None: ...
    def explain(self, vcpu: Vcpu) -> Explanation: ...

@final
class Hlt(Exit): ...

@final
class Shutdown(Exit): ...

@final
class InternalError(Exit):
    __match_args__ = ("suberror", "data", "insn_bytes")
    @property
    def suberror(self) -> int: ...
    @property
    def data(self) -> tuple[int, ...]: ...
    @property
    def insn_bytes(self) -> bytes | None: ...

@final
class FailEntry(Exit):
    __match_args__ = ("hardware_entry_failure_reason", "cpu")
    @property
    def hardware_entry_failure_reason(self) -> int: ...
    @property
    def cpu(self) -> int: ...

@final
class SystemEvent(Exit):
    __match_args__ = ("type", "data")
    @property
    def type(self) -> int: ...
    @property
    def data(self) -> tuple[int, ...]: ...

@final
class Debug(Exit):
    __match_args__ = ("exception", "pc", "dr6", "dr7")
    @property
    def exception(self) -> int: ...
    @property
    def pc(self) -> int: ...
    @property
    def dr6(self) -> int: ...
    @property
    def dr7(self) -> int: ...

@final
class Rdmsr(Exit):
    __match_args__ = ("index", "why", "data", "error")
    @property
    def index(self) -> int: ...
    @property
    def why(self) -> int: ...
    @property
    def data(self) -> int: ...
    @data.setter
    def data(self, value: int) -> None: ...
    @property
    def error(self) -> int: ...
    @error.setter
    def error(self, value: int) -> None: ...

@final
class Wrmsr(Exit):
    __match_args__ = ("index", "why", "data", "error")
    @property
    def index(self) -> int: ...
    @property
    def why(self) -> int: ...
    @property
    def data(self) -> int: ...
    @property
    def error(self) -> int: ...
    @error.setter
    def error(self, value: int) -> None: ...

@final
class IrqWindowOpen(Exit): ...

@final
class IoapicEoi(Exit):
    __match_args__ = ("vector",)
    @property
    def vector(self) -> int: ...

@final
class SetTpr(Exit):
    __match_args__ = ("cr8",)
    @property
    def cr8(self) -> int: ...

@final
class TprAccess(Exit):
    __match_args__ = ("rip", "is_write")
    @property
    def rip(self) -> int: ...
    @property
    def is_write(self) -> bool: ...

@final
class DirtyRingFull(Exit): ...

@final
class BusLock(Exit): ...

@final
class Notify(Exit):
    __match_args__ = ("context_invalid", "flags")
    @property
    def flags(self) -> int: ...
    @property
    def context_invalid(self) -> bool: ...

@final
class Hyperv(Exit):
    __match_args__ = ("type", "msr", "input", "params", "result")
    @property
    def type(self) -> int: ...
    @property
    def evt_page(self) -> int | None: ...
    @property
    def msg_page(self) -> int | None: ...
    @property
    def input(self) -> int | None: ...
    @property
    def result(self) -> int | None: ...
    @result.setter
    def result(self, value: int) -> None: ...
    @property
    def params(self) -> _Two | None: ...
    @property
    def status(self) -> int | None: ...
    @status.setter
    def status(self, value: int) -> None: ...
    @property
    def send_page(self) -> int | None: ...
    @property
    def recv_page(self) -> int | None: ...
    @property
    def pending_page(self) -> int | None: ...
    @pending_page.setter
    def pending_page(self, value: int) -> None: ...
    @property
    def msr(self) -> int | None: ...
    @property
    def control(self) -> int | None: ...

@final
class Xen(Exit):
    __match_args__ = ("type", "input", "params", "result")
    @property
    def type(self) -> int: ...
    @property
    def longmode(self) -> int: ...
    @property
    def cpl(self) -> int: ...
    @property
    def input(self) -> int: ...
    @property
    def result(self) -> int: ...
    @result.setter
    def result(self, value: int) -> None: ...
    @property
    def params(self) -> _Six: ...

@final
class Tdx(Exit):
    __match_args__ = ("nr", "flags", "data", "ret")
    @property
    def flags(self) -> int: ...
    @property
    def nr(self) -> int: ...
    @property
    def ret(self) -> int: ...
    @ret.setter
    def ret(self, value: int) -> None: ...
    @property
    def data(self) -> _Five: ...
    @property
    def leaf(self) -> int: ...
    @property
    def gpa(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def vector(self) -> int: ...
    @property
    def r11(self) -> int: ...
    @r11.setter
    def r11(self, value: int) -> None: ...
    @property
    def r12(self) -> int: ...
    @r12.setter
    def r12(self, value: int) -> None: ...
    @property
    def r13(self) -> int: ...
    @r13.setter
    def r13(self, value: int) -> None: ...
    @property
    def r14(self) -> int: ...
    @r14.setter
    def r14(self, value: int) -> None: ...

@final
class SnpReqCerts(Exit):
    __match_args__ = ("gpa", "npages", "ret")
    @property
    def gpa(self) -> int: ...
    @property
    def npages(self) -> int: ...
    @npages.setter
    def npages(self, value: int) -> None: ...
    @property
    def ret(self) -> int: ...
    @ret.setter
    def ret(self, value: int) -> None: ...

@final
class HardwareExit(Exit):
    __match_args__ = ("hardware_exit_reason",)
    @property
    def hardware_exit_reason(self) -> int: ...

@final
class GuestException(Exit):
    __match_args__ = ("exception", "error_code")
    @property
    def exception(self) -> int: ...
    @property
    def error_code(self) -> int: ...

@final
class Intr(Exit): ...

@final
class Nmi(Exit): ...

@final
class Watchdog(Exit): ...

@final
class ApResetHold(Exit): ...

@final
class S390Sieic(Exit):
    __match_args__ = ("icptcode", "ipa", "ipb")
    @property
    def icptcode(self) -> int: ...
    @property
    def ipa(self) -> int: ...
    @property
    def ipb(self) -> int: ...

@final
class S390Reset(Exit):
    __match_args__ = ("reset_flags",)
    @property
    def reset_flags(self) -> int: ...

@final
class S390Ucontrol(Exit):
    __match_args__ = ("trans_exc_code", "pgm_code")
    @property
    def trans_exc_code(self) -> int: ...
    @property
    def pgm_code(self) -> int: ...

@final
class S390Tsch(Exit):
    __match_args__ = ("subchannel_id", "subchannel_nr", "io_int_parm", "io_int_word", "ipb", "dequeued")
    @property
    def subchannel_id(self) -> int: ...
    @property
    def subchannel_nr(self) -> int: ...
    @property
    def io_int_parm(self) -> int: ...
    @property
    def io_int_word(self) -> int: ...
    @property
    def ipb(self) -> int: ...
    @property
    def dequeued(self) -> int: ...

@final
class S390Stsi(Exit):
    __match_args__ = ("addr", "ar", "fc", "sel1", "sel2")
    @property
    def addr(self) -> int: ...
    @property
    def ar(self) -> int: ...
    @property
    def fc(self) -> int: ...
    @property
    def sel1(self) -> int: ...
    @property
    def sel2(self) -> int: ...

@final
class Dcr(Exit):
    __match_args__ = ("dcrn", "data", "is_write")
    @property
    def dcrn(self) -> int: ...
    @property
    def data(self) -> int: ...
    @data.setter
    def data(self, value: int) -> None: ...
    @property
    def is_write(self) -> bool: ...

@final
class Osi(Exit):
    __match_args__ = ("gprs",)
    @property
    def gprs(self) -> tuple[int, ...]: ...
    @gprs.setter
    def gprs(self, value: Iterable[int]) -> None: ...

@final
class PaprHcall(Exit):
    __match_args__ = ("nr", "args", "ret")
    @property
    def nr(self) -> int: ...
    @property
    def ret(self) -> int: ...
    @ret.setter
    def ret(self, value: int) -> None: ...
    @property
    def args(self) -> _Nine: ...

@final
class Epr(Exit):
    __match_args__ = ("epr",)
    @property
    def epr(self) -> int: ...
    @epr.setter
    def epr(self, value: int) -> None: ...

@final
class ArmNisv(Exit):
    __match_args__ = ("esr_iss", "fault_ipa")
    @property
    def esr_iss(self) -> int: ...
    @property
    def fault_ipa(self) -> int: ...

@final
class ArmLdst64b(Exit):
    __match_args__ = ("esr_iss", "fault_ipa")
    @property
    def esr_iss(self) -> int: ...
    @property
    def fault_ipa(self) -> int: ...

@final
class ArmSea(Exit):
    __match_args__ = ("flags", "esr", "gva", "gpa")
    @property
    def flags(self) -> int: ...
    @property
    def esr(self) -> int: ...
    @property
    def gva(self) -> int: ...
    @property
    def gpa(self) -> int: ...

@final
class RiscvSbi(Exit):
    __match_args__ = ("extension_id", "function_id", "args", "ret")
    @property
    def extension_id(self) -> int: ...
    @property
    def function_id(self) -> int: ...
    @property
    def args(self) -> _Six: ...
    @property
    def ret(self) -> _Two: ...
    @ret.setter
    def ret(self, value: Iterable[int]) -> None: ...

@final
class RiscvCsr(Exit):
    __match_args__ = ("csr_num", "new_value", "write_mask", "ret_value")
    @property
    def csr_num(self) -> int: ...
    @property
    def new_value(self) -> int: ...
    @property
    def write_mask(self) -> int: ...
    @property
    def ret_value(self) -> int: ...
    @ret_value.setter
    def ret_value(self, value: int) -> None: ...

@final
class LoongarchIocsr(Exit):
    __match_args__ = ("gpa", "size", "is_write", "data")
    @property
    def gpa(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_write(self) -> bool: ...
    @property
    def data(self) -> bytes: ...

@final
class Interrupted(Exit):
    __match_args__ = ("cause",)
    @property
    def cause(self) -> Literal["kick", "timeout"]: ...

@final
class UnknownExit(Exit):
    __match_args__ = ("reason", "raw")
    @property
    def raw(self) -> bytes: ...
