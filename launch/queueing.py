"""A plan's layouts at a request rate: the scheduler, simulated with the cost model's step times."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.errors import BadRequest
from cluster.topology import Topology
from launch.progress import Progress
from orchestrator.simulate import Queueing, highest_rate, queueing
from strategies.cost import estimate
from strategies.explain import ms
from strategies.place import place
from strategies.plan import Candidate, Placement, Plan
from strategies.spec import ModelSpec, Workload

if TYPE_CHECKING:
    from rich.table import Table

LOWEST, HIGHEST = 1e-9, math.inf  # a request in 32 years; the rate to be found
MOST_LAYOUTS = 6  # that are simulated, the plan's best
MOST_TTFT_S = 10.0  # where nobody names a limit: who waits longer has left
LEAST_REQUESTS, MOST_REQUESTS = 200, 1500
LIVES = 5.0
"""Times a request's life that arrivals go on, lest a queue that grows for ever look like one that does not."""


@dataclass(frozen=True, slots=True)
class Simulations:
    by_layout: Mapping[str, Queueing | None]  # None: it keeps the limits at no rate
    searched: bool  # the rates are the highest within the limits


def rate_of(args: argparse.Namespace) -> float | None:
    """What --request-rate asks for; None: nothing is simulated. Raises BadRequest."""
    if args.request_rate is None:
        return None
    if args.request_rate == "max":
        return HIGHEST
    try:
        rate = float(args.request_rate)
    except ValueError:
        rate = math.nan
    if not LOWEST <= rate < HIGHEST:
        raise BadRequest(
            f"--request-rate is {args.request_rate}; it must be requests a second, "
            f"{LOWEST:g} at least, or max"
        )
    return rate


def queued(
    made: Plan,
    spec: ModelSpec,
    topology: Topology,
    workload: Workload,
    dtype: str,
    rate: float,
    progress: Progress,
) -> tuple[Plan, Simulations]:
    """The plan with the layout that does best at the rate, or sustains the highest, and why."""
    tried = [c for c in made.candidates if c.feasible and c.not_runnable is None][:MOST_LAYOUTS]
    found: dict[str, Queueing | None] = {}
    with progress.bar(f"simulating {len(tried)} layouts", unit_is_bytes=False) as bar:
        for i, candidate in enumerate(tried):
            placement = place(spec, candidate.layout, dtype, topology, None, workload)
            at = _at(placement, candidate, workload)
            if rate == HIGHEST:
                limit_s = workload.most_ttft_s or MOST_TTFT_S
                ceiling = _ceiling_per_s(candidate, placement, workload)
                found[candidate.layout.name] = highest_rate(at, limit_s, workload.most_tpot_s, ceiling)
            else:
                found[candidate.layout.name] = at(rate)
            bar.update(i + 1, len(tried))
    simulations = Simulations(found, rate == HIGHEST)
    best = best_of(tried, simulations, workload)
    sentences = tuple(_sentences(best, tried, simulations, workload, rate))
    return replace(made, chosen=best, explanation=(*sentences, *made.explanation)), simulations


def _at(placement: Placement, candidate: Candidate, workload: Workload) -> Callable[[float], Queueing]:
    known = candidate.estimate
    assert known is not None
    prompt, output = workload.prompt_tokens, workload.output_tokens
    life_s = known.ttft_s + output * known.tpot_s

    def at(rate: float) -> Queueing:
        count = math.ceil(min(MOST_REQUESTS, max(LEAST_REQUESTS, LIVES * life_s * rate)))
        return queueing(placement, known.kv_tokens, prompt, output, rate, requests=count)

    return at


def _ceiling_per_s(candidate: Candidate, placement: Placement, workload: Workload) -> float:
    """More than any load that never ends gets through: a step of nothing but as many decodes as there are places."""
    assert candidate.estimate is not None
    length = workload.prompt_tokens + workload.output_tokens
    most = max(1, min(placement.engine.max_sequences, candidate.estimate.kv_tokens // length))
    full = replace(workload, concurrency=most * candidate.dims.dp, steady=True)
    return 1.5 * estimate(placement, full).output_tokens_per_s / workload.output_tokens


def best_of(tried: Sequence[Candidate], found: Simulations, workload: Workload) -> Candidate | None:
    """Of those that keep the limits: the highest rate, or at the rate asked for the shortest median answer."""

    def rank(candidate: Candidate) -> tuple[float, int]:
        seen = found.by_layout[candidate.layout.name]
        assert seen is not None
        answer_s = seen.ttft_p50_s + (workload.output_tokens - 1) * seen.tpot_p50_s
        return -seen.requests_per_s if found.searched else answer_s, candidate.dims.world_size

    kept = []
    for candidate in tried:
        seen = found.by_layout[candidate.layout.name]
        if seen is not None and seen.keeps(workload.most_ttft_s, workload.most_tpot_s):
            kept.append(candidate)
    return min(kept, key=rank, default=None)


def _sentences(
    best: Candidate | None,
    tried: Sequence[Candidate],
    found: Simulations,
    workload: Workload,
    rate: float,
) -> Iterator[str]:
    limits = [
        f"{name} {ms(limit)}"
        for name, limit in (("first token", workload.most_ttft_s), ("each next one", workload.most_tpot_s))
        if limit is not None
    ]
    within = f" within {' and '.join(limits)} for 99 of 100 requests" if limits else ""
    if best is None:
        asked = "any rate" if found.searched else f"{rate:g} requests a second"
        yield f"No layout keeps{within or ' up'} at {asked}, simulated."
        return
    seen = found.by_layout[best.layout.name]
    assert seen is not None
    what = "sustains" if found.searched else "at"
    yield (
        f"{best.layout.name} {what} {seen.requests_per_s:.3g} requests a second{within}, simulated with Poisson "
        f"arrivals: first token after {ms(seen.ttft_p50_s)} in the median, {ms(seen.ttft_p99_s)} for one in 100."
    )


def to_json(found: Simulations) -> list[dict[str, object]]:
    return [
        {"layout": name, "requests_per_s": None}
        if seen is None
        else {
            "layout": name,
            "requests_per_s": round(seen.requests_per_s, 4),
            "ttft_p50_ms": round(seen.ttft_p50_s * 1e3, 3),
            "ttft_p99_ms": round(seen.ttft_p99_s * 1e3, 3),
            "tpot_p50_ms": round(seen.tpot_p50_s * 1e3, 3),
            "tpot_p99_ms": round(seen.tpot_p99_s * 1e3, 3),
            "output_tokens_per_s": round(seen.output_tokens_per_s, 2),
        }
        for name, seen in found.by_layout.items()
    ]


def table(found: Simulations) -> Table:
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = (
        "simulated",
        "requests/s",
        "TTFT ms\nmedian",
        "\np99",
        "TPOT ms\nmedian",
        "\np99",
        "output\ntokens/s",
    )
    for i, name in enumerate(names):
        made.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for name, seen in found.by_layout.items():
        if seen is None:
            made.add_row(name, "none")
            continue
        times = (seen.ttft_p50_s, seen.ttft_p99_s, seen.tpot_p50_s, seen.tpot_p99_s)
        cells = (ms(t).removesuffix(" ms") for t in times)
        made.add_row(name, f"{seen.requests_per_s:.3g}", *cells, f"{seen.output_tokens_per_s:,.0f}")
    return made
