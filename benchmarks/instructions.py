"""Instructions an exit, counted by callgrind: what is too small for a clock, and the same on a busy machine.

    python benchmarks/instructions.py                         all cells, two to four minutes
    python benchmarks/instructions.py -k python --functions   those with "python" in their name, and where it goes
    python benchmarks/instructions.py --json a.json           a result to keep
    python benchmarks/instructions.py --compare a.json        what differs from it by 1 % (--effect) or more

Needs valgrind (Debian: apt install valgrind), and the compiler that all benchmarks need. An exit's instructions are the
difference of a run of twice --exits and one of --exits, over their number: begin and end of run() do not count. Beside
them the control's; and how often an exit calls malloc, calloc or realloc, Python's own allocator standing aside
(PYTHONMALLOC). Counts are of one build, one interpreter and one compiler: --compare says where these differ. They are
no times: an atomic addition is one instruction, a cache miss none, and a system call none of the kernel's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
EXITS, WARM = 5000, 100
ALLOCATORS = {"malloc", "calloc", "realloc"}


class Profile(NamedTuple):
    """One dump of callgrind: instructions by function, in itself; and how often each was called."""

    name: str
    instructions: Counter
    calls: Counter


# ---- under valgrind ----


def serve(build: str, exits: int, names: list[str]) -> None:
    """Go each way of each cell: a few exits for the caches, `exits`, and twice as many; with a dump after each."""
    import gc

    from cells import all_cells
    from common import build_control

    control, cells = build_control(build), all_cells()
    gc.disable()

    def count() -> None:
        for name in names:
            cell = cells[name](control)
            for way in ("control", "measured"):
                make, go = getattr(cell, way)
                for times in (0, 1, 2):
                    made = make(exits * times or WARM)
                    control.begin_count()
                    go(made)
                    control.end_count(f"{name}|{way}|{times}".encode())

    thread = threading.Thread(target=count)  # on the main thread a tick for Ctrl-C would come now and then
    thread.start()
    thread.join()


# ---- around it ----


def parse(text: str) -> Profile:
    """A dump as --compress-strings=no --compress-pos=no write it."""
    name, function, instructions, calls = "", "", Counter(), Counter()
    callee, inclusive = "", False
    for line in text.splitlines():
        if line[:1].isdigit():
            if not inclusive:
                instructions[function] += int(line.split()[1]) if len(line.split()) > 1 else 0
            inclusive = False
            continue
        key, _, value = line.partition("=")
        if key == "fn":
            function = plain(value)
        elif key == "cfn":
            callee = plain(value)
        elif key == "calls":  # the next line is what the callee cost, with all that it calls
            calls[callee] += int(value.split()[0])
            inclusive = True
        elif line.startswith("desc: Trigger:"):
            name = line.rpartition(": ")[2]
    return Profile(name, instructions, calls)


def plain(name: str) -> str:
    """A function's name without what Cython, the compiler and recursion put around it: _loop.Vcpu.until_taken."""
    name = re.sub(r"'\d+$", "", name)
    mangled = re.match(r"__pyx_[a-z]+_(?=\d)", name)
    if not mangled:
        return name
    rest, parts = name[mangled.end() :], []
    while number := re.match(r"\d+", rest):
        end = number.end() + int(number.group())
        if rest[end : end + 1] != "_":  # no length of a scope's name: which of the methods it is
            rest = rest[number.end() :]
            break
        parts.append(rest[number.end() : end])
        rest = rest[end + 1 :]
    return ".".join([*parts, rest]).removeprefix("kvmexit.")


def difference(profiles: dict[int, Profile], exits: int) -> tuple[dict[str, float], float]:
    """-> instructions an exit by function, those that have any, and allocations an exit."""
    once, twice = profiles[1], profiles[2]
    more = {name: (n - once.instructions[name]) / exits for name, n in twice.instructions.items()}
    allocations = sum(twice.calls[name] - once.calls[name] for name in ALLOCATORS) / exits
    return {name: n for name, n in sorted(more.items(), key=lambda item: -item[1]) if abs(n) >= 0.1}, allocations


