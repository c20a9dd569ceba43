"""Who runs a workload's guest, and the check of what came of it."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import guest
from guest import ENCRYPTED, END, LSR, MAP_GPA_RANGE, REGION, THR, Step

from kvmexit import VM, Io, KvmError, get_include, handlers, native
from kvmexit.bench.cells import (
    CAP_EXIT_HYPERCALL,
    KVM_RUN,
    KVM_SET_MEMORY_ATTRIBUTES,
    WAYS,
    Impossible,
    private_vm,
)
from kvmexit.testing import ScriptedVM, hypercall, pio_out

__all__ = ["DEVICE", "MARK", "PAGE", "PATIENCE", "Device", "Job", "Turn", "Ways", "Workload", "Wrong", "converting_on",
           "library", "no_compiler", "no_private_memory", "same", "ways_of"]

PAGE, PRIVATE = 4096, 1 << 3
MARK = 0x5AED5AED  # what the host writes to the shared side of each page
PATIENCE = 120  # seconds, for a guest to reach its end
DEVICE = "/dev/kvm"
EXIT_IO, EXIT_HYPERCALL, EXIT_MMIO = 2, 3, 6


class Wrong(Exception):
    """An answer, a count or a state that is not the reference's."""


class Turn(NamedTuple):
    """A workload done once: how long it took, and how many exits."""

    seconds: float
    exits: int


class Device(NamedTuple):
    """Answers reads with a constant, and counts."""

    base: int
    size: int
    value: int


@dataclass
class Job:
    """A guest's steps, what is there to answer them, and what has to come of it.

    text goes out by the serial port. counts: each device's reads and writes, the ports' first. convertible: bytes at
    REGION that can be converted; private: (gpa, size) of what of it is private in the end; seen: what the guest then
    reads in each page, when the host has written MARK to all. exits: with the one that ends it. scripted: on no guest,
    since this machine's KVM has no private memory.
    """

    steps: list[Step]
    exits: int
    ports: list[Device] = field(default_factory=list)
    ranges: list[Device] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    text: bytes = b""
    convertible: int = 0
    private: list[tuple[int, int]] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    scripted: bool = False


def same(what: str, got: Any, wanted: Any) -> None:
    """Raise Wrong, with the first difference, where two results differ."""
    if got == wanted:
        return
    if isinstance(got, (list, bytes)):
        at = next((i for i, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), None)
        if at is not None:
            raise Wrong(f"{what}: number {at} is {got[at]!r}, not {wanted[at]!r}")
        got, wanted = len(got), len(wanted)
    raise Wrong(f"{what}: {got!r}, not {wanted!r}")


def run(way: type[Way], job: Job) -> Turn:
    """Answer the job's guest once, and check what came of it. Raises Wrong."""
    with ExitStack() as stack:
        made = way(stack, job)
        began = time.perf_counter()
        made.go()
        took = time.perf_counter() - began
        same("exits", made.exits, job.exits)
        if job.convertible and not job.scripted:
            made.mark()
            made.go()  # the guest looks
        same("what the guest read", made.answers(), [step.answer for step in made.steps])
        same("what went out by the serial port", os.pread(made.console, len(job.text) + 1, 0), job.text)
        same("accesses of a device", made.counts(), job.counts)
        if (private := made.private()) is not None:
            same("what is private", private, job.private)
    return Turn(took, job.exits)


