"""Each figure beside its control: the two take turns, pass by pass, so that drift of the machine hits both alike."""

from __future__ import annotations

import time
from statistics import median

import pytest
from common import build_control, machine, percentile

EXITS, PASSES = 20_000, 60
ROWS = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def control():
    """control.pyx."""
    return build_control()


@pytest.fixture
def beside(benchmark, request):
    """A function of (control, measured, goal=None) that times what is measured, and its control before each pass.

    Both are a function that makes a vCPU about to give out EXITS exits, and one that takes it to their end. goal:
    ("above", ns an exit over the control), or ("all", ns an exit).
    """

    def timed(way):
        make, go = way
        vcpu = make()
        begun = time.perf_counter_ns()
        go(vcpu)
        return (time.perf_counter_ns() - begun) / EXITS

    def beside(control, measured, goal=None):
        controls = []
        make, go = measured

        def setup():
            controls.append(timed(control))
            return (make(),), {}

        timed(measured)  # once for the caches
        benchmark.pedantic(go, setup=setup, rounds=PASSES)
        ns = [seconds * 1e9 / EXITS for seconds in benchmark.stats.stats.data]
        row = {
            "ns": median(ns), "p99": percentile(ns, 0.99), "max": max(ns), "control": median(controls),
            "control_p99": percentile(controls, 0.99),
            "above": median([mine - its for mine, its in zip(ns, controls[-len(ns):], strict=True)]),
        }
        row["ratio"] = row["ns"] / row["control"]
        if goal:
            row["goal"], row["met"] = f"{goal[0]} <= {goal[1]}", row["above" if goal[0] == "above" else "ns"] <= goal[1]
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
    write(machine())
    write(f"{'':<34}{'p50':>7}{'p99':>7}{'max':>7}{'control':>9}{'p99':>7}{'above':>8}{'ratio':>7}  goal")
    for name, row in rows:
        goal = f"  {row['goal']}: {'met' if row['met'] else 'missed'}" if "goal" in row else ""
        write(f"{name:<34}{row['ns']:>7.0f}{row['p99']:>7.0f}{row['max']:>7.0f}{row['control']:>9.0f}"
              f"{row['control_p99']:>7.0f}{row['above']:>8.1f}{row['ratio']:>7.2f}{goal}")
