"""`kvmexit trace` and `kvmexit decode`, and what a trace is exported to."""

import csv
import io
import json
import mmap
import struct
import subprocess
import sys
from itertools import pairwise

import pytest
from guests import load
from processes import off_main

import kvmexit
from kvmexit import export, native
from kvmexit.cli import main
from kvmexit.cli.decode import explain
from kvmexit.testing import ScriptedVM, ScriptStep, hlt, hypercall, memory_fault, mmio_read, pio_in, pio_out

# in/out by a handler of each kind; then what the caller takes
OUT_IN_OUT = bytes.fromhex("e6 80  e4 81  e6 82  eb fe")


@pytest.fixture
def recorded(tmp_path):
    """A trace of two vCPUs, each outcome among its records."""
    folder = tmp_path / "trace"
    with ScriptedVM() as vm, vm.record(folder):
        vm.on_pio(0x80, 1, native.Ignore())
        vm.on_pio(0x81, 1, lambda vcpu, io: 7)
        first = vm.create_vcpu(0, [pio_out(0x80, b"x"), pio_in(0x81), ScriptStep(errno=11), mmio_read(0x1000, 4), hlt()])
        off_main(first.run).data = b"abcd"  # a tick would be a record
        off_main(first.run)
        second = vm.create_vcpu(1, [hypercall(12, 0x5000), memory_fault(0x3000, private=True, rip=0x1234)])
        off_main(second.run).ret = 0
        off_main(second.run)
    return folder


def shown(capsys, *arguments):
    """-> what a command prints; it succeeds."""
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def rows(capsys, recorded, *arguments):
    """-> what --json prints."""
    return [json.loads(line) for line in shown(capsys, "trace", recorded, "--json", *arguments).splitlines()]


def test_a_line_a_return(capsys, recorded):
    lines = [line.split(None, 2) for line in shown(capsys, "trace", recorded).splitlines()]
    assert sorted(rest for _, _, rest in lines) == sorted([
        "vcpu 0   native   Io(port=0x80, size=1, count=1, is_write=True, data=b'x')",
        "vcpu 0   python   Io(port=0x81, size=1, count=1, is_write=False, data=b'\\x07')",
        "vcpu 0   retried  EAGAIN",
        "vcpu 0   caller   Mmio(gpa=0x1000, size=4, is_write=False, data=b'abcd')",
        "vcpu 0   caller   Hlt()",
        "vcpu 1   caller   Hypercall(nr=0xc, args=(20480, 0, 0, 0, 0, 0), ret=0)",
        "vcpu 1   caller   MemoryFault(gpa=0x3000, size=0x1000, private=True, flags=8, errno=14)",
    ])  # fmt: skip
    assert all(float(begin) >= 0 and float(us) >= 0 for begin, us, _ in lines)


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--exit", "io"], ["Io", "Io"]), (["--exit", "MEMORY_FAULT", "--exit", "Hlt"], ["Hlt", "MemoryFault"]),
        (["--range", "0x80:2"], ["Io", "Io"]), (["--range", "0x1000"], ["Mmio"]), (["--range", "129:1"], ["Io"]),
        (["--range", "0xfff:1"], []), (["--vcpu", "1"], ["Hypercall", "MemoryFault"]), (["--outcome", "native"], ["Io"]),
        (["--outcome", "retried"], ["EAGAIN"]), (["--time", "3600:"], []), (["--time", ":3600", "--vcpu", "0", "--exit", "Mmio"], ["Mmio"]),
    ],
)  # fmt: skip
def test_filters(capsys, recorded, arguments, left):
    assert sorted(row["exit"] for row in rows(capsys, recorded, *arguments)) == sorted(left)


def test_rows(capsys, recorded):
    by_exit = {(row["exit"], row["address"]): row for row in rows(capsys, recorded)}
    assert all(tuple(row) == export.COLUMNS for row in by_exit.values())
    out, read, mmio = by_exit["Io", 0x80], by_exit["Io", 0x81], by_exit["Mmio", 0x1000]
    assert (out["data"], out["answer"], out["is_write"], out["outcome"]) == ("78", None, True, "native")
    assert (read["data"], read["answer"], read["is_write"], read["outcome"]) == (None, "07", False, "python")
    assert (mmio["size"], mmio["answer"][:8]) == (4, b"abcd".hex())
    fault = by_exit["MemoryFault", 0x3000]
    assert (fault["private"], fault["size"], fault["errno"], fault["rip"]) == (True, 4096, 14, 0x1234)
    assert by_exit["EAGAIN", None]["errno"] == 11


def test_csv_is_the_same(capsys, recorded):
    table = list(csv.DictReader(io.StringIO(shown(capsys, "trace", recorded, "--csv"))))
    expected = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows(capsys, recorded)]
    assert table == expected


