"""pause() and resume(): on return of the one everything stands still, after the other it goes on (src/kvmexit/_vcpus.pyx)."""

import faulthandler
import os
import queue
import random
import signal
import statistics
import struct
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
from guests import CODE, OUT_FOREVER, SPIN, STRESS, load, stress
from processes import in_thread, python

import kvmexit
from kvmexit import STOP, Interrupted, VcpuBusyError, _vcpus
from kvmexit.testing import ScriptedVM, ScriptStep, hlt, mmio_write, pio_in, pio_out

pytestmark = pytest.mark.timeout(60 + 10 * STRESS)

LONG = 40  # seconds: a deadlock; what the emulator of the lab takes on a loaded machine is none
SHORT = 0.05  # seconds in which what must not happen would have happened
PAGE = 4096
COUNTERS = 0x8000

COUNT = bytes.fromhex("48 ff 03 eb fb")  # loop: inc qword [rbx]; jmp loop
COUNT_OUT = bytes.fromhex("48 ff 03 e6 80 eb f9")  # loop: inc qword [rbx]; out 0x80, al; jmp loop
FOR_EVER = ScriptStep(spin=True)


def begin(function, *arguments):
    """Call a function in a daemon thread; -> the Future of its result."""
    future = Future()

    def call():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    in_thread(call)
    return future


def ended(*futures):
    """-> the result of the last; all must have ended soon."""
    try:
        return [future.result(LONG) for future in futures][-1]
    except TimeoutError:
        faulthandler.dump_traceback()
        raise AssertionError("deadlock") from None


def until(condition):
    """Wait until something holds."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.0005)


def still_waits(future):
    """Whether it has not ended in a while."""
    time.sleep(SHORT)
    return not future.done()


class Machine:
    """vCPUs with one memory; each guest counts in a word of its own, and the handler for port 0x80 counts its calls."""

    def __init__(self, vm, *codes):
        self.vm = vm
        self.ram = vm.memory.add(0, 1 << 20)
        self.calls = [0] * len(codes)
        self.vcpus = [self.vcpu(i, code) for i, code in enumerate(codes)]
        vm.on_pio(0x80, 1, self.count)

    def vcpu(self, i, code):
        self.ram[CODE + 64 * i : CODE + 64 * i + len(code)] = code
        vcpu = self.vm.create_vcpu(i)
        kvmexit.x86.long_mode(vcpu, CODE + 64 * i, cpl=3)
        vcpu.regs.rbx = COUNTERS + 64 * i
        return vcpu

    def count(self, vcpu, io):
        self.calls[vcpu.id] += 1

    def state(self):
        """What moves: the guests' counters, and calls."""
        return [struct.unpack_from("<Q", self.ram.view, COUNTERS + 64 * i)[0] for i in range(len(self.vcpus))] + self.calls

    def moves(self):
        """Whether each guest comes to count on."""
        before = self.state()[: len(self.vcpus)]
        until(lambda: all(now != then for now, then in zip(self.state(), before, strict=False)))
        return True

    def stands_still(self, seconds=SHORT):
        before = self.state()
        time.sleep(seconds)
        return self.state() == before


@contextmanager
def running(*vcpus):
    """Each vCPU's run() in a thread of its own, until the block ends."""
    runs = [begin(vcpu.run) for vcpu in vcpus]
    until(lambda: all(vcpu.running for vcpu in vcpus))
    try:
        yield runs
    finally:
        for vcpu in vcpus:
            vcpu.kick()
    assert all(isinstance(run.result(LONG), Interrupted) for run in runs)


def parking(vcpu, timeout=None):
    """run() on a paused VM in a thread; -> its Future, once it is parked."""
    run = begin(vcpu.run, timeout)
    until(lambda: vcpu.running)
    vcpu.vm.pause()  # comes back when it is
    vcpu.vm.resume()
    return run


class Gate:
    """A handler that comes back only when let go."""

    def __init__(self, vm):
        self.asked, self.go = [], threading.Event()
        vm.on(kvmexit.Exit, self.wait)

    def wait(self, vcpu, exit):
        self.asked.append(exit)
        assert self.go.wait(LONG)

    def vcpu(self, vm, *, id=0):
        """A vCPU that comes to the handler, and then spins; each kick or pause ends one step."""
        return vm.create_vcpu(id, [pio_out(1, b"x"), *[FOR_EVER] * 9])


@contextmanager
def alarm(action, seconds=0.05):
    """Have SIGALRM call `action` on the main thread, once."""
    previous = signal.signal(signal.SIGALRM, lambda number, frame: action())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Rung(Exception):
    """What an alarm raises."""


def ring():
    raise Rung


def entered(vcpu):
    """How often a scripted vCPU was entered."""
    return len(vcpu.vm.script(vcpu).entries)


