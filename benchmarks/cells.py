"""The cells: what an exit costs with one thing that answers it, each with its control, on a scripted vCPU.

test_dispatch.py times them in turns, publish.py under pyperf, instructions.py counts. The controls are control.pyx's:
what a C programmer would write; for Python's handlers that, taking the GIL and calling the same function; for what can
be switched on, the same without it.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import kvmexit
from kvmexit import native, testing

EXITS = 20_000


class Way(NamedTuple):
    """How exits are brought about: what is made, unmeasured, for so many of them, and what takes it to their end."""

    make: Callable[[int], Any]
    go: Callable[[Any], object]


class Cell(NamedTuple):
    """What is measured, beside its control. goal: ("above", ns an exit over the control), or ("all", ns an exit)."""

    control: Way
    measured: Way
    goal: tuple[str, int] | None = None


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


def scripted(steps, *registrations, timing=False):
    """A vCPU that gives out these steps again and again, with handlers registered as (register, handler)."""

    def make(exits):
        vm = testing.ScriptedVM()
        for register, function in registrations:
            register(vm, function)
        vcpu = vm.create_vcpu(0, steps, repeat=exits // len(steps), keep=False)
        vcpu.timing = timing
        return vcpu

    return Way(make, run)


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


def c_loop(control, steps, *work):
    """The C loop over these steps; `work`: what it does with each, as control.c_loop_doing() has it."""
    make = scripted(steps).make
    return Way(make, (lambda vcpu: control.c_loop_doing(vcpu, *work)) if work else control.c_loop)


# ---- handlers ----


def ignore(control, kind):
    """native.Ignore."""
    return Cell(c_loop(control, KINDS[kind][0]), with_handler(kind, native.Ignore()), ("above", 15))


def in_python(control, kind):
    """A function that does nothing, or answers 1."""
    steps, function, _ = KINDS[kind]
    calling = Way(scripted(steps).make, lambda vcpu: control.c_loop_calling(vcpu, function))
    return Cell(calling, with_handler(kind), ("all", 120))


def timing(control, kind):
    """vcpu.timing: where time goes, beside the same without."""
    function = native.Ignore()
    return Cell(with_handler(kind, function), with_handler(kind, function, timing=True), ("above", 25))


def registers(kind):
    """native.Registers, beside a load or a store."""

    def cell(control):
        work = "load" if kind == "pio_in" else "store"
        measured = with_handler(kind, native.Registers(bytearray(8)))
        return Cell(c_loop(control, KINDS[kind][0], work), measured, ("above", 15))

    return cell


def counter(control):
    """native.Counter, which passes on, before an Ignore; beside an atomic addition."""
    steps, _, register = KINDS["pio_out"]
    measured = scripted(steps, (register, native.Ignore()), (register, native.Counter()))
    return Cell(c_loop(control, steps, "count"), measured, ("above", 15))


def eventfd(control):
    """native.EventFd, beside write(2) to one."""
    doorbell = os.eventfd(0, os.EFD_NONBLOCK)
    return Cell(c_loop(control, KINDS["pio_out"][0], "ring", doorbell),
                with_handler("pio_out", native.EventFd(doorbell)), ("above", 15))


def serial(control):
    """native.Serial16550 that transmits to /dev/null, beside write(2) there."""
    null = os.open("/dev/null", os.O_WRONLY | os.O_NONBLOCK)
    return Cell(c_loop(control, KINDS["pio_out"][0], "send", null),
                with_handler("pio_out", native.Serial16550(null)), ("above", 15))


def stop(control):
    """native.Stop: run() returns each exit; beside a function that enters once."""
    steps, _, register = KINDS["pio_out"]
    make = scripted(steps, (register, native.Stop())).make

    def each(once):
        def go(made):
            vcpu, exits = made
            for _ in itertools.repeat(None, exits):  # which makes no numbers
                once(vcpu)

        return Way(lambda exits: (make(exits), exits), go)

    return Cell(each(control.c_once), each(kvmexit.Vcpu.run))


def function(control):
    """A C function in a capsule, beside a call of it."""
    return Cell(c_loop(control, KINDS["pio_out"][0], "call"),
                with_handler("pio_out", native.Function(control.capsule())), ("above", 15))


def ring(kind):
    """native.Ring, drained at the end."""

    def cell(control):
        steps, _, register = KINDS[kind]

        def make(exits):
            function = native.Ring(1 << exits.bit_length(), vcpus=1)
            return scripted(steps, (register, function)).make(exits), function, exits

        def run_and_drain(made):
            vcpu, function, exits = made
            run(vcpu)
            if len(function.drain()) != exits:
                raise AssertionError("the ring did not take every write")

        return Cell(c_loop(control, steps), Way(make, run_and_drain), ("above", 15))

    return cell


def convert(control):
    """native.Convert, asked for what is so already: no system call."""
    steps = [testing.memory_fault(gpa, private=False, rip=gpa) for gpa in (0x1000, 0x2000)]

    def make(exits):
        backend = testing.RecordedAttributes()
        vm = testing.ScriptedVM(attributes=backend)
        vm.memory.add(0, 1 << 20, guest_memfd=True, discard=False)
        vm.on_memory_fault(handler=native.Convert(vm))
        return vm.create_vcpu(0, steps, repeat=exits // len(steps), keep=False), backend

    def run_without_calls(made):
        vcpu, backend = made
        run(vcpu)
        if backend.calls:
            raise AssertionError(backend.calls)

    return Cell(c_loop(control, steps), Way(make, run_without_calls), ("all", 40))


HANDLERS = {
    "registers_out": registers("pio_out"), "registers_in": registers("pio_in"), "counter": counter, "eventfd": eventfd,
    "serial": serial, "stop": stop, "function": function, "ring_pio": ring("pio_out"), "ring_mmio": ring("mmio_write"),
    "duplicate_fault": convert,
}


# ---- the stages of an exit, one by one ----


def decode(control, kind):
    """From kvm_run to what a native handler is given (classify(), describe()), beside the C loop's look at it."""
    steps = KINDS[kind][0]
    return Cell(c_loop(control, steps), Way(scripted(steps).make, control.decode))


