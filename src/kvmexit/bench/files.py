"""What --report writes: report.html with everything in it, the plots as PNG and SVG, and HdrHistogram's files."""

from __future__ import annotations

import html
import json
from pathlib import Path
from string import Template
from typing import Any

from kvmexit.bench import plots
from kvmexit.bench.cells import WAYS
from kvmexit.bench.report import COLUMNS, cells_done, interval, machine_rows, rows, title

__all__ = ["as_html", "hdr_log", "write"]

LONGEST = 3_600_000_000_000  # ns that an HdrHistogram has room for: an hour


def write(result: dict[str, Any], folder: Path) -> None:
    """Fill a folder, which is made where there is none: report.html, result.json, plots/, histograms.hlog and hgrm/."""
    for needed in (folder, folder / "plots", folder / "hgrm"):
        needed.mkdir(exist_ok=True)
    figures = plots.plots(result)
    svgs = {name: plots.as_svg(figure) for name, figure in figures.items()}
    for name, figure in figures.items():
        (folder / "plots" / f"{name}.svg").write_text(svgs[name])
        (folder / "plots" / f"{name}.png").write_bytes(plots.as_png(figure))
    (folder / "report.html").write_text(as_html(result, svgs))
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    (folder / "histograms.hlog").write_text(hdr_log(result))
    for cell in cells_done(result):
        for way, own in cell["ways"].items():
            with open(folder / "hgrm" / f"{file_name(cell)}-{way}.hgrm", "wb") as file:
                hdr(own).output_percentile_distribution(file, 1000)  # us


def file_name(cell: dict[str, Any]) -> str:
    """A cell's name as that of a file."""
    return str(cell["name"]).replace("/", "-")


# ---- HdrHistogram ----


def hdr(own: dict[str, Any]) -> Any:
    """A way's samples as an HdrHistogram: ns, three digits."""
    from hdrh.histogram import HdrHistogram

    made = HdrHistogram(1, LONGEST, 3)
    for ns, count in own["histogram"]:
        made.record_value(min(max(ns, 1), LONGEST), count)
    return made


def hdr_log(result: dict[str, Any]) -> str:
    """HdrHistogram's log, in ns: a line a cell and way, tagged with both, which the package's own writer cannot."""
    lines = ["#[Histogram log format version 1.3]", f"#kvmexit bench {result['kvmexit']}, {result['began']}, ns",
             '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"']  # fmt: skip
    for cell in cells_done(result):
        for way, own in cell["ways"].items():
            made = hdr(own)
            lines.append(f"Tag={cell['name']}/{way},0.000,{result['seconds']:.3f},{made.get_max_value() / 1e6:.3f},"
                         + made.encode().decode())
    return "\n".join([*lines, ""])


# ---- HTML ----


def as_html(result: dict[str, Any], svgs: dict[str, str]) -> str:
    """One page, which loads nothing; page.template has what is the same in all."""
    page = Template((Path(__file__).parent / "page.template").read_text())
    machine, impossible = result["machine"], [cell for cell in result["cells"] if cell["impossible"]]
    return page.substitute(
        version=escape(result["kvmexit"]), day=result["began"][:10], warm_up=result["warm_up"], heads=heads(result),
        cpu=escape(machine["cpu"] + (", nested" if machine["nested"] else "")),
        notes=why("Interrupted", "these are the cells that were measured by then.") if result["interrupted"] else "",
        machine="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in machine_rows(result)),
        overview="\n".join(card(*texts, svgs[name], name) for name, texts in OVERVIEW.items() if name in svgs),
        cells="\n".join(section(cell, svgs, f"cell{i}-") for i, cell in enumerate(cells_done(result))),
        impossible="\n".join(["<h2>What this machine cannot do</h2>"] * bool(impossible)
                             + [why(cell["name"], cell["impossible"]) for cell in impossible]),
    )  # fmt: skip


OVERVIEW = {
    "throughput": ("Exits a second", "All vCPUs together; calls a second where a cell is of calls."),
    "split": ("Where the time goes", "An exit on average, in us, by kvmexit's own vcpu.timing: measured apart, since "
              "it costs some itself. Time in KVM includes the guest's, and whatever took the processor away."),
}  # fmt: skip


def card(heading: str, text: str, svg: str, name: str) -> str:
    return f"<h2>{heading}</h2>\n<div class='card'><p class='soft'>{text}</p>{plots.inline(svg, f'{name}-')}</div>"


def why(name: str, text: str) -> str:
    return f"<div class='why'><b>{escape(name)}</b>: {escape(text)}</div>"


def heads(result: dict[str, Any]) -> str:
    """The figures to begin with: medians of the first idle cell, tails of the first beside a busy thread."""
    cells, made = cells_done(result), []
    idle, busy = [cell for cell in cells if not cell["busy"]], [cell for cell in cells if cell["busy"]]
    for cell, figure in [*((cell, "p50") for cell in idle[:1]), *((cell, "p99") for cell in busy[:1])]:
        for way in ("native", "python"):
            if ratio := cell["ways"].get(way, {}).get(f"{figure}_to_floor"):
                value, bounds = escape(interval(ratio)).split()
                made.append(f"<div class='head {way}'><span class='soft'>{WAYS[way]}: {figure} to C</span>"
                            f"<b>{value} x</b><span class='soft'>95 %: {bounds.strip('()')}<br>{escape(cell['name'])}"
                            "</span></div>")
    return "\n".join(made)


def section(cell: dict[str, Any], svgs: dict[str, str], prefix: str) -> str:
    """A cell's table and plot."""
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in COLUMNS) + "</tr>"]
    for way, row in zip(cell["ways"], rows(cell), strict=True):
        first, *others = map(escape, row)
        lines.append(f"<tr><td><i class='dot' style='background:var(--{way})'></i>{first}</td>"
                     + "".join(f"<td>{text}</td>" for text in others) + "</tr>")
    plot = plots.inline(svgs[f"percentiles-{file_name(cell)}"], prefix)
    return (f"<section class='card cell'><h3>{escape(title(cell))}</h3><code>{escape(cell['name'])}</code>"
            f"<div class='scroll'><table>{''.join(lines)}</table></div>{plot}</section>")


def escape(text: str) -> str:
    return html.escape(text)
