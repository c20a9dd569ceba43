"""Statistics and the flight recorder: every exit counted once, times where they belong, and looking on while vCPUs run."""

import array
import ctypes
import errno
import gc
import math
import random
import sys
import time
import types
from itertools import pairwise

import pytest
from guests import CODE, OUT_FOREVER, Typed, load, stress
from processes import compiled, in_thread, needs_gil
from test_convert_threads import MEANWHILE, somebody_converts

import kvmexit
from kvmexit import PASS, STOP, Error, ExitReason, KvmError, LastExit, Stats, VMType, _stats, errors, native, stats
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

FOR_EVER = 1 << 60
PAGE = 4096


def run_out(vcpu):
    """Run a script to its end; -> the error that says so."""
    with pytest.raises(KvmError) as ended:
        raise AssertionError(vcpu.run())
    assert ended.value.errno == errno.ENODATA
    return ended.value


def step_of(reason, *words, **options):
    """A step with these 64-bit words in the union."""
    return ScriptStep(reason, b"".join(word.to_bytes(8, "little") for word in words), **options)


# ---- counts ----


def test_every_exit_is_counted_by_its_class_and_who_took_it(scripted):
    """A native handler, a native one after Python's, a Python handler, the caller: by itself, by STOP, by native.Stop."""
    scripted.on_pio(0x80, 1, native.Ignore())
    scripted.on_pio(0x81, 1, native.Ignore())
    scripted.on_pio(0x81, 1, lambda vcpu, io: PASS)
    scripted.on_mmio(0, PAGE, lambda vcpu, mmio: None)
    scripted.on_mmio(PAGE, PAGE, lambda vcpu, mmio: STOP)
    scripted.on_mmio(2 * PAGE, PAGE, native.Stop())
    vcpu = scripted.create_vcpu(0, [
        *[pio_out(0x80, b"x")] * 5, *[pio_out(0x81, b"x")] * 2, *[mmio_write(0, b"x")] * 3, mmio_write(PAGE, b"x"),
        mmio_write(2 * PAGE, b"x"), hlt()])  # fmt: skip
    while not isinstance(vcpu.run(), kvmexit.Hlt):
        pass
    assert vcpu.stats.counts == {
        (kvmexit.Io, "native"): 7, (kvmexit.Mmio, "python"): 3, (kvmexit.Mmio, "caller"): 2, (kvmexit.Hlt, "caller"): 1}  # fmt: skip
    assert vcpu.stats.exits == 13


@pytest.mark.parametrize(("step", "kind"), [
    (memory_fault(0x1000), kvmexit.MemoryFault), (ScriptStep(errno=errno.EFAULT), kvmexit.UnexplainedFault),
    (ScriptStep(43, bytes(24)), kvmexit.SnpReqCerts), (ScriptStep(44), kvmexit.UnknownExit),
    (ScriptStep((1 << 32) - 2), kvmexit.UnknownExit), (ScriptStep(2, bytes(16)), kvmexit.UnknownExit),
    (ScriptStep(6, bytes(24)), kvmexit.UnknownExit), (ScriptStep(0), kvmexit.HardwareExit)])  # fmt: skip
def test_each_class_of_exits_has_its_row(scripted, step, kind):
    """Also what KVM does not explain, does not name, or says wrong."""
    vcpu = scripted.create_vcpu(0, [step])
    assert type(vcpu.run()) is kind
    assert vcpu.stats.counts == {(kind, "caller"): 1}
    row = {kvmexit.UnexplainedFault: 44, kvmexit.UnknownExit: 45}.get(kind, step.reason)
    assert vcpu.stats.table[row, stats.OUTCOMES.index("caller")] == 1


def test_the_table_is_what_numpy_takes(scripted):
    """46 rows of 5 unsigned 64-bit numbers, which nobody can change."""
    table = scripted.create_vcpu(0).stats.table
    assert (table.format, table.shape, table.itemsize, table.readonly) == ("Q", (46, 5), 8, True)
    assert table.c_contiguous


