"""Recording and replaying: what is written survives, what is replayed is the same, what is damaged is said."""

import errno
import random
import struct
from pathlib import Path

import pytest
from processes import python

import kvmexit
from kvmexit import PASS, Hlt, Interrupted, Io, KvmError, TraceError, native
from kvmexit.testing import (
    RecordedAttributes,
    ScriptedVM,
    ScriptStep,
    hlt,
    hypercall,
    memory_fault,
    mmio_read,
    mmio_write,
    pio_in,
    pio_out,
)  # fmt: skip

PAGE = 4096
HEADER = 120
TRACES = Path(__file__).parent / "traces"


def rdmsr(index):
    return ScriptStep(29, struct.pack("<B7xIIQ", 0, 2, index, 0))


def wrmsr(index, data):
    return ScriptStep(30, struct.pack("<B7xIIQ", 0, 2, index, data))


# One of each kind that handlers see, and what run() does not show.
EVERYTHING = [
    pio_out(0x80, b"x"), pio_in(0x3FD), pio_in(0x60, 4), pio_out(0x1F0, b"abcdefgh", 2), pio_in(0x1F0, 2, 40),
    mmio_write(0x1000, b"ab"), mmio_read(0x2000, 4), mmio_read(0x3000, 8), hypercall(12, 1, 2, 3), rdmsr(0x10), wrmsr(0x11, 5),
    ScriptStep(None, errno=errno.EAGAIN), ScriptStep(None, errno=errno.ENOMEM), ScriptStep(None), ScriptStep(None, errno=errno.EINTR),
    memory_fault(0x5000, private=True, rip=7), memory_fault(0x6000, errno=133), ScriptStep(None, errno=errno.EFAULT, rip=9),
    ScriptStep(2, b"\xff" * 16), ScriptStep(77, b"unknown"), ScriptStep(17, struct.pack("<IIQQ", 1, 2, 3, 4)), hlt(),
]  # fmt: skip


def routes(vm):
    """Native, Python and the caller of run() each take some of EVERYTHING."""
    vm.on_pio(0x80, 1, native.Ignore())
    vm.on_pio(0x3F8, 8, native.Ignore(0x60))
    vm.on_pio(0x1F0, 1, lambda vcpu, io: bytes(range(80)) if not io.is_write else None)
    vm.on_mmio(0x1000, PAGE, lambda vcpu, mmio: PASS)
    vm.on_mmio(0x1000, PAGE * 2, native.Ignore(0x1234))
    vm.on_hypercall(12, lambda vcpu, call: call.args[0] + 41)
    vm.on_memory_fault(handler=lambda vcpu, fault: None)
    return vm


def drive(vcpu):
    """Run to the end, answering what comes here; -> how the exits look."""
    seen = []
    while True:
        try:
            exit = vcpu.run()
        except (KvmError, TraceError) as error:
            if isinstance(error, TraceError) or error.errno == errno.ENODATA:
                return seen
            seen.append(error.errno)
            continue
        seen.append(repr(exit))
        if isinstance(exit, Interrupted):
            continue
        if isinstance(exit, kvmexit.UnknownExit) and exit.reason == 2:
            return seen  # it owes for ever
        match exit:
            case Io(is_write=False) | kvmexit.Mmio(is_write=False):
                exit.data = (b"\x5a" * 4096)[: exit.size * getattr(exit, "count", 1)]
            case kvmexit.Rdmsr():
                exit.data = 0x1122
            case kvmexit.Wrmsr():
                exit.error = 1


def answers(trace):
    return [(record.errno, repr(record.exit), record.answer, record.outcome) for record in trace]


def without_the_malformed(steps):
    return [step for step in steps if step.payload != b"\xff" * 16]


# ---- what is recorded ----


