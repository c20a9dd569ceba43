"""vm.filter_msrs(): which accesses to MSRs become exits."""

import errno
import threading

import pytest
from guests import CODE, load, stress
from processes import in_thread

import kvmexit
from kvmexit import MsrExitReason, MsrRange, native

LSTAR, SYSENTER_CS, SYSENTER_EIP, UNKNOWN = 0xC000_0082, 0x174, 0x176, 0xDEAD

# rdmsr; out 0x80, eax; wrmsr; out 0x81, al
GUEST = bytes.fromhex("0f 32 e7 80  0f 30 e6 81")


@pytest.fixture
def access(vm):
    """-> a function: have the guest read or write an MSR; -> why that was an exit, or None."""
    vcpu = load(vm, GUEST, cpl=0)

    def do(msr, kind):
        vcpu.regs.rip = CODE + (4 if kind == "write" else 0)
        vcpu.regs.rcx, vcpu.regs.rax, vcpu.regs.rdx = msr, 0, 0
        exit = vcpu.run(timeout=10)
        if isinstance(exit, kvmexit.Io):
            return None
        assert type(exit).__name__ == {"read": "Rdmsr", "write": "Wrmsr"}[kind]
        assert exit.index == msr
        if kind == "read":
            exit.data = 0x1234
        assert vcpu.run(timeout=10).port == {"read": 0x80, "write": 0x81}[kind]
        assert kind == "write" or vcpu.regs.rax == 0x1234
        return exit.why

    return do


def denied(access, *msrs):
    """-> the accesses to these MSRs that the filter denies."""
    asked = [(msr, kind) for msr in msrs for kind in ("read", "write")]
    return [(msr, kind) for msr, kind in asked if access(msr, kind) is not None]


BOTH = ("read", "write")


@pytest.mark.parametrize(
    ("ranges", "default_allow", "expected"), [
        ([], True, []),
        ([MsrRange(LSTAR, 1, False, False)], True, [(LSTAR, "read"), (LSTAR, "write")]),
        ([MsrRange(LSTAR, 2, None, False)], True, [(LSTAR, "write"), (LSTAR + 1, "write")]),
        ([(LSTAR, 1, False)], True, [(LSTAR, "read")]),
        ([MsrRange(SYSENTER_CS, 3, read=False, write=True)], True, [(SYSENTER_CS, "read"), (SYSENTER_EIP, "read")]),
        ([MsrRange(SYSENTER_CS, 3, b"\x06", b"\x01")], True, [(SYSENTER_CS, "read"), (SYSENTER_EIP, "write")]),
        ([MsrRange(SYSENTER_CS, 3, True, True)], False, [(LSTAR, "read"), (LSTAR, "write"), (LSTAR + 1, "read"),
                                                         (LSTAR + 1, "write")]),
        ([MsrRange(SYSENTER_CS, 3, True), MsrRange(SYSENTER_CS, 3, write=b"\x04"), MsrRange(LSTAR, 2, True, True)], False,
         [(SYSENTER_CS, "write")]),
        ([MsrRange(0, 0x2000, True, True), MsrRange(0xC000_0000, 0x2000, False, True)], False,
         [(LSTAR, "read"), (LSTAR + 1, "read")]),
    ])  # fmt: skip
def test_what_is_denied_exits(vm, access, ranges, default_allow, expected):
    """By range, by kind of access, by bit, by default; the rest KVM handles. Without a filter it handles all again."""
    msrs = SYSENTER_CS, SYSENTER_EIP, LSTAR, LSTAR + 1
    before = denied(access, *msrs)
    vm.filter_msrs(ranges, default_allow=default_allow)
    assert denied(access, *msrs) == expected
    vm.filter_msrs()
    assert denied(access, *msrs) == before == []


def test_the_exit_says_why(vm, access):
    """The filter is one of three reasons."""
    vm.on_msr(0)  # has the other two exit as well
    vm.filter_msrs([MsrRange(LSTAR, 1, False, False)])
    assert access(LSTAR, "read") == MsrExitReason.FILTER == 4
    assert access(UNKNOWN, "read") == MsrExitReason.UNKNOWN
    assert access(UNKNOWN, "write") == MsrExitReason.UNKNOWN


@pytest.mark.parametrize("first", ["on_msr", "filter"])
def test_handlers_and_filters_do_not_undo_each_other(vm, access, first):
    """Whichever comes first: what KVM does not know exits because of on_msr(), what is denied because of the filter."""
    steps = [lambda: vm.on_msr(UNKNOWN, 1, lambda vcpu, msr: kvmexit.STOP),
             lambda: vm.filter_msrs([MsrRange(LSTAR, 1, False, False)])]
    for step in steps if first == "on_msr" else reversed(steps):
        step()
    assert access(UNKNOWN, "read") == MsrExitReason.UNKNOWN
    assert access(LSTAR, "write") == MsrExitReason.FILTER


def test_a_native_handler_answers_what_is_denied(vm):
    """A paravirtual MSR of one's own in the place of a real one."""
    vcpu = load(vm, GUEST, cpl=0)
    vm.filter_msrs([MsrRange(LSTAR, 1, False, False)])
    vm.on_msr(LSTAR, 1, native.Registers(bytearray(b"\x78\x56\x34\x12\0\0\0\0")))
    vcpu.regs.rcx = LSTAR
    assert vcpu.run(timeout=10).data == b"\x78\x56\x34\x12"


