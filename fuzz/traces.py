"""The target `trace`: an input becomes trace files, and all that reads them is held against docs/trace.md.

An input's first byte is how: bit 0 the rest is a file, byte for byte; else files are built from the rest, sound ones
but for the patches that it names: see files(). Python throughout: what is fuzzed is compiled.
"""

import argparse
import contextlib
import functools
import gc
import io
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import kvmexit
from kvmexit import export, native
from kvmexit.cli.trace import add_to
from kvmexit.testing import ScriptedVM

try:
    import numpy
except ImportError:
    numpy = None

PAGE = 4096
HEADER = "<8sII16sIIIIQQdQIIQ24s"
HEAD = "<IHBBQQQIHBB"
FIRST = 1000  # the ticks of a built trace's beginning
EFAULT, EHWPOISON = 14, 133
SENTINEL = 0xFFFFFFFF
OUTCOMES = [*range(6), *range(16, 21)]
NAMES = dict(zip(OUTCOMES, ["native", "python", "caller", "race", "error", "pending", "retried", "kick", "timeout",
                            "pause", "drained"], strict=True))
ERRORS = [0] * 16 + [EFAULT] * 3 + [EHWPOISON] * 2 + [4] * 4 + [11, 12, 22, 5, 61, 74, None]
# The union's words of each reason, and the answers' bytes: part of the format, so written down once more.
USED = [1, 1, 2, 9, 4, 0, 3, 0, 0, 2, 0, 0, 2, 32, 32, 3, 0, 17, 32, 11, 32, 0, 32, 1, 17, 32, 1, 7, 2, 3, 3, 0, 0, 0,
        10, 10, 4, 1, 3, 3, 8, 4, 2, 3]
ANSWERS = {3: [8], 15: [4], 18: [256], 19: [8], 23: [4], 27: [8, 32], 29: [1, 8], 30: [1], 34: [8], 35: [16], 36: [8],
           38: [8], 40: [48], 43: [16]}


def is_exit(error, reason):
    return reason != SENTINEL if error == 0 else error in (EFAULT, EHWPOISON)


def shape(error, reason, union, run_size):
    """-> words of the union's copy, bytes of PIO data, bytes of each answer."""
    if not is_exit(error, reason) or (error and reason != 39):
        return 0, 0, []
    union += bytes(256)
    if reason == 2:
        direction, size, _, count, offset = struct.unpack_from("<BBHIQ", union)
        data = size * count
        if direction > 1 or size not in (1, 2, 4) or not 0 < data <= 32768:
            return 2, 0, []
        if not 2352 <= offset <= min(run_size - data, 65535):
            return 2, 0, []
        return 2, data, [data] * (direction == 0)
    if reason == 6:
        size, is_write = struct.unpack_from("<IB", union, 16)
        return 3, 0, [size] * (not is_write and 0 < size <= 8)
    return USED[reason] if reason < 44 else 32, 0, ANSWERS.get(reason, [])


def padded(data):
    return data + bytes(-len(data) % 8)


class Input:
    """Bytes, and zeros after them."""

    def __init__(self, data):
        self.data, self.at = data, 0
        self.sound = True

    def take(self, size=1):
        """-> a number of so many bytes."""
        data = self.data[self.at : self.at + size]
        self.at += size
        return int.from_bytes(data, "little")

    def __bool__(self):
        return self.at < len(self.data)


