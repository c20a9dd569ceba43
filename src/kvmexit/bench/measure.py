"""Measuring, and what is made of the samples.

The ways of a cell take turns of a few milliseconds, in another order each round, so that whatever else the machine does
hits all alike.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from datetime import UTC, datetime
from statistics import median
from typing import Any

from kvmexit._bench import Gate
from kvmexit._version import __version__
from kvmexit.bench.cells import KINDS, WAYS, Cell, Impossible, Subject, busy, set_up
from kvmexit.bench.figures import histogram, median_interval, percentile, quantile_ratio
from kvmexit.bench.machine import describe

__all__ = ["FORMAT", "measure"]

FORMAT = 1
WARM_UP = 4  # samples that begin each turn: caches, and what the last turn left behind
SHARE = 0.4  # of a cell's time is each way's at most: beside busy threads the others get more turns than Python's
TAIL = 10_000  # samples, from which on there is a p99.9

Tick = Callable[[float, str], None]
Rounds = dict[int, Sequence[int]]  # round -> samples


def measure(cells: list[Cell], seconds: float, device: str, tick: Tick) -> dict[str, Any]:
    """Measure cells, so many seconds each; -> the result, as schema.json has it.

    tick: called with the share that is done, and a text. Ctrl-C ends it early: what was measured by then is the result.
    """
    begun = time.monotonic()
    result: dict[str, Any] = {
        "format": FORMAT, "kvmexit": __version__, "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "interrupted": False, "seconds_a_cell": seconds, "warm_up": WARM_UP, "machine": describe(device), "cells": [],
    }  # fmt: skip
    try:
        for i, cell in enumerate(cells):
            tick(i / len(cells), cell.name)
            made = result_of(cell)
            result["cells"].append(made)

            def tick_cell(done: float, i: int = i, cell: Cell = cell) -> None:
                tick((i + done) / len(cells), cell.name)

            measure_cell(cell, seconds, device, made, tick_cell)
    except KeyboardInterrupt:
        result["interrupted"] = True
        result["cells"] = [made for made in result["cells"] if made["impossible"] or made["ways"]]
    result["seconds"] = round(time.monotonic() - begun, 1)
    return result


def exits_of(cell: Cell) -> int:
    """How many samples a turn has: a few milliseconds."""
    if cell.kind in KINDS:
        return 100 if cell.busy else 200
    return 20 if cell.kind == "kick" else 100


def result_of(cell: Cell) -> dict[str, Any]:
    """A cell's, with nothing in it."""
    return {
        "name": cell.name, "kind": cell.kind, "busy": cell.busy, "vcpus": cell.vcpus, "exits_a_turn": exits_of(cell),
        "impossible": "", "ways": {},
    }  # fmt: skip


def measure_cell(
    cell: Cell, seconds: float, device: str, made: dict[str, Any], tick: Callable[[float], None]
) -> None:
    """Fill a cell's result in."""
    rounds: dict[str, Rounds] = {way: {} for way in WAYS}
    splits: dict[str, dict[str, float] | None] = {}
    with ExitStack() as stack:
        try:
            subjects = {way: set_up(stack, cell, way, device) for way in WAYS}
        except Impossible as impossible:
            made["impossible"] = str(impossible)
            return
        # Off the main thread, which is the one that Ctrl-C comes to.
        pool = stack.enter_context(ThreadPoolExecutor(cell.vcpus, "kvmexit-bench"))
        try:
            with busy(cell.busy):
                take_turns(pool, subjects, cell, seconds, rounds, tick)
                for way, subject in subjects.items():
                    splits[way] = pool.submit(subject.split, exits_of(cell), seconds / 20).result()
        except BaseException:
            for subject in subjects.values():
                subject.cancel()
            raise
        finally:
            made["ways"] = figures(rounds, splits, cell.vcpus)


def take_turns(
    pool: ThreadPoolExecutor, subjects: dict[str, Subject], cell: Cell, seconds: float, rounds: dict[str, Rounds],
    tick: Callable[[float], None],
) -> None:
    """Until the time is up; at least two rounds."""
    spent = dict.fromkeys(subjects, 0.0)
    begun, number = time.monotonic(), 0
    while (now := time.monotonic() - begun) < seconds or number < 2:
        tick(min(now / seconds, 1.0) if seconds else 1.0)
        order = list(subjects)
        random.Random(number).shuffle(order)
        for way in order:
            if number and way != "floor" and spent[way] > SHARE * sum(spent.values()):
                continue
            before = time.monotonic()
            rounds[way][number] = turn(pool, subjects[way], cell.vcpus, exits_of(cell))
            spent[way] += time.monotonic() - before
        number += 1


def turn(pool: ThreadPoolExecutor, subject: Subject, vcpus: int, exits: int) -> array[int]:
    """One way's turn, on all vCPUs at once; -> its samples."""
    gate = Gate(vcpus) if vcpus > 1 else None
    turns: list[Future[array[int]]] = [pool.submit(subject.turn, i, exits + WARM_UP, gate) for i in range(vcpus)]
    wait(turns, return_when="FIRST_EXCEPTION")
    if any(done.done() and done.exception() for done in turns):
        subject.cancel()  # or the others would wait at the gate
    samples: array[int] = array("Q")
    for done in turns:
        samples.extend(done.result()[WARM_UP:])
    return samples


def figures(rounds: dict[str, Rounds], splits: dict[str, dict[str, float] | None], vcpus: int) -> dict[str, Any]:
    """What is said of each way."""
    floor = rounds["floor"]
    return {
        way: of_way(own, None if way == "floor" else floor, splits.get(way), vcpus)
        for way, own in rounds.items()
        if any(own.values())
    }


def of_way(own: Rounds, floor: Rounds | None, split: dict[str, float] | None, vcpus: int) -> dict[str, Any]:
    """Percentiles of single exits in ns; each turn's own; and ratios to the floor's turns of the same rounds."""
    samples = sorted(ns for turn in own.values() for ns in turn)
    turns = {number: sorted(turn) for number, turn in own.items() if turn}
    made: dict[str, Any] = {
        "samples": len(samples), "p50": percentile(samples, 50), "p90": percentile(samples, 90),
        "p99": percentile(samples, 99), "p999": percentile(samples, 99.9) if len(samples) >= TAIL else None,
        "max": samples[-1], "per_second": round(vcpus * 1e9 * len(samples) / max(sum(samples), 1), 1),
        "turns": [[number, median(turn), percentile(turn, 99)] for number, turn in turns.items()],
        "histogram": histogram(samples), "split": split,
        "p50_to_floor": None, "p99_to_floor": None,
    }  # fmt: skip
    if floor is not None:
        pairs = [(own[number], floor[number]) for number in turns if floor.get(number)]
        made["p50_to_floor"] = rounded(median_interval([median(a) / max(median(b), 1) for a, b in pairs]))
        made["p99_to_floor"] = rounded(quantile_ratio(pairs, 99))
    return made


def rounded(interval: tuple[float, ...] | None) -> list[float] | None:
    return None if interval is None else [round(figure, 4) for figure in interval]


