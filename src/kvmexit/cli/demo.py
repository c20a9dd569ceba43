"""`kvmexit demo`: the main job on real input.

A guest walks a region of memory that KVM cannot map. Its faults reach a short callback, which repairs them; the guest
goes on to the end, and then its memory is checked. The scenario is the first of SCENARIOS that this machine can play.
"""

from __future__ import annotations

import argparse
import inspect
import os
import platform
import struct
import sys
import textwrap
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable

from kvmexit import x86
from kvmexit._exits import Exit, Io, MemoryFault, UnexplainedFault
from kvmexit._loop import Vcpu
from kvmexit._memory import GuestMemfdFlags
from kvmexit._version import __version__
from kvmexit._vm import VM, VMType
from kvmexit.errors import Error
from kvmexit.testing import ScriptedVM, memory_fault, pio_out

__all__ = ["add_to"]

PAGE = 4096
CODE = 0x1000
REGION = 0x1000_0000
CHUNK = 16 * PAGE
MEMORY_ATTRIBUTE_PRIVATE = 1 << 3
MMAP_SHARED = GuestMemfdFlags.MMAP | GuestMemfdFlags.INIT_SHARED
PROGRESS_PORT, DONE_PORT = 0x3F8, 0xF4

# At CPL 3, since some nested machines run only that natively.
# Every page gets its own address added to its first 8 bytes.
GUEST = bytes.fromhex(
    "48 8b 03"  # walk: mov rax, [rbx]
    "48 01 d8"  # add rax, rbx
    "48 89 03"  # mov [rbx], rax
    "48 89 d8"  # mov rax, rbx
    "66 ba f8 03"  # mov dx, PROGRESS_PORT
    "ee"  # out dx, al
    "48 81 c3 00 10 00 00"  # add rbx, PAGE
    "48 39 cb"  # cmp rbx, rcx
    "72 e3"  # jb walk
    "e6 f4"  # out DONE_PORT, al
)


class Clock:
    """Times of exits, by kind: in KVM (from the last answer to the exit, guest code included) and in the callback."""

    def __init__(self) -> None:
        self.in_kvm: dict[str, list[int]] = defaultdict(list)
        self.in_callback: dict[str, list[int]] = defaultdict(list)
        self.left = time.perf_counter_ns()

    def timed(self, handler: Callable[[Vcpu, Exit], None]) -> Callable[[Vcpu, Exit], None]:
        """The handler, timed."""

        def timed(vcpu: Vcpu, exit: Exit) -> None:
            entered = time.perf_counter_ns()
            self.in_kvm[type(exit).__name__].append(entered - self.left)
            handler(vcpu, exit)
            self.left = time.perf_counter_ns()
            self.in_callback[type(exit).__name__].append(self.left - entered)

        return timed

    def table(self) -> str:
        """A line a kind: count, and percentiles in microseconds."""
        lines = [f"{'exit':<18}{'count':>8}{'in KVM p50':>13}{'p99':>9}{'callback p50':>15}{'p99':>9}   (us)"]
        for kind in sorted(self.in_kvm):
            times = [percentile(t, p) for t in (self.in_kvm[kind], self.in_callback[kind]) for p in (50, 99)]
            count = len(self.in_kvm[kind])
            lines.append(f"{kind:<18}{count:>8}{times[0]:>13.1f}{times[1]:>9.1f}{times[2]:>15.1f}{times[3]:>9.1f}")
        return "\n".join(lines)


