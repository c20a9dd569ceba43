"""The figures and plots of docs/performance.md, from a result of `kvmexit bench`.

    python benchmarks/document.py                measures, in about a minute
    python benchmarks/document.py RESULT.json    takes what `kvmexit bench --json RESULT.json` measured

Needs kvmexit[bench]. Writes what stands between the two marks of docs/performance.md, and docs/plots/*.svg. What the
figures mean is the page's author's to say, beside the marks.
"""

import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from kvmexit.bench import plots
from kvmexit.bench.report import cells_done, interval, show

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks/document.py wrote this -->\n", "<!-- until here -->\n"
PLOTS = {
    "throughput": "Exits a second",
    "percentiles-pio_out-idle-1": "Time by percentile: OUT to a port, idle",
    "percentiles-pio_out-busy1-1": "Time by percentile: OUT to a port, beside one busy Python thread",
    "split": "Where the time of an exit goes",
}
GOALS = {0: ("p50", 1.02), 1: ("p99", 1.1)}  # by busy threads: of native handlers, to the C loop


def main(path: str | None) -> None:
    """Write them."""
    result = json.loads(Path(path).read_text()) if path else measured()
    drawn = plots.plots(result)
    for name in PLOTS:
        (PAGE.parent / "plots" / f"{name}.svg").write_text(plots.as_svg(drawn[name]))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE} has lost its marks"
    PAGE.write_text(before + BEGIN + shown(result) + END + after)


def measured() -> dict:
    """-> a result."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, "-m", "kvmexit", "bench", "--json", path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())


def shown(result: dict) -> str:
    """-> Markdown: the machine and the tables, the goals, the plots."""
    text = io.StringIO()
    show(result, text)
    tables = "".join(f"    {line}".rstrip() + "\n" for line in text.getvalue().splitlines())
    images = "".join(f"![{name}](plots/{file}.svg)\n\n" for file, name in PLOTS.items())
    return f"{tables}\n{goals(result)}\n{images}"


def goals(result: dict) -> str:
    """-> Markdown: native handlers to the C loop, and whether the 95 % interval lies below or above the goal."""
    lines = ["| native to C | | goal | |", "|--|--|--|--|"]
    for cell in cells_done(result):
        figure, goal = GOALS.get(cell["busy"], (None, 0))
        ratio = cell["ways"].get("native", {}).get(f"{figure}_to_floor")
        if ratio:
            verdict = "met" if ratio[2] <= goal else "missed" if ratio[1] > goal else "the interval has it"
            lines.append(f"| {cell['name']} | {figure} {interval(ratio)} | {goal} | {verdict} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main(*sys.argv[1:2] or [None])