def test_without_a_handler_the_exit_is_run_s_and_can_be_a_gp(vm):
    """error = 1 is the #GP of a processor without the MSR: without an IDT, a triple fault."""
    vcpu = load(vm, GUEST, cpl=0)
    vm.filter_msrs([MsrRange(LSTAR, 1, False, False)])
    vcpu.regs.rcx = LSTAR
    exit = vcpu.run(timeout=10)
    assert isinstance(exit, kvmexit.Rdmsr)
    exit.error = 1
    assert isinstance(vcpu.run(timeout=10), kvmexit.Shutdown)


@pytest.mark.parametrize(
    ("ranges", "says"), [
        ([(0x10, 0, False)], "1 to 0x3000"),
        ([(0x10, 0x3001, False)], "1 to 0x3000"),
        ([(-1, 1, False)], "outside 0..0xffffffff"),
        ([(0xFFFF_FFFF, 2, False)], "outside 0..0xffffffff"),
        ([(0x10, 1)], "says nothing"),
        ([(0x10, 9, b"\1")], "bitmap of 1 bytes, 9 MSRs take 2"),
        ([(0x10, 9, None, bytes(3))], "bitmap of 3 bytes, 9 MSRs take 2"),
        ([(0x10, 8, False), (0x17, 1, False)], r"MSR range 1 \(0x17 \+ 0x1\) overlaps 0x10 \+ 0x8"),
        ([(0x10, 8, False, True), (0x8, 9, None, False)], r"MSR range 1 \(0x8 \+ 0x9\) overlaps 0x10 \+ 0x8"),
        ([(0x800, 0x100, False)], "x2APIC"),
        ([(0x10 + i, 1, False, True) for i in range(9)], "18 ranges, where KVM takes 16"),
    ])  # fmt: skip
def test_wrong_ranges_are_refused(scripted, ranges, says):
    """Before KVM is asked, saying which and why."""
    with pytest.raises(ValueError, match=says):
        scripted.filter_msrs(ranges)


def test_denying_everything_needs_a_range(scripted):
    """KVM's EINVAL, in words."""
    with pytest.raises(ValueError, match="KVM does not deny every MSR"):
        scripted.filter_msrs(default_allow=False)


@pytest.mark.parametrize("wrong", [[("x", 1, False)], [(0x10, 1, 1.5)], [(0x10, 1, "x")], 5, [5], [(1, 1, True, True, True)]])
def test_what_is_no_range_is_a_type_error(scripted, wrong):
    """Not a filter of something else."""
    with pytest.raises(TypeError):
        scripted.filter_msrs(wrong)


def test_sixteen_ranges_fit_and_may_touch(vm, access):
    """As many as KVM takes, side by side, and what one decides the other may leave open."""
    vm.filter_msrs([MsrRange(SYSENTER_CS + i // 2, 1, *((False, None) if i % 2 else (None, False))) for i in range(16)])
    assert denied(access, SYSENTER_CS, SYSENTER_EIP) == [(m, k) for m in (SYSENTER_CS, SYSENTER_EIP) for k in BOTH]
    assert denied(access, LSTAR) == []


def test_a_refused_filter_leaves_the_old_one(vm, access):
    """Both for what is refused here, and where KVM refuses."""
    vm.filter_msrs([MsrRange(LSTAR, 1, False)])
    with pytest.raises(ValueError, match="says nothing"):
        vm.filter_msrs([MsrRange(LSTAR, 1)])
    assert denied(access, LSTAR) == [(LSTAR, "read")]


def test_filters_change_while_the_guest_runs(vm):
    """An access sees one filter or the other: every read is answered by KVM (0) or by the handler (1)."""
    # again: xor eax, eax; rdmsr; mov [0x3000], eax; inc rbx; jmp again
    vcpu = load(vm, bytes.fromhex("31 c0 0f 32 89 04 25 00 30 00 00 48 ff c3 eb f2"), cpl=0)
    vcpu.regs.rcx = LSTAR
    answered = threading.Event()

    @vm.on_msr(LSTAR)
    def answer(vcpu, msr):
        assert msr.why == MsrExitReason.FILTER
        answered.set()
        return 1

    ends = []
    thread = in_thread(lambda: ends.append(vcpu.run(timeout=60)))
    for _ in range(stress(30)):
        answered.clear()
        vm.filter_msrs([MsrRange(LSTAR, 1, False, False)])
        assert answered.wait(30)
        vm.filter_msrs()
    vcpu.kick()
    thread.join(30)
    assert ends[0].cause == "kick"


def test_an_older_kernel_says_so(vm, monkeypatch):
    """EOPNOTSUPP with the version that has it; what denies nothing needs nothing."""

    class Old(kvmexit.VM):
        def check(self, cap):
            return 0 if cap in (188, 189) else super().check(cap)

    with Old() as old:
        with pytest.raises(kvmexit.KvmError, match=r"Linux 5\.10") as caught:
            old.filter_msrs([MsrRange(LSTAR, 1, False)])
        assert caught.value.errno == errno.EOPNOTSUPP
