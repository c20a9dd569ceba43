"""Recording and replaying: what is written survives, what is replayed is the same, what is damaged is said."""

import contextlib
import ctypes
import errno
import itertools
import os
import random
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from guests import CODE, OUT_FOREVER, load, stress
from processes import HERE, in_thread, leaks, python, unsanitized

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
    rdmsr,
    wrmsr,
)  # fmt: skip

PAGE = 4096
HEADER = 120
TRACES = Path(__file__).parent / "traces"
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

pytestmark = pytest.mark.off_main


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
        assert_the_same(tmp_path / f"again-{strict}", tmp_path / "t")


def stable(path):
    """-> the records' bytes without times, and without interruptions that nobody asked for (Python's tick)."""
    data = path.read_bytes()
    at, records = HEADER, []
    while at < len(data):
        size = 8 * (int.from_bytes(data[at : at + 4], "little") & 0xFFFF)
        if data[at + 36] != errno.EINTR or data[at + 6] != 16:
            records.append(data[at : at + 8] + data[at + 24 : at + size])
        at += size
    return records


def assert_the_same(again, recorded):
    """Bit for bit; the replay's own end may be one record more."""
    ours, theirs = stable(again), stable(recorded)
    assert ours[: len(theirs)] == theirs
    assert len(ours) - len(theirs) in (0, 1)


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
    assert (played.divergence.record.number, played.divergence.recorded, played.divergence.replayed) == (1, b"\x60", b"\x61")
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


def test_runs_of_the_c_api_are_recorded(scripted, tmp_path):
    """Beside Python's, in one order: what the C side answers, and what it leaves to Python."""
    import ctypes

    from test_embed import EXIT, PYTHON, api
    from test_embed import run as run_natively

    scripted.on_pio(0x80, 1, native.Ignore())
    scripted.on_pio(0x61, 1, lambda vcpu, io: 5)
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"a"), pio_in(0x60), pio_in(0x61), hlt()])
    with vcpu.record(tmp_path / "t"):
        what, exit = run_natively(vcpu)
        assert what == EXIT
        ctypes.memset(exit.data, 7, 1)
        assert api.answer(api.vcpu(vcpu)) == 0
        assert run_natively(vcpu)[0] == PYTHON
        assert isinstance(vcpu.run(), Hlt)
    trace = kvmexit.load(tmp_path / "t")
    assert [(record.answer, record.outcome) for record in trace] == [
        (b"", "native"), (b"\7", "caller"), (b"\5", "python"), (b"", "caller")]  # fmt: skip
    replay = kvmexit.replay(trace, strict=True)
    replay.vm.on_pio(0x80, 1, native.Ignore())
    replay.vm.on_pio(0x61, 1, lambda vcpu, io: 5)
    assert run_natively(replay.vcpu)[0] == EXIT
    assert replay.play().divergence is None


def test_pauses_are_recorded(scripted, tmp_path):
    """As what they are; a replay goes on at once."""
    scripted.on_pio(0x80, 1, native.Ignore())
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x"), ScriptStep(spin=True), hlt()])
    with vcpu.record(tmp_path / "t") as recorder:
        ended = []
        thread = in_thread(lambda: ended.append(vcpu.run()))
        while not recorder.records:
            pass
        scripted.pause()
        scripted.resume()
        while not ended and recorder.records < 2:
            pass
        vcpu.kick()
        thread.join()
    trace = kvmexit.load(tmp_path / "t")
    outcomes = [record.outcome for record in trace if record.outcome != "retried"]
    assert "pause" in outcomes
    assert outcomes[0] == "native"
    replay = kvmexit.replay(trace, strict=True)
    replay.vm.on_pio(0x80, 1, native.Ignore())
    assert isinstance(replay.run(), Interrupted | Hlt)


# ---- the guest ----

# mov ecx, COUNT
# next: mov dx, 0x3fd; in al, dx; inc al; mov dx, 0x3f8; out dx, al; mov [rbx], al; mov eax, [rbx+8]; out 0x80, eax; loop next; hlt
TALKER = "b9 {count}  66 ba fd 03  ec  fe c0  66 ba f8 03  ee  88 03  8b 43 08  e7 80  e2 eb  e6 f4"


