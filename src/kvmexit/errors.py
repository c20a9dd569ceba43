"""What kvmexit raises. Bad arguments are ValueError and TypeError; everything else derives from `Error`."""

from __future__ import annotations

import errno as errnos
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmexit._replay import Divergence
    from kvmexit.stats import LastExit

__all__ = ["ConversionError", "Error", "FaultLoopError", "KvmError", "NotPendingError", "TraceError", "VcpuBusyError"]


show_last_exits = os.environ.get("KVMEXIT_LAST_EXITS") == "1"
"""Whether an exception that leaves run() says in a note, which tracebacks show, what the vCPU's last exits were."""


class Error(Exception):
    """Base class of kvmexit's errors; raised itself for a closed VM, a forked child, an unfit machine.

    last_exits: of one that left run(), the vCPU's last 64 exits, oldest first; else empty.
    """

    last_exits: tuple[LastExit, ...] = ()

    def explain(self) -> str:
        """The message, and the last exits in a table below it."""
        from kvmexit.stats import as_text

        return f"{self}\n{as_text(self.last_exits)}" if self.last_exits else str(self)


class KvmError(Error, OSError):
    """A system call to KVM failed: `call` names it, `errno` and `strerror` are the kernel's, `hint` what to try."""

    call: str
    hint: str

    def __init__(self, errno: int, call: str, hint: str = "") -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.call = call
        self.hint = hint or _HINTS.get((call, errno), "")

    def __str__(self) -> str:
        text = f"{self.call}: {self.strerror} (errno {self.errno})"
        return f"{text}; {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[type[KvmError], tuple[int | None, str, str]]:
        return type(self), (self.errno, self.call, self.hint)


class FaultLoopError(Error):
    """The guest keeps raising one and the same fault: what answers it does not repair it. `fault` is the last one."""

    fault: object

    def __init__(self, message: str, fault: object = None) -> None:
        super().__init__(message)
        self.fault = fault


class ConversionError(Error):
    """A range could not become private or shared.

    gpa, size, private: what was asked. done: bytes from gpa on that have the wanted state now. why: a text. errno: the
    kernel's, or None where the range itself cannot be converted; then nothing was done, unless a slot was removed
    meanwhile. `vm.memory.ranges()` says what is what.
    """

    gpa: int
    size: int
    private: bool
    done: int
    why: str
    errno: int | None

    def __init__(self, gpa: int, size: int, private: bool, done: int, why: str, errno: int | None = None) -> None:
        super().__init__(gpa, size, private, done, why, errno)
        self.gpa, self.size, self.private, self.done, self.why, self.errno = gpa, size, private, done, why, errno

    def __str__(self) -> str:
        to = "private" if self.private else "shared"
        return f"gpa {self.gpa:#x}, size {self.size:#x} to {to}: {self.why}; {self.done:#x} bytes done"


class NotPendingError(Error):
    """An answer came too late: KVM has been re-entered since that exit."""


class TraceError(Error):
    """A trace cannot be read, has come to its end, or what is replayed diverges from it.

    divergence: where an answer differs, with both sides; else None.
    """

    divergence: Divergence | None

    def __init__(self, message: str, divergence: Divergence | None = None) -> None:
        super().__init__(message)
        self.divergence = divergence


class VcpuBusyError(Error):
    """The vCPU is inside run(), and a vCPU runs on one thread at a time."""


_HINTS = {
    ("open /dev/kvm", errnos.ENOENT): "load the kvm_intel or kvm_amd module; in a VM, enable nested virtualisation",
    ("open /dev/kvm", errnos.EACCES): "add the user to the group that owns the device (usually kvm), or run as root",
    ("KVM_CREATE_VM", errnos.EINVAL): "this kernel has no such VM type; vm types it has: KVM_CAP_VM_TYPES on /dev/kvm",
    ("KVM_CREATE_VM", errnos.EBUSY): "another hypervisor has the processor's virtualisation",
    ("KVM_CREATE_VCPU", errnos.EEXIST): "the VM has a vCPU with this id; choose another",
    ("KVM_CREATE_VCPU", errnos.EINVAL): "the id is beyond what this VM allows (KVM_CAP_MAX_VCPU_ID)",
    ("KVM_RUN", errnos.EINVAL): (
        "KVM refused the registers or the answer: see vcpu.regs, vcpu.cr8, and `ret` of the last exit"
    ),
    ("KVM_RUN", errnos.EIO): "the VM is dead: it was created by another process, or KVM hit a bug; make a new one",
    ("KVM_RUN", errnos.ENOMEM): "the kernel is out of memory",
    ("KVM_RUN", errnos.ENOEXEC): "the vCPU was not initialised",
    ("KVM_SET_SREGS", errnos.EINVAL): "control registers and segments contradict each other, or CPUID lacks the mode",
    ("KVM_CREATE_GUEST_MEMFD", errnos.EINVAL): "this kernel or VM type does not take these gmem_flags",
    ("KVM_IOEVENTFD", errnos.EEXIST): "another ioeventfd has these writes: remove it first, or match other values",
    ("KVM_IOEVENTFD", errnos.ENOSPC): "too many devices on the bus: remove coalesced zones",
    ("KVM_IRQFD", errnos.EINVAL): "call vm.create_irqchip() first, before the first vCPU",
    ("KVM_IRQFD", errnos.EAGAIN): "call vm.create_irqchip() first, before the first vCPU",
    ("KVM_IRQFD", errnos.EBUSY): "the eventfd raises a line already: use one for each line",
    ("KVM_GET_DIRTY_LOG", errnos.ENXIO): "the VM has dirty rings, which its owner harvests",
    ("KVM_CLEAR_DIRTY_LOG", errnos.ENXIO): "the VM has dirty rings: dirty() empties them, there is nothing to clear",
    ("KVM_CREATE_GUEST_MEMFD", errnos.ENOTTY): "guest_memfd needs Linux 6.8 or later",
}
