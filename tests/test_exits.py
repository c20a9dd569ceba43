"""Every exit, field by field, decoded from pages made by hand; and every answer, at the place where KVM looks for it.

Offsets are those of struct kvm_run (include/uapi/linux/kvm.h, x86-64), written out: nothing here is taken from what is
tested. A page is 0xa5 wherever a case says nothing, so a field that is read too wide, or from its neighbour, shows.
"""

import errno
import os
import struct
import sysconfig
import weakref
from typing import Any, NamedTuple

import pytest
from processes import off_main

import kvmexit
from kvmexit import ExitReason
from kvmexit.testing import ScriptStep, hlt, hypercall, memory_fault, mmio_read, mmio_write, pio_in, pio_out

UNION = 32  # where the union begins in kvm_run
UNION_SIZE = 256
BACKGROUND = b"\xa5"

# Numbers with no byte alike, so that swapped or shifted fields show.
U16 = 0x1122
U32 = 0x31323334
V32 = 0x41424344
U64 = 0x0102030405060708
V64 = 0x1112131415161718
W64 = 0x2122232425262728
X64 = 0x3132333435363738
TOP = 2**64 - 1


def numbers(count, first=0x8877665544332200):
    """-> `count` different 64-bit numbers."""
    return tuple(first + i for i in range(count))


def union(*pieces):
    """-> the 256 bytes of kvm_run's union; each piece is (offset in kvm_run, struct format, values...)."""
    page = bytearray(BACKGROUND * (UNION + UNION_SIZE))
    for offset, form, *values in pieces:
        struct.pack_into(f"<{form}", page, offset, *values)
    return bytes(page[UNION:])


def patched(payload, offset, data):
    """The payload with `data` at `offset` of kvm_run."""
    start = offset - UNION
    return payload[:start] + data + payload[start + len(data) :]


class Case(NamedTuple):
    """An exit as KVM leaves it, and all that must be read from it."""

    name: str
    reason: int
    kind: type
    payload: bytes
    fields: dict[str, Any]
    owes: bool = False  # KVM waits for an answer
    data: bytes = b""  # in the PIO area, at 4096
    errno: int = 0

    def step(self):
        return ScriptStep(self.reason, self.payload, data=self.data, errno=self.errno)


def io(direction, size, port, count, data_offset=4096):
    return union((32, "B", direction), (33, "B", size), (34, "H", port), (36, "I", count), (40, "Q", data_offset))


def mmio(gpa, data, size, is_write):
    return union((32, "Q", gpa), (40, "8s", data), (48, "I", size), (52, "B", is_write))


def emulation_failure(flags, insn_size, insn_bytes, *, suberror=1, ndata=4):
    return union((32, "I", suberror), (36, "I", ndata), (40, "Q", flags), (48, "B", insn_size), (49, "15s", insn_bytes))


HYPERV_NOTHING = {
    "msr": None,
    "control": None,
    "evt_page": None,
    "msg_page": None,
    "input": None,
    "result": None,
    "params": None,
    "status": None,
    "send_page": None,
    "recv_page": None,
    "pending_page": None,
}
INSTRUCTION = bytes(range(0x60, 0x6F))

