"""The package as it is installed: what the burst is made of, what is documented, what importing costs and needs."""

import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from processes import python

import kvmexit
from kvmexit.testing import RecordedAttributes, ScriptedVM, hlt, memory_fault

SOURCE = Path(__file__).parent.parent / "src" / "kvmexit"


# ---- the protocols ----


def test_each_ordering_in_the_code_names_its_line_in_the_models():
    """The table of docs/protocols, the variants that break the models and the comments in the code speak of the same labels."""
    protocols = SOURCE.parent.parent / "docs" / "protocols"
    table = set(re.findall(r"^\| ([KPRW]\d+) \|", (protocols / "README.md").read_text(), re.M))
    models = set(re.findall(r"BREAK_([KPRW]\d+)", "".join(path.read_text() for path in protocols.glob("*.pml"))))
    code = set(re.findall(r"\b([KPRW]\d+)\b", "".join((SOURCE / name).read_text() for name in CONCURRENT)))
    assert table == models == code


# ---- the burst ----

BURST = {
    "_loop": [
        "triage", "burst", "interrupted", "outer_paused", "fault_repeats", "note_generation", "lost_race", "dispatch_natively", "call_natively",
        "describe", "classify", "is_well_formed_io", "completes_on_entry", "go_down", "after_burst", "claim", "let_go",
        "begin_natively", "enter_natively", "stand_still", "end_run", "ask_natively",
        "locate_poison", "take_poison"],
    "_page": ["flush_registers", "settle_registers", "forget"],
    "_vcpus": ["stopped_one"],
    "_embed": ["run", "go_round", "offer_again", "finish", "told", "shown", "claim_exit", "pending", "answer", "kick", "convert", "convert_steps",
        "poison"],
    "_native": ["ignore", "fill", "stop", "count", "ring", "access_registers", "load_register", "store_register"],
    "_trace": ["enter_scripted"],
    "_replay": ["enter_replayed", "fill", "rest_of", "answer_size"],
    "_native_convert": ["take", "repair", "plan", "follow", "part", "convert", "admit", "fail", "map_gpa_range", "reply"],
    "_convert": [
        "has_state", "find", "position", "examine_fault", "examine", "refuse", "convert_chunk", "change", "end_of_run", "change_run",
        "discard", "set_attributes", "locate"],
}
CONCURRENT = ["_control.h", "_embed.pyx", "_loop.pyx", "_record.pyx", "_ring.h", "_routes.h", "_routes.pyx", "_vcpus.pyx"]
PYTHON = re.compile(r"\b(_?Py[A-Z_]\w*|__Pyx_\w+)\s*\(")
HARMLESS = {"__Pyx_RefNannySetupContext", "__Pyx_RefNannyFinishContext", "__Pyx_pretend_to_initialize",  # empty macros
            "PyThread_get_thread_ident"}  # pthread_self(), which needs no thread state


def python_operations(c_code, function):
    """-> the calls into Python that a generated C function makes."""
    body = re.search(rf"^static [^;{{]*__pyx_f_\w*?_{function}\([^;{{]*\)\s*\{{\n(.*?)^\}}", c_code, re.M | re.S)
    assert body, f"no function {function} in the generated C"
    code = re.sub(r"/\*.*?\*/", "", body[1], flags=re.S)
    return [name for name in PYTHON.findall(code) if name not in HARMLESS]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """module -> the C that Cython makes of it."""
    folder = tmp_path_factory.mktemp("c")

    def generate(module, source=None):
        path = source or SOURCE / f"{module}.pyx"
        output = folder / f"{module}{'' if source is None else '-changed'}.c"
        subprocess.run(
            [sys.executable, "-m", "cython", "-3", "-X", "nonecheck=True", "-X", "auto_pickle=False",
             "--module-name", f"kvmexit.{module}", "-I", SOURCE.parent, "-o", output, path],
            check=True, capture_output=True)
        return output.read_text()

    return generate


@pytest.mark.parametrize("module", BURST)
def test_the_burst_has_no_python_operation(generated, module):
    """Nothing that runs without the GIL calls into the interpreter."""
    code = generated(module)
    found = {function: python_operations(code, function) for function in BURST[module]}
    assert found == {function: [] for function in BURST[module]}


