"""What one program of the attention kernels does; attention.py launches them.

Dimensions of a tile: M query rows (one query head at one position each), N keys, D head dimension. All query heads of a
KV head are rows of one tile, so that a key is read once for them all. Softmax online, in float32, in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The score of a key that a query does not see. Finite, not -inf: a row that sees nothing yet has this as its maximum,
# and sums up garbage, which the first key that it sees scales to zero. A power of two, so that the garbage is finite:
# times the scale it is exact, and of the fused multiply-add that takes the maximum off, 0 is left. Of -1e30 there would
# be left what the maximum's rounding dropped, some 2**73, whose exp2 is inf.
_HIDDEN = tl.constexpr(-(2.0**100))


@triton.jit
def _blocks(table, place_N, first, last, BLOCK_SIZE: tl.constexpr):
    """The blocks that hold these positions. Beyond first … last, what nobody sees: the nearest that somebody does."""
    place_N = tl.minimum(tl.maximum(place_N, first), last)
    return tl.load(table + place_N // BLOCK_SIZE)


@triton.jit
def _cache_offsets(blocks_N, place_N, first, last, BLOCK_SIZE: tl.constexpr, ROW: tl.constexpr):
    """Where the cache holds these positions, in elements. In int64: a cache has more than 2**31 of them."""
    place_N = tl.minimum(tl.maximum(place_N, first), last)
    return (blocks_N.to(tl.int64) * BLOCK_SIZE + place_N % BLOCK_SIZE) * ROW


@triton.jit
def _attend(
    acc_MD,
    top_M,
    sum_M,
    q_MD,
    keys,
    values,
    table,
    begin,
    end,
    query_M,
    first,
    last,
    whole_begin,
    whole_end,
    qk_scale,
    WINDOW: tl.constexpr,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Folds the keys begin … end-1 into an online softmax. All queries see all keys whole_begin … whole_end-1.

    first … last are the positions that any query sees. A tile's lanes beyond them read the nearest of these instead:
    so loads need no mask, and what is masked out of the softmax is a finite number, whoever owned the memory before.
    """
    key_N = tl.arange(0, TILE)
    dim_D = tl.arange(0, q_MD.shape[1])
    # Blocks are looked up two tiles ahead, so that the pipelined loads of a tile never wait for its table.
    blocks_N = _blocks(table, begin + key_N, first, last, BLOCK_SIZE)
    offsets_N = _cache_offsets(blocks_N, begin + key_N, first, last, BLOCK_SIZE, ROW)
    blocks_N = _blocks(table, begin + TILE + key_N, first, last, BLOCK_SIZE)
    for start in tl.range(begin, end, TILE):
        place_ND = offsets_N[:, None] + dim_D[None, :]
        if q_MD.shape[1] == HEAD_DIM:
            k_ND = tl.load(keys + place_ND)
            v_ND = tl.load(values + place_ND)
        else:
            k_ND = tl.load(keys + place_ND, mask=dim_D[None, :] < HEAD_DIM, other=0.0)
            v_ND = tl.load(values + place_ND, mask=dim_D[None, :] < HEAD_DIM, other=0.0)
        if (
            k_ND.dtype != q_MD.dtype
        ):  # float8, which compute capability 8.9 turns into bfloat16 by way of float32 only
            k_ND, v_ND = k_ND.to(tl.float32).to(q_MD.dtype), v_ND.to(tl.float32).to(q_MD.dtype)
        offsets_N = _cache_offsets(blocks_N, start + TILE + key_N, first, last, BLOCK_SIZE, ROW)
        blocks_N = _blocks(table, start + 2 * TILE + key_N, first, last, BLOCK_SIZE)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        if (start < whole_begin) | (start >= whole_end):
            visible_MN = (start + key_N)[None, :] <= query_M[:, None]
            if WINDOW is not None:
                visible_MN &= (start + key_N)[None, :] > query_M[:, None] - WINDOW
            score_MN = tl.where(visible_MN, score_MN, _HIDDEN)
        new_top_M = tl.maximum(top_M, tl.max(score_MN, 1) * qk_scale)
        p_MN = tl.exp2(tl.fma(score_MN, qk_scale, -new_top_M[:, None]))
        fade_M = tl.exp2(top_M - new_top_M)
        sum_M = sum_M * fade_M + tl.sum(p_MN, 1)
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * fade_M[:, None], input_precision="ieee")
        top_M = new_top_M
    return acc_MD, top_M, sum_M


