"""benchmarks/publish.py: its result is one that pyperf reads, the control's figure before what is measured."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import unsanitized

needs_pyperf = pytest.mark.skipif(not importlib.util.find_spec("pyperf"), reason="pyperf is missing")


@unsanitized("its control is compiled without one")
@needs_pyperf
@pytest.mark.timeout(300)
def test_a_cell_is_published(tmp_path):
    """One value of one pass, in two processes: the parent's control serves both."""
    script, out = Path(__file__).parent.parent / "benchmarks" / "publish.py", tmp_path / "out.json"
    command = [sys.executable, script, "--quiet", "-p1", "-n1", "-w1", "-l1", "-k", "native pio_out", "-o", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [benchmark["metadata"]["name"] for benchmark in found["benchmarks"]] == ["native pio_out, control", "native pio_out"]
    its, mine = (benchmark["runs"][-1]["values"][0] for benchmark in found["benchmarks"])
    assert 0 < its < mine < 1e-3
    assert "kvmexit 0." in found["metadata"]["kvmexit"]
