"""The figures that are published: cells under pyperf, each in processes of its own, after its control.

    python benchmarks/publish.py -o a.json                      native and Python handlers: a quarter of an hour
    python benchmarks/publish.py -k route --fast -o a.json      cells with "route" in their name, less exactly
    pyperf compare_to a.json b.json --table

Needs what `kvmexit[test,benchmarks]` installs. Other options, --rigorous and --affinity among them, are pyperf's. A
value is ns an exit over passes of 200,000; making the vCPUs does not count. `pyperf system tune` before, where you may.
pyperf has nothing take turns: on a machine whose clock changes by the minute look first at how the controls differ. For
two revisions there ab.py is better.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile

import pyperf
from cells import EXITS, all_cells
from common import build_control, machine

PASS = 10 * EXITS
CHOSEN = ["native", "python"]


def timed(cell, which):
    """-> what pyperf takes: a function of the number of passes; seconds."""

    def passes(loops):
        make, go = getattr(cell(), which)
        seconds = 0.0
        for _ in range(loops):
            made = make(PASS)
            begun = pyperf.perf_counter()
            go(made)
            seconds += pyperf.perf_counter() - begun
        return seconds

    return passes


def main():
    """See above."""
    folder = tempfile.TemporaryDirectory(prefix="kvmexit-publish-")

    def hand_on(command, options):  # to the worker processes
        command += ["--control", options.control or folder.name]
        for word in options.k:
            command += ["-k", word]

    runner = pyperf.Runner(add_cmdline_args=hand_on, program_args=[__file__])
    runner.argparser.description = __doc__
    runner.argparser.formatter_class = argparse.RawDescriptionHelpFormatter
    runner.argparser.add_argument("-k", metavar="WORD", action="append", default=[], help="cells with it in their name")
    runner.argparser.add_argument("--control", help=argparse.SUPPRESS)  # where control.pyx is compiled already
    options = runner.parse_args()
    control = build_control(options.control or folder.name)
    runner.metadata["kvmexit"] = machine()
    for name, make in all_cells().items():
        if any(word in name for word in options.k or CHOSEN):
            cell = functools.cache(functools.partial(make, control))
            runner.bench_time_func(f"{name}, control", timed(cell, "control"), inner_loops=PASS)
            runner.bench_time_func(name, timed(cell, "measured"), inner_loops=PASS)


if __name__ == "__main__":
    sys.exit(main())
