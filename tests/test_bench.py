"""`kvmexit bench`: measured on real guests; results made up for what is made of them."""

import _thread
import copy
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from array import array
from contextlib import ExitStack
from pathlib import Path

import pytest
from guests import OUT_FOREVER, SPIN, load
from processes import in_thread, python

import kvmexit
from kvmexit import bench, native
from kvmexit._bench import EntryTimes, Gate, Kicker, clock_cost, time_calls, time_floor, time_native
from kvmexit.bench import cells, compare, figures, measure, report
from kvmexit.bench.machine import describe
from kvmexit.cli import main
from kvmexit.testing import hlt

SCHEMA = json.loads((Path(bench.__file__).parent / "schema.json").read_text())
DRAWN = importlib.util.find_spec("matplotlib") and importlib.util.find_spec("hdrh") and importlib.util.find_spec("rich")
needs_extra = pytest.mark.skipif(not DRAWN, reason="kvmexit[bench] is not installed")


def wrong(value, schema=SCHEMA, at="result"):
    """Where a value is not as a JSON schema wants it, for as much of the language as schema.json uses; -> [what]."""
    while "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    assert set(schema) <= {"$schema", "$defs", "title", "description", "type", "required", "additionalProperties", "properties",
                           "const", "enum", "minimum", "items", "minItems", "maxItems"}
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
             "null": type(None)}
    allowed = schema.get("type", [])
    allowed = [allowed] if isinstance(allowed, str) else allowed
    if allowed and not any(isinstance(value, types[name]) and (name == "boolean" or not isinstance(value, bool)) for name in allowed):
        return [f"{at}: {value!r:.80} is no {allowed}"]
    found = []
    if value != schema.get("const", value) or value not in schema.get("enum", [value]):
        found.append(f"{at}: {value!r:.80}")
    if isinstance(value, (int, float)) and value < schema.get("minimum", value):
        found.append(f"{at}: {value} is too small")
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{at}.{name} is missing" for name in schema.get("required", []) if name not in value]
        for name, member in value.items():
            if name in known or isinstance(more, dict):
                found += wrong(member, known.get(name, more), f"{at}.{name}")
            elif more is False:
                found.append(f"{at}.{name} is unknown")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{at} has {len(value)} items")
        for i, item in enumerate(value):
            found += wrong(item, schema.get("items", {}), f"{at}[{i}]")
    return found


