"""Every errno at every entry, in every state that a vCPU can be in, by every way to run it: what pends stays pending, with its
answer, and what KVM says next comes next."""

import errno
import struct
from collections import namedtuple

import pytest
from guests import STRESS
from test_embed import api
from test_embed import run as run_natively

import kvmexit
from kvmexit import native
from kvmexit.testing import ScriptedVM, ScriptStep, hlt, hypercall, memory_fault, mmio_read, mmio_write, pio_in, pio_out

SOME = [1, 2, 4, 5, 8, 9, 11, 12, 13, 14, 16, 22, 28, 38, 61, 71, 95, 133, 134, 512, 4095]
ERRNOS = SOME if STRESS <= 1 else sorted({*errno.errorcode, *SOME})
SILENT = {errno.EINTR, errno.EAGAIN, errno.ENOMEM}  # the loop deals with these by itself: docs/triage.md
FAULTS = {errno.EFAULT, 133}
IN_A_ROW = 1000

pytestmark = pytest.mark.off_main  # a tick has KVM complete what pends

# A state: `steps` bring a vCPU there, `to(vm, vcpu)` does the rest. `owes`: an exit that has to be answered first. `left`: the bytes
# that KVM must find in the union or the PIO data when it completes the exit; None where nothing pends.
State = namedtuple("State", "steps to owes left", defaults=(None, False, None))


def returned(vm, vcpu):
    vcpu.run()


def answered(value):
    def to(vm, vcpu):
        exit = vcpu.run()
        if isinstance(exit, kvmexit.Hypercall):
            exit.ret = value
        else:
            exit.data = value

    return to


def raised(vm, vcpu):
    def handler(vcpu, exit):
        raise RuntimeError("a handler's")

    with vm.on(kvmexit.Exit, handler), pytest.raises(RuntimeError, match="a handler's"):
        vcpu.run()


def by_python(vm, vcpu):
    vm.on_pio(0x70, 1, lambda vcpu, exit: 0x33)


def natively(vm, vcpu):
    vm.on_pio(0x70, 1, native.Ignore(0x44))


def with_registers(vm, vcpu):
    answered(0x55)(vm, vcpu)
    vcpu.regs.rax = 7


def kicked(vm, vcpu):
    answered(0x66)(vm, vcpu)
    vcpu.kick()
    assert vcpu.run().cause == "kick"


STATES = {
    "nothing": State([]),
    "an exit that wants nothing": State([ScriptStep(1, struct.pack("<II", 6, 0))], returned),
    "a write returned": State([pio_out(0x70, b"A")], returned, left=b"A"),
    "an MMIO write returned": State([mmio_write(0x5000, b"AB")], returned, left=struct.pack("<Q8s", 0x5000, b"AB")),
    "a read answered": State([pio_in(0x70)], answered(0x5A), left=b"\x5a"),
    "an MMIO read answered": State([mmio_read(0x5000, 4)], answered(0x1234), left=struct.pack("<QI", 0x5000, 0x1234)),
    "a hypercall answered": State([hypercall(12, 1, 2, 3)], answered(9), left=None),
    "a read that owes": State([pio_in(0x70)], returned, owes=True, left=b"\x77"),
    "an MMIO read that owes": State([mmio_read(0x5000, 4)], returned, owes=True, left=struct.pack("<QI", 0x5000, 0x77)),
    "a hypercall that owes": State([hypercall(12, 1, 2, 3)], returned, owes=True),
    "a write whose handler raised": State([pio_out(0x70, b"A")], raised, owes=True, left=b"A"),
    "a read answered by Python": State([pio_in(0x70)], by_python, left=b"\x33"),
    "a read answered natively": State([pio_in(0x70)], natively, left=b"\x44"),
    "a read answered, registers written": State([pio_in(0x70)], with_registers, left=b"\x55"),
    "a read answered, completed by a kick": State([pio_in(0x70)], kicked, left=b"\x66"),
    "a memory fault": State([memory_fault(0x5000)], returned),
    "a bare fault": State([ScriptStep(errno=errno.EFAULT)], returned),
}


class Said(Exception):
    """What a run that failed said: errno, or None where it has none."""


def by_run(vcpu):
    try:
        return vcpu.run()
    except kvmexit.KvmError as error:
        raise Said(error.errno) from None


def by_run_with_timeout(vcpu):
    try:
        return vcpu.run(timeout=1000)
    except kvmexit.KvmError as error:
        raise Said(error.errno) from None


