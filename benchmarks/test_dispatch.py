"""What an exit costs that a native or a Python handler answers: on a scripted vCPU, with the kernel out of the way.

Controls: a C loop (sentinel, enter, payload) for native handlers; that loop taking the GIL and calling the same Python
function for Python ones; and for what can be switched on, the same without it.
"""

from __future__ import annotations

import errno
import os
import time

import pytest
from conftest import EXITS, PASSES

import kvmexit
from kvmexit import native, testing


def handler(vcpu, exit):
    """The empty handler."""


def in_handler(vcpu, exit):
    """Answers a read."""
    return 1


# The steps, Python's handler, and the one route that leads to it.
KINDS = {
    "pio_out": ([testing.pio_out(0x3F8, b"A")], handler, lambda vm, f: vm.on_pio(0x3F8, 8, f)),
    "mmio_write": ([testing.mmio_write(0x1000, b"A")], handler, lambda vm, f: vm.on_mmio(0x1000, 8, f)),
    "pio_in": ([testing.pio_in(0x3FD)], in_handler, lambda vm, f: vm.on_pio(0x3F8, 8, f)),
    "mmio_read": ([testing.mmio_read(0x1000, 4)], in_handler, lambda vm, f: vm.on_mmio(0x1000, 8, f)),
    "hypercall": ([testing.hypercall(12, 0)], in_handler, lambda vm, f: vm.on_hypercall(12, f)),
    "memory_fault": (
        [testing.memory_fault(0x1000, rip=1), testing.memory_fault(0x2000, rip=2)], handler,
        lambda vm, f: vm.on_memory_fault(handler=f)),
}
kinds = pytest.mark.parametrize("kind", KINDS)
writes = pytest.mark.parametrize("kind", ["pio_out", "mmio_write"])


def scripted(steps, *registrations, timing=False, exits=EXITS):
    """-> a function that makes a vCPU about to give out EXITS exits, and one that runs it to their end."""

    def make():
        vm = testing.ScriptedVM()
        for register, function in registrations:
            register(vm, function)
        vcpu = vm.create_vcpu(0, steps, repeat=exits // len(steps), keep=False)
        vcpu.timing = timing
        return vcpu

    return make, run


def run(vcpu):
    """Vcpu.run() to the script's end; every exit has found its handler."""
    try:
        exit = vcpu.run()
    except kvmexit.KvmError as error:
        if error.errno != errno.ENODATA:
            raise
    else:
        raise AssertionError(exit)


def with_handler(kind, function=None, **options):
    """The same, of one kind of exit, with Python's handler, or another."""
    steps, in_python, register = KINDS[kind]
    return scripted(steps, (register, function or in_python), **options)


def c_loop(control, kind):
    """The control of native handlers."""
    return scripted(KINDS[kind][0])[0], control.c_loop


@kinds
def test_native(beside, control, kind):
    """native.Ignore."""
    beside(c_loop(control, kind), with_handler(kind, native.Ignore()), goal=("above", 15))


@kinds
def test_python(beside, control, kind):
    """A function that does nothing, or answers 1."""
    in_python = KINDS[kind][1]
    calling = scripted(KINDS[kind][0])[0], lambda vcpu: control.c_loop_calling(vcpu, in_python)
    beside(calling, with_handler(kind), goal=("all", 120))


@pytest.mark.parametrize("kind", ["pio_out", "pio_in", "memory_fault"])
def test_timing(beside, kind):
    """vcpu.timing: where time goes, beside the same without."""
    ignore = native.Ignore()
    beside(with_handler(kind, ignore), with_handler(kind, ignore, timing=True), goal=("above", 25))


@pytest.mark.parametrize("kind", ["pio_out", "pio_in", "memory_fault"])
def test_recording(beside, tmp_path, kind):
    """vcpu.record(), with pages that are populated as in a recording that goes on, beside the same without."""
    make, run = with_handler(kind, native.Ignore())
    recorders = []

    def make_recorded():
        for recorder, _ in recorders:
            recorder.close()
            os.unlink(recorder.path)
        vcpu = make()
        recorders[:] = [(vcpu.record(tmp_path / "trace"), vcpu)]
        time.sleep(0.01)
        return vcpu

    beside((make, run), (make_recorded, run), goal=("above", 40))
    recorder, vcpu = recorders.pop()
    assert recorder.records == EXITS + 1 + vcpu.retries["eintr"]  # a tick for Ctrl-C is a return, too


@writes
def test_ring(beside, control, kind):
    """native.Ring, drained after each pass."""
    ring = native.Ring(1 << EXITS.bit_length(), vcpus=PASSES + 2)  # with a lane for each pass's vCPU

    def run_and_drain(vcpu):
        run(vcpu)
        if len(ring.drain()) != EXITS:
            raise AssertionError("the ring did not take every write")

    beside(c_loop(control, kind), (with_handler(kind, ring)[0], run_and_drain), goal=("above", 15))


def test_duplicate_fault(beside, control):
    """native.Convert, asked for what is so already: no system call."""
    steps = [testing.memory_fault(gpa, private=False, rip=gpa) for gpa in (0x1000, 0x2000)]
    backends = []

    def make():
        backends.append(testing.RecordedAttributes())
        vm = testing.ScriptedVM(attributes=backends[-1])
        vm.memory.add(0, 1 << 20, guest_memfd=True, discard=False)
        vm.on_memory_fault(handler=native.Convert(vm))
        return vm.create_vcpu(0, steps, repeat=EXITS // len(steps), keep=False)

    beside((scripted(steps)[0], control.c_loop), (make, run), goal=("all", 40))
    assert len(backends) > PASSES
    assert not any(backend.calls for backend in backends)


@pytest.mark.parametrize("routes", [1, 10, 100, 1000, 10_000])
def test_mmio_ranges(beside, routes):
    """Accesses to ranges in a shuffled order, beside one to the same range again and again."""
    ignore = native.Ignore()
    gpas = [(i * 7919 % routes) << 12 for i in range(max(routes, 1000))]
    steps = [testing.mmio_write(gpa, b"A") for gpa in gpas]

    def register(vm, function):
        with vm.swap_routes():
            for i in range(routes):
                vm.on_mmio(i << 12, 8, function)

    vm = testing.ScriptedVM()
    register(vm, ignore)

    def make():
        make.id += 1
        return vm.create_vcpu(make.id, steps, repeat=EXITS // len(steps), keep=False)

    make.id = 0
    beside(with_handler("mmio_write", ignore), (make, run))
