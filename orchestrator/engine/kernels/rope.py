"""From the QKV product to attention: per-head norms, rotary embedding, and the write to the KV cache, in one launch.

Dimensions: T tokens, N columns of the QKV product: all query heads, then all key heads, then all value heads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_halves(first, second, weight, pair, inside, EPS: tl.constexpr, HALF: tl.constexpr):
    """RMSNorm of each row, of which `first` and `second` are the halves; the rounding of norm.py."""
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    square = tl.sum(wide_first * wide_first, axis=1) + tl.sum(wide_second * wide_second, axis=1)
    factor = (1.0 / tl.sqrt_rn(square / (2 * HALF) + EPS))[:, None]
    scale_first = tl.load(weight + pair, mask=inside, other=0.0).to(tl.float32)
    scale_second = tl.load(weight + HALF + pair, mask=inside, other=0.0).to(tl.float32)
    wide_first = (wide_first * factor).to(first.dtype).to(tl.float32) * scale_first
    wide_second = (wide_second * factor).to(first.dtype).to(tl.float32) * scale_second
    return wide_first.to(first.dtype), wide_second.to(first.dtype)


@triton.jit(do_not_specialize_on_alignment=["positions", "cache_rows"])  # parts of a step's arrays
def _rope_and_cache(
    qkv,
    positions,
    cache_rows,
    frequencies,
    q_norm,
    k_norm,
    keys,
    values,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # of the head dimension
    GROUP_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes one token's KV head and the query heads that share it: rows are heads, columns pairs."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    DIM: tl.constexpr = 2 * HALF
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    in_half = pair < HALF
    member = tl.arange(0, GROUP_BLOCK)[:, None]
    frequency = tl.load(frequencies + pair, mask=in_half, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = qkv + token * (HEADS + 2 * KV_HEADS) * DIM
    q = row + (kv_head * GROUP + member) * DIM + pair
    k = row + (HEADS + kv_head) * DIM + pair
    inside = in_half & (member < GROUP)
    position, cache_row = tl.load(positions + token), tl.load(cache_rows + token).to(tl.int64)
    q_first, q_second = tl.load(q, mask=inside, other=0.0), tl.load(q + HALF, mask=inside, other=0.0)
    k_first, k_second = tl.load(k, mask=in_half, other=0.0), tl.load(k + HALF, mask=in_half, other=0.0)
    v_first = tl.load(k + KV_HEADS * DIM, mask=in_half)
    v_second = tl.load(k + KV_HEADS * DIM + HALF, mask=in_half)
    # The angle rounded to float32, as models are trained; cos and sin are exact to its last bits, however large it is.
    angle = position.to(tl.float32) * frequency
    cos, sin = tl.cos(angle) * SCALE, tl.sin(angle) * SCALE
    if NORM:
        q_first, q_second = _norm_halves(q_first, q_second, q_norm, pair, in_half, EPS, HALF)
        k_first, k_second = _norm_halves(k_first, k_second, k_norm, pair, in_half, EPS, HALF)
    cache = cache_row * (KV_HEADS * DIM) + kv_head * DIM + pair
    _store_rotated(q, q_first, q_second, cos, sin, inside, HALF)
    _store_rotated(keys + cache, k_first, k_second, cos, sin, in_half, HALF)
    tl.store(values + cache, _as_kept(v_first, values), mask=in_half)
    tl.store(values + cache + HALF, _as_kept(v_second, values), mask=in_half)


@triton.jit
def _store_rotated(pointers, first, second, cos, sin, inside, HALF: tl.constexpr):
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    turned_first = (wide_first * cos - wide_second * sin).to(first.dtype)
    turned_second = (wide_second * cos + wide_first * sin).to(first.dtype)
    tl.store(pointers, _as_kept(turned_first, pointers), mask=inside)
    tl.store(pointers + HALF, _as_kept(turned_second, pointers), mask=inside)


@triton.jit
def _as_kept(values, pointers):
    """In the dtype that a cache is kept in: float8 has nothing over 448."""
    if pointers.dtype.element_ty == tl.float8e4nv:
        values = tl.minimum(tl.maximum(values.to(tl.float32), -448.0), 448.0)
    return values.to(pointers.dtype.element_ty)


def rope_and_cache(
    qkv_TN: Tensor,
    positions_T: Tensor,
    cache_rows_T: Tensor,
    frequencies: Tensor,
    scale: float,
    keys: Tensor,
    values: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = False,
) -> None:
    """Rotate q in place in `qkv_TN`; write rotated k, and v, to rows `cache_rows_T` of one layer's cache.

    keys, values: [rows, kv_heads, head_dim], contiguous, of qkv's dtype or float8 (e4m3). positions, cache rows: int32
    or int64. frequencies: float32 [head_dim / 2], radians a position; `scale` multiplies cos and sin. q_norm, k_norm:
    weights [head_dim] of each head's RMSNorm before the rotation, with its `eps`. Rotation in float32, rounded once.
    """
    half = head_dim // 2
    group_block = triton.next_power_of_2(heads // kv_heads)
    half_block = triton.next_power_of_2(half)
    _rope_and_cache[(qkv_TN.shape[0], kv_heads)](
        qkv_TN,
        positions_T,
        cache_rows_T,
        frequencies,
        qkv_TN if q_norm is None else q_norm,
        qkv_TN if k_norm is None else k_norm,
        keys,
        values,
        SCALE=scale,
        EPS=eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        GROUP_BLOCK=group_block,
        HALF_BLOCK=half_block,
        NORM=q_norm is not None,
        PDL=pdl,
        num_warps=min(4, max(1, group_block * half_block // 256)),
        launch_pdl=pdl,
    )