def test_an_exit_whose_handler_raised_counts_as_an_error_once(scripted):
    """Also when run() offers it again, and it is taken then."""
    answers = [KeyError(), KeyError(), None]

    def handler(vcpu, io):
        answer = answers.pop(0)
        if answer:
            raise answer

    scripted.on_pio(0x80, 1, handler)
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x"), hlt()])
    for _ in range(2):
        with pytest.raises(KeyError):
            vcpu.run()
        assert vcpu.stats.counts == {(kvmexit.Io, "error"): 1}
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert vcpu.stats.counts == {(kvmexit.Io, "error"): 1, (kvmexit.Hlt, "caller"): 1}


def test_a_fault_loop_ends_in_an_error(scripted):
    """The faults before the last were the handler's."""
    scripted.on_memory_fault(handler=lambda vcpu, fault: None)
    vcpu = scripted.create_vcpu(0, [memory_fault(0x1000)], repeat=100)
    vcpu.fault_limit = 10
    with pytest.raises(kvmexit.FaultLoopError) as caught:
        vcpu.run()
    assert vcpu.stats.counts == {(kvmexit.MemoryFault, "python"): 10, (kvmexit.MemoryFault, "error"): 1}
    assert [e.outcome for e in caught.value.last_exits] == ["python"] * 10 + ["error"]


def test_an_exit_that_is_offered_again_counts_once(scripted):
    """For the caller whom it was first returned to."""
    vcpu = scripted.create_vcpu(0, [pio_in(0x80), hlt()])
    assert vcpu.run() is vcpu.run()
    scripted.on_pio(0x80, 1, lambda vcpu, io: 7)
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert vcpu.stats.counts == {(kvmexit.Io, "caller"): 1, (kvmexit.Hlt, "caller"): 1}


def test_the_exit_in_a_handlers_hands_is_not_counted_yet(scripted):
    """Neither as its own nor as a native handler's."""
    seen = []
    scripted.on_pio(0x80, 1, lambda vcpu, io: seen.append((vcpu.stats.exits, vcpu.last_exits[-1].outcome)))
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x")] * 3)
    run_out(vcpu)
    assert seen == [(0, "pending"), (1, "pending"), (2, "pending")]


def test_lost_races_are_counted(scripted):
    """A fault that a conversion meanwhile explains was nobody's."""
    scripted.memory.add(0, 16 * PAGE, guest_memfd=True)
    scripted.memory.convert(0, PAGE, private=True)
    scripted.on_memory_fault(handler=lambda vcpu, fault: None)
    for attempt in range(100):
        vcpu = scripted.create_vcpu(attempt, [*MEANWHILE, memory_fault(0, private=True)], repeat=20, keep=False)
        with somebody_converts(scripted, 8 * PAGE):
            run_out(vcpu)
        raced = vcpu.retries["race"]
        assert vcpu.stats.counts.get((kvmexit.MemoryFault, "race"), 0) == raced
        assert vcpu.stats.exits == 20
        if raced:
            break
    else:
        raise AssertionError("no races were lost")


def test_exits_of_complete_are_counted(scripted):
    """The second half of an access is an exit of its own."""
    halves = [mmio_read(0x1FFE, 2), mmio_read(0x2000, 2)._replace(second_half=True)]
    vcpu = scripted.create_vcpu(0, halves)
    vcpu.run().data = 1
    vcpu.complete().data = 2
    assert vcpu.complete() is None
    assert vcpu.stats.counts == {(kvmexit.Mmio, "caller"): 2}


# ---- values ----


def test_reset_begins_anew(scripted):
    """For counts and times; an earlier value stays what it was."""
    scripted.on_pio(0x80, 1, native.Ignore())
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x"), hlt()], repeat=3)
    vcpu.timing = True
    vcpu.run()
    before = vcpu.stats
    vcpu.reset_stats()
    assert vcpu.stats == Stats()
    vcpu.run()
    after = vcpu.stats
    assert (before.exits, after.exits, before.kvm.count, after.kvm.count) == (2, 2, 2, 2)


def test_the_difference_of_two_snapshots_is_what_happened_between(scripted):
    """And the wrong way round it is refused."""
    vcpu = scripted.create_vcpu(0, [hlt()], repeat=9)
    vcpu.run()
    before = vcpu.stats
    for _ in range(5):
        vcpu.run()
    after = vcpu.stats
    assert (after - before).counts == {(kvmexit.Hlt, "caller"): 5}
    assert (before + (after - before)) == after
    with pytest.raises(ValueError, match="earlier"):
        before - after
    with pytest.raises(TypeError):
        after - 1
    with pytest.raises(TypeError):
        after + 1