CASES = [
    Case("UNKNOWN", 0, kvmexit.HardwareExit, union((32, "Q", U64)), {"hardware_exit_reason": 0x0102030405060708}),
    Case(
        "EXCEPTION",
        1,
        kvmexit.GuestException,
        union((32, "I", U32), (36, "I", V32)),
        {"exception": 0x31323334, "error_code": 0x41424344},
    ),
    Case(
        "IO out",
        2,
        kvmexit.Io,
        io(1, 2, 0xCFC, 1),
        {"port": 0xCFC, "size": 2, "count": 1, "is_write": True, "data": b"\x34\x12"},
        data=b"\x34\x12",
    ),
    Case(
        "IO in",
        2,
        kvmexit.Io,
        io(0, 4, 0xFFFF, 1),
        {"port": 0xFFFF, "size": 4, "count": 1, "is_write": False, "data": None},
        owes=True,
        data=b"olds",
    ),
    Case(
        "IO rep outsw",
        2,
        kvmexit.Io,
        io(1, 2, 0x3F8, 3),
        {"port": 0x3F8, "size": 2, "count": 3, "is_write": True, "data": b"abcdef"},
        data=b"abcdef",
    ),
    Case(
        "HYPERCALL",
        3,
        kvmexit.Hypercall,
        union((32, "Q", 12), (40, "6Q", *numbers(6)), (96, "Q", V64)),
        {
            "nr": 12,
            "args": (
                0x8877665544332200,
                0x8877665544332201,
                0x8877665544332202,
                0x8877665544332203,
                0x8877665544332204,
                0x8877665544332205,
            ),
            "ret": 0,  # not the stale bytes that Linux 6.12 leaves there
            "flags": 0x1112131415161718,
            "map_gpa_range": kvmexit.MapGpaRange(
                0x8877665544332200, 0x8877665544332201000, False, 1 << 30, 0x8877665544332202 >> 5),
        },
        owes=True,
    ),
    Case(
        "DEBUG",
        4,
        kvmexit.Debug,
        union((32, "I", U32), (40, "Q", U64), (48, "Q", V64), (56, "Q", W64)),
        {"exception": 0x31323334, "pc": 0x0102030405060708, "dr6": 0x1112131415161718, "dr7": 0x2122232425262728},
    ),
    Case("HLT", 5, kvmexit.Hlt, union(), {}),
    Case(
        "MMIO write",
        6,
        kvmexit.Mmio,
        mmio(TOP - 2, b"\1\2\3\4\5\6\7\x08", 8, 1),
        {"gpa": 0xFFFFFFFFFFFFFFFD, "size": 8, "is_write": True, "data": b"\1\2\3\4\5\6\7\x08", "slot": None},
    ),
    Case(
        "MMIO write of 3",
        6,
        kvmexit.Mmio,
        mmio(0xFEE00010, b"abcdefgh", 3, 1),
        {"gpa": 0xFEE00010, "size": 3, "is_write": True, "data": b"abc", "slot": None},
    ),
    Case(
        "MMIO read",
        6,
        kvmexit.Mmio,
        mmio(0xFEE00010, b"oldbytes", 4, 0),
        {"gpa": 0xFEE00010, "size": 4, "is_write": False, "data": None, "slot": None},
        owes=True,
    ),
    Case("IRQ_WINDOW_OPEN", 7, kvmexit.IrqWindowOpen, union(), {}),
    Case("SHUTDOWN", 8, kvmexit.Shutdown, union(), {}),
    Case(
        "FAIL_ENTRY",
        9,
        kvmexit.FailEntry,
        union((32, "Q", U64), (40, "I", U32)),
        {"hardware_entry_failure_reason": 0x0102030405060708, "cpu": 0x31323334},
    ),
    Case("INTR", 10, kvmexit.Intr, union(), {}),
    Case("SET_TPR", 11, kvmexit.SetTpr, union(), {"cr8": 0}),  # outside the union: test_cr8_of_set_tpr
    Case(
        "TPR_ACCESS write",
        12,
        kvmexit.TprAccess,
        union((32, "Q", U64), (40, "I", 1)),
        {"rip": 0x0102030405060708, "is_write": True},
    ),
    Case(
        "TPR_ACCESS read",
        12,
        kvmexit.TprAccess,
        union((32, "Q", U64), (40, "I", 0)),
        {"rip": 0x0102030405060708, "is_write": False},
    ),
    Case(
        "S390_SIEIC",
        13,
        kvmexit.S390Sieic,
        union((32, "B", 0x91), (34, "H", U16), (36, "I", U32)),
        {"icptcode": 0x91, "ipa": 0x1122, "ipb": 0x31323334},
    ),
    Case("S390_RESET", 14, kvmexit.S390Reset, union((32, "Q", U64)), {"reset_flags": 0x0102030405060708}),
    Case(
        "DCR write",
        15,
        kvmexit.Dcr,
        union((32, "I", U32), (36, "I", V32), (40, "B", 1)),
        {"dcrn": 0x31323334, "data": 0x41424344, "is_write": True},
    ),
    Case(
        "DCR read",
        15,
        kvmexit.Dcr,
        union((32, "I", U32), (36, "I", V32), (40, "B", 0)),
        {"dcrn": 0x31323334, "data": 0x41424344, "is_write": False},
    ),
    Case("NMI", 16, kvmexit.Nmi, union(), {}),
    Case(
        "INTERNAL_ERROR",
        17,
        kvmexit.InternalError,
        union((32, "I", 3), (36, "I", 2), (40, "2Q", U64, V64)),
        {"suberror": 3, "data": (0x0102030405060708, 0x1112131415161718), "insn_bytes": None},
    ),
    Case(
        "INTERNAL_ERROR emulation",
        17,
        kvmexit.InternalError,
        emulation_failure(1, 3, INSTRUCTION),
        {
            "suberror": 1,
            "data": (1, 0x6665646362616003, 0x6E6D6C6B6A696867, 0xA5A5A5A5A5A5A5A5),
            "insn_bytes": b"\x60\x61\x62",
        },
    ),
    Case("OSI", 18, kvmexit.Osi, union((32, "32Q", *numbers(32))), {"gprs": numbers(32)}),
    Case(
        "PAPR_HCALL",
        19,
        kvmexit.PaprHcall,
        union((32, "Q", U64), (40, "Q", V64), (48, "9Q", *numbers(9))),
        {"nr": 0x0102030405060708, "ret": 0x1112131415161718, "args": numbers(9)},
    ),
    Case(
        "S390_UCONTROL",
        20,
        kvmexit.S390Ucontrol,
        union((32, "Q", U64), (40, "I", U32)),
        {"trans_exc_code": 0x0102030405060708, "pgm_code": 0x31323334},
    ),
    Case("WATCHDOG", 21, kvmexit.Watchdog, union(), {}),
    Case(
        "S390_TSCH",
        22,
        kvmexit.S390Tsch,
        union(
            (32, "H", 0x1122),
            (34, "H", 0x3344),
            (36, "I", 0x51525354),
            (40, "I", 0x61626364),
            (44, "I", 0x71727374),
            (48, "B", 0x81),
        ),
        {
            "subchannel_id": 0x1122,
            "subchannel_nr": 0x3344,
            "io_int_parm": 0x51525354,
            "io_int_word": 0x61626364,
            "ipb": 0x71727374,
            "dequeued": 0x81,
        },
    ),
    Case("EPR", 23, kvmexit.Epr, union((32, "I", U32)), {"epr": 0x31323334}),
    Case(
        "SYSTEM_EVENT",
        24,
        kvmexit.SystemEvent,
        union((32, "I", 6), (36, "I", 3), (40, "4Q", U64, V64, W64, X64)),
        {"type": 6, "data": (0x0102030405060708, 0x1112131415161718, 0x2122232425262728)},
    ),
    Case(
        "S390_STSI",
        25,
        kvmexit.S390Stsi,
        union((32, "Q", U64), (40, "B", 0x91), (42, "B", 0x92), (43, "B", 0x93), (44, "H", U16)),
        {"addr": 0x0102030405060708, "ar": 0x91, "fc": 0x92, "sel1": 0x93, "sel2": 0x1122},
    ),
    Case("IOAPIC_EOI", 26, kvmexit.IoapicEoi, union((32, "B", 0xF1)), {"vector": 0xF1}),
    Case(
        "HYPERV synic",
        27,
        kvmexit.Hyperv,
        union((32, "I", 1), (40, "I", U32), (48, "Q", U64), (56, "Q", V64), (64, "Q", W64)),
        HYPERV_NOTHING
        | {
            "type": 1,
            "msr": 0x31323334,
            "control": 0x0102030405060708,
            "evt_page": 0x1112131415161718,
            "msg_page": 0x2122232425262728,
        },
    ),
    Case(
        "HYPERV hypercall",
        27,
        kvmexit.Hyperv,
        union((32, "I", 2), (40, "Q", U64), (48, "Q", V64), (56, "2Q", W64, X64)),
        HYPERV_NOTHING
        | {
            "type": 2,
            "input": 0x0102030405060708,
            "result": 0x1112131415161718,
            "params": (0x2122232425262728, 0x3132333435363738),
        },
        owes=True,
    ),
    Case(
        "HYPERV debugger",
        27,
        kvmexit.Hyperv,
        union((32, "I", 3), (40, "I", U32), (48, "5Q", *numbers(5))),
        HYPERV_NOTHING
        | {
            "type": 3,
            "msr": 0x31323334,
            "control": 0x8877665544332200,
            "status": 0x8877665544332201,
            "send_page": 0x8877665544332202,
            "recv_page": 0x8877665544332203,
            "pending_page": 0x8877665544332204,
        },
        owes=True,
    ),
    Case("HYPERV of a later type", 27, kvmexit.Hyperv, union((32, "I", 4)), HYPERV_NOTHING | {"type": 4}),
    Case(
        "ARM_NISV",
        28,
        kvmexit.ArmNisv,
        union((32, "Q", U64), (40, "Q", V64)),
        {"esr_iss": 0x0102030405060708, "fault_ipa": 0x1112131415161718},
    ),
    Case(
        "X86_RDMSR",
        29,
        kvmexit.Rdmsr,
        union((32, "B", 0), (40, "I", 4), (44, "I", 0xC0010015), (48, "Q", U64)),
        {"why": 4, "index": 0xC0010015, "data": 0x0102030405060708, "error": 0},
        owes=True,
    ),
    Case(
        "X86_WRMSR",
        30,
        kvmexit.Wrmsr,
        union((32, "B", 0), (40, "I", 2), (44, "I", 0xC0010015), (48, "Q", U64)),
        {"why": 2, "index": 0xC0010015, "data": 0x0102030405060708, "error": 0},
    ),
    Case("DIRTY_RING_FULL", 31, kvmexit.DirtyRingFull, union(), {}),
    Case("AP_RESET_HOLD", 32, kvmexit.ApResetHold, union(), {}),
    Case("X86_BUS_LOCK", 33, kvmexit.BusLock, union(), {}),
    Case(
        "XEN",
        34,
        kvmexit.Xen,
        union((32, "I", 1), (40, "I", U32), (44, "I", V32), (48, "Q", U64), (56, "Q", V64), (64, "6Q", *numbers(6))),
        {
            "type": 1,
            "longmode": 0x31323334,
            "cpl": 0x41424344,
            "input": 0x0102030405060708,
            "result": 0x1112131415161718,
            "params": numbers(6),
        },
        owes=True,
    ),
    Case(
        "RISCV_SBI",
        35,
        kvmexit.RiscvSbi,
        union((32, "Q", U64), (40, "Q", V64), (48, "6Q", *numbers(6)), (96, "2Q", W64, X64)),
        {
            "extension_id": 0x0102030405060708,
            "function_id": 0x1112131415161718,
            "args": numbers(6),
            "ret": (0x2122232425262728, 0x3132333435363738),
        },
    ),
    Case(
        "RISCV_CSR",
        36,
        kvmexit.RiscvCsr,
        union((32, "Q", U64), (40, "Q", V64), (48, "Q", W64), (56, "Q", X64)),
        {
            "csr_num": 0x0102030405060708,
            "new_value": 0x1112131415161718,
            "write_mask": 0x2122232425262728,
            "ret_value": 0x3132333435363738,
        },
    ),
    Case(
        "NOTIFY",
        37,
        kvmexit.Notify,
        union((32, "I", 0x31323334)),
        {"flags": 0x31323334, "context_invalid": False},
    ),
    Case(
        "NOTIFY context invalid",
        37,
        kvmexit.Notify,
        union((32, "I", 0x80000001)),
        {"flags": 0x80000001, "context_invalid": True},
    ),
    Case(
        "LOONGARCH_IOCSR write",
        38,
        kvmexit.LoongarchIocsr,
        union((32, "Q", U64), (40, "8s", b"abcdefgh"), (48, "I", U32), (52, "B", 1)),
        {"gpa": 0x0102030405060708, "size": 0x31323334, "is_write": True, "data": b"abcdefgh"},
    ),
    Case(
        "LOONGARCH_IOCSR read",
        38,
        kvmexit.LoongarchIocsr,
        union((32, "Q", U64), (40, "8s", b"abcdefgh"), (48, "I", U32), (52, "B", 0)),
        {"gpa": 0x0102030405060708, "size": 0x31323334, "is_write": False, "data": b"abcdefgh"},
    ),
    Case(
        "MEMORY_FAULT private",
        39,
        kvmexit.MemoryFault,
        union((32, "Q", 8), (40, "Q", U64), (48, "Q", V64)),
        {"flags": 8, "gpa": 0x0102030405060708, "size": 0x1112131415161718, "private": True},
        errno=errno.EFAULT,
    ),
    Case(
        "MEMORY_FAULT shared",
        39,
        kvmexit.MemoryFault,
        union((32, "Q", 0), (40, "Q", U64), (48, "Q", V64)),
        {"flags": 0, "gpa": 0x0102030405060708, "size": 0x1112131415161718, "private": False},
        errno=errno.EFAULT,
    ),
    Case(
        "TDX",
        40,
        kvmexit.Tdx,
        union((32, "Q", U64), (40, "Q", V64), (48, "Q", W64), (56, "5Q", *numbers(5))),
        {
            "flags": 0x0102030405060708,
            "nr": 0x1112131415161718,
            "ret": 0x2122232425262728,
            "data": numbers(5),
            "leaf": 0x8877665544332200,
            "gpa": 0x8877665544332200,
            "vector": 0x8877665544332200,
            "size": 0x8877665544332201,
            "r11": 0x8877665544332201,
            "r12": 0x8877665544332202,
            "r13": 0x8877665544332203,
            "r14": 0x8877665544332204,
        },
        owes=True,
    ),
    Case(
        "ARM_SEA",
        41,
        kvmexit.ArmSea,
        union((32, "Q", U64), (40, "Q", V64), (48, "Q", W64), (56, "Q", X64)),
        {
            "flags": 0x0102030405060708,
            "esr": 0x1112131415161718,
            "gva": 0x2122232425262728,
            "gpa": 0x3132333435363738,
        },
    ),
    Case(
        "ARM_LDST64B",
        42,
        kvmexit.ArmLdst64b,
        union((32, "Q", U64), (40, "Q", V64)),
        {"esr_iss": 0x0102030405060708, "fault_ipa": 0x1112131415161718},
    ),
    Case(
        "SNP_REQ_CERTS",
        43,
        kvmexit.SnpReqCerts,
        union((32, "Q", U64), (40, "Q", V64), (48, "Q", W64)),
        {"gpa": 0x0102030405060708, "npages": 0x1112131415161718, "ret": 0x2122232425262728},
        owes=True,
    ),
]
BY_NAME = {case.name: case for case in CASES}
NOT_KVMS = {kvmexit.Exit, kvmexit.Interrupted, kvmexit.UnexplainedFault, kvmexit.UnknownExit}
EXIT_CLASSES = {
    thing for thing in vars(kvmexit).values() if isinstance(thing, type) and issubclass(thing, kvmexit.Exit)
}

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_class = pytest.mark.parametrize(
    "kind", sorted(EXIT_CLASSES, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__
)


def fields_of(kind):
    """The public attributes a class adds to Exit, without its methods."""
    return {name for name, value in vars(kind).items() if not name.startswith("_") and not callable(value)}


def read(exit, names):
    """-> {name: (type, value)}: for Python alone, True is 1."""
    values = {name: getattr(exit, name) for name in names}
    return {name: (type(value), value) for name, value in values.items()}


def entries_of(vm, vcpu):
    """How often KVM_RUN was entered. To be compared only: on the main thread a tick of the timer may add an entry."""
    return len(vm.script(vcpu).entries)


# ---- decoding ----


@every_case
def test_every_field(scripted, case):
    """Each field of each exit comes from its own place in kvm_run, in its own width."""
    vcpu = scripted.create_vcpu(0, [case.step()])
    exit = vcpu.run()
    assert type(exit) is case.kind
    assert read(exit, case.fields) == {name: (type(value), value) for name, value in case.fields.items()}
    assert exit.reason is ExitReason(case.reason)
    assert exit.errno == case.errno


def test_the_cases_cover_every_reason():
    """0 to 43, and no class is left out."""
    assert {case.reason for case in CASES} == set(range(44))
    assert {case.kind for case in CASES} == EXIT_CLASSES - NOT_KVMS


@every_case
def test_the_case_covers_every_field(case):
    """A new field needs an expectation."""
    assert fields_of(case.kind) == set(case.fields)


def test_fields_of_all_exits():
    """What every exit has; test_every_field looks at two of them, test_run_flags at the third."""
    assert fields_of(kvmexit.Exit) == {"reason", "errno", "run_flags"}


@every_case
def test_run_flags(scripted, case):
    """kvm_run.flags comes through with any exit: system management mode 1, bus lock 2, nested guest 4."""
    vcpu = scripted.create_vcpu(0, [case.step()._replace(flags=0x8006)])
    assert vcpu.run().run_flags == 0x8006


def test_cr8_of_set_tpr(scripted):
    """It lies before the union."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(11)])
    vcpu.cr8 = 9
    assert vcpu.run().cr8 == 9


def test_mmio_names_the_slot_it_hits(scripted):
    """MMIO can hit a memslot (a write to a read-only one, emulation on an unreachable page); the next page is none."""
    slot = scripted.memory.add(0x10000, 0x1000)
    vcpu = scripted.create_vcpu(0, [mmio_write(0x10FFF, b"x"), mmio_write(0x11000, b"x"), mmio_write(0xFFFF, b"x")])
    assert [vcpu.run().slot for _ in range(3)] == [slot, None, None]


@pytest.mark.parametrize("number", [errno.EFAULT, 133])
def test_bare_fault(scripted, number):
    """No payload: where the guest was is all there is, and the errno."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(None, union(), errno=number, rip=0xFFFFFFFF81000000)])
    exit = vcpu.run()
    assert type(exit) is kvmexit.UnexplainedFault
    assert (exit.rip, exit.errno, exit.reason) == (0xFFFFFFFF81000000, number, None)


def test_interrupted_by_a_kick(scripted):
    vcpu = scripted.create_vcpu(0, [ScriptStep(spin=True)])
    vcpu.kick()
    exit = vcpu.run()
    assert type(exit) is kvmexit.Interrupted
    assert (exit.cause, exit.reason, exit.errno) == ("kick", ExitReason.INTR, errno.EINTR)


def test_interrupted_by_a_timeout(scripted):
    vcpu = scripted.create_vcpu(0, [ScriptStep(spin=True)])
    exit = vcpu.run(timeout=0)
    assert type(exit) is kvmexit.Interrupted
    assert (exit.cause, exit.reason, exit.errno) == ("timeout", ExitReason.INTR, errno.EINTR)


# ---- memory faults ----


@pytest.mark.parametrize("number", [14, 133])
def test_memory_fault_keeps_its_errno(scripted, number):
    """EFAULT and EHWPOISON mean different repairs."""
    exit = scripted.create_vcpu(0, [memory_fault(0x1000, errno=number)]).run()
    assert type(exit) is kvmexit.MemoryFault
    assert exit.errno == number


@pytest.mark.parametrize(
    ("flags", "private"),
    [
        (1 << 0, False),
        (1 << 3, True),
        (1 << 4, False),
        (1 << 63, False),
        (1 << 63 | 1 << 3, True),
        (TOP ^ 1 << 3, False),
        (TOP, True),
    ],
    ids=hex,
)
def test_unknown_flags_of_a_memory_fault_are_kept(scripted, flags, private):
    """Later kernels may set more bits; only bit 3 says private."""
    payload = union((32, "Q", flags), (40, "Q", 0x1000), (48, "Q", 4096))
    exit = scripted.create_vcpu(0, [ScriptStep(39, payload, errno=14)]).run()
    assert (exit.flags, exit.private) == (flags, private)


@pytest.mark.parametrize(
    ("flags", "private"), [(0, False), (1, True), (8, False), (9, True), (0x80000001, True), (0xFFFFFFFE, False)]
)
def test_decode_draft(scripted, flags, private):
    """The draft's flags are 32 bits, bit 0 says private, 32 bits of padding follow; address and size lie as today."""
    payload = union((32, "I", flags), (36, "I", U32), (40, "Q", U64), (48, "Q", V64))
    exit = scripted.create_vcpu(0, [ScriptStep(39, payload, errno=14)]).run()
    draft = exit.decode_draft()
    assert draft == (0x0102030405060708, 0x1112131415161718, flags, private)
    assert draft == kvmexit.DraftMemoryFault(
        gpa=0x0102030405060708, size=0x1112131415161718, flags=flags, private=private
    )


# ---- lengths that the guest, or KVM, makes up ----


@pytest.mark.parametrize(("ndata", "expected"), [(0, 0), (1, 1), (15, 15), (16, 16), (17, 16), (2**32 - 1, 16)])
@pytest.mark.parametrize("reason", [17, 24], ids=["INTERNAL_ERROR", "SYSTEM_EVENT"])
def test_ndata_is_clipped(scripted, reason, ndata, expected):
    """There is room for 16 numbers."""
    payload = union((32, "I", 2), (36, "I", ndata), (40, "16Q", *numbers(16)))
    exit = scripted.create_vcpu(0, [ScriptStep(reason, payload)]).run()
    assert exit.data == numbers(expected)


@pytest.mark.parametrize(("insn_size", "expected"), [(0, 0), (1, 1), (14, 14), (15, 15), (16, 15), (255, 15)])
def test_insn_size_is_clipped(scripted, insn_size, expected):
    """No x86 instruction is longer than 15 bytes."""
    payload = emulation_failure(1, insn_size, INSTRUCTION)
    exit = scripted.create_vcpu(0, [ScriptStep(17, payload)]).run()
    assert exit.insn_bytes == INSTRUCTION[:expected]


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(emulation_failure(1, 3, INSTRUCTION, suberror=4), id="another suberror"),
        pytest.param(emulation_failure(2, 3, INSTRUCTION), id="flag not set"),
        pytest.param(emulation_failure(1, 3, INSTRUCTION, ndata=2), id="ndata ends before them"),
        pytest.param(emulation_failure(1, 3, INSTRUCTION, ndata=0), id="no data"),
    ],
)
def test_no_insn_bytes_where_kvm_gave_none(scripted, payload):
    """The bytes are there when suberror, ndata and flags say so; otherwise other data lies in their place."""
    assert scripted.create_vcpu(0, [ScriptStep(17, payload)]).run().insn_bytes is None