def percentile(times_ns: list[int], p: int) -> float:
    """The p-th percentile (nearest rank), in microseconds."""
    ordered = sorted(times_ns)
    return ordered[max(0, -(-len(ordered) * p // 100) - 1)] / 1000


class Scenario(ABC):
    """One way in which memory goes missing, and its repair."""

    name: str
    story: str
    fault: type[Exit] = MemoryFault

    def __init__(self, pages: int) -> None:
        self.size = pages * PAGE
        self.vm: VM = self.make_vm()

    def make_vm(self) -> VM:
        """The VM that the guest runs in; Error where this machine has none."""
        return VM()

    def make_vcpu(self) -> Vcpu:
        """A vCPU about to walk the region."""
        ram = self.vm.memory.add(0, 1 << 20)
        ram[CODE : CODE + len(GUEST)] = GUEST
        vcpu = self.vm.create_vcpu()
        x86.long_mode(vcpu, CODE, cpl=3)
        vcpu.regs.rbx, vcpu.regs.rcx = REGION, REGION + self.size
        return vcpu

    @abstractmethod
    def lose(self) -> None:
        """Add the region, in a state that KVM cannot map."""

    @abstractmethod
    def repair(self, vcpu: Vcpu, fault: Exit) -> None:
        """The callback."""


class PrivateToShared(Scenario):
    """Reason 39 with the private flag, as a confidential guest raises it: VMs that have private memory.

    A software-protected VM takes an access for private or shared as the attribute says, so the two never disagree
    there: its faults come from private pages whose guest_memfd is gone.
    """

    name = "private"
    story = (
        "the region is private, and its guest_memfd was closed; the callback converts what the guest touches to shared "
        "(KVM_EXIT_MEMORY_FAULT)"
    )

    def make_vm(self) -> VM:
        vm = VM(VMType.SW_PROTECTED)
        if not vm.check(233) & MEMORY_ATTRIBUTE_PRIVATE:  # KVM_CAP_MEMORY_ATTRIBUTES
            vm.close()
            raise Error("this kernel has no memory attributes")
        return vm

    def lose(self) -> None:
        slot = self.vm.memory.add(REGION, self.size, guest_memfd=True)
        self.vm.memory.convert(REGION, self.size, private=True)
        slot.close_guest_memfd()

    def repair(self, vcpu: Vcpu, fault: Exit) -> None:
        assert isinstance(fault, MemoryFault)
        assert fault.private
        vcpu.vm.memory.convert(fault.gpa // CHUNK * CHUNK, CHUNK, private=False)


class GuestMemfdGone(Scenario):
    """Reason 39 on an ordinary VM, Linux 6.18 or later."""

    name = "guest-memfd"
    story = "the region's guest_memfds were closed; the callback binds new ones (KVM_EXIT_MEMORY_FAULT)"

    def make_vm(self) -> VM:
        vm = VM()
        if vm.check(244) & MMAP_SHARED != MMAP_SHARED:  # KVM_CAP_GUEST_MEMFD_FLAGS
            vm.close()
            raise Error("this kernel has no guest_memfd that an ordinary VM can map (Linux 6.18)")
        return vm

    def lose(self) -> None:
        for gpa in range(REGION, REGION + self.size, CHUNK):
            slot = self.vm.memory.add(gpa, CHUNK, guest_memfd=True, gmem_flags=MMAP_SHARED)
            slot.close_guest_memfd()

    def repair(self, vcpu: Vcpu, fault: Exit) -> None:
        assert isinstance(fault, MemoryFault)
        gpa = fault.gpa // CHUNK * CHUNK
        vcpu.vm.memory.remove(gpa)
        vcpu.vm.memory.add(gpa, CHUNK, guest_memfd=True, gmem_flags=MMAP_SHARED)


class FileTruncated(Scenario):
    """A bare EFAULT: every kernel."""

    name = "truncated-file"
    story = (
        "the file behind the region was truncated; the callback extends it "
        "(bare EFAULT, no address: the guest's rbx has it)"
    )
    fault = UnexplainedFault

    def lose(self) -> None:
        self.file = os.memfd_create("kvmexit-demo", os.MFD_CLOEXEC)
        os.ftruncate(self.file, self.size)
        self.vm.memory.add(REGION, self.size, fd=self.file)
        os.ftruncate(self.file, 0)

    def repair(self, vcpu: Vcpu, fault: Exit) -> None:
        offset = vcpu.regs.rbx - REGION
        os.ftruncate(self.file, offset // CHUNK * CHUNK + CHUNK)


class Scripted(Scenario):
    """No kernel: exits from a list. What the guest would do to memory, the script's faults do here."""

    name = "scripted"
    story = "no guest runs: a scripted vCPU's faults, and the callback adds the memory they miss"

    def make_vm(self) -> VM:
        return ScriptedVM()

    def make_vcpu(self) -> Vcpu:
        steps = []
        for gpa in range(REGION, REGION + self.size, PAGE):
            if gpa % CHUNK == 0:
                steps.append(memory_fault(gpa, rip=CODE))
            steps.append(pio_out(PROGRESS_PORT, struct.pack("<Q", gpa)[:1]))
        steps.append(pio_out(DONE_PORT, b"\0"))
        assert isinstance(self.vm, ScriptedVM)
        return self.vm.create_vcpu(0, steps)

    def lose(self) -> None:
        pass

    def repair(self, vcpu: Vcpu, fault: Exit) -> None:
        assert isinstance(fault, MemoryFault)
        slot = vcpu.vm.memory.add(fault.gpa, CHUNK)
        for offset in range(0, CHUNK, PAGE):
            slot[offset : offset + 8] = struct.pack("<Q", fault.gpa + offset)


SCENARIOS: tuple[type[Scenario], ...] = (PrivateToShared, GuestMemfdGone, FileTruncated, Scripted)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser("demo", help="a guest's memory faults, repaired by a callback", description=__doc__)
    parser.add_argument("--pages", type=int, default=2048, help="pages the guest walks, a multiple of 16 (2048)")
    parser.add_argument("--scenario", choices=[s.name for s in SCENARIOS], help="this one, or fail")
    parser.set_defaults(run=run)


def choose(name: str | None, pages: int) -> Scenario:
    """The named scenario, or the first that this machine can play; says why others cannot."""
    candidates = [s for s in SCENARIOS if name in (None, s.name)]
    for candidate in candidates[:-1]:
        try:
            return candidate(pages)
        except Error as error:
            print(f"not {candidate.name}: {error}")
    return candidates[-1](pages)


def run(options: argparse.Namespace) -> int:
    """Play a scenario; 0 if the guest's memory is right in the end."""
    if options.pages < 16 or options.pages % 16:
        print(f"kvmexit demo: --pages {options.pages} is not a positive multiple of 16", file=sys.stderr)
        return 2
    host = platform.uname()
    print(f"kvmexit {__version__}, Python {platform.python_version()}, Linux {host.release}, {host.machine}")
    scenario = choose(options.scenario, options.pages)
    with scenario.vm as vm:
        return play(scenario, vm)


def play(scenario: Scenario, vm: VM) -> int:
    """Run the guest through and check its memory."""
    print(f"{scenario.name}: {scenario.story}\n")
    print(textwrap.indent(textwrap.dedent(inspect.getsource(type(scenario).repair)), "    "))
    scenario.lose()
    vcpu = scenario.make_vcpu()
    clock = Clock()
    reached = 0

    def progress(vcpu: Vcpu, exit: Exit) -> None:
        nonlocal reached
        reached += 1

    vm.on(scenario.fault, clock.timed(scenario.repair))
    vm.on_pio(PROGRESS_PORT, 1, clock.timed(progress))
    clock.left = time.perf_counter_ns()
    last = vcpu.run(timeout=60)
    print(clock.table())
    pages = range(REGION, REGION + scenario.size, PAGE)
    wrong = [gpa for gpa in pages if vm.memory.read(gpa, 8) != struct.pack("<Q", gpa)]
    finished = isinstance(last, Io) and last.port == DONE_PORT
    print(f"\nguest {'finished' if finished else f'stopped at {last!r}'}, ", end="")
    print(f"{reached} of {len(pages)} pages walked, {len(pages) - len(wrong)} of them right", end="")
    print(f"; first wrong: {wrong[0]:#x}" if wrong else "")
    return 0 if finished and not wrong and reached == len(pages) else 1
