"""SiLU(gate) × up of many rows, without writing the product down: in Triton, for tensor memory accelerators.

Persistent programs, one a processor, take tile after tile: GROUP row tiles of x by all of the weight at a time, which
the L2 cache keeps. 2.75 ms for 8192 rows by 28672 × 4096 in bf16, where cuBLAS's product alone takes 2.75 and silu_mul
0.23 more (H100 SXM, 2026-11-22).

Dimensions: M rows of x, K columns of x and the weight, whose first half is the gate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orchestrator.engine.kernels.processors import processors

ROWS, COLUMNS, DEPTH, GROUP = 128, 128, 64, 16
STAGES, WARPS = 4, 8


@triton.jit(do_not_specialize=["M"])
def _gated_tiles(
    x,
    weight,
    out,
    M,
    N,  # of the output: half the weight's rows
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        group = tile // (GROUP * column_tiles)
        high = tl.minimum(row_tiles - group * GROUP, GROUP)
        within = tile - group * GROUP * column_tiles
        row = (group * GROUP + within % high) * ROWS
        column = (within // high) * COLUMNS
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for block in tl.range(0, tl.cdiv(K, DEPTH), num_stages=STAGES):
            part = x.load([row, block * DEPTH])
            gate = tl.dot(part, weight.load([column, block * DEPTH]).T, gate)
            up = tl.dot(part, weight.load([N + column, block * DEPTH]).T, up)
        out.store([row, column], (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype))


def gated_many(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """→ [M, N/2]. Contiguous tensors, rows of whole 16 bytes; in float32 until the end."""
    (m, k), n = x_MK.shape, weight_NK.shape[0] // 2
    out = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
    tiles = triton.cdiv(m, ROWS) * triton.cdiv(n, COLUMNS)
    programs = max(2, processors(x_MK.device))  # Triton's interpreter has one: two take several tiles each
    _gated_tiles[(min(tiles, programs),)](
        TensorDescriptor(x_MK, [m, k], [k, 1], [ROWS, DEPTH]),
        TensorDescriptor(weight_NK, [2 * n, k], [k, 1], [COLUMNS, DEPTH]),
        TensorDescriptor(out, [m, n], [n, 1], [ROWS, COLUMNS]),
        m,
        n,
        k,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        GROUP=GROUP,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return out
