"""What `vcpu.stats`, `vm.stats` and `vcpu.last_exits` give: values, counted by _stats.h and copied by _stats.pyx."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from kvmexit._exits import CLASSES, Exit, ExitReason

__all__ = ["OUTCOMES", "PENDING", "PHASES", "Histogram", "LastExit", "Stats"]

OUTCOMES = ("native", "python", "caller", "race", "error")
"""What becomes of an exit: a native handler took it, a Python handler, the caller of run(); a memory fault that a
conversion meanwhile explains was retried; or an exception came of it."""

PENDING = "pending"
"""The outcome of an exit that nothing has become of yet."""

PHASES = ("kvm", "native", "gil", "python")
"""Where the time inside run() goes."""

# The layout of a snapshot, as in _stats.h: for each kind of exit how many there were in all, and with each outcome but
# the first; then for each phase a sum and its buckets.
_SUB = 16  # buckets an octave
_BUCKETS = 39 * _SUB
_COUNTS = len(CLASSES) * len(OUTCOMES)
_WORDS = _COUNTS + len(PHASES) * (1 + _BUCKETS)


def _edge(bucket: int) -> int:
    """The first tick of a bucket."""
    shift = max(bucket // _SUB - 1, 0)
    return (bucket - _SUB * shift) << shift


_EDGES = tuple(_edge(bucket) for bucket in range(_BUCKETS + 1))


class LastExit(NamedTuple):
    """An exit as the flight recorder keeps it.

    reason: the ExitReason; the plain number where kvmexit does not know it; None for a fault that KVM does not explain.
    rip: where the guest was, as KVM left it in the shared page; None where it does not (`vcpu.sync` without 1), and of
    guests whose registers are hidden.
    address: the port, guest-physical address, hypercall number or MSR; None of exits that have none.
    size: bytes, of a string instruction all of them; None likewise. is_write: None where the exit does not say.
    private: of a memory fault, whether the guest wanted the page private; else None.
    errno: of KVM_RUN. outcome: one of OUTCOMES, or PENDING: what became of it first.
    """

    reason: ExitReason | int | None
    rip: int | None
    address: int | None
    size: int | None
    is_write: bool | None
    private: bool | None
    errno: int
    outcome: str


def as_text(exits: Iterable[LastExit]) -> str:
    """One a line, under a heading."""
    rows: list[tuple[str, ...]] = [("reason", "rip", "address", "size", "", "errno", "outcome")]
    for e in exits:
        reason = "no reason" if e.reason is None else getattr(e.reason, "name", str(e.reason))
        how = {None: "", False: "read", True: "write"}[e.is_write]
        how += {None: "", False: "shared", True: "private"}[e.private]
        where = ["" if number is None else f"{number:#x}" for number in (e.rip, e.address, e.size)]
        rows.append((reason, *where, how, str(e.errno or ""), e.outcome))
    return _columns(rows, "<>>><><")


def _columns(rows: list[tuple[str, ...]], sides: str) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    )


class Histogram:
    """How long something took, in ns: log-linear, 16 buckets an octave, so that any figure is within 6 % of the truth.

    Only `count` and `mean` are exact. A value; see Stats for what it is of.
    """

    __slots__ = ("_ns_per_tick", "_sum", "count", "counts")

    count: int
    """How many samples."""

    counts: memoryview[int]
    """Samples in each of the 624 buckets: read-only, unsigned 64-bit (format "Q"), as NumPy takes it."""

    def __init__(self, words: memoryview[int], ns_per_tick: float) -> None:
        self._sum: int = words[0]
        self.counts = words[1:]
        self.count = sum(self.counts)
        self._ns_per_tick = ns_per_tick

    @property
    def edges(self) -> memoryview[float]:
        """Where the buckets begin, in ns, and at last where the last one ends: 625 doubles (format "d")."""
        edges: memoryview[Any] = memoryview(array("d", [edge * self._ns_per_tick for edge in _EDGES]))
        return edges.toreadonly()

    @property
    def total(self) -> float:
        """All samples together, in ns."""
        return self._sum * self._ns_per_tick

    @property
    def mean(self) -> float:
        """In ns; NaN where there is no sample."""
        return self.total / self.count if self.count else math.nan

    @property
    def max(self) -> float:
        """The end of the highest bucket in use, in ns; NaN where there is no sample."""
        used = [bucket for bucket, count in enumerate(self.counts) if count]
        return (_EDGES[used[-1] + 1] - 1) * self._ns_per_tick if used else math.nan

    def percentile(self, p: float) -> float:
        """The value, in ns, that `p` percent of the samples do not exceed (nearest rank, the middle of its bucket).

        NaN where there is no sample; ValueError for a `p` outside 0..100.
        """
        if not 0 <= p <= 100:
            raise ValueError(f"percentile {p!r} is not in 0..100")
        rank = max(math.ceil(self.count * p / 100), 1)
        for bucket, count in enumerate(self.counts):
            rank -= count
            if rank <= 0:
                return (_EDGES[bucket] + _EDGES[bucket + 1] - 1) / 2 * self._ns_per_tick
        return math.nan

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value}" for name, value in zip(_FIGURES[1:], _figures(self)[1:], strict=True))
        return f"<Histogram of {self.count}{': ' + figures if self.count else ''}>"


_FIGURES = ("samples", "mean", "p50", "p99", "p99.9", "max")


def _figures(h: Histogram) -> tuple[str, ...]:
    times = (h.mean, h.percentile(50), h.percentile(99), h.percentile(99.9), h.max)
    return str(h.count), *(_duration(ns) for ns in times)


def _duration(ns: float) -> str:
    """Three digits, and a unit."""
    if math.isnan(ns):
        return ""
    for unit in ("ns", "us", "ms"):
        if ns < 999.5:
            return f"{ns:.3g} {unit}"
        ns /= 1000
    return f"{ns:.3g} s"


class Stats:
    """What a vCPU, or several, did: a value. From `vcpu.stats` and `vm.stats`; `Stats()` is of nothing.

    Exits are always counted. Times are measured while `vcpu.timing` is on:

    kvm: one sample for each entry into KVM, also those that a kick or a signal ended.
    native: one for each time that native code alone re-entered: exits that native handlers took, races, retries.
    gil: one for each time that Python was needed: waiting to have the GIL again.
    python: the rest of that way, from KVM's return to the next entry or run()'s: Python handlers, and native ones
    before and after them.

    So the four totals together are the time inside run(), but for its first moments, and pauses.

    `a + b` are both together, and `after - before` is what happened between two snapshots of the same.
    """

    __slots__ = ("_ns_per_tick", "_words")

    def __init__(self, words: array[int] | None = None, ns_per_tick: float = 1.0) -> None:
        self._words = array("Q", bytes(8 * _WORDS)) if words is None else words
        self._ns_per_tick = ns_per_tick

    @property
    def table(self) -> memoryview[int]:
        """How many exits. Row i is exit reason i, rows 44 and 45 UnexplainedFault and UnknownExit; columns as OUTCOMES.

        Read-only, 46 * 5, unsigned 64-bit (format "Q"), as NumPy takes it.
        """
        words = memoryview(array("Q", (count for _, row in self._by_class() for count in row)))
        return words.toreadonly().cast("B").cast("Q", (len(CLASSES), len(OUTCOMES)))

    @property
    def counts(self) -> dict[tuple[type[Exit], str], int]:
        """(class of exit, one of OUTCOMES) -> how many; without those of which there were none."""
        return {
            (cls, outcome): count
            for cls, row in self._by_class()
            for outcome, count in zip(OUTCOMES, row, strict=True)
            if count
        }

    @property
    def exits(self) -> int:
        """How many exits there were. One that nothing has become of yet is not counted."""
        return sum(self.counts.values())

    @property
    def kvm(self) -> Histogram:
        """Time in KVM_RUN: the guest's own, and the kernel's for it."""
        return self._time(0)

    @property
    def native(self) -> Histogram:
        """Time in native code between an exit and the next entry."""
        return self._time(1)

    @property
    def gil(self) -> Histogram:
        """Time spent waiting for the GIL."""
        return self._time(2)

    @property
    def python(self) -> Histogram:
        """Time from an exit to the next entry where Python was needed, without that spent waiting for the GIL."""
        return self._time(3)

    def merge(self, other: Stats) -> Stats:
        """Both together: a new Stats, also by `+`. ValueError where their times are by different clocks."""
        ns_per_tick = self._shared_clock(other)
        return Stats(array("Q", (a + b for a, b in zip(self._words, other._words, strict=True))), ns_per_tick)

    def __add__(self, other: Stats) -> Stats:
        return self.merge(other) if isinstance(other, Stats) else NotImplemented

    def __sub__(self, before: Stats) -> Stats:
        if not isinstance(before, Stats):
            return NotImplemented
        ns_per_tick = self._shared_clock(before)
        pairs = list(zip(self._words, before._words, strict=True))
        if any(a + 1 < b for a, b in pairs):
            raise ValueError("the right one is no earlier snapshot of the left one")
        # An exit can have been a native handler's in the earlier one, and nobody's yet in the later: one less.
        return Stats(array("Q", (a - b if a > b else 0 for a, b in pairs)), ns_per_tick)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stats):
            return NotImplemented
        return self._words == other._words and (self._ns_per_tick == other._ns_per_tick or not self._timed)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Stats of {self.exits} exits>"

    def __str__(self) -> str:
        counts, times = self._rows()
        return _columns(counts, "<" + ">" * len(OUTCOMES)) + "\n\n" + _columns(times, "<" + ">" * len(_FIGURES))

    def __rich__(self) -> Any:
        """The same for rich.print()."""
        from rich.console import Group
        from rich.table import Table

        tables = []
        for heading, *rows in self._rows():
            made = Table(*heading[:1])
            for name in heading[1:]:
                made.add_column(name, justify="right")
            for row in rows:
                made.add_row(*row)
            tables.append(made)
        return Group(*tables)

    def _rows(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Two tables, headings first: counts, and times."""
        counts: list[tuple[str, ...]] = [("exits", *OUTCOMES)]
        for cls, row in self._by_class():
            if any(row):
                counts.append((cls.__name__, *(str(count or "") for count in row)))
        times: list[tuple[str, ...]] = [("time", *_FIGURES)]
        times += [(name, *_figures(self._time(i))) for i, name in enumerate(PHASES)]
        return counts, times

    def _by_class(self) -> Iterator[tuple[type[Exit], list[int]]]:
        """Each class of exits with its row."""
        for i, cls in enumerate(CLASSES):
            everything, *others = self._words[i * len(OUTCOMES) : (i + 1) * len(OUTCOMES)]
            # What is left is native handlers'. A look at a running vCPU can see an outcome before the exit.
            yield cls, [max(everything - sum(others), 0), *others]

    def _view(self, begin: int, end: int) -> memoryview[int]:
        return memoryview(self._words).toreadonly()[begin:end]

    def _time(self, phase: int) -> Histogram:
        begin = _COUNTS + phase * (1 + _BUCKETS)
        return Histogram(self._view(begin, begin + 1 + _BUCKETS), self._ns_per_tick)

    @property
    def _timed(self) -> bool:
        return any(self._view(_COUNTS, _WORDS))

    def _shared_clock(self, other: Stats) -> float:
        if self._ns_per_tick == other._ns_per_tick or not other._timed:
            return self._ns_per_tick
        if not self._timed:
            return other._ns_per_tick
        raise ValueError(
            f"times by two clocks: {self._ns_per_tick} and {other._ns_per_tick} ns a tick; they are of two processes")