def test_a_vms_statistics_are_those_of_all_its_vcpus(scripted):
    """Of the ones that are gone, and when it is closed, too."""
    for id in range(3):
        vcpu = scripted.create_vcpu(id, [hlt()] * 5)
        for _ in range(id + 1):
            vcpu.run()
    own = vcpu.stats
    assert scripted.stats.exits == 6
    del vcpu
    gc.collect()
    scripted.close()
    assert scripted.stats.counts == {(kvmexit.Hlt, "caller"): 6}
    assert own.merge(own) == own + own != own
    scripted.reset_stats()
    assert scripted.stats == Stats()


def test_times_by_two_clocks_are_not_added():
    """They are of two processes; counts alone can be."""
    one, other = (Stats(_stats.sorted_into_buckets([5])._words, ns) for ns in (1.0, 2.0))
    with pytest.raises(ValueError, match="two clocks"):
        one + other
    assert (Stats() + other).kvm.total == (other + Stats(None, 3.0)).kvm.total == 10.0


# ---- histograms ----


def test_a_bucket_is_narrow():
    """Each value lies in its bucket, which is a tick wide, or at most a sixteenth of where it begins."""
    values = {0, 1, 2, 3, (1 << 42) - 1}
    for bit in range(4, 42):
        values |= {(1 << bit) - 1, 1 << bit, (1 << bit) + 1, random.randrange(1 << bit, 2 << bit)}
    for value in values:
        histogram = _stats.sorted_into_buckets([value]).kvm
        [bucket] = [i for i, count in enumerate(histogram.counts) if count]
        low, high = histogram.edges[bucket : bucket + 2]
        assert low <= value < high
        assert high - low == 1 or high - low <= low / 16
        assert histogram.max == high - 1


def test_what_lasts_longer_than_the_last_bucket_is_in_it():
    """And its mean is right all the same."""
    histogram = _stats.sorted_into_buckets([1 << 42, 1 << 62]).kvm
    assert (histogram.counts[-1], histogram.count, histogram.mean) == (2, 2, ((1 << 42) + (1 << 62)) / 2)


def test_a_clock_that_goes_back_is_no_time():
    """Time stamp counters of two processors can be a little apart."""
    assert _stats.sorted_into_buckets([(1 << 64) - 5]).kvm.max == 0


@pytest.mark.parametrize("spread", [0.1, 1, 4])
@pytest.mark.parametrize("count", [1, 2, 99, 1000, 10_001])
def test_percentiles_are_within_six_percent(count, spread):
    """Of the nearest rank among the samples themselves."""
    rng = random.Random(count)
    samples = sorted(int(rng.lognormvariate(8, spread)) for _ in range(count))
    histogram = _stats.sorted_into_buckets(samples).kvm
    for p in (0, 0.01, 1, 25, 50, 75, 90, 99, 99.9, 99.99, 100):
        exact = samples[max(math.ceil(p * count / 100), 1) - 1]
        assert abs(histogram.percentile(p) - exact) <= exact / 32
    assert histogram.count == count
    assert histogram.mean == pytest.approx(sum(samples) / count)
    assert samples[-1] <= histogram.max <= samples[-1] * 17 / 16


def test_merged_histograms_are_as_if_sorted_together():
    """Percentiles of the sum are those of all samples."""
    one, other = [5, 100, 3000], [7, 7, 1 << 30]
    together = _stats.sorted_into_buckets(one) + _stats.sorted_into_buckets(other)
    assert together == _stats.sorted_into_buckets(one + other)


@pytest.mark.parametrize("p", [-1, 100.1, math.nan])
def test_there_is_no_such_percentile(p):
    with pytest.raises(ValueError, match="0..100"):
        Stats().kvm.percentile(p)


def test_of_nothing_there_is_no_percentile():
    """NaN, which compares with nothing."""
    empty = Stats().kvm
    assert all(math.isnan(figure) for figure in (empty.mean, empty.max, empty.percentile(50)))
    assert (empty.count, empty.total) == (0, 0)


