"""What may be a handler."""

from __future__ import annotations

import enum
import errno as errnos
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

if TYPE_CHECKING:
    from kvmexit._exits import DirtyRingFull, Exit, Hypercall, MemoryFault
    from kvmexit._loop import Vcpu

from kvmexit._native import Function, foreign
from kvmexit._routes import Native
from kvmexit.errors import ConversionError

__all__ = ["PASS", "STOP", "Handler", "Verdict", "coerce", "collect_dirty", "convert", "map_gpa_range"]

_E = TypeVar("_E", bound="Exit")
Handler: TypeAlias = Callable[["Vcpu", _E], object] | Native
"""A handler of one class of exits: `Handler[Io]` takes (vcpu, io), or is a native one."""


class Verdict(enum.Enum):
    """What a handler can return instead of an answer."""

    PASS = "PASS"
    """Not mine: the next handler, and at last the caller of run()."""
    STOP = "STOP"
    """run() returns this exit now."""

    def __repr__(self) -> str:
        return f"kvmexit.{self.name}"


PASS: Final = Verdict.PASS
STOP: Final = Verdict.STOP


def coerce(handler: Handler[Any]) -> Handler[Any]:
    """The handler as the dispatcher takes it: `handler(vcpu, exit)`, or a native one.

    TypeError says what would be accepted.
    """
    if isinstance(handler, Native):
        return handler
    if foreign(handler):
        return Function(handler)
    if not callable(handler):
        raise TypeError(
            "a handler is a callable taking (vcpu, exit), or a native one (kvmexit.native), "
            f"not {type(handler).__name__}"
        )
    import inspect  # here: it would be a quarter of the time that importing kvmexit takes

    if (
        inspect.iscoroutinefunction(handler)
        or inspect.isgeneratorfunction(handler)
        or inspect.isasyncgenfunction(handler)
    ):
        raise TypeError(
            f"{handler!r} is a coroutine or generator function: a handler answers at once, as a plain function"
        )
    return handler


_PAGE = 4096


def convert(vcpu: Vcpu, fault: MemoryFault) -> object:
    """A handler for `on_memory_fault`: make the pages that the fault names private or shared, as the guest wants them.

    Raises ConversionError where that cannot be; the fault then stays pending. A fault over pages that are so already
    (their guest_memfd is closed) is not repaired by it: after `vcpu.fault_limit` of them run() raises FaultLoopError.
    EHWPOISON is passed on. Source: Documentation/virt/kvm/api.rst, KVM_EXIT_MEMORY_FAULT.
    """
    if fault.errno != errnos.EFAULT:
        return PASS
    first = fault.gpa // _PAGE * _PAGE
    size = -(-(fault.gpa + fault.size - first) // _PAGE) * _PAGE
    vcpu.vm.memory.convert(first, size, private=fault.private)
    return None


def collect_dirty(vcpu: Vcpu, full: DirtyRingFull) -> None:
    """A handler for `on(DirtyRingFull)`: empty the dirty rings. What they say is kept for `vm.memory.dirty()`.

    Raises KvmError where KVM refuses; the exit then stays pending. Source: Documentation/virt/kvm/api.rst,
    KVM_CAP_DIRTY_LOG_RING.
    """
    vcpu.vm.memory.collect_dirty()


def map_gpa_range(vcpu: Vcpu, hypercall: Hypercall) -> object:
    """A handler for `on_hypercall(12)`: the guest asks by KVM_HC_MAP_GPA_RANGE that a range become private or shared.

    The guest gets 0; EINVAL for a range that cannot be converted (rubbish; no slot or no guest_memfd where it is to be
    private); EAGAIN where the kernel had no memory or was busy: asking again goes on from there. In a plain VM errors
    are negative, in SNP and TDX VMs positive, as KVM takes them there. An MMIO hole is shared already: success.
    Another hypercall is passed on.

    Raises ConversionError for other failures: they are the host's. Source: Documentation/virt/kvm/x86/hypercalls.rst;
    arch/x86/kvm/svm/sev.c, arch/x86/kvm/vmx/tdx.c.
    """
    asked = hypercall.map_gpa_range
    if asked is None:
        return PASS
    try:
        if not asked.valid:
            return _failed(vcpu, errnos.EINVAL)
        vcpu.vm.memory.convert(asked.gpa, asked.size, private=asked.private)
    except ConversionError as error:
        if error.errno not in (None, errnos.EAGAIN, errnos.EBUSY, errnos.ENOMEM):
            raise
        return _failed(vcpu, errnos.EINVAL if error.errno is None else errnos.EAGAIN)
    return 0


def _failed(vcpu: Vcpu, errno: int) -> int:
    """`ret` of a hypercall that failed: the way this type of VM takes it."""
    positive = vcpu.vm.type.name in ("SNP", "TDX")
    return errno if positive else (1 << 64) - errno