def files(data):
    """-> the files by name, and whether they are sound. One, two parts of one recording, or two vCPUs'."""
    how, rest = data[0], Input(data[1:])
    if how & 1:
        return {"t.trace": data[1:]}, False
    names = [("t.trace",), ("t.trace",), ("t.trace", "t.trace.1"), ("t.trace", "u.trace")][how >> 1 & 3]
    run_size = PAGE * [3, 3, 3, 2, 4, 16, 256][rest.take() % 7]
    patches = [(rest.take(), rest.take(2), rest.take()) for _ in range(rest.take() & 3)]
    bodies = [[] for _ in names]
    ticks = FIRST
    while rest:
        op, flags = rest.take(), rest.take()
        ticks, entered = ticks + rest.take(), ticks
        bodies[op >> 7 & len(names) - 1].append(record(rest, op, flags, entered, ticks, run_size))
    made = {}
    for i, (name, body) in enumerate(zip(names, map(b"".join, bodies), strict=True)):
        closed, part, vcpu = how >> 3 & 1, i if name[-1] == "1" else 0, i if name[0] == "u" else 0
        made[name] = bytearray(struct.pack(
            HEADER, b"kvmexit\x1a", 1, 120, b"0123456789abcdef", part, vcpu, run_size, 0, FIRST, 10**18, 0.4,
            (120 + len(body)) * closed, closed, 0, 0, b"0.1.0") + body)
    for which, at, what in patches:
        patched = made[names[which % len(names)]]
        if not patched:
            continue  # cut away
        patched[at % len(patched)] ^= what
        if which & 128:
            del patched[at % len(patched) :]
    return made, rest.sound and not any(what or which & 128 for which, _, what in patches)


def record(rest, op, flags, entered, left, run_size):
    """-> a record as the rest of the input says."""
    error = ERRORS[op & 31]
    if error is None:
        error = rest.take(2)
    reason = rest.take()
    if reason == 255:
        reason = rest.take(4)
    size = rest.take() & 127
    union = rest.take(size).to_bytes(size, "little")
    words, data, spans = shape(error, reason, union, run_size)
    settled = flags >> 4 & 1
    fill = bytes([rest.take()])
    outside = padded(fill * data) if data else b"".join(padded(fill * span) for span in spans)
    registers = bytes([rest.take()]) * 144 if flags & 32 else b""
    waited = op & 96 == 32
    wait = struct.pack("<2Q", entered + rest.take(), left + rest.take()) if waited else b""
    body = (union + bytes(256))[: words * 8] + outside + registers + wait
    if op & 64:  # a word too many, or too few
        rest.sound = False
        body = body[:-8] if op & 32 else body + bytes(8)
    return struct.pack(HEAD, (40 + len(body)) // 8 | words << 16, 0, OUTCOMES[(flags & 15) % 11], settled, entered,
                       left, 0x1000 if flags & 64 else 2**64 - 1, reason, error, flags & 63,
                       bool(flags & 128) | flags >> 4 & 2 | waited << 3) + body


# ---- what is checked ----


def ensure(condition, what):
    if not condition:
        raise AssertionError(what)


def check_records(trace, data):
    """One file's records against its bytes: each where it should be, and all that is said of it taken from there."""
    header = struct.unpack_from(HEADER, data)
    at, run_size, in_use = header[2], header[6], header[11]
    part, = trace.parts
    ensure(part.records == len(trace), "the part has another number of records")
    end = in_use if 0 < in_use <= len(data) else len(data)
    for found in trace:
        ensure(at + 40 <= end, "a record outside the file")
        sizes, _, outcome, settled, entered, left, rip, reason, error, state, how = struct.unpack_from(HEAD, data, at)
        whole = data[at : at + (sizes & 0xFFFF) * 8]
        ensure(at + (sizes & 0xFFFF) * 8 <= end, "a record's end outside the file")
        words, pio, spans = shape(error, reason, whole[40 : 40 + (sizes >> 16 & 255) * 8], run_size)
        answer = sum(spans) if pio else sum(len(padded(bytes(span))) for span in spans)
        begin = 40 + words * 8
        ensure(found.answer == (whole[begin : begin + answer] if settled else b""), "another answer")
        tail = whole[begin + (len(padded(bytes(pio))) if pio else answer) :]
        ensure(found.registers == (tail[:144] if how & 2 else None), "other registers")
        ensure((found.errno, found.settled, found.outcome) == (error, settled == 1, NAMES[outcome]), "another record")
        ensure(found.rip == (None if rip == 2**64 - 1 else rip), "another rip")
        ensure((found.cr8, found.if_flag) == (state & 15, state >> 4 & 1), "another head")
        ensure((found.immediate, found.begun) == (how & 1, how >> 2 & 1), "another how")
        begun = header[8]
        ensure((found.waited_ns is not None) == how >> 3, "another wait")
        waits = zip(found.waited_ns or (), struct.unpack("<2Q", tail[-16:]) if how & 8 else (), strict=True)
        for ns, ticks in ((found.entered_ns, entered), (found.left_ns, left), *waits):
            since = ((ticks - begun + 2**63) % 2**64 - 2**63) * header[10]
            ensure(abs(ns - max(min(since, 2**63), -(2**63))) <= 1024 + abs(since) / 2**50, "another time")
        if is_exit(error, reason):
            ensure(isinstance(found.exit, kvmexit.Exit), "an exit that is none")
            if isinstance(found.exit, kvmexit.Mmio):
                ensure(found.exit.gpa == struct.unpack_from("<Q", whole, 40)[0], "another address")
        at += len(whole)
    ensure(at + part.torn <= len(data), "more is torn than there is")
    ensure(part.ended is None or at == in_use, "closed, and not read to its end")