def test_buckets_are_what_numpy_takes():
    """Numbers and edges, read-only."""
    histogram = Stats(None, 0.5).kvm
    assert (histogram.counts.format, histogram.counts.shape, histogram.counts.readonly) == ("Q", (624,), True)
    assert (histogram.edges.format, histogram.edges.shape, histogram.edges.readonly) == ("d", (625,), True)
    assert list(histogram.edges[:3]) == [0, 0.5, 1]


# ---- times ----


@pytest.fixture(params=["tsc", "clock"])
def clock(request, monkeypatch):
    """Both clocks."""
    if request.param == "clock":
        monkeypatch.setattr(_stats, "TSC", False)


@pytest.mark.usefixtures("clock")
def test_each_sample_is_where_it_belongs(scripted):
    """kvm: entries. native: re-entries without Python. gil and python: ways to Python. None while it is off."""
    scripted.on_pio(0x80, 1, native.Ignore())
    scripted.on_mmio(0, PAGE, lambda vcpu, mmio: None)
    vcpu = scripted.create_vcpu(
        0, [*[pio_out(0x80, b"x")] * 5, *[mmio_write(0, b"x")] * 3, ScriptStep(errno=errno.EAGAIN), hlt()], repeat=3)
    for timing in (False, True, False):
        before = vcpu.stats
        vcpu.timing = timing
        assert vcpu.timing is timing
        vcpu.run()
        taken = vcpu.stats - before
        expected = (10, 6, 4, 4) if timing else (0, 0, 0, 0)
        assert (taken.kvm.count, taken.native.count, taken.gil.count, taken.python.count) == expected
        assert taken.exits == 9


def test_switching_on_and_off_in_between_makes_no_sample_of_it(scripted):
    """A phase that was not measured from its beginning is none."""
    orders = [[True], [], [False, True], [False], []]

    def handler(vcpu, io):
        for order in orders.pop(0):
            vcpu.timing = order

    scripted.on_pio(0x80, 1, handler)
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x")] * 5)
    run_out(vcpu)
    taken = vcpu.stats
    # Entries 2 to 4 begin with it on; of the ways through Python, only the second's end does, too.
    assert (taken.kvm.count, taken.gil.count, taken.python.count) == (3, 3, 1)