def test_the_check_of_the_burst_can_fail(generated, tmp_path):
    """A Python call smuggled into the burst is found."""
    source = (SOURCE / "_loop.pyx").read_text()
    changed = source.replace("\n        c.entries += 1\n", "\n        c.entries += 1\n        with gil:\n            print(c.entries)\n")
    assert changed != source
    path = tmp_path / "_loop.pyx"
    path.write_text(changed)
    assert python_operations(generated("_loop", path), "burst")


# ---- documentation ----


def public_objects():
    """-> (name, object) of everything public, members of classes included."""
    for name in kvmexit.__all__:
        thing = getattr(kvmexit, name)
        yield name, thing
        members = vars(thing) if inspect.isclass(thing) or inspect.ismodule(thing) else {}
        for member in members if inspect.isclass(thing) else getattr(thing, "__all__", []):
            value = getattr(thing, member)
            is_alias = isinstance(value, types.GenericAlias)  # has no place for one
            if not member.startswith("_") and not is_alias and (callable(value) or isinstance(value, property)):
                yield f"{name}.{member}", value


def test_everything_public_has_a_docstring():
    """What it does, in a sentence at least."""
    bare = [name for name, thing in public_objects()
            if (inspect.isclass(thing) or callable(thing)) and not (inspect.getdoc(thing) or "").strip()]
    assert bare == []


def example(name, number):
    """-> one of a page's Python examples, compiled."""
    path = SOURCE.parent.parent / name
    return compile(re.findall(r"```python\n(.*?)```", path.read_text(), re.S)[number], f"{name}, example {number}", "exec")


@pytest.mark.off_main  # one counts records
@pytest.mark.parametrize(
    ("name", "number", "needs"), [
    ("README.md", 0, "kvm"), ("README.md", 1, "private_vm"), ("docs/memory.md", 0, "kvm"), ("docs/memory.md", 1, "scripted"),
    ("docs/native.md", 0, "scripted"), ("docs/native.md", 1, "scripted"), ("docs/kernelside.md", 0, "kvm"),
    ("docs/kernelside.md", 1, "kvm"), ("docs/kernelside.md", 2, "scripted"), ("docs/kernelside.md", 3, "kvm"),
    ("docs/stats.md", 0, "scripted"), ("docs/trace.md", 0, "scripted"), ("docs/testing.md", 0, "scripted"),
    ("docs/testing.md", 1, "scripted"), ("docs/faults.md", 0, "kvm iced"), ("docs/paging.md", 0, "kvm uffd"),
    ("docs/paging.md", 1, "kvm iced")])
def test_the_examples_run(name, number, needs, request, capsys):
    """As they stand there; the README's guest, of which it says nothing, writes to ports 0x3f8 and 0xf4."""
    for fixture in needs.split():
        request.getfixturevalue(fixture)
    exec(example(name, number), {"code": bytes.fromhex("66 ba f8 03 b0 41 ee e6 f4")})
    said = {("README.md", 0): "b'A'\n", ("README.md", 1): "[MemoryRange(gpa=0, size=2097152, private=False), MemoryRange("
            "gpa=2097152, size=1048576, private=True), MemoryRange(gpa=3145728, size=63963136, private=False)]\n"}
    assert capsys.readouterr().out == said.get((name, number), "")


# ---- importing ----


