"""benchmarks/workloads in miniature: every way gives the reference's answers, and a wrong one is noticed."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvmexit import native
from kvmexit.bench.cells import WAYS

WORKLOADS = Path(__file__).parent.parent / "benchmarks" / "workloads"
sys.path.insert(0, str(WORKLOADS))
boot_conversions, mmio, serial, storm, ways = map(
    importlib.import_module, ("boot_conversions", "mmio", "serial", "storm", "ways"))
spec = importlib.util.spec_from_file_location("workloads", WORKLOADS / "__main__.py")
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
sys.path.remove(str(WORKLOADS))

SHARE = 0.004
FOUR = tuple(WAYS.values())


@pytest.fixture
def scripted(monkeypatch):
    """No private memory, whatever this machine has."""
    for module in (boot_conversions, storm):
        monkeypatch.setattr(module, "no_private_memory", lambda: "a test says so")


def once(workload, name):
    """One way, once; -> its exits."""
    seconds, exits = workload.ways[name]()
    assert seconds > 0
    return exits


def job_of(workload):
    return workload.ways["kvmexit, native"].args[1]


# ---- the workloads ----


def test_the_serial_console_is_as_a_real_one_s():
    """32,018 exits, 31,643 of them polls and bytes; the same text each time."""
    workload = serial.make()
    job = job_of(workload)
    sends = [step for step in job.steps if step.do == "send"]
    assert (workload.units, job.exits, len(job.text)) == (32_018, 32_018, 15_821)
    assert 2 * sum(step.value for step in sends) + 1 == 31_643
    assert len(job.steps) - len(sends) == 375 + 1  # and one more poll
    assert job == job_of(serial.make())
    assert 200 < len(job.text.splitlines()) < 400


def test_a_boot_s_conversions(scripted):
    """Mostly small, some large, both directions, some touching, some refused."""
    steps = [step for step in job_of(boot_conversions.make()).steps if step.do == "call"]
    pages = [step.value & 0xFFFF_FFFF for step in steps]
    assert len(steps) == 5000
    assert sum(size < 8 for size in pages) > 4900
    assert sum(size >= 512 for size in pages) == 30
    assert 1000 < sum(step.value >> 32 == 0 for step in steps) < 3000
    assert sum(step.answer != 0 for step in steps) == 8
    assert sum(one.address + size * 4096 == other.address for one, other, size in zip(steps, steps[1:], pages, strict=False)) > 1000


def test_mmio_is_over_1_000_ranges():
    job = job_of(mmio.make())
    assert len({device.value for device in job.ranges}) == len(job.ranges) == 1000
    assert all(one.base + one.size <= other.base for one, other in zip(job.ranges, job.ranges[1:], strict=False))
    assert all(reads and writes for reads, writes in job.counts)


# ---- right answers ----


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("make", [serial.make, mmio.make], ids=["serial", "mmio"])
def test_on_kvm(kvm, make, name):
    workload = make(SHARE)
    assert once(workload, name) == workload.units


@pytest.mark.parametrize("name", FOUR)
def test_conversions_of_a_real_guest(private_vm, name):
    workload = boot_conversions.make(SHARE)
    assert once(workload, name) == workload.units
    assert "KVM" in workload.on


def test_a_storm_of_a_real_guest(private_vm):
    workload = storm.make(0.1)
    assert [once(workload, name) - 1 for name in workload.ways] == [819, 2, 11, 819, 0]


def test_conversions_of_a_script(scripted):
    workload = boot_conversions.make(SHARE)
    assert [once(workload, name) for name in FOUR[1:3]] == [workload.units] * 2
    assert workload.ways[FOUR[0]] == workload.ways[FOUR[3]] == "there is no KVM_RUN in a script"
    assert "a test says so" in workload.on


def test_a_storm_of_a_script(scripted):
    workload = storm.make(0.5)
    assert [once(workload, name) - 1 for name in list(workload.ways)[:4]] == [4096, 8, 17, 4096]


# ---- wrong ones ----


@pytest.mark.parametrize("name", FOUR)
def test_a_wrong_constant_is_noticed(kvm, name):
    way, job = mmio.make(SHARE).ways[name].args
    broken = [device._replace(value=device.value ^ 1 << 31) if i == 1 else device for i, device in enumerate(job.ranges)]
    with pytest.raises(ways.Wrong, match="what the guest read: number"):
        ways.run(way, replace(job, ranges=broken))


@pytest.mark.parametrize("name", FOUR)
def test_a_write_that_another_range_takes_is_noticed(kvm, name):
    way, job = mmio.make(SHARE).ways[name].args
    device = job.ranges[-1]
    at = next(i for i, step in enumerate(job.steps) if step.do == "write" and step.address < device.base)
    elsewhere = [*job.steps[:at], job.steps[at]._replace(address=device.base), *job.steps[at + 1 :]]
    with pytest.raises(ways.Wrong, match="accesses of a device: number"):
        ways.run(way, replace(job, steps=elsewhere))


@pytest.mark.parametrize("name", FOUR[2:])
def test_a_byte_that_is_lost_is_noticed(kvm, monkeypatch, name):
    right = ways.Serial.write

    def write(self, offset, value):
        if value != ord("]"):
            right(self, offset, value)

    monkeypatch.setattr(ways.Serial, "write", write)
    with pytest.raises(ways.Wrong, match="serial port"):
        once(serial.make(SHARE), name)


def test_a_console_that_is_not_there_is_noticed(kvm, monkeypatch):
    monkeypatch.setattr(native, "Serial16550", lambda fd: native.Ignore(0x60))
    with pytest.raises(ways.Wrong, match="what the guest read"):  # LCR, before it sends
        once(serial.make(SHARE), "kvmexit, native")


@pytest.mark.parametrize("name", FOUR)
def test_an_exit_too_many_is_noticed(kvm, name):
    way, job = serial.make(SHARE).ways[name].args
    with pytest.raises(ways.Wrong, match="exits"):
        ways.run(way, replace(job, exits=job.exits - 1))


def test_a_conversion_that_is_not_done_is_noticed(scripted, monkeypatch):
    workload = boot_conversions.make(SHARE)
    monkeypatch.setattr(ways.handlers, "map_gpa_range", lambda vcpu, hypercall: 0)
    with pytest.raises(ways.Wrong, match="what the guest read"):  # those that have to be refused
        once(workload, "kvmexit, Python")
    way, job = workload.ways["kvmexit, Python"].args
    steps = [step for step in job.steps if not step.answer]
    with pytest.raises(ways.Wrong, match="what is private"):
        ways.run(way, replace(job, steps=steps, exits=len(steps)))


@pytest.mark.parametrize("name", ["C loop", "kvmexit, Python", "Python ioctl loop"])
def test_a_conversion_that_a_real_guest_does_not_see_is_noticed(private_vm, monkeypatch, name):
    way, job = boot_conversions.make(SHARE).ways[name].args
    steps = [step._replace(value=step.value & 0xFFFF_FFFF) if step.do == "call" else step for step in job.steps]
    with pytest.raises(ways.Wrong, match="what the guest read"):
        ways.run(way, replace(job, steps=steps))


@pytest.mark.parametrize(("options", "what"), [({"window": 8192}, "faults, duplicates"), ({"gpa": 0, "size": 4096}, "end")])
def test_a_storm_that_converts_something_else_is_noticed(scripted, monkeypatch, options, what):
    right = native.Convert
    monkeypatch.setattr(native, "Convert", lambda vm, **_: right(vm, **options))
    with pytest.raises(ways.Wrong, match=what):
        once(storm.make(SHARE), "page at a time")


# ---- the program ----


def test_the_program_says_what_it_measured(scripted, tmp_path, capsys):
    result = tmp_path / "result.json"
    assert program.main(["--share", str(SHARE), "--rounds", "6", "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    made = json.loads(result.read_text())
    assert list(made["workloads"]) == list(program.NAMES)
    assert made["machine"]["cpu"] in printed
    for name, workload in made["workloads"].items():
        assert f"\n{name}: {workload['title']}; on {workload['on']}\n" in printed
        for way, figures in workload["ways"].items():
            [line] = [line for line in printed.split(f"\n{name}: ")[1].splitlines() if line.startswith(way)][:1]
            if "skipped" in figures:
                assert line.endswith(f"skipped: {figures['skipped']}")
                continue
            assert (len(figures["us"]), max(figures["us"])) == (6, figures["max"])
            assert figures["interval"][0] <= figures["to_control"] <= figures["interval"][1]
            assert ("(" in line) == (way != workload["control"])


def test_the_program_fails_where_an_answer_is_wrong(kvm, monkeypatch, capsys):
    monkeypatch.setattr(ways.Serial, "read", lambda self, offset: 0x20)
    assert program.main(["--share", str(SHARE), "--rounds", "1", "--only", "serial"]) == 1
    assert "serial: a wrong answer: what the guest read" in capsys.readouterr().err


def test_without_kvm_it_says_why_not(monkeypatch, capsys):
    monkeypatch.setattr(ways, "DEVICE", "/nowhere/kvm")
    assert program.main(["--share", str(SHARE), "--rounds", "1", "--only", "mmio"]) == 0
    assert capsys.readouterr().out.count("skipped: ") == 4


@pytest.mark.parametrize("arguments", [["--only", "disk"], ["--rounds", "0"], ["--share", "0"], ["--share", "2"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert capsys.readouterr().err
