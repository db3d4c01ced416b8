"""The paged KV cache of one rank: for each of its layers, K and V of every block."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.spec import ModelSpec

FLOAT8 = torch.float8_e4m3fn
MOST = 448.0  # of it


class KVCache:
    """keys[layer], values[layer]: [rows, kv_heads, head_dim]; block b is the block_size rows from b × block_size.

    K and V come and are read in `dtype`. In float8 (e4m3, scale 1 as vLLM's default, what is over 448 becomes 448) they
    take half of bfloat16's bytes.

    Behind the blocks comes a scratch one, where rows that only pad a step write.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        float8: bool = False,
    ) -> None:
        self.scratch_block, self.block_size, self.dtype = num_blocks, block_size, dtype
        shape = (spec.layers, 2, (num_blocks + 1) * block_size, spec.kv_heads, spec.head_dim)
        # Zeros, not garbage: steps that rehearse read rows that nobody wrote, and 0 × nan would be nan.
        self._storage = torch.zeros(shape, dtype=kept_dtype(dtype, float8), device=device)
        self.keys = [self._storage[layer, 0] for layer in range(spec.layers)]
        self.values = [self._storage[layer, 1] for layer in range(spec.layers)]

    def by_block(self) -> Tensor:
        """The same memory as [blocks, parts, words]: a block has a part in the keys and the values of each layer."""
        parts = self._storage.view(torch.uint8).view(2 * len(self.keys), self.scratch_block + 1, -1)
        return (parts.view(torch.int64) if parts.shape[2] % 8 == 0 else parts).transpose(0, 1)

    def write(self, layer: int, rows_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        for kept, new_TKD in ((self.keys[layer], k_TKD), (self.values[layer], v_TKD)):
            if kept.dtype == FLOAT8:  # torch copies bytes where it does not know float8
                small = new_TKD.clamp(-MOST, MOST).to(FLOAT8)
                kept.view(torch.uint8).index_copy_(0, rows_T, small.view(torch.uint8))
            else:
                kept.index_copy_(0, rows_T, new_TKD)

    def read(self, kept: Tensor, rows: Tensor | slice) -> Tensor:
        """Some rows of a layer's keys or values, in the dtype that they came in."""
        if isinstance(rows, slice):
            return kept[rows].to(self.dtype)
        if kept.dtype == FLOAT8:
            return kept.view(torch.uint8).index_select(0, rows).view(FLOAT8).to(self.dtype)
        return kept.index_select(0, rows)


def kept_dtype(dtype: torch.dtype, float8: bool) -> torch.dtype:
    return FLOAT8 if float8 else dtype


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """K and V of one block in all layers of a rank (whose local spec this is)."""
    return 2 * spec.layers * block_size * spec.kv_heads * spec.head_dim * dtype.itemsize
