"""explain(): which page a bare fault was for, from what the instruction may touch and which of it cannot be reached.

A fault has a page, and it is among those that the instruction, its fetch, the page tables and the delivery of an event
may touch. So where one of them alone cannot be reached, it is that one: a candidate too many costs certainty, never
truth. One too few would; so whatever may have been left out is a doubt, and with a doubt nothing is certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmexit._exits import ExitReason, Mmio
from kvmexit._memory import GuestMemfdFlags
from kvmexit._vm import VMType
from kvmexit.errors import Error, KvmError
from kvmexit.faults import _operands
from kvmexit.faults._operands import LONGEST, Access, linear
from kvmexit.faults._reach import PAGE, Cause, Host
from kvmexit.faults._state import State
from kvmexit.faults._tables import Walk, walk
from kvmexit.handlers import PASS

if TYPE_CHECKING:
    from typing import Protocol

    from kvmexit._loop import Vcpu
    from kvmexit._memory import Slot
    from kvmexit.stats import LastExit

    class _AsHost(Protocol):
        unsure: bool

        def cause(self, hva: int, write: bool, probe: bool) -> Cause | None: ...

__all__ = ["Candidate", "Explanation", "as_memory", "explain"]

PROTECTED = (VMType.SEV, VMType.SEV_ES, VMType.SNP, VMType.TDX)
_EHWPOISON = 133
_NO_FAULT = (Cause.NO_SLOT, Cause.READONLY_SLOT)  # these exit as MMIO
_GATES, _DESCRIPTORS, _TSS = 0x1000, 0x10000, 0x3000  # bytes of IDT, GDT and LDT, TSS that the processor ever looks at


@dataclass(frozen=True)
class Candidate:
    """A page that cannot be reached, and what for.

    gpa: the first guest-physical address in it that is touched. gva: the linear address that leads there; of a page
    table the one whose translation needs it; None where the exit says the gpa. access: "read", "write" or "fetch"
    ("access" where it is not known). what: in words. slot, hva: where that lies in the host, None without a slot.
    cause: why not.
    """

    gpa: int
    gva: int | None
    access: str
    what: str
    slot: Slot | None
    hva: int | None
    cause: Cause

    def __str__(self) -> str:
        at = f"gpa {self.gpa:#x}" if self.gva is None else f"gpa {self.gpa:#x} (gva {self.gva:#x})"
        where = "" if self.slot is None else f", hva {self.hva:#x} of {self.slot!r}"
        return f"{self.access} of {at}, {self.what}{where}: {self.cause.value}"


@dataclass(frozen=True)
class Explanation:
    """What a fault was for. str() is for people.

    candidates: the pages that cannot be reached, [Candidate], the likeliest first; empty where all can be. certain:
    whether it is the first one and no other. notes: why it is not certain, and what could not be looked at.
    rip, instruction: where the guest was, and what stands there, None where it was not decoded.

    gpa, gva, access, slot, hva, cause, advice: of the first candidate; None without one, cause then is NOTHING_FOUND.
    """

    candidates: tuple[Candidate, ...]
    certain: bool
    rip: int | None = None
    instruction: str | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def gpa(self) -> int | None:
        """Guest-physical address."""
        return self.candidates[0].gpa if self.candidates else None

    @property
    def gva(self) -> int | None:
        """Linear address, where one led there."""
        return self.candidates[0].gva if self.candidates else None

    @property
    def access(self) -> str | None:
        """What the guest was about to do: "read", "write" or "fetch"."""
        return self.candidates[0].access if self.candidates else None

    @property
    def slot(self) -> Slot | None:
        """The memslot."""
        return self.candidates[0].slot if self.candidates else None

    @property
    def hva(self) -> int | None:
        """Address in this process."""
        return self.candidates[0].hva if self.candidates else None

    @property
    def cause(self) -> Cause:
        """Why the page cannot be reached."""
        return self.candidates[0].cause if self.candidates else Cause.NOTHING_FOUND

    @property
    def advice(self) -> str:
        """What to do, in words."""
        return self.cause.advice

    def __str__(self) -> str:
        at = "" if self.rip is None else f" at rip {self.rip:#x}"
        at += f" ({self.instruction})" if self.instruction else ""
        if not self.candidates:
            lines = [f"the fault{at} is not explained: {self.cause.value}"]
        elif self.certain:
            lines = [f"the fault{at} is the {self.candidates[0]}"]
        else:
            lines = [f"the fault{at} may be one of these, the likeliest first:", *map(str, self.candidates)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), f"advice: {self.advice}"])


def explain(vcpu: Vcpu) -> Explanation:
    """Say why the vCPU's last exit happened: an UnexplainedFault, or a MemoryFault or Mmio, whose address is known.

    In a handler or after run() returned it; until the vCPU has been entered again. Nothing of the vCPU changes. Without
    iced-x86 (pip install 'kvmexit[faults]') an instruction's operands are guessed from the registers, and the notes say
    so. Takes milliseconds: it looks at /proc/self/smaps.

    Raises Error where the last exit was none of these, where the vCPU has moved since, and for a bare fault of a
    protected guest, whose registers or memory do not show; VcpuBusyError while another thread runs the vCPU.
    """
    _ = vcpu.pending  # VcpuBusyError
    last = vcpu.last_exits[-1:]
    if last and last[0].reason in (ExitReason.MMIO, ExitReason.MEMORY_FAULT):
        return Look(vcpu).known(last[0])
    if not last or last[0].reason is not None:
        found = f"its last exit is {last[0].reason!r}" if last else "it has not had an exit"
        raise Error(f"there is no fault of {vcpu!r} to explain: {found}")
    if vcpu.vm.type in PROTECTED:
        raise Error(f"a {vcpu.vm.type.name} guest's registers and memory do not show: its faults cannot be explained")
    look = Look(vcpu)
    rip = look.state.regs["rip"]
    if last[0].rip not in (None, rip):
        raise Error(f"the vCPU was moved after its fault, from rip {last[0].rip:#x} to {rip:#x}: explain() comes first")
    return look.bare()


def as_memory(vcpu: Vcpu, access: Mmio) -> bytes | object | None:
    """Complete an Mmio exit in a slot as the memory access that it was, once the slot can be reached again.

    A handler, `vm.on_mmio(gpa, size, handler=faults.as_memory)`; for an exit that run() returned, `mmio.data =
    faults.as_memory(vcpu, mmio)` of a read, and the call alone of a write. Raises KvmError (EFAULT) as long as the
    memory cannot be reached. What it does not take it gives PASS for: addresses in no slot, writes to read-only ones.
    """
    if access.slot is None or (access.is_write and access.slot.readonly):
        return PASS
    if access.is_write:
        vcpu.vm.memory.write(access.gpa, access.data or b"")
        return None
    return vcpu.vm.memory.read(access.gpa, access.size)


class Look:
    """One look at a vCPU. host: says what can be reached; None: the host as it is.

    found: candidates by page and access, with their ranks. doubts: why nothing is certain.
    """

    def __init__(self, vcpu: Vcpu, host: _AsHost | None = None) -> None:
        self.vcpu, self.memory = vcpu, vcpu.vm.memory
        self.slots = self.memory.slots
        self.host = Host() if host is None else host
        self.found: dict[tuple[int, bool], tuple[int, Candidate]] = {}
        self.entries: dict[int, bytes | None] = {}
        self.causes: dict[tuple[int, bool, bool], Cause | None] = {}
        self.doubts: list[str] = []
        self._state: State | None = None

    @property
    def state(self) -> State:
        if self._state is None:
            self._state = State(self.vcpu)
        return self._state

    # ---- exits that say the address ----

    def known(self, last: LastExit) -> Explanation:
        gpa, write = last.address or 0, bool(last.is_write)
        slot = self.slot_at(gpa)
        cause: Cause | None
        if last.errno == _EHWPOISON:
            cause = Cause.POISONED
        elif slot is None:
            cause = Cause.NO_SLOT if last.reason == ExitReason.MMIO else Cause.PRIVATE_HOLE
        elif last.reason == ExitReason.MEMORY_FAULT and self.memory.is_private(gpa) is (not last.private):
            cause = Cause.WRONG_SIDE
        elif last.private:
            cause = Cause.GUEST_MEMFD_CLOSED if slot.guest_memfd is None else None
        elif write and slot.readonly:
            cause = Cause.READONLY_SLOT
        else:
            cause = self.unreachable(slot, gpa, write, probe=True)
        if cause is None:
            return Explanation((), False, last.rip)
        access = "access" if last.is_write is None else "write" if write else "read"
        return Explanation((_candidate(gpa, None, access, "as the exit says", slot, cause),), True, last.rip)

    # ---- bare faults ----

    def bare(self) -> Explanation:
        state = self.state
        self.doubts += state.beyond()
        notes = []
        if state.delivering:
            notes.append("an exception or interrupt was being delivered")
            if state.protected and not state.long:
                self.doubts.append("a task switch has further accesses")
            self.touch_all(self.delivery(), FIRST)
        text = self.instruction(LATER if state.delivering else FIRST)
        if not state.delivering:
            self.touch_all(self.delivery(), LATER)
        candidates = [candidate for _, candidate in sorted(self.found.values(), key=lambda ranked: ranked[0])]
        bad = [c for c in candidates if c.cause not in _NO_FAULT]
        pages = len({c.gpa // PAGE for c in bad})
        if pages > 1:
            self.doubts.append(f"{pages} pages that it may touch cannot be reached")
        if pages == 1 and self.changed(bad[0].gva):
            self.doubts.append("the page tables changed meanwhile")
        if self.host.unsure:
            self.doubts.append("the host did not say of every page whether it can be reached")
        certain = pages == 1 and not self.doubts
        return Explanation(tuple(candidates), certain, state.regs["rip"], text, (*notes, *self.doubts))

    def instruction(self, rank: int) -> str | None:
        """Look at the fetch and the operands. -> the instruction, where it was decoded."""
        state = self.state
        code = b""
        rip = linear(state, "cs", state.regs["rip"])
        while not code or (len(code) < LONGEST and _operands.is_short(state, code)):
            at = rip + len(code) & state.mask
            gpa = self.touch(Access(at, 1, "fetch", "the instruction"), rank, ask=True)
            if gpa is None:
                return None  # it cannot be fetched, so nothing else of it happens
            data = self.read(gpa, min(LONGEST - len(code), PAGE - gpa % PAGE))
            if data is None:
                self.doubts.append("the instruction cannot be read")
                return None
            code += data
            if _operands.decoder_missing():
                self.doubts.append("iced-x86 is missing (pip install 'kvmexit[faults]'): "
                                   "operands are guessed from the registers")  # fmt: skip
                self.touch_all(self.guesses(), LATER)
                return None
        decoded = _operands.decode(state, code)
        if decoded.incomplete:
            self.doubts.append(f"{decoded.text}: {decoded.incomplete}")
        reached = None
        for access in decoded.accesses:
            if access.what == _operands.AHEAD and reached is None:
                continue  # it stopped before that
            reached = self.touch(access, rank if access.sure else LATER, ask=True)
        return decoded.text

    def guesses(self) -> Iterator[Access]:
        state = self.state
        for name in ("rsp", "rbp", "rsi", "rdi", "rax", "rbx", "rcx", "rdx", *(f"r{i}" for i in range(8, 16))):
            segment = "ss" if name in ("rsp", "rbp") else "ds"
            for kind in ("read", "write"):
                yield Access(linear(state, segment, state.regs[name]), 1, kind, f"where {name} points", False)

    def delivery(self) -> Iterator[Access]:
        """What an exception or interrupt, or a change of segments, needs: tables and stacks."""
        state = self.state

        def table(base: int, limit: int, most: int, what: str) -> Access:
            return Access(base & state.mask, min(limit + 1, most), "read", what, False)

        yield table(*state.idt, _GATES, "interrupt descriptor table")
        sp = linear(state, "ss", state.regs["rsp"] & (1 << state.stack_bits) - 1)
        yield Access(sp - 80 & state.mask, 80, "write", "stack of an exception", False)
        if not state.protected:
            return
        yield table(*state.gdt, _DESCRIPTORS, "global descriptor table")
        for name, most, what in (("ldt", _DESCRIPTORS, "local descriptor table"), ("tr", _TSS, "task state segment")):
            segment = state.segments[name]
            if segment.present:
                yield table(segment.base, segment.limit, most, what)
        for sp in self.inner_stacks():
            yield Access(sp - 256 & state.mask, 256, "write", "stack of an exception", False)

    def inner_stacks(self) -> list[int]:
        """The stack pointers in the task state segment: of rings 0 to 2, and of interrupts (64 bits)."""
        base = self.state.segments["tr"].base
        offsets, size = ((4, 12, 20, 36, 44, 52, 60, 68, 76, 84), 8) if self.state.long else ((4, 12, 20), 4)
        found = set()
        for offset in offsets:
            pointer = self.bytes_at(base + offset, size)
            found.add(int.from_bytes(pointer, "little"))
        return sorted(found - {0})

    # ---- pages ----

    def touch_all(self, accesses: Iterable[Access], rank: int) -> None:
        for access in accesses:
            self.touch(access, rank)

    def touch(self, access: Access, rank: int, ask: bool = False) -> int | None:
        """Look at each page of an access, and at the tables on the way there. ask: KVM, too, where it is.

        -> the gpa of its first byte, where that can be reached.
        """
        first = None
        gva, left = access.gva, access.size
        while left > 0:
            walked = self.walk(gva, rank)
            if ask and not walked.stuck:
                self.compare(gva, walked.gpa)
            if (
                walked.gpa is not None
                and self.look_at(walked.gpa, gva, access.kind, access.what, rank, access.sure)
                and gva == access.gva
            ):
                first = walked.gpa
            size = min(left, PAGE - gva % PAGE)
            gva, left = gva + size & self.state.mask, left - size
        return first

    def compare(self, gva: int, gpa: int | None) -> None:
        said = self.state.translate(gva)
        if said is not False and said != gpa:
            ours, kvms = ("nowhere" if at is None else f"gpa {at:#x}" for at in (gpa, said))
            self.doubts.append(f"the page tables lead from gva {gva:#x} to {ours}, and KVM_TRANSLATE says {kvms}")

    def walk(self, gva: int, rank: int) -> Walk:
        """Translate an address; each table's page is looked at."""
        walked = walk(self.state, gva, self.entry)
        for level, at in walked.tables:
            # The processor may also write there: accessed and dirty bits.
            what = f"page table of level {level} on the way there"
            if self.look_at(at, gva, "read", what, rank, False):
                self.look_at(at, gva, "write", what, LATER, False)
        return walked

    def look_at(self, gpa: int, gva: int, access: str, what: str, rank: int, sure: bool) -> bool:
        """Whether a page can be reached; else it is a candidate."""
        write = access == "write"
        slot = self.slot_at(gpa)
        if slot is not None and self.memory.is_private(gpa):
            return True  # its faults have an address
        if slot is not None and slot.readonly and write:
            cause: Cause | None = Cause.READONLY_SLOT
        else:
            cause = self.unreachable(slot, gpa, write, sure)
        if cause is None:
            return True
        if cause in _NO_FAULT:
            rank = LAST
        key = (gpa // PAGE, write)
        if (rank < LAST or sure) and rank < self.found.get(key, (LAST + 1,))[0]:
            self.found[key] = rank, _candidate(gpa, gva, access, what, slot, cause)
        return False

    def unreachable(self, slot: Slot | None, gpa: int, write: bool, probe: bool) -> Cause | None:
        if slot is None:
            return Cause.NO_SLOT
        if slot.gmem_flags & GuestMemfdFlags.MMAP and slot.guest_memfd is None:
            return Cause.GUEST_MEMFD_CLOSED  # and what lies in its place is of no use to the guest
        hva = slot.hva + gpa - slot.gpa
        key = (hva // PAGE, write, probe)
        if key not in self.causes:
            self.causes[key] = self.host.cause(hva, write, probe)
        return self.causes[key]

    def slot_at(self, gpa: int) -> Slot | None:
        for slot in self.slots:
            if slot.gpa <= gpa < slot.gpa + slot.size:
                return slot
        return None

    def entry(self, gpa: int, size: int) -> bytes | None:
        if gpa not in self.entries:
            self.entries[gpa] = self.read(gpa, size)
        return self.entries[gpa]

    def read(self, gpa: int, size: int) -> bytes | None:
        """Guest memory within a page; None where it cannot be had. Looked at first: a userfaultfd may never answer."""
        slot = self.slot_at(gpa)
        if slot is None or self.memory.is_private(gpa) or self.unreachable(slot, gpa, False, False) is not None:
            return None
        try:
            return self.memory.read(gpa, size)
        except (KvmError, ValueError):
            return None

    def bytes_at(self, gva: int, size: int) -> bytes:
        """Guest memory at a linear address; less of it, or none, where it cannot be had."""
        found = b""
        while len(found) < size:
            gva &= self.state.mask
            gpa = walk(self.state, gva, self.entry).gpa
            data = None if gpa is None else self.read(gpa, min(size - len(found), PAGE - gva % PAGE))
            if data is None:
                break
            found += data
            gva += len(data)
        return found

    def changed(self, gva: int | None) -> bool:
        """Whether the page tables lead elsewhere by now: other vCPUs run on, and so may what writes to guest memory."""
        if gva is None:
            return False
        before, self.entries = walk(self.state, gva, self.entry), {}
        return walk(self.state, gva, self.entry) != before


FIRST, LATER, LAST = range(3)  # ranks: what the instruction needs; what it may need; what would not be a bare fault


def _candidate(gpa: int, gva: int | None, access: str, what: str, slot: Slot | None, cause: Cause) -> Candidate:
    return Candidate(gpa, gva, access, what, slot, None if slot is None else slot.hva + gpa - slot.gpa, cause)
