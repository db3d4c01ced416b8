"""The paged KV cache of one rank: for each of its layers, K and V of every block."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.spec import ModelSpec


class KVCache:
    """keys[layer], values[layer]: [rows, kv_heads, head_dim]; block b is the block_size rows from b × block_size.

    Behind the blocks comes a scratch one, where rows that only pad a step write.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.scratch_block, self.block_size = num_blocks, block_size
        shape = (spec.layers, 2, (num_blocks + 1) * block_size, spec.kv_heads, spec.head_dim)
        # Zeros, not garbage: steps that rehearse read rows that nobody wrote, and 0 × nan would be nan.
        storage = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = [storage[layer, 0] for layer in range(spec.layers)]
        self.values = [storage[layer, 1] for layer in range(spec.layers)]

    def write(self, layer: int, rows_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        self.keys[layer].index_copy_(0, rows_T, k_TKD)
        self.values[layer].index_copy_(0, rows_T, v_TKD)


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """K and V of one block in all layers of a rank (whose local spec this is)."""
    return 2 * spec.layers * block_size * spec.kv_heads * spec.head_dim * dtype.itemsize