def look(trace):
    """Everything that a Trace is asked for. -> that, as text."""
    said = [repr(trace), repr(trace.parts), trace.vcpus, trace.closed, trace.torn, trace.lost, trace.start_ns,
            trace.ns_per_tick]
    for found in trace:
        said.append(repr(found))
        for name in names(type(found.exit)):
            try:
                value = getattr(found.exit, name)
                if name.startswith("decode"):
                    value()
            except (AttributeError, ValueError):
                pass
    return said


@functools.cache
def names(cls):
    """-> what its objects have."""
    return [name for name in dir(cls) if name[0] != "_" and cls is not type(None)]


def check_exports(trace):
    lines, events = io.StringIO(), io.StringIO()
    ensure(export.write_csv(trace, lines) == len(trace) == lines.getvalue().count("\n") - 1, "another number of rows")
    count = export.write_perfetto(trace, events)
    shown = json.loads(events.getvalue())["traceEvents"]
    ensure(count == len(shown) and all(event.get("dur", 0) >= 0 for event in shown), "spans that end before they begin")
    if numpy is not None:
        rows = trace.numpy()
        ensure(len(rows) == len(trace), "another number of rows")
        ensure(rows["errno"].tolist() == [found.errno for found in trace], "another errno")
        ensure(rows["left_ns"].tolist() == [found.left_ns for found in trace], "another time")
        rips = [None if rip == 2**64 - 1 else rip for rip in rows["rip"].tolist()]
        ensure(rips == [found.rip for found in trace], "another rip")


def command(*arguments):
    """-> `kvmexit trace`, parsed: that takes longer than all the rest."""
    parser = argparse.ArgumentParser()
    add_to(parser.add_subparsers())
    return parser.parse_args(["trace", "there", *arguments])


FILTERS = ["--exit", "Io", "--range", "0x3f8:8", "--time", "0:1"]
COMMANDS = [command(), command("--json"), command("--csv"), command(*FILTERS)]


def check_command(path, loads, count, how):
    """`kvmexit trace` shows what loads, and raises an Error, which main() prints, for the rest."""
    out, err = io.StringIO(), io.StringIO()
    chosen = COMMANDS[how >> 6]
    chosen.path = path
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            chosen.run(chosen)
    except kvmexit.TraceError:
        ensure(not loads, "what loads is not shown")
        return
    ensure(loads, "shown, and not to be loaded")
    if how >> 6 < 3:
        ensure(out.getvalue().count("\n") == count + (how >> 6 == 2), "another number of lines")