def by_complete(vcpu):
    """complete() until nothing pends, then run()."""
    try:
        exit = vcpu.complete()
        return vcpu.run() if exit is None else exit
    except kvmexit.KvmError as error:
        raise Said(error.errno) from None


def by_c(vcpu):
    what, _ = run_natively(vcpu)
    if what < 0:
        raise Said(-what)
    assert what in (0, 1), what
    return vcpu.pending if vcpu.pending is not None else vcpu.last_exits[-1]


WAYS = {"run": by_run, "run with a time-out": by_run_with_timeout, "complete": by_complete, "the C API": by_c}


def cells(*names):
    """Each state with each of these ways; but what a Python handler takes stays Python's, and the C API does not go past it."""
    cells = [(state, way) for state in STATES for way in names if WAYS[way] is not by_c or STATES[state].to is not by_python]
    return pytest.mark.parametrize(
        ("state", "way"), [pytest.param(STATES[state], WAYS[way], id=f"{state}-{way}") for state, way in cells])


def settle(state, vm, vcpu, way):
    """Give an exit that owes its answer; it must still be there for that."""
    if not state.owes:
        return
    before = vm.script(vcpu).position
    exit = way(vcpu)
    assert vcpu.pending is not None, "an exit that owes got lost"
    assert vm.script(vcpu).position == before, "it was entered while it owed"
    exit = vcpu.pending
    if isinstance(exit, kvmexit.Hypercall):
        exit.ret = 0x77
    elif not exit.is_write:
        exit.data = 0x77
    else:
        api.answer(api.vcpu(vcpu))


@cells(*WAYS)
def test_no_errno_takes_a_pending_exit_or_its_answer(state, way):
    """Each errno once, then a write, then HLT; all errnos there are with KVMEXIT_STRESS=2."""
    for number in ERRNOS:
        with ScriptedVM() as vm:
            last = pio_out(0x99, b"Z")
            vcpu = vm.create_vcpu(0, [*state.steps, ScriptStep(errno=number), last, hlt()])
            if state.to:
                state.to(vm, vcpu)
            settle(state, vm, vcpu, way)
            self_handled = state.to in (by_python, natively)
            pends = vcpu.pending
            where = f"errno {number}"
            try:
                exit = way(vcpu)
            except Said as said:
                assert number not in SILENT | FAULTS, where
                assert said.args == (number,), where  # noqa: PT017
                if (way is by_complete and pends is not None) or state.to is with_registers:
                    assert vcpu.pending is None, where  # an entry before completed it: KVM does so before it looks at immediate_exit
                elif not self_handled:
                    assert (vcpu.pending is None) == (pends is None), f"{where}: {pends!r} became {vcpu.pending!r}"
                    assert pends is None or vcpu.pending.reason == pends.reason, where
                assert vcpu.pending is None or vcpu.pending.errno == 0, f"{where}: {vcpu.pending!r} has an errno of another entry"
                exit = way(vcpu)
            else:
                assert number in SILENT | FAULTS, where
                if number in FAULTS:
                    assert exit.errno == number, where
                    exit = way(vcpu)
            assert exit.reason == last.reason, f"{where}: {exit!r}"
            if state.left is not None:
                union, data = vm.script(vcpu).left(0)
                assert state.left in (union[: len(state.left)], data), f"{where}: KVM found {data!r}, {union[:16]!r}"
            assert isinstance(by_run(vcpu), kvmexit.Hlt), where


@cells("run", "the C API")
@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN, errno.ENOMEM])
def test_storms_end_where_they_end(state, way, number):
    """Hundreds of the same, then what KVM says; ENOMEM a thousand times in a row is an error, and the exit still pends."""
    with ScriptedVM() as vm:
        again = [ScriptStep(errno=number)] * (IN_A_ROW - 1)
        vcpu = vm.create_vcpu(0, [*state.steps, *again, pio_out(0x99, b"Z"), ScriptStep(errno=number), *again, hlt()])
        if state.to:
            state.to(vm, vcpu)
        settle(state, vm, vcpu, way)
        assert way(vcpu).reason == 2
        assert vcpu.retries["e" + errno.errorcode[number][1:].lower()] >= IN_A_ROW - 1
        if number == errno.ENOMEM:
            with pytest.raises(Said) as said:
                way(vcpu)
            assert said.value.args == (errno.ENOMEM,)
            assert vcpu.pending.reason == 2
        assert by_run(vcpu).reason == 5