def measure(names: list[str], exits: int = EXITS) -> dict[str, dict]:
    """-> by cell {"instructions", "control", "allocations": an exit; "functions": {name: instructions an exit}}."""
    from common import compile_control

    with tempfile.TemporaryDirectory(prefix="kvmexit-instructions-") as folder:
        compile_control(folder)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--compress-strings=no", "--compress-pos=no",
                   "--dump-line=no", f"--callgrind-out-file={folder}/out", "-q",
                   sys.executable, __file__, "--serve", folder, str(exits), *names]  # fmt: skip
        env = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONMALLOC": "malloc", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        found = [parse(path.read_text()) for path in Path(folder).glob("out*")]
    profiles = {profile.name: profile for profile in found if profile.name.count("|") == 2}
    if done.returncode or len(profiles) != 6 * len(names):
        counts = f"{len(profiles)} of {6 * len(names)} counts"
        raise SystemExit(f"valgrind ended with {done.returncode}, and {counts}:\n{done.stderr[-2000:]}")
    cells = {}
    for name in names:
        mine, its = ({times: profiles[f"{name}|{way}|{times}"] for times in (1, 2)} for way in ("measured", "control"))
        functions, allocations = difference(mine, exits)
        cells[name] = {"instructions": sum(functions.values()), "control": sum(difference(its, exits)[0].values()),
                       "allocations": allocations, "functions": functions}  # fmt: skip
    return cells


def compare(before: dict[str, dict], after: dict[str, dict], effect: float) -> list[dict]:
    """-> a row for each cell that both have: before, after (instructions an exit), ratio, differs, functions."""
    rows = []
    for name in [name for name in after if name in before]:
        a, b = before[name], after[name]
        ratio = b["instructions"] / a["instructions"]
        moved = {function: b["functions"].get(function, 0) - a["functions"].get(function, 0)
                 for function in {**a["functions"], **b["functions"]}}  # fmt: skip
        rows.append({"cell": name, "before": a["instructions"], "after": b["instructions"], "ratio": ratio,
                     "differs": abs(ratio - 1) >= effect,
                     "functions": {function: n for function, n in moved.items() if abs(n) >= 1}})  # fmt: skip
    return rows


def show(cells: dict[str, dict], functions: bool) -> None:
    """The table."""
    print(f"{'instructions an exit':<28}{'kvmexit':>9}{'control':>9}{'above':>9}{'ratio':>8}{'allocations':>13}")
    for name, cell in cells.items():
        n, control = cell["instructions"], cell["control"]
        print(f"{name:<28}{n:>9.1f}{control:>9.1f}{n - control:>9.1f}{n / control:>8.2f}{cell['allocations']:>13.2f}")
        for function, n in cell["functions"].items() if functions else ():
            print(f"    {n:>9.1f}  {function}")


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="WORD", action="append", default=[], help="cells with this in their name")
    parser.add_argument("--exits", type=int, default=EXITS, help=f"{EXITS}")
    parser.add_argument("--functions", action="store_true", help="by function, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="with a result that was written before")
    parser.add_argument("--effect", type=float, default=1, metavar="PERCENT", help="the least that is a difference")
    parser.add_argument("--fail", type=float, default=math.inf, metavar="PERCENT", help="more by this: exit status 1")
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        parser.error("valgrind is missing: apt install valgrind, or dnf install valgrind valgrind-devel")
    from cells import all_cells
    from common import compiler, machine

    names = [name for name in all_cells() if not options.k or any(word in name for word in options.k)]
    if not names:
        parser.error(f"no cell has {' or '.join(options.k)} in its name; there are {', '.join(all_cells())}")
    cells = measure(names, options.exits)
    result = {"machine": machine(), "compiler": compiler(), "exits": options.exits, "cells": cells}
    print(f"{result['machine']}, {result['compiler']}")
    show(result["cells"], options.functions)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return 0 if not options.compare else tell(json.loads(options.compare.read_text()), result, options)


def tell(before: dict, after: dict, options: argparse.Namespace) -> int:
    """The comparison; -> the exit status."""
    print(f"\ncompared with {options.compare}")
    for what in ("machine", "compiler"):
        if before[what] != after[what]:
            print(f"of another {what}: {before[what]}")
    rows = compare(before["cells"], after["cells"], options.effect / 100)
    for row in rows:
        if row["differs"]:
            print(f"{row['cell']:<28}{row['before']:>9.1f}{row['after']:>9.1f}{100 * (row['ratio'] - 1):>+8.1f} %")
            for function, n in sorted(row["functions"].items(), key=lambda item: -abs(item[1])):
                print(f"    {n:>+9.1f}  {function}")
    print(f"{sum(row['differs'] for row in rows)} of {len(rows)} cells differ by {options.effect:g} % or more")
    return int(any(row["ratio"] - 1 > options.fail / 100 for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
