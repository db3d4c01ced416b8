"""A load's figures, under the names that `vllm bench serve` gives them. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launch.bench_load import Answer

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What an answer must keep to count as good."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def any(self) -> bool:
        return self.ttft_ms is not None or self.tpot_ms is not None

    def keeps(self, answer: Answer) -> bool:
        late = self.ttft_ms is not None and answer.first_s * 1e3 > self.ttft_ms
        slow = self.tpot_ms is not None and tpot_s(answer) * 1e3 > self.tpot_ms
        return not late and not slow


def tpot_s(answer: Answer) -> float:
    """0 of answers of one token, as vLLM has it."""
    later = answer.output_tokens - 1
    return (answer.latency_s - answer.first_s) / later if later > 0 else 0.0


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest by a straight line, as numpy's; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    below, above = math.floor(at), math.ceil(at)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def summarise(answers: Sequence[Answer], seconds: float, limits: Limits) -> dict[str, float | int | None]:
    """`seconds` from the first request's start to the last one's end."""
    good = [a for a in answers if a.error is None]
    tokens = sum(a.output_tokens for a in good)
    prompts = sum(a.prompt_tokens for a in good)
    kept = sum(limits.keeps(a) for a in good)
    made: dict[str, float | int | None] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": prompts,
        "total_output_tokens": tokens,
        "request_throughput": len(good) / seconds,
        "request_goodput": kept / seconds if limits.any else None,
        "output_throughput": tokens / seconds,
        "total_token_throughput": (prompts + tokens) / seconds,
        "max_output_tokens_per_s": _peak_tokens(good),
        "max_concurrent_requests": _most_at_once(good),
    }
    for name, values in _values(good).items():
        of = [1e3 * value for value in values]
        made[f"mean_{name}_ms"] = statistics.fmean(of) if of else 0.0
        made[f"median_{name}_ms"] = percentile(of, 50)
        made[f"std_{name}_ms"] = statistics.pstdev(of) if of else 0.0
        made[f"p99_{name}_ms"] = percentile(of, 99)
    return made


def _values(good: Sequence[Answer]) -> dict[str, list[float]]:
    return {
        "ttft": [a.first_s for a in good],
        "tpot": [tpot_s(a) for a in good if a.output_tokens > 1],
        "itl": [gap for a in good for gap in a.gaps_s],
        "e2el": [a.latency_s for a in good],
    }


def _peak_tokens(good: Sequence[Answer]) -> float:
    """Events of the fullest second, counted from the first request's start."""
    seconds: dict[int, int] = {}
    begin_s = min((a.start_s for a in good), default=0.0)
    for a in good:
        at_s = a.start_s + a.first_s - begin_s
        for gap_s in (0.0, *a.gaps_s):
            at_s += gap_s
            seconds[int(at_s)] = seconds.get(int(at_s), 0) + 1
    return float(max(seconds.values(), default=0))


def _most_at_once(good: Sequence[Answer]) -> int:
    """An answer that ends where another begins makes room for it."""
    turns = [(a.start_s, 1) for a in good] + [(a.start_s + a.latency_s, -1) for a in good]
    now = most = 0
    for _, change in sorted(turns):
        now += change
        most = max(most, now)
    return most


# --- for people ---------------------------------------------------------------------------------------------

_WIDTH = 50


def lines(made: Mapping[str, object]) -> Iterator[str]:
    """The table that `vllm bench serve` prints."""
    yield f"{' Serving Benchmark Result ':=^{_WIDTH}}"
    yield from _told(
        made,
        {
            "completed": "Successful requests:",
            "failed": "Failed requests:",
            "max_concurrency": "Maximum request concurrency:",
            "request_rate": "Request rate configured (RPS):",
            "duration": "Benchmark duration (s):",
            "total_input_tokens": "Total input tokens:",
            "total_output_tokens": "Total generated tokens:",
            "request_throughput": "Request throughput (req/s):",
            "request_goodput": "Request goodput (req/s):",
            "output_throughput": "Output token throughput (tok/s):",
            "max_output_tokens_per_s": "Peak output token throughput (tok/s):",
            "max_concurrent_requests": "Peak concurrent requests:",
            "total_token_throughput": "Total token throughput (tok/s):",
        },
    )
    for name, (short, long) in METRICS.items():
        yield f"{long:-^{_WIDTH}}"
        told = {
            f"{kind}_{name}_ms": f"{kind.capitalize()} {short} (ms):" for kind in ("mean", "median", "p99")
        }
        yield from _told(made, told)
    yield "=" * _WIDTH


def _told(made: Mapping[str, object], names: Mapping[str, str]) -> Iterator[str]:
    for key, name in names.items():
        value = made.get(key)
        if isinstance(value, float):
            yield f"{name:<40} {value:<10.2f}"
        elif value is not None:
            yield f"{name:<40} {value:<10}"
