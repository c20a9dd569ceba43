"""One cell of tests/test_lifetime.py, in a process of its own: EVENT happens while a vCPU is at PLACE of its loop.

    python tests/lifetime.py PLACE EVENT LIBRARY      LIBRARY: tests/native_handlers.c. Prints ok
"""

import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import time
import warnings
import weakref

from guests import OUT_FOREVER, SPIN, load

import kvmexit
from kvmexit import native
from kvmexit.testing import ScriptedVM, ScriptStep, pio_in, pio_out

FOR_EVER = 1 << 60  # passes of a script
WRITE = [pio_out(0x80, b"x")]


class Boom(Exception):
    """Raised in the thread that runs the vCPU."""


def until(condition):
    """Wait for what another thread does."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ---- places: -> vm, vcpu, whether it is there, and what lets it go on from there ----


def nothing():
    """It goes on by itself, or with a kick."""


def scripted(steps, handler=None):
    """-> a VM and a vCPU about to go through them for ever."""
    vm = ScriptedVM()
    if handler is not None:
        vm.on_pio(0x80, 1, handler)
    return vm, vm.create_vcpu(0, steps, repeat=FOR_EVER, keep=False)


def guest(code, handler=None):
    """The same with a real one."""
    vm = kvmexit.VM()
    if handler is not None:
        vm.on_pio(0x80, 1, handler)
    return vm, load(vm, code)


def in_kvm(make, what):
    """Inside KVM_RUN, for ever."""
    vm, vcpu = make(what)
    return vm, vcpu, lambda vcpu: vcpu.running, nothing


def in_native_exits(make, what):
    """In and out all the time, without Python."""
    vm, vcpu = make(what, native.Ignore())
    return vm, vcpu, lambda vcpu: vcpu.stats.exits > 10, nothing


def in_python(make, what):
    """In a Python handler."""
    inside, go = threading.Event(), threading.Event()

    def handler(vcpu, io):
        inside.set()
        while not go.is_set():
            time.sleep(0.001)

    vm, vcpu = make(what, handler)
    return vm, vcpu, lambda vcpu: inside.is_set(), go.set


def in_native(make, what):
    """In a native handler."""
    words = (ctypes.c_uint32 * 2)()
    wait = ctypes.CDLL(sys.argv[3]).wait
    wait.argtypes = [ctypes.c_void_p] * 2
    vm, vcpu = make(what, native.Function(wait, words))
    return vm, vcpu, lambda vcpu: words[0], lambda: words.__setitem__(1, 1)


def parked(make, what):
    """At the door of a paused VM."""
    vm, vcpu = make(what, native.Ignore())
    vm.pause()
    paused = weakref.ref(vm)

    def resume():
        with contextlib.suppress(kvmexit.Error):  # closed, or resumed already
            paused().resume()

    return vm, vcpu, lambda vcpu: vcpu.running, resume


def at_a_full_ring(make, what):
    """Waiting for room in a Ring."""
    vm, vcpu = make(what, native.Ring(2, full="wait"))
    return vm, vcpu, lambda vcpu: vcpu.stats.exits >= 2, nothing


def pending(make, what):
    """Outside, with an exit that owes an answer."""
    vm, vcpu = make([pio_in(0x81)])
    return vm, vcpu, lambda vcpu: not vcpu.running and vcpu.pending is not None, nothing


PLACES = {
    "kvm": lambda: in_kvm(scripted, [ScriptStep(spin=True)]), "exits": lambda: in_native_exits(scripted, WRITE),
    "python": lambda: in_python(scripted, WRITE), "native": lambda: in_native(scripted, WRITE),
    "parked": lambda: parked(scripted, WRITE), "ring": lambda: at_a_full_ring(scripted, WRITE),
    "pending": lambda: pending(scripted, None), "guest-kvm": lambda: in_kvm(guest, SPIN),
    "guest-exits": lambda: in_native_exits(guest, OUT_FOREVER), "guest-python": lambda: in_python(guest, OUT_FOREVER),
    "guest-parked": lambda: parked(guest, OUT_FOREVER),
}  # fmt: skip


class Run:
    """A thread that runs a vCPU there, and what came of it."""

    def __init__(self, vcpu):
        self.result = None
        self.thread = threading.Thread(target=self.body, args=(vcpu,), daemon=True)
        self.thread.start()

    def body(self, vcpu):
        try:
            self.result = type(vcpu.run()).__name__
        except BaseException as error:
            self.result = type(error).__name__

    def kick(self):
        """Kick the vCPU, which perhaps only that thread holds."""
        frame = sys._current_frames()[self.thread.ident]
        while frame.f_code.co_name != "body":
            frame = frame.f_back
        frame.f_locals["vcpu"].kick()

    def end(self):
        """-> what run() came to."""
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.result


def is_over(vm, vcpu):
    """Nothing is left but errors, and kick(), which does nothing."""
    for use in (vcpu.run, vm.pause, lambda: vcpu.regs.rax, lambda: vm.memory.add(1 << 32, 4096), lambda: vm.create_vcpu(9)):
        try:
            use()
        except kvmexit.Error:
            continue
        raise AssertionError(use)
    vcpu.kick()


def goes_on(vm, vcpu):
    """It runs as if nothing had happened: here until a kick."""
    if isinstance(vcpu.pending, kvmexit.Io) and not vcpu.pending.is_write:
        vcpu.pending.data = b"a"
    run = Run(vcpu)
    until(lambda: vcpu.running or not run.thread.is_alive())
    vcpu.kick()
    assert run.end() in ("Interrupted", "Io"), run.result


# ---- events ----


def close(vm, vcpu, run, go):
    """By another thread: it waits for the run, which ends by itself."""
    closer = threading.Thread(target=vm.close)
    closer.start()
    closer.join(0.02)
    go()
    closer.join(20)
    assert not closer.is_alive()
    assert run.end() in ("Interrupted", "Io"), run.result
    is_over(vm, vcpu)


def drop(vm, vcpu, run, go):
    """Nobody else holds it: it lives as long as its run."""
    alive = weakref.ref(vm)
    running = run.thread.is_alive()
    del vm, vcpu
    gc.collect()
    assert (alive() is not None) == running
    go()
    if running:
        run.kick()
    assert run.end() in ("Interrupted", "Io"), run.result
    run.thread = None
    gc.collect()
    assert alive() is None


def fork(vm, vcpu, run, go):
    """The child has nothing, and goes its way in peace; the parent notices nothing."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        for use in (vcpu.run, vcpu.kick, vm.pause, lambda: vcpu.pending, lambda: vcpu.regs.rax, lambda: vm.memory.convert(0, 4096, private=True)):
            try:
                use()
            except kvmexit.Error:
                continue
            os._exit(3)
        vm.close()
        del vm, vcpu, run
        gc.collect()
        with ScriptedVM() as own:
            assert own.create_vcpu(0, [pio_in(1)]).run().port == 1
        raise SystemExit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    go()
    vcpu.kick()
    assert run.end() in ("Interrupted", "Io"), run.result
    goes_on(vm, vcpu)