@pytest.fixture
def hectic():
    """Threads take turns a hundred times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.fixture
def told(monkeypatch):
    """pause() looks again only when told to."""
    monkeypatch.setattr(_vcpus, "_AGAIN_S", 3600)


@pytest.fixture
def other():
    """A second scripted VM."""
    with ScriptedVM() as vm:
        yield vm


# ---- guests stand still ----


@pytest.mark.kvm
@pytest.mark.parametrize(
    "codes", [[COUNT], [COUNT_OUT], [COUNT, COUNT_OUT], [COUNT, COUNT, COUNT_OUT], [COUNT, COUNT_OUT] * 2], ids=len)
def test_nothing_moves_while_paused(vm, codes):
    """Neither guests that spin nor guests that exit all the time, nor their handlers; then all go on."""
    machine = Machine(vm, *codes)
    with running(*machine.vcpus):
        assert machine.moves()
        vm.pause()
        assert machine.stands_still()
        vm.resume()
        assert machine.moves()


@pytest.mark.kvm
@pytest.mark.parametrize("timeout", [None, 0.0005], ids=["one-run", "many-runs"])
def test_every_pause_takes_hold_and_lets_go(vm, hectic, timeout):
    """At random moments of a run(), also between one and the next."""
    machine = Machine(vm, COUNT, COUNT_OUT)
    chance, stop, worst = random.Random(3), [], 0

    def runs(vcpu):
        while not stop:
            vcpu.run(timeout)

    runners = [begin(runs, vcpu) for vcpu in machine.vcpus]
    try:
        for _ in range(stress(100)):
            assert machine.moves()
            time.sleep(chance.random() / 500)
            began = time.monotonic()
            vm.pause()
            worst = max(worst, time.monotonic() - began)
            assert machine.stands_still(0.001)
            vm.resume()
    finally:
        stop.append(True)
        for vcpu in machine.vcpus:
            vcpu.kick()
    ended(*runners)
    assert worst < 5


@pytest.mark.kvm
@pytest.mark.parametrize(("code", "halves", "rax"), [
    ("48 8b 07 eb fe", 2, 0x0403020104030201),  # mov rax, [rdi]; jmp $
    ("48 89 07 eb fe", 2, 0),  # mov [rdi], rax; jmp $
    ("e5 80 eb fe", 1, 0x04030201),  # in eax, 0x80; jmp $
], ids=["mmio-read", "mmio-write", "in"])
def test_what_is_pending_is_complete_before_pause_returns(vm, code, halves, rax):
    """An access over two pages is two exits: the handler sees both, and the guest has got the answer."""
    code = bytes.fromhex(code)
    vcpu = load(vm, code)
    vcpu.regs.rax, vcpu.regs.rdi = 0, (16 << 20) + 0xFFC
    asked = []

    @vm.on(kvmexit.Exit)
    def handler(vcpu, exit):
        asked.append(exit)
        until(lambda: vm.paused)  # the pause comes while the access is half done
        return None if getattr(exit, "is_write", False) else b"\1\2\3\4"

    with running(vcpu) as [run]:
        until(lambda: asked)
        vm.pause()
        assert len(asked) == halves
        for look in (lambda: vcpu.regs.rax, lambda: vcpu.pending):  # even a parked one is its thread's
            with pytest.raises(VcpuBusyError):
                look()
        vcpu.kick()
        assert ended(run).cause == "kick"
        assert (vm.paused, vcpu.pending, vcpu.regs.rax) == (True, None, rax)
        assert vcpu.regs.rip == CODE + len(code) - 2


def test_a_pause_waits_for_handlers_and_what_they_answer(scripted, told):
    """It returns when the handler has, the second half has been handled too, and the loop has parked."""
    gate = Gate(scripted)
    vcpu = scripted.create_vcpu(0, [
        mmio_write(0xFFC, b"abcd"), mmio_write(0x1000, b"efgh")._replace(second_half=True), FOR_EVER])
    with running(vcpu):
        until(lambda: gate.asked)
        pause = begin(scripted.pause)
        assert still_waits(pause)
        assert scripted.paused
        gate.go.set()
        ended(pause)
        assert ([exit.gpa for exit in gate.asked], entered(vcpu)) == ([0xFFC, 0x1000], 3)


def test_a_pause_waits_again_for_a_vcpu_that_was_parked_before(scripted):
    """A vCPU that goes on is no longer counted as parked."""
    gate = Gate(scripted)
    vcpu = gate.vcpu(scripted)
    scripted.pause()
    run = parking(vcpu)
    scripted.resume()
    until(lambda: gate.asked)
    pause = begin(scripted.pause)
    assert still_waits(pause)
    gate.go.set()
    ended(pause)
    vcpu.kick()
    assert ended(run).cause == "kick"


@pytest.mark.parametrize("verdict", [STOP, None], ids=["returns", "parks"])
def test_who_pauses_is_told_that_the_vcpu_stands(scripted, told, verdict):
    """By a run() that returns its exit, and by one that parks."""
    asked = []

    @scripted.on_pio(1)
    def handler(vcpu, io):
        asked.append(io.port)
        until(lambda: scripted.paused)
        time.sleep(0.01)  # so that pause() waits already
        return verdict

    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), FOR_EVER])
    run = begin(vcpu.run)
    until(lambda: asked)
    ended(begin(scripted.pause))
    assert run.done() == (verdict is STOP)


def test_resume_wakes_a_parked_run_at_once(scripted):
    """It does not wait for the next tick, 100 ms later."""
    vcpu = scripted.create_vcpu(0, [FOR_EVER] * 1000)
    took = []
    with running(vcpu):
        for _ in range(15):
            scripted.pause()
            before, began = entered(vcpu), time.monotonic()
            scripted.resume()
            until(lambda before=before: entered(vcpu) > before)
            took.append(time.monotonic() - began)
    assert statistics.median(took) < 0.05


# ---- run() and complete() on a paused VM ----


@pytest.mark.parametrize("owing", [False, True], ids=["fresh", "owing"])
def test_a_run_on_a_paused_vm_goes_on_only_once_resumed(scripted, owing):
    """Before, it neither enters nor calls a handler, also where it begins with an exit that owes an answer."""
    asked = []
    vcpu = scripted.create_vcpu(0, [pio_in(1), hlt()])
    if owing:
        vcpu.run()
    scripted.on_pio(1, 1, lambda vcpu, io: asked.append(io.port) or 5)
    scripted.pause()
    run = parking(vcpu)
    assert still_waits(run)
    assert (entered(vcpu), asked) == (owing, [])
    scripted.resume()
    assert isinstance(ended(run), kvmexit.Hlt)
    assert asked == [1]


@pytest.mark.parametrize("when", ["before", "parked"])
def test_a_kick_ends_a_parked_run_once(scripted, when):
    """The VM stays paused, nothing was entered, and the next run() parks again."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    scripted.pause()
    if when == "before":
        vcpu.kick()
        run = begin(vcpu.run)
    else:
        run = parking(vcpu)
        vcpu.kick()
    assert ended(run).cause == "kick"
    assert (scripted.paused, entered(vcpu)) == (True, 0)
    assert vcpu.run(timeout=0.02).cause == "timeout"