# ---- exits nobody knows ----

RAW = bytes(range(256))


@pytest.mark.parametrize("reason", [44, 45, 46, 1000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFD])
def test_unknown_reason(scripted, reason):
    """A value, with all of the union; KVM is not kept waiting for an answer nobody can give."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(reason, RAW), hlt()])
    exit = vcpu.run()
    assert type(exit) is kvmexit.UnknownExit
    assert (exit.reason, exit.raw, exit.errno) == (reason, RAW, 0)
    assert type(vcpu.run()) is kvmexit.Hlt


RUN_SIZE = 3 * 4096  # what a scripted vCPU maps: kvm_run, PIO data, the ring
KVM_RUN = 2352  # sizeof(struct kvm_run)

CONTRADICTIONS = {
    "IO of 0 bytes": (2, io(1, 0, 0x80, 1)),
    "IO of 3 bytes": (2, io(1, 3, 0x80, 1)),
    "IO of 8 bytes": (2, io(1, 8, 0x80, 1)),
    "IO of 255 bytes": (2, io(1, 255, 0x80, 1)),
    "IO no times": (2, io(1, 1, 0x80, 0)),
    "IO in no times": (2, io(0, 1, 0x80, 0)),
    "IO longer than the mapping": (2, io(1, 1, 0x80, 2 * 4096 + 1)),
    "IO in longer than the mapping": (2, io(0, 4, 0x80, 2 * 1024 + 1)),
    "IO length is 0 in 32 bits": (2, io(1, 4, 0x80, 0x40000000)),
    "IO length is 2 in 32 bits": (2, io(0, 2, 0x80, 0x80000001)),
    "IO longest": (2, io(1, 4, 0x80, 0xFFFFFFFF)),
    "IO data at the start of kvm_run": (2, io(1, 1, 0x80, 1, 0)),
    "IO data in the union": (2, io(0, 1, 0x80, 1, 32)),
    "IO data in the last byte of kvm_run": (2, io(0, 1, 0x80, 1, KVM_RUN - 1)),
    "IO data at the end": (2, io(1, 1, 0x80, 1, RUN_SIZE)),
    "IO data over the end": (2, io(0, 2, 0x80, 1, RUN_SIZE - 1)),
    "IO data beyond the end": (2, io(1, 1, 0x80, 1, RUN_SIZE + 1)),
    "IO data far beyond": (2, io(0, 1, 0x80, 1, 2**63)),
    "IO data that wraps": (2, io(1, 4, 0x80, 1, 2**64 - 4)),
    "IO data that wraps to the PIO area": (2, io(0, 4, 0x80, 2**30, 2**64 - 2**32 + 4096)),
    "IO data at -1": (2, io(0, 1, 0x80, 1, 2**64 - 1)),
    "IO direction 2": (2, io(2, 1, 0x80, 1)),
    "IO direction 255": (2, io(255, 1, 0x80, 1)),
    "MMIO read of 0 bytes": (6, mmio(0x1000, b"", 0, 0)),
    "MMIO write of 0 bytes": (6, mmio(0x1000, b"", 0, 1)),
    "MMIO read of 9 bytes": (6, mmio(0x1000, b"", 9, 0)),
    "MMIO write of 9 bytes": (6, mmio(0x1000, b"", 9, 1)),
    "MMIO of 2**32-1 bytes": (6, mmio(0x1000, b"", 2**32 - 1, 1)),
    "MMIO is_write 2": (6, mmio(0x1000, b"", 4, 2)),
    "MMIO is_write 255": (6, mmio(0x1000, b"", 4, 255)),
}
every_contradiction = pytest.mark.parametrize(("reason", "payload"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())


@every_contradiction
def test_contradiction_is_an_unknown_exit(scripted, reason, payload):
    """Nothing in it is used; all of it can be read."""
    exit = scripted.create_vcpu(0, [ScriptStep(reason, payload), hlt()]).run()
    assert type(exit) is kvmexit.UnknownExit
    assert (exit.reason, exit.raw) == (reason, payload)


@every_contradiction
def test_contradiction_is_never_completed(scripted, reason, payload):
    """KVM would complete it with rubbish: run() offers it again, complete() too, and neither enters."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(reason, payload), hlt()])
    exit = vcpu.run()
    entries = entries_of(scripted, vcpu)
    assert vcpu.run() is exit
    assert vcpu.complete() is exit
    assert vcpu.pending is exit
    assert entries_of(scripted, vcpu) == entries


