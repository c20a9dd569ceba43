"""The cells of the grid: a kind of exit, beside so many busy Python threads, on so many vCPUs; and who answers.

Every way runs the same guest code, in a VM of its own, and is timed by the same C function at each entry into KVM
(_bench.pyx). A cell that this machine cannot do raises Impossible, with the reason.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import struct
import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from kvmexit import native, x86
from kvmexit._bench import Conversions, EntryTimes, Gate, Kicker, time_calls, time_floor, time_native
from kvmexit._exits import Exit, Hypercall, Interrupted, Io, MemoryFault, Mmio
from kvmexit._loop import Vcpu
from kvmexit._memory import GuestMemfdFlags
from kvmexit._vm import VM, VMType
from kvmexit.errors import Error, KvmError

__all__ = ["CALLS", "FULL", "KINDS", "SHORT", "WAYS", "Cell", "Impossible", "Subject", "busy", "chosen", "set_up"]

WAYS = {
    "floor": "C loop",
    "native": "kvmexit, native",
    "python": "kvmexit, Python",
    "loop": "Python ioctl loop",
}
"""Who answers: a hand-written C loop, which is the control; kvmexit with a native handler, with a Python handler; and
the loop that people write in Python."""

CODE, REGION, RAM, PAGE, PORT = 0x1000, 0x1000_0000, 1 << 20, 4096, 0x80
KVM_RUN, KVM_SET_MEMORY_ATTRIBUTES = 0xAE80, 0x4020AED2
CAP_EXIT_HYPERCALL, CAP_MEMORY_ATTRIBUTES, CAP_GUEST_MEMFD_FLAGS = 201, 233, 244
MAP_GPA_RANGE, ATTRIBUTE_PRIVATE = 12, 1 << 3
MMAP_SHARED = GuestMemfdFlags.MMAP | GuestMemfdFlags.INIT_SHARED
PATIENCE = 1.0  # seconds, for a guest's first exit


class Kind(NamedTuple):
    """An exit that a guest makes for ever: its code, and the class that it has to be."""

    code: bytes
    exit: type[Exit]
    cpl: int = 3  # some nested machines run only that natively


KINDS: dict[str, Kind] = {
    "pio_out": Kind(bytes.fromhex("e6 80 eb fc"), Io),  # again: out PORT, al; jmp again
    "pio_in": Kind(bytes.fromhex("e4 80 eb fc"), Io),  # again: in al, PORT; jmp again
    "mmio_write": Kind(bytes.fromhex("89 03 eb fc"), Mmio),  # again: mov [rbx], eax; jmp again
    "mmio_read": Kind(bytes.fromhex("8b 03 eb fc"), Mmio),  # again: mov eax, [rbx]; jmp again
    # again: mov eax, 12; vmcall; jmp again
    "hypercall": Kind(bytes.fromhex("b8 0c 00 00 00 0f 01 c1 eb f6"), Hypercall, 0),
    "memory_fault": Kind(bytes.fromhex("8b 03 eb fc"), MemoryFault),  # mov eax, [rbx], which nobody repairs
}
VMMCALL = bytes.fromhex("b8 0c 00 00 00 0f 01 d9 eb f6")  # on AMD's processors
SPIN = bytes.fromhex("eb fe")  # jmp $

CALLS = {
    "conversion": "a page made private, or shared again",
    "kick": "from kick() to the return of run()",
    "no_entry": "KVM_RUN that enters no guest",
}
"""What is no exit: timed from a call to its return."""


class Cell(NamedTuple):
    """kind: one of KINDS or CALLS. busy: Python threads that compute all the time. vcpus: that exit at once."""

    kind: str
    busy: int
    vcpus: int

    @property
    def name(self) -> str:
        """As --only takes it."""
        return f"{self.kind}/{f'busy{self.busy}' if self.busy else 'idle'}/{self.vcpus}"


CORES = len(os.sched_getaffinity(0))
SHORT = tuple(Cell(kind, busy, 1) for kind in ("pio_out", "mmio_read", "memory_fault") for busy in (0, 1))
FULL = tuple(
    Cell(kind, busy, vcpus)
    for kind in (*KINDS, *CALLS)
    for vcpus in dict.fromkeys((1, CORES) if kind in KINDS else (1,))
    for busy in (0, 1, 2)
)


def chosen(full: bool, only: list[str] | None) -> list[Cell]:
    """The cells that are asked for, by patterns of names such as "pio_*/idle/1" or "kick".

    A pattern without a slash names kinds; if not `full`, beside no and one busy thread and on one vCPU. ValueError for
    one that matches nothing.
    """
    if only is None:
        return list(FULL if full else SHORT)
    cells: dict[Cell, None] = {}
    for pattern in only:
        found = [
            cell for cell in FULL
            if fnmatchcase(cell.name, pattern)
            or (fnmatchcase(cell.kind, pattern) and (full or (cell.busy < 2 and cell.vcpus == 1)))
        ]  # fmt: skip
        if not found:
            raise ValueError(f"no cell is called {pattern!r}: they are {', '.join(cell.name for cell in FULL)}")
        cells |= dict.fromkeys(found)
    return [cell for cell in FULL if cell in cells]


class Impossible(Exception):
    """Something that this machine cannot do: the reason."""


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """So many Python threads that compute all the time."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            sum(range(1000))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        stop.set()
        for worker in workers:
            worker.join()