@pytest.mark.parametrize("timeout", [0, 0.01, 0.25])
def test_a_timeout_ends_a_parked_run(scripted, timeout):
    """At its deadline: not before, not seconds later; with nothing entered."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    scripted.pause()
    began = time.monotonic()
    assert ended(begin(vcpu.run, timeout)).cause == "timeout"
    assert timeout <= time.monotonic() - began < timeout + 5
    assert entered(vcpu) == 0


def test_a_timeout_ends_a_run_that_a_pause_has_stopped(scripted):
    """Its deadline goes on while it is parked."""
    vcpu = scripted.create_vcpu(0, [FOR_EVER])
    run = begin(vcpu.run, 0.2)
    until(lambda: vcpu.running)
    scripted.pause()
    assert ended(run).cause == "timeout"
    assert scripted.paused


def test_a_signal_handlers_exception_ends_a_parked_run(scripted):
    """And leaves a vCPU that another run() can take on."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    scripted.pause()
    with alarm(ring), pytest.raises(Rung):
        vcpu.run(timeout=LONG)
    assert (vcpu.running, entered(vcpu), scripted.paused) == (False, 0, True)
    scripted.resume()
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_a_signal_handler_can_resume(scripted):
    """The parked run() it interrupts goes on."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    scripted.pause()
    with alarm(scripted.resume):
        assert isinstance(vcpu.run(timeout=LONG), kvmexit.Hlt)


def test_complete_goes_through_on_a_paused_vm(scripted):
    """So that nothing pends where no thread runs the vCPU; the guest does not go on."""
    vcpu = scripted.create_vcpu(0, [pio_in(1), hlt()])
    vcpu.run().data = b"x"
    scripted.pause()
    assert ended(begin(vcpu.complete)) is None
    assert (vcpu.pending, scripted.paused) == (None, True)
    assert scripted.script(vcpu).left(0)[1] == b"x"
    assert vcpu.run(timeout=0.01).cause == "timeout"
    assert scripted.script(vcpu).position == 1


def test_a_vcpu_created_while_paused_parks(scripted):
    """Until the last resume()."""
    scripted.pause()
    vcpu = scripted.create_vcpu(0, [hlt()])
    assert vcpu.run(timeout=0.02).cause == "timeout"
    assert entered(vcpu) == 0
    scripted.resume()
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_no_pause_sticks_to_a_vcpu_created_meanwhile(scripted, hectic):
    """With pauses beginning and ending all the time: once the last is over, every vCPU enters."""
    stop = []

    def pauses():
        while not stop:
            scripted.pause()
            scripted.resume()

    pausers = [begin(pauses) for _ in range(2)]
    vcpus = [scripted.create_vcpu(i, [hlt()]) for i in range(stress(1500))]
    stop.append(True)
    ended(*pausers)
    assert not scripted.paused
    assert [vcpu.id for vcpu in vcpus if not isinstance(vcpu.run(timeout=0), Interrupted) or not entered(vcpu)] == []


# ---- nesting ----


@pytest.mark.parametrize("threads", [1, 2])
def test_pauses_nest(scripted, threads):
    """By one thread or by two: the last resume() lets the vCPUs go, whoever says it."""
    vcpu = scripted.create_vcpu(0, [FOR_EVER] * 9)
    with running(vcpu):
        scripted.pause()
        ended(begin(scripted.pause)) if threads == 2 else scripted.pause()
        before = entered(vcpu)
        scripted.resume()
        time.sleep(SHORT)
        assert (scripted.paused, entered(vcpu)) == (True, before)
        ended(begin(scripted.resume))
        assert not scripted.paused
        until(lambda: entered(vcpu) > before)


def test_resume_without_a_pause_in_effect_is_an_error(scripted):
    """Before any, after as many, and while the only one still waits."""
    gate = Gate(scripted)
    for _ in range(2):
        with pytest.raises(kvmexit.Error, match="without"):
            scripted.resume()
        scripted.pause()
        scripted.resume()
    with running(gate.vcpu(scripted)):
        until(lambda: gate.asked)
        pause = begin(scripted.pause)
        until(lambda: scripted.paused)
        with pytest.raises(kvmexit.Error, match="without"):
            scripted.resume()
        gate.go.set()
        ended(pause)


# ---- handlers that pause ----


@pytest.mark.kvm
def test_a_handler_pauses_its_own_vm(vm):
    """The other guest stands still while it works, and goes on afterwards; so does its own."""
    machine = Machine(vm, COUNT, COUNT_OUT)
    stood = []

    @vm.on_pio(0x80)
    def handler(vcpu, io):
        if len(stood) < 5:
            vm.pause()
            vm.pause()
            stood.append(machine.stands_still(0.01))
            vm.resume()
            stood.append(machine.stands_still(0.01))
            vm.resume()
        else:
            machine.count(vcpu, io)

    with running(*machine.vcpus):
        until(lambda: machine.calls[1] > 3)
        assert machine.moves()
    assert stood == [True] * 6


@pytest.mark.parametrize("kind", ["scripted", pytest.param("guests", marks=pytest.mark.kvm)])
def test_handlers_that_pause_exclude_each_other(request, kind, hectic):
    """Two handlers and a plain thread pause all the time: nothing deadlocks, and inside each sees nobody else inside."""
    vm = request.getfixturevalue("scripted" if kind == "scripted" else "vm")
    inside, overlaps, rounds, chance = [], [], [0, 0, 0], random.Random(4)

    def critical(me):
        vm.pause()
        inside.append(me)
        for _ in range(chance.randrange(200)):
            pass
        if inside != [me]:
            overlaps.append(list(inside))
        inside.remove(me)
        rounds[me] += 1
        vm.resume()

    if kind == "scripted":
        vcpus = [vm.create_vcpu(i, [pio_out(0x80, b"x")], repeat=1 << 60, keep=False) for i in range(2)]
    else:
        vcpus = Machine(vm, COUNT_OUT, COUNT_OUT).vcpus
    vm.on_pio(0x80, 1, lambda vcpu, io: critical(vcpu.id))
    with running(*vcpus):
        end = time.monotonic() + STRESS
        while time.monotonic() < end or rounds[2] < 3:
            ended(begin(critical, 2))
            time.sleep(0.001)
        until(lambda: min(rounds) > 2)
    assert overlaps == []


def test_a_handlers_pause_waits_for_another_handlers_to_be_resumed(scripted, told):
    """One that waits in pause() counts as stopped, but does not go on before the other's pause is over."""
    order, both = [], threading.Barrier(2)

    @scripted.on_pio(1)
    def handler(vcpu, io):
        both.wait(LONG)
        scripted.pause()
        order.append(("in", vcpu.id))
        time.sleep(SHORT)
        order.append(("out", vcpu.id))
        scripted.resume()

    with running(*[scripted.create_vcpu(i, [pio_out(1, b"x")] + [FOR_EVER] * 9) for i in range(2)]):
        until(lambda: len(order) == 4)
    first, second = order[0][1], order[2][1]
    assert order == [("in", first), ("out", first), ("in", second), ("out", second)]


