"""KVM vCPUs at C speed: exits decoded and answered in native code, Python called for what is left."""

from kvmexit import testing, x86
from kvmexit._exits import (
    ApResetHold,
    ArmLdst64b,
    ArmNisv,
    ArmSea,
    BusLock,
    Dcr,
    Debug,
    DirtyRingFull,
    DraftMemoryFault,
    Epr,
    Exit,
    ExitReason,
    FailEntry,
    GuestException,
    HardwareExit,
    Hlt,
    Hypercall,
    Hyperv,
    InternalError,
    Interrupted,
    Intr,
    Io,
    IoapicEoi,
    IrqWindowOpen,
    LoongarchIocsr,
    MemoryFault,
    Mmio,
    Nmi,
    Notify,
    Osi,
    PaprHcall,
    Rdmsr,
    RiscvCsr,
    RiscvSbi,
    S390Reset,
    S390Sieic,
    S390Stsi,
    S390Tsch,
    S390Ucontrol,
    SetTpr,
    Shutdown,
    SnpReqCerts,
    SystemEvent,
    Tdx,
    TprAccess,
    UnexplainedFault,
    UnknownExit,
    Watchdog,
    Wrmsr,
    Xen,
)
from kvmexit._loop import KICK_SIGNAL, Vcpu
from kvmexit._memory import GuestMemfdFlags, Memory, Slot
from kvmexit._registers import Events, Regs, Segment, Sregs
from kvmexit._routes import Route
from kvmexit._vm import VM, AdoptedSlot, VMType
from kvmexit._version import __version__
from kvmexit.errors import Error, FaultLoopError, KvmError, NotPendingError, VcpuBusyError
from kvmexit.handlers import PASS, STOP



__all__ = [name for name in dir() if not name.startswith("_")] + ["__version__"]