def exit(vm, vcpu, run, go):
    """The interpreter goes down; main() has nothing more to do."""


def exception(vm, vcpu, run, go):
    """One that another thread sends: it comes out of a handler or after run(), and the vCPU can go on."""
    ident = ctypes.c_ulong(run.thread.ident)
    running = run.thread.is_alive()
    if running:
        assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Boom)) == 1
    go()
    vcpu.kick()
    assert run.end() == ("Boom" if running else "Io"), run.result
    goes_on(vm, vcpu)


def remove(vm, vcpu, run, go):
    """Its memory and its routes, under its feet."""
    slot, route = vm.memory.add(1 << 32, 1 << 20), vm.on_pio(0x80, 1, native.Ignore())
    for thing in (lambda: vm.memory.remove(slot), route.remove):
        remover = threading.Thread(target=thing)
        remover.start()
        remover.join(0.02)
        go()
        remover.join(20)
        assert not remover.is_alive()
    vcpu.kick()
    assert run.end() in ("Interrupted", "Io"), run.result
    goes_on(vm, vcpu)


EVENTS = {f.__name__: f for f in (close, drop, fork, exit, exception, remove)}


def interrupted(place):
    """Ctrl-C, the vCPU being the main thread's."""
    vm, vcpu, arrived, go = PLACES[place]()

    def interrupts():
        until(lambda: arrived(vcpu))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        go()

    thread = threading.Thread(target=interrupts)
    thread.start()
    try:
        vcpu.run()
    except KeyboardInterrupt:
        thread.join()
        goes_on(vm, vcpu)
    else:
        raise AssertionError("run() returned")


def happens(place, event):
    """Set the scene, and have it happen."""
    *things, arrived, go = PLACES[place]()
    run = Run(things[1])
    if place == "pending":
        run.end()
    until(lambda: arrived(things[1]))
    EVENTS[event](things.pop(0), things.pop(), run, go)  # that these are dropped is one of them


def main():
    """Have it happen, and say so."""
    warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)  # it is the point
    place, event = sys.argv[1:3]
    if event == "interrupt":
        interrupted(place)
    else:
        happens(place, event)
    print("ok", flush=True)


main()
