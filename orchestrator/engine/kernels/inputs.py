"""From what the host tells of a step's tokens to what the layers read: ids, cache rows, grown block tables."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128


@triton.jit(do_not_specialize=["TOKENS"])
def _prepare(
    told, tables, newest, token_ids, cache_rows, TOKENS, WIDTH, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < TOKENS
    slot = tl.load(told + token, mask=inside, other=0)
    position = tl.load(told + TOKENS + token, mask=inside, other=0)
    token_id = tl.load(told + 2 * TOKENS + token, mask=inside, other=0)
    new_block = tl.load(told + 3 * TOKENS + token, mask=inside, other=0)
    place = tables + slot.to(tl.int64) * WIDTH + position // BLOCK_SIZE
    tl.store(place, new_block, mask=inside & (new_block >= 0))
    block = tl.where(new_block >= 0, new_block, tl.load(place, mask=inside & (new_block < 0), other=0))
    row = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(cache_rows + token, row, mask=inside)
    sampled = tl.load(newest + slot, mask=inside & (token_id < 0), other=0)
    tl.store(token_ids + token, tl.where(token_id < 0, sampled, token_id.to(tl.int64)), mask=inside)


def prepare(told_4T: Tensor, tables: Tensor, newest: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """→ token ids and cache rows, int64 [T]. A token's new block (-1: none) is entered in its slot's table.

    told_4T: int32, contiguous: slots, positions, ids (-1: the newest that the slot sampled), new blocks. tables:
    int32 [slots, blocks of a slot], newest: int64 [slots].
    """
    tokens = told_4T.shape[1]
    token_ids = torch.empty(tokens, dtype=torch.int64, device=told_4T.device)
    cache_rows = torch.empty_like(token_ids)
    _prepare[(triton.cdiv(tokens, _BLOCK),)](
        told_4T,
        tables,
        newest,
        token_ids,
        cache_rows,
        tokens,
        tables.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
    )
    return token_ids, cache_rows
