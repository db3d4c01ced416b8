"""Attention over the paged KV cache in Triton: split-KV decode, and prefill on top of what the cache already holds.

Dimensions: B or R rows, T tokens, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from orchestrator.engine.kernels import attention_programs

_DOT_ROWS = 16  # the fewest rows, columns or summands that tl.dot takes
MAX_SPLITS = 64
_COMBINED_PER_THREAD = 64  # floats that a thread of `combine` holds
_KEYS_PER_SPLIT = 32  # decode's smallest tile
_PROGRAMS_PER_SM = 4
_MANY_SPLITS = 32  # beyond, combining them costs more than a second program on an SM gains


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program works on at a time, and with what: keys of the cache, query rows, warps, loads in flight."""

    keys: int
    rows: int
    warps: int
    stages: int
    registers: int | None = None  # at most so many a thread


def decode_tile(group: int, head_dim: int, dtype: torch.dtype, splits: int) -> Tile:
    """64 keys of 128 bf16 values are 32 KiB of K and V, of which each of an SM's three programs has two in flight.

    A split of more than 16 holds few keys, and mostly waits for the first: with tiles of 32, attention of one row over
    600 keys adds 6.5 µs to a layer instead of 7.7 (H100 SXM, Llama 3.1 8B, 2026-11-22).
    """
    rows = max(_DOT_ROWS, triton.next_power_of_2(group))
    if dtype == torch.float32:
        return Tile(keys=32 if head_dim <= 128 else 16, rows=rows, warps=4, stages=2)
    if head_dim <= 128 and splits > 16:
        return Tile(keys=32, rows=rows, warps=4, stages=2)
    return Tile(keys=64 if head_dim <= 128 else 32, rows=rows, warps=4, stages=3)


@cache
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def prefill_tile(head_dim: int, dtype: torch.dtype, *, hopper: bool) -> Tile:
    """128 rows are two warpgroups' worth of Hopper's matrix instructions. float32 has none: small tiles, unrolled.

    With 128 registers a thread two programs fit on an SM of Hopper: one multiplies while the other does its softmax.
    Of tiles of 32 keys hardly anything spills: 8 prompts of 1024 tokens take 221.5 µs (311 TFLOP/s), one of 512 18.7,
    one of 8192 1252; with 64 keys and two stages 240.2, 21.5 and 1289 (H100 SXM, Llama 3.1 8B, 2026-11-22).
    """
    if dtype == torch.float32:
        size = 32 if head_dim <= 128 else 16
        return Tile(keys=size, rows=size, warps=4, stages=2)
    if head_dim <= 128:
        if hopper:
            return Tile(keys=32, rows=128, warps=8, stages=3, registers=128)
        return Tile(keys=64, rows=128, warps=8, stages=3)
    return Tile(keys=32, rows=64, warps=4, stages=2)