class Subject(ABC):
    """One way to answer one kind of exits, ready to run: `turn()` for each of its vCPUs."""

    vcpus: int = 1

    @abstractmethod
    def turn(self, vcpu: int, exits: int, gate: Gate | None = None) -> array[int]:
        """So many samples, in ns; fewer where it was cancelled. gate: where the vCPUs of a turn wait for each other."""

    def cancel(self) -> None:  # noqa: B027
        """End the turn in progress, where it takes long. Any thread."""

    def split(self, exits: int, seconds: float) -> dict[str, float] | None:
        """Where an exit's time goes, ns on average: of kvmexit's ways, measured apart, since it costs some itself."""
        return None


def set_up(stack: ExitStack, cell: Cell, way: str, device: str) -> Subject:
    """Make the VM, and see that the guest does what it should. Impossible, with the reason."""
    try:
        if cell.kind in KINDS:
            return Exits(stack, cell, way, device)
        made: dict[str, Callable[[ExitStack, str, str], Subject]] = {
            "kick": Kicks, "no_entry": NoEntries, "conversion": Conversion}  # fmt: skip
        return made[cell.kind](stack, way, device)
    except KvmError as error:
        raise Impossible(str(error)) from error


def start(vm: VM, id: int, code: bytes, cpl: int) -> Vcpu:
    """A vCPU about to run `code` in long mode, rbx at REGION."""
    if not vm.memory.slots or vm.memory.slots[0].gpa:
        vm.memory.add(0, RAM)
        vm.memory.write(CODE, code)
    vcpu = vm.create_vcpu(id)
    x86.long_mode(vcpu, CODE, cpl=cpl)
    vcpu.regs.rbx = REGION
    return vcpu


def on_amd() -> bool:
    return re.search(r"^vendor_id\s*: (AuthenticAMD|HygonGenuine)", Path("/proc/cpuinfo").read_text(), re.M) is not None


# ---- exits ----