def talker(vm, rounds):
    """-> a vCPU that makes five exits a round: PIO in and out, MMIO write and read, a PIO write of what it read."""
    vcpu = load(vm, bytes.fromhex(TALKER.format(count=rounds.to_bytes(4, "little").hex())))
    vcpu.regs.rbx = 0xD000_0000
    return vcpu


def device(vm):
    """Answers that differ from one read to the next; -> what the guest said at port 0x80."""
    counter, said = itertools.count(), []
    vm.on_pio(0x3FD, 1, lambda vcpu, io: next(counter) & 0xFF)
    vm.on_pio(0x3F8, 1, native.Ignore())
    vm.on_mmio(0xD000_0000, 1, native.Ignore())
    vm.on_mmio(0xD000_0008, 8, native.Registers(bytearray(range(8))))
    vm.on_pio(0x80, 1, lambda vcpu, io: said.append(io.data))
    return said


@pytest.mark.kvm
def test_a_real_guest_replays_bit_exact(vm, tmp_path):
    """100,000 exits and more, through the same handlers, then recorded again: the same bytes but for times."""
    rounds = stress(25_000)
    vcpu = talker(vm, rounds)
    said = device(vm)
    with vcpu.record(tmp_path / "t") as recorder:
        assert vcpu.run(timeout=100).port == 0xF4
    assert recorder.lost == 0
    trace = kvmexit.load(tmp_path / "t")
    exits = sum(record.exit is not None for record in trace)
    assert exits == rounds * 5 + 1
    replay = kvmexit.replay(trace, strict=True)
    said_again = device(replay.vm)
    with replay.record(tmp_path / "again"):
        played = replay.play()
    assert played.divergence is None
    assert said_again == said
    assert_the_same(tmp_path / "again", tmp_path / "t")


@pytest.mark.kvm
def test_the_registers_of_a_real_guest_are_recorded(vm, tmp_path):
    """Where it was, and what it had."""
    vcpu = talker(vm, 2)
    device(vm)
    with vcpu.record(tmp_path / "t", registers=True):
        vcpu.run(timeout=10)
    trace = kvmexit.load(tmp_path / "t")
    first, *_, last = [record for record in trace if record.exit is not None]
    assert [struct.unpack_from("<2Q", record.registers, 8)[0] for record in (first, last)] == [0xD000_0000] * 2  # rbx
    assert CODE <= first.rip < last.rip <= CODE + 40
    assert int.from_bytes(last.registers[128:136], "little") == last.rip


@pytest.mark.kvm
def test_recording_begins_and_ends_while_a_guest_runs(vm, tmp_path):
    """From another thread: its VM pauses for the moment."""
    vm.on_pio(0x80, 1, native.Ignore())
    vcpu = load(vm, OUT_FOREVER)
    ended = []
    thread = in_thread(lambda: ended.append(vcpu.run()))
    while not vcpu.running:
        pass
    for i in range(stress(20)):
        with vcpu.record(tmp_path / str(i)) as recorder:
            while recorder.records < 100:
                pass
        trace = kvmexit.load(tmp_path / str(i))
        assert len(trace) == recorder.records >= 100
        assert {type(record.exit) for record in trace if record.errno == 0} == {Io}
        assert trace.closed
    vcpu.kick()
    thread.join()
    assert ended[0].cause == "kick"


# next: imul esi, esi, 1103515245; add esi, 12345; mov ebx, esi; shr ebx, 8; and ebx, 63; shl ebx, 12; add ebx, REGION;
# mov eax, 12; mov ecx, 1; mov edx, esi; shr edx, 20; and edx, 16; vmmcall; inc byte [rbx]; dec edi; jnz next; out 0xf4, al
STORM = bytes.fromhex(
    "69 f6 6d 4e c6 41  81 c6 39 30 00 00  89 f3  c1 eb 08  83 e3 3f  c1 e3 0c  81 c3 00 00 00 10  b8 0c 00 00 00"
    "b9 01 00 00 00  89 f2  c1 ea 14  83 e2 10  0f 01 d9  fe 03  ff cf  75 c8  e6 f4")
REGION, REGION_PAGES = 0x1000_0000, 64