def test_a_handlers_pause_may_be_resumed_by_another_thread(scripted):
    """The handler returns without: its vCPU parks at the next entry like the others, until then."""
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), hlt()])
    asked = []
    scripted.on_pio(1, 1, lambda vcpu, io: asked.append(scripted.pause()))
    run = begin(vcpu.run)
    until(lambda: asked)
    scripted.pause()  # comes back when the handler has returned
    assert (scripted.script(vcpu).position, vcpu.running) == (1, True)
    scripted.resume()
    assert still_waits(run)
    ended(begin(scripted.resume))
    assert isinstance(ended(run), kvmexit.Hlt)


def test_handlers_of_two_vms_may_pause_each_others(scripted, other):
    """Waiting in another VM's pause() counts as stopped as well."""
    both, paused = threading.Barrier(2), []

    def handler(vcpu, io):
        both.wait(LONG)
        target = other if vcpu.vm is scripted else scripted
        target.pause()
        paused.append(target)
        target.resume()

    vcpus = [vm.create_vcpu(0, [pio_out(1, b"x"), *[FOR_EVER] * 9]) for vm in (scripted, other) if vm.on_pio(1, 1, handler)]
    runs = [begin(vcpu.run) for vcpu in vcpus]
    try:
        until(lambda: len(paused) == 2)
    finally:
        scripted.close()
        vcpus[1].kick()
        ended(*runs)


