"""report.html: one file that needs nothing else, no script and no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from launch.report_figures import CAUSES, PARTS, Figures, Results
from launch.report_svg import CAUSE_COLOURS, PALETTE, bars, matrix, pareto

_STYLE = """
:root{--paper:#fff;--ink:#1b1f24;--soft:#667;--rule:#dde1e6;--warn:#b03a00}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e8eb;--soft:#9aa3ad;--rule:#2c3138;--warn:#ff9a5c}}
body{background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
body{max-width:1000px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .2rem}h2{font-size:1.1rem;margin:2rem 0 .3rem}p{margin:.3rem 0;max-width:75ch}
.soft,figcaption{color:var(--soft);font-size:.9rem}
.verdict{font-size:1.05rem;border-left:4px solid #0072B2;padding-left:.8rem;margin:1rem 0}
figure{margin:0}svg{width:100%;height:auto;display:block}
svg text{font:12px system-ui,sans-serif;fill:var(--ink)}svg .small{font-size:11px}svg text[fill]{fill:#fff}
.grid{stroke:var(--rule);stroke-width:1}.mark{stroke:var(--ink);stroke-width:3}.cell{stroke:var(--rule)}
.limit{stroke:var(--warn);stroke-width:2;stroke-dasharray:4 3}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.85rem}.wide{overflow-x:auto}
th,td{padding:.2rem .55rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left}.bad{color:var(--warn);font-weight:600}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem;margin:.3rem 0}
.key i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em;vertical-align:-.05em}
""".strip()


def page(results: Results, found: Figures, rows: Sequence[Mapping[str, object]], made_at: str) -> str:
    title = escape(f"shardwise compare: {results['model']}")
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            *_body(results, found, rows, made_at),
            "</body></html>\n",
        )
    )


def _body(
    results: Results, found: Figures, rows: Sequence[Mapping[str, object]], made_at: str
) -> Iterator[str]:
    yield f"<h1>{escape(results['model'])}, layout by layout</h1>"
    yield f'<p class="soft">{escape(found.heading)}. Made {escape(made_at)}.</p>'
    if found.verdict:
        yield '<div class="verdict">' + "".join(f"<p>{escape(s)}</p>" for s in found.verdict) + "</div>"
    names = [one.name for one in found.pareto]
    yield "<h2>Speed for one, speed for all</h2>"
    yield _key({name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)})
    yield _figure(
        pareto(found.pareto),
        "Up and to the right is better. Hollow, dashed: predicted; filled: measured; the numbers: requests at once.",
    )
    yield "<h2>Where a token's time goes</h2>"
    yield _key({CAUSES[c]: CAUSE_COLOURS[c] for c in _used(bar.parts for bar in found.steps)})
    yield _figure(
        bars(found.steps, "ms a token, predicted by operation (layout, requests at once)", CAUSE_COLOURS),
        "The bar is the predicted TPOT by operation, the black line the measured TPOT.",
    )
    yield "<h2>Memory of the fullest GPU</h2>"
    yield _key({PARTS[p]: CAUSE_COLOURS[p] for p in _used(bar.parts for bar in found.memory)})
    yield _figure(
        bars(found.memory, "GB at the heaviest load that was run", CAUSE_COLOURS),
        "The dashed line is the memory that the smallest GPU has.",
    )
    if found.links:
        yield "<h2>Links</h2>"
        kinds = sorted({kind for _, kind in found.links.values()})
        yield _figure(matrix(found), f"GB/s in one direction, by {', '.join(kinds)}.")
    yield "<h2>Every figure</h2>"
    yield _table(rows)
    yield "<h2>Choices</h2>"
    yield _verdicts(results["verdicts"])
    for candidate in results["candidates"]:
        if candidate["refused"]:
            yield f'<p class="soft">{escape(candidate["layout"])} is left out: {escape(candidate["refused"])}</p>'
    if results["quality_unknown"] and any("+" in row["layout"] for row in results["candidates"]):
        yield f'<p class="soft">What formats do to answers is unknown: {escape(results["quality_unknown"])}.</p>'


def _used(every: Iterator[Mapping[str, float]]) -> list[str]:
    seen = {part for parts in every for part in parts}
    return [part for part in {**CAUSES, **PARTS} if part in seen]


def _key(colours: Mapping[str, str]) -> str:
    parts = (f'<span><i style="background:{c}"></i>{escape(name)}</span>' for name, c in colours.items())
    return f'<div class="key">{"".join(parts)}</div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" if svg else ""


_COLUMNS = (
    ("layout", "layout", 0),
    ("at once", "concurrency", 0),
    ("TTFT ms", "ttft_ms_predicted", 1),
    ("measured", "ttft_ms_measured", 1),
    ("error %", "ttft_ms_error_percent", 1),
    ("TPOT ms", "tpot_ms_predicted", 2),
    ("measured", "tpot_ms_measured", 2),
    ("error %", "tpot_ms_error_percent", 1),
    ("tokens/s", "output_tokens_per_s_predicted", 0),
    ("measured", "output_tokens_per_s_measured", 0),
    ("error %", "output_tokens_per_s_error_percent", 1),
    ("of limit", "share_of_limit_measured", 2),
    ("J/token", "joules_per_token", 2),
    ("MHz", "sm_clock_mhz", 0),
    ("°C", "temperature_c", 0),
    ("W", "watts", 0),
    ("outputs", "outputs", 0),
    ("perplexity %", "perplexity_rise_percent", 2),
    ("KL", "kl_divergence", 4),
    ("throttled by", "throttled_by", 0),
)


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    """Columns that nothing has a figure for are left out."""
    shown = [c for c in _COLUMNS if any(row.get(c[1]) not in (None, "") for row in rows)]
    head = "".join(f"<th>{escape(name)}</th>" for name, _, _ in shown)
    body = "".join(
        f"<tr>{''.join(_cell(row.get(k), k, digits) for _, k, digits in shown)}</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: object, key: str, digits: int) -> str:
    bad = key == "throttled_by" or (key == "outputs" and value == "different")
    said = "" if value is None else f"{value:,.{digits}f}" if isinstance(value, float) else str(value)
    if key.endswith("error_percent") and isinstance(value, float):
        said = f"{value:+.{digits}f}"
    return f"<td{' class=bad' if bad and said else ''}>{escape(said)}</td>"


def _verdicts(found: Sequence[Mapping[str, object]]) -> str:
    head = (
        "<tr><th>objective</th><th>at once</th><th>the plan chose</th><th>best was</th><th>regret %</th></tr>"
    )
    cells = (
        (v["objective"], v["concurrency"], v["chosen"], v["winner"], f"{v['regret_percent']:.1f}")
        for v in found
    )
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(c))}</td>' for c in row)}</tr>" for row in cells)
    return f"<table>{head}{body}</table>"
