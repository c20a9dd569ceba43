"""A storm of faults: a guest walks over memory that is all of the other kind, and each page has to be converted.

On a KVM with private memory each page is private, its guest_memfd closed, so that it faults, and is made shared. (An
access that is not what its page is cannot be had in a software-protected VM: floor.c turns the fault round.) Elsewhere
the faults are a script's, those that a guest would make with that window, and RecordedAttributes notes the conversions:
what KVM itself takes for them is missing.
"""

from __future__ import annotations

import ctypes
import struct
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import guest
from guest import END, REGION, Step
from ways import (
    DEVICE,
    PAGE,
    PATIENCE,
    Turn,
    Ways,
    Workload,
    converting_on,
    library,
    no_compiler,
    no_private_memory,
    same,
)

from kvmexit import VM, MemoryFault, native
from kvmexit.bench.cells import private_vm
from kvmexit.testing import ScriptedVM, memory_fault, pio_out

PAGES, WINDOW = 8192, 512


def make(share: float = 1.0) -> Workload:
    """share: how much of it."""
    pages, scripted = max(int(PAGES * share), 2), no_private_memory()
    storm = partial(run, pages, bool(scripted))
    needs_c = "" if scripted else no_compiler()
    window = {"window": WINDOW * PAGE}
    ways: Ways = {
        "page at a time": needs_c or partial(storm, list(range(pages)), {}),
        "window of 2 MiB": needs_c or partial(storm, list(range(0, pages, WINDOW)), window),
        "adaptive": needs_c or partial(storm, ahead(pages), {"adaptive": True}),
        "Python handler, a page": partial(storm, list(range(pages)), None),
        "the walk alone": "a script's guest does not walk" if scripted else partial(storm, [], None),
    }
    return Workload(f"a storm of conversions: {pages:,} pages, one after the other", converting_on(scripted), "page",
                    pages, ways)  # fmt: skip


def ahead(pages: int) -> list[int]:
    """Where an adaptive window faults: each goes to the end of one twice as large as the one before, up to 2 MiB."""
    found, page, size = [], 0, 1
    while page < pages:
        found.append(page)
        page, size = (page // size + 1) * size, min(2 * size, WINDOW)
    return found


def run(pages: int, scripted: bool, faults: list[int], options: dict[str, Any] | None) -> Turn:
    """Convert them all, by native.Convert(**options) or in Python, and check it. Raises Wrong.

    faults: the pages that have to fault; none: what is there is as the guest wants it.
    """
    with ExitStack() as stack:
        vm: VM = stack.enter_context(ScriptedVM() if scripted else private_vm(DEVICE))
        if isinstance(vm, ScriptedVM):
            script = [*(memory_fault(REGION + page * PAGE, PAGE, private=True) for page in faults), pio_out(END, b"\0")]
            vcpu = vm.create_vcpu(0, script)
        else:
            steps = [Step("write", REGION + page * PAGE, page + 1) for page in range(pages)]
            vcpu = guest.start(vm, [*steps, Step("end")], b"", cpl=0)
        slot = vm.memory.add(REGION, pages * PAGE, guest_memfd=True)
        if faults and not scripted:
            vm.memory.convert(REGION, pages * PAGE, private=True)
        if not scripted:
            slot.close_guest_memfd()
        seen: list[int] = []
        convert = native.Convert(vm, **(options or {}))
        if options is None:

            def by_python(vcpu: Any, fault: MemoryFault) -> None:
                seen.append(fault.gpa)
                vm.memory.convert(fault.gpa, fault.size, private=scripted)

            vm.on_memory_fault(handler=by_python)
        else:
            vm.on_memory_fault(handler=convert)
            if not scripted:
                other_side = library().other_side
                other_side.argtypes = [ctypes.c_void_p] * 2
                vm.on_memory_fault(handler=native.Function(other_side))
        began = time.perf_counter()
        exit = vcpu.run(timeout=PATIENCE)
        took = time.perf_counter() - began
        same("the guest's end", (type(exit).__name__, getattr(exit, "port", None)), ("Io", END))
        same("exits", vm.stats.exits, len(faults) + 1)
        same("ranges", [tuple(found) for found in vm.memory.ranges() if found.gpa >= REGION],
             [(REGION, pages * PAGE, scripted)])  # fmt: skip
        if options is None:
            same("pages that faulted", seen, [REGION + page * PAGE for page in faults])
        else:
            same("faults, duplicates, pages converted", (convert.faults, convert.duplicates, convert.pages),
                 (len(faults), 0, pages))  # fmt: skip
        if not scripted:
            words = [struct.unpack("<I", vm.memory.read(REGION + page * PAGE, 4))[0] for page in range(pages)]
            same("what the guest wrote", words, list(range(1, pages + 1)))
    return Turn(took, len(faults) + 1)
