"""A plan for programs: what `--json` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping

from strategies.intervals import ends
from strategies.kept import MODEL
from strategies.plan import Candidate, Plan
from strategies.spec import Workload


def plan_to_json(made: Plan, workload: Workload) -> dict[str, object]:
    """The object that `--json` prints: names and units are a contract."""
    return {
        "model": made.model,
        "machine": made.machine,
        "workload": {
            "prompt_tokens": workload.prompt_tokens,
            "output_tokens": workload.output_tokens,
            "concurrency": workload.concurrency,
            "objective": workload.objective.value,
        },
        "chosen": None if made.chosen is None else made.chosen.layout.name,
        "candidates": [candidate_to_json(candidate) for candidate in made.candidates],
    }


def candidate_to_json(candidate: Candidate) -> dict[str, object]:
    """With a `source` where the figures are not the model's alone, and `notes` where there is more to say."""
    made: dict[str, object] = {
        "layout": candidate.layout.name,
        "feasible": candidate.feasible,
        "reason": candidate.reason,
        "predicted": _predicted(candidate),
        "breakdown": _shares(candidate),
        "interval": _interval(candidate),
    }
    if candidate.estimate is not None and candidate.estimate.source != MODEL:
        made["source"] = candidate.estimate.source
    if candidate.marked:
        made["notes"] = list(candidate.marked)
    return made


def _predicted(candidate: Candidate) -> Mapping[str, float | None] | None:
    made = candidate.estimate
    if made is None:
        return None
    usd = made.usd_per_million_tokens
    return {
        "ttft_ms": round(made.ttft_s * 1e3, 4),
        "tpot_ms": round(made.tpot_s * 1e3, 4),
        "output_tokens_per_s": round(made.output_tokens_per_s, 4),
        "memory_gb_per_gpu": round(made.memory_bytes_per_device / 1e9, 4),
        "kv_tokens": made.kv_tokens,
        "share_of_limit": round(made.share_of_limit, 6),
        "usd_per_million_tokens": None if usd is None else round(usd, 6),
    }


def _interval(candidate: Candidate) -> Mapping[str, Mapping[str, float]] | None:
    """Low and high of each predicted figure that may be off."""
    predicted = _predicted(candidate)
    if predicted is None or candidate.estimate is None:
        return None
    most = {"share_of_limit": 1.0}
    return {
        name: {"low": _rounded(low * value), "high": _rounded(min(most.get(name, math.inf), high * value))}
        for name, (low, high) in ends(candidate.estimate.spread).items()
        if (value := predicted[name]) is not None
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _shares(candidate: Candidate) -> Mapping[str, float] | None:
    """Of a decode step; they sum to 1. A cause that a layout does not have is 0."""
    if candidate.estimate is None:
        return None
    causes = (
        "weights",
        "kv",
        "compute",
        "all_reduce",
        "all_gather",
        "all_to_all",
        "send_recv",
        "offload",
        "host",
    )
    parts = candidate.estimate.breakdown
    total = sum(parts.values())
    return {cause: parts.get(cause, 0.0) / total for cause in causes}
