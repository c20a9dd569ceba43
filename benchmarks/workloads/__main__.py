"""Workloads from life, each answered in several ways, with a reference that every answer is checked against.

    python benchmarks/workloads                        all; --only serial,mmio; --rounds 12; --json FILE
    python benchmarks/workloads --share 0.01           a hundredth of each: does it work here?

A round runs each way once, in another order, in a VM of its own, and divides the time by the exits (or pages): a mean
over the workload, and max the slowest round. What single exits take, and their tail, is `kvmexit bench`'s. Ratios are
to the control's of the same round. A wrong answer ends it all, with status 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
NAMES = ("serial", "boot_conversions", "storm", "mmio")


def measure(workload: Any, rounds: int) -> dict[str, list[Any]]:
    """-> each way's turns, one a round."""
    ways = {name: way for name, way in workload.ways.items() if not isinstance(way, str)}
    found: dict[str, list[Any]] = {name: [] for name in ways}
    generator = random.Random(0)
    for _ in range(rounds):
        for name in generator.sample(list(ways), len(ways)):
            found[name].append(ways[name]())
    return found


def figures(workload: Any, found: dict[str, list[Any]]) -> dict[str, Any]:
    """-> what is said of it, as the JSON file has it."""
    from kvmexit.bench.figures import median_interval

    ways: dict[str, Any] = {}
    us = {name: [turn.seconds / workload.units * 1e6 for turn in turns] for name, turns in found.items()}
    control = next(iter(us), None)
    for name, way in workload.ways.items():
        if isinstance(way, str):
            ways[name] = {"skipped": way}
            continue
        ratios = [own / floor for own, floor in zip(us[name], us[control], strict=True)]
        interval = median_interval(ratios)
        ways[name] = {"us": us[name], "p50": median(us[name]), "max": max(us[name]), "exits": found[name][0].exits,
                      "to_control": median(ratios), "interval": interval and interval[1:]}  # fmt: skip
    return {"title": workload.title, "on": workload.on, "unit": workload.unit, "units": workload.units,
            "control": control, "ways": ways}  # fmt: skip


def table(made: dict[str, Any], rounds: int) -> str:
    """The same, to read."""
    head = f"us {'an exit' if made['unit'] == 'exit' else 'a page'}"
    lines = [f"{made['title']}; on {made['on']}",
             f"{rounds} rounds of {made['units']:,} {made['unit']}s",
             f"{head:<24}{'p50':>10}{'max':>10}{'exits':>10}   to {made['control']} (95 %)"]  # fmt: skip
    for name, way in made["ways"].items():
        if "skipped" in way:
            lines.append(f"{name:<24}   skipped: {way['skipped']}")
            continue
        interval = ""
        if way["interval"] and name != made["control"]:
            interval = " ({:.3f}-{:.3f})".format(*way["interval"])
        lines.append(f"{name:<24}{way['p50']:>10.3f}{way['max']:>10.3f}{way['exits']:>10,}{way['to_control']:>9.3f}"
                     f"{interval}")  # fmt: skip
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"names, with commas between: {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=12, help="6 at least give an interval")
    parser.add_argument("--share", type=float, default=1.0, help="of each workload")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args(arguments)
    only = options.only.split(",") if options.only else NAMES
    if unknown := [name for name in only if name not in NAMES]:
        parser.error(f"no workload is called {', '.join(unknown)}: there are {', '.join(NAMES)}")
    if options.rounds < 1 or not 0 < options.share <= 1:
        parser.error("--rounds is 1 at least, --share more than 0 and no more than 1")
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from common import machine
    from ways import Wrong

    from kvmexit.bench.machine import describe

    print(f"{machine()}; load {os.getloadavg()[0]:.1f}", flush=True)
    result = {"machine": describe("/dev/kvm"), "share": options.share, "workloads": {}}
    for name in only:
        workload = importlib.import_module(name).make(options.share)
        try:
            made = figures(workload, measure(workload, options.rounds))
        except Wrong as wrong:
            print(f"{name}: a wrong answer: {wrong}", file=sys.stderr)
            return 1
        result["workloads"][name] = made
        print(f"\n{name}: {table(made, options.rounds)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
