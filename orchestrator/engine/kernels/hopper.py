"""Products y = x Wᵀ by Hopper's own instructions (hopper.cu): up to 256 rows as fast as the weights arrive, and
SiLU(gate) × up of many rows without writing the product down.

Dimensions: M rows of x, N rows and K columns of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cluster.collectives import cuda
from orchestrator.engine.kernels import compiled

ARCHITECTURE = "sm_90a"  # wgmma is in no other
SHARED_BYTES = 227 * 1024  # of a processor, for one block
REGISTERS = 16384  # of each of the four parts of a processor that warps are dealt out to
BLOCK_K = 64  # columns of x and W at a time: 128 bytes, the widest swizzle
MOST_ROWS = 256  # of x in one tile
LARGEST_CLUSTER = 8  # that every device takes
KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block computes: rows of x, columns of W; one of the parts that K is split in; how many tiles share x."""

    rows: int  # a multiple of 64
    columns: int  # a multiple of 16
    split: int
    share: int
    gated: bool = False
    many: bool = False  # rows of x in several tiles: always gated, 128 columns, no split

    @property
    def cluster(self) -> int:
        return self.split * self.share

    @property
    def groups(self) -> int:
        """Warpgroups that multiply: 64 rows of x each, or of W where there are many of x."""
        return (self.columns if self.many else self.rows) // 64

    @property
    def width(self) -> int:
        """The other side of a warpgroup's product."""
        return self.rows if self.many else self.columns

    @property
    def threads(self) -> int:
        return 128 * self.groups + 32

    @property
    def stage_bytes(self) -> int:
        return (self.rows + self.columns) * 2 * BLOCK_K

    @property
    def result_bytes(self) -> int:
        return self.rows * self.columns if self.many else 0  # half as many columns, of two bytes

    @property
    def stages(self) -> int:
        """Blocks of K on their way: what fits beside alignment, barriers and the result."""
        return min(12, (SHARED_BYTES - 1280 - self.result_bytes) // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return 1024 + self.result_bytes + self.stages * (self.stage_bytes + 16)

    @property
    def possible(self) -> bool:
        warps_of_a_part = -(-self.threads // 32 // 4)
        registers = min(255, REGISTERS // (32 * warps_of_a_part) // 8 * 8)
        parts_bytes = self.rows * (self.columns + 8) * 4 if self.split > 1 else 0
        return (
            self.width // 2 + 32 <= registers  # sums, and what else a thread keeps
            and self.stages >= 3
            and parts_bytes <= self.stages * self.stage_bytes
            and self.cluster <= LARGEST_CLUSTER
            and self.rows % (8 * self.share) == 0
        )

    def blocks(self, n: int) -> int:
        """Of a weight of n rows, the gate's and up's counted."""
        return -(-n // (self.columns * self.share)) * self.cluster

    def __str__(self) -> str:
        return f"{self.rows}×{self.columns}, K in {self.split}, x for {self.share}"


MANY = Tile(256, 128, 1, 2, gated=True, many=True)


def fits(n: int, k: int, dtype: torch.dtype, *, gated: bool) -> bool:
    """Whether hopper.cu takes such a weight: copies of 16 bytes, stores of four columns, of eights where gated."""
    return dtype in KINDS and n % (16 if gated else 4) == 0 and k % 8 == 0 and k >= 1024


def likeliest(m: int, n: int, k: int, processors: int, most: int, *, gated: bool) -> list[Tile]:
    """The tiles that should be fastest for m rows of x, best first."""
    rows = -(-m // 64) * 64
    shapes = [
        Tile(rows, columns, split, share, gated)
        for columns in range(32, 257, 16)
        for split in (1, 2, 4, 8)
        for share in (1, 2)
    ]
    possible = [tile for tile in shapes if tile.possible and k >= 2 * BLOCK_K * tile.split]
    return sorted(possible, key=lambda tile: expected_s(tile, n, k, processors))[:most]


def expected_s(tile: Tile, n: int, k: int, processors: int) -> float:
    """Good enough to tell likely tiles from others. Rates: of an H100 (SXM, 2026-11-22), and of its one processor."""
    blocks = tile.blocks(n)
    turns = -(-blocks // processors)
    memory_s = 2 * n * k / 3.05e12 / min(1.0, 0.1 + blocks / processors)
    l2_s = 2 * k * (n + tile.rows * blocks / tile.cluster) / 5.5e12
    own_k = k / tile.split * turns
    into_processor_s = 2 * (tile.rows + tile.columns) * own_k / 85e9
    work_s = 2 * tile.rows * tile.columns * own_k / 5.5e12
    exchange_s = 0.4e-6 + 4 * tile.rows * tile.columns / 60e9 if tile.split > 1 else 0.0
    return max(memory_s, l2_s, into_processor_s, work_s) + (2e-6 + exchange_s) * turns


def source(tile: Tile, dtype: torch.dtype) -> str:
    """hopper.cu for a tile: its sizes, and the instructions that name them."""
    count, kind = tile.width // 2, KINDS[dtype]
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    sizes = {
        "MX": tile.rows,
        "BN": tile.columns,
        "WGS": tile.groups,
        "STAGES": tile.stages,
        "SPLIT": tile.split,
        "SHARE": tile.share,
        "GATED": int(tile.gated),
        "MANY": int(tile.many),
    }
    instruction = f"wgmma.mma_async.sync.aligned.m64n{tile.width}k16.f32.{kind}.{kind}"
    lines = [
        *(f"#define {name} {size}" for name, size in sizes.items()),
        "__device__ __forceinline__ unsigned short to_element(float value) {",
        f'  unsigned short made; asm("cvt.rn.{kind}.f32 %0, %1;" : "=h"(made) : "f"(value)); return made;',
        "}",
        f"__device__ __forceinline__ void wgmma(float (&d)[{count}], unsigned long long a,"
        " unsigned long long b, int add) {",
        f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"',
        f'    "{instruction} {{{registers}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}\\n"',
        f'    : {operands} : "l"(a), "l"(b), "r"(add));',
        "}",
    ]
    return "\n".join(lines) + "\n" + _text("hopper_parts.cu") + _text("hopper.cu")


@cache
def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def binaries(tiles: Sequence[Tile], dtype: torch.dtype) -> dict[Tile, bytes]:
    """Needs NVRTC but no GPU."""
    return dict(zip(tiles, compiled.binaries([source(t, dtype) for t in tiles], ARCHITECTURE), strict=True))


class Product:
    """A tile's kernel on the current device. A weight's map is made once: where it lies and its shape say all."""

    def __init__(self, tile: Tile, binary: bytes, device: torch.device) -> None:
        """`binary` is that of `binaries`."""
        self.tile = tile
        name = "many_rows" if tile.many else "few_rows"
        self._kernel = cuda.Kernel(cuda.load(binary), name, tile.shared_bytes)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._blocks = processors // tile.cluster * tile.cluster  # where each takes tile after tile
        self._maps: dict[tuple[int, torch.Size], cuda.TensorMap] = {}

    def __call__(self, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        """→ [M, N], or SiLU(gate) × up [M, N/2], the gate's rows first in the weight. Contiguous tensors."""
        assert x_MK.is_contiguous(), x_MK.stride()
        tile = self.tile
        (m, k), n = x_MK.shape, weight_NK.shape[0] // (1 + tile.gated)
        out_MN = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
        x_map = cuda.tensor_map(x_MK, (k, m), (k,), (BLOCK_K, tile.rows // tile.share))
        key = weight_NK.data_ptr(), weight_NK.shape
        if key not in self._maps:
            self._maps[key] = self._weight_map(weight_NK)
        blocks = tile.blocks(weight_NK.shape[0])
        to: cuda.Argument = c_void_p(out_MN.data_ptr())
        if tile.many:
            blocks = self._blocks
            to = cuda.tensor_map(out_MN, (n, m), (n,), (tile.columns // 2, tile.rows))
        arguments = x_map, self._maps[key], to, c_int(m), c_int(n), c_int(k)
        stream = torch.cuda.current_stream().cuda_stream
        self._kernel.launch(blocks, tile.threads, stream, *arguments, overlap=True)
        return out_MN

    def _weight_map(self, weight_NK: Tensor) -> cuda.TensorMap:
        n, k = weight_NK.shape
        if not self.tile.gated:
            return cuda.tensor_map(weight_NK, (k, n), (k,), (BLOCK_K, self.tile.columns))
        half = n // 2  # rows by eights, the gate's and up's in turn
        sizes, strides = (k, 8, 2, half // 8), (k, half * k, 8 * k)
        return cuda.tensor_map(weight_NK, sizes, strides, (BLOCK_K, 8, 2, self.tile.columns // 16))