def convertible(vm):
    vm.memory.add(REGION, REGION_PAGES * PAGE, guest_memfd=True)
    converter = native.Convert(vm, REGION, REGION_PAGES * PAGE)
    vm.on_memory_fault(handler=converter)
    vm.on_hypercall(12, converter)
    return vm


@pytest.mark.kvm
def test_a_conversion_storm_replays_bit_exact(private_vm, tmp_path):
    """A guest that asks for pages at random to become private or shared, and touches them; a second one replays it elsewhere."""
    rounds = stress(100_000)
    vcpu = load(private_vm, STORM, cpl=0)
    convertible(private_vm)
    vcpu.regs.rsi, vcpu.regs.rdi = 1, rounds
    with vcpu.record(tmp_path / "t") as recorder:
        assert vcpu.run(timeout=100).port == 0xF4
    trace = kvmexit.load(tmp_path / "t")
    assert sum(isinstance(record.exit, kvmexit.Hypercall) for record in trace) == rounds
    assert recorder.lost == 0
    replay = kvmexit.replay(trace, strict=True, vm=convertible(ScriptedVM()))
    with replay.record(tmp_path / "again"):
        assert replay.play().divergence is None
    assert_the_same(tmp_path / "again", tmp_path / "t")
    assert replay.vm.memory.ranges() == private_vm.memory.ranges()[1:]


# ---- files ----


def test_files_rotate(scripted, tmp_path):
    """Every record is in one of them, in order; `keep` leaves the last ones."""
    scripted.on_pio(0x80, 1, native.Ignore())
    script = [pio_out(0x80, bytes([i])) for i in range(250)]
    vcpu = scripted.create_vcpu(0, script, repeat=40)
    with vcpu.record(tmp_path / "t", rotate=65536) as recorder:
        drive(vcpu)
    assert recorder.files == [str(tmp_path / "t")] + [str(tmp_path / f"t.{i}") for i in range(1, 10)]
    trace = kvmexit.load(tmp_path / "t")
    assert [record.exit.data[0] for record in trace[:-1]] == list(range(250)) * 40
    assert [part.ended for part in trace.parts] == ["rotated"] * 9 + ["closed"]
    assert all(os.path.getsize(name) <= 65536 for name in recorder.files)
    assert kvmexit.replay(trace, strict=True).vm is not None
    vcpu = scripted.create_vcpu(1, script, repeat=40)
    with vcpu.record(tmp_path / "kept", rotate=65536, keep=3) as recorder:
        drive(vcpu)
    assert recorder.files == [str(tmp_path / f"kept.{i}") for i in (7, 8, 9)]
    kept = kvmexit.load(tmp_path / "kept")
    assert [record.exit for record in kept[-100:]] != []
    assert [repr(record.exit) for record in kept] == [repr(record.exit) for record in trace[len(trace) - len(kept):]]
    os.unlink(tmp_path / "t.4")
    with pytest.raises(TraceError, match=r"t\.5, offset 0x20: part 5 follows part 3"):
        kvmexit.load(tmp_path / "t")
    assert len(kvmexit.load(tmp_path / "t.6")) == trace.parts[6].records


def test_a_recording_overwrites_nothing(scripted, tmp_path):
    """Nor begins beside parts of another; what failed leaves nothing behind."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    (tmp_path / "t").write_bytes(b"mine")
    (tmp_path / "u.7").write_bytes(b"mine")
    for name in "tu":
        with pytest.raises(FileExistsError):
            vcpu.record(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        vcpu.record(tmp_path / "no" / "t")
    for options in ({"rotate": 1000}, {"rotate": 1 << 50}, {"keep": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            vcpu.record(tmp_path / "v", **options)
    with vcpu.record(tmp_path / "v"), pytest.raises(kvmexit.Error, match="recorded already"):
        vcpu.record(tmp_path / "w")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "u.7", "v"]
    assert (tmp_path / "t").read_bytes() == b"mine"


def test_recordings_leak_nothing(scripted, tmp_path):
    """No descriptor, mapping or thread, closed or dropped with their vCPU."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    vcpu.record(tmp_path / "first").close()
    before = leaks(), len(os.listdir("/proc/self/task"))
    for i in range(20):
        recorder = vcpu.record(tmp_path / str(i))
        recorder.close()
        recorder.close()
        assert recorder.closed
    with ScriptedVM() as vm:
        vm.create_vcpu(0, [hlt()]).record(tmp_path / "dropped")
    del vm
    assert (leaks(), len(os.listdir("/proc/self/task"))) == before
    assert kvmexit.load(tmp_path / "dropped").closed


