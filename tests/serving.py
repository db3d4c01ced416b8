"""A deployment on plain processes of this host, driven through the coordinator: all of the product but Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cluster.gang import Gang
from launch.models import resolve
from launch.options import EngineOptions
from launch.progress import Progress
from launch.start import Deployment, deployment
from orchestrator.request import Completion, SamplingParams
from strategies.plan import ParallelDims
from strategies.source import spec_of
from tests.fakes import ProcessGang


class Processes:
    """Satisfies launch.start.Devices without Ray."""

    def acquire(self, worker_class: type, count: int, device: str, *, timeout_s: float) -> Gang:
        return ProcessGang(worker_class, count)


def options(model: Path | str, **changes: Any) -> EngineOptions:
    """Small enough that chunked prefill and preemption happen with a handful of short prompts."""
    source = resolve(str(model))
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "dummy_weights": False,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 24,
        "block_size": 8,
        "prefix_caching": True,
        "seed": 0,
        "address": None,
        "peer_access": True,
    }
    return EngineOptions(source=source, spec=spec_of(source), **(defaults | changes))


@contextmanager
def served(layout: str, asked: EngineOptions) -> Iterator[Deployment]:
    with deployment(Processes(), ParallelDims.parse(layout), asked, Progress(quiet=True)) as found:
        yield found


def answers(
    found: Deployment,
    asked: EngineOptions,
    prompts: Sequence[tuple[Sequence[int], SamplingParams]],
) -> list[Completion]:
    """All prompts at once; the first answer of each."""

    async def ask() -> list[list[Completion]]:
        async with found.coordinator(asked, None) as coordinator:
            return await asyncio.gather(*(coordinator.complete(ids, sampling) for ids, sampling in prompts))

    return [done[0] for done in asyncio.run(ask())]


def greedy_reference(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' own greedy tokens."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens
