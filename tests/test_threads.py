"""Several Python threads at the same objects: on free-threaded Python really at once, else in short turns."""

import contextlib
import os
import sys
import sysconfig
import threading
import time

import pytest
from guests import stress
from processes import in_thread, python

import kvmexit
from kvmexit import NotPendingError, VcpuBusyError, native
from kvmexit.testing import ScriptedVM, hlt, memory_fault, mmio_read, mmio_write, pio_in, pio_out

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
VCPUS = 2
PORT, GPA = 0x80, 0x4000_0000
HUGE = 1 << 60
LENGTH = 0.4  # seconds that each of them lasts at least


@pytest.fixture(autouse=True)
def hectic():
    """Where there is a GIL, threads take turns a hundred times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


class Crew:
    """Threads that each do one thing over and over, until stop(), which raises what one of them raised."""

    def __init__(self):
        self.stopped = threading.Event()
        self.failures, self.threads, self.rounds = [], [], []

    def add(self, work):
        turn = len(self.rounds)
        self.rounds.append(0)

        def go_on():
            try:
                while not self.stopped.is_set():
                    work()
                    self.rounds[turn] += 1
            except BaseException as error:
                self.failures.append(error)
                self.stopped.set()

        self.threads.append(in_thread(go_on))

    def wait(self):
        """Until each had its turns, and for LENGTH."""
        end = time.monotonic() + stress(LENGTH * 100) / 100
        while not self.stopped.is_set() and (time.monotonic() < end or min(self.rounds) < 3):
            time.sleep(0.01)

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        if self.failures:
            raise self.failures[0]


@pytest.fixture
def crew():
    made = Crew()
    yield made
    made.stopped.set()


def run_for_ever(crew, vcpu):
    """A thread of the crew that runs a vCPU; kicks bring it back."""
    crew.add(lambda: vcpu.run(timeout=0.05))


STEPS = [
    pio_out(PORT, b"\x11"), pio_in(PORT + 1), mmio_write(GPA, b"ABCD"), mmio_read(GPA + 8, 8), memory_fault(0x1000, rip=1),
    pio_out(PORT + 2, b"0123456789" * 10, size=1),
]


def test_the_gil_stays_off():
    """Importing kvmexit does not turn it on; without that nothing here runs at once."""
    if not FREE_THREADED:
        pytest.skip("this Python has a GIL")
    assert not sys._is_gil_enabled() or os.environ.get("PYTHON_GIL") == "1"
    done = python("import kvmexit, sys; print(sys._is_gil_enabled())", env={"PYTHON_GIL": ""})
    assert (done.stdout, done.stderr) == ("False\n", ""), done


def test_everything_at_once(scripted, crew):
    """vCPUs run through Python and native handlers, while others add and remove routes and memory, convert, kick, pause and
    look at it all. Every exit that is taken is whole, and none is taken for another."""
    vm = scripted
    vm.memory.add(0, 1 << 20, guest_memfd=True)
    kept = [None] * VCPUS
    wrong = []
    counter = native.Counter()

    def handle(vcpu, exit):
        kept[vcpu.id] = exit
        match exit:
            case kvmexit.Io(port=port, is_write=True, data=data):
                if data != (b"\x11" if port == PORT else b"0123456789" * 10):
                    wrong.append(exit)
            case kvmexit.Io():
                return 7
            case kvmexit.Mmio(gpa=gpa, is_write=True, data=data):
                if (gpa, data) != (GPA, b"ABCD"):
                    wrong.append(exit)
            case kvmexit.Mmio():
                return 0x0102030405060708
        return None

    vm.on(kvmexit.Exit, handle)
    vm.on(kvmexit.Exit, counter)
    vcpus = [vm.create_vcpu(i, STEPS, repeat=HUGE, keep=False) for i in range(VCPUS)]
    for vcpu in vcpus:
        run_for_ever(crew, vcpu)

    def routes():
        with vm.on_pio(PORT, 1, lambda vcpu, io: kvmexit.PASS), vm.on_mmio(GPA, 16, native.Counter()):
            vm.on_pio(PORT, 4, native.Counter()).remove()

    def slots():
        slot = vm.memory.add(GPA, 1 << 16)
        vm.memory.write(GPA, b"x" * 64)
        assert vm.memory.read(GPA, 64) == b"x" * 64
        vm.memory.remove(slot)
        assert all(slot.gpa == 0 for slot in vm.memory.slots)

    def converting():
        for private in (True, False):
            vm.memory.convert(0x2000, 0x3000, private=private)
        assert len(vm.memory.ranges()) <= 4

    def pausing():
        vm.pause()
        try:
            before = list(kept)  # no handler is called meanwhile
            assert vm.stats is not None
            assert all(now is then for now, then in zip(kept, before, strict=True))
        finally:
            vm.resume()

    def looking():
        for exit in kept:
            if exit is not None:
                assert repr(exit)
        assert vm.memory.slots
        assert vm.stats is not None
        assert vcpus[0].last_exits is not None
        for vcpu in vcpus:
            try:
                vcpu.regs.rax = vcpu.regs.rip
                assert vcpu.pending is None or isinstance(vcpu.pending, kvmexit.Exit)
            except VcpuBusyError:
                pass
        vm.reset_stats()

    for work in (routes, slots, converting, pausing, looking, lambda: [vcpu.kick() for vcpu in vcpus]):
        crew.add(work)
    crew.wait()
    crew.stop()
    assert not wrong
    assert counter.writes + counter.reads + counter.others > 0


def test_an_exit_that_several_threads_keep_stays_what_it_was(scripted, crew):
    """Handlers keep every exit; others read them while the vCPU goes on: each one says what it did at first."""
    steps = [pio_out(PORT, bytes([i])) for i in range(256)]
    vcpus = [scripted.create_vcpu(i, steps, repeat=HUGE, keep=False) for i in range(VCPUS)]
    kept = [[] for _ in vcpus]

    def keep(vcpu, io):
        kept[vcpu.id].append((io, io.data))
        del kept[vcpu.id][:-16]

    scripted.on_pio(PORT, 1, keep)
    for vcpu in vcpus:
        run_for_ever(crew, vcpu)

    def look():
        for some in kept:
            for io, data in list(some):
                assert io.data == data, (io, data)

    for _ in range(2):
        crew.add(look)
    crew.wait()
    crew.stop()


def test_an_exit_that_two_threads_answer_has_one_answer(scripted, crew):
    """An exit in the caller's hands: whatever one of them wrote last, the guest gets what the exit says."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT, size=4), pio_in(PORT, count=64)] * 64)
    for _ in range(128):
        exit = vcpu.run()
        barrier = threading.Barrier(2)

        def answer(byte, exit=exit, barrier=barrier):
            barrier.wait()
            for _ in range(20):
                exit.data = bytes([byte]) * exit.size * exit.count
                assert len(set(exit.data)) == 1

        other = in_thread(lambda answer=answer: answer(1))
        answer(2)
        other.join(20)
        data = exit.data
        vcpu.complete()
        with pytest.raises(NotPendingError):
            exit.data = data
        step = scripted.script(vcpu).position - 1
        assert scripted.script(vcpu).left(step)[1][: len(data)] == data


