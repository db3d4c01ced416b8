"""The plan in sentences: what a step is made of, why the next best lost, where the answer would change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from cluster.topology import Provenance
from strategies.cost import estimate, score
from strategies.intervals import FIRST_TOKEN
from strategies.place import cache_tokens, count
from strategies.plan import Candidate, Estimate, Placement
from strategies.quantize import RUNS
from strategies.spec import Objective, Workload

_CAUSES = {
    "weights": "reading weights",
    "compute": "matrix products beyond that",
    "kv": "attention over the KV cache",
    "all_reduce": "all-reduces",
    "all_gather": "gathering logits",
    "all_to_all": "exchange of experts' tokens",
    "send_recv": "sends between stages",
    "offload": "waiting for weights from host memory",
    "host": "launches and the host",
}
_MOST_CONCURRENCY = 4096
_VISIBLE = 1.01
_TIE = 1.0005
_WAITS = 1.1


def explain(ranked: Sequence[tuple[Candidate, Placement]], workload: Workload) -> tuple[str, ...]:
    """Sentences on the feasible candidates, best first."""
    best, placement = ranked[0]
    sentences = [
        _what_it_gives(best, workload),
        _what_a_step_is(best),
        *_what_launches_cost(placement, workload),
    ]
    sentences += [f"{best.layout.name}: {note}." for note in best.marked]
    rivals = [placement]
    if len(ranked) > 1:
        second = _runner_up(ranked, workload)
        others = "" if second is ranked[1] else f"Of the others on {count(best.dims.world_size, 'device')} "
        sentences.append(others + _why_it_lost(best, second[0], workload))
        rivals = _rivals([placement, second[1]], [p for _, p in ranked])
    crossings = (_concurrency_crossing(placement, rivals, workload), _link_crossing(rivals, workload))
    told = [crossing for crossing in crossings if crossing]
    return (*sentences, *told, _how_sure(placement, _made(best)))


_SOURCES = {
    Provenance.MEASURED: "what was measured here",
    Provenance.TABLE: "tables of like ones",
    Provenance.DATASHEET: "their data sheets",
}


def _how_sure(placement: Placement, made: Estimate) -> str:
    """Where the figures of devices and links come from, and how far off predictions made of them may be."""
    devices = {placement.topology.devices[i].provenance for i in placement.devices}
    links = {placement.topology.link(a, b).provenance for a, b in pairwise(placement.devices)}
    said = f"Devices are taken by {_joined(devices)}"
    if links:
        said += f", links by {_joined(links)}"
    off = (
        f"tokens may take {made.spread:.0%} more or less, the first {min(1.0, FIRST_TOKEN * made.spread):.0%}"
    )
    measured = devices | links == {Provenance.MEASURED}
    way = "" if measured else "; `shardwise profile` on the machine narrows it"
    return f"{said}: {off}{way}."


def _joined(sources: set[Provenance]) -> str:
    return " and ".join(_SOURCES[source] for source in sorted(sources))


def explain_planned_only(
    planned: Sequence[tuple[Candidate, Placement]], chosen: Candidate | None, workload: Workload
) -> tuple[str, ...]:
    """The best of what can be planned but not run yet, and what it would gain."""
    if not planned:
        return ()
    best, _ = planned[0]
    made = _made(best)
    gives = (
        f"{_tokens_per_s(made.output_tokens_per_s)} tokens/s, the first after {ms(made.ttft_s)}, each next one after "
        f"{ms(made.tpot_s)}, {made.memory_bytes_per_device / 1e9:.1f} GB a card"
    )
    if chosen is None:
        step = _what_a_step_is(best)
        return (f"{_why_apart(best)}: {best.layout.name} would give {gives}.", step, *_what_it_streams(best))
    ratio = score(_made(chosen), chosen.dims, workload) / score(made, best.dims, workload)
    if ratio < _VISIBLE:
        return ()
    gain = {
        Objective.LATENCY: f"answer in {1 / ratio:.0%} of the time",
        Objective.THROUGHPUT: f"give {ratio:.2f} times the tokens a second",
        Objective.COST: f"cost {1 / ratio:.0%} a token",
    }[workload.objective]
    return (f"{_why_apart(best)}: {best.layout.name} would {gain}: {gives}.", *_what_it_streams(best))


def _what_it_streams(candidate: Candidate) -> tuple[str, ...]:
    return (f"{candidate.layout.name}: {candidate.marked[-1]}.",) if candidate.offload else ()


def _why_apart(candidate: Candidate) -> str:
    runs = candidate.format.weights in ("", *RUNS)
    if candidate.format.name and runs and candidate.dims.ep == 1:
        return "Not chosen, since it changes the model's answers"
    return "Planned only, this version does not run it"


def _tokens_per_s(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _made(candidate: Candidate) -> Estimate:
    assert candidate.estimate is not None, "only feasible candidates are explained"
    return candidate.estimate


def _what_it_gives(best: Candidate, workload: Workload) -> str:
    made = _made(best)
    at_once = "one request" if workload.concurrency == 1 else f"{workload.concurrency} requests at once"
    return (
        f"{best.layout.name} serves {at_once} at {_tokens_per_s(made.output_tokens_per_s)} tokens/s: the first token "
        f"after {ms(made.ttft_s)}, each next one after {ms(made.tpot_s)}. That is {made.share_of_limit:.0%} "
        f"of the limit that bandwidth and FLOP/s set for {count(best.dims.world_size, 'device')}."
    )


def _what_a_step_is(best: Candidate) -> str:
    parts = _made(best).breakdown
    total = sum(parts.values())
    shares = sorted(((seconds / total, cause) for cause, seconds in parts.items()), reverse=True)
    told = [f"{share:.0%} {_CAUSES[cause]}" for share, cause in shares if share >= 0.005]
    return f"A decode step takes {ms(total)}: {', '.join(told)}."


def _what_launches_cost(placement: Placement, workload: Workload) -> tuple[str, ...]:
    """Where the first token waits for launches, and no faster device or wider split would bring it sooner."""
    freed = replace(placement.engine, eager_layer_s=0.0, eager_layers=0.0)
    now, then = (_ttft_s(p, workload) for p in (placement, replace(placement, engine=freed)))
    if now < _WAITS * then:
        return ()
    captured = placement.engine.graph_tokens
    step = f"a step of over {captured:,} tokens" if captured else "every step"
    return (
        f"The first token waits for the host, which launches {step} layer by layer: without that it would come after "
        f"{ms(then)}.",
    )


def _runner_up(
    ranked: Sequence[tuple[Candidate, Placement]], workload: Workload
) -> tuple[Candidate, Placement]:
    """The next best, or on several devices the next on as many: tp8 less one rank is no other way to use eight."""
    (best, _), second = ranked[0], ranked[1]
    devices = best.dims.world_size
    ties = score(_made(second[0]), second[0].dims, workload) < _TIE * score(_made(best), best.dims, workload)
    if devices <= 2 or ties:
        return second
    return next((pair for pair in ranked[1:] if pair[0].dims.world_size == devices), second)


def _why_it_lost(best: Candidate, second: Candidate, workload: Workload) -> str:
    """The next best, and the causes that cost it most: in the decode step, then in the first token."""
    ours, theirs = _made(best), _made(second)
    ratio = score(theirs, second.dims, workload) / score(ours, best.dims, workload)
    if ratio < _TIE:
        devices = count(second.dims.world_size, "device")
        return f"{second.layout.name} does as well with {devices}; a tie goes to fewer devices, then fewer stages."
    verdict = {
        Objective.LATENCY: f"takes {_more(ratio, 'longer', 'long')} for a request",
        Objective.THROUGHPUT: f"gives {1 - 1 / ratio:.1%} fewer tokens a second",
        Objective.COST: f"costs {_more(ratio, 'more', 'much')} a token",
    }[workload.objective]
    causes = [*ours.breakdown, *(c for c in theirs.breakdown if c not in ours.breakdown)]
    change = {c: theirs.breakdown.get(c, 0.0) - ours.breakdown.get(c, 0.0) for c in causes}
    told = [
        f"{signed_ms(s)} {_CAUSES[c]}"
        for c, s in sorted(change.items(), key=lambda i: -abs(i[1]))
        if abs(s) > 5e-6
    ]
    step = f"per decode step {', '.join(told[:3])}; " if told else ""
    first = signed_ms(theirs.ttft_s - ours.ttft_s)
    return f"{second.layout.name} comes next and {verdict}: {step}to the first token {first}."


def _more(ratio: float, comparative: str, positive: str) -> str:
    return f"{ratio - 1:.1%} {comparative}" if ratio < 2 else f"{ratio:,.1f} times as {positive}"


def _rivals(ahead: Sequence[Placement], placements: Sequence[Placement]) -> list[Placement]:
    """The chosen, the next, and those in its format that split the whole machine in one way only: few, each is
    searched."""
    most, best = max(p.dims.world_size for p in placements), ahead[0].layout
    like = [p for p in placements if (p.layout.format, p.layout.offload) == (best.format, best.offload)]
    pure = [p for p in like if max(p.dims.tp, p.dims.pp, p.dims.dp) == most]
    return list({p.layout: p for p in [*ahead, *pure]}.values())


def _concurrency_crossing(best: Placement, rivals: Sequence[Placement], workload: Workload) -> str | None:
    """The nearest concurrency at which a rival overtakes the chosen layout in tokens a second."""

    def rate(placement: Placement, concurrency: int) -> float:
        load = replace(workload, concurrency=concurrency)
        wanted = max(placement.room.cached, cache_tokens(placement.dims, placement.engine, load))
        placed = replace(
            placement, room=replace(placement.room, cached=wanted)
        )  # which offloading makes way for
        return estimate(placed, load).output_tokens_per_s

    here = max(rivals, key=lambda p: rate(p, workload.concurrency))

    def leader(concurrency: int) -> Placement:
        """The one ahead of all, if it is ahead of `here` by enough to be seen."""
        first = max(rivals, key=lambda p: rate(p, concurrency))
        return first if rate(first, concurrency) > _VISIBLE * rate(here, concurrency) else here

    concurrency = workload.concurrency
    while concurrency < _MOST_CONCURRENCY and leader(concurrency * 2) is here:
        concurrency *= 2
    if concurrency < _MOST_CONCURRENCY:
        at = _first(concurrency, concurrency * 2, lambda c: leader(c) is not here)
        return _overtakes(f"From {at} requests at once", leader(at), here, at, rate)
    concurrency = workload.concurrency
    while concurrency > 1 and leader(concurrency // 2) is here:
        concurrency //= 2
    if concurrency > 1:
        at = _first(concurrency // 2, concurrency, lambda c: leader(c) is here)
        return _overtakes(f"Below {at} requests at once", leader(at - 1), here, at - 1, rate)
    if here is best and len(rivals) > 1:
        others = ", ".join(p.layout.name for p in rivals[1:])
        where = f"at any concurrency up to {_MOST_CONCURRENCY:,}"
        return f"None of its rivals ({others}) gives more tokens/s than {best.layout.name} {where}."
    return None


def _overtakes(
    where: str, ahead: Placement, behind: Placement, concurrency: int, rate: Callable[[Placement, int], float]
) -> str:
    more, less = (_tokens_per_s(rate(placement, concurrency)) for placement in (ahead, behind))
    return (
        f"{where} {ahead.layout.name} gives more tokens/s than {behind.layout.name} "
        f"({more} against {less} at {concurrency})."
    )


def _link_crossing(rivals: Sequence[Placement], workload: Workload) -> str | None:
    """The link rate from which tensor parallelism's first token comes before any without it."""
    split = min((p for p in rivals if p.dims.tp > 1), key=lambda p: _ttft_s(p, workload), default=None)
    whole = min((p for p in rivals if p.dims.tp == 1), key=lambda p: _ttft_s(p, workload), default=None)
    if split is None or whole is None:
        return None
    link = split.topology.slowest(split.stage(0, 0))
    assert link is not None, "a tp group has links"

    def wins(bytes_per_s: float) -> bool:
        return _ttft_s(_with_link_rate(split, bytes_per_s), workload) < _ttft_s(whole, workload)

    low, high = link.bytes_per_s / 1000, link.bytes_per_s * 1000
    if wins(low) or not wins(high):
        return None
    while high / low > 1.005:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if wins(middle) else (middle, high)
    have = f"the {link.kind} link here is taken at {link.bytes_per_s / 1e9:.1f} ({link.provenance})"
    need = f"where all-reduces run above {high / 1e9:.1f} GB/s"
    return f"{split.layout.name} gives its first token before {whole.layout.name} {need}; {have}."


def _ttft_s(placement: Placement, workload: Workload) -> float:
    return estimate(placement, workload).ttft_s


def _with_link_rate(placement: Placement, bytes_per_s: float) -> Placement:
    links = {pair: replace(link, bytes_per_s=bytes_per_s) for pair, link in placement.topology.links.items()}
    return replace(placement, topology=replace(placement.topology, links=links))


def _first(low: int, high: int, true: Callable[[int], bool]) -> int:
    """The least n in (low, high] for which `true` holds, given that it holds at high and not at low."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if true(middle) else (middle, high)
    return high


def ms(seconds: float) -> str:
    """Three figures: `0.85 ms`, `19.2 ms`, `1,240 ms`."""
    value = seconds * 1e3
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


def signed_ms(seconds: float) -> str:
    return f"{'-' if seconds < 0 else '+'}{ms(abs(seconds))}"