def test_perfetto(capsys, recorded):
    """A track a vCPU; a span in KVM for each return, and one from there to the next entry: they do not overlap."""
    events = json.loads(shown(capsys, "trace", recorded, "--perfetto"))["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"vCPU 0", "vCPU 1"}
    for vcpu, names in [(0, ["Io", "native", "Io", "python", "EAGAIN", "retried", "Mmio", "caller", "Hlt"]),
                        (1, ["Hypercall", "caller", "MemoryFault"])]:  # fmt: skip
        spans = sorted((e for e in events if e["ph"] == "X" and e["tid"] == vcpu), key=lambda e: (e["ts"], e["ts"] + e["dur"]))
        assert [span["name"] for span in spans] == names
        assert [span["cat"] for span in spans] == (["kvm", "userspace"] * 5)[: len(names)]
        for before, after in pairwise(spans):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.001


@pytest.mark.parametrize("registers", [False, True])
def test_perfetto_tells_the_wait_for_the_gil_from_the_handler(tmp_path, registers):
    """Where times are measured: native, the wait, Python, without a gap from KVM's return to the next entry."""
    with ScriptedVM() as vm:
        vm.timing = True
        vm.on_pio(0x80, 1, native.Ignore())
        vm.on_pio(0x81, 1, lambda vcpu, io: 7)
        vcpu = vm.create_vcpu(0, [pio_out(0x80, b"x"), pio_in(0x81), mmio_read(0x1000, 4), hlt()])
        with vcpu.record(tmp_path / "t", registers=registers):
            off_main(vcpu.run).data = b"abcd"
            off_main(vcpu.run)
    trace = kvmexit.load(tmp_path / "t")
    assert [record.waited_ns is not None for record in trace] == [False, False, True, True]  # each of the one before
    assert {record.registers is not None for record in trace} == {registers}
    spans = [event for event in export.events(trace) if event["ph"] == "X"]
    assert [(span["name"], span["cat"]) for span in spans] == [
        ("Io", "kvm"), ("native", "userspace"),
        ("Io", "kvm"), ("native", "native"), ("GIL wait", "gil"), ("python", "python"),
        ("Mmio", "kvm"), ("native", "native"), ("GIL wait", "gil"), ("caller", "python"), ("Hlt", "kvm")]  # fmt: skip
    for before, after in pairwise(spans):
        assert before["ts"] + before["dur"] == pytest.approx(after["ts"], abs=0.002)
    assert sum(span["dur"] for span in spans if span["cat"] == "gil") * 1000 == pytest.approx(
        sum(got - asked for asked, got in (record.waited_ns for record in trace if record.waited_ns)), abs=2)


def test_perfettos_spans_end_where_they_end_also_when_filtered(capsys, recorded):
    """What is left out takes no part of what is shown, and gives none."""
    whole = json.loads(shown(capsys, "trace", recorded, "--perfetto"))["traceEvents"]
    some = json.loads(shown(capsys, "trace", recorded, "--perfetto", "--outcome", "python"))["traceEvents"]
    spans = [event for event in some if event["ph"] == "X"]
    assert [span["name"] for span in spans] == ["Io", "python"]
    assert all(span in whole for span in spans)


def test_what_is_torn_is_said(capsys, recorded):
    path = recorded / "vcpu-1.trace"
    path.write_bytes(path.read_bytes()[:-16])
    assert main(["trace", str(path)]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert "vcpu-1.trace" in printed.err
    assert "torn" in printed.err


def test_a_damaged_time_hides_nothing(capsys, recorded):
    """Without --time all is shown, also what claims to be from before the trace began."""
    path = recorded / "vcpu-1.trace"
    data = bytearray(path.read_bytes())
    data[120 + 8 : 120 + 24] = struct.pack("<qq", 1, 2)
    path.write_bytes(data)
    assert len(shown(capsys, "trace", path).splitlines()) == 2
    assert len(shown(capsys, "trace", path, "--time", "0:").splitlines()) == 1


def test_what_is_no_trace(capsys, tmp_path):
    (tmp_path / "no.trace").write_bytes(b"MZ" * 100)
    assert main(["trace", str(tmp_path / "no.trace")]) == 2
    assert "no trace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "a trace is needed"), (["nowhere"], "nowhere"), (["x", "--exit", "nothing"], "no exit is called 'nothing'; there are"),
        (["x", "--range", "a:b"], "no FIRST:SIZE"), (["x", "--time", "soon"], "no FROM:TO"), (["--record", "folder"], "takes a folder and a script"),
    ],
)  # fmt: skip
def test_wrong_usage(capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        main(["trace", *arguments])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_a_reader_that_has_enough(recorded):
    """As `| head` does."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m kvmexit trace {recorded} | head -1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)


PROGRAM = """
import sys, kvmexit
from guests import load
from processes import off_main
with kvmexit.VM() as vm:
    vcpu = load(vm, bytes.fromhex(sys.argv[1]))
    vm.on_pio(0x80, 1, lambda vcpu, io: None)
    vm.on_pio(0x81, 1, lambda vcpu, io: 7)
    assert vcpu.run().port == 0x82
    assert vcpu.run(timeout=0.02).cause == "timeout"
sys.exit(3)
"""


def test_a_programs_guest_is_recorded(vm, tmp_path, monkeypatch):
    """The program notices nothing: its arguments, its exit status; afterwards kvmexit.VM is what it was."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    original, argv = kvmexit.VM, sys.argv
    assert main(["trace", "--record", str(tmp_path / "out"), str(script), OUT_IN_OUT.hex()]) == 3
    assert (kvmexit.VM, sys.argv) == (original, argv)
    trace = kvmexit.load(tmp_path / "out" / "vm-0")
    assert trace.closed
    exits = [record.exit for record in trace[:3]]
    assert [exit.port for exit in exits] == [0x80, 0x81, 0x82]
    assert exits[1].data == exits[2].data == b"\x07"
    assert trace[-1].outcome == "timeout"


# ---- decode ----


def page(reason, payload, data=b"", flags=0):
    """A kvm_run page, its PIO data behind it."""
    made = bytearray(8192)
    struct.pack_into("<I", made, 8, reason)
    struct.pack_into("<H", made, 14, flags)
    made[32 : 32 + len(payload)] = payload
    made[4096 : 4096 + len(data)] = data
    return bytes(made)


@pytest.mark.parametrize(
    ("step", "error", "text", "owes"),
    [
        (pio_in(0x3FD), "0", "Io(port=0x3fd, size=1, count=1, is_write=False, data=None)", True),
        (pio_out(0x3F8, b"A"), "0", "Io(port=0x3f8, size=1, count=1, is_write=True, data=b'A')", False),
        (memory_fault(0x1000, private=True), "EFAULT", "MemoryFault(gpa=0x1000, size=0x1000, private=True, flags=8, errno=14)", False),
        (memory_fault(0x1000), "133", "MemoryFault(gpa=0x1000, size=0x1000, private=False, flags=0, errno=133)", False),
        (hlt(), "efault", "UnexplainedFault(rip=0, errno=14", False), (ScriptStep(0x77), "0", "UnknownExit(reason=0x77", False),
        (ScriptStep(2, struct.pack("<BBHIQ", 0, 3, 1, 1, 4096)), "0", "UnknownExit(reason=", True),
        (hlt(), "EINTR", "no exit", False), (hlt(), "ENXIO", "no exit", False), (ScriptStep(0xFFFFFFFF), "0", "no exit", False),
    ],
)  # fmt: skip
def test_decode(capsys, tmp_path, step, error, text, owes):
    (tmp_path / "page").write_bytes(page(step.reason, step.payload, step.data))
    (tmp_path / "page.hex").write_text(page(step.reason, step.payload, step.data).hex(" "))
    for arguments in (["page"], ["--hex", "page.hex"]):
        *options, name = arguments
        decoded = json.loads(shown(capsys, "decode", "--json", "--errno", error, *options, tmp_path / name))
        assert decoded["text"].startswith(text)
        assert decoded["owes"] == owes
        assert decoded["exit"] == (None if text == "no exit" else text.split("(")[0])
        said = shown(capsys, "decode", "--errno", error, *options, tmp_path / name)
        assert said.startswith(text)
        assert decoded["meaning"] in said


def test_decode_names_the_fields(capsys, tmp_path):
    (tmp_path / "page").write_bytes(page(39, struct.pack("<3Q", 8, 0x5000, 4096), flags=1))
    decoded = json.loads(shown(capsys, "decode", "--json", "--errno", "14", tmp_path / "page"))
    assert {key: decoded["fields"][key] for key in ("gpa", "size", "private")} == {"gpa": 0x5000, "size": 4096, "private": True}
    assert (decoded["reason"], decoded["flags"], decoded["errno"]) == ("39 (MEMORY_FAULT)", "0x1", "14 (EFAULT)")


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [(b"x" * 100, [], "100 bytes; struct kvm_run has 288"), (b"zz", ["--hex"], "hex"), (b"x" * 300, ["--errno", "EFOO"], "no errno is called 'EFOO'")],
)
def test_what_cannot_be_decoded(capsys, tmp_path, content, arguments, says):
    (tmp_path / "page").write_bytes(content)
    with pytest.raises(SystemExit):
        main(["decode", str(tmp_path / "page"), *arguments])
    assert says in capsys.readouterr().err


def test_a_real_page(vm):
    """What a real vCPU left there says the same."""
    vcpu = load(vm, OUT_IN_OUT)
    exit = vcpu.run()
    with mmap.mmap(vcpu.fd, 8192, mmap.MAP_SHARED) as left:
        known = explain(left[:])
    assert (known["text"], known["exit"], known["owes"]) == (repr(exit), "Io", False)