class Way(ABC):
    """One way to answer a job's guest, ready to run it once. exits: how many there were."""

    exits = 0

    def __init__(self, stack: ExitStack, job: Job) -> None:
        self.job, self.steps = job, job.steps
        self.console = os.memfd_create("console")
        stack.callback(os.close, self.console)
        self.vm: VM = stack.enter_context(
            ScriptedVM() if job.scripted else private_vm(DEVICE) if job.convertible else VM(device=DEVICE))
        if isinstance(self.vm, ScriptedVM):
            script = [pio_out(END, b"\0") if step.do == "end" else hypercall(
                MAP_GPA_RANGE, step.address, step.value & 0xFFFF_FFFF, step.value >> 32) for step in self.steps]
            self.vcpu = self.vm.create_vcpu(0, script)
        else:
            if job.convertible:
                look = [Step("read", REGION + i * PAGE, answer=seen) for i, seen in enumerate(job.seen)]
                self.steps = [*job.steps, *look, Step("end")]
            self.vcpu = guest.start(self.vm, self.steps, job.text, cpl=0 if job.convertible else 3)
        self.slot = self.vm.memory.add(REGION, job.convertible, guest_memfd=True) if job.convertible else None

    @abstractmethod
    def go(self) -> None:
        """Run the guest to its next end. Raises Wrong where it does not come there."""

    @abstractmethod
    def counts(self) -> list[tuple[int, int]]:
        """Each device's reads and writes."""

    def private(self) -> list[tuple[int, int]] | None:
        """(gpa, size) of what is private; None where nobody notes it: the guest has seen it."""
        return None

    def mark(self) -> None:
        """Write to the shared side of each page: where it is private, the guest must not see that."""
        for offset in range(0, self.job.convertible, PAGE):
            self.vm.memory.write(REGION + offset, struct.pack("<I", MARK))

    def answers(self) -> list[int]:
        """What the guest got, by step."""
        if isinstance(self.vm, ScriptedVM):
            script = self.vm.script(self.vcpu)
            return [struct.unpack_from("<Q", script.left(i)[0], 56)[0] if step.do == "call" else 0
                    for i, step in enumerate(self.steps)]
        return guest.answers(self.vm, len(self.steps))


class Serial:
    """As much of a 16550A as the guest needs, in Python."""

    def __init__(self, console: int) -> None:
        self.console, self.registers = console, bytearray(8)

    def write(self, offset: int, value: int) -> None:
        if offset == 0 and not self.registers[3] & 0x80:  # LCR's DLAB
            os.write(self.console, bytes([value]))
        else:
            self.registers[offset] = value

    def read(self, offset: int) -> int:
        return 0x60 if offset == LSR - THR else self.registers[offset]


# ---- kvmexit ----


class Kvmexit(Way):
    """Either of its ways."""

    def go(self) -> None:
        exit = self.vcpu.run(timeout=PATIENCE)
        if not isinstance(exit, Io) or exit.port != END:
            raise Wrong(f"the guest ended with {exit!r}")

    @property
    def exits(self) -> int:
        return self.vm.stats.exits

    def private(self) -> list[tuple[int, int]]:
        return [(found.gpa, found.size) for found in self.vm.memory.ranges() if found.private]


class Native(Kvmexit):
    """With native handlers."""

    def __init__(self, stack: ExitStack, job: Job) -> None:
        super().__init__(stack, job)
        self.counters = [native.Counter() for _ in (*job.ports, *job.ranges)]
        with self.vm.swap_routes():
            self.vm.on_pio(THR, 8, native.Serial16550(self.console))
            for device, counter in zip(job.ports, self.counters, strict=False):
                self.vm.on_pio(device.base, device.size, native.Ignore(device.value))
                self.vm.on_pio(device.base, device.size, counter)  # the newest is asked first
            for device, counter in zip(job.ranges, self.counters[len(job.ports) :], strict=True):
                self.vm.on_mmio(device.base, device.size, native.Ignore(device.value))
                self.vm.on_mmio(device.base, device.size, counter)
        if job.convertible:
            self.vm.on_hypercall(MAP_GPA_RANGE, native.Convert(self.vm))

    def counts(self) -> list[tuple[int, int]]:
        return [(counter.reads, counter.writes) for counter in self.counters]


class Python(Kvmexit):
    """With handlers in Python."""

    def __init__(self, stack: ExitStack, job: Job) -> None:
        super().__init__(stack, job)
        self.reads, self.writes = ([0] * (len(job.ports) + len(job.ranges)) for _ in range(2))
        serial = Serial(self.console)

        def console(vcpu: Any, io: Any) -> int | None:
            if io.is_write:
                return serial.write(io.port - THR, io.data[0])
            return serial.read(io.port - THR)

        with self.vm.swap_routes():
            self.vm.on_pio(THR, 8, console)
            for i, device in enumerate(job.ports):
                self.vm.on_pio(device.base, device.size, self.handler(i, device))
            for i, device in enumerate(job.ranges, len(job.ports)):
                self.vm.on_mmio(device.base, device.size, self.handler(i, device))
        if job.convertible:
            self.vm.on_hypercall(MAP_GPA_RANGE, handlers.map_gpa_range)

    def handler(self, i: int, device: Device) -> Any:
        def answer(vcpu: Any, exit: Any) -> int | None:
            if exit.is_write:
                self.writes[i] += 1
                return None
            self.reads[i] += 1
            return device.value

        return answer

    def counts(self) -> list[tuple[int, int]]:
        return list(zip(self.reads, self.writes, strict=True))


