"""`kvmexit doctor` on this machine as it is, on devices that are none, and on machines that cannot do a thing; time_entries() below it."""

import errno
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from guests import OUT_FOREVER, SPIN, load
from processes import leaks

import kvmexit
from kvmexit._loop import time_entries
from kvmexit.cli import doctor, main
from kvmexit.testing import ScriptStep, hlt, memory_fault, pio_in, pio_out

MARK = {True: "ok", None: "missing", False: "fails"}
KEYS = ["group", "name", "ok", "value", "advice"]
OUT = pio_out(0x80, b"x")


def doctored(*arguments):
    """Run the command in a process of its own; -> CompletedProcess."""
    return subprocess.run([sys.executable, "-m", "kvmexit", "doctor", *arguments], capture_output=True, text=True, check=False,
                          timeout=60, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def by_name(findings):
    """-> {name: Finding}, of findings whose names are unique."""
    found = {f.name: f for f in findings}
    assert len(found) == len(findings)
    return found


def report(done):
    """-> {(group, name): finding} of a JSON report."""
    findings = json.loads(done.stdout)["findings"]
    found = {(f["group"], f["name"]): f for f in findings}
    assert len(found) == len(findings)
    return found


@pytest.fixture(scope="module")
def json_run(kvm):
    """`doctor --json` here, once."""
    return doctored("--json")


# ---- this machine ----


@pytest.mark.kvm
def test_a_guest_runs(json_run):
    """Status 0, and one JSON object with nothing around it."""
    assert (json_run.returncode, json_run.stderr) == (0, "")
    said = json.loads(json_run.stdout)
    assert list(said) == ["kvmexit", "device", "ran", "findings"]
    assert (said["kvmexit"], said["device"], said["ran"]) == (kvmexit.__version__, "/dev/kvm", True)


@pytest.mark.kvm
def test_findings_have_the_documented_keys(json_run):
    """In every one, and the marks are the three there are; group and name are unique."""
    for finding in report(json_run).values():
        assert list(finding) == KEYS
        assert finding["ok"] in (True, False, None)


@pytest.mark.kvm
def test_advice_where_something_is_missing_and_only_there(json_run):
    """Each has its own."""
    findings = report(json_run).values()
    assert [f["name"] for f in findings if bool(f["advice"]) == (f["ok"] is True)] == []


@pytest.mark.kvm
def test_no_probe_breaks_here(json_run):
    """What a probe raised would stand under its own name."""
    assert [f for f in report(json_run).values() if f["name"].startswith("probe")] == []


@pytest.mark.kvm
def test_the_table_says_the_same(json_run):
    """The same groups, names and marks in the same order; every advice is there."""
    done = doctored()
    assert (done.returncode, done.stderr) == (0, "")
    *body, last = done.stdout.rstrip().split("\n")
    assert last == "a guest ran on /dev/kvm"
    lines, group = [], ""
    for line in body:
        if line and not line.startswith(" "):
            group = line
        elif line.startswith("  ") and line[2] != " ":
            mark, rest = line.split(maxsplit=1)
            lines.append((group, mark, rest))
    findings = list(report(json_run).values())
    assert [(group, mark) for group, mark, _ in lines] == [(f["group"], MARK[f["ok"]]) for f in findings]
    assert all(rest.startswith(f["name"] + "  ") for (_, _, rest), f in zip(lines, findings, strict=True))
    flat = " ".join(done.stdout.split())
    assert [f["name"] for f in findings if " ".join(f["advice"].split()) not in flat] == []


@pytest.mark.kvm
def test_capabilities_are_what_kvm_says(json_run, vm):
    """The value of each, asked by another way."""
    findings = report(json_run)
    for name, capability in {**doctor.CAPABILITIES, **doctor.MEMORY_CAPABILITIES}.items():
        group = "capabilities" if name in doctor.CAPABILITIES else "VM type DEFAULT"
        assert findings[group, f"KVM_CAP_{name}"]["value"] == vm.check(capability.number)


@pytest.mark.kvm
def test_vm_types_are_those_that_can_be_created(json_run):
    """By trying, as an embedder would."""
    for kind in kvmexit.VMType:
        try:
            kvmexit.VM(kind).close()
            possible = True
        except kvmexit.KvmError:
            possible = None
        assert report(json_run)[f"VM type {kind.name}", "KVM_CREATE_VM"]["ok"] is possible


@pytest.mark.kvm
def test_guest_memfd_is_bound_where_a_slot_can_have_one(json_run, vm):
    """Flag by flag."""
    possible = []
    for flags in (0, 1, 2, 3):
        try:
            vm.memory.remove(vm.memory.add(0x100000, 4096, guest_memfd=True, gmem_flags=flags))
            possible.append(kvmexit.GuestMemfdFlags(flags).name)
        except kvmexit.KvmError:
            pass
    assert report(json_run)["VM type DEFAULT", "guest_memfd bound with"]["value"] == possible


@pytest.mark.kvm
def test_private_memory_goes_with_the_attribute(json_run):
    """No PRIVATE attribute, no private memory."""
    for (group, name), finding in report(json_run).items():
        if name == "KVM_CAP_MEMORY_ATTRIBUTES" and not finding["value"] & 8:
            assert report(json_run)[group, "private memory"]["ok"] is None


@pytest.mark.kvm
def test_a_memory_fault_arrives_where_it_can_be_provoked(json_run):
    """Private memory, or a guest_memfd that ordinary VMs can map, give one."""
    for (group, name), finding in report(json_run).items():
        if name == "KVM_EXIT_MEMORY_FAULT":
            bound = report(json_run)[group, "guest_memfd bound with"]["value"]
            private = report(json_run)[group, "private memory"]["value"]
            assert finding["ok"] is (True if private or "MMAP|INIT_SHARED" in bound else None)
            assert finding["ok"] is None or f"flags {8 if private else 0:#x}" in finding["value"]


@pytest.mark.kvm
def test_the_exit_floor_is_in_order(json_run):
    """Microseconds of hundreds of exits."""
    for cpl in (3, 0):
        floor = report(json_run)["guest", f"exit floor at CPL {cpl}"]["value"]
        assert 0.1 < floor["p50_us"] <= floor["p99_us"] <= floor["max_us"] < 200_000
        assert 100 <= floor["exits"] <= doctor.TIMED


@pytest.mark.kvm
def test_the_hypercall_probe_ends_in_time(kvm):
    """Also where the instruction never comes out of KVM_RUN."""
    begun = time.monotonic()
    [finding] = doctor.hypercall("/dev/kvm")
    assert time.monotonic() - begun < doctor.TIMEOUT + 5
    assert "exits, nr 12" in finding.value if finding.ok else finding.advice


@pytest.mark.kvm
def test_nothing_is_left_behind(kvm):
    """No descriptor and no mapping, VMs included; and it takes seconds at most."""
    doctor.gather("/dev/kvm")
    before = leaks()
    begun = time.monotonic()
    for _ in range(3):
        doctor.gather("/dev/kvm")
    assert leaks()[0] == before[0]
    assert leaks()[1] <= before[1] + 2  # the allocator's own
    assert time.monotonic() - begun < 45


# ---- no device ----


@pytest.mark.parametrize(("path", "said", "advice"), [
    ("missing", "No such file", "modprobe kvm_intel or kvm_amd"),
    ("folder", "no character device", "--device takes KVM's device"),
    ("file", "no character device", "--device takes KVM's device"),
    ("/dev/null", "Inappropriate ioctl", "/dev/null is no KVM device"),
], ids=["missing", "folder", "file", "other device"])
def test_a_device_that_is_none(tmp_path, path, said, advice):
    """Status 1, the reason and what to do, as text and as JSON; the process is still examined."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    device = str(tmp_path / path)
    done = doctored("--device", device, "--json")
    assert (done.returncode, done.stderr, json.loads(done.stdout)["ran"]) == (1, "", False)
    worst = [f for (group, _), f in report(done).items() if group == "device" and f["ok"] is not True]
    assert len(worst) == 1
    assert said in worst[0]["value"]
    assert advice in worst[0]["advice"]
    assert {group for group, _ in report(done)} == {"host", "device", "process"}
    text = doctored("--device", device)
    assert (text.returncode, text.stderr) == (1, "")
    assert text.stdout.endswith(f"\n\nno guest ran on {device}\n")
    assert advice in " ".join(text.stdout.split())


AS_NOBODY = """
import argparse, ctypes, os, sys
from kvmexit.cli import doctor
# Nobody may not be able to read the interpreter's files: what is imported late, is imported now.
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(doctor.run(argparse.Namespace(device=sys.argv[1], json=False)))
"""


@pytest.fixture
def passable():
    """A folder that everybody may pass. tmp_path is none: every pytest that starts closes its parents to others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize(("mode", "group", "advice"), [
    (0o660, 0, "usermod -aG root "),
    (0o600, 0, "give the device to group kvm"),
    (0o600, 65534, "give the device to group kvm"),
])
def test_a_device_without_permission(passable, mode, group, advice):
    """The group to join, if it has access; else to give it some."""
    if os.getuid() != 0:
        pytest.skip("needs root to become somebody else")
    device = passable / "kvm"
    try:
        os.mknod(device, stat.S_IFCHR | mode, os.makedev(1, 3))  # what is behind it does not matter
    except PermissionError:
        pytest.skip("needs root to become somebody else")
    os.chown(device, 0, group)
    os.chmod(device, mode)
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, device], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^  fails +permission +Permission denied$", done.stdout, re.M)
    assert advice in " ".join(done.stdout.split())


