"""What the report's pictures show, of results.json's object: points, bars, a matrix and three sentences. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from strategies.plan import Layout

Results = Mapping[str, Any]

CAUSES = {
    "weights": "reading weights",
    "compute": "matrix products beyond that",
    "kv": "attention over the cache",
    "all_reduce": "all-reduces",
    "all_gather": "gathering logits",
    "all_to_all": "experts' exchange",
    "send_recv": "sends between stages",
    "offload": "weights from host memory",
    "host": "launches and the host",
    "prompts": "prompts of other requests",
}
PARTS = {
    "weights": "weights",
    "kv": "KV cache",
    "activations": "activations",
    "runtime": "CUDA, NCCL, graphs",
}
MOST_LAYOUTS = 8  # in the pictures: the table has all
MOST_BARS = 24
MOST_DEVICES = 16  # of the matrix: more would not be readable


@dataclass(frozen=True, slots=True)
class Spot:
    """One layout under one load."""

    concurrency: int
    per_user: float  # tokens/s of one request, once it has begun
    per_gpu: float  # tokens/s of all requests


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    predicted: tuple[Spot, ...]
    measured: tuple[Spot, ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """Stacked. `mark`: what was measured of the whole, if it was."""

    name: str
    parts: Mapping[str, float]
    mark: float | None = None
    limit: float | None = None

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Figures:
    heading: str
    pareto: tuple[Series, ...]
    steps: tuple[Bar, ...]  # ms
    memory: tuple[Bar, ...]  # GB
    devices: tuple[str, ...]
    links: Mapping[tuple[int, int], tuple[float, str]] = field(default_factory=dict)  # GB/s, kind
    verdict: tuple[str, ...] = ()


def figures(results: Results) -> Figures:
    ran = _shown(results)
    workload, devices = results["workload"], results["devices"]
    heading = (
        f"{results['model']} in {results['dtype']} on {results['machine']}; requests of "
        f"{workload['prompt_tokens']:,} prompt and {workload['output_tokens']:,} output tokens"
    )
    return Figures(
        heading=heading,
        pareto=(*map(_series, ran), *(_beside(e, len(devices)) for e in results["against"])),
        steps=tuple(bar for c in ran for bar in _steps(c, _apart(results["concurrencies"], len(ran)))),
        memory=tuple(_memory(c, devices) for c in ran),
        devices=tuple(d["name"] for d in devices[:MOST_DEVICES]),
        links={
            (a, b): (link["gb_per_s"], link["kind"])
            for link in results["links"]
            for a, b in [link["between"]]
            if b < MOST_DEVICES
        },
        verdict=verdict(results),
    )


def _shown(results: Results) -> list[Mapping[str, Any]]:
    """Candidates that ran; of many those that were chosen or best somewhere, then the plan's first."""
    ran = [c for c in results["candidates"] if c["results"]]
    named = {name for v in results["verdicts"] for name in (v["chosen"], v["winner"])}
    kept = sorted(ran, key=lambda c: c["layout"] not in named)[:MOST_LAYOUTS]
    return [c for c in ran if c in kept]


def _apart(concurrencies: Sequence[int], layouts: int) -> Sequence[int]:
    """Loads that have a bar for each layout: all, or the lightest and the heaviest."""
    return (
        concurrencies if len(concurrencies) * layouts <= MOST_BARS else (concurrencies[0], concurrencies[-1])
    )


def _spot(concurrency: int, figures: Mapping[str, float], gpus: int) -> Spot | None:
    """None where answers of one token have no speed."""
    if not figures["tpot_ms"]:
        return None
    return Spot(concurrency, 1e3 / figures["tpot_ms"], figures["output_tokens_per_s"] / gpus)


def _series(candidate: Mapping[str, Any]) -> Series:
    gpus = Layout.parse(candidate["layout"]).dims.world_size
    every = candidate["results"]
    predicted = (_spot(r["concurrency"], r["predicted"], gpus) for r in every)
    measured = (_spot(r["concurrency"], r["measured"], gpus) for r in every if r["measured"])
    return Series(candidate["layout"], tuple(s for s in predicted if s), tuple(s for s in measured if s))


