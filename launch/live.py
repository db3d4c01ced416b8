"""What a server is doing, as `status` shows it: read from its /metrics and /plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.nvml import Binding, read_gpus, read_vitals
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


@dataclass(frozen=True, slots=True)
class GpuState:
    index: int  # as the driver's tools count
    name: str
    used_gb: float
    memory_gb: float
    temperature_c: int | None
    watts: float | None
    sm_clock_mhz: int | None
    throttled_by: Sequence[str]

    def __str__(self) -> str:
        told = [f"{self.used_gb:.1f} of {self.memory_gb:.1f} GB"]
        told += [] if self.temperature_c is None else [f"{self.temperature_c} °C"]
        told += [] if self.watts is None else [f"{self.watts:.0f} W"]
        told += [] if self.sm_clock_mhz is None else [f"{self.sm_clock_mhz} MHz"]
        told += [f"throttled by {reason}" for reason in self.throttled_by]
        return f"GPU {self.index}, {self.name}: {', '.join(told)}"


def gpu_states(indices: Sequence[int], binding: Binding = None) -> list[GpuState]:
    """Of these GPUs of this machine, now."""
    gpus = [gpu for gpu in read_gpus(binding).gpus if gpu.index in indices]
    states = read_vitals([gpu.uuid for gpu in gpus], binding)
    return [
        GpuState(
            index=gpu.index,
            name=gpu.name,
            used_gb=(gpu.memory_bytes - gpu.free_bytes) / 1e9,
            memory_gb=gpu.memory_bytes / 1e9,
            temperature_c=state.temperature_c,
            watts=state.watts,
            sm_clock_mhz=state.sm_clock_mhz,
            throttled_by=state.throttled_by,
        )
        for gpu, state in zip(gpus, states, strict=False)
    ]


def _samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    matches = (_LINE.match(line) for line in text.splitlines() if not line.startswith("#"))
    return [(m[1], dict(_LABEL.findall(m[2] or "")), float(m[3])) for m in matches if m is not None]