# ---- what a probe may meet ----


@pytest.mark.parametrize(("error", "value", "advice"), [
    (kvmexit.KvmError(errno.EBUSY, "KVM_CREATE_VM"), "KVM_CREATE_VM: Device or resource busy", "another hypervisor"),
    (kvmexit.KvmError(errno.ENOMEM, "mmap"), "mmap: Cannot allocate memory", "not expected"),
    (ValueError("odd"), "ValueError: odd", "not expected"),
    (OSError(errno.EIO, "gone"), "gone", "not expected"),
])
def test_a_probe_that_raises_is_a_finding(error, value, advice):
    """And what it found before stands."""
    def probe(device):
        yield doctor.Finding("guest", "first", True, 1)
        raise error

    first, last = doctor.guarded("guest", probe, "/dev/kvm")
    assert (first.name, last.name, last.ok) == ("first", "probe probe", False)
    assert value in last.value
    assert advice in last.advice


@pytest.mark.kvm
def test_a_machine_where_no_vm_can_be_made_has_no_traceback(kvm, monkeypatch, capsys):
    """Status 1; every probe that needs a VM says so."""
    def refuse(*args, **kwargs):
        raise kvmexit.KvmError(errno.EBUSY, "KVM_CREATE_VM")

    monkeypatch.setattr(doctor, "VM", refuse)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert out.count("KVM_CREATE_VM: Device or resource busy") == 12  # capabilities, 6 types, 2 + 2 guests, hypercall
    assert out.count("-> another hypervisor has the processor's virtualisation") == 12


