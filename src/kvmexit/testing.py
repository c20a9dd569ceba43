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
    "debug", "dirty_ring_full", "fail_entry", "failure", "hlt", "hypercall", "hyperv_hypercall", "internal_error",
    "ioapic_eoi", "irq_window_open", "map_gpa_range", "memory_fault", "mmio_read", "mmio_write", "pio_in", "pio_out",
    "rdmsr", "shutdown", "snp_req_certs", "spin", "system_event", "tdx", "wrmsr", "xen_hypercall",
]  # fmt: skip


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
    return ScriptStep(3, struct.pack("<8QQ", nr, *_words(args, 6), 0, 1))


def map_gpa_range(gpa: int, size: int, *, private: bool) -> ScriptStep:
    """The hypercall KVM_HC_MAP_GPA_RANGE: the guest wants `size` bytes, whole pages, converted."""
    return hypercall(12, gpa, size >> 12, 1 << 4 if private else 0)


def memory_fault(gpa: int, size: int = 4096, *, private: bool = False, errno: int = 14, rip: int = 0) -> ScriptStep:
    """A KVM_EXIT_MEMORY_FAULT: EFAULT, or EHWPOISON (133)."""
    return ScriptStep(39, struct.pack("<3Q", 8 if private else 0, gpa, size), errno=errno, rip=rip)


def rdmsr(index: int, why: int = 2) -> ScriptStep:
    """RDMSR of what userspace asked for. why: 1 invalid, 2 unknown, 4 filtered."""
    return ScriptStep(29, struct.pack("<8xIIQ", why, index, 0))


def wrmsr(index: int, data: int, why: int = 2) -> ScriptStep:
    """WRMSR of what userspace asked for. why: 1 invalid, 2 unknown, 4 filtered."""
    return ScriptStep(30, struct.pack("<8xIIQ", why, index, data))


def hyperv_hypercall(input: int, *params: int) -> ScriptStep:
    """A Hyper-V hypercall with up to two parameters."""
    return ScriptStep(27, struct.pack("<I4x4Q", 2, input, 0, *_words(params, 2)))


def xen_hypercall(input: int, *params: int) -> ScriptStep:
    """A Xen hypercall with up to six parameters, from 64-bit mode."""
    return ScriptStep(34, struct.pack("<I4xIIQQ6Q", 1, 1, 0, input, 0, *_words(params, 6)))


def tdx(nr: int, *data: int) -> ScriptStep:
    """A TDVMCALL with up to five numbers."""
    return ScriptStep(40, struct.pack("<QQQ5Q", 0, nr, 0, *_words(data, 5)))


def snp_req_certs(gpa: int, npages: int) -> ScriptStep:
    """An SNP guest's request for certificates."""
    return ScriptStep(43, struct.pack("<QQQ", gpa, npages, 0))


def debug(exception: int, pc: int, dr6: int = 0, dr7: int = 0) -> ScriptStep:
    """A breakpoint or a single step. exception: 1 #DB, 3 #BP."""
    return ScriptStep(4, struct.pack("<I4x3Q", exception, pc, dr6, dr7))


def system_event(type: int, *data: int) -> ScriptStep:
    """KVM_EXIT_SYSTEM_EVENT with up to 16 numbers: 1 shutdown, 2 reset, 3 crash, ..."""
    return ScriptStep(24, struct.pack("<II16Q", type, len(data), *_words(data, 16)))


def internal_error(suberror: int, *data: int) -> ScriptStep:
    """KVM gave up; up to 16 words. suberror: 1 emulation, 2 simultaneous exceptions, 3 delivery, 4 unexpected exit."""
    return ScriptStep(17, struct.pack("<II16Q", suberror, len(data), *_words(data, 16)))


def fail_entry(hardware_entry_failure_reason: int, cpu: int = 0) -> ScriptStep:
    """The processor refuses the guest's state."""
    return ScriptStep(9, struct.pack("<QI", hardware_entry_failure_reason, cpu))


def ioapic_eoi(vector: int) -> ScriptStep:
    """End of interrupt for the userspace IOAPIC."""
    return ScriptStep(26, struct.pack("<B", vector))


def hlt() -> ScriptStep:
    """HLT."""
    return ScriptStep(5)


def shutdown() -> ScriptStep:
    """A triple fault."""
    return ScriptStep(8)


def irq_window_open() -> ScriptStep:
    """An interrupt can be injected."""
    return ScriptStep(7)


def dirty_ring_full() -> ScriptStep:
    """The dirty ring wants to be harvested."""
    return ScriptStep(31)


def spin() -> ScriptStep:
    """The guest loops until somebody kicks it, or asks otherwise for its thread."""
    return ScriptStep(spin=True)


def failure(errno: int, *, rip: int = 0) -> ScriptStep:
    """KVM_RUN fails and says no more: EFAULT is an UnexplainedFault, EINTR a signal, EIO a KvmError; docs/triage.md."""
    return ScriptStep(errno=errno, rip=rip)


def _words(given: tuple[int, ...], most: int) -> list[int]:
    if len(given) > most:
        raise ValueError(f"{len(given)} numbers: KVM has room for {most}")
    return [*given, *[0] * (most - len(given))]