@every_contradiction
def test_contradiction_reaches_no_handler_of_io(scripted, reason, payload):
    """Handlers of ports and addresses may trust what they are given."""
    called = []
    scripted.on_pio(0, 0x10000, lambda vcpu, exit: called.append(exit))
    scripted.on_mmio(0, 1 << 63, lambda vcpu, exit: called.append(exit))
    scripted.on(kvmexit.Io, lambda vcpu, exit: called.append(exit))
    scripted.on(kvmexit.Mmio, lambda vcpu, exit: called.append(exit))
    vcpu = scripted.create_vcpu(0, [ScriptStep(reason, payload), hlt()])
    vcpu.run()
    assert called == []


@pytest.mark.parametrize(
    ("count", "data_offset"),
    [
        pytest.param(1, RUN_SIZE - 1, id="last byte of the mapping"),
        pytest.param(2 * 4096, 4096, id="all after the first page"),
    ],
)
def test_io_may_use_all_of_the_mapping(scripted, count, data_offset):
    """The limits are exact: one byte more is a contradiction, above."""
    data = bytes(i % 251 for i in range(2 * 4096))
    vcpu = scripted.create_vcpu(0, [ScriptStep(2, io(1, 1, 0x80, count, data_offset), data=data)])
    assert vcpu.run().data == data[data_offset - 4096 :][:count]


