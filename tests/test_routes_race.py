"""Routes that come and go while vCPUs run: no exit is lost, none is taken twice, and nothing is left behind."""

import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from guests import stress

import kvmexit
from kvmexit import PASS
from kvmexit.testing import pio_in, pio_out

ROUNDS = stress(3_000)  # of adding and removing, in each thread
THREADS = 3
PORT, PORTS = 0x100, 16
FOR_EVER = 1 << 60


@pytest.fixture(autouse=True)
def hectic():
    """Threads take turns a hundred times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


class Witness:
    """What one vCPU's handlers have taken. Its script writes 0, 1, 2, ... 255, 0, ... to one port after another."""

    steps = tuple(pio_out(PORT + i % PORTS, bytes([i])) for i in range(256))

    def __init__(self):
        self.taken = 0
        self.out_of_turn = []

    def take(self, io):
        """An exit that was lost, or taken twice, puts all that follow out of turn."""
        if io.data[0] != self.taken & 255:
            self.out_of_turn.append((self.taken, io.data[0]))
        self.taken += 1


class Taker:
    """A handler that takes exits. Made anew for each registration, and refers to nothing that refers to it."""

    def __init__(self, witnesses):
        self.witnesses = witnesses

    def __call__(self, vcpu, io):
        self.witnesses[vcpu.id].take(io)


class Passer(Taker):
    """A handler that lets exits pass."""

    def __call__(self, vcpu, io):
        return PASS


def add_and_remove(vm, seed, made):
    """Register handlers for one port, some ports, all, or the class; and take them back."""
    held = []
    for i in range(ROUNDS):
        handler = made(i)
        first = PORT + (i + seed) % PORTS
        match (i + seed) % 4:
            case 0:
                held.append(vm.on_pio(first, 1, handler))
            case 1:
                held.append(vm.on_pio(first, 4, handler))
            case 2:
                held.append(vm.on_pio(0, 0x10000, handler))
            case 3:
                held.append(vm.on(kvmexit.Io, handler))
        if len(held) == 3:
            held.pop(i % 3).remove()
    for route in held:
        route.remove()


def race(vm, vcpus, made):
    """Run vCPUs, each in a thread of its own, while others change routes; -> what each run() returned."""
    with ThreadPoolExecutor(len(vcpus) + THREADS) as pool:
        runs = [pool.submit(vcpu.run) for vcpu in vcpus]
        try:
            for change in [pool.submit(add_and_remove, vm, seed, made) for seed in range(THREADS)]:
                change.result()
        finally:
            for vcpu in vcpus:
                vcpu.kick()
        return [run.result() for run in runs]


@pytest.mark.parametrize("count", [1, 3])
def test_each_exit_is_taken_by_exactly_one_handler(scripted, count):
    """While three threads add and remove handlers that take, and handlers that pass, every exit comes in its turn."""
    witnesses = [Witness() for _ in range(count)]
    scripted.on(kvmexit.Exit, Taker(witnesses))  # what no other takes
    vcpus = [scripted.create_vcpu(i, Witness.steps, repeat=FOR_EVER, keep=False) for i in range(count)]
    race(scripted, vcpus, lambda i: (Passer if i % 3 == 0 else Taker)(witnesses))
    assert [witness.out_of_turn for witness in witnesses] == [[]] * count


def test_a_run_with_changing_routes_ends_by_its_kick_only(scripted):
    """No exit slips past the handlers to the caller of run()."""
    witness = Witness()
    scripted.on(kvmexit.Exit, Taker([witness]))
    vcpu = scripted.create_vcpu(0, Witness.steps, repeat=FOR_EVER, keep=False)
    [end] = race(scripted, [vcpu], lambda i: Passer([witness]))
    assert (type(end), end.cause, witness.taken > 0) == (kvmexit.Interrupted, "kick", True)


def test_removed_handlers_are_freed(scripted):
    """Tables hold no handler longer than its route, however many threads changed them meanwhile."""
    witness = Witness()
    scripted.on(kvmexit.Exit, Taker([witness]))
    alive = weakref.WeakSet()
    lock = threading.Lock()  # a WeakSet is not for several threads

    def made(i):
        handler = Taker([witness])
        with lock:
            alive.add(handler)
        return handler

    race(scripted, [scripted.create_vcpu(0, Witness.steps, repeat=FOR_EVER, keep=False)], made)
    gc.collect()
    assert len(alive) == 0


def test_no_registration_is_lost(scripted):
    """Threads that register at the same time do not overwrite each other's routes."""
    each = 100
    ports = range(THREADS * each)
    asked = []

    def register(thread):
        for port in ports[thread::THREADS]:
            scripted.on_pio(port, 1, lambda vcpu, io: asked.append(io.port))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(register, range(THREADS)))
    with pytest.raises(kvmexit.KvmError):  # ENODATA: the end of the script
        scripted.create_vcpu(0, [pio_out(port, b"x") for port in ports]).run()
    assert asked == list(ports)


def test_no_removal_is_lost(scripted):
    """Threads that remove at the same time do not bring each other's routes back."""
    asked = []
    routes = [scripted.on_pio(port, 1, lambda vcpu, io: asked.append(io.port)) for port in range(300)]

    def remove(thread):
        for route in routes[thread::THREADS]:
            route.remove()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(remove, range(THREADS)))
    vcpu = scripted.create_vcpu(0, [pio_out(port, b"x") for port in range(300)])
    for _ in range(300):
        vcpu.run()
    assert asked == []


def test_threads_may_remove_the_same_route(scripted):
    """Each of them is right, and other routes of the same handler stay."""
    asked = []

    def handler(vcpu, io):
        asked.append(io.port)

    scripted.on_pio(PORT, 1, handler)
    for _ in range(30):
        route = scripted.on_pio(PORT, 1, handler)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda _, route=route: route.remove(), range(THREADS)))
    with pytest.raises(kvmexit.KvmError):  # ENODATA: the end of the script
        scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == [PORT]


def test_every_answer_is_that_of_the_handler_that_was_asked(scripted):
    """Also when its route is gone by the time it returns."""
    answers = []
    rounds = threading.Semaphore(0)

    def answering(value):
        def handler(vcpu, io):
            answers.append(value)
            return value

        return handler

    @scripted.on(kvmexit.Io)
    def otherwise(vcpu, io):
        rounds.acquire()  # so that the routes change between any two exits that come here
        answers.append(0)
        return 0

    vcpu = scripted.create_vcpu(0, [pio_in(PORT)] * stress(3_000))
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(vcpu.run)
        while not run.done():
            route = scripted.on_pio(PORT, 1, answering(1 + len(answers) % 255))
            rounds.release()
            route.remove()
        assert run.exception().errno == 61  # ENODATA: the end of the script
    assert [scripted.script(vcpu).left(i)[1][0] for i in range(len(answers))] == answers