def query_rows(head_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """That one of prefill's programs works on; each token has heads / kv_heads of them."""
    return prefill_tile(head_dim, dtype, hopper=_hopper(device)).rows


def choose_splits(rows: int, kv_heads: int, longest_tokens: int, sm_count: int) -> int:
    """Into how many parts to cut each row's keys, so that every SM has work and no part is too small to pay.

    Rows that reach most SMs as they are stay whole. Llama 3.1 8B at 1152 keys on an H100 SXM, 2026-11-22, in µs:
    4 rows 21.5 whole, 13.9 in 4, 14.3 in 16; 8 rows 22.5 whole, 22.2 in 4, 21.2 in 8; 16 rows 31.7 whole, 34.8 in 4.
    """
    programs = rows * kv_heads
    if 2 * programs > sm_count:
        return 1
    to_fill = min(_PROGRAMS_PER_SM * sm_count // programs, max(_MANY_SPLITS, sm_count // programs))
    worthwhile = math.ceil(longest_tokens / _KEYS_PER_SPLIT)
    return min(to_fill, worthwhile, MAX_SPLITS)


def decode_attention(
    q_BHD: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    slots_B: Tensor,
    positions_B: Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None,
    splits: int,
    tile: Tile | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """[B, H, D]: row i is one query, at position positions_B[i] of slot slots_B[i], over that slot's keys up to there.

    keys, values: one layer of KVCache, with the row's own K and V already in, in float8 or q's dtype; tables: int32
    [slots, blocks of a slot]. A row at position -1 is nobody's, and of its output nothing is known.
    splits: at most MAX_SPLITS; of several, a second kernel combines the results. Grids depend on shapes and splits
    alone: a CUDA graph may hold the call. pdl: see overlap.py.
    """
    rows, heads, head_dim = q_BHD.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    tile = tile or decode_tile(group, head_dim, q_BHD.dtype, splits)
    assert q_BHD.stride(2) == 1 and keys.is_contiguous() and values.is_contiguous()
    assert splits <= MAX_SPLITS
    out = torch.empty((rows, heads, head_dim), dtype=q_BHD.dtype, device=q_BHD.device) if out is None else out
    parts = lse = out
    if splits > 1:
        parts = torch.empty((rows, heads, splits, head_dim), dtype=torch.float32, device=q_BHD.device)
        lse = torch.empty((rows, heads, splits), dtype=torch.float32, device=q_BHD.device)
    head_pad = max(_DOT_ROWS, triton.next_power_of_2(head_dim))
    attention_programs.decode[(kv_heads, rows, splits)](
        q_BHD,
        keys,
        values,
        tables,
        slots_B,
        positions_B,
        out,
        parts,
        lse,
        splits,
        q_BHD.stride(0),
        q_BHD.stride(1),
        out.stride(0),
        out.stride(1),
        tables.stride(0),
        scale * math.log2(math.e),
        WINDOW=window,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        BLOCK_SIZE=block_size,
        SPLIT=splits > 1,
        ROWS=tile.rows,
        TILE=tile.keys,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=pdl,
    )
    if splits > 1:
        attention_programs.combine[(heads, rows)](
            parts,
            lse,
            out,
            splits,
            out.stride(0),
            out.stride(1),
            HEAD_DIM=head_dim,
            HEAD_PAD=head_pad,
            MAX_SPLITS=MAX_SPLITS,
            PDL=pdl,
            num_warps=max(1, MAX_SPLITS * head_pad // (32 * _COMBINED_PER_THREAD)),
            launch_pdl=pdl,
        )
    return out


def prefill_attention(
    q_THD: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    slots_R: Tensor,
    starts_R: Tensor,
    offsets_R1: Tensor,
    *,
    longest: int | None,
    blocks: tuple[Tensor, Tensor] | None = None,
    block_size: int,
    scale: float,
    window: int | None,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[T, H, D]: row r's queries are tokens offsets_R1[r] … offsets_R1[r+1]-1, from position starts_R[r] of its slot.

    Each sees all of its slot's keys up to its own position: those of this step, and what the cache held before.
    longest: tokens of the longest row; None: `blocks` say what each program works on, as where a CUDA graph holds the
    call: rows (-1: nobody's), and which of the row's blocks of `query_rows`. The rest as in decode_attention.
    """
    heads, head_dim = q_THD.shape[1:]
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    tile = tile or prefill_tile(head_dim, q_THD.dtype, hopper=_hopper(q_THD.device))
    assert q_THD.stride(2) == 1 and keys.is_contiguous() and values.is_contiguous()
    out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device) if out is None else out
    block_rows, block_of_row = blocks or (offsets_R1, offsets_R1)  # not read without any
    if longest is None:
        grid = len(block_rows), kv_heads, 1
    else:
        grid = triton.cdiv(longest * group, tile.rows), kv_heads, len(slots_R)
    attention_programs.prefill[grid](
        q_THD,
        keys,
        values,
        tables,
        slots_R,
        starts_R,
        offsets_R1,
        block_rows,
        block_of_row,
        out,
        q_THD.stride(0),
        q_THD.stride(1),
        out.stride(0),
        out.stride(1),
        tables.stride(0),
        scale * math.log2(math.e),
        WINDOW=window,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        HEAD_PAD=max(_DOT_ROWS, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size,
        ROWS=tile.rows,
        TILE=tile.keys,
        FLAT=longest is None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    return out
