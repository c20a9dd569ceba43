"""Two revisions of this repository, built and measured in turns on one machine: does dispatch take longer.

    python benchmarks/ab.py                        HEAD against the commit before it
    python benchmarks/ab.py v0.1 --rounds 40       HEAD against v0.1
    python benchmarks/ab.py HEAD HEAD --plant 20   a defect of 20 ns an exit planted in the second: it has to be found

A round is a process of each revision. The two take turns, pass by pass, a fraction of a millisecond each, so that the
machine's clock hits both alike; the round's ratio is the median of the passes'. Another round has other addresses, and
these alone are worth some percent. A difference is one that the rounds show (Wilcoxon's signed ranks, corrected for the
number of cells, Holm) and that is at least --effect; the exit status is 1 where one of more than --fail makes B slower.
The cells and what is measured are this file's and cells.py's for both.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import NormalDist, median

HERE = Path(__file__).resolve().parent
CELLS = [*(f"native {kind}" for kind in ("pio_out", "mmio_write", "pio_in", "mmio_read", "hypercall", "memory_fault")),
         *(f"python {kind}" for kind in ("pio_out", "pio_in", "memory_fault")), "timing pio_out"]  # fmt: skip
EXITS, PASSES = 5000, 30
SURE = 0.01
PLANTED = "static inline void kvmexit_remember(struct kvmexit_stats *s, const struct kvmexit_vcpu *v)\n{\n"


# ---- a process of one revision ----


def serve(folder: str) -> None:
    """Time a pass of each cell that is asked for, a line each: ns an exit, or "none" where this revision cannot."""
    sys.path.insert(0, str(HERE))
    from cells import with_handler

    import kvmexit
    from kvmexit import native

    if not Path(kvmexit.__file__).is_relative_to(folder):
        raise RuntimeError(f"{kvmexit.__file__} is not of {folder}")
    made = {}
    for cell in map(str.strip, sys.stdin):
        way, _, kind = cell.partition(" ")
        try:
            if cell not in made:
                handler = None if way == "python" else native.Ignore()
                made[cell] = with_handler(kind, handler, timing=way == "timing")
            make, run = made[cell]
            vcpu = make(EXITS)
            begun = time.perf_counter_ns()
            run(vcpu)
            print((time.perf_counter_ns() - begun) / EXITS, flush=True)
        except (AttributeError, TypeError):
            print("none", flush=True)


# ---- all of them ----


def build(revision: str, folder: Path, plant: int = 0) -> Path:
    """Build a revision, or a folder's present state, in place; -> where `kvmexit` can be imported from."""
    if Path(revision).is_dir():
        parts = "setup.py", "pyproject.toml", "README.md", "LICENSE", "src"
        command = ["tar", "c", "-C", revision, "--exclude=*.so", *parts]
    else:
        command = ["git", "-C", str(HERE.parent), "archive", revision]
    folder.mkdir()
    archive = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
    if plant:
        header = folder / "src/kvmexit/_stats.h"
        loop = f"    for (int i = 0; i < {plant} * {per_ns()}; i++)\n        __asm__ volatile(\"\");\n"
        header.write_text(header.read_text().replace(PLANTED, PLANTED + loop))
        if loop not in header.read_text():
            raise RuntimeError("kvmexit_remember() has changed: tell PLANTED")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "-j2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{revision} does not build:\n{done.stderr[-2000:]}")
    return folder / "src"


def per_ns() -> int:
    """Rounds of an empty loop in a nanosecond, about."""
    with open("/proc/cpuinfo") as cpuinfo:
        return max(round(float(next(line.split(":")[1] for line in cpuinfo if line.startswith("cpu MHz"))) / 1000), 1)


@contextmanager
def server(source: Path) -> Iterator[Callable[[str], float | None]]:
    """serve(), in a process of its own: a function that has it time a cell."""
    command, env = [sys.executable, __file__, "--serve", str(source)], {**os.environ, "PYTHONPATH": str(source)}
    with subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def ask(cell: str) -> float | None:
            print(cell, file=process.stdin, flush=True)
            said = process.stdout.readline().strip()
            return None if said == "none" else float(said)

        yield ask
        process.stdin.close()


