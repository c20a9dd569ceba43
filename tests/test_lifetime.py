"""Whatever happens to a vCPU, at every point of its loop: nothing crashes, hangs, leaks or prints, and what can go on does."""

import contextlib
import os
import random
import subprocess
import sys
import threading
import time

import pytest
from guests import OUT_FOREVER, load, stress
from processes import HERE, compiled, in_thread, leaks

import kvmexit
from kvmexit import native
from kvmexit.testing import ScriptedVM, memory_fault, pio_in, pio_out

PLACES = ["kvm", "exits", "python", "native", "parked", "ring", "pending", "guest-kvm", "guest-exits", "guest-python", "guest-parked"]
EVENTS = ["close", "drop", "fork", "exit", "exception", "remove", "interrupt"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A native handler that waits."""
    return compiled(tmp_path_factory, "native_handlers")


@pytest.mark.parametrize(
    ("place", "event"), [(p, e) for p in PLACES for e in EVENTS if (p, e) != ("pending", "interrupt")]  # nobody runs there
)
def test_it_happens(request, library, place, event):
    """In a process of its own, with the debug allocator and all of Python's warnings."""
    if place.startswith("guest"):
        request.getfixturevalue("kvm")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)]), "PYTHONMALLOC": os.environ.get("PYTHONMALLOC", "debug")}
    done = subprocess.run(
        [sys.executable, "-X", "dev", HERE / "lifetime.py", place, event, library], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


# ---- all at once ----

REGION = 1 << 30


class World:
    """VMs that come and go, and what threads do to them at random."""

    def __init__(self):
        self.vms = []
        self.over = threading.Event()
        self.did = dict.fromkeys(("run", "kick", "route", "convert", "memory", "pause", "look", "close", "drop", "fork"), 0)
        self.mistakes = []

    def make(self, chance):
        """A VM, scripted or real, with memory, routes and two vCPUs."""
        if chance.random() < 0.3 and os.path.exists("/dev/kvm"):
            vm = kvmexit.VM()
            vcpus = [load(vm, OUT_FOREVER)]
        else:
            vm = ScriptedVM()
            steps = [pio_out(0x80, b"x")] * 50 + [pio_in(0x81), memory_fault(REGION + 4096, private=True), memory_fault(REGION)]
            vcpus = [vm.create_vcpu(i, steps, repeat=1 << 60, keep=False) for i in range(2)]
            vm.memory.add(REGION, 1 << 20, guest_memfd=True, discard=False)
            vm.on_memory_fault(handler=native.Convert(vm))
        vm.on_pio(0x81, 1, lambda vcpu, io: 1)
        return vm, vcpus, []

    def body(self, seed):
        """One thread's life."""
        chance = random.Random(seed)
        while not self.over.is_set():
            what = chance.choice(["run"] * 4 + list(self.did)[:-1] + (["fork"] if chance.random() < 0.02 else []))
            try:
                getattr(self, what)(chance, *chance.choice(self.vms))
            except kvmexit.Error:
                pass  # busy, closed, in the way of another
            except ValueError as error:
                if "overlap" not in str(error) and "no such slot" not in str(error):
                    self.mistakes.append(error)
            except BaseException as error:
                self.mistakes.append(error)
            self.did[what] += 1

    def run(self, chance, vm, vcpus, routes):
        vcpu = chance.choice(vcpus)
        vcpu.timing = chance.random() < 0.5
        exit = vcpu.run(timeout=chance.random() / 500)
        if isinstance(exit, kvmexit.Io) and not exit.is_write:
            exit.data = b"a"

    def kick(self, chance, vm, vcpus, routes):
        chance.choice(vcpus).kick()

    def route(self, chance, vm, vcpus, routes):
        handler = chance.choice([native.Ignore(), native.Counter(), native.Stop(), lambda vcpu, io: kvmexit.PASS])
        routes.append(vm.on_pio(0x80, chance.choice([1, 8]), handler))
        if len(routes) > 3:
            routes.pop(chance.randrange(len(routes))).remove()

    def convert(self, chance, vm, vcpus, routes):
        vm.memory.convert(REGION + 4096 * chance.randrange(200), 4096 * chance.randrange(1, 50), private=chance.random() < 0.5)

    def memory(self, chance, vm, vcpus, routes):
        gpa = (1 << 32) + (chance.randrange(4) << 16)
        if chance.random() < 0.5:
            vm.memory.add(gpa, 1 << 16)[:4] = b"here"
        else:
            vm.memory.remove(gpa)

    def pause(self, chance, vm, vcpus, routes):
        vm.pause()
        vm.resume()

    def look(self, chance, vm, vcpus, routes):
        vcpu = chance.choice(vcpus)
        repr((vm, vcpu, vcpu.stats, vcpu.last_exits, vm.memory.slots, vm.memory.ranges()))
        vcpu.regs.rax = vcpu.regs.rax

    def close(self, chance, vm, vcpus, routes):
        if chance.random() < 0.2:
            self.vms[chance.randrange(len(self.vms))] = self.make(chance)
            vm.close()

    def drop(self, chance, vm, vcpus, routes):
        if chance.random() < 0.2:
            self.vms[chance.randrange(len(self.vms))] = self.make(chance)

    def fork(self, chance, vm, vcpus, routes):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(kvmexit.Error):
                vcpus[0].run()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            self.mistakes.append("a forked child ran the vCPU")


def live(seconds):
    """Four threads in a world of three VMs, for so long; -> how often each thing was done."""
    world, chance = World(), random.Random(0)
    world.vms = [world.make(chance) for _ in range(3)]
    threads = [in_thread(lambda seed=seed: world.body(seed)) for seed in range(4)]
    world.fork(chance, *world.vms[0])  # they seldom do
    world.did["fork"] += 1
    time.sleep(seconds)
    world.over.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert {repr(mistake) for mistake in world.mistakes} == set()
    while world.vms:
        world.vms.pop()[0].close()
    return world.did


def test_everything_at_once():
    """Threads run, kick, pause, convert, register, look at, close, drop and fork at random: only what is documented is raised,
    everything comes to an end, and nothing is left."""
    live(0.5)  # libc keeps stacks and arenas of threads that ended
    descriptors, mappings = leaks()
    did = live(stress(8))
    assert min(did.values()) > 0, did
    after = leaks()
    assert after[0] == descriptors
    assert after[1] <= mappings + 4, did  # as many VMs were closed or dropped as `did` says
