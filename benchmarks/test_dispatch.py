"""What an exit costs, with the kernel out of the way: the cells, each in turns with its control (conftest.py).

And those that need files or threads.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import cells
import pytest
from cells import Way, with_handler

from kvmexit import native, testing

kinds = pytest.mark.parametrize("kind", cells.KINDS)


@kinds
def test_native(beside, control, kind):
    """native.Ignore."""
    beside(cells.ignore(control, kind))


@kinds
def test_python(beside, control, kind):
    """A function that does nothing, or answers 1."""
    beside(cells.in_python(control, kind))


@pytest.mark.parametrize("name", cells.HANDLERS)
def test_handler(beside, control, name):
    """The other native handlers, beside the same work by hand."""
    beside(cells.HANDLERS[name](control))


@kinds
def test_decode(beside, control, kind):
    """A stage by itself: what a native handler is given."""
    beside(cells.decode(control, kind))


@kinds
def test_object(beside, control, kind):
    """A stage by itself: what a Python handler is given."""
    beside(cells.as_object(control, kind))


@pytest.mark.parametrize("routes", cells.ROUTES)
def test_route(beside, control, routes):
    """A stage by itself: the route, among so many."""
    beside(cells.route(control, routes))


@pytest.mark.parametrize("kind", cells.SWITCHED)
def test_timing(beside, control, kind):
    """vcpu.timing: where time goes, beside the same without."""
    beside(cells.timing(control, kind))


@pytest.mark.parametrize("kind", cells.SWITCHED)
def test_recording(beside, tmp_path, kind):
    """vcpu.record(), with pages that are populated as in a recording that goes on, beside the same without."""
    plain = with_handler(kind, native.Ignore())
    recorders = []

    def make(exits):
        for recorder, _ in recorders:
            recorder.close()
            os.unlink(recorder.path)
        vcpu = plain.make(exits)
        recorders[:] = [(vcpu.record(tmp_path / "trace"), vcpu)]
        time.sleep(0.01)
        return vcpu

    beside(cells.Cell(plain, Way(make, plain.go), ("above", 40)))
    recorder, vcpu = recorders.pop()
    assert recorder.records == cells.EXITS + 1 + vcpu.retries["eintr"]  # a tick for Ctrl-C is a return, too


@pytest.mark.parametrize("routes", cells.ROUTES)
def test_mmio_ranges(beside, routes):
    """Whole exits in ranges in a shuffled order, beside accesses to the same range again and again."""
    steps = [testing.mmio_write(gpa, b"A") for gpa in cells.gpas(routes)]
    vm = testing.ScriptedVM()
    cells.mmio_ranges(vm, routes, native.Ignore())

    def make(exits):
        make.id += 1
        return vm.create_vcpu(make.id, steps, repeat=exits // len(steps), keep=False)

    make.id = 0
    beside(cells.Cell(with_handler("mmio_write", native.Ignore()), Way(make, cells.run)))


@pytest.mark.parametrize("vcpus", [1, 2, 3, 4])
@pytest.mark.parametrize("answered", ["native", "python"])
def test_vcpus(beside, control, answered, vcpus):
    """Some vCPUs of one VM at once, each on a thread of its own: ns an exit of each. Beside as many C loops."""
    steps, in_python, register = cells.KINDS["pio_out"]
    handler = native.Ignore() if answered == "native" else in_python
    by_hand = control.c_loop if answered == "native" else lambda vcpu: control.c_loop_calling(vcpu, handler)
    exits = cells.EXITS * (10 if answered == "native" else 1)  # so that starting the threads does not count

    def make(exits):
        vm = testing.ScriptedVM()
        register(vm, handler)
        return [vm.create_vcpu(id, steps, repeat=exits, keep=False) for id in range(vcpus)]

    with ThreadPoolExecutor(vcpus) as pool:
        its, mine = (Way(make, lambda made, one=one: list(pool.map(one, made))) for one in (by_hand, cells.run))
        beside(cells.Cell(its, mine), exits=exits, vcpus=vcpus)