# ---- run() inside a handler ----


@pytest.fixture(params=["same-vm", "other-vm"])
def nested(request, scripted, other):
    """-> a function that starts an outer vCPU whose handler calls `before` and runs an inner one: (run, inner, its result)."""
    def start(before=lambda: None, timeout=None):
        inner_vm = scripted if request.param == "same-vm" else other
        inner = inner_vm.create_vcpu(1, [FOR_EVER] * 9)
        outer = scripted.create_vcpu(0, [pio_out(1, b"x"), hlt()])
        came_back = Future()

        @scripted.on_pio(1)
        def handler(vcpu, io):
            before()
            came_back.set_result(inner.run(timeout))

        run = begin(outer.run)
        until(lambda: inner.running)
        return run, inner, came_back

    return start


def test_a_pause_stops_a_run_inside_a_handler(scripted, nested):
    """The inner vCPU parks, and the outer one with it; both go on afterwards."""
    run, inner, came_back = nested()
    until(lambda: entered(inner) == 1)
    try:
        ended(begin(scripted.pause))
        assert still_waits(came_back)
        scripted.resume()
    finally:
        inner.kick()
    assert ended(came_back).cause == "kick"
    assert isinstance(ended(run), kvmexit.Hlt)


@pytest.mark.parametrize("how", ["kick", "timeout"])
def test_an_inner_run_is_parked_for_as_long_as_the_outers_vm_is_paused(scripted, nested, how):
    """It cannot come back to a handler that has to stand still: its kick and its deadline are heeded after resume()."""
    pause = []

    def before():
        pause.append(begin(scripted.pause))
        until(lambda: scripted.paused)

    run, inner, came_back = nested(before, 0.02 if how == "timeout" else None)
    ended(pause[0])
    if how == "kick":
        inner.kick()
    assert still_waits(came_back)
    assert entered(inner) == 0
    scripted.resume()
    assert ended(came_back).cause == how
    assert isinstance(ended(run), kvmexit.Hlt)


@pytest.mark.parametrize("outer_too", [False, True])
def test_an_inner_run_parked_for_its_own_vm(scripted, other, outer_too):
    """It heeds its kick, the outer one's VM not being paused; and goes on only when neither is."""
    inner, outer = other.create_vcpu(0, [hlt()]), scripted.create_vcpu(0, [pio_out(1, b"x"), hlt()])
    results = []
    scripted.on_pio(1, 1, lambda vcpu, io: results.append(inner.run()))
    other.pause()
    run = begin(outer.run)
    until(lambda: inner.running)
    ended(begin(other.pause))  # it is parked
    if outer_too:
        ended(begin(scripted.pause))  # and the outer one with it
        other.resume()
        other.resume()
        assert still_waits(run)
        assert entered(inner) == 0
        scripted.resume()
    else:
        inner.kick()
    assert isinstance(ended(run), kvmexit.Hlt)
    assert [type(result) for result in results] == [kvmexit.Hlt if outer_too else Interrupted]


@pytest.mark.parametrize("target", ["outer", "inner"])
def test_an_inner_run_does_not_wait_for_its_own_threads_pause(scripted, other, target):
    """Of the outer's VM it would, with nothing to end it: an Error. One of its own VM it parks for: somebody may resume it."""
    inner, outer = other.create_vcpu(0, [hlt()]), scripted.create_vcpu(0, [pio_out(1, b"x"), hlt()])
    results = []

    @scripted.on_pio(1)
    def handler(vcpu, io):
        vm = scripted if target == "outer" else other
        vm.pause()
        try:
            results.append(inner.run(SHORT))
        except kvmexit.Error as error:
            results.append(str(error))
        vm.resume()

    assert isinstance(ended(begin(outer.run)), kvmexit.Hlt)
    if target == "outer":
        assert "this thread's own pause(): resume() first" in results[0]
    else:
        assert results[0].cause == "timeout"
    assert entered(inner) == 0
    assert not scripted.paused
    assert not other.paused