def test_importing_opens_nothing_and_prints_nothing():
    """No /dev/kvm, no signal handler, no thread, no output."""
    done = python("""
import os, signal, threading
handlers = [signal.getsignal(n) for n in range(1, 65) if n not in (32, 33)]
before = sorted(os.listdir("/proc/self/fd"))
import kvmexit
assert sorted(os.listdir("/proc/self/fd")) == before
assert [signal.getsignal(n) for n in range(1, 65) if n not in (32, 33)] == handlers
assert signal.getsignal(kvmexit.KICK_SIGNAL) == signal.SIG_DFL
assert threading.active_count() == 1
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_version_is_said_once():
    """The package's and the command's are the same."""
    done = subprocess.run([sys.executable, "-m", "kvmexit", "--version"], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.strip() == kvmexit.__version__


@pytest.mark.parametrize("scenario", ["private", "guest-memfd", "truncated-file", "scripted"])
def test_the_demo_repairs_and_checks(scenario, request):
    """Each scenario that this machine can play ends with the right memory, and says so."""
    if scenario != "scripted":
        request.getfixturevalue("kvm")
    done = subprocess.run([sys.executable, "-m", "kvmexit", "demo", "--scenario", scenario, "--pages", "64"],
                          capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    if "no guest_memfd that an ordinary VM can map" in done.stderr:
        pytest.skip("this kernel's guest_memfd has no MMAP and INIT_SHARED (KVM_CAP_GUEST_MEMFD_FLAGS)")
    if "no such VM type" in done.stderr:
        pytest.skip("this kernel has no VM type with private memory")
    assert done.returncode == 0, done
    assert "64 of 64 pages walked, 64 of them right" in done.stdout
    assert re.search(r"^(MemoryFault|UnexplainedFault) +4 ", done.stdout, re.M)


def test_the_demo_converts_private_memory_by_the_chunk(monkeypatch):
    """The scenario on a scripted VM with a recorded backend: one conversion to private, and one back for each fault."""
    from kvmexit.cli import demo

    recorded = RecordedAttributes()
    monkeypatch.setattr(demo.PrivateToShared, "make_vm", lambda self: ScriptedVM(attributes=recorded))
    scenario = demo.PrivateToShared(48)
    with scenario.vm as vm:
        scenario.lose()
        assert vm.memory.ranges() == [(demo.REGION, 48 * demo.PAGE, True)]
        assert vm.memory.slots[0].guest_memfd is None
        faults = [memory_fault(demo.REGION + page * demo.PAGE, private=True) for page in (0, 17, 47)]
        vcpu = vm.create_vcpu(0, [*faults, hlt()])
        vm.on_memory_fault(handler=scenario.repair)
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert recorded.private == set()
    chunks = [(demo.REGION + i * demo.CHUNK, demo.CHUNK, False, 0) for i in range(3)]
    assert recorded.calls == [(demo.REGION, 48 * demo.PAGE, True, 0), *chunks]


@pytest.mark.parametrize("unfit", range(4))
def test_the_demo_plays_the_best_there_is(unfit, monkeypatch, capsys):
    """Without --scenario: the first that this machine can play, after a line for each better one that says why not."""
    from kvmexit.cli import demo, main

    names = ["private", "guest-memfd", "truncated-file", "scripted"]
    assert [scenario.name for scenario in demo.SCENARIOS] == names

    def refuse(self):
        raise kvmexit.Error(f"no {self.name} today")

    for scenario in demo.SCENARIOS[:unfit]:
        monkeypatch.setattr(scenario, "make_vm", refuse)
    for scenario in demo.SCENARIOS[unfit:]:
        monkeypatch.setattr(scenario, "make_vm", ScriptedVM)
    monkeypatch.setattr(demo, "play", lambda scenario, vm: print(f"played {scenario.name}") or 0)
    assert main(["demo"]) == 0
    refusals = [f"not {name}: no {name} today" for name in names[:unfit]]
    assert capsys.readouterr().out.splitlines()[1:] == [*refusals, f"played {names[unfit]}"]


def test_the_demo_fails_where_memory_is_wrong(monkeypatch, capsys):
    """A callback that repairs nothing right ends in a non-zero status."""
    from kvmexit.cli import demo, main

    monkeypatch.setattr(demo.Scripted, "repair", lambda self, vcpu, fault: vcpu.vm.memory.add(fault.gpa, demo.CHUNK) and None)
    assert main(["demo", "--scenario", "scripted", "--pages", "32"]) == 1
    assert "0 of them right; first wrong: 0x10000000" in capsys.readouterr().out


def test_the_demo_refuses_odd_sizes(capsys):
    """With the value, and status 2."""
    from kvmexit.cli import main

    assert main(["demo", "--pages", "17"]) == 2
    assert "--pages 17" in capsys.readouterr().err