def test_each_return_of_kvm_run_is_a_record(scripted, tmp_path):
    """Reason, errno, payload, PIO bytes, the answer, who gave it, and when."""
    vcpu = routes(scripted).create_vcpu(3, EVERYTHING)
    with vcpu.record(tmp_path / "t") as recorder:
        drive(vcpu)
    trace = kvmexit.load(tmp_path / "t")
    # a ScriptStep that is malformed is the last one that comes: it owes an answer
    assert [record.errno for record in trace] == [0] * 11 + [11, 12, 0, 4, 14, 133, 14, 0]
    assert len(trace) == recorder.records == 19
    assert {record.vcpu for record in trace} == {3}
    by = [(type(record.exit).__name__, record.outcome, record.answer) for record in trace]
    assert by == [
        ("Io", "native", b""), ("Io", "native", b"\x60"), ("Io", "caller", b"\x5a" * 4), ("Io", "python", b""),
        ("Io", "python", bytes(range(80))), ("Mmio", "native", b""), ("Mmio", "native", b"\x34\x12" + bytes(6)),
        ("Mmio", "caller", b"\x5a" * 8), ("Hypercall", "python", (42).to_bytes(8, "little")),
        ("Rdmsr", "caller", bytes(8) + (0x1122).to_bytes(8, "little")), ("Wrmsr", "caller", b"\1" + bytes(7)),
        ("NoneType", "retried", b""), ("NoneType", "retried", b""), ("NoneType", "retried", b""), ("NoneType", "retried", b""),
        ("MemoryFault", "python", b""), ("MemoryFault", "python", b""), ("UnexplainedFault", "caller", b""),
        ("UnknownExit", "caller", b"")]  # fmt: skip
    assert trace[1].exit.data == b"\x60"
    assert trace[3].exit.data == b"abcdefgh"
    assert trace[4].exit.data == bytes(range(80))
    assert trace[6].exit.data == b"\x34\x12\0\0"
    assert trace[8].exit.ret == 42
    assert trace[9].exit.data == 0x1122
    assert trace[10].exit.error == 1
    assert trace[15].exit.private
    assert trace[15].rip == 7
    assert trace[17].exit.rip == 9
    assert not trace[18].settled
    times = [time for record in trace for time in (record.entered_ns, record.left_ns)]
    assert times == sorted(times)
    assert times[0] >= 0
    with pytest.raises(kvmexit.NotPendingError):
        trace[1].exit.data = 1


def test_a_serial_byte_takes_64_bytes(scripted, tmp_path):
    """Out or in."""
    scripted.on_pio(0x3F8, 8, native.Ignore())
    vcpu = scripted.create_vcpu(0, [pio_out(0x3F8, b"A"), pio_in(0x3FD)], repeat=500)
    with vcpu.record(tmp_path / "t"):
        drive(vcpu)
    assert (tmp_path / "t").stat().st_size == HEADER + 1000 * 64 + 40  # and the script's end


def test_what_is_pending_when_recording_begins_is_the_first_record(scripted, tmp_path):
    """Its answer is in the trace, and replays."""
    vcpu = scripted.create_vcpu(0, [pio_in(0x60), hlt()])
    exit = vcpu.run()
    with vcpu.record(tmp_path / "t"):
        exit.data = 9
        assert isinstance(vcpu.run(), Hlt)
    trace = kvmexit.load(tmp_path / "t")
    assert [(type(r.exit), r.answer, r.begun) for r in trace] == [(Io, b"\x09", True), (Hlt, b"", False)]
    assert kvmexit.replay(trace, strict=True).play().divergence is None


def test_recording_begins_and_ends_in_a_handler(scripted, tmp_path):
    """Of the vCPU that it is called for, and of itself."""
    recorders = []

    def on(vcpu, io):
        if io.data == b"b":
            recorders.append(vcpu.record(tmp_path / "t"))
        elif io.data == b"e":
            recorders[0].close()

    scripted.on_pio(1, 1, on)
    vcpu = scripted.create_vcpu(0, [pio_out(1, c.encode()) for c in "abcdef"])
    drive(vcpu)
    trace = kvmexit.load(tmp_path / "t")
    assert [record.exit.data for record in trace] == [b"b", b"c", b"d", b"e"]
    assert [record.outcome for record in trace] == ["python", "python", "python", "pending"]
    assert trace.closed


def test_an_exception_in_a_handler_leaves_one_record(scripted, tmp_path):
    """The exit is offered again, and answered then."""
    moods = iter([ValueError("no"), 5])

    def answer(vcpu, io):
        mood = next(moods)
        if isinstance(mood, Exception):
            raise mood
        return mood

    scripted.on_pio(0x60, 1, answer)
    vcpu = scripted.create_vcpu(0, [pio_in(0x60), hlt()])
    with vcpu.record(tmp_path / "t"):
        with pytest.raises(ValueError, match="no"):
            vcpu.run()
        assert isinstance(vcpu.run(), Hlt)
    trace = kvmexit.load(tmp_path / "t")
    assert [(r.answer, r.outcome) for r in trace] == [(b"\x05", "error"), (b"", "caller")]
    moods = iter([ValueError("again"), 5])
    replay = kvmexit.replay(trace, strict=True)
    replay.vm.on_pio(0x60, 1, answer)
    with pytest.raises(ValueError, match="again"):
        replay.run()
    assert replay.play().divergence is None