def test_a_vms_switch_is_for_the_vcpus_there_are_and_those_to_come(scripted):
    first = scripted.create_vcpu(0)
    assert not scripted.timing
    scripted.timing = True
    second = scripted.create_vcpu(1)
    assert (scripted.timing, first.timing, second.timing) == (True, True, True)
    first.timing = False
    assert second.timing
    scripted.timing = False
    assert not second.timing


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Handlers in C: tests/native_handlers.c."""
    library = ctypes.CDLL(str(compiled(tmp_path_factory, "native_handlers")))
    library.wait.argtypes = [ctypes.c_void_p] * 2
    return library


def least(clock, ns=20_000_000):
    """Let time go by; -> how much at least, in ns, by a clock that may be a little off another."""
    begun = clock()
    while clock() - begun < ns:
        time.sleep(0)
    return (clock() - begun) * 0.99


@pytest.mark.usefixtures("clock")
def test_time_goes_to_who_spends_it(scripted, library):
    """A guest that runs until kicked, a native handler that waits, a Python handler that computes."""
    words = (ctypes.c_uint32 * 2)()
    spent = {}
    scripted.on_pio(0x80, 1, native.Function(library.wait, words))
    scripted.on_pio(0x81, 1, lambda vcpu, io: spent.update(python=least(time.monotonic_ns)))
    vcpu = scripted.create_vcpu(0, [pio_out(0x81, b"x"), pio_out(0x80, b"x"), ScriptStep(spin=True)])
    vcpu.timing = True
    begun = time.monotonic_ns()
    thread = in_thread(vcpu.run)
    while not words[0]:
        time.sleep(0)
    spent["native"] = least(time.monotonic_ns)
    words[1] = 1
    while vcpu.stats.native.count == 0:
        time.sleep(0)
    spent["kvm"] = least(time.monotonic_ns)
    vcpu.kick()
    thread.join(30)
    wall = (time.monotonic_ns() - begun) * 1.01
    taken = vcpu.stats
    total = {name: getattr(taken, name).total for name in stats.PHASES}
    for name, ns in spent.items():
        assert ns <= total[name] <= wall - sum(spent.values()) + ns
    assert sum(total.values()) <= wall
    assert taken.kvm.max >= spent["kvm"]
    assert taken.native.percentile(100) >= spent["native"] * 0.96


@needs_gil("nobody waits for it")
def test_waiting_for_the_gil_is_seen(scripted, library):
    """Another thread keeps it, from before the exit that needs it to long after."""
    words = (ctypes.c_uint32 * 2)()
    scripted.on_pio(0x80, 1, native.Function(library.wait, words))
    scripted.on_pio(0x81, 1, lambda vcpu, io: None)
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x"), pio_out(0x81, b"x")])
    vcpu.timing = True
    thread = in_thread(lambda: run_out(vcpu))
    while not words[0]:
        time.sleep(0)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        words[1] = 1
        begun = time.monotonic_ns()
        while time.monotonic_ns() - begun < 100_000_000:
            pass
        kept = time.monotonic_ns() - begun
    finally:
        sys.setswitchinterval(usual)
    thread.join(30)
    taken = vcpu.stats
    assert (taken.gil.count, taken.python.count) == (2, 2)
    assert taken.gil.max > kept / 2 > taken.python.total


def test_a_pause_is_nobodys_time(scripted):
    """run() parks: that is neither Python's nor the guest's."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(spin=True)])
    vcpu.timing = True
    thread = in_thread(vcpu.run)
    while vcpu.stats.exits == 0 and not vcpu.running:
        time.sleep(0)
    scripted.pause()
    before = vcpu.stats
    paused = least(time.monotonic_ns, 200_000_000)
    scripted.resume()
    while vcpu.stats.kvm.count < before.kvm.count:
        time.sleep(0)
    vcpu.kick()
    thread.join(30)
    assert vcpu.stats.python.total < paused


# ---- the flight recorder ----


@pytest.mark.parametrize(("step", "exit"), [
    (pio_out(0x80, b"abcd", 2)._replace(rip=5), LastExit(ExitReason.IO, 5, 0x80, 4, True, None, 0, "caller")),
    (pio_in(0x81, 4), LastExit(ExitReason.IO, 0, 0x81, 4, False, None, 0, "caller")),
    (mmio_write(0xFED0_0000, b"abc"), LastExit(ExitReason.MMIO, 0, 0xFED0_0000, 3, True, None, 0, "caller")),
    (mmio_read((1 << 64) - 8, 8), LastExit(ExitReason.MMIO, 0, (1 << 64) - 8, 8, False, None, 0, "caller")),
    (memory_fault(0x1000, private=True, rip=1), LastExit(ExitReason.MEMORY_FAULT, 1, 0x1000, 4096, None, True, 14, "caller")),
    (memory_fault(0x2000, errno=133), LastExit(ExitReason.MEMORY_FAULT, 0, 0x2000, 4096, None, False, 133, "caller")),
    (hypercall(12, 1), LastExit(ExitReason.HYPERCALL, 0, 12, None, None, None, 0, "caller")),
    (step_of(29, 0, 0x4000_0000 << 32 | 1, 0), LastExit(ExitReason.X86_RDMSR, 0, 0x4000_0000, 8, False, None, 0, "caller")),
    (step_of(30, 0, 0x10 << 32, 5), LastExit(ExitReason.X86_WRMSR, 0, 0x10, 8, True, None, 0, "caller")),
    (hlt(), LastExit(ExitReason.HLT, 0, None, None, None, None, 0, "caller")),
    (ScriptStep(errno=errno.EFAULT, rip=9), LastExit(None, 9, None, None, None, None, 14, "caller")),
    (ScriptStep(77), LastExit(77, 0, None, None, None, None, 0, "caller")),
    (ScriptStep(2, bytes(16)), LastExit(ExitReason.IO, 0, None, None, None, None, 0, "caller")),
])  # fmt: skip
def test_what_is_kept_of_an_exit(scripted, step, exit):
    """Its reason, where the guest was, what it asked for, and what became of it."""
    vcpu = scripted.create_vcpu(0, [step])
    assert vcpu.last_exits == []
    vcpu.run()
    assert vcpu.last_exits == [exit]