@pytest.mark.kvm
def test_a_guest_that_does_not_get_there_fails(kvm, monkeypatch):
    """In time, and the status says that none ran."""
    monkeypatch.setattr(doctor, "OUT", SPIN)
    monkeypatch.setattr(doctor, "TIMEOUT", 0.05)
    for cpl in (3, 0):
        [finding] = doctor.guest("/dev/kvm", cpl)
        assert (finding.ok, finding.value) == (False, "Interrupted(cause='timeout', errno=4)")
        assert finding.advice
        [floor] = doctor.exit_floor("/dev/kvm", cpl)
        assert (floor.ok, floor.value) == (False, None)
        assert not doctor.guest_ran([finding, floor])


@pytest.mark.kvm
@pytest.mark.parametrize(("code", "said"), [
    (SPIN, "did not come out of KVM_RUN in 0.05 s"), (OUT_FOREVER, "led to Io(port=0x80"),
], ids=["spins", "goes on"])
def test_a_hypercall_that_does_not_exit_fails(kvm, monkeypatch, code, said):
    """Either way of not exiting."""
    monkeypatch.setattr(doctor, "HYPERCALL", {"vmcall": code, "vmmcall": code})
    monkeypatch.setattr(doctor, "TIMEOUT", 0.05)
    [finding] = doctor.hypercall("/dev/kvm")
    if finding.value == "not offered":
        pytest.skip("a guest's hypercall does not exit on this machine")
    assert finding.ok is False
    assert said in finding.value
    assert "with a time-out" in finding.advice


@pytest.mark.parametrize(("vendor", "instruction"), [
    ("GenuineIntel", "vmcall"), ("AuthenticAMD", "vmmcall"), ("HygonGenuine", "vmmcall"),
])
@pytest.mark.kvm
def test_the_hypercall_instruction_is_the_vendors(kvm, monkeypatch, vendor, instruction):
    """The other one raises #UD, or has KVM patch the guest."""
    monkeypatch.setattr(doctor, "cpuinfo", lambda key: vendor)
    monkeypatch.setattr(doctor, "TIMEOUT", 0.05)
    [finding] = doctor.hypercall("/dev/kvm")
    assert finding.value == "not offered" or finding.value.startswith(instruction + " ")