def as_object(control, kind):
    """From kvm_run to what a Python handler is given (classify(), make()), beside the same C loop."""
    steps = KINDS[kind][0]
    return Cell(c_loop(control, steps), Way(scripted(steps).make, control.as_object))


def gpas(count):
    """Addresses in so many ranges, in a shuffled order."""
    return [(i * 7919 % count) << 12 for i in range(max(count, 1000))]


def mmio_ranges(vm, count, function):
    """Register them."""
    with vm.swap_routes():
        for i in range(count):
            vm.on_mmio(i << 12, 8, function)


def route(control, count):
    """Which route an exit has (kvmexit_find(), and the counts around it), beside a binary search in the same loop."""
    steps = [testing.mmio_write(gpa, b"A") for gpa in gpas(count)]
    vm = testing.ScriptedVM()
    mmio_ranges(vm, count, native.Ignore())

    def make(exits):
        make.id += 1
        return vm.create_vcpu(make.id, steps[:exits], repeat=max(exits // len(steps), 1), keep=False)

    make.id = 0
    return Cell(Way(make, lambda vcpu: control.search(vcpu, count)), Way(make, control.route))


SWITCHED = ["pio_out", "pio_in", "memory_fault"]  # the kinds that what can be switched on is measured with
ROUTES = [1, 10, 100, 1000, 10_000]


def all_cells():
    """-> {name: function of control that makes the Cell}, but for those that need threads or files."""
    found = {}
    for group, make, kinds in [
        ("native", ignore, KINDS), ("python", in_python, KINDS), ("timing", timing, SWITCHED),
        ("decode", decode, KINDS), ("object", as_object, KINDS), ("route", route, ROUTES),
    ]:  # fmt: skip
        for kind in kinds:
            found[f"{group} {kind}"] = lambda control, make=make, kind=kind: make(control, kind)
    return found | {f"handler {name}": make for name, make in HANDLERS.items()}
