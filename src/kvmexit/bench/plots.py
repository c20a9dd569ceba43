"""A result's plots, by matplotlib, which is imported here alone: latency by percentile, throughput, where time goes."""

from __future__ import annotations

import io
import re
from typing import Any

from kvmexit.bench.cells import WAYS
from kvmexit.bench.report import cells_done

__all__ = ["COLOURS", "as_png", "as_svg", "inline", "percentiles", "plots", "split", "throughput"]

COLOURS = {"floor": "#8a8f98", "native": "#0f766e", "python": "#c2410c", "loop": "#7c3aed"}
PHASES = {"kvm": ("KVM and guest", "#cbd5e1"), "native": ("native code", "#0f766e"),
          "gil": ("waiting for the GIL", "#dc2626"), "python": ("Python", "#f59e0b")}  # fmt: skip
TICKS = {1: "0", 0.5: "p50", 0.1: "p90", 0.01: "p99", 0.001: "p99.9", 0.0001: "p99.99", 0.00001: "p99.999"}
STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#9ca3af", "axes.labelcolor": "#374151", "xtick.color": "#4b5563",
    "ytick.color": "#4b5563", "axes.grid": True, "grid.color": "#e5e7eb", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "svg.fonttype": "none", "svg.hashsalt": "kvmexit", "legend.frameon": False, "axes.titlesize": 10,
    "axes.titleweight": "bold", "axes.titlelocation": "left",
}  # fmt: skip


def styled() -> Any:
    """A context in which plots look like each other."""
    from matplotlib import rc_context

    return rc_context(STYLE)


def figure_of(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def plots(result: dict[str, Any]) -> dict[str, Any]:
    """All of a result's plots, by file name."""
    with styled():
        cells = cells_done(result)
        made = {f"percentiles-{cell['name'].replace('/', '-')}": percentiles(cell) for cell in cells}
        if rated := [cell for cell in cells if cell["kind"] != "kick"]:  # of kicks it says nothing: they are waited for
            made["throughput"] = throughput(rated)
        if parts := [cell for cell in cells if any(own["split"] for own in cell["ways"].values())]:
            made["split"] = split(parts)
        return made


def percentiles(cell: dict[str, Any]) -> Any:
    """Latency by percentile: the further right, the rarer. Both axes are logarithmic."""
    figure, axes = figure_of(8.4, 3.0)
    rarest = 1.0
    for way, own in cell["ways"].items():
        seen, x, y = 0, [], []
        for ns, count in own["histogram"]:
            x += [1 - seen / own["samples"], max(1 - (seen + count) / own["samples"], 0.5 / own["samples"])]
            y += [ns / 1000] * 2
            seen += count
        rarest = min(rarest, x[-1])
        axes.plot(x, y, color=COLOURS[way], label=WAYS[way], linewidth=1.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, rarest)
    axes.set_xticks([tick for tick in TICKS if tick >= rarest], [TICKS[tick] for tick in TICKS if tick >= rarest])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda us, _: f"{us:,.0f} us" if us < 1000 else f"{us / 1000:,.0f} ms")
    axes.yaxis.set_minor_formatter("")
    axes.legend(loc="upper left")
    return figure


def throughput(cells: list[dict[str, Any]]) -> Any:
    """Exits a second."""
    figure, axes = figure_of(8.4, 0.9 + 0.62 * len(cells))
    height = 0.2
    for i, (way, name) in enumerate(WAYS.items()):
        rates = [cell["ways"].get(way, {}).get("per_second", 0) for cell in cells]
        places = [number + (i - 1.5) * height for number in range(len(cells))]
        axes.barh(places, rates, height * 0.9, color=COLOURS[way], label=name)
        for place, rate in zip(places, rates, strict=True):
            axes.annotate(f"{rate:,.0f}", (rate, place), (4, 0), textcoords="offset points", va="center", fontsize=7,
                          color="#4b5563")
    axes.set_yticks(range(len(cells)), [cell["name"] for cell in cells])
    axes.set_ylim(len(cells) - 0.4, -0.6)  # the first on top, and no room beyond
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def split(cells: list[dict[str, Any]]) -> Any:
    """Where an exit's time goes in kvmexit's ways: shares of the whole, which stands beside it."""
    bars = [(f"{cell['name']}\n{WAYS[way]}", own["split"])
            for cell in cells for way, own in cell["ways"].items() if own["split"]]  # fmt: skip
    figure, axes = figure_of(8.4, 0.9 + 0.42 * len(bars))
    for number, (_, parts) in enumerate(bars):
        left, whole = 0.0, sum(parts.values()) or 1.0
        for phase, (name, colour) in PHASES.items():
            share = 100 * parts[phase] / whole
            axes.barh(number, share, 0.66, left=left, color=colour, label="" if number else name)
            if share > 7:
                axes.text(left + share / 2, number, f"{parts[phase] / 1000:,.1f}", ha="center", va="center", fontsize=7,
                          color="#374151" if phase in ("kvm", "python") else "white")
            left += share
        axes.text(101, number, f"{whole / 1000:,.1f} us", va="center", fontsize=7, color="#4b5563")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 108)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def as_svg(figure: Any) -> str:
    """A figure as an SVG document, the same for the same figure."""
    file = io.StringIO()
    with styled():
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return file.getvalue()


def inline(svg: str, prefix: str) -> str:
    """An SVG document as an element of an HTML page, its ids made the page's own: nothing in it names another place."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)


def as_png(figure: Any) -> bytes:
    """A figure as a PNG."""
    file = io.BytesIO()
    with styled():
        figure.savefig(file, format="png", dpi=160)
    return file.getvalue()