def test_all_vcpus_of_a_vm_are_recorded(scripted, tmp_path):
    """Those there are and those to come, merged by time; each can be replayed."""
    scripted.on_pio(0x80, 1, native.Ignore())
    first = scripted.create_vcpu(0, [pio_out(0x80, b"a"), hlt()] * 3)
    with scripted.record(tmp_path / "folder") as recorder:
        second = scripted.create_vcpu(7, [pio_out(0x80, b"b"), hlt()] * 3)
        for _ in range(3):
            first.run()
            second.run()
        assert recorder.records == 12
        assert sorted(recorder.recorders) == [0, 7]
        with pytest.raises(kvmexit.Error, match="recorded already"):
            scripted.record(tmp_path / "other")
    scripted.create_vcpu(8, [hlt()])
    trace = kvmexit.load(tmp_path / "folder")
    assert [record.vcpu for record in trace] == [0, 0, 7, 7] * 3
    assert trace.vcpus == [0, 7]
    assert trace.closed
    with pytest.raises(ValueError, match="which `vcpu`"):
        kvmexit.replay(trace)
    replay = kvmexit.replay(tmp_path / "folder", vcpu=7, strict=True)
    replay.vm.on_pio(0x80, 1, native.Ignore())
    assert replay.play()[:2] == (6, 3)
    assert replay.id == 7


# ---- what goes wrong ----


def recording_process(path, *, rounds="1 << 60", before=""):
    """-> a process that records for ever, once it does."""
    process = subprocess.Popen([sys.executable, "-c", f"""
import itertools, sys
from processes import off_main
import kvmexit
from kvmexit import native
from kvmexit.testing import ScriptedVM, pio_in, pio_out
vm = ScriptedVM()
vm.on_pio(0x80, 1, native.Ignore())
counter = itertools.count()
vm.on_pio(0x60, 1, lambda vcpu, io: next(counter) & 0xff)
vcpu = vm.create_vcpu(0, [pio_out(0x80, bytes([i])) for i in range(250)] + [pio_in(0x60)], repeat=1 << 40)
recorder = vcpu.record({str(path)!r}, rotate=1 << 20, keep=8)
print("go", flush=True)
off_main(vcpu.run)  # a tick would be recorded
"""], env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])}, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"go\n"
    return process


@pytest.mark.parametrize("content", [b"", bytes(4096)])
def test_a_part_that_was_not_begun_is_passed_over(scripted, tmp_path, content):
    """Its writer was killed between making the file and writing its header."""
    with scripted.create_vcpu(0, [hlt()]).record(tmp_path / "t"):
        pass
    vcpu = scripted.create_vcpu(1, [hlt()])
    with vcpu.record(tmp_path / "u"):
        vcpu.run()
    (tmp_path / "u.1").write_bytes(content)
    assert len(kvmexit.load(tmp_path / "u")) == 1
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TraceError):
        kvmexit.load(tmp_path / "t")


def test_a_killed_process_leaves_all_but_what_it_was_writing(tmp_path):
    """kill -9 at random moments: the records follow one another to the end."""
    rng = random.Random(3)
    for i in range(stress(10)):
        path = tmp_path / str(i)
        process = recording_process(path)
        threading.Event().wait(rng.random() * 0.05)  # any moment will do
        process.kill()
        process.wait()
        trace = kvmexit.load(path)
        assert trace.parts[-1].ended is None
        assert not trace.closed
        assert trace.torn < 128
        assert all(record.settled for record in trace[:-1])
        wanted = None
        for record in trace[-2000:]:
            exit = record.exit
            assert wanted is None or (exit.data[0] if exit.is_write else 250) == wanted
            wanted = exit.data[0] + 1 if exit.is_write else 0