# ---- advice ----


@pytest.mark.parametrize(("release", "options", "wanted", "advice"), [
    ("6.1.0-18-amd64", {}, doctor.Capability(1, "6.8"), "needs Linux 6.8 or later (this is 6.1.0-18-amd64)"),
    ("6.8.0", {}, doctor.Capability(1, "6.8"), "Linux 6.8.0 is new enough, its KVM (kvm, kvm_x) lacks it: use kvm_intel or kvm_amd"),
    ("6.10.1", {}, doctor.Capability(1, "6.8", "CONFIG_A"), "needs a kernel with CONFIG_A=y (off in /c)"),
    ("6.10.1", {"CONFIG_A": "y"}, doctor.Capability(1, "6.8", "CONFIG_A", "an AMD processor"), "needs an AMD processor"),
    ("6.10.1", {"CONFIG_A": "m"}, doctor.Capability(1, "6.8", "CONFIG_A", "EPT"), "needs EPT"),
    ("6.1.0", {}, doctor.Capability(1, "6.8", "CONFIG_A", "EPT"),
     "needs Linux 6.8 or later (this is 6.1.0); a kernel with CONFIG_A=y (off in /c); EPT"),
    ("6.10.1", None, doctor.Capability(1, "6.8", "CONFIG_A"),
     "needs a kernel with CONFIG_A=y (whether this one has it is not known)"),
])
def test_what_to_do_about_a_capability(monkeypatch, release, options, wanted, advice):
    """Version before option before hardware; all that can be told."""
    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setattr(doctor, "modules", lambda: ["kvm", "kvm_x"])
    monkeypatch.setattr(doctor, "kernel_config", lambda: ("", {}) if options is None else ("/c", options))
    assert doctor.how_to_have(wanted) == advice


