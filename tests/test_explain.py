"""explain(): which page a bare fault is for, and why it cannot be reached."""

import ctypes
import errno
import os
import random
import struct
import sys
import threading
import types
from typing import NamedTuple

import explain_matrix as matrix
import pytest
from explain_matrix import BAD, CASES, PAGE, SPARE, spoil
from guests import CODE, STRESS, load, stress

import kvmexit
from kvmexit import faults
from kvmexit.faults import Cause, _explain, _reach
from kvmexit.faults._state import State
from kvmexit.faults._tables import walk
from kvmexit.testing import failure, hlt, memory_fault, mmio_read, mmio_write, spin

# ---- real guests: 64-bit code at CPL 3 ----


def test_the_matrix_of_instructions_and_causes(kvm, iced):
    """Each is right and certain. A fault that comes as another exit, or is none, is none to explain: but they are few."""
    found = list(matrix.results(CASES[:: max(1, int(1 / STRESS)) if STRESS < 1 else 1]))
    print(matrix.table(found))
    explained = [result for result in found if result.said is not None]
    assert [result for result in explained if not (result.said.certain and result.right)] == []
    assert len(explained) >= 0.9 * len(found)
    assert len({result.case.name for result in explained}) >= 40 or STRESS < 1


def test_what_is_named_is_what_repairs_the_fault(vm, iced):
    """Random registers over a field of good and bad pages. All that is named is repaired: the fault is never the same again;
    and where it is certain, there is but one page."""
    pages, spared = 16, ("ret", "iret", "call", "jmp", "leave", "div", "lock cmpxchg16b", "movaps", "fxsave", "push", "pop", "enter")
    vcpu = load(vm, b"", stack=0x9000)
    field = vm.memory.add(BAD, pages * PAGE)
    usable = [case for case in CASES if case.code and not case.feature and not case.name.startswith(spared)]
    chance, certain, uncertain = random.Random(7), 0, 0
    for _ in range(stress(150)):
        case = chance.choice(usable)
        vm.memory.write(CODE, bytes.fromhex(case.code) + bytes.fromhex("e6f4"))  # and out 0xf4, al
        vcpu.regs.rip, vcpu.regs.rflags = CODE, 0x3002
        for name in ("rax", "rbx", "rcx", "rsi", "rdi"):
            setattr(vcpu.regs, name, BAD + PAGE * chance.randrange(1, pages - 1) + chance.randrange(-16, 16))
        if "rep" in case.name or "[rbx+rcx" in case.name:
            vcpu.regs.rcx = chance.randrange(300)
        if case.name.startswith(("bt", "xlat")):
            vcpu.regs.rax = chance.randrange(8 * PAGE)
        for page in range(pages):
            prot(field.hva + page * PAGE, chance.choice((0, 1, 3, 3)))
        exit = vcpu.run(timeout=10)
        while isinstance(exit, kvmexit.UnexplainedFault):
            said = exit.explain(vcpu)
            named = {candidate.hva // PAGE * PAGE for candidate in said.candidates}
            assert len(named) == 1 if said.certain else len(named) != 1, str(said)
            certain, uncertain = certain + said.certain, uncertain + (not said.certain)
            before = registers(vcpu)
            for hva in named:
                prot(hva, 3)
            exit = vcpu.run(timeout=10)
            assert not isinstance(exit, kvmexit.UnexplainedFault) or registers(vcpu) != before, str(said)
        assert isinstance(exit, kvmexit.Io), (case, exit)
    prot(field.hva, 3, pages)
    assert certain > uncertain > 0


def prot(hva, protection, pages=1):
    """mprotect."""
    assert matrix.libc.mprotect(ctypes.c_void_p(hva), ctypes.c_size_t(pages * PAGE), protection) == 0


def registers(vcpu):
    """All general ones."""
    return repr(vcpu.regs)


def test_two_pages_that_may_have_been_it_are_no_certainty(vm, iced):
    """movsb between two bad pages: both are named, and the note says why neither is certain."""
    vcpu = load(vm, bytes.fromhex("a4"))
    slot = vm.memory.add(BAD, 2 * PAGE)
    vcpu.regs.rsi, vcpu.regs.rdi = BAD + 8, BAD + PAGE + 8
    prot(slot.hva, 0, 2)
    said = vcpu.run(timeout=10).explain(vcpu)
    assert not said.certain
    assert [(c.gpa, c.access) for c in said.candidates] == [(BAD + 8, "read"), (BAD + PAGE + 8, "write")]
    assert "2 pages" in said.notes[-1]
    assert "may be one of these" in str(said)
    prot(slot.hva, 3, 2)


def test_in_a_handler_it_is_explained_repaired_and_goes_on(vm, iced):
    """And nothing of the vCPU is different afterwards."""
    vcpu = load(vm, bytes.fromhex("8a03 e6f4"))
    slot = vm.memory.add(BAD, PAGE)
    slot[5] = 0x21
    vcpu.regs.rbx = BAD + 5
    prot(slot.hva, 0)
    seen = []

    @vm.on(kvmexit.UnexplainedFault)
    def repair(vcpu, fault):
        before = registers(vcpu), repr(vcpu.sregs), repr(vcpu.events)
        said = faults.explain(vcpu)
        assert said == fault.explain(vcpu)
        assert (registers(vcpu), repr(vcpu.sregs), repr(vcpu.events)) == before
        seen.append(said)
        prot(said.hva - said.hva % PAGE, 3)

    assert vcpu.run(timeout=10).data == b"\x21"
    (said,) = seen
    assert (said.gpa, said.gva, said.access, said.slot, said.hva) == (BAD + 5, BAD + 5, "read", slot, slot.hva + 5)
    assert (said.cause, said.certain, said.rip, said.notes) == (Cause.PROT_NONE, True, CODE, ())
    assert "mprotect" in said.advice
    for part in ("0x1000 (mov al,[rbx])", f"gpa {BAD + 5:#x}", f"hva {slot.hva + 5:#x}", "PROT_NONE", "advice: "):
        assert part in str(said)


def test_after_the_vcpu_went_on_there_is_nothing_to_explain(vm, iced):
    """Nor of another vCPU, nor where it was moved."""
    vcpu = load(vm, bytes.fromhex("8a03 e6f4 f4"))
    slot = vm.memory.add(BAD, PAGE)
    vcpu.regs.rbx = BAD
    prot(slot.hva, 0)
    fault = vcpu.run(timeout=10)
    other = vm.create_vcpu(7)
    with pytest.raises(kvmexit.NotPendingError, match="is not what .* stands at"):
        fault.explain(other)
    with pytest.raises(kvmexit.Error, match="has not had an exit"):
        faults.explain(other)
    vcpu.regs.rip += 2
    with pytest.raises(kvmexit.Error, match="was moved after its fault, from rip 0x1000 to 0x1002"):
        fault.explain(vcpu)
    vcpu.regs.rip -= 2
    assert fault.explain(vcpu).certain
    prot(slot.hva, 3)
    assert isinstance(vcpu.run(timeout=10), kvmexit.Io)
    with pytest.raises(kvmexit.NotPendingError):
        fault.explain(vcpu)
    with pytest.raises(kvmexit.Error, match="no fault of .* to explain: its last exit is <ExitReason.IO"):
        faults.explain(vcpu)


def test_what_was_repaired_meanwhile_is_said_to_be_so(vm, iced):
    """No candidate, and no certainty."""
    vcpu = load(vm, bytes.fromhex("8a03 e6f4"))
    slot = vm.memory.add(BAD, PAGE)
    vcpu.regs.rbx = BAD
    prot(slot.hva, 0)
    fault = vcpu.run(timeout=10)
    prot(slot.hva, 3)
    said = fault.explain(vcpu)
    assert (said.candidates, said.certain, said.cause, said.gpa) == ((), False, Cause.NOTHING_FOUND, None)
    assert (said.gva, said.access, said.slot, said.hva) == (None,) * 4
    assert "is not explained" in str(said)


def test_without_iced_the_answer_is_reduced_and_says_so(vm, monkeypatch):
    """A register that points into bad memory is a candidate; a fetch is certain all the same."""
    monkeypatch.setitem(sys.modules, "iced_x86", None)
    vcpu = load(vm, bytes.fromhex("8a03 e6f4"))
    slot = vm.memory.add(BAD, PAGE)
    vcpu.regs.rbx = BAD + 5
    prot(slot.hva, 0)
    said = vcpu.run(timeout=10).explain(vcpu)
    assert (said.certain, said.gpa, said.candidates[0].what, said.instruction) == (False, BAD + 5, "where rbx points", None)
    assert "pip install 'kvmexit[faults]'" in str(said)
    vcpu.regs.rip, vcpu.regs.rbx = BAD + 9, 0
    said = vcpu.run(timeout=10).explain(vcpu)
    assert (said.certain, said.gpa, said.access) == (True, BAD + 9, "fetch")
    prot(slot.hva, 3)


def test_translation_is_kvms(vm):
    """Our walk of the tables and KVM_TRANSLATE agree, mapped or not."""
    vcpu = load(vm, bytes.fromhex("f4"), cpl=0)
    assert isinstance(vcpu.run(timeout=10), kvmexit.Hlt)
    state = State(vcpu)
    for gva in (0, CODE + 5, 0xFFFFF, 0x12345678, 0xFFFFFFFF, 1 << 32, 1 << 47, (1 << 64) - 4096):
        assert walk(state, gva, vm.memory.read).gpa == state.translate(gva), hex(gva)


USERFAULTFD, USER_MODE_ONLY = 323, 1


def test_a_userfaultfd_is_not_waited_for(vm, iced):
    """It holds the page back, and does not answer the kernel: MADV_POPULATE would wait for ever."""
    vcpu = load(vm, bytes.fromhex("8a03 e6f4"))
    slot = vm.memory.add(BAD, 2 * PAGE)
    fd = matrix.libc.syscall(USERFAULTFD, os.O_CLOEXEC | USER_MODE_ONLY)
    if fd < 0:
        pytest.skip("this kernel has no userfaultfd")
    assert matrix.libc.ioctl(fd, ctypes.c_ulong(0xC018AA3F), struct.pack("<QQQ", 0xAA, 0, 0)) == 0  # UFFDIO_API
    register = ctypes.create_string_buffer(struct.pack("<QQQQ", slot.hva + PAGE, PAGE, 1, 0))
    assert matrix.libc.ioctl(fd, ctypes.c_ulong(0xC020AA00), register) == 0  # missing pages
    vcpu.regs.rbx = BAD + PAGE + 3
    said = vcpu.run(timeout=10).explain(vcpu)
    assert (said.certain, said.gpa, said.cause) == (True, BAD + PAGE + 3, Cause.USERFAULTFD)
    os.close(fd)
    assert vcpu.run(timeout=10).data == b"\0"


# ---- other modes: crafted tables; KVM_RUN's answer is scripted, so nothing depends on the host's processor ----


class Mode(NamedTuple):
    """How the tables of a mode are laid out. levels: (bits of the index, bytes of an entry) from the root down."""

    bits: int
    cr0: int
    cr4: int
    efer: int
    levels: tuple
    large: int = 0  # levels left out at the bottom


PG, PE, PAE, PSE, LA57, LONG = 1 << 31, 1, 1 << 5, 1 << 4, 1 << 12, 0x500
MODES = {
    "real": Mode(16, 0, 0, 0, ()),
    "protected": Mode(32, PE, 0, 0, ()),
    "protected, 16-bit": Mode(16, PE, 0, 0, ()),
    "32-bit": Mode(32, PG | PE, 0, 0, ((10, 4), (10, 4))),
    "32-bit, 4 MiB": Mode(32, PG | PE, PSE, 0, ((10, 4), (10, 4)), 1),
    "PAE": Mode(32, PG | PE, PAE, 0, ((2, 8), (9, 8), (9, 8))),
    "PAE, 2 MiB": Mode(32, PG | PE, PAE, 0, ((2, 8), (9, 8), (9, 8)), 1),
    "4-level": Mode(64, PG | PE, PAE, LONG, ((9, 8),) * 4),
    "4-level, 2 MiB": Mode(64, PG | PE, PAE, LONG, ((9, 8),) * 4, 1),
    "4-level, 1 GiB": Mode(64, PG | PE, PAE, LONG, ((9, 8),) * 4, 2),
    "5-level": Mode(64, PG | PE, PAE | LA57, LONG, ((9, 8),) * 5),
    "5-level, 2 MiB": Mode(64, PG | PE, PAE | LA57, LONG, ((9, 8),) * 5, 1),
    "compatibility": Mode(32, PG | PE, PAE, LONG, ((9, 8),) * 4),
}
TABLES, GOOD = 0x80000, 0x400000


class Guest:
    """A scripted vCPU in a mode, whose tables lead from far-off addresses to memory: code, a page of data, a bad page."""

    def __init__(self, vm, mode):
        self.vm, self.mode = vm, mode
        vm.memory.add(0, 1 << 20)
        self.tables, self.next = {}, TABLES
        large = 12 + sum(bits for bits, _ in mode.levels[len(mode.levels) - mode.large :]) if mode.large else 12
        self.top = {64: 0x7F12_3450_0000, 32: 0x8765_0000, 16: 0x5_0000}[mode.bits]
        if len(mode.levels) == 5:
            self.top = 0xFF00_1234_5678_0000  # canonical with five levels only
        self.top &= -1 << large
        if mode.levels:
            self.root = self.table()
            self.code, self.good, self.bad = (self.top + (i << large) + (gpa & (1 << large) - 1)
                                              for i, gpa in enumerate((CODE, SPARE, BAD)))  # fmt: skip
            for gva, gpa in ((self.code, CODE), (self.good, SPARE), (self.bad, BAD)):
                self.map(gva, gpa)
            self.stack = self.good
            self.gpa = dict(zip((self.code, self.good, self.bad), (CODE, SPARE, BAD), strict=True))
            vm.memory.add(SPARE, PAGE)
            self.slot = vm.memory.add(BAD, PAGE)
        else:
            self.root, self.code, self.good, self.bad = 0, CODE, 0x10000, 0x200000 if mode.bits == 32 else 0x110000
            self.slot = vm.memory.add(self.bad, PAGE)
            self.gpa = {gva: gva for gva in (self.code, self.good, self.bad)}
        self.vcpu = vm.create_vcpu(0, [failure(errno.EFAULT, rip=self.code)])

    def table(self):
        self.next += PAGE
        return self.next - PAGE

    def map(self, gva, gpa):
        shift = 12 + sum(bits for bits, _ in self.mode.levels)
        at = self.root
        for i, (bits, size) in enumerate(self.mode.levels):
            shift -= bits
            entry = at + (gva >> shift & (1 << bits) - 1) * size
            last = i == len(self.mode.levels) - 1 - self.mode.large
            if last:
                value = gpa & -1 << shift | 7 | (0x80 if self.mode.large else 0)
            else:
                value = int.from_bytes(self.vm.memory.read(entry, size), "little") or self.table() | 7
            self.vm.memory.write(entry, value.to_bytes(size, "little"))
            self.tables[gva, i] = entry
            if last:
                return
            at = value & ~0xFFF

    def fault(self, code, base=0, **regs):
        """The vCPU stands at `code`, having faulted. base: of the data segments."""
        self.vm.memory.write(self.gpa[self.code], code)
        exit = self.vcpu.run()
        sregs = self.vcpu.sregs
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = self.mode.cr0, self.root, self.mode.cr4, self.mode.efer
        sregs.cs.db = int(self.mode.bits == 32)
        sregs.cs.l = int(self.mode.bits == 64)
        for name in ("ds", "es", "ss"):
            segment = getattr(sregs, name)
            segment.base, segment.db, segment.present, segment.limit = base, int(self.mode.bits == 32), 1, 0xFFFFFFFF
        if self.mode.bits == 64:
            for name in ("ds", "es", "ss"):
                getattr(sregs, name).base = 0xDEAD000  # which 64-bit code does not add
        for name, value in regs.items():
            setattr(self.vcpu.regs, name, value)
        return exit


@pytest.fixture(params=MODES)
def guest(request, scripted):
    """One in each mode."""
    return Guest(scripted, MODES[request.param])


def segment_base(guest, gva):
    """-> a base and an offset that lead to an address: 16-bit code has no other way there."""
    return (gva & ~0xFFF, gva & 0xFFF) if guest.mode.bits == 16 else (0, gva)


OPERANDS = [  # code for 64 and 32 bits, for 16; what leads to the bad page; the access; how far behind the register
    ("8b03", "8b07", "rbx", "read", 0),
    ("8803", "8807", "rbx", "write", 0),
    ("50", "50", "rsp", "write", None),
    ("58", "58", "rsp", "read", 0),
    ("ac", "ac", "rsi", "read", 0),
    ("aa", "aa", "rdi", "write", 0),
    ("f3aa", "f3aa", "rdi", "write", 0),
    ("d7", "d7", "rbx", "read", 3),
    ("0fab03", "0fab07", "rbx", "write", "bit"),
]


@pytest.mark.parametrize(("wide", "narrow", "register", "access", "how"), OPERANDS, ids=[row[0] for row in OPERANDS])
def test_operands_in_every_mode(guest, iced, wide, narrow, register, access, how):
    """The bad page is found where the tables, or the segment, lead."""
    base, offset = segment_base(guest, guest.bad + 0x80)
    back = {64: 8, 32: 4, 16: 2}[guest.mode.bits] if how is None else 0
    regs = {"rcx": 3, "rsp": offset - 0x20, "rax": 0, register: offset}
    where = guest.bad + 0x80
    if how is None:
        where -= back
    elif how == "bit":
        regs["rax"] = {64: 32, 32: 32, 16: 16}[guest.mode.bits] + 5
        where += {64: 4, 32: 4, 16: 2}[guest.mode.bits]
    elif how:
        regs["rax"] = how
        where += how
    exit = guest.fault(bytes.fromhex(narrow if guest.mode.bits == 16 else wide), base, **regs)
    prot(guest.slot.hva, 0)
    said = exit.explain(guest.vcpu)
    prot(guest.slot.hva, 3)
    gpa = where - guest.bad + guest.slot.gpa
    assert (said.certain, said.gpa, said.gva, said.access, said.cause, said.slot) == (
        True, gpa, where, access, Cause.PROT_NONE, guest.slot), str(said)  # fmt: skip


def test_fetches_in_every_mode(guest, iced):
    """Of an instruction in the bad page, and of one that goes over into it."""
    exit = guest.fault(b"")
    if guest.mode.bits == 16:
        guest.vcpu.sregs.cs.base = guest.bad - 0x100
    guest.vcpu.regs.rip = 0x108 if guest.mode.bits == 16 else guest.bad + 8
    assert exit.rip == CODE if not guest.mode.levels else True
    prot(guest.slot.hva, 0)
    look = _explain.Look(guest.vcpu).bare()
    prot(guest.slot.hva, 3)
    assert (look.certain, look.gpa, look.gva, look.access) == (True, guest.slot.gpa + 8, guest.bad + 8, "fetch")
    assert look.instruction is None


@pytest.mark.parametrize("name", [name for name in MODES if MODES[name].levels and name != "compatibility"])
@pytest.mark.parametrize("level", range(5))
def test_a_table_that_cannot_be_reached_is_named(scripted, iced, name, level):
    """At each level, of an operand's translation alone."""
    mode = MODES[name]
    if level >= len(mode.levels) - mode.large:
        return
    guest = Guest(scripted, mode)
    far = guest.bad ^ (1 << {5: 55, 4: 45}.get(len(mode.levels), 31))  # its own tables, but for the root
    guest.map(far, SPARE)
    exit = guest.fault(bytes.fromhex("8b03"), rbx=far + 0x10, rsp=guest.good + 0x800)
    bad = scripted.memory.add(0x500000, PAGE)
    at = guest.tables[far, level]
    if level == 0:
        guest.root, at = 0x500000, 0x500000 + (at & 0xFFF)
        guest.vcpu.sregs.cr3 = guest.root
    else:
        above, size = guest.tables[far, level - 1], mode.levels[level - 1][1]
        scripted.memory.write(above, (0x500000 | 7).to_bytes(size, "little"))
        at = 0x500000 + (at & 0xFFF)
    prot(bad.hva, 0)
    said = exit.explain(guest.vcpu)
    prot(bad.hva, 3)
    assert said.certain, str(said)
    assert (said.slot, said.access, said.cause) == (bad, "read", Cause.PROT_NONE)
    assert f"page table of level {len(mode.levels) - level}" in said.candidates[0].what
    assert said.gpa == at if level else said.gpa // PAGE == at // PAGE  # the root's first use is the fetch


def test_a_table_in_write_protected_memory_may_be_the_cause(scripted, iced):
    """The processor sets accessed and dirty bits: a candidate behind the operand, and doubt."""
    guest = Guest(scripted, MODES["4-level"])
    exit = guest.fault(bytes.fromhex("8b03"), rbx=guest.bad, rsp=guest.good + 0x800)
    ram = next(slot for slot in scripted.memory.slots if slot.gpa == 0)
    prot(ram.hva + TABLES, 1)
    said = exit.explain(guest.vcpu)
    assert (said.certain, said.gpa // PAGE, said.access, said.cause) == (True, TABLES // PAGE, "write", Cause.PROT_READ)
    prot(guest.slot.hva, 0)
    said = exit.explain(guest.vcpu)
    assert (said.certain, [c.gpa // PAGE for c in said.candidates]) == (False, [BAD // PAGE, TABLES // PAGE])
    prot(ram.hva + TABLES, 3)
    prot(guest.slot.hva, 3)


def test_while_an_exception_is_delivered_its_tables_come_first(scripted, iced):
    """An IDT in bad memory; and an operand, ranked behind it."""
    guest = Guest(scripted, MODES["4-level"])
    exit = guest.fault(bytes.fromhex("8b03"), rbx=guest.good, rsp=guest.good + 0x800)
    guest.vcpu.sregs.idt.base, guest.vcpu.sregs.idt.limit = guest.bad, 0xFFF
    guest.vcpu.events.exception.injected = 1
    prot(guest.slot.hva, 0)
    said = exit.explain(guest.vcpu)
    assert (said.certain, said.gpa, said.candidates[0].what) == (True, BAD, "interrupt descriptor table")
    assert said.notes == ("an exception or interrupt was being delivered",)
    guest.map(guest.bad + PAGE, 0x500000)
    more = scripted.memory.add(0x500000, PAGE)
    guest.vcpu.regs.rbx = guest.bad + PAGE
    prot(more.hva, 0)
    said = exit.explain(guest.vcpu)
    assert (said.certain, [c.gpa for c in said.candidates]) == (False, [BAD, 0x500000])
    prot(guest.slot.hva, 3)
    prot(more.hva, 3)


def test_tables_that_change_while_they_are_read_are_no_certainty(scripted, iced, monkeypatch):
    """Another vCPU maps the page elsewhere at that moment."""
    guest = Guest(scripted, MODES["4-level"])
    exit = guest.fault(bytes.fromhex("8b03"), rbx=guest.bad, rsp=guest.good + 0x800)
    prot(guest.slot.hva, 0)
    assert exit.explain(guest.vcpu).certain
    delivery = _explain.Look.delivery

    def meanwhile(look):
        guest.map(guest.bad, SPARE)
        return delivery(look)

    monkeypatch.setattr(_explain.Look, "delivery", meanwhile)
    said = exit.explain(guest.vcpu)
    assert (said.certain, said.gpa, said.notes) == (False, BAD, ("the page tables changed meanwhile",))
    prot(guest.slot.hva, 3)


@pytest.mark.parametrize("doubt", ["smm", "cet", "lam"])
def test_what_addresses_do_not_show_is_no_certainty(scripted, iced, doubt):
    """System management mode, shadow stacks, tagged addresses."""
    guest = Guest(scripted, MODES["4-level"])
    exit = guest.fault(bytes.fromhex("8b03"), rbx=guest.bad, rsp=guest.good + 0x800)
    if doubt == "smm":
        guest.vcpu.events.smi.smm = 1
    elif doubt == "cet":
        guest.vcpu.sregs.cr4 |= 1 << 23
    else:
        guest.vcpu.sregs.cr3 |= 1 << 62
    prot(guest.slot.hva, 0)
    said = exit.explain(guest.vcpu)
    prot(guest.slot.hva, 3)
    assert (said.certain, said.gpa, len(said.notes)) == (False, BAD, 1)


@pytest.mark.parametrize(("paging", "gva", "entries", "gpa"), [
    ("none", 0x1_2345_6789, {}, 0x2345_6789),
    ("32-bit", 0x0040_1234, {0x1004: 0x0001_E087}, 0x0F_0000_1234),  # PSE-36: bits 13 to 20 are 32 to 39
    ("PAE", 0x8000_1234, {0x1010: 0x2087, 0x2000: 0x3007, 0x3008: 0x4007}, 0x4234),  # no large pages of 1 GiB
    ("4-level", 0x1234, {0x1000: 0x2087, 0x2000: 0x87}, None),  # bit 7 is reserved at the root
    ("4-level", 0x1234, {0x1000: 0x2007, 0x2000: 0xFFF0_0000_C000_1087}, 0xC000_1234),
    ("4-level", 0x1234, {0x1000: 0x2007, 0x2000: 0x3006}, None),
    ("4-level", 1 << 47, {0x1800: 0x2007, 0x2000: 0x87}, None),
    ("4-level", (1 << 64) - (1 << 47), {0x1000 + 0x800: 0x2007, 0x2000: 0x87}, 0),
    ("5-level", 1 << 56, {0x1800: 0x2007, 0x2000: 0x3007, 0x3000: 0x87}, None),
    ("5-level", 1 << 55, {0x1000 + 0x400: 0x2007, 0x2000: 0x3007, 0x3000: 0x87}, 0),
])  # fmt: skip
def test_walks_by_the_book(paging, gva, entries, gpa):
    """What the modes above do not have: each entry is one that the test made."""
    state = types.SimpleNamespace(paging=paging, cr3=0x1018 if paging != "PAE" else 0x1000, large_pages=True)
    found = walk(state, gva, lambda at, size: entries.get(at, 0).to_bytes(size, "little"))
    assert (found.gpa, found.stuck) == (gpa, False)
    assert len(found.tables) <= 5


def at_fault(vm, code, **regs):
    """-> a guest in 64-bit mode at a fault, with a stack that can be reached."""
    guest = Guest(vm, MODES["4-level"])
    return guest, guest.fault(bytes.fromhex(code), **{"rsp": guest.good + 0x800, **regs})


def explained(guest, exit, *more):
    """What is said while the bad page, and further slots, cannot be reached."""
    for slot in (guest.slot, *more):
        prot(slot.hva, 0)
    try:
        return exit.explain(guest.vcpu)
    finally:
        for slot in (guest.slot, *more):
            prot(slot.hva, 3)


def test_a_string_instruction_may_be_a_little_further_than_its_registers(scripted, iced):
    """Up or down; but not where the present iteration cannot go by; and with a count of 0 nowhere."""
    guest, exit = at_fault(scripted, "f3a4", rcx=100)
    regs = guest.vcpu.regs
    regs.rsi, regs.rdi = guest.good, guest.bad - 16
    said = explained(guest, exit)
    assert (said.certain, said.gpa, said.candidates[0].what) == (True, BAD, "string operand, further on")
    guest.map(guest.bad + PAGE, 0x500000)
    more = scripted.memory.add(0x500000, PAGE)
    regs.rdi, regs.rflags = guest.bad + PAGE + 8, 0x402
    said = explained(guest, exit)
    assert (said.certain, said.gpa) == (True, BAD + PAGE + 8 - 64)
    regs.rdi, regs.rflags = guest.bad + PAGE - 4, 2
    said = explained(guest, exit, more)
    assert (said.certain, said.gpa) == (True, BAD + PAGE - 4)
    regs.rcx = 0
    assert explained(guest, exit, more).cause == Cause.NOTHING_FOUND


def test_enter_looks_at_its_frame(scripted, iced):
    """enter 0x8000, 0 pushes far above it."""
    guest, exit = at_fault(scripted, "c8008000")
    guest.map(guest.bad + 0x8000, SPARE)
    guest.vcpu.regs.rsp = guest.bad + 0x8108
    said = explained(guest, exit)
    assert (said.certain, said.gpa, said.access) == (True, BAD + 0x100, "write")


def test_kvm_has_a_say_in_translation(scripted, iced, monkeypatch):
    """Where it says another address, or none, nothing is certain."""
    guest, exit = at_fault(scripted, "8b03")
    guest.vcpu.regs.rbx = guest.bad
    for said in (None, 0x1234):
        monkeypatch.setattr(State, "translate", lambda state, gva, said=said: said)
        found = explained(guest, exit)
        assert (found.certain, found.gpa) == (False, BAD)
        assert "KVM_TRANSLATE says " + ("nowhere" if said is None else "gpa 0x1234") in str(found)


def test_code_in_private_memory_is_not_read(scripted, iced):
    """The shared side would show zeros, which are an instruction, too; and private pages' faults have an address."""
    guest, exit = at_fault(scripted, "8b03")
    guest.vcpu.regs.rbx = guest.bad
    private = scripted.memory.add(0x500000, PAGE, guest_memfd=True)
    scripted.memory.convert(0x500000, PAGE, private=True)
    guest.map(guest.bad, 0x500000)
    assert explained(guest, exit, private).candidates == ()
    guest.map(guest.bad, BAD)
    guest.map(guest.code, 0x500000)
    guest.vcpu.regs.rbx = guest.bad
    guest.vcpu.regs.rsp = guest.bad + 80
    found = explained(guest, exit)
    assert (found.certain, found.gpa, found.instruction) == (False, BAD, None)
    assert "the instruction cannot be read" in found.notes


def test_an_interrupts_stack_is_found_in_the_task_state_segment(scripted, iced):
    """RSP0, while an interrupt is being delivered; and the segment itself."""
    guest, exit = at_fault(scripted, "90")
    sregs = guest.vcpu.sregs
    sregs.tr.base, sregs.tr.limit, sregs.tr.present = guest.good + 0x100, 0x67, 1
    scripted.memory.write(SPARE + 0x104, struct.pack("<Q", guest.bad + 0x400))
    guest.vcpu.events.interrupt.injected = 1
    found = explained(guest, exit)
    assert (found.certain, found.gpa, found.candidates[0].what) == (True, BAD + 0x300, "stack of an exception")
    sregs.tr.base = guest.bad + 8
    assert explained(guest, exit).candidates[0].what == "task state segment"


def test_a_stack_of_another_width_than_the_code_is_no_certainty(scripted, iced):
    """32-bit code on a 16-bit stack."""
    guest = Guest(scripted, MODES["protected"])
    exit = guest.fault(bytes.fromhex("50"), rsp=guest.bad + 8)
    assert explained(guest, exit).certain
    guest.vcpu.sregs.ss.db = 0
    guest.vcpu.sregs.ss.base = guest.bad
    guest.vcpu.regs.rsp = 8
    found = explained(guest, exit)
    assert (found.certain, len(found.notes)) == (False, 1)


def test_a_nested_guest_is_no_certainty(scripted):
    """Its addresses are translated twice."""
    vcpu, _ = bare(scripted, (0, 1 << 16))
    state = State(vcpu)
    assert state.beyond() == []

    def in_guest_mode(number, buffer):
        buffer[0] = 1

    def too_big(number, buffer):
        raise kvmexit.KvmError(errno.E2BIG, "KVM_GET_NESTED_STATE")

    for ioctl in (in_guest_mode, too_big):
        state._vcpu = types.SimpleNamespace(ioctl=ioctl)
        assert state.beyond() == ["a nested guest was running"]


# ---- bad input ----


def bare(vm, *memory):
    """-> a scripted vCPU at a bare fault at rip 0x1000."""
    for gpa, size in memory:
        vm.memory.add(gpa, size)
    vcpu = vm.create_vcpu(0, [failure(errno.EFAULT, rip=CODE)])
    return vcpu, vcpu.run()


@pytest.mark.parametrize("table", [0x3000, 0x7FFF_F000, (1 << 52) - PAGE], ids=["itself", "nowhere", "far"])
def test_tables_that_lead_to_themselves_or_nowhere(scripted, iced, table):
    """The walk is as long as there are levels."""
    vcpu, exit = bare(scripted, (0, 1 << 16))
    scripted.memory.write(0x3000, struct.pack("<512Q", *[table | 7] * 512))
    sregs = vcpu.sregs
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer, sregs.cs.l = PG | PE, 0x3000, PAE | LA57, LONG, 1
    said = exit.explain(vcpu)
    assert (said.certain, said.cause) == (False, Cause.NOTHING_FOUND)
    vcpu.regs.rip = 1 << 60
    assert _explain.Look(vcpu).bare().candidates == ()


@pytest.mark.parametrize(("code", "certain"), [
    ("66" * 15, False), ("ffff", False), ("62f27d49a0048b", False), ("c4e27b4b040b", False), ("0f01d8", False),
    ("f2" * 14 + "a4", True), ("0f0b", True),  # ud2: its exception needs the stack
])  # fmt: skip
def test_instructions_that_are_none_or_not_known(scripted, iced, code, certain):
    """Never certain of what they touch: not of the one page, where an exception's stack would lie, either."""
    vcpu, exit = bare(scripted, (0, 1 << 16))
    bad = scripted.memory.add(BAD, PAGE)
    scripted.memory.write(CODE, bytes.fromhex(code))
    x86_64(vcpu)
    for name in ("rax", "rbx", "rsi", "rsp"):
        setattr(vcpu.regs, name, BAD + 0x100)
    prot(bad.hva, 0)
    said = exit.explain(vcpu)
    prot(bad.hva, 3)
    assert (said.gpa // PAGE, said.certain) == (BAD // PAGE, certain), str(said)


def x86_64(vcpu):
    """64-bit mode, with the tables at 0xa000: the first GiB as it is."""
    sregs = vcpu.sregs
    vcpu.vm.memory.write(0xA000, struct.pack("<Q", 0xB007))
    vcpu.vm.memory.write(0xB000, struct.pack("<Q", 0x87))
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer, sregs.cs.l = PG | PE, 0xA000, PAE, LONG, 1


def test_no_state_of_a_guest_makes_it_fail_or_last(scripted):
    """Random registers, tables, descriptors and code: an Explanation each time."""
    chance = random.Random(11)
    vcpu, _ = bare(scripted, (0, 1 << 16), (BAD, 4 * PAGE))
    spoilt = next(slot for slot in scripted.memory.slots if slot.gpa == BAD)
    prot(spoilt.hva + PAGE, 0)
    prot(spoilt.hva + 2 * PAGE, 1)
    interesting = [0, 1, CODE, BAD, BAD + PAGE - 1, BAD + 2 * PAGE - 4, 0xA000, (1 << 64) - 1, 1 << 63, 1 << 47, 0xFFFFFFFF]
    regs = [name for name, value in vars(kvmexit.Regs).items() if type(value).__name__ == "Register"]
    for _ in range(stress(150)):
        x86_64(vcpu)
        sregs = vcpu.sregs
        for name in regs:
            setattr(vcpu.regs, name, chance.choice([*interesting, chance.getrandbits(64)]))
        scripted.memory.write(CODE, chance.randbytes(16))
        if chance.random() < 0.5:
            vcpu.regs.rip = CODE
        for name in ("cr0", "cr3", "cr4", "efer"):
            if chance.random() < 0.4:
                setattr(sregs, name, chance.choice([getattr(sregs, name) ^ 1 << chance.randrange(32), chance.getrandbits(64)]))
        for name in ("gdt", "idt"):
            table = getattr(sregs, name)
            table.base, table.limit = chance.choice([*interesting, chance.getrandbits(64)]), chance.choice([0, 0xFFFF])
        for name in ("cs", "ss", "ds", "tr", "ldt", "fs"):
            segment = getattr(sregs, name)
            segment.base, segment.limit = chance.choice(interesting), chance.choice([0, 0xFFFFFFFF])
            segment.present, segment.db = chance.randrange(2), chance.randrange(2)
        for gpa in (0xA000, 0xB000):
            if chance.random() < 0.3:
                entries = [chance.choice([*interesting, chance.getrandbits(64)]) | chance.choice([7, 0x87]) for _ in range(512)]
                scripted.memory.write(gpa, struct.pack("<512Q", *(entry & (1 << 64) - 1 for entry in entries)))
        said = _explain.Look(vcpu).bare()
        assert str(said)
        assert len(said.candidates) < 200
    prot(spoilt.hva, 3, 4)


def test_a_running_vcpu_is_busy(scripted):
    """From another thread."""
    vcpu = scripted.create_vcpu(0, [failure(errno.EFAULT, rip=CODE), spin()])
    fault = vcpu.run()
    thread = threading.Thread(target=vcpu.run)
    thread.start()
    while not vcpu.running:
        pass
    with pytest.raises(kvmexit.VcpuBusyError):
        faults.explain(vcpu)
    with pytest.raises((kvmexit.VcpuBusyError, kvmexit.NotPendingError)):
        fault.explain(vcpu)
    vcpu.kick()
    thread.join()


@pytest.mark.parametrize(("step", "cause"), [(mmio_read(BAD, 8), Cause.NO_SLOT), (memory_fault(BAD), Cause.PRIVATE_HOLE)])
def test_an_exit_with_an_address_that_a_handler_of_another_thread_has_is_busy(scripted, step, cause):
    """Nothing of these needs the vCPU's registers; and still they are the vCPU's thread's."""
    raised = []

    @scripted.on(kvmexit.Exit)
    def handler(vcpu, exit):
        def elsewhere():
            try:
                exit.explain(vcpu)
            except kvmexit.VcpuBusyError as error:
                raised.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert exit.explain(vcpu).cause is cause  # it is ours
        return kvmexit.STOP

    scripted.create_vcpu(0, [step]).run()
    assert len(raised) == 1


@pytest.mark.parametrize("type", [kvmexit.VMType.SEV, kvmexit.VMType.SEV_ES, kvmexit.VMType.SNP, kvmexit.VMType.TDX])
def test_a_protected_guest_does_not_show(type):
    """A clear error."""
    from guests import Typed

    from kvmexit.testing import RecordedAttributes

    with Typed(type, RecordedAttributes()) as vm:
        vcpu = vm.create_vcpu(0, [failure(errno.EFAULT)])
        fault = vcpu.run()
        with pytest.raises(kvmexit.Error, match=f"a {type.name} guest's registers and memory do not show"):
            fault.explain(vcpu)


# ---- exits that say the address ----


def test_mmio_in_a_slot_says_why_and_completes_as_memory(scripted):
    """The page could not be reached; repaired, the exit is answered from it."""
    slot = scripted.memory.add(BAD, PAGE)
    slot[8:12] = b"abcd"
    vcpu = scripted.create_vcpu(0, [mmio_read(BAD + 8, 4), mmio_write(BAD + 16, b"xyz"), hlt()])
    prot(slot.hva, 0)
    exit = vcpu.run()
    said = exit.explain(vcpu)
    assert said == faults.explain(vcpu)
    assert (said.gpa, said.access, said.slot, said.hva) == (BAD + 8, "read", slot, slot.hva + 8)
    assert (said.cause, said.certain) == (Cause.PROT_NONE, True)
    with pytest.raises(kvmexit.KvmError) as caught:
        faults.as_memory(vcpu, exit)
    assert caught.value.errno == errno.EFAULT
    prot(slot.hva, 3)
    exit.data = faults.as_memory(vcpu, exit)
    assert exit.data == b"abcd"
    with scripted.on_mmio(BAD, PAGE, handler=faults.as_memory):
        assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert slot[16:19] == b"xyz"


def test_mmio_that_no_memory_answers_is_passed_on(scripted):
    """Writes to a read-only slot are ordinary, and holes have no slot."""
    slot = scripted.memory.add(BAD, PAGE, readonly=True)
    vcpu = scripted.create_vcpu(0, [mmio_write(BAD, b"x"), mmio_read(0x1000, 4)])
    scripted.on_mmio(0, 1 << 32, handler=faults.as_memory)
    exit = vcpu.run()
    assert (exit.explain(vcpu).cause, exit.explain(vcpu).slot) == (Cause.READONLY_SLOT, slot)
    exit = vcpu.run()
    assert (exit.explain(vcpu).cause, exit.explain(vcpu).slot) == (Cause.NO_SLOT, None)


def test_memory_faults_are_explained_too(scripted):
    """What KVM annotates: the wrong side, a closed guest_memfd, poison, no slot."""
    slot = scripted.memory.add(BAD, 2 * PAGE, guest_memfd=True)
    steps = [memory_fault(BAD, private=True), memory_fault(BAD, private=True), memory_fault(BAD, private=True),
             memory_fault(BAD, errno=133), memory_fault(0x1000)]  # fmt: skip
    vcpu = scripted.create_vcpu(0, steps)
    fault = vcpu.run()
    assert fault.explain(vcpu).cause == Cause.WRONG_SIDE
    scripted.memory.convert(BAD, PAGE, private=True)
    assert vcpu.run().explain(vcpu).cause == Cause.NOTHING_FOUND
    slot.close_guest_memfd()
    said = vcpu.run().explain(vcpu)
    assert (said.cause, said.certain, said.gpa, said.access) == (Cause.GUEST_MEMFD_CLOSED, True, BAD, "access")
    assert vcpu.run().explain(vcpu).cause == Cause.POISONED
    assert vcpu.run().explain(vcpu).cause == Cause.PRIVATE_HOLE
    with pytest.raises(kvmexit.NotPendingError):
        fault.explain(vcpu)


# ---- the host's side ----


@pytest.fixture
def mapped(scripted):
    """A file of four pages, and its mapping."""
    fd = os.memfd_create("explained")
    os.ftruncate(fd, 4 * PAGE)
    yield fd, scripted.memory.add(0, 4 * PAGE, fd=fd).hva
    os.close(fd)


@pytest.mark.parametrize("cause", ["unmapped", "PROT_NONE", "PROT_READ", "truncated"])
def test_causes_of_the_host(mapped, cause):
    """For a read and a write each; the page beside it is well."""
    fd, hva = mapped
    spoil(cause, hva + PAGE, fd)
    found = [_reach.Host().cause(hva + PAGE + 5, write, True) for write in (False, True)]
    assert found == [None if cause == "PROT_READ" else matrix.CAUSES[cause], matrix.CAUSES[cause]]
    assert [_reach.Host().cause(hva + 5, write, True) for write in (False, True)] == [None, None]


def test_a_file_of_which_nobody_has_a_descriptor(mapped, monkeypatch):
    """And no privileges to look at the mapping's: the kernel's own answer is left."""
    fd, hva = mapped
    monkeypatch.setattr(_reach, "_find_size", lambda at: None)
    os.ftruncate(fd, PAGE)
    assert _reach.Host().cause(hva, True, True) is None
    assert _reach.Host().cause(hva + PAGE, False, True) is Cause.IO_ERROR


@pytest.mark.parametrize(("number", "cause", "unsure"), [
    (133, Cause.POISONED, False), (errno.EFAULT, Cause.IO_ERROR, False), (errno.EINVAL, None, True), (errno.ENOMEM, None, True),
])  # fmt: skip
def test_what_the_kernel_answers_to_populate(mapped, monkeypatch, number, cause, unsure):
    """Poison cannot be had on demand: the answer is put in its mouth."""
    monkeypatch.setattr(_reach, "libc_call", lambda *arguments: number)
    host = _reach.Host()
    assert (host.cause(mapped[1], True, True), host.unsure) == (cause, unsure)


def test_a_host_that_hides_its_flags_leaves_doubt(mapped, monkeypatch):
    """Without VmFlags a userfaultfd may be there: nothing is populated, nothing is certain."""
    monkeypatch.setattr(_reach.Host, "_details_of", lambda self, at: None)
    monkeypatch.setattr(_reach, "libc_call", None)
    host = _reach.Host()
    assert (host.cause(mapped[1], True, True), host.unsure) == (None, True)


def test_the_module_comes_when_it_is_asked_for():
    """`import kvmexit` does not pay for it."""
    import subprocess

    program = "import sys, kvmexit; assert 'kvmexit.faults' not in sys.modules; print(kvmexit.faults.explain.__name__)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "explain\n"
    with pytest.raises(AttributeError, match="has no attribute 'fault'"):
        kvmexit.fault  # noqa: B018
