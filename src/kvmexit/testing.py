"""For tests of programs that use kvmexit: a VM whose vCPUs follow a script. Works without /dev/kvm."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from kvmexit._convert import AttributesBackend, RecordedAttributes
from kvmexit._loop import Vcpu
from kvmexit._trace import Script, ScriptStep, scripted_page
from kvmexit._vm import VM

__all__ = [
    "RecordedAttributes", "Script", "ScriptStep", "ScriptedVM",
    "hlt", "hypercall", "memory_fault", "mmio_read", "mmio_write", "pio_in", "pio_out",
]


class ScriptedVM(VM):
    """A VM without a kernel behind it: the same handlers, routes, memory and loop, over exits given as a list.

    A script that has come to its end makes run() raise KvmError (ENODATA). A slot's guest_memfd is an ordinary memfd.

    attributes: how ranges become private: a RecordedAttributes, which also can be told to fail, unless given.
    """

    def __init__(self, *, attributes: AttributesBackend | None = None) -> None:
        self._set_up_scripted(RecordedAttributes() if attributes is None else attributes)
        self._scripts: dict[int, Script] = {}

    def create_vcpu(
        self, id: int = 0, script: Iterable[ScriptStep] = (), *, repeat: int = 1, keep: bool = True
    ) -> Vcpu:
        """-> a vCPU that gives out `script`, `repeat` times. keep: note what userspace leaves behind, for script().

        Raises ValueError for an id that is negative or taken.
        """
        self.memory.read(0, 0)  # raises when closed
        if id < 0 or id in self._scripts:
            raise ValueError(f"vCPU id {id} is {'negative' if id < 0 else 'taken'}")
        made = Script(script, repeat, keep)
        vcpu = self._make_vcpu(Vcpu, scripted_page(made), id)
        self._scripts[id] = made
        return vcpu

    def script(self, vcpu: Vcpu) -> Script:
        """The Script of one of this VM's vCPUs: left(i) is what userspace answered to step i."""
        return self._scripts[vcpu.id]


def _pio(direction: int, port: int, size: int, count: int) -> bytes:
    return struct.pack("<BBHIQ", direction, size, port, count, 4096)


def pio_out(port: int, data: bytes, size: int = 1) -> ScriptStep:
    """OUT of `data` to a port; more than one unit of `size` bytes is a string instruction."""
    return ScriptStep(2, _pio(1, port, size, len(data) // size), data)


def pio_in(port: int, size: int = 1, count: int = 1) -> ScriptStep:
    """IN of `count` units of `size` bytes from a port."""
    return ScriptStep(2, _pio(0, port, size, count), bytes(size * count))


def mmio_write(gpa: int, data: bytes) -> ScriptStep:
    """A write of up to 8 bytes."""
    return ScriptStep(6, struct.pack("<Q8sIB", gpa, data, len(data), 1))


def mmio_read(gpa: int, size: int) -> ScriptStep:
    """A read of up to 8 bytes."""
    return ScriptStep(6, struct.pack("<Q8sIB", gpa, b"", size, 0))


def hypercall(nr: int, *args: int) -> ScriptStep:
    """A hypercall with up to six arguments."""
    return ScriptStep(3, struct.pack("<8QQ", nr, *args, *[0] * (6 - len(args)), 0, 1))


def memory_fault(gpa: int, size: int = 4096, *, private: bool = False, errno: int = 14, rip: int = 0) -> ScriptStep:
    """A KVM_EXIT_MEMORY_FAULT: EFAULT, or EHWPOISON (133)."""
    return ScriptStep(39, struct.pack("<3Q", 8 if private else 0, gpa, size), errno=errno, rip=rip)


def hlt() -> ScriptStep:
    """HLT."""
    return ScriptStep(5)
