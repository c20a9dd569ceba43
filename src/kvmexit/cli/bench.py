"""`kvmexit bench`: what an exit costs on this machine.

Guests on /dev/kvm exit for ever; who answers are, in turns of a few milliseconds, a C loop around KVM_RUN (the floor,
and the control of all others), kvmexit with a native handler, kvmexit with a Python handler, and an ioctl loop in
Python. A sample is the time from one entry into KVM to the next, noted by the same C code for all; ratios are to the C
loop's turns of the same rounds, with 95 % intervals. About a minute; --full, the whole grid, takes several.
docs/performance.md has the method, how to read it and how to tune.

    kvmexit bench [--quick | --full] [--only PATTERN ...] [--json FILE] [--report FOLDER]
    kvmexit bench --load FILE --report FOLDER       the report of an earlier run
    kvmexit bench --compare A.json B.json           what differs, tested, with its size

Ctrl-C ends it early, and shows what was measured. Exit status: 0 done, 1 interrupted, 2 no usable KVM or wrong usage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

from kvmexit.errors import Error

__all__ = ["add_to"]

SECONDS = {"quick": 1.0, "default": 8.0, "full": 6.0}  # a cell


def add_to(commands: Any) -> None:
    """Add the command to `kvmexit`."""
    parser = commands.add_parser(
        "bench", help="what an exit costs here", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a second a cell: a look, not a figure to quote")
    size.add_argument("--full", action="store_true", help="every exit, call, load and number of vCPUs")
    parser.add_argument("--only", action="append", metavar="PATTERN",
                        help="these cells: pio_out, 'mmio_*/idle/1', kick; may come again")
    parser.add_argument("--seconds", type=_seconds, help="a cell (8; 1 with --quick, 6 with --full)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--report", type=Path, metavar="FOLDER",
                        help="write report.html, plots (PNG, SVG) and HdrHistogram files there; needs kvmexit[bench]")
    parser.add_argument("--load", type=Path, metavar="FILE", help="do not measure: show a result that --json wrote")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="compare two results")
    parser.add_argument("--device", default="/dev/kvm", help="(/dev/kvm)")
    parser.set_defaults(run=run, fail=parser.error)


def run(options: argparse.Namespace) -> int:
    """Measure, load or compare, and show."""
    from kvmexit.bench import report

    if options.compare:
        from kvmexit.bench import compare

        print(compare.as_text(*(load(path, options.fail) for path in options.compare)))
        return 0
    for path in (options.json, options.report):
        if path and not path.absolute().parent.is_dir():
            options.fail(f"{path}: there is no folder {path.absolute().parent}")
    if options.report:
        need_extra()
    result = load(options.load, options.fail) if options.load else measured(options)
    if options.json:
        options.json.write_text(json.dumps(result) + "\n")
    report.show(result, sys.stdout)
    if options.report:
        from kvmexit.bench import files

        files.write(result, options.report)
        print(f"\n{options.report / 'report.html'}: the report")
    return 1 if result["interrupted"] else 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; Error where no guest can run."""
    from kvmexit._vm import VM
    from kvmexit.bench.cells import chosen
    from kvmexit.bench.measure import measure

    try:
        cells = chosen(options.full, options.only)
    except ValueError as error:
        options.fail(str(error))
    VM(device=options.device).close()  # or say why not
    mode = "quick" if options.quick else "full" if options.full else "default"
    with Progress() as progress:
        return measure(cells, options.seconds or SECONDS[mode], options.device, progress.tick)


def load(path: Path, fail: Any) -> dict[str, Any]:
    """A result; wrong usage where the file is none."""
    result: dict[str, Any] = {}
    try:
        result = json.loads(path.read_text())
        if not isinstance(result, dict) or result.get("format") != 1 or "cells" not in result:
            raise ValueError("not a result of `kvmexit bench --json`, format 1")
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}")
    return result


def need_extra() -> None:
    """Error where what reports need is not installed."""
    needed = {"rich": "rich", "matplotlib": "matplotlib", "hdrh": "hdrhistogram"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise Error(f"--report needs {', '.join(missing)}: pip install 'kvmexit[bench]'")


class Progress:
    """A bar on stderr, by rich where it is installed; where stderr is no terminal a line a cell."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.last = ""
        if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self.bar = RichProgress(
                TextColumn("{task.description:<22}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
                console=Console(stderr=True), transient=True, auto_refresh=False)  # fmt: skip
            self.task = self.bar.add_task("", total=1.0)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.bar:
            self.bar.stop()
        elif sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def tick(self, done: float, text: str) -> None:
        """So much is done, and this is what is being done."""
        if self.bar:
            # No thread of its own: it would want the GIL while others are timed.
            self.bar.update(self.task, completed=done, description=text, refresh=True)
        elif sys.stderr.isatty():
            print(f"\r{text:<22} {'#' * int(done * 40):<40} {done:4.0%}", end="", file=sys.stderr, flush=True)
        elif text != self.last:
            print(text, file=sys.stderr, flush=True)
        self.last = text


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time")
    return seconds
