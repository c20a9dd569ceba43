"""Two results compared: what differs, how surely, and by how much.

The C loop is compared as it is: it shows whether the machine was the same. All others are compared by their ratio to
the C loop's turns of the same rounds, so that a machine that is slower as a whole is no difference. Neighbouring turns
are not independent: they are put together into at most 40 blocks, whose medians are tested (Mann-Whitney, two-sided),
and all tests are corrected for how many they are (Holm). The size is the difference of the medians with a 95 %
interval, and Cliff's delta.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from kvmexit.bench.cells import WAYS
from kvmexit.bench.figures import holm, mann_whitney, relative_difference

__all__ = ["as_text", "compare"]

BLOCKS, FEWEST = 40, 6
SURE = 0.05
FIGURES = {"p50": 1, "p99": 2}  # of a turn: its place in "turns"


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """-> a row for each cell, way and figure that both have.

    "cell", "way", "figure"; "a", "b": ns, or ratios to the C loop; "difference": [b/a - 1, low, high]; "delta", "p"
    (corrected), "verdict".
    """
    found: list[dict[str, Any]] = []
    others = {cell["name"]: cell for cell in b["cells"]}
    for cell in a["cells"]:
        other = others.get(cell["name"], {"ways": {}})
        for way in cell["ways"]:
            for figure, place in FIGURES.items() if way in other["ways"] else ():
                left, right = blocks(series(cell, way, place)), blocks(series(other, way, place))
                row = {"cell": cell["name"], "way": way, "figure": figure, "a": None, "b": None, "difference": None,
                       "delta": None, "p": None, "verdict": "too few turns"}  # fmt: skip
                if min(len(left), len(right)) >= FEWEST:
                    row["a"], row["b"] = median(left), median(right)
                    row["difference"] = list(relative_difference(left, right))
                    row["p"], row["delta"] = mann_whitney(left, right)
                found.append(row)
    tested = [row for row in found if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p"] = p
        row["verdict"] = "no difference shown" if p >= SURE else "slower" if row["delta"] > 0 else "faster"
    return found


def series(cell: dict[str, Any], way: str, place: int) -> list[float]:
    """A figure of each turn; but for the C loop's own, as a ratio to the C loop's turn of the same round."""
    own = cell["ways"][way]["turns"]
    if way == "floor" or "floor" not in cell["ways"]:
        return [turn[place] for turn in own]
    floor = {turn[0]: turn[place] for turn in cell["ways"]["floor"]["turns"]}
    return [turn[place] / floor[turn[0]] for turn in own if floor.get(turn[0])]


def blocks(values: list[float]) -> list[float]:
    """Medians of neighbours, 40 at most."""
    count = min(BLOCKS, len(values))
    return [median(values[i * len(values) // count : (i + 1) * len(values) // count]) for i in range(count)]


def as_text(a: dict[str, Any], b: dict[str, Any]) -> str:
    """All rows as a table, and what differs between the machines."""
    rows = compare(a, b)
    lines = [f"{name}: {a['machine'][name]} -> {b['machine'].get(name)}" for name in a["machine"]
             if name not in ("load_average", "clock_ns") and a["machine"][name] != b["machine"].get(name)]  # fmt: skip
    lines = ["not the same machine or software:", *(f"    {line}" for line in lines), ""] if lines else []
    if not rows:
        return "\n".join([*lines, "no cell is in both"])
    table = [("cell", "", "", "A", "B", "B to A", "Cliff's d", "p (Holm)", "")]
    for row in rows:
        if row["p"] is None:
            table.append((row["cell"], WAYS[row["way"]], row["figure"], "", "", "", "", "", row["verdict"]))
            continue
        a_, b_ = (f"{row[side] / 1000:.2f} us" if row["way"] == "floor" else f"{row[side]:.3f} C" for side in "ab")
        middle, low, high = (f"{100 * share:+.1f}" for share in row["difference"])
        table.append((row["cell"], WAYS[row["way"]], row["figure"], a_, b_, f"{middle} % ({low} to {high})",
                      f"{row['delta']:+.2f}", f"{row['p']:.2g}", row["verdict"]))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["  ".join(f"{text:{'>' if 2 < i < 8 else '<'}{width}}"
                        for i, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in table]
    different = sum(row["verdict"] in ("slower", "faster") for row in rows)
    lines += ["", f"{different} of {len(rows)} differ" if different else "no difference shown",
              "The C loop's times are the machine's; the others are ratios to it, so that they can be compared."]
    return "\n".join(lines)