def _beside(endpoint: Mapping[str, Any], gpus: int) -> Series:
    """Nothing is known of an endpoint's GPUs: it is counted as if it had all of this machine's."""
    spots = (_spot(r["concurrency"], r["measured"], gpus) for r in endpoint["results"] if r["measured"])
    host = endpoint["endpoint"].partition("://")[2].partition("/")[0]
    return Series(host, (), tuple(s for s in spots if s))


def _steps(candidate: Mapping[str, Any], loads: Sequence[int]) -> Iterator[Bar]:
    for result in candidate["results"]:
        if result["concurrency"] not in loads:
            continue
        parts = {cause: ms for cause, ms in result["step_ms"].items() if ms > 0}
        beyond = result["predicted"]["tpot_ms"] - sum(parts.values())
        if beyond > 0.005 * result["predicted"]["tpot_ms"]:
            parts["prompts"] = beyond
        name = f"{candidate['layout']}, {result['concurrency']}" if len(loads) > 1 else candidate["layout"]
        yield Bar(name, parts, result["measured"]["tpot_ms"] if result["measured"] else None)


def _memory(candidate: Mapping[str, Any], devices: Sequence[Mapping[str, Any]]) -> Bar:
    fullest = max(candidate["results"], key=lambda r: sum(r["memory_gb"].values()))
    limit = min(d["memory_gb"] for d in devices)
    return Bar(candidate["layout"], fullest["memory_gb"], limit=limit)


# --- the verdict --------------------------------------------------------------------------------------------


def verdict(results: Results) -> tuple[str, ...]:
    """Which layout, how right the plan was, and whether to believe it: three sentences."""
    if not results["verdicts"]:
        return ()
    return _which(results), _how_right(results), _believe(results)


def _which(results: Results) -> str:
    """The winners by objective, loads with the same winner together."""
    told = []
    for objective in ("latency", "throughput"):
        by_winner: dict[str, list[int]] = {}
        for v in results["verdicts"]:
            if v["objective"] == objective:
                by_winner.setdefault(v["winner"], []).append(v["concurrency"])
        many = len(by_winner) > 1
        parts = [
            f"{name}{f' at {_listed(loads)} at once' if many else ''}" for name, loads in by_winner.items()
        ]
        told.append(f"{_listed(parts)} for {objective}")
    ran = sum(bool(c["results"]) for c in results["candidates"])
    return f"Use {', and '.join(told)}: the best measured of {ran} layouts."


def _how_right(results: Results) -> str:
    errors: dict[str, list[float]] = {}
    for candidate in results["candidates"]:
        for result in candidate["results"]:
            for metric, error in (result["error_percent"] or {}).items():
                if error is not None:
                    errors.setdefault(metric, []).append(abs(error))
    names = {"tpot_ms": "TPOT", "ttft_ms": "TTFT", "output_tokens_per_s": "throughput"}
    told = [f"{names[m]} by {statistics.median(errors[m]):.0f} %" for m in names if m in errors]
    worst = max(results["verdicts"], key=lambda v: v["regret_percent"])
    regret = "its choice was the best every time"
    if worst["regret_percent"] >= 0.05:
        regret = (
            f"its worst choice, {worst['chosen']} for {worst['objective']} at {worst['concurrency']} at once, "
            f"lost {worst['regret_percent']:.1f} % to {worst['winner']}"
        )
    return f"The plan missed {', '.join(told)} (medians), and {regret}."


def _believe(results: Results) -> str:
    ran = [c for c in results["candidates"] if c["results"]]
    said = {c["outputs"] for c in ran}
    different = [c["layout"] for c in ran if c["outputs"] == "different"]
    if different:
        outputs = f"the outputs of {_listed(different)} are NOT those of one process"
    else:
        outputs = "all outputs are equal" if "equal" in said else "outputs were not compared"
    throttled = [
        f"{c['layout']} at {r['concurrency']}" for c in ran for r in c["results"] if r["throttled_by"]
    ]
    watched = any(r["devices"] for c in ran for r in c["results"])
    if throttled:
        held = f"GPUs were throttled in {len(throttled)} of {sum(len(c['results']) for c in ran)} runs"
        held += (
            f" ({_listed(throttled[:3])}{' …' if len(throttled) > 3 else ''}): there the figures are too low"
        )
    else:
        held = "no GPU was throttled" if watched else "nothing watched the processors' clocks"
    return f"{outputs[0].upper()}{outputs[1:]}, and {held}."


def _listed(items: Sequence[object]) -> str:
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
