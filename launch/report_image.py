"""report.png: the page's pictures on one sheet, by matplotlib."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.report_figures import CAUSES, PARTS, Bar, Figures, Series
from launch.report_svg import CAUSE_COLOURS, PALETTE, number, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (16.0, 11.0)
SENTENCE_WIDTH = 150


def image(found: Figures, title: str) -> bytes:
    """A PNG. Raises ImportError where there is no matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=INCHES, dpi=110, layout="constrained")
    FigureCanvasAgg(sheet)
    said = [textwrap.fill(s, SENTENCE_WIDTH) for s in found.verdict]
    sheet.suptitle("\n".join((textwrap.fill(title, SENTENCE_WIDTH), *said)), x=0.01, ha="left", fontsize=12)
    rows = sheet.add_gridspec(2, 1, height_ratios=(1.5, 1.0))
    upper = rows[0].subgridspec(1, 2, width_ratios=(1.15, 1.0))
    lower = rows[1].subgridspec(1, 2, width_ratios=(2.0, 1.0)) if found.links else rows[1].subgridspec(1, 1)
    _pareto(sheet.add_subplot(upper[0]), found.pareto)
    _bars(
        sheet.add_subplot(upper[1]), found.steps, "Where a token's time goes", "ms a token, predicted", CAUSES
    )
    _bars(sheet.add_subplot(lower[0]), found.memory, "Memory of the fullest GPU", "GB", PARTS)
    if found.links:
        _matrix(sheet.add_subplot(lower[1]), found)
    out = io.BytesIO()
    sheet.savefig(out, format="png")
    return out.getvalue()


def _pareto(axes: Axes, every: Sequence[Series]) -> None:
    for i, one in enumerate(every):
        colour = PALETTE[i % len(PALETTE)]
        for spots, style, fill in ((one.predicted, "--", "white"), (one.measured, "-", colour)):
            x, y = [s.per_user for s in spots], [s.per_gpu for s in spots]
            named = one.name if spots and spots is (one.measured or one.predicted) else None
            axes.plot(x, y, style, color=colour, marker="o", markerfacecolor=fill, markersize=8, label=named)
        for s in one.measured or one.predicted:
            axes.annotate(
                str(s.concurrency), (s.per_user, s.per_gpu), (7, 5), textcoords="offset points", fontsize=9
            )
    axes.set_yscale("log")
    seen = [s.per_gpu for one in every for s in (*one.predicted, *one.measured)]
    marks = ticks(min(seen, default=1) / 1.3, max(seen, default=10) * 1.3, log=True)
    axes.set_yticks(marks, [number(mark) for mark in marks])
    axes.minorticks_off()
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens/s of one user, after the first token")
    axes.set_ylabel("tokens/s per GPU")
    axes.set_title(
        "Speed for one, speed for all (hollow: predicted, filled: measured)", loc="left", fontsize=11
    )
    axes.grid(alpha=0.3)
    if every:
        axes.legend(frameon=False)


def _bars(axes: Axes, every: Sequence[Bar], title: str, unit: str, names: Any) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(unit)
    shown: set[str] = set()
    for row, bar in enumerate(every):
        at = 0.0
        for part, value in bar.parts.items():
            label = names[part] if part not in shown else None
            axes.barh(row, value, left=at, height=0.7, color=CAUSE_COLOURS[part], label=label)
            shown.add(part)
            at += value
        if bar.mark is not None:
            label = "measured TPOT" if "mark" not in shown else ""
            axes.vlines(bar.mark, row - 0.45, row + 0.45, colors="black", linewidth=3, label=label)
            shown.add("mark")
        if bar.limit is not None:
            label = "memory there is" if "limit" not in shown else ""
            axes.vlines(
                bar.limit,
                row - 0.45,
                row + 0.45,
                colors="#b03a00",
                linestyles="dashed",
                linewidth=2,
                label=label,
            )
            shown.add("limit")
    axes.set_yticks(range(len(every)), [bar.name for bar in every])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    if every:
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def _matrix(axes: Axes, found: Figures) -> None:
    n = len(found.devices)
    rates = [
        [found.links.get((min(i, j), max(i, j)), (float("nan"), ""))[0] for j in range(n)] for i in range(n)
    ]
    most = max(rate for rate, _ in found.links.values())
    axes.imshow(rates, cmap="Blues", vmin=0, vmax=most)
    for i, row in enumerate(rates):
        for j, rate in enumerate(row):
            if rate == rate:
                axes.text(
                    j,
                    i,
                    f"{rate:,.4g}",
                    ha="center",
                    va="center",
                    color="white" if rate > most / 2 else "black",
                )
    axes.set_xticks(range(n))
    axes.set_yticks(range(n))
    kinds = ", ".join(sorted({kind for _, kind in found.links.values()}))
    axes.set_title(f"Links, GB/s in one direction ({kinds})", loc="left", fontsize=11)
