"""A GPU step's rows on the device, and attention over them by Triton's kernels or, of prompts, by another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.engine import ops
from orchestrator.engine.kernels import attention, inputs
from orchestrator.engine.kernels.processors import processors
from orchestrator.engine.kernels.rope import rope_and_cache
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import RMSNorm
from orchestrator.engine.rope import Rope
from orchestrator.engine.slots import Slots
from orchestrator.engine.told import Shape, decodes_of, prompts_of, told_of_rows
from orchestrator.step import Admit, Row
from strategies.spec import ModelSpec


def pinned(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """On the host, from where a copy waits for nothing that the device is doing."""
    host = torch.from_numpy(array)
    return host.pin_memory() if device.type == "cuda" else host


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return pinned(array, device).to(device, non_blocking=True)


class DeviceSlots:
    """Every slot's block table and newest sampled token, on the device.

    Behind the slots comes a scratch one for the rows that pad a step to a graph's size: its KV goes to a block that no
    sequence has.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, cache: KVCache) -> None:
        device = cache.keys[0].device
        self.scratch = max_num_seqs
        shape = (max_num_seqs + 1, -(-max_model_len // cache.block_size))
        self.tables = torch.full(shape, cache.scratch_block, dtype=torch.int32, device=device)
        self.newest = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)

    def admit(self, admits: Sequence[Admit]) -> None:
        if not admits:
            return
        width = max(len(admit.blocks) for admit in admits)
        rows = np.zeros((len(admits), width), dtype=np.int32)
        for row, admit in zip(rows, admits, strict=True):
            row[: len(admit.blocks)] = admit.blocks
        slots = to_device(np.array([admit.slot for admit in admits], dtype=np.int64), self.tables.device)
        self.tables[:, :width].index_copy_(0, slots, to_device(rows, self.tables.device))


@dataclass(frozen=True, slots=True)
class Prompts:
    """The rows of a step that compute several tokens, which come after all that decode."""

    slots_R: Tensor
    starts_R: Tensor
    offsets_R1: Tensor  # into the tokens from `first` on
    first: int
    longest: int | None  # tokens that the longest row has; None: any, as in a graph, where `blocks` tell
    blocks: tuple[Tensor, Tensor] | None = None  # see told.blocks_of


class PromptAttention(Protocol):
    """Another's attention of a step's prompts, instead of Triton's. Not in graphs: the host plans each step."""

    def plan(self, rows: Sequence[Row], slots: Slots) -> PlannedAttention:
        """Good for both parts of two steps: the plan before the last three may be written over."""


class PlannedAttention(Protocol):
    def attend(
        self,
        q_THD: Tensor,
        keys: Tensor,
        values: Tensor,
        block_size: int,
        window: int | None,
        out_THD: Tensor,
    ) -> None:
        """Of the planned rows, over one layer of KVCache, which holds their own K and V already."""


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """One step's tokens, as the kernels read them."""

    told_4T: Tensor  # int32, see kernels/inputs.py
    decodes: int  # how many rows of one token lead
    prompts: Prompts | None
    decode_slots: Tensor | None = (
        None  # of the rows that decode, and their positions; None: as their tokens are told
    )
    decode_positions: Tensor | None = None
    prompt_attention: PlannedAttention | None = None  # None: Triton's


def batch_of(
    rows: Sequence[Row], slots: Slots, device: torch.device, prompt_attention: PromptAttention | None = None
) -> PagedBatch:
    """Any rows, in their order."""
    tokens = sum(row.count for row in rows)
    told = told_of_rows(rows, slots, tokens, scratch=0)
    decodes = decodes_of(rows)
    prompts, planned = None, None
    if decodes < len(rows):
        several = rows[decodes:]
        count = len(several)
        numbers = to_device(prompts_of(several), device)
        slots_R, starts_R, offsets_R1 = torch.split(numbers, [count, count, count + 1])
        longest = max(row.count for row in several)
        prompts = Prompts(slots_R, starts_R, offsets_R1, first=decodes, longest=longest)
        if prompt_attention is not None:
            planned = prompt_attention.plan(several, slots)
    return PagedBatch(to_device(told, device), decodes, prompts, prompt_attention=planned)


def batch_in_graph(told_4T: Tensor, numbers: Tensor, shape: Shape) -> tuple[PagedBatch, Tensor]:
    """Of what `numbers_of` tells → and the last tokens of the rows that sample."""
    slots_D, positions_D, slots_R, starts_R, offsets_R1, ends_S, *blocks = torch.split(numbers, shape.sizes)
    prompts = Prompts(slots_R, starts_R, offsets_R1, first=0, longest=None, blocks=(blocks[0], blocks[1]))
    return PagedBatch(told_4T, shape.decodes, prompts, slots_D, positions_D), ends_S


class PagedContext:
    """Attention of one step (satisfies AttentionContext)."""

    def __init__(
        self, cache: KVCache, slots: DeviceSlots, batch: PagedBatch, spec: ModelSpec, rope: Rope
    ) -> None:
        """`spec` and `rope` are of the transformer that this rank runs."""
        self._cache, self._slots, self._batch, self._spec, self._rope = cache, slots, batch, spec, rope
        self._windows = spec.windows or (None,) * spec.layers
        self._slots_T, self._positions_T = batch.told_4T[0], batch.told_4T[1]
        self.token_ids_T, self._rows_T = inputs.prepare(
            batch.told_4T, slots.tables, slots.newest, cache.block_size
        )
        device = self._rows_T.device
        self._frequencies = rope.on(device)
        longest = slots.tables.shape[1] * cache.block_size
        self._splits = attention.choose_splits(
            max(1, batch.decodes), spec.kv_heads, longest, processors(device)
        )

    def attend(self, layer: int, qkv_TN: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Tensor:
        spec, keys, values = self._spec, self._cache.keys[layer], self._cache.values[layer]
        rope_and_cache(
            qkv_TN,
            self._positions_T,
            self._rows_T,
            self._frequencies,
            self._rope.scale,
            keys,
            values,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            eps=spec.rms_eps,
            pdl=ops.overlaps(qkv_TN),
        )
        q_THD = qkv_TN.view(len(qkv_TN), -1, spec.head_dim)[:, : spec.heads]
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        decodes = self._batch.decodes
        if decodes:
            attention.decode_attention(
                q_THD[:decodes],
                keys,
                values,
                self._slots.tables,
                self._slots_T if self._batch.decode_slots is None else self._batch.decode_slots,
                self._positions_T if self._batch.decode_positions is None else self._batch.decode_positions,
                block_size=self._cache.block_size,
                scale=spec.head_dim**-0.5,
                window=self._windows[layer],
                splits=self._splits,
                out=out_THD[:decodes],
                pdl=ops.overlaps(qkv_TN),
            )
        if self._batch.prompts is not None:  # after the decodes, whose padding may lie where prompts are
            first = self._batch.prompts.first
            self.prefill(layer, q_THD[first:], out_THD[first:])
        return out_THD.flatten(1)

    def prefill(self, layer: int, q_THD: Tensor, out_THD: Tensor) -> None:
        """Attention of the prompts' tokens, whose K and V the cache holds."""
        prompts, window = self._batch.prompts, self._windows[layer]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        assert prompts is not None
        if self._batch.prompt_attention is not None:
            self._batch.prompt_attention.attend(q_THD, keys, values, self._cache.block_size, window, out_THD)
            return
        attention.prefill_attention(
            q_THD,
            keys,
            values,
            self._slots.tables,
            prompts.slots_R,
            prompts.starts_R,
            prompts.offsets_R1,
            longest=prompts.longest,
            blocks=prompts.blocks,
            block_size=self._cache.block_size,
            scale=self._spec.head_dim**-0.5,
            window=window,
            out=out_THD,
        )