# ---- close() ----


@pytest.mark.kvm
def test_close_ends_parked_runs_without_letting_a_guest_go_on(vm, hectic):
    """Views of the memory stay: what the guests counted is what it was when they were paused."""
    machine = Machine(vm, COUNT, COUNT_OUT)
    view = machine.ram.view
    runs = [begin(vcpu.run) for vcpu in machine.vcpus]
    assert machine.moves()
    vm.pause()
    before = bytes(view[COUNTERS : COUNTERS + 128])
    ended(begin(vm.close))
    assert [ended(run).cause for run in runs] == ["kick"] * 2
    assert bytes(view[COUNTERS : COUNTERS + 128]) == before
    for use in (vm.pause, vm.resume, machine.vcpus[0].run):
        with pytest.raises(kvmexit.Error, match="closed"):
            use()


def test_close_ends_a_pause_that_waits(scripted, told):
    """With an Error, and parked vCPUs with a kick; the handler waited for may return when it likes."""
    gate = Gate(scripted)
    run, parked = begin(gate.vcpu(scripted).run), begin(scripted.create_vcpu(1, [FOR_EVER]).run)
    until(lambda: gate.asked)
    pauses = [begin(scripted.pause) for _ in range(2)]
    assert still_waits(pauses[0])
    close = begin(scripted.close)
    for pause in pauses:
        with pytest.raises(kvmexit.Error, match="closed"):
            ended(pause)
    assert ended(parked).cause == "kick"
    assert still_waits(close)
    gate.go.set()
    ended(close)
    assert ended(run).cause == "kick"


def test_close_ends_handlers_that_wait_in_pause(scripted, told):
    """The Error leaves their run(); the one that has paused, and returned, is kicked like any other."""
    paused, all_in = [], threading.Barrier(3)

    @scripted.on_pio(1)
    def handler(vcpu, io):
        all_in.wait(LONG)
        scripted.pause()
        paused.append(vcpu.id)

    runs = [begin(scripted.create_vcpu(i, [pio_out(1, b"x"), hlt()]).run) for i in range(3)]
    until(lambda: paused)
    ended(begin(scripted.close))
    results = [run.exception(LONG) or run.result() for run in runs]
    assert sorted(type(result).__name__ for result in results) == ["Error", "Error", "Interrupted"]


def test_close_ends_a_run_parked_inside_a_handler(scripted, nested):
    """Neither its kick nor the outer one's waits for a resume() that can no longer come."""
    def before():
        begin(scripted.pause)
        until(lambda: scripted.paused)

    run, inner, came_back = nested(before)
    scripted.pause()
    close = begin(scripted.close)
    until(lambda: entered(inner) or came_back.done())  # it is no longer parked
    inner.kick()  # the other VM's is not close()'s
    ended(came_back, close)
    assert ended(run).cause == "kick"


# ---- Ctrl-C, fork ----


@pytest.mark.parametrize("others", [0, 1])
def test_an_interrupted_pause_is_undone(scripted, others):
    """The handler waited for does not return: the exception leaves pause(), and vCPUs go on; other pauses are not touched."""
    gate = Gate(scripted)
    vcpus = [gate.vcpu(scripted), scripted.create_vcpu(1, [FOR_EVER] * 99)]
    with running(*vcpus):
        until(lambda: gate.asked and entered(vcpus[1]))
        pauses = [begin(scripted.pause) for _ in range(others)]
        until(lambda: scripted.paused == bool(others))
        with alarm(ring), pytest.raises(Rung):
            scripted.pause()
        assert scripted.paused == bool(others)
        before = entered(vcpus[1])
        if not others:
            until(lambda: entered(vcpus[1]) > scripted.script(vcpus[1]).position)  # it spins again
        gate.go.set()
        ended(*pauses, begin(scripted.pause))
        if others:
            assert (entered(vcpus[1]), entered(vcpus[0])) == (before, 2)


def test_an_interrupted_handler_goes_on_only_when_others_have_resumed(scripted, other):
    """A thread's pause was granted because this handler waits in its own: the exception comes after that pause."""
    gate, told, came = Gate(other), [], []
    busy = gate.vcpu(other)
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), hlt()])

    def somebody():
        scripted.pause()
        came.append("paused")
        until(lambda: told)
        time.sleep(SHORT)  # in which the exception would have come
        came.append("resumed")
        scripted.resume()

    @scripted.on_pio(1)
    def handler(vcpu, io):
        thread = begin(somebody)
        with alarm(lambda: (until(lambda: came), told.append(True), ring())), pytest.raises(Rung):
            other.pause()
        came.append("raised")
        ended(thread)

    with running(busy):
        until(lambda: gate.asked)
        assert isinstance(vcpu.run(timeout=LONG), kvmexit.Hlt)
        gate.go.set()
    assert came == ["paused", "resumed", "raised"]
    assert not scripted.paused
    assert not other.paused