def written(path):
    """-> what is in a file, without the zeros that are allocated ahead."""
    return path.read_bytes().rstrip(b"\0")


def test_a_forked_child_writes_nothing(scripted, tmp_path):
    """It may close its copy, and drop it: the parent's file goes on."""
    scripted.on_pio(0x80, 1, native.Ignore())
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x")] * 10 + [hlt()] + [pio_out(0x80, b"y")] * 10 + [hlt()])
    recorder = vcpu.record(tmp_path / "t")
    vcpu.run()
    before = written(tmp_path / "t")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                vcpu.run()
            except kvmexit.Error:
                status = 0
            recorder.close()
            del recorder, vcpu, scripted
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert written(tmp_path / "t") == before
    vcpu.run()
    recorder.close()
    assert len(kvmexit.load(tmp_path / "t")) == 22


def test_a_file_that_is_cut_ends_the_recording_alone(scripted, tmp_path):
    """No SIGBUS: the vCPU runs on, and the recorder says what was lost."""
    scripted.on_pio(0x80, 1, native.Ignore())
    scripted.on_pio(0x81, 1, lambda vcpu, io: os.truncate(tmp_path / "t", 0))
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x")] * 1000 + [pio_out(0x81, b"x")] + [pio_out(0x80, b"x")] * 1000 + [hlt()])
    recorder = vcpu.record(tmp_path / "t")
    assert isinstance(vcpu.run(), Hlt)
    assert recorder.error.errno == errno.EIO
    assert recorder.lost > 900
    assert "failed" in repr(recorder)
    recorder.close()
    with pytest.raises(TraceError, match="offset 0x0: .*no trace"):
        kvmexit.load(tmp_path / "t")


@unsanitized("its report is of the SIGBUS")
def test_another_sigbus_is_whose_it_was(tmp_path):
    """A recording takes only what is its own."""
    done = python(f"""
import mmap, signal
from kvmexit.testing import ScriptedVM, hlt
vcpu = ScriptedVM().create_vcpu(0, [hlt()])
vcpu.record({str(tmp_path / "t")!r})
vcpu.run()
with open({str(tmp_path / "cut")!r}, "wb+") as file:
    file.truncate(4096)
    view = mmap.mmap(file.fileno(), 4096)
    file.truncate(0)
    view[0]
""")
    assert done.returncode == -signal.SIGBUS


def test_a_full_disk_ends_the_recording_alone(tmp_path):
    """As by RLIMIT_FSIZE: what is there stays, and is said."""
    done = python(f"""
import errno, resource, signal
from processes import off_main
import kvmexit
from kvmexit import native
from kvmexit.testing import ScriptedVM, hlt, pio_out
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
vm = ScriptedVM()
vm.on_pio(0x80, 1, native.Ignore())
vcpu = vm.create_vcpu(0, [pio_out(0x80, b"x")] * 20000 + [hlt()])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
with vcpu.record({str(tmp_path / "t")!r}) as recorder:
    assert isinstance(off_main(vcpu.run), kvmexit.Hlt)  # a tick would be recorded
assert recorder.error.errno == errno.EFBIG, recorder.error
assert recorder.records + recorder.lost == 20001
assert recorder.records == ((1 << 19) - {HEADER}) // 64
trace = kvmexit.load({str(tmp_path / "t")!r})
assert len(trace) == recorder.records
assert trace.lost == recorder.lost and not trace.closed
assert trace.parts[0].ended == "failed" and trace.parts[0].error == errno.EFBIG
""")
    assert (done.returncode, done.stderr) == (0, "")