# ---- by hand ----


class ByHand(Way):
    """What two loops without kvmexit need of it: a VM with a guest. They ask for no registers."""

    def __init__(self, stack: ExitStack, job: Job) -> None:
        super().__init__(stack, job)
        if job.convertible:
            self.vm.enable(CAP_EXIT_HYPERCALL, 1 << MAP_GPA_RANGE)
        self.vcpu.sync = 0
        self.most = job.exits + 1  # before the end: a guest that gets wrong answers may never come there
        self.page = mmap.mmap(self.vcpu.fd, 3 * PAGE, mmap.MAP_SHARED)


class Loop(ByHand):
    """The loop that people write in Python: fcntl.ioctl() and struct."""

    def __init__(self, stack: ExitStack, job: Job) -> None:
        super().__init__(stack, job)
        self.serial = Serial(self.console)
        self.devices = [*job.ports, *job.ranges]
        self.reads, self.writes = ([0] * len(self.devices) for _ in range(2))
        self.bases = [device.base for device in job.ports], [device.base for device in job.ranges]
        self.libc = ctypes.CDLL(None, use_errno=True)

    def counts(self) -> list[tuple[int, int]]:
        return list(zip(self.reads, self.writes, strict=True))

    def device(self, bases: Sequence[int], first: int, address: int) -> int:
        at = bisect_right(bases, address) - 1
        if at < 0 or address - self.devices[first + at].base >= self.devices[first + at].size:
            raise Wrong(f"nothing is at {address:#x}")
        return first + at

    def go(self) -> None:
        fd, page, unpack = self.vcpu.fd, self.page, struct.unpack_from
        ports, ranges = self.bases
        for _ in range(self.most):
            while True:
                try:
                    ioctl(fd, KVM_RUN)
                    break
                except InterruptedError:
                    continue
            self.exits += 1
            (reason,) = unpack("<I", page, 8)
            if reason == EXIT_IO:
                direction, _size, port, _count, offset = unpack("<BBHIQ", page, 32)
                if port == END:
                    return
                if THR <= port < THR + 8:
                    if direction:
                        self.serial.write(port - THR, page[offset])
                    else:
                        page[offset] = self.serial.read(port - THR)
                else:
                    at = self.device(ports, 0, port)
                    if direction:
                        self.writes[at] += 1
                    else:
                        self.reads[at] += 1
                        page[offset] = self.devices[at].value & 0xFF
            elif reason == EXIT_MMIO:
                gpa, _data, size, is_write = unpack("<Q8sIB", page, 32)
                at = self.device(ranges, len(ports), gpa)
                if is_write:
                    self.writes[at] += 1
                else:
                    self.reads[at] += 1
                    page[40 : 40 + size] = self.devices[at].value.to_bytes(8, "little")[:size]
            elif reason == EXIT_HYPERCALL:
                _nr, gpa, pages, attributes = unpack("<4Q", page, 32)
                struct.pack_into("<q", page, 88, self.convert(gpa, pages * PAGE, bool(attributes & ENCRYPTED)))
            else:
                raise Wrong(f"the guest ended with exit reason {reason}")
        raise Wrong(f"more than {self.most} exits, and no end")

    def convert(self, gpa: int, size: int, private: bool) -> int:
        """-> 0, or a negative errno."""
        offset = gpa - REGION
        if not 0 <= offset <= offset + size <= self.job.convertible:
            return -errno.EINVAL
        assert self.slot is not None
        ioctl(self.vm.fd, KVM_SET_MEMORY_ATTRIBUTES, struct.pack("<4Q", gpa, size, PRIVATE if private else 0, 0))
        length = ctypes.c_size_t(size)
        if private:
            failed = self.libc.madvise(ctypes.c_void_p(self.slot.hva + offset), length, mmap.MADV_DONTNEED)
        else:  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
            failed = self.libc.fallocate(self.slot.guest_memfd, 3, ctypes.c_long(offset), length)
        return -ctypes.get_errno() if failed else 0