def test_an_exception_leaves_an_inner_run_only_when_the_outers_vm_is_resumed(scripted, other):
    """As a kick does: it would come to a handler that has to stand still."""
    told, came = [], []
    inner = other.create_vcpu(0, [FOR_EVER] * 9)
    outer = scripted.create_vcpu(0, [pio_out(1, b"x"), hlt()])

    def somebody():
        scripted.pause()
        until(lambda: told)
        time.sleep(SHORT)
        came.append("resumed")
        scripted.resume()

    @scripted.on_pio(1)
    def handler(vcpu, io):
        thread = begin(somebody)
        until(lambda: scripted.paused)
        with alarm(lambda: (told.append(True), ring())), pytest.raises(Rung):
            inner.run()
        came.append("raised")
        ended(thread)

    assert isinstance(outer.run(timeout=LONG), kvmexit.Hlt)
    assert came == ["resumed", "raised"]
    assert entered(inner) == 0


def test_a_signal_handler_that_pauses_leaves_its_run_parked(scripted):
    """Its pause() took the mark of the parked run with it; the next one to pause must find that again."""
    vcpu = scripted.create_vcpu(0, [FOR_EVER] * 9)
    looked = []

    def look():
        scripted.pause()
        scripted.resume()
        looked.append(True)

    def somebody():
        until(lambda: looked)
        scripted.pause()
        scripted.resume()
        scripted.resume()  # the first one
        vcpu.kick()

    scripted.pause()
    thread = begin(somebody)
    with alarm(look):
        assert vcpu.run(timeout=LONG).cause == "kick"
    ended(thread)


@pytest.mark.kvm
def test_ctrl_c_ends_a_pause_and_a_parked_run(kvm):
    """KeyboardInterrupt on the main thread: from pause() that waits for a handler, and from run() on a paused VM."""
    done = python("""
import os, signal, threading
import kvmexit
from guests import load, OUT_FOREVER
vm = kvmexit.VM()
vcpu = load(vm, OUT_FOREVER)
go, asked = threading.Event(), threading.Event()
def handler(vcpu, io):
    asked.set()
    go.wait()
vm.on_pio(0x80, 1, handler)
run = threading.Thread(target=vcpu.run, daemon=True)
run.start()
asked.wait()
def interrupted(call):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        call()
    except KeyboardInterrupt:
        print(vm.paused, vcpu.running)
interrupted(vm.pause)
vcpu.kick()
go.set()
run.join()
vm.pause()
interrupted(lambda: vcpu.run(timeout=20))
""", timeout=60)
    assert done.stdout == "False True\nTrue False\n", done


def test_ctrl_c_at_any_moment_of_pause_and_resume_locks_nobody_out():
    """KeyboardInterrupt from within them: other threads can pause, and vCPUs park, as before."""
    done = python("""
import os, random, signal, threading
from kvmexit.testing import ScriptedVM
from guests import stress
vm = ScriptedVM()
signal.signal(signal.SIGALRM, signal.default_int_handler)
for number in range(stress(1500)):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-6 + random.random() / 3000)
        while True:
            vm.pause()
            vm.resume()
    except KeyboardInterrupt:
        pass
    while vm.paused:
        vm.resume()
    thread = threading.Thread(target=lambda: (vm.pause(), vm.resume()), daemon=True)
    thread.start()
    thread.join(10)
    if thread.is_alive():
        print("locked out after", number, flush=True)
        os._exit(1)
print("done")
""", timeout=100)
    assert done.stdout == "done\n", done


def in_child(use):
    """Whether it raises Error at once in a forked child."""
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        try:
            use()
        except kvmexit.Error:
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def test_a_forked_child_cannot_pause(scripted):
    """Nor resume, also where the parent has paused; the parent's pause is not touched."""
    assert in_child(scripted.pause)
    scripted.pause()
    assert in_child(scripted.pause)
    assert in_child(scripted.resume)
    assert scripted.paused
    scripted.resume()


def test_a_fork_while_another_thread_pauses_leaves_a_child_that_can(scripted, hectic):
    """What that thread held is not held for ever in the child."""
    stop = []

    def pauses():
        while not stop:
            scripted.pause()
            scripted.resume()

    pausers = [begin(pauses) for _ in range(2)]
    try:
        for _ in range(stress(30)):
            assert in_child(scripted.pause)
    finally:
        stop.append(True)
        ended(*pausers)


# ---- kicks, conversions, slots, routes at the same time ----