class Exits(Subject):
    """A guest's exits, from one entry to the next."""

    def __init__(self, stack: ExitStack, cell: Cell, way: str, device: str) -> None:
        self.kind, self.way, self.vcpus = cell.kind, way, cell.vcpus
        code, expected, cpl = KINDS[cell.kind]
        vm = stack.enter_context(faulting_vm(device) if cell.kind == "memory_fault" else VM(device=device))
        if cell.kind == "hypercall":
            if not vm.check(CAP_EXIT_HYPERCALL) >> MAP_GPA_RANGE & 1:
                raise Impossible("this KVM has no KVM_CAP_EXIT_HYPERCALL for KVM_HC_MAP_GPA_RANGE (Linux 5.14)")
            vm.enable(CAP_EXIT_HYPERCALL, 1 << MAP_GPA_RANGE)
            code = VMMCALL if on_amd() else code
        self.vm, self.cpus = vm, [start(vm, id, code, cpl) for id in range(cell.vcpus)]
        for vcpu in self.cpus:
            self.first_exit(vcpu, expected)
        self.times = [EntryTimes(vcpu) for vcpu in self.cpus]
        if way in ("native", "python"):
            in_python = give if cell.kind in ("pio_in", "mmio_read", "hypercall") else take
            self.register(native.Ignore() if way == "native" else in_python)
        else:
            for vcpu in self.cpus:
                vcpu.sync = 0  # who writes the loop by hand does not ask for registers
        page = [stack.enter_context(mmap.mmap(vcpu.fd, 3 * PAGE, mmap.MAP_SHARED)) for vcpu in self.cpus]
        self.pages = page if way == "loop" else []

    def first_exit(self, vcpu: Vcpu, expected: type[Exit]) -> None:
        """See that the guest exits as it should, and answer that: KVM has the registers then."""
        vcpu.fault_limit = 0
        if self.kind == "hypercall":
            vcpu.regs.rcx, vcpu.regs.rdx = 1, 0
        exit = vcpu.run(timeout=PATIENCE)
        if isinstance(exit, Interrupted):
            raise Impossible(f"the guest's instruction does not exit on this machine: nothing came in {PATIENCE:g} s")
        if not isinstance(exit, expected):
            raise Impossible(f"the guest's instruction leads to {exit!r}")
        if isinstance(exit, Hypercall):
            exit.ret = 0
        elif isinstance(exit, Io | Mmio) and not exit.is_write:
            exit.data = bytes(exit.size)
        vcpu.complete()

    def register(self, handler: Any) -> None:
        """One route, of the kind that a VMM would have."""
        if self.kind.startswith("pio"):
            self.vm.on_pio(PORT, 1, handler)
        elif self.kind.startswith("mmio"):
            self.vm.on_mmio(REGION, PAGE, handler)
        elif self.kind == "hypercall":
            self.vm.on_hypercall(MAP_GPA_RANGE, handler)
        else:
            self.vm.on_memory_fault(handler=handler)

    def turn(self, vcpu: int, exits: int, gate: Gate | None = None) -> array[int]:
        times = self.times[vcpu]
        times.begin(exits, gate)
        if self.way == "floor":
            times.floor()
        elif self.way == "loop":
            ioctl_loop(times, self.cpus[vcpu].fd, self.pages[vcpu])
        else:
            last = self.cpus[vcpu].run()
            if not isinstance(last, Interrupted):
                raise Error(f"{last!r} in the middle of a measurement")
        return times.intervals()

    def cancel(self) -> None:
        for times in self.times:
            times.cancel()

    def split(self, exits: int, seconds: float) -> dict[str, float] | None:
        if self.way not in ("native", "python"):
            return None
        before, self.vm.timing = self.vm.stats, True
        begun, turns, samples = time.monotonic(), 0, 0
        while not samples or time.monotonic() - begun < seconds:
            turns, samples = turns + 1, samples + len(self.turn(0, exits))
        self.vm.timing = False
        stats = self.vm.stats - before
        phases = {"kvm": stats.kvm, "native": stats.native, "gil": stats.gil, "python": stats.python}
        if stats.gil.count <= turns:  # no exit needed Python: only that run() returned when a turn ended
            del phases["gil"], phases["python"]
        return dict.fromkeys(("kvm", "native", "gil", "python"), 0.0) | {
            phase: round(times.total / max(samples, 1), 1) for phase, times in phases.items()}  # fmt: skip


def take(vcpu: Vcpu, exit: Exit) -> None:
    """A handler in Python, of writes and faults."""


def give(vcpu: Vcpu, exit: Exit) -> int:
    """A handler in Python, of reads and hypercalls."""
    return 0


def ioctl_loop(times: EntryTimes, fd: int, page: mmap.mmap) -> None:
    """The loop that people write in Python."""
    ioctl, unpack = times.ioctl, struct.unpack_from
    while True:
        try:
            ioctl(fd, KVM_RUN)
        except InterruptedError:
            if times.full:
                return
            continue
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
        (reason,) = unpack("<I", page, 8)
        if reason == 2:  # KVM_EXIT_IO
            direction, size, _port, count, offset = unpack("<BBHIQ", page, 32)
            if direction == 0:
                page[offset : offset + size * count] = bytes(size * count)
        elif reason == 6:  # KVM_EXIT_MMIO
            _gpa, _data, size, is_write = unpack("<Q8sIB", page, 32)
            if not is_write:
                page[40 : 40 + size] = bytes(size)
        elif reason == 3:  # KVM_EXIT_HYPERCALL
            unpack("<7Q", page, 32)
            page[88:96] = bytes(8)
        elif reason == 39:  # KVM_EXIT_MEMORY_FAULT
            unpack("<3Q", page, 32)
        else:
            raise Error(f"exit reason {reason} in the middle of a measurement")


def faulting_vm(device: str) -> VM:
    """A VM whose page at REGION KVM cannot map: it says so with KVM_EXIT_MEMORY_FAULT, again and again."""
    try:
        vm = private_vm(device)
    except Impossible:
        vm = VM(device=device)
        if vm.check(CAP_GUEST_MEMFD_FLAGS) & MMAP_SHARED == MMAP_SHARED:
            vm.memory.add(REGION, PAGE, guest_memfd=True, gmem_flags=MMAP_SHARED).close_guest_memfd()
            return vm
        vm.close()
        raise Impossible(
            "no memory that this KVM would report as KVM_EXIT_MEMORY_FAULT: that needs private memory, or a "
            "guest_memfd in an ordinary VM (Linux 6.18)") from None
    vm.memory.add(REGION, PAGE)  # private, without a guest_memfd
    vm.ioctl(KVM_SET_MEMORY_ATTRIBUTES, struct.pack("<4Q", REGION, PAGE, ATTRIBUTE_PRIVATE, 0))
    return vm