class CDevice(ctypes.Structure):
    """floor.c's struct device."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("base", "size", "value", "reads", "writes")]


class CJob(ctypes.Structure):
    """floor.c's struct job."""

    _fields_ = [
        ("run", ctypes.c_void_p), ("ports", ctypes.POINTER(CDevice)), ("ranges", ctypes.POINTER(CDevice)),
        ("nports", ctypes.c_uint64), ("nranges", ctypes.c_uint64),
        ("gpa", ctypes.c_uint64), ("size", ctypes.c_uint64), ("hva", ctypes.c_uint64),
        ("vcpu", ctypes.c_int), ("vm", ctypes.c_int), ("gmem", ctypes.c_int), ("console", ctypes.c_int),
        ("serial", ctypes.c_uint8 * 8),
    ]  # fmt: skip


class Floor(ByHand):
    """floor.c."""

    def __init__(self, stack: ExitStack, job: Job) -> None:
        super().__init__(stack, job)
        self.run_guest = library().run_guest
        self.run_guest.restype = ctypes.c_long
        self.ports, self.ranges = (
            (CDevice * len(devices))(*((*device, 0, 0) for device in devices)) for devices in (job.ports, job.ranges))
        self.c = CJob(
            ctypes.addressof(ctypes.c_char.from_buffer(self.page)), self.ports, self.ranges, len(job.ports),
            len(job.ranges), REGION, job.convertible, self.slot.hva if self.slot else 0, self.vcpu.fd, self.vm.fd,
            self.slot.guest_memfd if self.slot else -1, self.console)

    def go(self) -> None:
        exits: int = self.run_guest(ctypes.byref(self.c), ctypes.c_long(self.most))
        if exits < 0:
            (reason,) = struct.unpack_from("<I", self.page, 8)
            raise Wrong(f"floor.c ended with {errno.errorcode[-exits]} at exit reason {reason}")
        self.exits += exits

    def counts(self) -> list[tuple[int, int]]:
        return [(device.reads, device.writes) for device in (*self.ports, *self.ranges)]


@functools.cache
def library() -> ctypes.CDLL:
    """floor.c, compiled."""
    with tempfile.TemporaryDirectory(prefix="kvmexit-workloads-") as folder:
        made = f"{folder}/floor.so"
        source = Path(__file__).with_name("floor.c")
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{get_include()}",
                        "-o", made, source], check=True)
        return ctypes.CDLL(made)


# ---- a workload ----


Ways: TypeAlias = dict[str, Callable[[], Turn] | str]


class Workload(NamedTuple):
    """What __main__.py measures: ways to do the same, the first of those that can be done being the control.

    on: what runs it: this machine's KVM, or what stands in for it, and why. unit: what the time is divided by, of
    which there are `units`. ways: by name what does it once and checks it; or why this machine cannot.
    """

    title: str
    on: str
    unit: str
    units: int
    ways: Ways


def ways_of(job: Job) -> Ways:
    """The four of a Workload that is a Job."""
    ways: dict[str, type[Way]] = {WAYS["floor"]: Floor, WAYS["native"]: Native, WAYS["python"]: Python,
                                  WAYS["loop"]: Loop}  # fmt: skip
    return {name: why_not(way, job) or functools.partial(run, way, job) for name, way in ways.items()}


def why_not(way: type[Way], job: Job) -> str:
    """Why this machine cannot do that; "" where it can."""
    if job.scripted and issubclass(way, ByHand):
        return "there is no KVM_RUN in a script"
    if not job.scripted and (missing := no_kvm()):
        return missing
    return no_compiler() if way is Floor else ""


def converting_on(scripted: str) -> str:
    """What runs conversions; scripted: why not KVM."""
    return f"a script and RecordedAttributes, since {scripted}" if scripted else "KVM with private memory"


def no_kvm() -> str:
    """Why no guest can run here, or ""."""
    try:
        VM(device=DEVICE).close()
    except KvmError as error:
        return str(error)
    return ""


def no_compiler() -> str:
    """Why floor.c cannot be compiled, or ""."""
    return "" if shutil.which("cc") else "there is no C compiler here"


def no_private_memory() -> str:
    """Why nothing can be converted here, or ""."""
    try:
        private_vm(DEVICE).close()
    except (Impossible, KvmError) as error:
        return str(error)
    return ""