def damaged(data, rng):
    """-> the bytes with something wrong, and whether that can go unnoticed."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(4)
        at = rng.randrange(len(data))
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at:]
            if not data:
                return bytes(data)
        elif kind == 2:
            size = rng.choice([1, 2, 4, 8])
            data[at : at + size] = rng.choice([b"\xff", b"\0", b"\x80", b"\x7f"]) * size
        else:
            data[at:at] = bytes(rng.randrange(64))
    return bytes(data)


def test_damaged_files_are_refused_or_read(scripted, tmp_path):
    """Never more than that: each is read as far as it goes, shown and replayed, or says what is wrong and where."""
    vcpu = routes(scripted).create_vcpu(0, EVERYTHING * 2)
    with vcpu.record(tmp_path / "t", registers=True):
        drive(vcpu)
    whole, rng = (tmp_path / "t").read_bytes(), random.Random(1)
    why = set()
    for _ in range(stress(1000)):
        path = tmp_path / "damaged"
        path.write_bytes(damaged(whole, rng))
        try:
            trace = kvmexit.load(path)
        except TraceError as error:
            why.add(str(error).startswith(f"{path}, offset 0x"))
            continue
        assert len([repr(record) for record in trace]) == len(trace)
        replay = kvmexit.replay(trace)
        routes(replay.vm)
        with contextlib.suppress(kvmexit.Error):
            replay.play()
    assert why == {True}


@pytest.mark.parametrize(("offset", "value", "why"), [
    (0, b"K", "no trace of kvmexit's"), (8, b"\2", "version 2"), (12, b"\1\0", "header of 1 bytes"), (40, b"\1", "mapping of"),
    (64, b"\0" * 8, "ns a tick"), (72, b"\x08\0\0\0", "8 bytes in use"), (80, b"\x09", "ending 9"), (84, b"\xff" * 4, "errno 4294967295"),
    (HEADER, b"\4", "a record of 4 words"), (HEADER + 2, b"\1", "has a record of"), (HEADER + 3, b"\1", "unknown flags"),
    (HEADER + 6, b"\x0f", "outcome 15"), (HEADER + 7, b"\2", "settled 2"), (HEADER + 39, b"\x80", "unknown flags"),
    (HEADER, bytes(8), "no record, where"), (HEADER + 41, b"\7", "has a record of"),
])  # fmt: skip
def test_what_is_wrong_is_said(scripted, tmp_path, offset, value, why):
    """With its offset."""
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x"), hlt()])
    with vcpu.record(tmp_path / "t"):
        drive(vcpu)
    data = bytearray((tmp_path / "t").read_bytes())
    data[offset : offset + len(value)] = value
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(TraceError, match=rf"t, offset 0x{offset if offset < HEADER else HEADER:x}: .*{why}"):
        kvmexit.load(tmp_path / "t")


def test_times_of_a_damaged_file_stay_in_range(scripted, tmp_path):
    """Ticks and a rate that are no time: the most there is, and of their sign."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    with vcpu.record(tmp_path / "t"):
        vcpu.run()
    data = bytearray((tmp_path / "t").read_bytes())
    data[48:56], data[64:72] = struct.pack("<Q", 0), struct.pack("<d", 1e8)
    data[HEADER + 8 : HEADER + 24] = struct.pack("<qq", -(1 << 62), 1 << 62)
    (tmp_path / "t").write_bytes(data)
    (record,) = kvmexit.load(tmp_path / "t")
    assert (record.entered_ns, record.left_ns) == (-(2**63 - 1024), 2**63 - 1024)


def test_a_mapping_without_a_ring_has_no_posted_writes(tmp_path):
    """What lies behind a replay's mapping, which is as large as the trace says, is not taken for KVM's ring (fuzz/)."""
    trace = tmp_path / "t"
    with ScriptedVM() as vm:
        vcpu = vm.create_vcpu(0, [hlt()])
        with vcpu.record(trace):
            vcpu.run()
        data = bytearray(trace.read_bytes())
        data[40:44] = struct.pack("<I", 2 * PAGE)
        trace.write_bytes(data)
    with ScriptedVM() as vm:
        zone = vm.coalesce_mmio(0, 1 << 20, native.Ignore())
        loaded = kvmexit.load(trace)
        # A page as a ring of one entry, and room for the mapping before it, the highest there is: the kernel takes that next.
        place = mapped(3 * PAGE)
        ring = struct.pack("<IIQII8s", 0, 1, 0x1000, 4, 0, b"")
        ctypes.memmove(place + 2 * PAGE, ring, len(ring))
        unmapped(place, 2 * PAGE)
        above = []
        while len(above) < 10000 and (above or [0])[-1] != place:
            above.append(mapped(2 * PAGE))
        unmapped(above.pop(), 2 * PAGE)
        replay = kvmexit.replay(loaded, vm=vm)
        assert isinstance(replay.run(), Hlt)
        assert vm.drain_coalesced() == 0
        assert zone.posted == 0
        for at in above:
            unmapped(at, 2 * PAGE)