def made_up(seed=0, rounds=120, factors=None, slower=1.0):
    """-> a result such as measure() gives, of two cells and one that cannot be done; factor: of each way to the C loop."""
    generator = random.Random(seed)
    factors = {"floor": 1.0, "native": 1.02, "python": 1.3, "loop": 1.5} | (factors or {})
    made = []
    for cell in (cells.Cell("pio_out", 0, 1), cells.Cell("mmio_read", 1, 2)):
        taken = {way: {} for way in factors}
        for number in range(rounds):
            drift = slower * (1 + 0.5 * (number // 10 % 2))  # the clock's, in steps
            for way, factor in factors.items():
                taken[way][number] = array("Q", (int(20_000 * factor * drift * generator.lognormvariate(0, 0.1)) for _ in range(100)))
        splits = {"native": {"kvm": 20_000.0, "native": 30.0, "gil": 0.0, "python": 0.0}}
        made.append(measure.result_of(cell) | {"ways": measure.figures(taken, splits, cell.vcpus)})
    made.append(measure.result_of(cells.Cell("hypercall", 0, 1)) | {"impossible": "the guest's <instruction> does not exit"})
    return {"format": 1, "kvmexit": kvmexit.__version__, "began": "2026-11-26T01:02:03+00:00", "interrupted": False, "seconds_a_cell": 8.0,
            "warm_up": 4, "machine": describe("/dev/kvm"), "cells": made, "seconds": 60.0}


@pytest.fixture(scope="module")
def result():
    return made_up()


def command(*arguments, **options):
    """Run `kvmexit bench` in a process of its own; -> CompletedProcess."""
    return subprocess.run([sys.executable, "-m", "kvmexit", "bench", *arguments], capture_output=True, text=True, check=False, timeout=100,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, **options)


# ---- on real guests ----


@pytest.fixture(scope="module")
def measured(kvm, tmp_path_factory):
    """-> (CompletedProcess, result) of a run with an exit, a fault and a call of each kind."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    names = ["pio_out/idle/1", "mmio_read/busy1/1", "memory_fault/idle/1", "conversion/idle/1", "kick/idle/1", "no_entry/idle/1"]
    done = command("--quick", "--seconds", "0.3", "--json", str(path), *(f"--only={name}" for name in names))
    assert done.returncode == 0, done.stderr
    return done, json.loads(path.read_text())


def test_a_result_is_as_the_schema_says(measured):
    assert wrong(measured[1]) == []
    assert sorted(cell["name"] for cell in measured[1]["cells"]) == sorted(set(measured[0].stderr.split()))  # the progress


def test_every_cell_has_every_way_or_a_reason(measured):
    """And percentiles that are in order; p99.9 only from 10,000 samples on."""
    for cell in measured[1]["cells"]:
        assert bool(cell["impossible"]) != bool(cell["ways"]), cell["name"]
        assert set(cell["ways"]) in (set(), set(cells.WAYS))
        for own in cell["ways"].values():
            assert 0 < own["p50"] <= own["p90"] <= own["p99"] <= own["max"]
            assert (own["p999"] is None) == (own["samples"] < 10_000)
            assert own["samples"] == sum(count for _, count in own["histogram"])
            assert own["per_second"] > 0
    assert any(cell["name"] == "pio_out/idle/1" and cell["ways"] for cell in measured[1]["cells"])


def test_turns_are_paired_and_of_one_length(measured):
    """Each way's are among the C loop's rounds, each with what the cell says a turn has."""
    for cell in measured[1]["cells"]:
        floor = {turn[0] for turn in cell["ways"]["floor"]["turns"]} if cell["ways"] else set()
        for own in cell["ways"].values():
            assert {turn[0] for turn in own["turns"]} <= floor
            assert own["samples"] == len(own["turns"]) * cell["exits_a_turn"] * cell["vcpus"]


def test_the_table_names_what_was_measured(measured):
    done, result = measured
    for text in (*cells.WAYS.values(), *report.COLUMNS, *(cell["name"] for cell in result["cells"]), result["machine"]["kernel"]):
        assert text in done.stdout
    for cell in result["cells"]:
        assert cell["impossible"] in done.stdout


def test_time_is_split_where_kvmexit_runs(measured):
    """Without Python in a native handler's."""
    ways = next(cell["ways"] for cell in measured[1]["cells"] if cell["name"] == "pio_out/idle/1")
    assert (ways["floor"]["split"], ways["loop"]["split"]) == (None, None)
    assert ways["native"]["split"]["python"] == ways["native"]["split"]["gil"] == 0 < ways["native"]["split"]["native"]
    assert ways["python"]["split"]["python"] > 0


@pytest.mark.parametrize("way", ["floor", "native", "python", "loop"])
@pytest.mark.parametrize("kind", ["pio_out", "pio_in", "mmio_write", "mmio_read", "memory_fault"])
def test_a_turn_has_the_samples_it_was_asked_for(kvm, kind, way):
    """Turn after turn, and kvmexit counts as many exits, with the one that is answered after the kick."""
    with measure.ExitStack() as stack:
        try:
            subject = cells.set_up(stack, cells.Cell(kind, 0, 1), way, "/dev/kvm")
        except cells.Impossible:
            if kind != "memory_fault":
                raise
            pytest.skip("this kernel has no guest_memfd")
        before = subject.vm.stats.exits
        assert [len(subject.turn(0, exits)) for exits in (1, 50, 7)] == [1, 50, 7]
        assert subject.vm.stats.exits - before == (58 + 3 if way in ("native", "python") else 0)
        subject.cancel()
        assert len(subject.turn(0, 100)) == 0


@pytest.mark.parametrize("way", ["floor", "native"])
def test_an_entry_that_a_signal_ends_is_no_sample(kvm, way):
    """It goes on with the next: as many exits as samples, and the one after the last where no signal came first."""
    with measure.ExitStack() as stack:
        subject, made = cells.set_up(stack, cells.Cell("pio_out", 0, 1), way, "/dev/kvm"), []
        before, entered = subject.vm.stats.exits, subject.cpus[0].retries["eintr"]
        done, leave = threading.Event(), threading.Event()

        def turn():
            try:
                made.append(subject.turn(0, 20_000))
            finally:
                done.set()
                leave.wait()  # a thread that has ended gets no signal

        thread = in_thread(turn)
        while not done.wait(0.002):
            signal.pthread_kill(thread.ident, kvmexit.KICK_SIGNAL)
        leave.set()
        thread.join()
        assert len(made[0]) == 20_000
        if way == "native":
            assert subject.cpus[0].retries["eintr"] > entered
            assert 20_000 <= subject.vm.stats.exits - before <= 20_001


def test_vcpus_exit_at_once(kvm):
    """None of them makes its second entry before all have made their first."""
    with measure.ExitStack() as stack, measure.ThreadPoolExecutor(2) as pool:
        subject = cells.set_up(stack, cells.Cell("pio_out", 0, 2), "native", "/dev/kvm")
        gate = Gate(2)
        first = pool.submit(subject.turn, 0, 20, gate)
        with pytest.raises(TimeoutError):
            first.result(0.05)
        assert len(pool.submit(subject.turn, 1, 20, gate).result(60)) == 20
        assert len(first.result(60)) == 20


def test_cancelled_at_the_gate(kvm):
    with measure.ExitStack() as stack, measure.ThreadPoolExecutor(1) as pool:
        subject = cells.set_up(stack, cells.Cell("pio_out", 0, 2), "floor", "/dev/kvm")
        waiting = pool.submit(subject.turn, 0, 20, Gate(2))
        subject.cancel()
        assert len(waiting.result(60)) <= 1


@pytest.mark.parametrize("way", cells.WAYS)
def test_a_signal_is_no_kick(vm, way):
    """KVM_RUN that another signal ends is entered again; or the kick would have come after the return, in 0 ns."""
    with ExitStack() as stack:
        kicks = cells.set_up(stack, cells.Cell("kick", 0, 1), way, "/dev/kvm")
        before = signal.signal(signal.SIGALRM, lambda number, frame: None)
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        try:
            times = kicks.turn(0, 30)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert len(times) == 30
    assert min(times) > 0


@pytest.mark.parametrize("natively", [False, True])
def test_kicks_are_timed(vm, natively):
    """As many as were asked for; each ended a run."""
    vcpu = load(vm, SPIN)
    vcpu.run(timeout=0)
    kicker = Kicker(vcpu, natively)
    thread = in_thread(kicker.serve)
    times = (time_native if natively else time_floor)(vcpu, 30, kicker)
    if natively:
        said = []
        times += time_calls(lambda: said.append(vcpu.run().cause), 30, kicker)
        assert said == ["kick"] * 30
    kicker.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert len(times) == (60 if natively else 30)
    assert min(times) > 0


def test_the_c_loop_refuses_what_it_does_not_know(vm):
    vcpu = load(vm, bytes.fromhex("f4"), cpl=0)  # hlt
    vcpu.run(timeout=0)
    times = EntryTimes(vcpu)
    times.begin(10)
    with pytest.raises(RuntimeError, match=r"exit reason \d+ in the C loop"):
        times.floor()


def test_what_is_timed_is_a_vcpu_of_kvm_once(vm, scripted):
    vcpu = load(vm, OUT_FOREVER)
    times = EntryTimes(vcpu)
    with pytest.raises(ValueError, match="timed already"):
        EntryTimes(vcpu)
    with pytest.raises(ValueError, match="no vCPU of KVM"):
        EntryTimes(scripted.create_vcpu(0, [hlt()]))
    with pytest.raises(ValueError, match="KVM_RUN, and nothing else"):
        times.ioctl(0, 0xAE80)


def test_a_handler_that_fails_ends_the_turn(vm):
    """And not the next one."""
    vcpu, times = load(vm, OUT_FOREVER), None
    assert vcpu.run().port == 0x80
    times = EntryTimes(vcpu)
    times.begin(100)
    with vm.on_pio(0x80, 1, lambda vcpu, exit: 1 / 0), pytest.raises(ZeroDivisionError):
        vcpu.run()
    with vm.on_pio(0x80, 1, native.Ignore()):
        times.begin(100)
        assert vcpu.run().cause == "kick"
    assert len(times.intervals()) == 100


# ---- ended early ----


@pytest.mark.parametrize("name", ["pio_out/idle/1", "pio_out/busy1/2", "kick/busy1/1"])
def test_interrupted_it_leaves_nothing_behind(kvm, name):
    """And gives what it has."""
    before, calls = set(threading.enumerate()), 0

    def tick(done, text):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    chosen = [cell for cell in cells.FULL if cell.name == name] or [cells.Cell("pio_out", 1, 2)]
    result = measure.measure(chosen, 60.0, "/dev/kvm", tick)
    assert set(threading.enumerate()) == before
    assert result["interrupted"]
    assert wrong(result) == []
    assert result["cells"][0]["ways"]["floor"]["samples"] > 0


class Stuck(cells.Subject):
    """Does as it is told, which is to fail on its second vCPU; else it is stuck until it is cancelled."""

    def __init__(self, fail):
        self.fail, self.cancelled = fail, threading.Event()

    def turn(self, vcpu, exits, gate=None):
        if vcpu == 1:
            self.fail()
        assert self.cancelled.wait(60)
        return array("Q")

    def cancel(self):
        self.cancelled.set()


def test_a_vcpu_that_fails_ends_the_others():
    def fail():
        raise OSError("failed")

    with measure.ThreadPoolExecutor(2) as pool, pytest.raises(OSError, match="failed"):
        measure.turn(pool, Stuck(fail), 2, 10)


def test_ctrl_c_in_the_middle_of_a_turn(monkeypatch):
    """Ends it."""
    monkeypatch.setattr(measure, "set_up", lambda *arguments: Stuck(_thread.interrupt_main))
    with pytest.raises(KeyboardInterrupt):
        measure.measure_cell(cells.Cell("pio_out", 1, 2), 60.0, "/dev/kvm", measure.result_of(cells.SHORT[0]), lambda done: None)


def test_ctrl_c(kvm, tmp_path):
    """The process says what it has measured, and ends with status 1."""
    path = tmp_path / "result.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "kvmexit", "bench", "--only=pio_out/busy1/1", "--only=pio_out/idle/1", "--seconds=0.5", "--json", path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    with process:
        assert process.stderr.readline() == "pio_out/idle/1\n"
        assert process.stderr.readline() == "pio_out/busy1/1\n"  # the first one is complete
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=100)
    assert process.returncode == 1, errors
    assert "interrupted: this is what was measured by then" in said
    result = json.loads(path.read_text())
    assert result["interrupted"]
    assert set(result["cells"][0]["ways"]) == set(cells.WAYS)


# ---- what it refuses ----


def test_no_kvm(tmp_path, capsys):
    """Status 2 with the reason, and nothing is measured or written."""
    path = tmp_path / "result.json"
    assert main(["bench", "--quick", "--device", str(tmp_path / "kvm"), "--json", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert str(tmp_path / "kvm") in said.err
    assert not path.exists()


@pytest.mark.parametrize(("arguments", "why"), [
    (["--only", "pio_uot"], "no cell is called 'pio_uot': they are pio_out/idle/1, "),
    (["--seconds", "0"], "0 is no time"),
    (["--json", "/nonexistent/result.json"], "there is no folder /nonexistent"),
    (["--load", "/nonexistent/result.json"], "No such file"),
    (["--load", __file__], "test_bench.py: "),
    (["--quick", "--full"], "not allowed with"),
])
def test_wrong_usage(arguments, why, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_a_result_of_another_format(tmp_path, capsys, result):
    (tmp_path / "a.json").write_text(json.dumps(result | {"format": 2}))
    with pytest.raises(SystemExit):
        main(["bench", "--load", str(tmp_path / "a.json")])
    assert "format 1" in capsys.readouterr().err


WITHOUT = """
import sys
for name in ("rich", "matplotlib", "hdrh", "numpy"):
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("rich", "matplotlib", "hdrh") else find(name, *a)
from kvmexit.cli import main
sys.exit(main(["bench", *{arguments}]))
"""


def test_reports_say_what_they_need(tmp_path, result):
    """Before anything is measured."""
    (tmp_path / "a.json").write_text(json.dumps(result))
    done = python(WITHOUT.replace("{arguments}", repr(["--load", str(tmp_path / "a.json"), "--report", str(tmp_path / "report")])))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--report needs rich, matplotlib, hdrhistogram: pip install 'kvmexit[bench]'" in done.stderr
    assert not (tmp_path / "report").exists()


def test_all_else_works_without_them(tmp_path, result):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    for arguments in (["--load", str(tmp_path / "a.json")], ["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]):
        done = python(WITHOUT.replace("{arguments}", repr(arguments)))
        assert (done.returncode, done.stderr) == (0, "")
        assert "kvmexit, native" in done.stdout


# ---- which cells ----


def test_the_short_grid_is_part_of_the_whole():
    """Three kinds, idle and beside one thread, on one vCPU; and the whole has every kind beside up to two."""
    assert cells.chosen(False, None) == list(cells.SHORT)
    assert set(cells.SHORT) < set(cells.FULL)
    assert {(cell.kind, cell.busy) for cell in cells.FULL} == {
        (kind, busy) for kind in (*cells.KINDS, *cells.CALLS) for busy in (0, 1, 2)}
    assert len({cell.name for cell in cells.FULL}) == len(cells.FULL)


def test_patterns():
    def names(full, *only):
        return [cell.name for cell in cells.chosen(full, list(only))]

    assert names(False, "kick") == ["kick/idle/1", "kick/busy1/1"]
    assert names(True, "kick") == ["kick/idle/1", "kick/busy1/1", "kick/busy2/1"]
    assert names(False, "mmio_*/idle/1", "pio_out/busy2/1") == ["pio_out/busy2/1", "mmio_write/idle/1", "mmio_read/idle/1"]
    with pytest.raises(ValueError, match="no cell is called 'nothing'"):
        names(False, "kick", "nothing")


# ---- figures ----


def test_percentiles():
    assert [figures.percentile(range(1, 101), p) for p in (0, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert figures.percentile([7], 99.9) == 7


def test_histograms_are_within_a_256th():
    samples = [random.Random(i).randrange(1, 1 << 40) for i in range(1000)] + [5, 5, 0]
    made = figures.histogram(samples)
    assert made == sorted(made)
    assert sum(count for _, count in made) == 1003
    assert [0, 1] in made
    assert [5, 2] in made
    for ns, below in zip(sorted(samples), (ns for ns, count in made for _ in range(count)), strict=True):
        assert below <= ns <= below * (1 + 1 / 128)


def test_the_medians_interval():
    """Ranks as statistical tables have them: of 10 the 2nd to the 9th, of 100 the 40th to the 61st; of 5 there is none."""
    assert figures.median_interval(range(1, 6)) is None
    assert figures.median_interval(range(1, 7)) == (3.5, 1, 6)
    assert figures.median_interval(range(1, 11)) == (5.5, 2, 9)
    assert figures.median_interval(range(1, 101)) == (50.5, 40, 61)
    assert figures.median_interval(range(1, 5001))[1] > 2400  # and it is no matter of floating point


def test_the_medians_interval_covers():
    """The true one in about 95 of 100, and not in all."""
    generator = random.Random(1)
    hits = 0
    for _ in range(1000):
        _, low, high = figures.median_interval([generator.gauss(0, 1) for _ in range(30)])
        hits += low <= 0 <= high
    assert 930 <= hits <= 995


def test_ratios_of_percentiles():
    """A planted factor is found, and lies in its interval, whatever the machine's clock does from round to round."""
    generator = random.Random(2)
    rounds = []
    for number in range(60):
        drift = 1 + number % 2
        rounds.append([[int(f * drift * 1000 * generator.lognormvariate(0, 0.3)) for _ in range(200)] for f in (1.25, 1)])
    middle, low, high = figures.quantile_ratio(rounds, 99)
    assert low < 1.25 < high
    assert 1.1 < low < middle < high < 1.4
    assert figures.quantile_ratio(rounds[:5], 99) is None


def test_mann_whitney():
    """As scipy.stats.mannwhitneyu(a, b, method="asymptotic") says; no difference; and the sign of the effect."""
    p, delta = figures.mann_whitney([1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8, 9])
    assert p == pytest.approx(0.03638, abs=1e-5)
    assert delta == pytest.approx(0.75)
    assert figures.mann_whitney([1, 2, 3] * 5, [1, 2, 3] * 5) == (1.0, 0.0)
    assert figures.mann_whitney([5] * 8, [5] * 8) == (1.0, 0.0)
    assert figures.mann_whitney([2] * 9, [1] * 9)[1] == -1


def test_holm():
    assert figures.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert figures.holm([0.6, 0.9]) == [1.0, 1.0]
    assert figures.holm([]) == []


# ---- what is made of a result ----


def test_results_made_up_here_are_results(result):
    assert wrong(result) == []
    native_ = result["cells"][0]["ways"]["native"]
    assert native_["p50_to_floor"][1] <= 1.02 <= native_["p50_to_floor"][2]
    assert native_["p999"] is not None


@pytest.mark.parametrize("break_", [
    lambda r: r.pop("machine"),
    lambda r: r.update(more=1),
    lambda r: r["cells"][0]["ways"]["floor"].update(p50="1"),
    lambda r: r["cells"][0]["ways"]["floor"].update(max=-1),
    lambda r: r["cells"][0]["ways"]["native"].update(p50_to_floor=[1.0]),
    lambda r: r["cells"][0].update(kind="pio"),
    lambda r: r["cells"][0]["ways"].update(cffi={}),
    lambda r: r.update(interrupted=0),
])  # fmt: skip
def test_the_schema_refuses(result, break_):
    broken = copy.deepcopy(result)
    break_(broken)
    assert len(wrong(broken)) == 1


def test_compared_with_itself_nothing_differs(result):
    rows = compare.compare(result, result)
    assert len(rows) == 2 * 4 * 2
    assert {(row["verdict"], row["p"], row["delta"]) for row in rows} == {("no difference shown", 1.0, 0.0)}
    assert "no difference shown" in compare.as_text(result, result).splitlines()


def test_another_run_of_the_same_is_no_difference(result):
    assert {row["verdict"] for row in compare.compare(result, made_up(seed=1))} == {"no difference shown"}


def test_a_planted_slowdown_shows(result):
    """In the way that has it, with its size in the interval; in no other."""
    other = made_up(seed=1, factors={"native": 1.02 * 1.1})
    rows = compare.compare(result, other)
    for row in rows:
        assert row["verdict"] == ("slower" if row["way"] == "native" else "no difference shown"), row
    planted = [row for row in rows if row["way"] == "native"]
    assert all(row["difference"][1] < 0.1 < row["difference"][2] for row in planted)
    assert all(row["delta"] > 0.5 for row in planted)
    assert "4 of 16 differ" in compare.as_text(result, other)


def test_a_slower_machine_is_the_c_loops_matter(result):
    """The others are ratios to it."""
    rows = compare.compare(made_up(seed=1, slower=2.0), result)
    assert {(row["way"] == "floor", row["verdict"]) for row in rows} == {(True, "faster"), (False, "no difference shown")}


def test_too_few_turns_decide_nothing(result):
    rows = compare.compare(result, made_up(rounds=5, factors={"native": 5.0}))
    assert {row["verdict"] for row in rows} == {"too few turns"}
    compare.as_text(result, made_up(rounds=5))


def test_other_machines_are_named(result):
    other = copy.deepcopy(result)
    other["machine"]["kernel"] = "Linux 9.9"
    assert f"kernel: {result['machine']['kernel']} -> Linux 9.9" in compare.as_text(result, other)
    assert "no cell is in both" in compare.as_text(result, result | {"cells": []})


def test_loaded_it_is_shown(result, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(result))
    assert main(["bench", "--load", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    for text in ("cannot be done here: the guest's <instruction> does not exit", "pio_out/idle/1: OUT to a port, idle, 1 vCPU",
                 "mmio_read/busy1/2: MMIO read, beside one busy Python thread, 2 vCPUs", result["machine"]["python"]):
        assert text in said
    assert re.search(r"kvmexit, native +\d.*1\.0\d\d \(1\.0\d\d-1\.0\d\d\)", said)


def test_the_clock_is_read():
    assert len(clock_cost(100)) == 100
    assert describe("/dev/kvm")["clock_ns"] > 0


# ---- --report ----


@pytest.fixture(scope="module")
def folder(result, tmp_path_factory):
    pytest.importorskip("matplotlib", reason="kvmexit[bench] is not installed")
    made = tmp_path_factory.mktemp("report")
    (made / "a.json").write_text(json.dumps(result))
    assert main(["bench", "--load", str(made / "a.json"), "--report", str(made / "report")]) == 0
    return made / "report"


@needs_extra
def test_the_page_has_everything_and_loads_nothing(folder, result):
    page = (folder / "report.html").read_text()
    assert "http" not in page
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|@import|url\((?!#)", page)
    for text in (*cells.WAYS.values(), *report.COLUMNS[1:], "pio_out/idle/1", result["machine"]["kernel"], "What this machine cannot do",
                 "the guest&#x27;s &lt;instruction&gt; does not exit", report.interval(result["cells"][0]["ways"]["native"]["p99_to_floor"])):
        assert text in page, text
    assert page.count("<svg") == page.count("</svg>") == 4
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(names)


@needs_extra
def test_plots_are_files_too(folder):
    names = {"percentiles-pio_out-idle-1", "percentiles-mmio_read-busy1-2", "throughput", "split"}
    for suffix, begin in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        made = {path.stem: path.read_bytes() for path in (folder / "plots").glob(f"*{suffix}")}
        assert set(made) == names
        assert all(data.startswith(begin) for data in made.values())
    assert wrong(json.loads((folder / "result.json").read_text())) == []


@needs_extra
def test_histograms_are_read_back(folder, result):
    """By the package that others read them with: count, and percentiles within what the digits allow."""
    from hdrh.histogram import HdrHistogram
    from hdrh.log import HistogramLogReader

    reader, found = HistogramLogReader(str(folder / "histograms.hlog"), HdrHistogram(1, 3_600_000_000_000, 3)), {}
    while (histogram := reader.get_next_interval_histogram()) is not None:
        found[histogram.get_tag()] = histogram
    wanted = {f"{cell['name']}/{way}": own for cell in result["cells"] for way, own in cell["ways"].items()}
    assert set(found) == set(wanted)
    for tag, own in wanted.items():
        assert found[tag].get_total_count() == own["samples"]
        assert found[tag].get_value_at_percentile(99) == pytest.approx(own["p99"], rel=0.01)
    assert len(list((folder / "hgrm").iterdir())) == len(wanted)


@needs_extra
def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    """By rich, drawn only where it is told something: no thread of its own wants the GIL."""
    from kvmexit.cli.bench import Progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    before = threading.active_count()
    with Progress() as progress:
        progress.tick(0.5, "pio_out/idle/1")
        assert threading.active_count() == before
        assert progress.bar.tasks[0].percentage == 50
