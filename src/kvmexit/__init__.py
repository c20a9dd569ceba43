"""KVM vCPUs at C speed: exits decoded and answered in native code, Python called for what is left."""

import os
from typing import TYPE_CHECKING

from kvmexit import handlers, native, stats, testing, x86
from kvmexit._coalesced import CoalescedZone
from kvmexit._convert import KvmAttributes, SlotRebind
from kvmexit._dirty import DirtyRange
from kvmexit._embed import _C_API as _C_API
from kvmexit._eventfd import IoEventFd, IrqFd
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
    MapGpaRange,
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
from kvmexit._memory import GuestMemfdFlags, Memory, MemoryRange, Slot
from kvmexit._msr_filter import MsrExitReason, MsrRange
from kvmexit._record import Recorder, VMRecorder
from kvmexit._registers import Events, Regs, Segment, Sregs
from kvmexit._replay import Divergence, Played, Replay, Trace, TracePart, TraceRecord, load, replay
from kvmexit._routes import Route
from kvmexit._version import __version__
from kvmexit._vm import VM, AdoptedSlot, VMType
from kvmexit.errors import ConversionError, Error, FaultLoopError, KvmError, NotPendingError, TraceError, VcpuBusyError
from kvmexit.handlers import PASS, STOP
from kvmexit.stats import Histogram, LastExit, Stats

if TYPE_CHECKING:
    from kvmexit import faults as faults
else:

    def __getattr__(name):
        """kvmexit.faults is imported when it is first asked for: it takes half as long as all the rest."""
        if name != "faults":
            raise AttributeError(f"module 'kvmexit' has no attribute {name!r}")
        import importlib

        return importlib.import_module("kvmexit.faults")


__all__ = [
    "KICK_SIGNAL",
    "PASS",
    "STOP",
    "VM",
    "AdoptedSlot",
    "ApResetHold",
    "ArmLdst64b",
    "ArmNisv",
    "ArmSea",
    "BusLock",
    "CoalescedZone",
    "ConversionError",
    "Dcr",
    "Debug",
    "DirtyRange",
    "DirtyRingFull",
    "Divergence",
    "DraftMemoryFault",
    "Epr",
    "Error",
    "Events",
    "Exit",
    "ExitReason",
    "FailEntry",
    "FaultLoopError",
    "GuestException",
    "GuestMemfdFlags",
    "HardwareExit",
    "Histogram",
    "Hlt",
    "Hypercall",
    "Hyperv",
    "InternalError",
    "Interrupted",
    "Intr",
    "Io",
    "IoEventFd",
    "IoapicEoi",
    "IrqFd",
    "IrqWindowOpen",
    "KvmAttributes",
    "KvmError",
    "LastExit",
    "LoongarchIocsr",
    "MapGpaRange",
    "Memory",
    "MemoryFault",
    "MemoryRange",
    "Mmio",
    "MsrExitReason",
    "MsrRange",
    "Nmi",
    "NotPendingError",
    "Notify",
    "Osi",
    "PaprHcall",
    "Played",
    "Rdmsr",
    "Recorder",
    "Regs",
    "Replay",
    "RiscvCsr",
    "RiscvSbi",
    "Route",
    "S390Reset",
    "S390Sieic",
    "S390Stsi",
    "S390Tsch",
    "S390Ucontrol",
    "Segment",
    "SetTpr",
    "Shutdown",
    "Slot",
    "SlotRebind",
    "SnpReqCerts",
    "Sregs",
    "Stats",
    "SystemEvent",
    "Tdx",
    "TprAccess",
    "Trace",
    "TraceError",
    "TracePart",
    "TraceRecord",
    "UnexplainedFault",
    "UnknownExit",
    "VMRecorder",
    "VMType",
    "Vcpu",
    "VcpuBusyError",
    "Watchdog",
    "Wrmsr",
    "Xen",
    "__version__",
    "get_include",
    "handlers",
    "load",
    "native",
    "replay",
    "stats",
    "testing",
    "x86",
]


def get_include() -> str:
    """The folder for a compiler's -I: <kvmexit/kvmexit.h> is what native handlers are written against."""
    return os.path.join(os.path.dirname(__file__), "include")
