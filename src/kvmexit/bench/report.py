"""A result as text: the machine, and a table a cell. Times in us."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TextIO

from kvmexit.bench.cells import CALLS, KINDS, WAYS

__all__ = ["COLUMNS", "cells_done", "interval", "machine_rows", "microseconds", "rows", "show", "title"]

COLUMNS = ("", "p50", "p90", "p99", "p99.9", "max", "a second", "p50 to C", "p99 to C", "samples")
WHAT = {
    "pio_out": "OUT to a port", "pio_in": "IN from a port", "mmio_write": "MMIO write", "mmio_read": "MMIO read",
    "hypercall": "hypercall (KVM_HC_MAP_GPA_RANGE)", "memory_fault": "memory fault (KVM_EXIT_MEMORY_FAULT)", **CALLS,
}  # fmt: skip
assert set(WHAT) == {*KINDS, *CALLS}


def show(result: dict[str, Any], file: TextIO) -> None:
    """Print all of it."""
    width = max(len(name) for name, _ in machine_rows(result))
    for name, text in machine_rows(result):
        print(f"{name:<{width}}  {text}", file=file)
    print("\nTimes in us, from one entry into KVM to the next (of calls: to their return), in turns, "
          f"{result['seconds_a_cell']:g} s a cell;\n\"to C\": ratio to the C loop, and its 95 % interval", file=file)
    for cell in result["cells"]:
        print(f"\n{cell['name']}: {title(cell)}", file=file)
        if cell["impossible"]:
            print(f"    cannot be done here: {cell['impossible']}", file=file)
            continue
        table = [COLUMNS, *rows(cell)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            first, *others = (text.rjust(width) for text, width in zip(row, widths, strict=True))
            print("    " + "  ".join([row[0].ljust(len(first)), *others]).rstrip(), file=file)
    if result["interrupted"]:
        print("\ninterrupted: this is what was measured by then", file=file)


def title(cell: dict[str, Any]) -> str:
    """In words."""
    load = {0: "idle", 1: "beside one busy Python thread", 2: "beside two busy Python threads"}[cell["busy"]]
    return f"{WHAT[cell['kind']]}, {load}, {cell['vcpus']} vCPU{'s' if cell['vcpus'] > 1 else ''}"


def cells_done(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Those with figures."""
    return [cell for cell in result["cells"] if cell["ways"]]


def rows(cell: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """By COLUMNS."""
    for way, own in cell["ways"].items():
        times = [microseconds(own[key]) for key in ("p50", "p90", "p99", "p999", "max")]
        yield (WAYS[way], *times, f"{own['per_second']:,.0f}",
               interval(own["p50_to_floor"]), interval(own["p99_to_floor"]), f"{own['samples']:,}")


def microseconds(ns: float | None) -> str:
    """Two decimals below 100; "-" where there are too few samples."""
    if ns is None:
        return "-"
    return f"{ns / 1000:,.2f}" if ns < 100_000 else f"{ns / 1000:,.0f}"


def interval(ratio: list[float] | None) -> str:
    """A ratio, and what it lies between."""
    if ratio is None:
        return "-"
    digits = 3 if ratio[2] < 10 else 1 if ratio[2] < 100 else 0
    middle, low, high = (f"{figure:.{digits}f}" for figure in ratio)
    return f"{middle} ({low}-{high})"


def machine_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of the machine, named."""
    m = result["machine"]
    outer = f" ({m['hypervisor']})" if m["hypervisor"] else ""
    nested = f"nested: KVM runs in a VM{outer}; what it costs is also the outer one's"
    mitigations = ", ".join(sorted(m["mitigations"])) or "none"
    kvm = ", ".join(f"{name}={value}" if value else name for name, value in m["kvm"].items())
    gil = "" if m["gil"] else ", free-threaded"
    optimised = "with" if m["python_optimised"] else "without"
    said = [
        ("processor", f"{m['cpu'] or 'unknown'}, {m['cores']} cores for this process, SMT {onoff(m['smt'])}"),
        ("virtualisation", nested if m["nested"] else f"bare metal, {m['virtualisation']}"),
        ("frequency", f"governor {m['governor'] or 'not shown'}, turbo {onoff(m['turbo'])}"),
        ("kernel", f"{m['kernel']} {m['preemption']}".rstrip() + f", clock {m['clocksource']}, huge pages: "
                   f"{m['transparent_hugepages']}"),
        ("KVM", kvm or "no modules shown"),
        ("mitigations", mitigations),
        ("load", f"{m['load_average']} when it began"),
        ("Python", f"{m['python']}, {optimised} PGO{gil}; switch interval {m['switch_interval_s'] * 1000:g} ms"),
        ("kvmexit", m["kvmexit"]),
        ("clock", f"{m['clock_ns']} ns a reading, in every sample once"),
        ("measured", f"{result['began']}, in {result['seconds']:g} s"),
    ]
    return said


def onoff(text: str) -> str:
    return {"0": "off", "1": "on"}.get(text, text or "not shown")