def machine(kind):
    """-> a VM to replay in, with handlers: none, native, Python's, both. It takes milliseconds: inputs share it."""
    if kind in machines:
        return machines[kind]
    vm = machines[kind] = ScriptedVM()
    vm.memory.add(0, 64 * PAGE, guest_memfd=True, discard=False)
    if kind & 1:
        vm.on(kvmexit.Hlt, native.Ignore())
        vm.on_pio(0, 0x400, native.Ignore(0x60))
        vm.on_mmio(0, 1 << 63, native.Registers(bytearray(64)))
        vm.on_memory_fault(handler=native.Convert(vm))
        vm.on_hypercall(12, native.Convert(vm))
        vm.coalesce_mmio(0xD0002000, 0x100, native.Ring(16, vcpus=1, full="drop"))
    if kind & 2:
        vm.on(kvmexit.Exit, lambda vcpu, exit: repr(exit) and kvmexit.PASS)
        vm.on(kvmexit.Io, lambda vcpu, io: None if io.is_write else bytes(io.size * io.count))
        vm.on(kvmexit.Mmio, lambda vcpu, mmio: None if mmio.is_write else 0)
    return vm


machines = {}


def renew():
    """Other machines from now on."""
    for vm in machines.values():
        vm.close()
    machines.clear()
    gc.collect()


def check_replay(trace, vcpu, sound, how):
    kind, strict = how >> 4 & 3, how >> 3 & 1
    one = kvmexit.replay(trace, vm=machine(kind), vcpu=vcpu, strict=strict)
    try:
        played = one.play()
    except kvmexit.TraceError as error:
        ensure(strict and error.divergence is not None, "a replay that is not strict stopped")
        str(error.divergence)
    else:
        ensure(played.records == one.position, "another number of records")
        if sound and kind == 0 and played.divergence is not None:
            ensure(played.divergence.replayed is None, "what was answered as recorded diverges")
    ensure(one.position <= len(one.trace), "more is replayed than there is")
    repr(one), str(one.divergence), one.vcpu.stats, repr(one.vcpu.last_exits)
    again = kvmexit.replay(one.trace, vm=machine(kind))
    for step in range(8 * len(one.trace) + 16):  # three in eight are a run that may go on
        before = again.position
        try:
            exit = again.complete() if step & how & 4 else again.run(timeout=None if step % 4 else 0)
        except kvmexit.TraceError:
            return  # its end
        except kvmexit.Error:
            ensure(again.position > before, "failed, and not by the trace")
            continue
        repr(exit)
        for name in ("data", "ret", "result", "error", "status"):
            with contextlib.suppress(AttributeError, TypeError, ValueError, OverflowError, kvmexit.Error):
                setattr(exit, name, step)
    ensure(again.position < len(one.trace) or again.pending is not None, "the end was not said")


def attempt(path):
    """-> the Trace, or None where it is refused."""
    try:
        return kvmexit.load(path)
    except kvmexit.TraceError as error:
        ensure("offset 0x" in str(error), f"not said where: {error}")
        return None


def check_cut(data):
    """A file that lacks its end."""
    (folder / "cut").write_bytes(data)
    part = attempt(folder / "cut")
    if part is not None:
        check_records(part, data)


folder = Path(tempfile.mkdtemp(prefix="kvmexit-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def one(data):
    """Check one input."""
    if not data:
        return
    how = data[0]
    made, sound = files(data)
    for name in os.listdir(folder):
        (folder / name).unlink()
    for name, content in made.items():
        (folder / name).write_bytes(content)
    parts = {name: attempt(folder / name) for name in made if name != "t.trace" or "t.trace.1" not in made}
    path = folder if "u.trace" in made else folder / "t.trace"
    trace = attempt(path)
    for name, part in parts.items():
        if part is not None:
            check_records(part, made[name])
    ensure(not sound or trace is not None, "a sound trace is refused")
    cut = bytearray(made["t.trace"][: len(made["t.trace"]) * data[-1] // 256])
    check_cut(cut)
    cut[72:80] = struct.pack("<Q", len(cut) & ~7)  # which says that this is where it ends
    check_cut(cut)
    if trace is not None:
        ensure(len(trace) <= sum(map(len, made.values())) // 40, "more records than there is room for")
        said = look(trace)
        ensure(said == look(kvmexit.load(path)), "read again, it is another")
        check_exports(trace)
        for vcpu in trace.vcpus:
            check_replay(trace, vcpu, sound, how)
    check_command(path, trace is not None, len(trace or ()), how)


def remove():
    """At the process's end."""
    renew()
    shutil.rmtree(folder, ignore_errors=True)