# Integers that vary from step to step are not specialized on, nor are pointers into the middle of a step's arrays:
# each value that is 1, and each that 16 divides, would compile a kernel of its own.
@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["slots", "positions"])
def decode(
    q,
    keys,
    values,
    tables,
    slots,
    positions,
    out,
    parts,
    lse,
    splits,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    out_head_stride,
    table_stride,
    qk_scale,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row, one KV head, one split of the row's keys. SPLIT: the result goes to parts and lse, for `combine`.

    Neighbouring programs are KV heads of one row: together they read whole rows of the cache. Positions are copied
    from the host before any kernel of the step begins, so they can be read before the wait.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    position = tl.load(positions + row)
    if position < 0:  # nobody: a graph's rows beyond those of the step
        return
    if PDL:
        tl.extra.cuda.gdc_wait()
    table = tables + tl.load(slots + row).to(tl.int64) * table_stride
    head_M = tl.arange(0, ROWS)
    dim_D = tl.arange(0, HEAD_PAD)
    present_MD = (head_M < GROUP)[:, None] & (dim_D < HEAD_DIM)[None, :]
    q_heads = q + row * q_row_stride + kv_head * GROUP * q_head_stride
    q_MD = tl.load(q_heads + head_M[:, None] * q_head_stride + dim_D[None, :], mask=present_MD, other=0.0)
    part_M = ((row * KV_HEADS + kv_head) * GROUP + head_M) * splits + split

    first = 0
    if WINDOW is not None:
        first = tl.maximum(position - WINDOW + 1, 0)
    first_tile = first // TILE
    tiles = position // TILE + 1 - first_tile
    tiles_each = tl.cdiv(tiles, splits)
    if split * tiles_each >= tiles:  # a short row in a grid made for long ones
        if SPLIT:
            tl.store(lse + part_M, float("-inf"), mask=head_M < GROUP)
        return
    begin = (first_tile + split * tiles_each) * TILE
    acc_MD, top_M, sum_M = _attend(
        tl.zeros([ROWS, HEAD_PAD], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        q_MD,
        keys + kv_head * HEAD_DIM,
        values + kv_head * HEAD_DIM,
        table,
        begin,
        tl.minimum(begin + tiles_each * TILE, position + 1),
        tl.zeros([ROWS], tl.int32) + position,
        first,
        position,
        0,
        0,
        qk_scale,
        WINDOW,
        KV_HEADS * HEAD_DIM,
        HEAD_DIM,
        BLOCK_SIZE,
        TILE,
    )
    o_MD = acc_MD / sum_M[:, None]
    if SPLIT:
        tl.store(parts + part_M[:, None] * HEAD_DIM + dim_D[None, :], o_MD, mask=present_MD)
        tl.store(lse + part_M, top_M + tl.log2(sum_M), mask=head_M < GROUP)
    else:
        out_heads = out + row * out_row_stride + kv_head * GROUP * out_head_stride
        places = out_heads + head_M[:, None] * out_head_stride + dim_D[None, :]
        tl.store(places, o_MD.to(out.dtype.element_ty), mask=present_MD)


@triton.jit(do_not_specialize=["splits"])
def combine(
    parts,
    lse,
    out,
    splits,
    out_row_stride,
    out_head_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums the parts of one row's query head, each weighted by its share of the softmax; -inf in lse: an unused one.

    Parts are fetched without waiting to hear which are used: the others hold whatever was there, and are left out.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split_S = tl.arange(0, MAX_SPLITS)
    dim_D = tl.arange(0, HEAD_PAD)
    part_S = (row * tl.num_programs(0) + head) * splits + split_S
    lse_S = tl.load(lse + part_S, mask=split_S < splits, other=float("-inf"))
    part_SD = tl.load(
        parts + part_S[:, None] * HEAD_DIM + dim_D[None, :],
        mask=(split_S < splits)[:, None] & (dim_D < HEAD_DIM)[None, :],
        other=0.0,
    )
    weight_S = tl.exp2(lse_S - tl.max(lse_S, 0))
    o_SD = tl.where(weight_S[:, None] > 0, part_SD * weight_S[:, None], 0.0)
    o_D = tl.sum(o_SD, 0) / tl.sum(weight_S, 0)
    places = out + row * out_row_stride + head * out_head_stride + dim_D
    tl.store(places, o_D.to(out.dtype.element_ty), mask=dim_D < HEAD_DIM)


@triton.jit(do_not_specialize_on_alignment=["slots", "starts", "offsets"])
def prefill(
    q,
    keys,
    values,
    tables,
    slots,
    starts,
    offsets,
    block_rows,
    blocks,
    out,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    table_stride,
    qk_scale,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
):
    """ROWS query rows of one sequence and one KV head. A row's heads lie beside each other: query row m is head m % G
    of token m // G.

    FLAT: the first dimension of the grid counts the blocks of all sequences, and `block_rows` and `blocks` say which
    they are; else those of one, and the third counts sequences.
    """
    kv_head = tl.program_id(1)
    if FLAT:
        row = tl.load(block_rows + tl.program_id(0))
        if row < 0:  # nobody's
            return
        block = tl.load(blocks + tl.program_id(0))
    else:
        block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first, for an even end
        row = tl.program_id(2)
    offset = tl.load(offsets + row)
    count = tl.load(offsets + row + 1) - offset
    if block * ROWS >= count * GROUP:
        return
    start = tl.load(starts + row)
    table = tables + tl.load(slots + row).to(tl.int64) * table_stride
    row_M = block * ROWS + tl.arange(0, ROWS)
    token_M = row_M // GROUP
    head_M = kv_head * GROUP + row_M % GROUP
    dim_D = tl.arange(0, HEAD_PAD)
    present_MD = (token_M < count)[:, None] & (dim_D < HEAD_DIM)[None, :]
    q_places = q + offset.to(tl.int64) * q_token_stride + token_M[:, None] * q_token_stride
    q_MD = tl.load(q_places + head_M[:, None] * q_head_stride + dim_D[None, :], mask=present_MD, other=0.0)

    # Queries low … high see keys first … high; all of them see whole_begin … whole_end-1, in whole tiles.
    low = start + block * ROWS // GROUP
    high = start + tl.minimum((block * ROWS + ROWS - 1) // GROUP, count - 1)
    first, begin, whole_begin = 0, 0, 0
    if WINDOW is not None:
        first = tl.maximum(low - WINDOW + 1, 0)
        begin = first // TILE * TILE
        whole_begin = (
            tl.minimum(tl.cdiv(tl.maximum(high - WINDOW + 1, 0), TILE), tl.cdiv(high + 1, TILE)) * TILE
        )
    whole_end = tl.maximum((low + 1) // TILE * TILE, whole_begin)

    acc_MD, _, sum_M = _attend(
        tl.zeros([ROWS, HEAD_PAD], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        q_MD,
        keys + kv_head * HEAD_DIM,
        values + kv_head * HEAD_DIM,
        table,
        begin,
        high + 1,
        start + token_M,
        first,
        high,
        whole_begin,
        whole_end,
        qk_scale,
        WINDOW,
        KV_HEADS * HEAD_DIM,
        HEAD_DIM,
        BLOCK_SIZE,
        TILE,
    )
    o_MD = (acc_MD / sum_M[:, None]).to(out.dtype.element_ty)
    out_places = out + offset.to(tl.int64) * out_token_stride + token_M[:, None] * out_token_stride
    tl.store(out_places + head_M[:, None] * out_head_stride + dim_D[None, :], o_MD, mask=present_MD)