def test_kicks_and_timeouts_are_recorded_and_come_again(scripted, tmp_path):
    """Each where it was; a pending write is completed by complete()."""
    spin = ScriptStep(spin=True)
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"a"), pio_out(1, b"b"), pio_out(1, b"c"), spin])

    def session(vcpu, recorded):
        seen = [vcpu.run()]
        if recorded:
            vcpu.kick()
        seen += [vcpu.run(), vcpu.run(), vcpu.complete(), vcpu.run()]
        seen.append(vcpu.run(timeout=0.01 if recorded else None))
        return [repr(exit) for exit in seen]

    with vcpu.record(tmp_path / "t"):
        recorded = session(vcpu, True)
    trace = kvmexit.load(tmp_path / "t")
    assert [r.outcome for r in trace if r.outcome not in ("retried", "caller")] == ["kick", "drained", "timeout"]
    replay = kvmexit.replay(trace, strict=True)
    assert session(replay, False) == recorded
    assert recorded.count("Interrupted(cause='kick', errno=4)") == recorded.count("Interrupted(cause='timeout', errno=4)") == 1


# ---- replaying ----


def test_a_replay_gives_the_same_exits_and_answers(scripted, tmp_path):
    """Through the same handlers, and itself recorded the same: bit for bit but for times."""
    steps = without_the_malformed(EVERYTHING) * 3
    vcpu = routes(scripted).create_vcpu(0, steps)
    with vcpu.record(tmp_path / "t"):
        seen = drive(vcpu)
    for strict in (False, True):
        replay = kvmexit.replay(tmp_path / "t", strict=strict)
        routes(replay.vm)
        with replay.record(tmp_path / f"again-{strict}"):
            assert drive(replay) == seen
        assert replay.divergence is None
        assert replay.position == len(replay.trace)
        again = kvmexit.load(tmp_path / f"again-{strict}")
        assert answers(again)[: len(replay.trace)] == answers(replay.trace)
        assert stable(tmp_path / f"again-{strict}")[: len(replay.trace)] == stable(tmp_path / "t")


def stable(path):
    """-> the records' bytes without times."""
    data = path.read_bytes()
    at, records = HEADER, []
    while at < len(data):
        size = 8 * (int.from_bytes(data[at : at + 4], "little") & 0xFFFF)
        records.append(data[at : at + 8] + data[at + 24 : at + size])
        at += size
    return records


def test_play_answers_as_the_caller_did(scripted, tmp_path):
    """To the end, by itself, and says how long it took."""
    vcpu = routes(scripted).create_vcpu(0, without_the_malformed(EVERYTHING))
    with vcpu.record(tmp_path / "t"):
        drive(vcpu)
    replay = kvmexit.replay(tmp_path / "t", strict=True)
    routes(replay.vm)
    played = replay.play()
    assert played.divergence is None
    assert played.records == len(replay.trace)
    assert played.exits == sum(record.outcome == "caller" for record in replay.trace)
    assert played.ns > 0
    assert replay.play()[:2] == (0, 0)
    with pytest.raises(TraceError, match="has ended, after"):
        replay.run()


def other_answer(trace, strict):
    replay = kvmexit.replay(trace, strict=strict)
    routes(replay.vm)
    replay.vm.on_pio(0x3FD, 1, lambda vcpu, io: 0x61)
    return replay


def test_the_first_divergence_is_said_with_both_sides(scripted, tmp_path):
    """At once with strict; afterwards without."""
    vcpu = routes(scripted).create_vcpu(0, without_the_malformed(EVERYTHING))
    with vcpu.record(tmp_path / "t"):
        drive(vcpu)
    trace = kvmexit.load(tmp_path / "t")
    replay = other_answer(trace, False)
    played = replay.play()
    assert played.records == len(trace)
    assert (played.divergence.record.index, played.divergence.recorded, played.divergence.replayed) == (1, b"\x60", b"\x61")
    strict = other_answer(trace, True)
    for call in (strict.run, strict.play, strict.run):
        with pytest.raises(TraceError, match=r"record 1, Io\(.*: recorded 60 \(native\), replayed 61") as caught:
            call()
        assert caught.value.divergence.replayed == b"\x61"
    assert strict.position == 2