def private_vm(device: str) -> VM:
    """One with private memory, or Impossible."""
    try:
        vm = VM(VMType.SW_PROTECTED, device=device)
    except KvmError as error:
        if error.errno != errno.EINVAL:
            raise
        raise Impossible("this kernel has no VM type with private memory (CONFIG_KVM_SW_PROTECTED_VM)") from None
    if not vm.check(CAP_MEMORY_ATTRIBUTES) & ATTRIBUTE_PRIVATE:
        vm.close()
        raise Impossible("this kernel has no memory attributes")
    return vm


# ---- what is no exit ----


class NoEntries(Subject):
    """KVM_RUN with immediate_exit: what userspace and the system call cost by themselves."""

    def __init__(self, stack: ExitStack, way: str, device: str) -> None:
        self.way = way
        self.vm = stack.enter_context(VM(device=device))
        self.vcpu = start(self.vm, 0, SPIN, 3)
        self.vcpu.run(timeout=0)
        self.page = stack.enter_context(mmap.mmap(self.vcpu.fd, 3 * PAGE, mmap.MAP_SHARED))
        if way in ("floor", "loop"):
            self.vcpu.sync = 0

    def turn(self, vcpu: int, exits: int, gate: Gate | None = None) -> array[int]:
        if self.way == "floor":
            return time_floor(self.vcpu, exits)
        if self.way == "native":
            return time_native(self.vcpu, exits)
        return time_calls(self.by_kvmexit if self.way == "python" else self.by_hand, exits)

    def by_kvmexit(self) -> None:
        self.vcpu.run(0)

    def by_hand(self) -> None:
        self.page[1] = 1  # immediate_exit
        self.enter()

    def enter(self) -> None:
        while True:
            try:
                fcntl.ioctl(self.vcpu.fd, KVM_RUN)
            except InterruptedError:
                if self.page[1]:
                    break  # else a signal that is no kick's
            else:
                raise Error("KVM_RUN came back by itself in the middle of a measurement")
        self.page[1] = 0


class Kicks(NoEntries):
    """A guest that spins, kicked by another thread 0.1 ms after it was entered: from the kick to the return."""

    def turn(self, vcpu: int, exits: int, gate: Gate | None = None) -> array[int]:
        kicker = Kicker(self.vcpu, self.way in ("native", "python"))
        thread = threading.Thread(target=kicker.serve, daemon=True)
        thread.start()
        try:
            if self.way == "floor":
                return time_floor(self.vcpu, exits, kicker)
            if self.way == "native":
                return time_native(self.vcpu, exits, kicker)
            return time_calls(self.by_kvmexit if self.way == "python" else self.enter, exits, kicker)
        finally:
            kicker.stop()
            thread.join()

    def by_kvmexit(self) -> None:
        exit = self.vcpu.run()
        if not isinstance(exit, Interrupted):
            raise Error(f"{exit!r} in the middle of a measurement")


class Conversion(Subject):
    """A page that turns private and shared again, with nothing in it: attributes, and the discard of the other side."""

    def __init__(self, stack: ExitStack, way: str, device: str) -> None:
        self.way = way
        self.vm = stack.enter_context(private_vm(device))
        self.slot = self.vm.memory.add(REGION, RAM, guest_memfd=True)
        if self.slot.guest_memfd is None:
            raise Impossible("no guest_memfd")
        self.vcpu = self.vm.create_vcpu()
        self.raw = Conversions(self.vcpu, self.vm.fd, REGION, self.slot.hva, self.slot.guest_memfd, 0)
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.private = False

    def turn(self, vcpu: int, exits: int, gate: Gate | None = None) -> array[int]:
        exits += exits % 2  # it ends as it began
        if self.way == "floor":
            return self.raw.floor(exits)
        if self.way == "native":
            return self.raw.native(exits)
        return time_calls(self.by_kvmexit if self.way == "python" else self.by_hand, exits)

    def by_kvmexit(self) -> None:
        self.private = not self.private
        self.vm.memory.convert(REGION, PAGE, private=self.private)

    def by_hand(self) -> None:
        self.private = not self.private
        fcntl.ioctl(self.vm.fd, KVM_SET_MEMORY_ATTRIBUTES,
                    struct.pack("<4Q", REGION, PAGE, ATTRIBUTE_PRIVATE if self.private else 0, 0))
        if self.private:
            done = self.libc.madvise(ctypes.c_void_p(self.slot.hva), ctypes.c_size_t(PAGE), mmap.MADV_DONTNEED)
        else:  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
            done = self.libc.fallocate(self.slot.guest_memfd, 3, ctypes.c_long(0), ctypes.c_long(PAGE))
        if done:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
