"""benchmarks/instructions.py: callgrind's dumps read, results compared, and a count."""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from processes import needs_gil, unsanitized

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
spec = importlib.util.spec_from_file_location("instructions", BENCHMARKS / "instructions.py")
instructions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(instructions)

DUMP = """\
# callgrind format
version: 1
creator: callgrind-3.19.0
pid: 1
cmd: python x
part: 2
desc: I1 cache:
desc: Timerange: Basic block 7 - 9
desc: Trigger: Client Request: native pio_out|measured|1

positions: line
events: Ir
summary: 99

ob=/x/_loop.so
fl=???
fn=__pyx_f_7kvmexit_5_loop_burst
0 20
cob=/x/libc.so
cfi=???
cfn=malloc
calls=3 0
0 50
0 2

ob=/x/libc.so
fn=malloc
0 50
fn=__pyx_f_7kvmexit_5_loop_burst'2
0 7
"""


def test_a_dump_is_read():
    """What a function took itself, not what it called; calls; recursion is the function's own."""
    profile = instructions.parse(DUMP)
    assert profile.name == "native pio_out|measured|1"
    assert profile.instructions == {"_loop.burst": 29, "malloc": 50}
    assert profile.calls == {"malloc": 3}


@pytest.mark.parametrize(("symbol", "name"), [
    ("__pyx_f_7kvmexit_5_loop_4Vcpu_until_taken", "_loop.Vcpu.until_taken"),
    ("__pyx_pw_7kvmexit_5_loop_4Vcpu_3run", "_loop.Vcpu.run"),
    ("__pyx_pw_7control_5decode", "control.decode"),
    ("__pyx_f_7kvmexit_6_exits_make", "_exits.make"),
    ("_PyEval_EvalFrameDefault", "_PyEval_EvalFrameDefault"),
    ("__Pyx_IsSubtype", "__Pyx_IsSubtype"),
])  # fmt: skip
def test_what_cython_makes_of_names_is_undone(symbol, name):
    assert instructions.plain(symbol) == name


def test_an_exits_instructions_are_those_of_twice_as_many_less():
    """Begin and end of run(), 500 here, do not count; nor what happened once by chance."""
    once = instructions.Profile("", Counter({"burst": 10_500, "malloc": 30}), Counter({"malloc": 5, "realloc": 1}))
    twice = instructions.Profile("", Counter({"burst": 20_500, "malloc": 30}), Counter({"malloc": 105, "realloc": 1}))
    assert instructions.difference({1: once, 2: twice}, 100) == ({"burst": 100.0}, 1.0)


def result(**cells):
    return {name: {"instructions": sum(functions.values()), "functions": functions} for name, functions in cells.items()}


def test_a_difference_is_one_from_the_effect_on():
    """1 %, more or less; with the functions that make it; cells that only one result has are left out."""
    before = result(same={"f": 1000.0}, more={"f": 900.0, "g": 100.0}, less={"f": 500.0, "gone": 100.0}, old={"f": 1.0})
    after = result(same={"f": 1009.0}, more={"f": 911.0, "g": 100.0}, less={"f": 500.0}, new={"f": 1.0})
    rows = {row["cell"]: row for row in instructions.compare(before, after, 0.01)}
    assert {name: (row["differs"], row["functions"]) for name, row in rows.items()} == {
        "same": (False, {"f": 9.0}), "more": (True, {"f": 11.0}), "less": (True, {"gone": -100.0})}


@pytest.mark.parametrize(("fail", "status"), [(0.5, 1), (2, 0)])
def test_a_comparison_is_told(capsys, fail, status):
    """What differs, by which function, and whether that is too much."""
    before, after = ({"machine": machine, "compiler": "gcc", "cells": result(native={"burst": n})}
                     for machine, n in (("theirs", 1000.0), ("ours", 1015.0)))
    options = argparse.Namespace(compare="before.json", effect=1.0, fail=fail)
    assert instructions.tell(before, after, options) == status
    told = capsys.readouterr().out
    assert "of another machine: theirs" in told
    assert "+15.0  burst" in told
    assert told.endswith("1 of 1 cells differ by 1 % or more\n")


@unsanitized("it runs itself under valgrind")
@needs_gil("it makes an exit's object anew each time, and has an allocator of its own")
@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is missing")
@pytest.mark.timeout(300)
def test_exits_are_counted(tmp_path):
    """A handler more is more, and nothing is allocated."""
    kept = tmp_path / "kept.json"
    command = [sys.executable, BENCHMARKS / "instructions.py", "--exits", "200", "--json", kept, "-k", "native pio_out",
               "-k", "counter"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    cells = json.loads(kept.read_text())["cells"]
    assert set(cells) == {"native pio_out", "handler counter"}
    plain, counter = cells["native pio_out"], cells["handler counter"]
    assert plain["control"] + 50 < plain["instructions"] < counter["instructions"] < plain["instructions"] + 100
    assert plain["functions"]["_loop.burst"] > 50
    assert [round(cell["allocations"], 1) for cell in cells.values()] == [0, 0]


def test_without_valgrind_it_says_how_to_get_it(monkeypatch, capsys):
    """And what it is asked for has to be there."""
    monkeypatch.setattr(sys, "argv", ["instructions.py"])
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        instructions.main()
    assert "apt install valgrind" in capsys.readouterr().err
