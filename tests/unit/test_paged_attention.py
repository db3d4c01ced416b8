"""The GPU's way through a model, its kernels interpreted on the CPU, against the plain one: the same hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.models import resolve
from orchestrator.engine import ops
from orchestrator.engine.attention import SdpaContext
from orchestrator.engine.checkpoint import open_checkpoint
from orchestrator.engine.kernels import all as kernels
from orchestrator.engine.kernels.attention import query_rows
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.loader import load
from orchestrator.engine.model import Transformer
from orchestrator.engine.paged_attention import (
    DeviceSlots,
    PagedBatch,
    PagedContext,
    batch_in_graph,
    batch_of,
)
from orchestrator.engine.runner import Runner
from orchestrator.engine.slots import Slots, sampling_ends
from orchestrator.engine.told import Block, Shape, numbers_of, told_of_decodes, told_of_rows
from orchestrator.request import Request, SamplingParams
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.step import Step, StepResult
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims
from strategies.source import spec_of
from tests.interpreted import *  # noqa: F403
from tests.tiny import make_model

CPU = torch.device("cpu")
LIMITS = SchedulerConfig(
    num_blocks=24, block_size=8, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32
)


def steps(prompts: list[list[int]], vocab: int) -> list[Step]:
    """Chunks, prefix hits and decodes, mixed; what is sampled does not matter here."""
    scheduler = Scheduler(LIMITS)
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(id=str(i), prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=2)))
    found = []
    while (step := scheduler.schedule()) is not None:
        found.append(step)
        sampled = [(7 * step.id + i) % vocab for i in range(sum(row.samples for row in step.rows))]
        scheduler.update(StepResult(step.id, sampled))
    return found


@pytest.mark.parametrize(
    ("family", "float8"),
    [("llama", False), ("mistral", False), ("qwen2", False), ("qwen3", False), ("qwen3", True)],
)
def test_hidden_states_are_the_plain_ones(
    family: str, float8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windowed = {"sliding_window": 11} if family == "mistral" else {}
    make_model(tmp_path, family, num_hidden_layers=1 if float8 else 2, **windowed)
    source = resolve(str(tmp_path))
    spec = spec_of(source)
    shard = shard_replica(spec, ParallelDims())[0]
    with torch.device("meta"):
        model = Transformer(spec)
    load(model, shard, spec, open_checkpoint(source, spec), CPU, torch.float32)
    plain = Slots(LIMITS.max_num_seqs, LIMITS.max_model_len, LIMITS.block_size)
    paged_slots = Slots(LIMITS.max_num_seqs, LIMITS.max_model_len, LIMITS.block_size)
    caches = [
        KVCache(spec, LIMITS.num_blocks, LIMITS.block_size, torch.float32, CPU, float8=float8)
        for _ in range(2)
    ]
    on_device = DeviceSlots(LIMITS.max_num_seqs, LIMITS.max_model_len, caches[1])
    runner = Runner(model, caches[0], plain, shard, None, None)  # type: ignore[arg-type]
    block = Block(query_rows(spec.head_dim, torch.float32, CPU), spec.heads // spec.kv_heads)
    shape = Shape(tokens=19, decodes=5, prompts=4, samples=6, block=block)
    shared = list(range(9))
    asked = [[*shared, 1, 2], [5, 6], list(range(30, 49)), [4], [*shared, 9]]
    decoded = mixed = 0
    for step in steps(asked, spec.vocab):
        plain.remember(step)
        expected = model(
            torch.tensor(plain.token_ids(step.rows)),
            SdpaContext(caches[0], runner._batch(step.rows), spec, model.rope),
        )
        paged_slots.remember(step)
        on_device.admit(step.admits)
        rows = len(expected)
        if all(row.count == 1 for row in step.rows):
            decoded += 1
            told = told_of_decodes(step.rows, paged_slots, 4, on_device.scratch)
            batch = PagedBatch(torch.from_numpy(told), 4, None)
        elif mixed % 2:
            mixed += 1
            batch = batch_of(step.rows, paged_slots, CPU)
        else:  # as graphs hold it, with room for more
            mixed += 1
            told = told_of_rows(step.rows, paged_slots, shape.tokens, on_device.scratch)
            numbers = torch.from_numpy(numbers_of(step.rows, shape))
            batch, ends_S = batch_in_graph(torch.from_numpy(told), numbers, shape)
            ends = sampling_ends(step.rows)
            assert ends_S.tolist() == [*ends, *[0] * (shape.samples - len(ends))]
        with monkeypatch.context() as patched:
            patched.setattr(ops, "has_kernels", lambda x: True)
            patched.setattr(kernels, "MAX_ROWS", 0)  # slow to interpret, and tested by themselves
            context = PagedContext(caches[1], on_device, batch, spec, model.rope)
            got = model(context.token_ids_T, context)[:rows]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert decoded and mixed > 1