@pytest.mark.parametrize("count", [1, 63, 64, 65, 127, 128, 129, 1000])
def test_the_last_64_are_kept_oldest_first(scripted, count):
    """Whoever took them."""
    scripted.on_pio(0, 500, native.Ignore())
    scripted.on_pio(500, 500, lambda vcpu, io: None)
    vcpu = scripted.create_vcpu(0, [pio_out(port, b"x") for port in range(count)])
    run_out(vcpu)
    kept = [(e.address, e.outcome) for e in vcpu.last_exits]
    assert kept == [(port, "native" if port < 500 else "python") for port in range(count)][-64:]


def test_where_the_registers_do_not_come_rip_is_unknown(scripted):
    vcpu = scripted.create_vcpu(0, [hlt()._replace(rip=7)] * 3)
    for classes in (1, 0, 7):
        vcpu.sync = classes
        vcpu.run()
    assert [e.rip for e in vcpu.last_exits] == [7, None, 7]


@pytest.mark.parametrize(("type", "rip"), [(VMType.SEV_ES, None), (VMType.SNP, None), (VMType.TDX, None), (VMType.SEV, 7)])
def test_a_guest_with_hidden_registers_shows_no_rip(type, rip):
    with Typed(type, RecordedAttributes()) as vm:
        vcpu = vm.create_vcpu(0, [hlt()._replace(rip=7)])
        vcpu.run()
        assert vcpu.last_exits[0].rip == rip


def test_errors_out_of_run_carry_the_last_exits(scripted):
    """KVM's, kvmexit's, and those that a handler raised; not somebody else's."""
    raised = [Error("mine"), ValueError("yours")]

    def handler(vcpu, io):
        raise raised.pop(0)

    scripted.on_pio(0x80, 1, handler)
    vcpu = scripted.create_vcpu(0, [hlt(), pio_out(0x80, b"x")])
    vcpu.run()
    with pytest.raises(Error) as caught:
        vcpu.run()
    assert [(e.reason.name, e.outcome) for e in caught.value.last_exits] == [("HLT", "caller"), ("IO", "error")]
    assert str(caught.value) == "mine"
    assert caught.value.explain().splitlines() == [
        "mine", "reason  rip  address  size         errno  outcome", "HLT     0x0                               caller",
        "IO      0x0     0x80   0x1  write         error"]  # fmt: skip
    with pytest.raises(ValueError, match="yours") as other:
        vcpu.run()
    assert not hasattr(other.value, "last_exits")
    scripted.on_pio(0x80, 1, native.Ignore())
    assert [e.address for e in run_out(vcpu).last_exits] == [None, 0x80]
    with pytest.raises(Error, match="closed") as unrelated:
        scripted.close() or vcpu.run()
    assert (unrelated.value.last_exits, unrelated.value.explain()) == ((), str(unrelated.value))


def test_an_error_keeps_the_exits_of_the_vcpu_it_came_from(scripted):
    """A handler that runs another vCPU lets its error pass."""
    inner = scripted.create_vcpu(1, [hlt()])
    inner.run()
    scripted.on_pio(0x80, 1, lambda vcpu, io: inner.run())
    outer = scripted.create_vcpu(0, [pio_out(0x80, b"x")])
    with pytest.raises(KvmError) as caught:
        outer.run()
    assert [e.reason for e in caught.value.last_exits] == [ExitReason.HLT]


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), Error("x")], ids=lambda error: type(error).__name__)
def test_on_request_whatever_leaves_run_says_what_came_before(scripted, monkeypatch, error):
    """In a note, which tracebacks show."""
    monkeypatch.setattr(errors, "show_last_exits", True)

    def handler(vcpu, io):
        raise error

    scripted.on_pio(0x80, 1, handler)
    with pytest.raises(type(error)) as caught:
        scripted.create_vcpu(3, [pio_out(0x80, b"x")]).run()
    [note] = caught.value.__notes__
    assert note.startswith("the last exits of vCPU 3:\nreason ")
    assert note.splitlines()[2].split() == ["IO", "0x0", "0x80", "0x1", "write", "error"]