def measure(sources: tuple[Path, Path]) -> dict[str, tuple[float, float, float]]:
    """A round: -> by cell the median ratio B/A of the passes, and the median ns of A and of B."""
    found = {}
    with server(sources[0]) as a, server(sources[1]) as b:
        for cell in CELLS:
            if None in (a(cell), b(cell)):  # once for the caches, too
                continue
            passes = []
            for i in range(PASSES):
                first, second = (a, b) if i % 2 else (b, a)
                pair = first(cell), second(cell)
                passes.append(pair if i % 2 else pair[::-1])
            found[cell] = (median(b / a for a, b in passes), median(a for a, _ in passes), median(b for _, b in passes))
    return found


def signed_rank(differences: list[float]) -> float:
    """How likely they lie so far to one side of 0 by chance (Wilcoxon, two-sided, normal approximation)."""
    ordered = sorted((difference for difference in differences if difference), key=abs)
    n = len(ordered)
    if n == 0:
        return 1.0
    above = sum(rank for rank, difference in enumerate(ordered, 1) if difference > 0)
    z = (abs(above - n * (n + 1) / 4) - 0.5) / math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    return min(2 * (1 - NormalDist().cdf(z)), 1.0)


def judge(rounds: list[dict[str, tuple[float, float, float]]], effect: float) -> list[dict]:
    """-> a row for each cell that both have: a, b (ns, medians), ratio with its 95 % interval, p (Holm), verdict."""
    from kvmexit.bench.figures import holm, median_interval

    rows = []
    for cell in rounds[0]:
        ratios, a, b = zip(*(found[cell] for found in rounds), strict=True)
        ratio, low, high = median_interval(ratios)
        rows.append({"cell": cell, "a": median(a), "b": median(b), "ratio": ratio, "low": low, "high": high,
                     "p": signed_rank([math.log(ratio) for ratio in ratios])})  # fmt: skip
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p"] = p
        shown = p < SURE and abs(row["ratio"] - 1) >= effect
        row["verdict"] = ("slower" if row["ratio"] > 1 else "faster") if shown else "no difference shown"
    return rows


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", nargs="?", default="HEAD~1", help="a revision, or a folder")
    parser.add_argument("b", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=24, help="12 at least")
    parser.add_argument("--effect", type=float, default=10, metavar="PERCENT", help="the least that is a difference")
    parser.add_argument("--fail", type=float, default=math.inf, metavar="PERCENT", help="slower by more: exit status 1")
    parser.add_argument("--plant", type=int, default=0, metavar="NS", help="a loop in B, so long an exit")
    options = parser.parse_args()
    if options.rounds < 12:
        parser.error("fewer than 12 rounds cannot show a difference")
    from common import machine

    with tempfile.TemporaryDirectory(prefix="kvmexit-ab-") as folder:
        sources = build(options.a, Path(folder) / "a"), build(options.b, Path(folder) / "b", options.plant)
        rounds = [measure(sources) for _ in range(options.rounds)]
    rows = judge(rounds, options.effect / 100)
    print(machine())
    planted = f" with {options.plant} ns planted" if options.plant else ""
    print(f"A {options.a}, B {options.b}{planted}: {options.rounds} rounds")
    print(f"{'ns an exit':<24}{'A':>8}{'B':>8}{'B/A':>8}{'95 %':>16}{'p':>10}")
    for row in rows:
        print(f"{row['cell']:<24}{row['a']:>8.1f}{row['b']:>8.1f}{row['ratio']:>8.3f}{row['low']:>9.3f}-{row['high']:.3f}"
              f"{row['p']:>11.2g}  {row['verdict']}")
    return int(any(row["verdict"] == "slower" and row["ratio"] - 1 > options.fail / 100 for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        sys.exit(main())