def test_an_exit_that_no_handler_takes_any_more_is_a_divergence(scripted, tmp_path):
    """It is answered as recorded, and the replay goes on."""
    vcpu = routes(scripted).create_vcpu(0, without_the_malformed(EVERYTHING))
    with vcpu.record(tmp_path / "t"):
        drive(vcpu)
    replay = kvmexit.replay(tmp_path / "t")
    played = replay.play()
    assert played.records == len(replay.trace)
    assert str(played.divergence).endswith("recorded nothing (native), replayed no answer")
    with pytest.raises(TraceError, match="record 0, .* replayed no answer"):
        kvmexit.replay(tmp_path / "t", strict=True).play()


def test_an_answer_that_nobody_writes_diverges(scripted, tmp_path):
    """A handler that says it is done and leaves the bytes as they are."""
    vcpu = scripted.create_vcpu(0, [pio_in(0x60), hlt()])
    with vcpu.record(tmp_path / "t"):
        vcpu.run().data = 0
        vcpu.run()
    replay = kvmexit.replay(tmp_path / "t")
    replay.vm.on_pio(0x60, 1, native.Counter())
    replay.vm.on_pio(0x60, 1, native.Function(done_function()))
    assert replay.play().divergence.replayed == b"\xff"


def done_function():
    import ctypes

    f = ctypes.CDLL(None).sched_yield  # returns 0, KVMEXIT_DONE, and looks at no argument
    f.argtypes = [ctypes.c_void_p] * 2
    return f


def test_a_failing_entry_and_its_repair_replay(scripted, tmp_path):
    """What was pending still is, and the answer that counts is the last one."""
    vcpu = scripted.create_vcpu(0, [pio_in(0x60), ScriptStep(None, errno=errno.EINVAL), hlt()])

    def session(vcpu):
        exit = vcpu.run()
        exit.data = 1
        with pytest.raises(KvmError) as refused:
            vcpu.run()
        vcpu.pending.data = 2
        return [refused.value.errno, repr(vcpu.run())]

    with vcpu.record(tmp_path / "t"):
        seen = session(vcpu)
    trace = kvmexit.load(tmp_path / "t")
    assert [record.errno for record in trace] == [0, errno.EINVAL, 0]
    replay = kvmexit.replay(trace, strict=True)
    assert session(replay) == seen
    assert replay.divergence is None


def test_conversions_replay(tmp_path):
    """Native ones, on memory that the replay's VM was given."""
    def make(vm):
        vm.memory.add(0, 64 * PAGE, guest_memfd=True)
        converter = native.Convert(vm, 0, 64 * PAGE)
        vm.on_memory_fault(handler=converter)
        vm.on_hypercall(12, converter)
        return vm

    rng = random.Random(5)
    steps = [memory_fault(rng.randrange(64) * PAGE, private=rng.random() < 0.5, rip=i) for i in range(200)]
    steps += [hypercall(12, rng.randrange(64) * PAGE, 1, rng.randrange(2) << 4) for _ in range(50)]
    with make(ScriptedVM(attributes=RecordedAttributes())) as vm:
        vcpu = vm.create_vcpu(0, steps)
        with vcpu.record(tmp_path / "t"):
            drive(vcpu)
        ranges = vm.memory.ranges()
    replay = kvmexit.replay(tmp_path / "t", vm=make(ScriptedVM()), strict=True)
    assert replay.play().divergence is None
    assert replay.vm.memory.ranges() == ranges


def test_replay_works_without_a_device(scripted, tmp_path):
    """In a process that may open nothing of the kind."""
    vcpu = routes(scripted).create_vcpu(0, without_the_malformed(EVERYTHING))
    with vcpu.record(tmp_path / "t"):
        drive(vcpu)
    done = python(f"""
import os, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
import kvmexit
from test_trace import routes
replay = kvmexit.replay({str(tmp_path / "t")!r}, strict=True)
routes(replay.vm)
assert replay.play().divergence is None
assert not [name for name in opened if "kvm" in str(name) and "dev" in str(name)], opened
""")
    assert (done.returncode, done.stderr) == (0, "")