# ---- as text ----


def test_statistics_as_text(scripted):
    """Counts of the classes there were, and times."""
    scripted.on_pio(0x80, 1, native.Ignore())
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x"), pio_out(0x80, b"x"), hlt()])
    vcpu.run()
    assert repr(vcpu.stats) == "<Stats of 3 exits>"
    assert str(vcpu.stats).splitlines()[:4] == [
        "exits  native  python  caller  race  error", "Io          2", "Hlt                         1", ""]  # fmt: skip
    timed = _stats.sorted_into_buckets([10] * 99 + [2000])
    assert str(timed).splitlines()[2:4] == [
        "time    samples     mean    p50    p99    p99.9      max", "kvm         100  29.9 ns  10 ns  10 ns  2.02 us  2.05 us"]  # fmt: skip
    assert repr(timed.kvm) == "<Histogram of 100: mean 29.9 ns, p50 10 ns, p99 10 ns, p99.9 2.02 us, max 2.05 us>"
    assert repr(timed.gil) == "<Histogram of 0>"


def test_rich_prints_two_tables(scripted, monkeypatch):
    """By a stand-in for what is used of rich: it need not be installed."""
    tables = []

    class Table:
        def __init__(self, *headings):
            self.rows = [list(headings)]
            tables.append(self.rows)

        def add_column(self, name, justify):
            self.rows[0].append(name)

        def add_row(self, *cells):
            self.rows.append(list(cells))

    console, table = types.ModuleType("rich.console"), types.ModuleType("rich.table")
    console.Group, table.Table = lambda *parts: parts, Table
    for name, module in (("rich", types.ModuleType("rich")), ("rich.console", console), ("rich.table", table)):
        monkeypatch.setitem(sys.modules, name, module)
    vcpu = scripted.create_vcpu(0, [hlt()])
    vcpu.run()
    assert len(vcpu.stats.__rich__()) == 2
    assert tables[0] == [["exits", *stats.OUTCOMES], ["Hlt", "", "", "1", "", ""]]
    assert [row[:2] for row in tables[1]] == [["time", "samples"], *[[name, "0"] for name in stats.PHASES]]


# ---- while vCPUs run ----

# Each exit says in its address and its rip which it is.
NUMBERED = [ScriptStep(6, mmio_write(PAGE * i, b"x").payload, rip=PAGE * i) for i in range(256)]


