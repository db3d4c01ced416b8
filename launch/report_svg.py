"""Charts as SVG text: axes, points, stacked bars, a matrix. No colours but classes and the palette; no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

from launch.report_figures import Bar, Figures, Series, Spot

PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A5195",
    "#8C6D31",
    "#7F7F7F",
    "#A0522D",
)
"""Okabe and Ito's, for eyes that do not tell red from green; and four more."""

CAUSE_COLOURS = {
    "weights": "#0072B2",
    "compute": "#56B4E9",
    "kv": "#009E73",
    "all_reduce": "#D55E00",
    "all_gather": "#E69F00",
    "all_to_all": "#CC79A7",
    "send_recv": "#B8860B",
    "offload": "#7A5195",
    "host": "#999999",
    "prompts": "#D9D9D9",
    "activations": "#E69F00",
    "runtime": "#999999",
}


def ticks(low: float, high: float, *, log: bool = False, count: int = 6) -> list[float]:
    """Round numbers within a range: 1, 2 or 5 times a power of ten."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
        inside = [t for t in every if low <= t <= high]
        return inside if len(inside) <= count + 2 else [t for t in inside if f"{t:e}".startswith("1")]
    step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(step))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= step)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def text(x: float, y: float, said: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(said)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def picture(width: float, height: float, title: str, parts: Iterator[str]) -> str:
    """Never wider than drawn, plus a little: text keeps its size."""
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{1.15 * width:.0f}px"'
    head = f'<svg {size} role="img" aria-label="{escape(title)}">'
    return f"{head}{''.join(parts)}</svg>"


# --- tokens/s per user against tokens/s per GPU -------------------------------------------------------------

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720.0, 400.0, 62.0, 46.0, 14.0, 16.0


def pareto(every: Sequence[Series]) -> str:
    spots = [s for one in every for s in (*one.predicted, *one.measured)]
    if not spots:
        return ""
    most_x = 1.06 * max(s.per_user for s in spots)
    low, high = min(s.per_gpu for s in spots) / 1.3, max(s.per_gpu for s in spots) * 1.3

    def x(value: float) -> float:
        return LEFT + value / most_x * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - math.log(value / low) / math.log(high / low) * (HEIGHT - BOTTOM - TOP)

    def parts() -> Iterator[str]:
        for value in ticks(0, most_x):
            yield line(x(value), TOP, x(value), HEIGHT - BOTTOM, "grid")
            yield text(x(value), HEIGHT - BOTTOM + 16, number(value), "middle")
        for value in ticks(low, high, log=True):
            yield line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid")
            yield text(LEFT - 6, y(value) + 4, number(value), "end")
        yield text((LEFT + WIDTH) / 2, HEIGHT - 6, "tokens/s of one user, after the first token", "middle")
        yield (
            f'<text transform="translate(14 {HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">tokens/s per GPU</text>'
        )
        for i, one in enumerate(every):
            yield from _one_series(one, PALETTE[i % len(PALETTE)], x, y)

    return picture(WIDTH, HEIGHT, "tokens/s of one user against tokens/s per GPU", parts())


def _one_series(
    one: Series, colour: str, x: Callable[[float], float], y: Callable[[float], float]
) -> Iterator[str]:
    for spots, filled in ((one.predicted, False), (one.measured, True)):
        path = " ".join(f"{x(s.per_user):.1f},{y(s.per_gpu):.1f}" for s in spots)
        dashes = "" if filled else ' stroke-dasharray="4 4"'
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}/>'
        for s in spots:
            fill = colour if filled else "var(--paper)"
            told = f"<title>{escape(_told(one.name, s, filled))}</title>"
            yield f'<circle cx="{x(s.per_user):.1f}" cy="{y(s.per_gpu):.1f}" r="5" fill="{fill}" '
            yield f'stroke="{colour}" stroke-width="2">{told}</circle>'
    shown = one.measured or one.predicted
    for s in shown:
        yield text(x(s.per_user) + 8, y(s.per_gpu) - 6, str(s.concurrency), "start", ' class="small"')


def _told(name: str, spot: Spot, measured: bool) -> str:
    how = "measured" if measured else "predicted"
    return f"{name}, {spot.concurrency} at once, {how}: {spot.per_user:.1f} a user, {spot.per_gpu:,.0f} a GPU"


# --- bars ---------------------------------------------------------------------------------------------------

ROW = 22.0


def bars(every: Sequence[Bar], unit: str, colours: Mapping[str, str]) -> str:
    if not every:
        return ""
    left = 20.0 + 6.4 * max(len(bar.name) for bar in every)
    most = 1.03 * max(max(bar.total, bar.mark or 0.0, bar.limit or 0.0) for bar in every)
    height = len(every) * ROW + 40.0

    def x(value: float) -> float:
        return left + value / most * (WIDTH - left - 64.0)

    def parts() -> Iterator[str]:
        for value in ticks(0, most):
            yield line(x(value), 4, x(value), height - 34, "grid")
            yield text(x(value), height - 18, number(value), "middle")
        yield text((left + WIDTH) / 2, height - 3, unit, "middle")
        for i, bar in enumerate(every):
            top = 6 + i * ROW
            yield text(left - 8, top + 12, bar.name, "end")
            at = 0.0
            for part, value in bar.parts.items():
                told = f"<title>{escape(part)}: {value:.3g} {escape(unit.split(' ')[0])}</title>"
                yield f'<rect x="{x(at):.1f}" y="{top:.1f}" width="{x(at + value) - x(at):.2f}" height="16" '
                yield f'fill="{colours[part]}">{told}</rect>'
                at += value
            shown = at
            if bar.mark is not None:
                yield line(x(bar.mark), top - 3, x(bar.mark), top + 19, "mark")
                shown = max(at, bar.mark)
            if bar.limit is not None:
                yield line(x(bar.limit), top - 3, x(bar.limit), top + 19, "limit")
            yield text(x(shown) + 6, top + 12, f"{at:.3g}", "start", ' class="small"')

    return picture(WIDTH, height, unit, parts())


# --- links --------------------------------------------------------------------------------------------------


def matrix(found: Figures) -> str:
    """GB/s between devices; darker is faster."""
    n = len(found.devices)
    if n < 2 or not found.links:
        return ""
    cell, left, top = min(90.0, 560.0 / n), 40.0, 24.0
    most = max(rate for rate, _ in found.links.values())

    def parts() -> Iterator[str]:
        for i in range(n):
            yield text(left - 8, top + (i + 0.5) * cell * 0.6 + 4, str(i), "end")
            yield text(left + (i + 0.5) * cell, top - 8, str(i), "middle")
            for j in range(n):
                rate, kind = found.links.get((min(i, j), max(i, j)), (0.0, ""))
                x, y = left + j * cell, top + i * cell * 0.6
                shade = 0.12 + 0.78 * rate / most if rate else 0.0
                yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 2:.1f}" height="{cell * 0.6 - 2:.1f}" '
                yield f'fill="#0072B2" fill-opacity="{shade:.2f}" class="cell"><title>{escape(kind)}</title></rect>'
                if rate:
                    ink = ' fill="#fff"' if shade > 0.5 else ""
                    said = number(rate)
                    yield text(x + cell / 2, y + cell * 0.3 + 4, said, "middle", f' class="small"{ink}')

    return picture(left + n * cell + 10, top + n * cell * 0.6 + 10, "links, GB/s", parts())
