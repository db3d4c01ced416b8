"""Which attention prefills on this GPU: Triton's, or FlashInfer's where that is faster. Both are timed on one batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from orchestrator.engine.flashinfer_attention import FlashInferPrefill, Unusable, first_line
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import Transformer
from orchestrator.engine.paged_attention import DeviceSlots, PagedContext, PromptAttention, batch_of
from orchestrator.engine.slots import Slots
from orchestrator.step import Step, whole_prompts

PROMPTS, PROMPT_TOKENS = 4, 1024  # what is timed, unless a step takes fewer tokens
WARM_UPS, RUNS = 2, 5
HOLD_UP_CYCLES = 20_000_000  # some 10 ms, in which the host starts all runs
APART = 0.02
"""Relative L2 distance between the two beyond which FlashInfer's is wrong: both round to bfloat16's 8 bits, which
leaves some 0.004; a page or a mask mistaken leaves 0.1 and more."""

TRITON = "Triton"


@dataclass(frozen=True, slots=True)
class Choice:
    prefill: FlashInferPrefill | None  # None: Triton's
    path: str
    reason: str


def choose(
    model: Transformer, step_tokens: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> Choice:
    """The faster of the two at a batch of at most `step_tokens`, on the stream of the caller."""
    try:
        found = FlashInferPrefill(model.spec, dtype, device)
    except Unusable as error:
        return Choice(None, TRITON, str(error))
    except Exception as error:  # another's package: a cache folder that it may not write to, …
        return Choice(None, TRITON, f"FlashInfer fails: {first_line(error)}")
    return _faster(Trial(model, step_tokens, block_size, dtype, device), found)


def _faster(trial: Trial, found: FlashInferPrefill) -> Choice:
    triton_ms, expected_THD = trial.run(None)
    name = f"FlashInfer {found.version}"
    try:
        flashinfer_ms, got_THD = trial.run(found)
    except Exception as error:  # another's package: a library that does not load, a shape that it refuses, …
        return Choice(None, TRITON, f"{name} fails: {first_line(error)}")
    distance = float((got_THD - expected_THD).norm() / expected_THD.norm())
    if not distance <= APART:  # nor nan
        return Choice(None, TRITON, f"{name}'s result is {distance:.3f} off, and {APART} is allowed")
    reason = f"a layer of {len(got_THD)} tokens takes {name} {flashinfer_ms:.3f} ms, Triton {triton_ms:.3f}"
    if flashinfer_ms < triton_ms:
        return Choice(found, f"{name} for long prefills, Triton for all else", reason)
    return Choice(None, TRITON, reason)


class Trial:
    """Prompts with random queries, keys and values, and a cache of one layer that holds them."""

    def __init__(
        self,
        model: Transformer,
        step_tokens: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        spec, length = model.spec, max(2, min(PROMPT_TOKENS, step_tokens))  # a row of one would be a decode
        prompts = max(1, min(PROMPTS, step_tokens // length))
        self._model, self._device = model, device
        self._step: Step = whole_prompts([[0] * length] * prompts, block_size)
        self._slots = Slots(prompts, length, block_size)
        self._slots.remember(self._step)
        blocks = prompts * self._slots.tables.shape[1]
        self._cache = KVCache(replace(spec, layers=1), blocks, block_size, dtype, device)
        for rows in (*self._cache.keys, *self._cache.values):
            rows.normal_()
        self._on_device = DeviceSlots(prompts, length, self._cache)
        self._on_device.admit(self._step.admits)
        self._q_THD = torch.randn((prompts * length, spec.heads, spec.head_dim), dtype=dtype, device=device)

    @torch.inference_mode()
    def run(self, prompt_attention: PromptAttention | None) -> tuple[float, Tensor]:
        """→ milliseconds a layer, float32 [T, H, D]."""
        batch = batch_of(self._step.rows, self._slots, self._device, prompt_attention)
        context = PagedContext(self._cache, self._on_device, batch, self._model.spec, self._model.rope)
        out_THD = torch.empty_like(self._q_THD)
        return _median_ms(lambda: context.prefill(0, self._q_THD, out_THD)), out_THD.float()


def _median_ms(call: Callable[[], None]) -> float:
    """Of the GPU alone: it is held up until the host has started all, as in a step, where the host is ahead of it."""
    for _ in range(WARM_UPS):
        call()
    events = [_event() for _ in range(RUNS + 1)]
    torch.cuda._sleep(HOLD_UP_CYCLES)  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    median_ms: float = statistics.median(a.elapsed_time(b) for a, b in pairwise(events))
    return median_ms


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