def test_a_run_waits_for_who_looks(scripted, crew):
    """Registers of a vCPU that nobody runs: two threads that read and write them find it busy only while it runs."""
    vcpu = scripted.create_vcpu(0, [hlt()], repeat=HUGE, keep=False)

    def look():
        vcpu.regs.rax = vcpu.regs.rbx
        assert (vcpu.sregs.cr3, vcpu.cr8) == (0, 0)
        assert vcpu.pending is None or isinstance(vcpu.pending, kvmexit.Hlt)

    crew.add(look)
    crew.add(look)
    crew.wait()
    crew.stop()
    busy = Crew()

    def look_again():
        with contextlib.suppress(VcpuBusyError):
            look()

    busy.add(look_again)
    busy.add(lambda: vcpu.run())  # which is never told that a look is a run
    busy.wait()
    busy.stop()


def test_a_vm_is_closed_under_all_of_them(crew):
    """close() from two threads while others use everything: they end with an Error, and nothing else."""
    for _ in range(stress(10)):
        vm = ScriptedVM()
        slot = vm.memory.add(0, 1 << 16, guest_memfd=True)
        vcpu = vm.create_vcpu(0, [pio_out(PORT, b"x")], repeat=HUGE, keep=False)
        vm.on_pio(PORT, 1, lambda vcpu, io: None)
        enough = threading.Event()
        begun, failures = [], []

        def until_closed(work, begun=begun, failures=failures):
            try:
                while True:
                    work()
                    begun.append(work)
            except kvmexit.Error:
                pass
            except BaseException as error:
                failures.append(error)

        def convert(vm=vm):
            vm.memory.convert(0, 0x2000, private=True)
            vm.memory.convert(0, 0x2000, private=False)

        def pause(vm=vm):
            vm.pause()
            vm.resume()

        works = [
            lambda vcpu=vcpu: vcpu.run(timeout=0.01), convert, pause,
            lambda vm=vm, slot=slot: (vm.memory.ranges(), vm.memory.read(0, 16), slot.view, repr(vm.memory.slots)),
        ]
        threads = [in_thread(lambda work=work, loop=until_closed: loop(work)) for work in works]
        closer = in_thread(lambda vm=vm, enough=enough: (enough.wait(20), vm.close()))
        while len(begun) < 5 and not failures:
            time.sleep(0.001)
        enough.set()
        vm.close()
        for thread in [*threads, closer]:
            thread.join(30)
            assert not thread.is_alive()
        assert not failures