def test_the_numbers_are_the_headers(tmp_path):
    """Every capability and VM type, and the ioctls, by the compiler, in a recent linux/kvm.h."""
    pytest.importorskip("ziglang", reason="the PyPI package ziglang is missing")
    every = {**doctor.CAPABILITIES, **doctor.MEMORY_CAPABILITIES}
    expected = {f"KVM_CAP_{name}": capability.number for name, capability in every.items()}
    expected |= {f"KVM_X86_{kind.name}_VM": number.number for kind, number in doctor.VM_TYPES.items()}
    expected |= {name: getattr(doctor, name) for name in
                 ("KVM_GET_API_VERSION", "KVM_CHECK_EXTENSION", "KVM_SET_MEMORY_ATTRIBUTES")}
    expected |= {"KVM_MEMORY_ATTRIBUTE_PRIVATE": doctor.MEMORY_ATTRIBUTE_PRIVATE, "KVM_HC_MAP_GPA_RANGE": doctor.HC_MAP_GPA_RANGE,
                 "MEMBARRIER_CMD_PRIVATE_EXPEDITED": doctor.PRIVATE_EXPEDITED, "__NR_userfaultfd": doctor.SYS_USERFAULTFD,
                 "__NR_membarrier": doctor.SYS_MEMBARRIER}
    source = tmp_path / "numbers.c"
    source.write_text("#include <linux/kvm.h>\n#include <linux/kvm_para.h>\n#include <linux/membarrier.h>\n#include <asm/unistd.h>\n" +
                      "".join(f'_Static_assert({name} == {value}u, "{name}");\n'.replace("KVM_X86_DEFAULT_VM ==", "0 ==")
                              for name, value in expected.items()))
    done = subprocess.run(
        [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-gnu", "-c", "-o", "numbers.o", source.name],
        cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_vm_type_has_its_advice():
    """A type added to VMType needs a row."""
    assert list(doctor.VM_TYPES) == list(kvmexit.VMType)


# ---- time_entries ----


def test_times_are_of_each_entry(scripted):
    """As many as asked for, and the guest goes on from there."""
    vcpu = scripted.create_vcpu(0, [*[OUT] * 6, hlt()])
    times = time_entries(vcpu, 4)
    assert (len(times), times.typecode) == (4, "Q")
    assert all(0 < t < 10**9 for t in times)
    assert [type(vcpu.run()), type(vcpu.run())] == [kvmexit.Io, kvmexit.Hlt]


@pytest.mark.parametrize("count", [0, 1])
def test_few_times(scripted, count):
    """The first exit is not timed."""
    vcpu = scripted.create_vcpu(0, [*[OUT] * (1 + count), hlt()])
    assert len(time_entries(vcpu, count)) == count
    assert isinstance(vcpu.run(), kvmexit.Hlt)


@pytest.mark.parametrize(("step", "kind"), [
    (hlt(), kvmexit.Hlt), (pio_in(0x80), kvmexit.Io),
], ids=["another reason", "an exit that asks for an answer"])
def test_another_exit_ends_it_and_is_kept(scripted, step, kind):
    """The next run() has it, once."""
    vcpu = scripted.create_vcpu(0, [OUT, OUT, OUT, step, ScriptStep(1)])
    assert len(time_entries(vcpu, 10)) == 2
    kept = vcpu.run()
    assert isinstance(kept, kind)
    if kind is kvmexit.Io:
        assert not kept.is_write
        kept.data = 1
    assert isinstance(vcpu.run(), kvmexit.GuestException)


def test_a_first_exit_that_asks_for_an_answer_is_not_entered_over(scripted):
    """Nothing is timed, the answer can still be given."""
    vcpu = scripted.create_vcpu(0, [pio_in(0x80), hlt()])
    assert len(time_entries(vcpu, 10)) == 0
    read = vcpu.pending
    read.data = 7
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert scripted.script(vcpu).left(0)[1] == b"\7"


def test_a_failed_entry_ends_it(scripted):
    """The next run() goes on."""
    vcpu = scripted.create_vcpu(0, [OUT, OUT, ScriptStep(errno=errno.EINVAL), hlt()])
    assert len(time_entries(vcpu, 10)) == 1
    assert vcpu.pending.errno == 0
    assert isinstance(vcpu.run(), kvmexit.Hlt)


@pytest.mark.parametrize("first", [memory_fault(0x5000), hlt()])
def test_any_plain_exit_can_be_the_first(scripted, first):
    """Another reason then ends it."""
    vcpu = scripted.create_vcpu(0, [first, OUT, hlt()])
    assert len(time_entries(vcpu, 10)) == 0
    assert isinstance(vcpu.run(), kvmexit.Io)


def test_it_takes_200_ms_at_most(scripted):
    """Of exits without end, and of a guest that never exits."""
    for i, steps in enumerate([[OUT], [ScriptStep(spin=True)], [OUT, ScriptStep(spin=True)]]):
        vcpu = scripted.create_vcpu(i, steps, repeat=10**9)
        begun = time.monotonic()
        time_entries(vcpu, 10**7)
        assert time.monotonic() - begun < 5


def test_a_kick_ends_it_and_stays(scripted):
    """For the next run()."""
    vcpu = scripted.create_vcpu(0, [OUT, OUT, ScriptStep(spin=True), hlt()])
    kicker = threading.Timer(0.05, vcpu.kick)
    kicker.start()
    begun = time.monotonic()
    assert len(time_entries(vcpu, 10)) == 1
    assert 0.03 < time.monotonic() - begun < 0.19
    kicker.join()
    assert vcpu.run().cause == "kick"
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_a_vcpu_that_runs_is_busy(scripted):
    """From a handler as from another thread."""
    vcpu = scripted.create_vcpu(0, [OUT])
    scripted.on(kvmexit.Io, lambda vcpu, io: time_entries(vcpu, 1) and None)
    with pytest.raises(kvmexit.VcpuBusyError):
        vcpu.run()


def test_no_vcpu_is_a_type_error():
    """None included."""
    with pytest.raises(TypeError):
        time_entries(None, 1)


@pytest.mark.kvm
@pytest.mark.parametrize("cpl", [0, 3])
def test_real_entries_are_timed(vm, cpl):
    """Registers and memory go on as after run()."""
    vcpu = load(vm, OUT_FOREVER, cpl=cpl)
    vcpu.regs.rcx = 77
    times = time_entries(vcpu, 50)
    assert len(times) == 50
    assert min(times) > 100
    assert vcpu.regs.rcx == 77
    vcpu.regs.rcx = 78
    assert isinstance(vcpu.run(timeout=5), kvmexit.Io)
    assert vcpu.regs.rcx == 78
