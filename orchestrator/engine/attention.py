"""Attention over the paged cache by torch's scaled_dot_product_attention: right everywhere, fast enough on a CPU.

A backend turns a Batch into an AttentionContext (engine/model.py). Decodes go as one padded call, prompts one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.engine import ops
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import RMSNorm
from orchestrator.engine.rope import Rope
from orchestrator.engine.slots import Ints
from strategies.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows in numbers: row i computes positions starts[i] … starts[i] + counts[i] - 1 of its sequence."""

    token_ids_T: Ints
    positions_T: Ints
    starts: Ints
    counts: Ints
    tables: Ints  # [rows, blocks]: each row's KV blocks, what is beyond its tokens is not looked at

    def cache_rows(self, block_size: int) -> Ints:
        """Where each token's K and V go: [T]."""
        row_of_T = np.repeat(np.arange(len(self.counts)), self.counts)
        return (
            self.tables[row_of_T, self.positions_T // block_size] * block_size + self.positions_T % block_size
        )


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A row of several tokens: its place in the batch and the cache rows of all that it sees."""

    tokens: slice
    seen_rows: Tensor  # [L]
    start: int


class SdpaContext:
    """What every layer of one step shares: index tensors, made once."""

    def __init__(self, cache: KVCache, batch: Batch, spec: ModelSpec, rope: Rope) -> None:
        """`spec` and `rope` are of the transformer that this rank runs."""
        device = cache.keys[0].device
        self.cache = cache
        self._heads = spec.heads, spec.kv_heads, spec.head_dim
        self._windows = spec.windows or (None,) * spec.layers
        self._positions_T = torch.from_numpy(batch.positions_T).to(device)
        self._rotation = rope(self._positions_T, cache.dtype)
        self._rows_T = torch.from_numpy(batch.cache_rows(cache.block_size)).to(device)
        offsets = np.cumsum(batch.counts) - batch.counts
        lengths = batch.starts + batch.counts
        decodes = np.flatnonzero(batch.counts == 1)
        self._prompts = [
            _Prompt(
                slice(int(offsets[i]), int(offsets[i] + batch.counts[i])),
                self._to_device(self._seen(batch, int(i), int(lengths[i])), device),
                int(batch.starts[i]),
            )
            for i in np.flatnonzero(batch.counts > 1)
        ]
        self._decodes = None
        if len(decodes):
            longest = int(lengths[decodes].max())
            # Beyond a row's end its last position: what others have there may be NaN, and so would be 0 × that.
            places = np.minimum(np.arange(longest), lengths[decodes][:, None] - 1)
            size = cache.block_size
            seen = batch.tables[decodes[:, None], places // size] * size + places % size
            self._decodes = self._to_device(offsets[decodes], device)
            self._decode_rows_BL = self._to_device(seen, device)
            first = int(seen[0, 0])
            in_one_piece = len(seen) == 1 and np.array_equal(seen[0], np.arange(first, first + longest))
            # A lone sequence's blocks mostly follow each other: then its cache is read where it lies.
            self._piece = slice(first, first + longest) if in_one_piece else None
            self._lengths_B = self._to_device(lengths[decodes], device)
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    @staticmethod
    def _to_device(array: Ints, device: torch.device) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def _seen(self, batch: Batch, row: int, length: int) -> Ints:
        """Cache rows of positions 0 … length-1 of a batch row."""
        size = self.cache.block_size
        blocks = batch.tables[row, : -(-length // size)]
        return (blocks[:, None] * size + np.arange(size)).reshape(-1)[:length]

    def attend(self, layer: int, qkv_TN: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Tensor:
        heads, kv_heads, head_dim = self._heads
        qkv_THD = qkv_TN.view(len(qkv_TN), -1, head_dim)
        qk_THD, v_TKD = torch.split(qkv_THD, [heads + kv_heads, kv_heads], dim=1)
        if q_norm is not None and k_norm is not None:
            q_THD = ops.rms_norm(qk_THD[:, :heads], q_norm.weight, q_norm.eps)
            qk_THD = torch.cat((q_THD, ops.rms_norm(qk_THD[:, heads:], k_norm.weight, k_norm.eps)), dim=1)
        q_THD, k_TKD = torch.split(ops.rotate(qk_THD, *self._rotation), [heads, kv_heads], dim=1)
        self.cache.write(layer, self._rows_T, k_TKD, v_TKD)
        return self._attend(layer, q_THD).flatten(1)

    def _attend(self, layer: int, q_THD: Tensor) -> Tensor:
        keys, values, window = self.cache.keys[layer], self.cache.values[layer], self._windows[layer]
        if self._decodes is not None and not self._prompts:
            return self._decode(q_THD, keys, values, window)
        out_THD = torch.empty_like(q_THD)
        if self._decodes is not None:
            out_THD[self._decodes] = self._decode(q_THD[self._decodes], keys, values, window)
        for index, prompt in enumerate(self._prompts):
            k_KLD = self.cache.read(keys, prompt.seen_rows).transpose(0, 1)
            v_KLD = self.cache.read(values, prompt.seen_rows).transpose(0, 1)
            q_HTD = q_THD[prompt.tokens].transpose(0, 1)
            mask = self._prompt_mask(index, window)
            out = F.scaled_dot_product_attention(
                q_HTD.unsqueeze(0),
                k_KLD.unsqueeze(0),
                v_KLD.unsqueeze(0),
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=True,
            )
            out_THD[prompt.tokens] = out.squeeze(0).transpose(0, 1)
        return out_THD

    def _decode(self, q_BHD: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """One query a sequence. The query heads of a KV head stand as its rows, so nothing is repeated."""
        rows, longest = self._decode_rows_BL.shape
        kv_heads = keys.shape[1]
        k_BKLD, v_BKLD = (
            self._seen_by_decodes(cached).view(rows, longest, kv_heads, -1).transpose(1, 2)
            for cached in (keys, values)
        )
        q_BKGD = q_BHD.reshape(rows, kv_heads, -1, q_BHD.shape[-1])
        out = F.scaled_dot_product_attention(
            q_BKGD, k_BKLD, v_BKLD, attn_mask=self._decode_mask(longest, window)
        )
        return out.reshape(rows, *q_BHD.shape[1:])

    def _seen_by_decodes(self, cached: Tensor) -> Tensor:
        """[B × L, K, D]"""
        if self._piece is not None:
            return self.cache.read(cached, self._piece)
        return self.cache.read(cached, self._decode_rows_BL.flatten())

    def _decode_mask(self, longest: int, window: int | None) -> Tensor | None:
        """[B, 1, 1, L], true where seen; None where every row sees everything."""
        key = (-1, window)
        if key not in self._masks:
            place_L = torch.arange(longest, device=self._lengths_B.device)
            seen_BL = place_L < self._lengths_B[:, None]
            if window is not None:
                seen_BL &= place_L >= self._lengths_B[:, None] - window
            whole = window is None and len(self._lengths_B) == 1
            self._masks[key] = None if whole else seen_BL[:, None, None, :]
        return self._masks[key]

    def _prompt_mask(self, index: int, window: int | None) -> Tensor | None:
        """[T, L], true where seen; None where it is plainly causal from the first position."""
        prompt = self._prompts[index]
        if prompt.start == 0 and window is None:
            return None
        key = (index, window)
        if key not in self._masks:
            query_T = self._positions_T[prompt.tokens][:, None]
            place_L = torch.arange(len(prompt.seen_rows), device=query_T.device)
            seen_TL = place_L <= query_T
            if window is not None:
                seen_TL &= place_L > query_T - window
            self._masks[key] = seen_TL
        return self._masks[key]