def mapped(size):
    """-> the address of new memory."""
    at = LIBC.mmap(None, size, 3, 0x22, -1, 0)
    assert at != ctypes.c_void_p(-1).value
    return at


def unmapped(at, size):
    assert LIBC.munmap(at, size) == 0


def test_a_file_that_changes_while_it_is_read(scripted, tmp_path):
    """It is read, or refused; a mapping of it would be a SIGBUS."""
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x"), mmio_read(0x2000, 4), hlt()] * 200)
    with vcpu.record(tmp_path / "t"):
        drive(vcpu)
    whole, path, done, rng = (tmp_path / "t").read_bytes(), tmp_path / "t", threading.Event(), random.Random(1)
    count = len(kvmexit.load(path))

    def change():
        while not done.is_set():
            os.truncate(path, rng.randrange(len(whole)))
            path.write_bytes(whole)

    thread = in_thread(change)
    seen = set()
    for _ in range(stress(300)):
        with contextlib.suppress(TraceError):
            trace = kvmexit.load(path)
            seen.add(len(trace))
            assert [record.number for record in trace] == list(range(len(trace)))
    done.set()
    thread.join()
    assert max(seen, default=0) <= count


def test_parts_that_contradict_each_other_are_refused(scripted, tmp_path):
    """Another recording's; and one whose mapping is larger, which lengths were not checked against."""
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x"), ScriptStep(2, struct.pack("<BBHIQ", 1, 1, 0x80, 1, 12288)), hlt()])
    with vcpu.record(tmp_path / "t"):
        vcpu.run()
        vcpu.run()
    first = (tmp_path / "t").read_bytes()
    second = bytearray(first)
    second[32] = 1
    for offset, value, why in ((16, b"other", "0x10: of another"), (36, b"\1", "0x24: another vCPU")):
        changed = bytearray(second)
        changed[offset : offset + len(value)] = value
        (tmp_path / "t.1").write_bytes(changed)
        with pytest.raises(TraceError, match=rf"t\.1, offset {why}"):
            kvmexit.load(tmp_path / "t")
    (tmp_path / "t.1").write_bytes(second)
    assert len(kvmexit.load(tmp_path / "t")) == 4
    larger = bytearray(first[: HEADER + 64])  # one record; with the other's size the next part's would have PIO data
    larger[40:48], larger[72:80] = struct.pack("<II", 0x4000, 0), struct.pack("<Q", len(larger))
    (tmp_path / "t").write_bytes(larger)
    with pytest.raises(TraceError, match=r"t\.1, offset 0x28: .*12288 bytes, and one of 16384"):
        kvmexit.load(tmp_path / "t")


