"""`kvmexit trace`: shows a recorded trace, or records the guests of a Python program.

    kvmexit trace PATH [--exit NAME] [--range FIRST:SIZE] [--vcpu ID] [--outcome NAME] [--time FROM:TO]
                       [--json | --csv | --perfetto]
    kvmexit trace --record FOLDER SCRIPT [ARGUMENT ...]

A line a return of KVM_RUN: when it was entered, in seconds since the trace began, us inside, the vCPU, what became of
the exit, the exit with its answer. --json prints an object a line instead, by export.COLUMNS. A part that
was torn, or records that were lost, are named on stderr; the exit status is 0 all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import kvmexit
from kvmexit import export
from kvmexit._replay import Trace, TraceRecord, load
from kvmexit.stats import OUTCOMES, PENDING

__all__ = ["add_to"]

Filter: TypeAlias = Callable[[TraceRecord], bool]

NO_EXITS = ("retried", "kick", "timeout", "pause", "drained")  # TraceRecord.outcome of other returns


def add_to(commands: Any) -> None:
    """Add the command to `kvmexit`."""
    parser = commands.add_parser(
        "trace", help="show a recorded trace, or record a program's guests", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("path", nargs="?", type=Path, help="a trace file, or a folder of them")
    parser.add_argument("--record", nargs=argparse.REMAINDER, metavar="FOLDER SCRIPT ARGUMENT",
                        help="run a Python program, and record each VM it makes into FOLDER/vm-NUMBER")
    names = export.classes()
    parser.add_argument("--exit", action="append", type=_one_of(names, "exit"), metavar="NAME",
                        help="only these: the class (Io, MemoryFault), or KVM's name (IO, MEMORY_FAULT)")
    parser.add_argument("--range", action="append", type=_range, metavar="FIRST:SIZE",
                        help="only accesses to these ports, addresses, MSRs or hypercalls")
    parser.add_argument("--vcpu", action="append", type=int, metavar="ID")
    parser.add_argument("--outcome", action="append", choices=(*OUTCOMES, PENDING, *NO_EXITS))
    parser.add_argument("--time", type=_time, default=(-float("inf"), float("inf")), metavar="FROM:TO",
                        help="seconds since the trace began; either may be left out")
    parser.add_argument("--json", action="store_const", const=_json, dest="show", help="an object a line")
    parser.add_argument("--csv", action="store_const", const=_csv, dest="show")
    parser.add_argument("--perfetto", action="store_const", const=_perfetto, dest="show",
                        help="trace events, for ui.perfetto.dev or chrome://tracing")
    parser.set_defaults(run=run, show=_lines, fail=parser.error)


def run(options: argparse.Namespace) -> int:
    """Show, or record."""
    if options.record is not None:
        if options.path or len(options.record) < 2:
            options.fail("--record comes last, and takes a folder and a script")
        return record(*options.record)
    if options.path is None:
        options.fail("a trace is needed, or --record")
    try:
        trace = load(options.path)
    except OSError as error:
        options.fail(str(error))
    try:
        options.show(trace, chosen(options), sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for part in trace.parts:
        if part.ended is None:
            print(f"{part.path}: still written, or its writer was killed", file=sys.stderr)
        if part.torn:
            print(f"{part.path}: {part.torn} bytes at its end are torn", file=sys.stderr)
        if part.lost:
            print(f"{part.path}: {part.lost} records are lost: {os.strerror(part.error)}", file=sys.stderr)
    return 0


def chosen(options: argparse.Namespace) -> Filter:
    """-> whether every filter lets a record pass."""
    first, last = (seconds * 1e9 for seconds in options.time)

    def wanted(entry: TraceRecord) -> bool:
        address = export.address_of(entry) if options.range else None
        return (
            (not options.vcpu or entry.vcpu in options.vcpu)
            and (not options.outcome or entry.outcome in options.outcome)
            and (not options.exit or export.name_of(entry) in options.exit)
            and (not options.range or any(address is not None and address in range for range in options.range))
            and first <= entry.left_ns <= last
        )

    return wanted


def _lines(trace: Trace, wanted: Filter, file: Any) -> None:
    """As strace does."""
    for entry in filter(wanted, trace):
        what = export.name_of(entry) if entry.exit is None else repr(entry.exit)
        print(f"{entry.entered_ns / 1e9:12.6f} {(entry.left_ns - entry.entered_ns) / 1000:9.1f}  vcpu {entry.vcpu:<3} "
              f"{entry.outcome:<8} {what}", file=file)


def _json(trace: Trace, wanted: Filter, file: Any) -> None:
    for entry in filter(wanted, trace):
        print(json.dumps(export.as_row(entry)), file=file)


def _csv(trace: Trace, wanted: Filter, file: Any) -> None:
    export.write_csv(filter(wanted, trace), file)


def _perfetto(trace: Trace, wanted: Filter, file: Any) -> None:
    export.write_perfetto(trace, file, wanted)


class _RecordedVM(kvmexit.VM):
    """VM, which a program finds in its place."""

    folder: ClassVar[Path]
    recorders: ClassVar[list[kvmexit.VMRecorder]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timing = True  # so that waiting for the GIL is told from Python
        self.recorders.append(self.record(self.folder / f"vm-{len(self.recorders)}"))


def record(folder: str, script: str, *arguments: str) -> int:
    """Run a Python program with a VM that records itself; -> its exit status."""
    _RecordedVM.folder = Path(folder)
    original, argv, path = kvmexit.VM, sys.argv, sys.path[0]
    kvmexit.VM = _RecordedVM  # type: ignore[misc]
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    finally:
        kvmexit.VM, sys.argv, sys.path[0] = original, argv, path  # type: ignore[misc]
        while _RecordedVM.recorders:
            _RecordedVM.recorders.pop().close()  # what became of the last return is known now
    return 0


def _one_of(names: dict[str, str], what: str) -> Any:
    def named(text: str) -> str:
        if text.lower() not in names:
            there = ", ".join(sorted(set(names.values())))
            raise argparse.ArgumentTypeError(f"no {what} is called {text!r}; there are {there}")
        return names[text.lower()]

    return named


def _range(text: str) -> range:
    first, _, size = text.partition(":")
    try:
        begin, count = int(first, 0), int(size or "1", 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no FIRST:SIZE, such as 0x3f8:8") from None
    return range(begin, begin + count)


def _time(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first or "-inf"), float(last or "inf")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no FROM:TO in seconds, such as 0.5:2") from None
