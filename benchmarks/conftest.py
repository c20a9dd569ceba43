"""Each figure beside its control: the two take turns, pass by pass, so that drift of the machine hits both alike."""

from __future__ import annotations

import os
import time
from statistics import median

import pytest
from cells import EXITS
from common import build_control, machine, percentile

PASSES = 60
ROWS = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def control():
    """control.pyx."""
    return build_control()


@pytest.fixture
def beside(benchmark, request):
    """A function that times a cell, its control before each pass. vcpus: so many take `exits` exits each, at once."""

    def beside(cell, exits=EXITS, vcpus=1):
        controls = []
        make, go = cell.measured

        def timed(way):
            made = way.make(exits)
            begun = time.perf_counter_ns()
            way.go(made)
            return (time.perf_counter_ns() - begun) / exits

        def setup():
            controls.append(timed(cell.control))
            return (make(exits),), {}

        timed(cell.measured)  # once for the caches
        benchmark.pedantic(go, setup=setup, rounds=PASSES)
        ns = [seconds * 1e9 / exits for seconds in benchmark.stats.stats.data]
        row = {
            "ns": median(ns), "p99": percentile(ns, 0.99), "max": max(ns), "control": median(controls),
            "control_p99": percentile(controls, 0.99),
            "above": median([mine - its for mine, its in zip(ns, controls[-len(ns):], strict=True)]),
        }
        row["ratio"] = row["ns"] / row["control"]
        if cell.goal:
            which, most = cell.goal
            row["goal"], row["met"] = f"{which} <= {most}", row["above" if which == "above" else "ns"] <= most
        row["a_second"], row["control_a_second"] = vcpus * 1e9 / row["ns"], vcpus * 1e9 / row["control"]
        row["vcpus"] = vcpus
        benchmark.extra_info.update(row)
        request.config.stash.setdefault(ROWS, []).append((request.node.name.removeprefix("test_"), row))

    return beside


def pytest_terminal_summary(terminalreporter, config):
    """The table: ns an exit."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"ns an exit: medians of {PASSES} passes of {EXITS:,} exits, in turns with the control")
    write(f"{machine()}, {os.cpu_count()} processors")
    write(f"{'':<34}{'p50':>7}{'p99':>7}{'max':>7}{'control':>9}{'p99':>7}{'above':>8}{'ratio':>7}  goal")
    for name, row in rows:
        goal = f"  {row['goal']}: {'met' if row['met'] else 'missed'}" if "goal" in row else ""
        if row["vcpus"] > 1:
            goal = f"  {row['a_second'] / 1e6:.1f} million a second in all, control {row['control_a_second'] / 1e6:.1f}"
        write(f"{name:<34}{row['ns']:>7.0f}{row['p99']:>7.0f}{row['max']:>7.0f}{row['control']:>9.0f}"
              f"{row['control_p99']:>7.0f}{row['above']:>8.1f}{row['ratio']:>7.2f}{goal}")