def test_a_torn_tail_is_reported(scripted, tmp_path):
    """As a cut file is: up to the last whole record."""
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x")] * 3 + [hlt()])
    with vcpu.record(tmp_path / "t"):
        drive(vcpu)
    whole = (tmp_path / "t").read_bytes()
    for cut in range(HEADER, len(whole)):
        (tmp_path / "t").write_bytes(whole[:cut])
        trace = kvmexit.load(tmp_path / "t")
        assert len(trace) == min((cut - HEADER) // 64, 3) + (cut >= HEADER + 3 * 64 + 40)
        assert not trace.closed
        assert trace.parts[0].ended is None
        assert trace.torn == 0 or cut % 8 or trace.torn < 64


def test_threads_record_at_once(tmp_path):
    """vCPUs in threads of their own, files that rotate, and recordings that come and go meanwhile."""
    with ScriptedVM() as vm:
        vm.on_pio(0x80, 1, native.Ignore())
        vcpus = [vm.create_vcpu(i, [pio_out(0x80, b"x")] * 100, repeat=1 << 40) for i in range(3)]
        threads = [in_thread(lambda vcpu=vcpu: vcpu.run()) for vcpu in vcpus]
        for i in range(stress(30)):
            with vm.record(tmp_path / str(i), rotate=65536, keep=2) as recorder:
                while min(recorder.recorders[j].records for j in range(3)) < 3000:
                    pass
            trace = kvmexit.load(tmp_path / str(i))
            assert trace.closed
            assert recorder.lost == 0
            assert len(trace.parts) == 6
        for vcpu in vcpus:
            vcpu.kick()
        for thread in threads:
            thread.join()


def test_numpy_has_the_fixed_part(scripted, tmp_path):
    """One element a record."""
    pytest.importorskip("numpy", reason="numpy is missing")
    vcpu = routes(scripted).create_vcpu(2, EVERYTHING)
    with vcpu.record(tmp_path / "t"):
        drive(vcpu)
    trace = kvmexit.load(tmp_path / "t")
    rows = trace.numpy()
    assert rows.dtype.itemsize == 64
    assert rows["errno"].tolist() == [record.errno for record in trace]
    assert rows["left_ns"].tolist() == [record.left_ns for record in trace]
    assert rows["address"][:11].tolist() == [0x80, 0x3FD, 0x60, 0x1F0, 0x1F0, 0x1000, 0x2000, 0x3000, 12, 0x10, 0x11]
    assert rows["size"][:11].tolist() == [1, 1, 4, 8, 80, 2, 4, 8, 8, 8, 8]
    assert rows["data"][:3].tolist() == [ord("x"), 0x60, 0x5A5A5A5A]
    assert rows["data"][[5, 6, 8, 9, 10]].tolist() == [0x6261, 0x1234, 42, 0x1122, 5]
    assert set(rows["vcpu"].tolist()) == {2}


def test_numpys_size_of_a_huge_fault_is_all_ones(scripted, tmp_path):
    """Not the rest of it by 4 GiB, which was 0."""
    pytest.importorskip("numpy", reason="numpy is missing")
    vcpu = scripted.create_vcpu(0, [memory_fault(0, size) for size in (PAGE, 1 << 32, (1 << 40) + PAGE)])
    with vcpu.record(tmp_path / "t"):
        drive(vcpu)
    assert kvmexit.load(tmp_path / "t").numpy()["size"][:3].tolist() == [PAGE, 0xFFFF_FFFF, 0xFFFF_FFFF]


def test_devices_and_pipes_are_no_traces(tmp_path):
    """They may have no end, or no beginning."""
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(TraceError, match=f"{path} is no file"):
            kvmexit.load(path)


# ---- those that ship: made by python tests/test_trace.py, in the lab for the storm ----


def make_guest(path):
    with kvmexit.VM() as vm:
        vcpu = talker(vm, 20)
        device(vm)
        with vcpu.record(path):
            vcpu.run(timeout=10)


def make_storm(path):
    with kvmexit.VM(kvmexit.VMType.SW_PROTECTED) as vm:
        vcpu = load(vm, STORM, cpl=0)
        convertible(vm)
        vcpu.regs.rsi, vcpu.regs.rdi = 1, 30
        with vcpu.record(path):
            vcpu.run(timeout=60)


def test_the_guest_that_ships_replays():
    """Recorded on this project's machine."""
    replay = kvmexit.replay(TRACES / "guest.trace", strict=True)
    assert replay.trace.closed
    said = device(replay.vm)
    assert replay.play().divergence is None
    assert said == [bytes([4, 5, 6, 7])] * 20 or len(said) == 20


def test_the_storm_that_ships_replays():
    """Recorded in the lab, with private memory."""
    replay = kvmexit.replay(TRACES / "storm.trace", strict=True, vm=convertible(ScriptedVM()))
    assert sum(isinstance(record.exit, kvmexit.Hypercall) for record in replay.trace) == 30
    assert replay.play().divergence is None
    assert {private for _, _, private in replay.vm.memory.ranges()} == {False, True}


if __name__ == "__main__":
    TRACES.mkdir(exist_ok=True)
    kind = sys.argv[1]
    (TRACES / f"{kind}.trace").unlink(missing_ok=True)
    {"guest": make_guest, "storm": make_storm}[kind](TRACES / f"{kind}.trace")
    if sys.argv[2:]:  # out of the lab, whose files are forgotten
        print((TRACES / f"{kind}.trace").read_bytes().hex())
