"""What a server is doing, as `status` shows it: read from its /metrics and /plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.batch_client import BatchClient

LOOK_S = 5.0  # a server with much to do answers later
_LINE = re.compile(r"([\w:]+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Live:
    model: str
    layout: str
    devices: int
    reasons: Sequence[str]  # of the plan
    running: int
    waiting: int
    kv_used: float  # share of the blocks
    generated_tokens: int
    prompt_tokens: int
    finished: int  # requests
    refused: Mapping[str, int] = field(default_factory=dict)  # by error
    failed: Mapping[str, int] = field(default_factory=dict)
    replicas_alive: Sequence[bool] = ()
    replica_restarts: int = 0
    predicted: Mapping[str, float] = field(default_factory=dict)


def told_by(client: BatchClient) -> dict[str, Any]:
    """What `live_of` reads. Raises ServerGone."""
    metrics = client.text("/metrics", timeout_s=LOOK_S)
    return {"metrics": metrics, "plan": client.get("/plan", timeout_s=LOOK_S)}


def live_of(told: Mapping[str, Any]) -> Live:
    samples = list(_samples(told["metrics"]))

    def total(name: str) -> float:
        return sum(value for found, _, value in samples if found == name)

    def by_error(name: str) -> dict[str, int]:
        return {labels["error"]: int(value) for found, labels, value in samples if found == name and value}

    layout = next((labels for name, labels, _ in samples if name == "shardwise:layout_info"), {})
    alive = [value > 0 for name, _, value in samples if name == "shardwise:replica_alive"]
    mark = "shardwise:predicted_"
    return Live(
        model=str(told["plan"].get("model", layout.get("model_name", ""))),
        layout=layout.get("layout", ""),
        devices=int(layout.get("devices", 0)),
        reasons=list(told["plan"].get("reasons", [])),
        running=int(total("vllm:num_requests_running")),
        waiting=int(total("vllm:num_requests_waiting")),
        kv_used=total("vllm:kv_cache_usage_perc"),
        generated_tokens=int(total("vllm:generation_tokens_total")),
        prompt_tokens=int(total("vllm:prompt_tokens_total")),
        finished=int(total("vllm:request_success_total")),
        refused=by_error("shardwise:requests_refused_total"),
        failed=by_error("shardwise:requests_failed_total"),
        replicas_alive=alive,
        replica_restarts=int(total("shardwise:replica_restarts_total")),
        predicted={name.removeprefix(mark): v for name, _, v in samples if name.startswith(mark)},
    )


def _samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    matches = (_LINE.match(line) for line in text.splitlines() if not line.startswith("#"))
    return [(m[1], dict(_LABEL.findall(m[2] or "")), float(m[3])) for m in matches if m is not None]