def test_io_data_may_begin_right_after_kvm_run(scripted):
    """The first byte that is not kvm_run's own: 0, as nobody wrote it."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(2, io(1, 1, 0x80, 1, KVM_RUN))])
    assert vcpu.run().data == b"\0"


# ---- answers ----


class Reply(NamedTuple):
    """An answer, and the bytes it must become at `offset` of kvm_run."""

    case: str
    field: str
    value: Any
    offset: int
    data: bytes
    returned: bool = False  # also what a handler returns

    def __str__(self):
        return f"{self.case}.{self.field}"

    def left(self):
        """The union as KVM finds it."""
        return patched(BY_NAME[self.case].payload, self.offset, self.data)


REPLIES = [
    Reply("MMIO read", "data", b"wxyz", 40, b"wxyz", True),
    Reply("MMIO read", "data", 0x11223344, 40, b"\x44\x33\x22\x11", True),
    Reply("HYPERCALL", "ret", 2**64 - 12, 88, b"\xf4\xff\xff\xff\xff\xff\xff\xff", True),
    Reply("DCR read", "data", 0x11223344, 36, b"\x44\x33\x22\x11"),
    Reply("OSI", "gprs", range(32), 32, struct.pack("<32Q", *range(32))),
    Reply("PAPR_HCALL", "ret", 0x1122334455667788, 40, b"\x88\x77\x66\x55\x44\x33\x22\x11", True),
    Reply("EPR", "epr", 0x11223344, 32, b"\x44\x33\x22\x11"),
    Reply("HYPERV hypercall", "result", 0x1122334455667788, 48, b"\x88\x77\x66\x55\x44\x33\x22\x11", True),
    Reply("HYPERV debugger", "status", 0x1122334455667788, 56, b"\x88\x77\x66\x55\x44\x33\x22\x11", True),
    Reply("HYPERV debugger", "pending_page", 0x1122334455667788, 80, b"\x88\x77\x66\x55\x44\x33\x22\x11"),
    Reply("X86_RDMSR", "data", 0x1122334455667788, 48, b"\x88\x77\x66\x55\x44\x33\x22\x11", True),
    Reply("X86_RDMSR", "error", 1, 32, b"\x01"),
    Reply("X86_WRMSR", "error", 1, 32, b"\x01"),
    Reply("XEN", "result", 0x1122334455667788, 56, b"\x88\x77\x66\x55\x44\x33\x22\x11", True),
    Reply("RISCV_SBI", "ret", [1, 2**64 - 1], 96, b"\1\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"),
    Reply("RISCV_CSR", "ret_value", 0x1122334455667788, 56, b"\x88\x77\x66\x55\x44\x33\x22\x11"),
    Reply("TDX", "ret", 0x1122334455667788, 48, b"\x88\x77\x66\x55\x44\x33\x22\x11", True),
    Reply("TDX", "r11", 0x1122334455667788, 64, b"\x88\x77\x66\x55\x44\x33\x22\x11"),
    Reply("TDX", "r12", 0x1122334455667788, 72, b"\x88\x77\x66\x55\x44\x33\x22\x11"),
    Reply("TDX", "r13", 0x1122334455667788, 80, b"\x88\x77\x66\x55\x44\x33\x22\x11"),
    Reply("TDX", "r14", 0x1122334455667788, 88, b"\x88\x77\x66\x55\x44\x33\x22\x11"),
    Reply("SNP_REQ_CERTS", "npages", 3, 40, b"\3\0\0\0\0\0\0\0"),
    Reply("SNP_REQ_CERTS", "ret", 0, 48, b"\0\0\0\0\0\0\0\0", True),
    Reply("SNP_REQ_CERTS", "ret", errno.ENOSPC, 48, b"\x1c\0\0\0\0\0\0\0", True),
    Reply("SNP_REQ_CERTS", "ret", errno.EAGAIN, 48, b"\x0b\0\0\0\0\0\0\0", True),
    Reply("SNP_REQ_CERTS", "ret", errno.EIO, 48, b"\x05\0\0\0\0\0\0\0", True),
]
# Besides, the data of an IO in: it goes to the PIO area, not to the union.
ANSWERS = {(reply.case, reply.field) for reply in REPLIES} | {("IO in", "data"), ("DCR write", "data")}

every_reply = pytest.mark.parametrize("reply", REPLIES, ids=str)


# Fields that go with the answer: alone they do not settle what the exit owes.
BESIDE = {"npages", "pending_page", "r11", "r12", "r13", "r14"}


def the_answer_to(case):
    """The field that KVM waits for, and its value."""
    return next(reply for reply in REPLIES if reply.case == case and reply.field not in BESIDE)


@every_reply
def test_answer_lands_where_kvm_looks_for_it(scripted, reply):
    """At its offset, in its width, and no other byte of the union changes. What only goes with an answer settles nothing."""
    vcpu = scripted.create_vcpu(0, [BY_NAME[reply.case].step(), hlt()])
    exit = vcpu.run()
    setattr(exit, reply.field, reply.value)
    left = reply.left()
    if reply.field in BESIDE:
        assert vcpu.run() is exit
        answer = the_answer_to(reply.case)
        setattr(exit, answer.field, answer.value)
        left = patched(left, answer.offset, answer.data)
    assert type(vcpu.run()) is kvmexit.Hlt
    assert scripted.script(vcpu).left(0)[0] == left


@pytest.mark.parametrize("reply", [reply for reply in REPLIES if reply.returned], ids=str)
def test_returned_answer_lands_there_too(scripted, reply):
    """What a handler returns is the same as setting it."""
    case = BY_NAME[reply.case]
    scripted.on(case.kind, lambda vcpu, exit: reply.value)
    vcpu = scripted.create_vcpu(0, [case.step(), hlt()])
    assert type(vcpu.run()) is kvmexit.Hlt
    assert scripted.script(vcpu).left(0)[0] == reply.left()


@every_reply
def test_answer_can_be_read_back(scripted, reply):
    """An exit shows how it was answered, for as long as it is kept."""
    vcpu = scripted.create_vcpu(0, [BY_NAME[reply.case].step(), hlt()])
    exit = vcpu.run()
    setattr(exit, reply.field, reply.value)
    vcpu.run()
    expected = {"data": reply.data, "gprs": tuple(range(32)), "ret": (1, 2**64 - 1)}
    if reply.case in ("MMIO read", "OSI", "RISCV_SBI"):
        assert getattr(exit, reply.field) == expected[reply.field]
    else:
        assert getattr(exit, reply.field) == reply.value


@every_reply
def test_answer_after_re_entry_is_refused(scripted, reply):
    """It would answer another exit: of the same kind here, which is left untouched."""
    case = BY_NAME[reply.case]
    vcpu = scripted.create_vcpu(0, [case.step(), case.step(), hlt()])
    answer = the_answer_to(reply.case)
    first = vcpu.run()
    setattr(first, answer.field, answer.value)
    second = vcpu.run()
    before = repr(first)
    with pytest.raises(kvmexit.NotPendingError, match="no longer pending"):
        setattr(first, reply.field, reply.value)
    assert repr(first) == before
    if case.owes:
        assert vcpu.run() is second
        setattr(second, answer.field, answer.value)
    vcpu.run()
    assert scripted.script(vcpu).left(1)[0] == (answer.left() if case.owes else case.payload)


@pytest.mark.parametrize(("step", "name"), [(pio_in(0x80), "data"), (hypercall(12), "ret")])
def test_a_forked_child_answers_nothing(scripted, step, name):
    """Its store would reach the parent's vCPU."""
    vcpu = scripted.create_vcpu(0, [step, hlt()])
    exit = vcpu.run()
    pid = os.fork()
    if pid == 0:
        try:
            setattr(exit, name, 5)
        except kvmexit.Error as error:
            os._exit(7 if "belongs to process" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    setattr(exit, name, 6)
    assert getattr(exit, name) == (b"\6" if name == "data" else 6)
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_answer_after_a_failed_entry(scripted):
    """The entry did not happen, so the answer still counts, and can still be changed."""
    vcpu = scripted.create_vcpu(0, [pio_in(0x60), ScriptStep(errno=errno.EIO)])

    def answer_twice():
        exit = vcpu.run()
        exit.data = 1
        with pytest.raises(kvmexit.KvmError):
            vcpu.run()
        assert vcpu.pending is exit
        exit.data = 2
        assert exit.data == b"\2"

    off_main(answer_twice)


def test_answer_after_an_entry_that_completed_it_and_a_failed_one(scripted):
    """EINTR comes after completion, and the loop enters again by itself: a failure then makes nothing pending again."""
    vcpu = scripted.create_vcpu(0, [pio_in(0x60), ScriptStep(errno=errno.EINTR), ScriptStep(errno=errno.EIO)])

    def answer_twice():
        exit = vcpu.run()
        exit.data = 1
        with pytest.raises(kvmexit.KvmError):
            vcpu.run()
        assert vcpu.pending is None
        with pytest.raises(kvmexit.NotPendingError):
            exit.data = 2

    off_main(answer_twice)


@every_case
def test_what_the_guest_did_cannot_be_set(scripted, case):
    """Every field that is no answer is read-only, while the exit is pending too."""
    exit = scripted.create_vcpu(0, [case.step()]).run()
    names = case.fields.keys() | {"reason", "errno", "run_flags"}
    before = read(exit, names)
    for name in names:
        if (case.name, name) not in ANSWERS:
            with pytest.raises(AttributeError):
                setattr(exit, name, 1)
    assert read(exit, names) == before


@every_case
def test_what_an_exit_owes(scripted, case):
    """Where KVM waits for an answer run() offers the same exit again and does not enter; all others it goes on from."""
    vcpu = scripted.create_vcpu(0, [case.step(), hlt()])
    exit = vcpu.run()
    entries = entries_of(scripted, vcpu)
    again = vcpu.run()
    if case.owes:
        assert again is exit
        assert entries_of(scripted, vcpu) == entries
    else:
        assert again is not exit
        assert type(again) is kvmexit.Hlt


class Wrong(NamedTuple):
    """An answer that is none."""

    case: str
    field: str
    value: Any
    error: type[Exception]

    def __str__(self):
        return f"{self.case}.{self.field} = {self.value!r}"


WRONG = [
    Wrong("IO in", "data", b"abc", ValueError),
    Wrong("IO in", "data", b"abcde", ValueError),
    Wrong("IO in", "data", b"", ValueError),
    Wrong("IO in", "data", 2**32, ValueError),
    Wrong("IO in", "data", -1, ValueError),
    Wrong("IO in", "data", True, TypeError),
    Wrong("IO in", "data", "abcd", TypeError),
    Wrong("IO in", "data", 1.0, TypeError),
    Wrong("IO in", "data", None, TypeError),
    Wrong("IO in", "data", [1, 2, 3, 4], TypeError),
    Wrong("MMIO read", "data", b"abc", ValueError),
    Wrong("MMIO read", "data", b"abcde", ValueError),
    Wrong("MMIO read", "data", 2**32, ValueError),
    Wrong("MMIO read", "data", -1, ValueError),
    Wrong("MMIO read", "data", False, TypeError),
    Wrong("MMIO read", "data", "abcd", TypeError),
    Wrong("MMIO read", "data", None, TypeError),
    Wrong("HYPERCALL", "ret", 2**64, ValueError),
    Wrong("HYPERCALL", "ret", -1, ValueError),
    Wrong("HYPERCALL", "ret", True, TypeError),
    Wrong("HYPERCALL", "ret", "0", TypeError),
    Wrong("HYPERCALL", "ret", b"\0" * 8, TypeError),
    Wrong("HYPERCALL", "ret", None, TypeError),
    Wrong("X86_RDMSR", "data", 2**64, ValueError),
    Wrong("X86_RDMSR", "data", True, TypeError),
    Wrong("X86_RDMSR", "error", 256, ValueError),
    Wrong("X86_RDMSR", "error", -1, ValueError),
    Wrong("X86_WRMSR", "error", 256, ValueError),
    Wrong("XEN", "result", 2**64, ValueError),
    Wrong("HYPERV hypercall", "result", -1, ValueError),
    Wrong("HYPERV hypercall", "status", 1, AttributeError),
    Wrong("HYPERV debugger", "status", 2**64, ValueError),
    Wrong("HYPERV debugger", "result", 1, AttributeError),
    Wrong("TDX", "ret", 2**64, ValueError),
    Wrong("TDX", "r14", -1, ValueError),
    Wrong("SNP_REQ_CERTS", "ret", 1, ValueError),
    Wrong("SNP_REQ_CERTS", "ret", -errno.EIO, ValueError),
    Wrong("SNP_REQ_CERTS", "ret", 2**64 + errno.EIO, ValueError),
    Wrong("SNP_REQ_CERTS", "ret", False, TypeError),
    Wrong("SNP_REQ_CERTS", "ret", "0", TypeError),
    Wrong("SNP_REQ_CERTS", "ret", None, TypeError),
    Wrong("SNP_REQ_CERTS", "npages", 2**64, ValueError),
    Wrong("DCR read", "data", 2**32, ValueError),
    Wrong("EPR", "epr", 2**32, ValueError),
    Wrong("OSI", "gprs", [1] * 31, ValueError),
    Wrong("OSI", "gprs", [1] * 33, ValueError),
    Wrong("OSI", "gprs", [1] * 31 + [-1], ValueError),
    Wrong("OSI", "gprs", [1] * 31 + [True], TypeError),
    Wrong("OSI", "gprs", 1, TypeError),
    Wrong("RISCV_SBI", "ret", [1, 2**64], ValueError),
]
RIGHT = {reply.case: the_answer_to(reply.case) for reply in REPLIES} | {"IO in": Reply("IO in", "data", b"good", 32, b"")}

every_wrong_answer = pytest.mark.parametrize("wrong", WRONG, ids=str)


@every_wrong_answer
def test_wrong_answer_changes_nothing(scripted, wrong):
    """It raises, the exit is as it was and owes what it owed, and only the right answer, given next, reaches KVM."""
    case = BY_NAME[wrong.case]
    vcpu = scripted.create_vcpu(0, [case.step(), hlt()])
    exit = vcpu.run()
    before = read(exit, case.fields)
    with pytest.raises(wrong.error):
        setattr(exit, wrong.field, wrong.value)
    assert read(exit, case.fields) == before
    left = case.payload, case.data
    if case.owes:
        assert vcpu.run() is exit
        right = RIGHT[wrong.case]
        setattr(exit, right.field, right.value)
        left = (case.payload, b"good") if wrong.case == "IO in" else (right.left(), case.data)
    assert type(vcpu.run()) is kvmexit.Hlt
    assert scripted.script(vcpu).left(0) == left


@pytest.mark.parametrize("wrong", [w for w in WRONG if w.case in ("IO in", "MMIO read", "HYPERCALL")], ids=str)
def test_wrong_answer_of_a_handler(scripted, wrong):
    """run() raises the same error, None included, and the exit is offered again by the next one."""
    case = BY_NAME[wrong.case]
    vcpu = scripted.create_vcpu(0, [case.step(), hlt()])
    with scripted.on(case.kind, lambda vcpu, exit: wrong.value), pytest.raises(wrong.error):
        vcpu.run()
    entries = entries_of(scripted, vcpu)
    exit = vcpu.run()
    assert type(exit) is case.kind
    assert getattr(exit, wrong.field) == case.fields[wrong.field]
    assert entries_of(scripted, vcpu) == entries


@pytest.mark.parametrize("name", ["IO out", "IO rep outsw", "MMIO write", "X86_WRMSR", "HLT"])
@pytest.mark.parametrize("value", [0, b"\0", "0"], ids=repr)
def test_data_returned_for_a_write(scripted, name, value):
    """Nothing was asked: TypeError, and the exit is offered again."""
    case = BY_NAME[name]
    vcpu = scripted.create_vcpu(0, [case.step()])
    with scripted.on(case.kind, lambda vcpu, exit: value), pytest.raises(TypeError, match="return None"):
        vcpu.run()
    assert type(vcpu.run()) is case.kind


# ---- string I/O ----

STRINGS = pytest.mark.parametrize(
    ("size", "count"), [(1, 2), (2, 4), (4, 4), (1, 16), (1, 17), (2, 9), (4, 5), (1, 4096), (4, 2048)]
)


@STRINGS
def test_rep_outs(scripted, size, count):
    """One exit carries all units; around 16 bytes, where the object's own room ends, as well as far beyond."""
    data = bytes((7 * i + 1) % 256 for i in range(size * count))
    exit = scripted.create_vcpu(0, [pio_out(0x3F8, data, size)]).run()
    assert (exit.size, exit.count, exit.is_write, exit.data) == (size, count, True, data)


@STRINGS
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_rep_ins(scripted, size, count, kind):
    """The answer is all units at once, in the PIO area; the union stays as it was."""
    data = bytes((7 * i + 1) % 256 for i in range(size * count))
    vcpu = scripted.create_vcpu(0, [pio_in(0x3F8, size, count), hlt()])
    exit = vcpu.run()
    exit.data = kind(data)
    assert exit.data == data
    vcpu.run()
    assert scripted.script(vcpu).left(0)[1] == data


def test_rep_ins_by_a_handler(scripted):
    """Several in a row, of one length and of another: each gets its own bytes."""
    answers = [b"0123456789abcdefghij", b"xy", b"0123"]
    waiting = iter(answers)
    scripted.on_pio(0x3F8, 1, lambda vcpu, io: next(waiting))
    vcpu = scripted.create_vcpu(0, [pio_in(0x3F8, 1, 20), pio_in(0x3F8, 2, 1), pio_in(0x3F8, 2, 2), hlt()])
    vcpu.run()
    assert [scripted.script(vcpu).left(i)[1] for i in range(3)] == answers


@pytest.mark.parametrize(
    ("value", "error"), [(b"1234567", ValueError), (b"123456789", ValueError), (1, TypeError), ("12345678", TypeError)]
)
def test_wrong_answer_to_rep_ins(scripted, value, error):
    """Bytes of all units, nothing less; an int would be the answer to one unit only."""
    vcpu = scripted.create_vcpu(0, [pio_in(0x3F8, 2, 4), hlt()])
    exit = vcpu.run()
    with pytest.raises(error):
        exit.data = value
    assert exit.data is None
    exit.data = b"12345678"
    vcpu.run()
    assert scripted.script(vcpu).left(0)[1] == b"12345678"


@pytest.mark.parametrize(
    ("size", "value", "left"),
    [(1, 0xFE, b"\xfe"), (2, 0x1234, b"\x34\x12"), (4, 0x12345678, b"\x78\x56\x34\x12"), (4, 0, b"\0\0\0\0")],
)
def test_int_answers_one_unit(scripted, size, value, left):
    """Little-endian, as the guest reads it."""
    vcpu = scripted.create_vcpu(0, [pio_in(0x60, size), hlt()])
    exit = vcpu.run()
    exit.data = value
    assert exit.data == left
    vcpu.run()
    assert scripted.script(vcpu).left(0)[1] == left


@pytest.mark.parametrize("size", range(1, 9))
def test_mmio_read_of_any_size(scripted, size):
    """1 to 8 bytes, at offset 40; those behind stay as they were."""
    value = 0x1122334455667788 >> (8 * (8 - size))
    vcpu = scripted.create_vcpu(0, [mmio_read(0x1000, size), hlt()])
    exit = vcpu.run()
    exit.data = value
    vcpu.run()
    left = scripted.script(vcpu).left(0)[0]
    assert left[40 - UNION : 48 - UNION] == value.to_bytes(size, "little") + bytes(8 - size)


# ---- exits are values ----

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

REUSING = [
    pytest.param([pio_out(0x80, bytes([i])) for i in range(5)], id="IO"),
    pytest.param([pio_out(0x80, bytes([i] * 100)) for i in range(5)], id="IO of strings"),
    pytest.param([mmio_write(0x1000 * i, bytes([i])) for i in range(5)], id="MMIO"),
    pytest.param([memory_fault(0x1000 * i) for i in range(5)], id="MEMORY_FAULT"),
    pytest.param([ScriptStep(24, union((32, "I", i), (36, "I", 0))) for i in range(5)], id="SYSTEM_EVENT"),
    pytest.param([ScriptStep(1000 + i, bytes([i])) for i in range(5)], id="unknown"),
]


@pytest.mark.skipif(FREE_THREADED, reason="a reference count of one proves nothing in free-threaded Python")
@pytest.mark.parametrize("steps", REUSING)
def test_exit_that_nobody_keeps_is_reused(scripted, steps):
    """One object serves all exits of a kind: nothing is allocated."""
    seen = []
    scripted.on(kvmexit.Exit, lambda vcpu, exit: seen.append(id(exit)))
    with pytest.raises(kvmexit.KvmError):  # the end of the script
        scripted.create_vcpu(0, steps).run()
    assert len(seen) == 5
    assert len(set(seen)) == 1


@pytest.mark.parametrize("steps", REUSING)
def test_exit_that_a_handler_keeps_never_changes(scripted, steps):
    """Each is an object of its own then, and reads afterwards as it did in the handler."""
    kept, said = [], []

    def keep(vcpu, exit):
        kept.append(exit)
        said.append(repr(exit))

    scripted.on(kvmexit.Exit, keep)
    with pytest.raises(kvmexit.KvmError):
        scripted.create_vcpu(0, steps).run()
    assert len({id(exit) for exit in kept}) == 5
    assert len(set(said)) == 5
    assert [repr(exit) for exit in kept] == said


@pytest.mark.parametrize("steps", REUSING)
def test_exit_that_the_caller_keeps_never_changes(scripted, steps):
    """As with handlers."""
    vcpu = scripted.create_vcpu(0, steps)
    kept, said = [], []
    for _ in steps:
        kept.append(vcpu.run())
        said.append(repr(kept[-1]))
    assert len(set(said)) == 5
    assert [repr(exit) for exit in kept] == said


def test_keeping_one_exit_does_not_stop_reuse(scripted):
    """The second of six is kept; those after it share the object made next."""
    kept, seen = [], []

    def keep_second(vcpu, io):
        seen.append(id(io))
        if len(seen) == 2:
            kept.append(io)

    scripted.on_pio(0x80, 1, keep_second)
    vcpu = scripted.create_vcpu(0, [*(pio_out(0x80, bytes([i])) for i in range(6)), hlt()])
    vcpu.run()
    assert kept[0].data == b"\1"
    if not FREE_THREADED:
        assert seen[0] == seen[1]
        assert seen[2] != seen[1]
        assert len(set(seen[2:])) == 1


def test_reused_exit_forgets_the_answer(scripted):
    """An unanswered read has no data, whatever the same object was answered before."""
    seen = []

    def answer(vcpu, io):
        seen.append((io.data, io.size))
        return b"z" * io.size * io.count

    scripted.on_pio(0x80, 1, answer)
    vcpu = scripted.create_vcpu(0, [pio_in(0x80, 1, 20), pio_in(0x80, 2), pio_in(0x80, 4), hlt()])
    vcpu.run()
    assert seen == [(None, 1), (None, 2), (None, 4)]


def test_exit_offered_again_is_the_same_object(scripted):
    """To handlers, to the caller, and as vcpu.pending."""
    seen = []

    def refuse(vcpu, io):
        seen.append(io)
        raise LookupError("later")

    vcpu = scripted.create_vcpu(0, [pio_in(0x80)])
    with scripted.on_pio(0x80, 1, refuse), pytest.raises(LookupError):
        vcpu.run()
    assert vcpu.pending is seen[0]
    assert vcpu.run() is seen[0]


def test_exits_of_two_vcpus_are_apart(scripted):
    """Each vCPU reuses its own."""
    first = scripted.create_vcpu(0, [pio_out(0x80, b"a")]).run()
    second = scripted.create_vcpu(1, [pio_out(0x80, b"b")]).run()
    assert (first.data, second.data) == (b"a", b"b")


def test_slot_is_the_one_of_the_access(scripted):
    """Memory added later, or taken away, changes no exit: not one that is offered again either."""
    vcpu = scripted.create_vcpu(0, [mmio_read(0x10000, 4)])
    exit = vcpu.run()
    scripted.memory.add(0x10000, 0x1000)
    assert vcpu.run() is exit
    assert exit.slot is None


def test_data_is_held_by_nobody_else(scripted):
    """Bytes taken from an exit are the taker's: a reused exit does not write into them."""
    taken = []
    scripted.on_pio(0x80, 1, lambda vcpu, io: taken.append(io.data))
    steps = [pio_out(0x80, bytes([i]) * length) for i in range(3) for length in (4, 40)]
    scripted.create_vcpu(0, [*steps, hlt()]).run()
    assert taken == [bytes([i]) * length for i in range(3) for length in (4, 40)]


# ---- repr ----


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (pio_out(0x3F8, b"H"), "Io(port=0x3f8, size=1, count=1, is_write=True, data=b'H')"),
        (pio_in(0x3F8, 2, 4), "Io(port=0x3f8, size=2, count=4, is_write=False, data=None)"),
        (mmio_write(0xFEE00000, b"\1\0"), r"Mmio(gpa=0xfee00000, size=2, is_write=True, data=b'\x01\x00')"),
        (BY_NAME["X86_RDMSR"].step(), "Rdmsr(index=0xc0010015, why=4, data=0x102030405060708, error=0)"),
        (memory_fault(0x7000, private=True), "MemoryFault(gpa=0x7000, size=0x1000, private=True, flags=8, errno=14)"),
        (memory_fault(0x7000, errno=133), "MemoryFault(gpa=0x7000, size=0x1000, private=False, flags=0, errno=133)"),
        (hlt(), "Hlt()"),
        (ScriptStep(None, errno=14, rip=0x1234), "UnexplainedFault(rip=0x1234, errno=14)"),
        (
            BY_NAME["INTERNAL_ERROR"].step(),
            "InternalError(suberror=3, data=(72623859790382856, 1230066625199609624), insn_bytes=None)",
        ),
        (ScriptStep(24, union((32, "I", 2), (36, "I", 0))), "SystemEvent(type=2, data=())"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_repr(scripted, step, text):
    """The class, the fields of __match_args__, addresses in hexadecimal, and the errno of what failed."""
    assert repr(scripted.create_vcpu(0, [step]).run()) == text


def test_repr_of_unknown_exits(scripted):
    """Number and bytes, to go into a bug report."""
    text = repr(scripted.create_vcpu(0, [ScriptStep(1000, RAW)]).run())
    assert text == f"UnknownExit(reason=0x3e8, raw={RAW!r})"


def test_repr_of_interrupted(scripted):
    vcpu = scripted.create_vcpu(0, [ScriptStep(spin=True)])
    vcpu.kick()
    assert repr(vcpu.run()) == "Interrupted(cause='kick', errno=4)"


# ---- match ----


@every_class
def test_match_args_are_fields(kind):
    """Positional patterns name fields that are there."""
    assert isinstance(kind.__match_args__, tuple)
    assert set(kind.__match_args__) <= fields_of(kind) | fields_of(kvmexit.Exit)


@every_class
def test_what_has_fields_can_be_matched(kind):
    """No class with fields has forgotten its __match_args__."""
    assert kind is kvmexit.Exit or bool(kind.__match_args__) == bool(fields_of(kind))


def describe(exit):
    match exit:
        case kvmexit.Io(port, size, count, False, None):
            return f"in {port:#x} {size}*{count}"
        case kvmexit.Io(port, size, count, True, data):
            return f"out {port:#x} {size}*{count} {data}"
        case kvmexit.Mmio(gpa, size, True, data):
            return f"write {gpa:#x} {size} {data}"
        case kvmexit.Mmio(gpa, size, False):
            return f"read {gpa:#x} {size}"
        case kvmexit.Hypercall(12, (gpa, pages, *_), ret):
            return f"map {gpa:#x} {pages} {ret}"
        case kvmexit.MemoryFault(gpa, size, private, flags):
            return f"fault {gpa:#x} {size} {private} {flags}"
        case kvmexit.Rdmsr(index, why, data, error):
            return f"rdmsr {index:#x} {why} {data:#x} {error}"
        case kvmexit.SystemEvent(type, data):
            return f"event {type} {data}"
        case kvmexit.InternalError(suberror, (first, *_), insn_bytes):
            return f"internal {suberror} {first} {insn_bytes}"
        case kvmexit.UnexplainedFault(rip, errno=14):
            return f"bare {rip:#x}"
        case kvmexit.UnknownExit(reason, raw):
            return f"unknown {reason} {raw[:2]}"
        case kvmexit.Hlt():
            return "halt"
        case kvmexit.Exit(reason=reason):
            return f"other {reason.name}"


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (pio_in(0x60, 1, 3), "in 0x60 1*3"),
        (pio_out(0x3F8, b"abcd", 2), "out 0x3f8 2*2 b'abcd'"),
        (mmio_write(0x1000, b"xy"), "write 0x1000 2 b'xy'"),
        (mmio_read(0x2000, 4), "read 0x2000 4"),
        (BY_NAME["HYPERCALL"].step(), f"map 0x8877665544332200 {0x8877665544332201} 0"),
        (memory_fault(0x3000, private=True), "fault 0x3000 4096 True 8"),
        (BY_NAME["X86_RDMSR"].step(), "rdmsr 0xc0010015 4 0x102030405060708 0"),
        (BY_NAME["SYSTEM_EVENT"].step(), f"event 6 {(U64, V64, W64)}"),
        (BY_NAME["INTERNAL_ERROR emulation"].step(), "internal 1 1 b'`ab'"),
        (ScriptStep(None, errno=14, rip=0x1234), "bare 0x1234"),
        (ScriptStep(44, b"hi"), "unknown 44 b'hi'"),
        (hlt(), "halt"),
        (ScriptStep(8), "other SHUTDOWN"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_match(scripted, step, text):
    """Positional patterns take the fields in the documented order; Exit itself matches all."""
    assert describe(scripted.create_vcpu(0, [step]).run()) == text


# ---- the classes ----


@every_class
def test_exits_come_from_run_only(kind):
    """There is no way to make one up."""
    with pytest.raises(TypeError, match=r"come from Vcpu.run\(\)"):
        kind()


@every_class
def test_classes_are_final(kind):
    """Each kind means one thing. (Exit is their base.)"""
    if kind is not kvmexit.Exit:
        with pytest.raises(TypeError, match="not an acceptable base type"):
            type("Mine", (kind,), {})


@every_class
def test_classes_say_what_they_are(kind):
    """A docstring, and a home in the package."""
    assert kind.__doc__
    assert getattr(kvmexit, kind.__name__) is kind


@every_case
def test_exits_take_no_other_attributes(scripted, case):
    """No __dict__, no weak references: an exit is its fields."""
    exit = scripted.create_vcpu(0, [case.step()]).run()
    assert not hasattr(exit, "__dict__")
    with pytest.raises(AttributeError):
        exit.note = 1
    with pytest.raises(TypeError):
        weakref.ref(exit)


def test_exit_outlives_its_vm(scripted):
    """A kept exit holds what it needs."""
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"q")])
    exit = vcpu.run()
    del vcpu
    scripted.close()
    assert exit.data == b"q"


def test_exit_reasons_are_the_kernels():
    """KVM_EXIT_*: 44 numbers without a gap."""
    assert [reason.value for reason in ExitReason] == list(range(44))