@pytest.mark.kvm
@pytest.mark.parametrize("code", [SPIN, OUT_FOREVER], ids=["spinning", "exiting"])
def test_every_kick_ends_one_run_however_often_the_vm_is_paused(vm, code):
    """None is lost, none counts twice, and in the end none is left over."""
    vcpu = load(vm, code)
    vm.on_pio(0x80, 1, lambda vcpu, io: None)
    chance, stop, returned = random.Random(5), [], queue.SimpleQueue()

    def pauses():
        while not stop:
            vm.pause()
            if chance.random() < 0.3:
                time.sleep(chance.random() / 2000)
            vm.resume()
            time.sleep(chance.random() / 2000)

    def runs():
        while not stop:
            returned.put(vcpu.run())

    others = [begin(pauses), begin(pauses), begin(runs)]
    try:
        for number in range(stress(1500)):
            for _ in range(chance.randrange(2000)):
                pass
            vcpu.kick()
            assert returned.get(timeout=LONG).cause == "kick", number  # queue.Empty: a kick was lost
        assert returned.empty()
    finally:
        stop.append(True)
        vcpu.kick()
    ended(*others)
    assert returned.get(timeout=LONG).cause == "kick"
    assert vcpu.run(timeout=0.01).cause == "timeout"
    assert returned.empty()


# loop: inc rax; mov [rbx], rax; mov [rsi], rax; out 0x80, al; cmp [rbx], rax; jne bad; cmp [rsi], rax; je loop
# bad: out 0x81, al; jmp bad
KEEP_TWO_WORDS = bytes.fromhex("48 ff c0 48 89 03 48 89 06 e6 80 48 39 03 75 05 48 39 06 74 eb e6 81 eb fc")


@pytest.mark.kvm
def test_slots_move_under_guests_that_never_see_a_hole(kvm, hectic):
    """SlotRebind conversions by two handlers in opposite directions, with kicks, routes and slots coming and going: no
    access of a guest finds no memory, and what it has in pages that nobody converts stays."""
    data, pages = 1 << 20, 64
    live = {0: (10, 30), 1: (20, 40)}  # of each guest: a shared page, and a private one
    chance, stop, wrong, rounds = random.Random(6), [], [], [0] * 6

    with kvmexit.VM(attributes=kvmexit.SlotRebind()) as vm:
        machine = Machine(vm, KEEP_TWO_WORDS, KEEP_TWO_WORDS)
        vm.memory.add(data, pages * PAGE, guest_memfd=True)
        for i, (shared, private) in live.items():
            vm.memory.convert(data + private * PAGE, PAGE, private=True)
            machine.vcpus[i].regs.rbx, machine.vcpus[i].regs.rsi = data + shared * PAGE, data + private * PAGE + 8

        def flip(private):
            first = chance.choice([1, 9, 11, 19, 21, 29, 31, 39, 41, 50])
            vm.memory.convert(data + first * PAGE, PAGE if first < 50 else 9 * PAGE, private=private)

        @vm.on_pio(0x80)
        def handler(vcpu, io):
            flip(vcpu.id == 0)
            rounds[vcpu.id] += 1

        @vm.on(kvmexit.Exit)
        def unexpected(vcpu, exit):
            wrong.append(exit)
            return STOP

        def again(me, action):
            while not stop:
                action()
                rounds[me] += 1
                time.sleep(0.0005)

        def slots():
            added = vm.memory.add(8 << 20, 16 * PAGE, guest_memfd=True)
            vm.memory.convert(added.gpa + PAGE, PAGE, private=True)
            vm.memory.remove(added)

        def kicks():
            chance.choice(machine.vcpus).kick()

        def runs(vcpu):
            while not stop and not wrong:
                vcpu.run()

        threads = [
            *(begin(runs, vcpu) for vcpu in machine.vcpus),
            begin(again, 2, slots), begin(again, 3, kicks), begin(again, 4, lambda: flip(chance.random() < 0.5)),
            begin(again, 5, lambda: vm.on_pio(0x82, 1, handler).remove()),
        ]
        try:
            end = time.monotonic() + 2 * STRESS
            while time.monotonic() < end and not wrong:
                time.sleep(0.01)
            until(lambda: wrong or min(rounds) > 3)
        finally:
            stop.append(True)
            for vcpu in machine.vcpus:
                vcpu.kick()
        ended(*threads)
        assert wrong == []


@pytest.mark.parametrize("private", [True, False])
def test_handlers_may_change_slots_while_others_do(private):
    """remove() pauses with SlotRebind; a handler that adds or removes a slot at the same time does not wait for it for ever."""
    with ScriptedVM(attributes=kvmexit.SlotRebind()) as vm:
        done = [0, 0]

        @vm.on_pio(1)
        def handler(vcpu, io):
            vm.memory.remove(vm.memory.add(vcpu.id << 20, PAGE, guest_memfd=private))
            done[vcpu.id] += 1

        vcpus = [vm.create_vcpu(i, [pio_out(1, b"x")], repeat=1 << 60, keep=False) for i in range(2)]
        with running(*vcpus):
            try:
                until(lambda: min(done) >= 300)
            except AssertionError:
                vm.close()  # ends pause(), and so frees the others
                raise
