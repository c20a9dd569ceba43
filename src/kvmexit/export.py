"""A recorded trace for other tools: rows as dictionaries, CSV, and the trace event format of Perfetto and Chrome.

Format of trace events: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from kvmexit._exits import CLASSES, ExitReason, Interrupted
from kvmexit._replay import TraceRecord

__all__ = ["COLUMNS", "address_of", "as_row", "classes", "events", "name_of", "write_csv", "write_perfetto"]

COLUMNS = (
    "number", "vcpu", "entered_ns", "left_ns", "outcome", "exit", "address", "size", "is_write", "private", "data",
    "answer", "rip", "errno",
)  # fmt: skip
"""Of a row: `exit` is the exit's class, or of a return that is none the name of its errno; `address` the port,
guest-physical address, hypercall number or MSR; `data` what the guest wrote and `answer` what it got, as hexadecimal
digits; None (in CSV nothing) where an exit has no such thing."""


def name_of(record: TraceRecord) -> str:
    """The exit's class; of a return that is no exit what interrupted it, or its errno's name."""
    if record.exit is not None:
        return type(record.exit).__name__
    return errno.errorcode.get(record.errno, str(record.errno)) if record.errno else "nothing"


def address_of(record: TraceRecord) -> int | None:
    """What routes go by: the port, guest-physical address, hypercall number or MSR."""
    for name in ("port", "gpa", "nr", "index"):
        value = getattr(record.exit, name, None)
        if isinstance(value, int):
            return value
    return None


def as_row(record: TraceRecord) -> dict[str, Any]:
    """The record by COLUMNS."""
    size, is_write, private = (getattr(record.exit, name, None) for name in ("size", "is_write", "private"))
    data = getattr(record.exit, "data", None) if is_write else None
    return {
        "number": record.number, "vcpu": record.vcpu, "entered_ns": record.entered_ns, "left_ns": record.left_ns,
        "outcome": record.outcome, "exit": name_of(record), "address": address_of(record), "size": size,
        "is_write": is_write, "private": private, "data": data.hex() if isinstance(data, bytes) else None,
        "answer": record.answer.hex() or None, "rip": record.rip, "errno": record.errno,
    }  # fmt: skip


def write_csv(records: Iterable[TraceRecord], file: IO[str]) -> int:
    """Write a line a record, beneath COLUMNS; -> how many. Numbers are decimal."""
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    count = 0
    for count, record in enumerate(records, 1):  # noqa: B007 (the last one's)
        writer.writerow(as_row(record))
    return count


def events(
    records: Iterable[TraceRecord], wanted: Callable[[TraceRecord], bool] = lambda record: True
) -> Iterator[dict[str, Any]]:
    """Trace events: a track a vCPU, times in us from the trace's beginning on.

    A span in KVM for each entry, named by what it ended with. From there to the next, one named by what became of it;
    or, where times were measured and it came to Python, three: native, the wait for the GIL, Python.
    `wanted`: of these records alone. `records` has all, since spans end where the next record begins.
    """
    begun: dict[int, TraceRecord] = {}
    for record in records:
        before = begun.get(record.vcpu)
        if before is None:
            track = {"name": f"vCPU {record.vcpu}"}
            yield {"ph": "M", "name": "thread_name", "pid": 1, "tid": record.vcpu, "args": track}
        elif not wanted(before):
            pass
        elif record.waited_ns is None:
            yield _span(before, before.outcome, "userspace", before.left_ns, record.entered_ns)
        else:
            asked, got = record.waited_ns
            yield _span(before, "native", "native", before.left_ns, asked)
            yield _span(before, "GIL wait", "gil", asked, got)
            yield _span(before, before.outcome, "python", got, record.entered_ns)
        if wanted(record):
            yield _span(record, name_of(record), "kvm", record.entered_ns, record.left_ns)
        begun[record.vcpu] = record


def _span(record: TraceRecord, name: str, category: str, begin: int, end: int) -> dict[str, Any]:
    arguments = {key: value for key, value in as_row(record).items() if value is not None and not key.endswith("_ns")}
    return {
        "ph": "X", "name": name, "cat": category, "pid": 1, "tid": record.vcpu, "ts": begin / 1000,
        "dur": max(end - begin, 0) / 1000, "args": arguments,
    }  # fmt: skip


def write_perfetto(
    records: Iterable[TraceRecord], file: IO[str], wanted: Callable[[TraceRecord], bool] = lambda record: True
) -> int:
    """Write JSON that ui.perfetto.dev and chrome://tracing open: see events(). -> how many of them."""
    file.write('{"displayTimeUnit": "ns", "traceEvents": [')
    count = 0
    for count, event in enumerate(events(records, wanted), 1):
        file.write(("\n" if count == 1 else ",\n") + json.dumps(event))
    file.write("\n]}\n")
    return count


def classes() -> dict[str, str]:
    """What an exit may be called, in small letters: its class, or KVM's name of the reason. -> the class's name."""
    names = {reason.name.lower(): CLASSES[reason].__name__ for reason in ExitReason if reason < len(CLASSES)}
    return names | {kind.__name__.lower(): kind.__name__ for kind in (*CLASSES, Interrupted)}
