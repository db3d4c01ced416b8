"""Tens of rows times weights in 4 bits by Hopper's own instructions (four_bits_hopper.cu).

Dimensions: M rows of x, N output channels, K columns.
"""

from __future__ import annotations

from ctypes import c_int, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cluster.collectives import cuda
from orchestrator.engine.kernels import four_bits, hopper
from orchestrator.engine.kernels.compiled import binaries

CHUNK = 128  # columns that a thread fetches codes of at a time
CHANNELS = 128  # of a tile, the gate's and up's counted
GROUPS = 2  # warpgroups that multiply, 64 channels each
WARPS = 4 * GROUPS
THREADS = 128 * (GROUPS + 1)
REGISTERS = {"CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24}
MOST_TILES = 4096  # of a weight; each has a counter for each of its warps
FEWEST_ROWS = 17  # that are faster than by four_bits_tens.cu
ROWS = tuple(range(-(-FEWEST_ROWS // 32) * 32, hopper.MOST_ROWS + 1, 32))
"""Of tiles: rows of x that there are not take time too."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block computes at a time: rows of x, of a plain product or of SiLU(gate) × up."""

    rows: int  # a multiple of 8
    gated: bool = False
    ring: int = 2  # chunks of codes on their way to registers

    @property
    def stages(self) -> int:
        return min(12, (hopper.SHARED_BYTES - 1280) // (self.rows * 128 + 16))

    @property
    def shared_bytes(self) -> int:
        return 1024 + self.stages * (self.rows * 128 + 16)


def choose(m: int, *, gated: bool) -> Tile:
    """Of few rows more chunks are on their way: they are sooner done with."""
    rows = next(rows for rows in ROWS if m <= rows)
    return Tile(rows, gated, 4 if rows <= 64 else 2)


@cache
def blocks_of(n: int, k: int) -> int:
    """Of a weight of n rows: each has as many chunks, and a chunk takes about as long as adding a part of a tile."""
    tiles, chunks = -(-n // CHANNELS), k // CHUNK
    most = min(four_bits.PROCESSORS, tiles * chunks)
    possible = [most, *(tiles * parts for parts in range(1, min(most // tiles, chunks) + 1))]

    def turns(blocks: int) -> int:
        own = -(-tiles * chunks // blocks)
        is_even = blocks % tiles == 0
        parts = blocks // tiles if is_even else -(-chunks * blocks // (tiles * chunks)) + 1
        return own + (parts if parts > 1 else 0)

    return min(possible, key=turns)


def takes(x_MK: Tensor, n: int, scales: Tensor, group: int) -> bool:
    """So many rows of x, where another kernel is slower or there is none."""
    return FEWEST_ROWS <= len(x_MK) <= hopper.MOST_ROWS and fits(x_MK, n, scales, group)


def fits(x_MK: Tensor, n: int, scales: Tensor, group: int) -> bool:
    """Whether four_bits_hopper.cu is for such weights and this GPU."""
    if torch.version.cuda is None or not x_MK.is_cuda or group not in (64, 128):
        return False
    if x_MK.shape[1] % CHUNK or n % 8 or n > MOST_TILES * CHANNELS:
        return False
    known = four_bits.has_kind(x_MK.dtype, scales.dtype)
    return known and torch.cuda.get_device_capability(x_MK.device) == (9, 0)


def multiply(
    x_MK: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias_N: Tensor | None,
    group: int,
    *,
    gated: bool = False,
    pdl: bool = False,
) -> Tensor:
    """x @ weight.T + bias → [M, N], or SiLU(gate) × up → [M, N / 2], as tens_of_rows of four_bits.py.

    Contiguous tensors. Products of one device run one after another: their counters are the same.
    """
    m, k = x_MK.shape
    n = len(codes)
    outputs = n // 2 if gated else n
    tile, blocks = choose(m, gated=gated), blocks_of(n, k)
    out_MN = torch.empty((m, outputs), dtype=x_MK.dtype, device=x_MK.device)
    parts = torch.empty(2 * blocks * CHANNELS * tile.rows, dtype=torch.float32, device=x_MK.device)
    x_map = cuda.tensor_map(x_MK, (k, m), (k,), (hopper.BLOCK_K, tile.rows))
    kernel = _kernel(tile, group, x_MK.dtype, scales.dtype, x_MK.device)
    kernel.launch(
        blocks, THREADS, four_bits._stream(), x_map,
        *four_bits._pointers(codes, scales, bias_N, out_MN, parts), c_void_p(_counters(x_MK.device)),
        c_int(m), c_int(outputs), c_int(k), overlap=pdl,
    )  # fmt: skip
    return out_MN


@cache
def _counters(device: torch.device) -> int:
    """Of the warps that have written a tile's parts: zero between kernels. On the current device."""
    return cuda.allocate(MOST_TILES * WARPS * 4, 0)


@cache
def _kernel(
    tile: Tile, group: int, dtype: torch.dtype, scales: torch.dtype, device: torch.device
) -> cuda.Kernel:
    module = cuda.load(binaries([source(tile, group, dtype, scales)], hopper.ARCHITECTURE)[0])
    return cuda.Kernel(module, "tens_of_rows", tile.shared_bytes, at_once=1)


def source(tile: Tile, group: int, dtype: torch.dtype, scales: torch.dtype) -> str:
    """four_bits_hopper.cu for a tile: its sizes, and the instruction that names them."""
    kind = hopper.KINDS[dtype]
    count = tile.rows // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    lefts = ", ".join(f"%{count + i}" for i in range(4))
    sizes = {
        "MX": tile.rows,
        "BN": CHANNELS,
        "WGS": GROUPS,
        "STAGES": tile.stages,
        "SHARE": 1,
        "GATED": int(tile.gated),
        "RING": tile.ring,
        "GROUP": group,
        **four_bits.kind_of(dtype, scales),
        **REGISTERS,
    }
    instruction = f"wgmma.mma_async.sync.aligned.m64n{tile.rows}k16.f32.{kind}.{kind}"
    lines = [
        *(f"#define {name} {size}" for name, size in sizes.items()),
        f"__device__ __forceinline__ void wgmma(float (&d)[{count}], const unsigned (&a)[4],"
        " unsigned long long b, int add) {",
        f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"',
        f'    "{instruction} {{{registers}}}, {{{lefts}}}, %{count + 4}, p, 1, 1, 0;\\n}}\\n"',
        f'    : {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));',
        "}",
    ]
    files = ("codes.cu", "hopper_parts.cu", "four_bits_hopper.cu")
    return "\n".join(lines) + "\n" + "".join(_text(name) for name in files)


@cache
def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text()
