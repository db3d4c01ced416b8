"""FlashInfer's prefill against Triton's, where it is installed and its kernels are compiled."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.engine.flashinfer_attention import FlashInferPrefill, Unusable
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.paged_attention import DeviceSlots, PagedContext, batch_of
from orchestrator.engine.rope import Rope
from orchestrator.engine.slots import Slots
from orchestrator.request import SamplingParams
from orchestrator.step import Admit, Row, Step
from strategies.spec import ModelSpec
from tests.unit.machines import LLAMA_8B

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
GPU, BFLOAT16, BLOCK = torch.device("cuda", 0), torch.bfloat16, 16
ROUNDING = 0.01  # relative L2: two orders of summation in bfloat16, whose 8 bits leave some 0.004

Shape = list[tuple[int, int]]  # of each row its start and its tokens
SHAPES: dict[str, Shape] = {
    "whole": [(0, 1024), (0, 600), (0, 17), (0, 16)],
    "chunks": [(1000, 512), (37, 100), (0, 3), (31, 33)],
    "with rows of one token": [(0, 300), (63, 1), (64, 1), (5, 80)],
}


def prefill_of(spec: ModelSpec) -> FlashInferPrefill:
    try:
        return FlashInferPrefill(spec, BFLOAT16, GPU)
    except Unusable as reason:
        pytest.skip(str(reason))


def one_layer(**changes: Any) -> ModelSpec:
    return replace(LLAMA_8B, layers=1, max_positions=2048, **changes)


class Made:
    """Rows in a cache of shuffled blocks with random keys, and queries strided as a step's are."""

    def __init__(self, spec: ModelSpec, shape: Shape, seed: int = 0) -> None:
        self.spec, self.rope = spec, Rope(spec.rope, spec.head_dim, spec.max_positions)
        longest = max(start + count for start, count in shape)
        self.slots = Slots(len(shape), longest, BLOCK)
        each = self.slots.tables.shape[1]
        self.cache = KVCache(spec, len(shape) * each, BLOCK, BFLOAT16, GPU)
        order = np.random.default_rng(seed).permutation(len(shape) * each).reshape(len(shape), each)
        ends = [start + count for start, count in shape]
        admits = [
            Admit(i, [0] * end, end, order[i, : -(-end // BLOCK)].tolist(), SamplingParams(), [])
            for i, end in enumerate(ends)
        ]
        self.slots.remember(Step(0, admits, []))
        self.on_device = DeviceSlots(len(shape), longest, self.cache)
        self.on_device.admit(admits)
        self.rows = [Row(i, start, count, True, -1, -1) for i, (start, count) in enumerate(shape)]
        drawn = torch.Generator(GPU).manual_seed(seed)
        for rows in (*self.cache.keys, *self.cache.values):
            rows.normal_(generator=drawn)
        width = spec.heads + 2 * spec.kv_heads
        qkv_THD = torch.empty(
            (sum(count for _, count in shape), width, spec.head_dim), dtype=BFLOAT16, device=GPU
        )
        self.q_THD = qkv_THD.normal_(generator=drawn)[:, : spec.heads]

    def attend(self, prefill: FlashInferPrefill | None) -> Tensor:
        batch = batch_of(self.rows, self.slots, GPU, prefill)
        context = PagedContext(self.cache, self.on_device, batch, self.spec, self.rope)
        out_THD = torch.full(self.q_THD.shape, torch.nan, dtype=BFLOAT16, device=GPU)
        context.prefill(0, self.q_THD, out_THD)
        return out_THD


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("window", [None, 100], ids=["all keys", "window"])
@pytest.mark.parametrize("tp", [1, 4])
def test_the_result_is_tritons(shape: Shape, window: int | None, tp: int) -> None:
    spec = one_layer(heads=32 // tp, kv_heads=8 // tp, windows=() if window is None else (window,))
    prefill = prefill_of(spec)
    made = Made(spec, shape)
    expected_THD, got_THD = made.attend(None).float(), made.attend(prefill).float()
    distances_T = (got_THD - expected_THD).flatten(1).norm(dim=1) / expected_THD.flatten(1).norm(dim=1)
    assert float(distances_T.max()) <= ROUNDING


def test_a_step_planned_ahead_leaves_the_one_before_alone() -> None:
    prefill = prefill_of(one_layer())
    steps = [partial(Made, one_layer(), shape) for shape in SHAPES.values()]
    expected = [step().attend(prefill) for step in steps]
    made = [step() for step in steps]
    torch.cuda._sleep(
        200_000_000
    )  # cycles, some 0.1 s: the host plans all steps meanwhile, if nothing stops it
    got = [step.attend(prefill) for step in made]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
