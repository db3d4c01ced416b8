"""What one program of the attention kernels does; attention.py launches them.

Dimensions of a tile: M query rows (one query head at one position each), N keys, D head dimension. All query heads of a
KV head are rows of one tile, so that a key is read once for them all. Softmax online, in float32, in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    qk_scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Folds the keys begin … end-1 into an online softmax. MASKED: some query may not see some key of a tile.

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
        offsets_N = _cache_offsets(blocks_N, start + TILE + key_N, first, last, BLOCK_SIZE, ROW)
        blocks_N = _blocks(table, start + 2 * TILE + key_N, first, last, BLOCK_SIZE)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * qk_scale
        if MASKED:
            visible_MN = (start + key_N)[None, :] <= query_M[:, None]
            if WINDOW is not None:
                visible_MN &= (start + key_N)[None, :] > query_M[:, None] - WINDOW
            # Finite, not -inf: a row that sees nothing yet sums up garbage, which the first key it sees scales to zero.
            score_MN = tl.where(visible_MN, score_MN, -1e30)
        new_top_M = tl.maximum(top_M, tl.max(score_MN, 1))
        p_MN = tl.exp2(score_MN - new_top_M[:, None])
        fade_M = tl.exp2(top_M - new_top_M)
        sum_M = sum_M * fade_M + tl.sum(p_MN, 1)
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * fade_M[:, None], input_precision="ieee")
        top_M = new_top_M
    return acc_MD, top_M, sum_M


@triton.jit
def decode(
    q,
    keys,
    values,
    tables,
    slots,
    positions,
    out,
    partial_out,
    partial_lse,
    arrivals,
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
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    COMBINED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row, one KV head, one split of the row's keys; the last split of a row to finish combines them all.

    Neighbouring programs are KV heads of one row: together they read whole rows of the cache.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    table = tables + tl.load(slots + row).to(tl.int64) * table_stride
    first = 0
    if WINDOW is not None:
        first = tl.maximum(position - WINDOW + 1, 0)
    first_tile = first // TILE
    tiles = position // TILE + 1 - first_tile
    tiles_each = tl.cdiv(tiles, SPLITS)
    used = tl.cdiv(tiles, tiles_each)
    if split >= used:  # a short row in a grid made for long ones
        return
    begin = (first_tile + split * tiles_each) * TILE
    end = tl.minimum(begin + tiles_each * TILE, position + 1)

    head_M = tl.arange(0, ROWS)
    dim_D = tl.arange(0, HEAD_PAD)
    present_MD = (head_M < GROUP)[:, None] & (dim_D < HEAD_DIM)[None, :]
    q_heads = q + row.to(tl.int64) * q_row_stride + kv_head * GROUP * q_head_stride
    q_MD = tl.load(q_heads + head_M[:, None] * q_head_stride + dim_D[None, :], mask=present_MD, other=0.0)
    acc_MD, top_M, sum_M = _attend(
        tl.zeros([ROWS, HEAD_PAD], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        q_MD,
        keys + kv_head * HEAD_DIM,
        values + kv_head * HEAD_DIM,
        table,
        begin,
        end,
        tl.zeros([ROWS], tl.int32) + position,
        first,
        position,
        qk_scale,
        True,
        WINDOW,
        KV_HEADS * HEAD_DIM,
        HEAD_DIM,
        BLOCK_SIZE,
        TILE,
    )
    o_MD = acc_MD / sum_M[:, None]
    out_heads = out + row.to(tl.int64) * out_row_stride + kv_head * GROUP * out_head_stride
    if used == 1:
        places = out_heads + head_M[:, None] * out_head_stride + dim_D[None, :]
        tl.store(places, o_MD.to(out.dtype.element_ty), mask=present_MD)
    elif SPLITS > 1:
        pair = row * KV_HEADS + kv_head
        lse = partial_lse + pair * SPLITS * GROUP
        parts = partial_out + pair.to(tl.int64) * SPLITS * GROUP * HEAD_DIM
        part_places = parts + (split * GROUP + head_M)[:, None] * HEAD_DIM + dim_D[None, :]
        tl.store(part_places, o_MD, mask=present_MD)
        tl.store(lse + split * GROUP + head_M, top_M + tl.log2(sum_M), mask=head_M < GROUP)
        tl.debug_barrier()  # every thread's part is written before one thread says so
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == used - 1:
            tl.store(arrivals + pair, 0)
            _combine(
                parts, lse, used, out_heads, out_head_stride, GROUP, HEAD_DIM, HEAD_PAD, SPLITS, COMBINED
            )


@triton.jit
def _combine(
    parts,
    lse,
    used,
    out_heads,
    out_head_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    COMBINED: tl.constexpr,
):
    """Sums a row's parts, each weighted by its share of the softmax, in the order of splits whoever came last."""
    head_G = tl.arange(0, triton.next_power_of_2(GROUP))
    dim_D = tl.arange(0, HEAD_PAD)
    split_S = tl.arange(0, triton.next_power_of_2(SPLITS))
    # .cg reads past L1, which never sees what other SMs wrote.
    lse_SG = tl.load(
        lse + split_S[:, None] * GROUP + head_G[None, :],
        mask=(split_S < used)[:, None] & (head_G < GROUP)[None, :],
        other=-1e30,
        cache_modifier=".cg",
    )
    top_G = tl.max(lse_SG, 0)
    whole_G = tl.sum(tl.exp2(lse_SG - top_G[None, :]), 0)
    present_GD = (head_G < GROUP)[:, None] & (dim_D < HEAD_DIM)[None, :]
    acc_GD = tl.zeros([triton.next_power_of_2(GROUP), HEAD_PAD], tl.float32)
    for begin in range(0, used, COMBINED):
        split_C = begin + tl.arange(0, COMBINED)
        place_CG = split_C[:, None] * GROUP + head_G[None, :]
        seen_CG = (split_C < used)[:, None] & (head_G < GROUP)[None, :]
        lse_CG = tl.load(lse + place_CG, mask=seen_CG, other=-1e30, cache_modifier=".cg")
        part_CGD = tl.load(
            parts + place_CG[:, :, None] * HEAD_DIM + dim_D[None, None, :],
            mask=seen_CG[:, :, None] & (dim_D < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        acc_GD += tl.sum(part_CGD * tl.exp2(lse_CG - top_G[None, :])[:, :, None], 0)
    o_GD = (acc_GD / whole_G[:, None]).to(out_heads.dtype.element_ty)
    tl.store(out_heads + head_G[:, None] * out_head_stride + dim_D[None, :], o_GD, mask=present_GD)


@triton.jit
def prefill(
    q,
    keys,
    values,
    tables,
    slots,
    starts,
    offsets,
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
):
    """ROWS query rows of one sequence and one KV head. A row's heads lie beside each other: query row m is head m % G
    of token m // G."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first, for an even end
    kv_head, row = tl.program_id(1), tl.program_id(2)
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

    acc_MD = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    top_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    k, v, query_M = keys + kv_head * HEAD_DIM, values + kv_head * HEAD_DIM, start + token_M
    for part in tl.static_range(0 if WINDOW is not None else 1, 3):
        part_begin = begin if part == 0 else (whole_begin if part == 1 else whole_end)
        part_end = whole_begin if part == 0 else (whole_end if part == 1 else high + 1)
        acc_MD, top_M, sum_M = _attend(
            acc_MD,
            top_M,
            sum_M,
            q_MD,
            k,
            v,
            table,
            part_begin,
            part_end,
            query_M,
            first,
            high,
            qk_scale,
            part != 1,
            WINDOW,
            KV_HEADS * HEAD_DIM,
            HEAD_DIM,
            BLOCK_SIZE,
            TILE,
        )
    o_MD = (acc_MD / sum_M[:, None]).to(out.dtype.element_ty)
    out_places = out + offset.to(tl.int64) * out_token_stride + token_M[:, None] * out_token_stride
    tl.store(out_places + head_M[:, None] * out_head_stride + dim_D[None, :], o_MD, mask=present_MD)