def test_readers_beside_running_vcpus(scripted):
    """Nobody sees a torn exit, or a count that goes down; with resets between, all the parts make up the whole."""
    exits = 256 * stress(400) * 10
    scripted.on_mmio(0, FOR_EVER, native.Ignore())
    vcpus = [scripted.create_vcpu(id, NUMBERED, repeat=exits // 256, keep=False) for id in range(2)]
    wrong = []
    looks = 0

    def read(vcpu):
        nonlocal looks
        seen = 0
        going = True
        while going and not wrong:
            going = threads[vcpu.id].is_alive()  # it may be through before we begin: one look at least
            last = vcpu.last_exits
            numbers = [e.address // PAGE for e in last]
            if [e for e in last if e.rip != e.address or e.size != 1 or e.reason is not ExitReason.MMIO]:
                wrong.append(last)
            if [b for a, b in pairwise(numbers) if b != (a + 1) % 256]:
                wrong.append(numbers)
            now = vcpu.stats
            if not seen <= now.exits <= exits or set(now.counts) - {(kvmexit.Mmio, "native")}:
                wrong.append((seen, now.counts))
            if now.kvm.count > exits + 1 or now.native.count > exits:
                wrong.append((now.kvm.count, now.native.count))
            seen = now.exits
            vcpu.timing = looks % 2 == 0
            looks += 1

    threads = [in_thread(lambda vcpu=vcpu: run_out(vcpu)) for vcpu in vcpus]
    readers = [in_thread(lambda vcpu=vcpu: read(vcpu)) for vcpu in vcpus]
    for thread in threads + readers:
        thread.join(100)
        assert not thread.is_alive()
    assert wrong == []
    assert looks
    assert scripted.stats.counts == {(kvmexit.Mmio, "native"): 2 * exits}


def test_no_torn_record_is_given_out(tmp_path_factory):
    """Reader and writer in C, so that the one is nearly always in the middle of it when the scheduler stops it."""
    recorder = ctypes.CDLL(str(compiled(tmp_path_factory, "flight_recorder")))
    recorder.write_exits.argtypes = [ctypes.c_uint64]
    recorder.read_exits.restype = ctypes.c_uint64
    assert recorder.start()
    thread = in_thread(lambda: recorder.write_exits(stress(50_000_000)))
    assert recorder.read_exits() == 0
    thread.join(30)


def test_resets_beside_a_running_vcpu(scripted):
    """What was counted before each reset, and after the last, is at least nearly all there was, and never more."""
    exits = 256 * stress(400) * 5
    scripted.on_mmio(0, FOR_EVER, native.Ignore())
    vcpu = scripted.create_vcpu(0, NUMBERED, repeat=exits // 256, keep=False)
    vcpu.timing = True
    thread = in_thread(lambda: run_out(vcpu))
    other = in_thread(lambda: [vcpu.stats for _ in range(50)])
    seen = 0
    while thread.is_alive():
        seen += vcpu.stats.exits
        vcpu.reset_stats()
    assert seen + vcpu.stats.exits <= exits
    other.join(30)
    before = vcpu.stats
    vcpu.reset_stats()
    assert (before.kvm.count >= before.exits, vcpu.stats == Stats()) == (True, True)


def test_a_vcpus_state_is_small():
    """At most 64 KiB beside the kernel's mapping (DESIGN: what thousands of vCPUs cost)."""
    assert 20_000 < sys.getsizeof(_stats.Recorder()) < 48 << 10


def test_the_layout_is_the_one_in_c():
    """stats.py and _stats.h count alike."""
    assert len(array.array("Q", _stats.sorted_into_buckets([])._words)) == stats._WORDS
    assert len(Stats().table) == len(stats.CLASSES)


# ---- a real guest ----


@pytest.mark.parametrize("who", ["native", "python", "caller"])
def test_a_guests_exits(vm, who):
    """Each is counted, timed, and kept with the address that the handler sees, too."""
    exits, rips = 200, []
    if who == "native":
        counter = native.Counter()
        vm.on_pio(0x80, 1, native.Ignore())
        vm.on_pio(0x80, 1, counter)
    elif who == "python":
        vm.on_pio(0x80, 1, lambda vcpu, io: rips.append(vcpu.regs.rip) or (STOP if len(rips) > exits else None))
    vcpu = load(vm, OUT_FOREVER)
    vm.timing = True
    if who == "native":
        thread = in_thread(vcpu.run)
        while vcpu.stats.exits < exits:
            time.sleep(0)
        vcpu.kick()
        thread.join(30)
        exits = counter.writes
    else:
        for _ in range(exits if who == "caller" else 1):
            vcpu.run()
            rips.append(vcpu.regs.rip)
    taken = vcpu.stats
    assert taken.counts.pop((kvmexit.Io, who)) == exits
    assert taken.kvm.count >= exits
    assert taken.kvm.percentile(1) > 0
    last = vcpu.last_exits
    assert len(last) == 64
    assert {(e.reason, e.address, e.size, e.is_write) for e in last} == {(ExitReason.IO, 0x80, 1, True)}
    assert {e.rip for e in last} <= {CODE, CODE + 2}
    assert who == "native" or {e.rip for e in last} <= set(rips)


def test_a_kick_is_no_exit(vm):
    """But an entry."""
    vcpu = load(vm, OUT_FOREVER)
    vcpu.timing = True
    vcpu.kick()
    assert isinstance(vcpu.run(), kvmexit.Interrupted)
    assert (vcpu.stats.exits, vcpu.stats.kvm.count, vcpu.last_exits) == (0, 1, [])


def test_a_scripted_vms_statistics_need_no_kvm():
    """Nor a clock that was never asked for: nothing waits for its calibration."""
    with ScriptedVM() as vm:
        vcpu = vm.create_vcpu(0, [hlt()])
        vcpu.run()
        assert vcpu.stats._ns_per_tick == 1.0
