"""Tens of rows times weights in 4 bits by Hopper's own instructions (four_bits_hopper.cu).

Dimensions: M rows of x, N output channels, K columns.
"""

from __future__ import annotations

from ctypes import c_int
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cluster.collectives import cuda
from orchestrator.engine.kernels import four_bits, hopper
from orchestrator.engine.kernels.compiled import binaries

CHUNK = 128  # columns that a thread fetches codes of at a time


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block computes: rows of x, channels; one of the parts that K is split in; how many tiles share x."""

    rows: int  # a multiple of 16, up to 256
    channels: int  # a multiple of 64
    split: int
    share: int
    gated: bool = False
    ring: int = 2  # chunks of codes on their way to registers

    @property
    def groups(self) -> int:
        """Warpgroups that multiply."""
        return self.channels // 64

    @property
    def threads(self) -> int:
        return 128 * (self.groups + 1)

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that multiplies, and of one that brings x."""
        return {1: (0, 0), 2: (240, 24), 3: (160, 32)}[self.groups]

    @property
    def stages(self) -> int:
        return min(12, (hopper.SHARED_BYTES - 1280) // (self.rows * 128 + 16))

    @property
    def shared_bytes(self) -> int:
        return 1024 + self.stages * (self.rows * 128 + 16)

    @property
    def possible(self) -> bool:
        return (
            self.stages >= 3
            and self.rows * (self.channels + 4) * 4 <= self.stages * self.rows * 128
            and self.rows % (8 * self.share) == 0
            and self.rows % self.split == 0
            and self.split * self.share <= hopper.LARGEST_CLUSTER
        )

    def blocks(self, n: int) -> int:
        """Of a weight of n rows, the gate's and up's counted."""
        return -(-n // (self.channels * self.share)) * self.share * self.split

    def __str__(self) -> str:
        return f"{self.rows}×{self.channels}, K in {self.split}, x for {self.share}, {self.ring} ahead"


def takes(x_MK: Tensor, n: int, scales: Tensor, group: int) -> bool:
    if torch.version.cuda is None or not x_MK.is_cuda or group not in (64, 128):
        return False
    m, k = x_MK.shape
    if m > hopper.MOST_ROWS or k % CHUNK or n % 8:
        return False
    fits = x_MK.dtype in (torch.float16, torch.bfloat16) and scales.dtype in (x_MK.dtype, torch.float32)
    return fits and torch.cuda.get_device_capability(x_MK.device) == (9, 0)


def multiply(
    x_MK: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias_N: Tensor | None,
    group: int,
    tile: Tile,
    *,
    pdl: bool = False,
) -> Tensor:
    """x @ weight.T + bias → [M, N], or SiLU(gate) × up → [M, N / 2]. The weights are rounded to x's dtype."""
    m, k = x_MK.shape
    n = len(codes)
    outputs = n // 2 if tile.gated else n
    out_MN = torch.empty((m, outputs), dtype=x_MK.dtype, device=x_MK.device)
    x_map = cuda.tensor_map(x_MK, (k, m), (k,), (hopper.BLOCK_K, tile.rows // tile.share))
    kernel = _kernel(tile, group, x_MK.dtype, scales.dtype, x_MK.device)
    kernel.launch(
        tile.blocks(n), tile.threads, four_bits._stream(), x_map,
        *four_bits._pointers(codes, scales, bias_N, out_MN), c_int(m), c_int(outputs), c_int(k), overlap=pdl,
    )  # fmt: skip
    return out_MN


@cache
def _kernel(
    tile: Tile, group: int, dtype: torch.dtype, scales: torch.dtype, device: torch.device
) -> cuda.Kernel:
    module = cuda.load(binaries([source(tile, group, dtype, scales)], hopper.ARCHITECTURE)[0])
    return cuda.Kernel(module, "tens_of_rows", tile.shared_bytes)


def source(tile: Tile, group: int, dtype: torch.dtype, scales: torch.dtype) -> str:
    """four_bits_hopper.cu for a tile: its sizes, and the instruction that names them."""
    kind = hopper.KINDS[dtype]
    count = tile.rows // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    lefts = ", ".join(f"%{count + i}" for i in range(4))
    consumers, producers = tile.registers
    sizes = {
        "MX": tile.rows,
        "BN": tile.channels,
        "WGS": tile.groups,
        "STAGES": tile.stages,
        "SPLIT": tile.split,
        "SHARE": tile.share,
        "GATED": int(tile.gated),
        "RING": tile.ring,
        "GROUP": group,
        "IS_HALF": int(dtype == torch.float16),
        "WIDE_SCALES": int(scales == torch.float32),
        "CONSUMER_REGISTERS": consumers,
        "PRODUCER_REGISTERS": producers,
    }
    instruction = f"wgmma.mma_async.sync.aligned.m64n{tile.rows}k16.f32.{kind}.{kind}"
    lines = [
        *(f"#define {name} {size}" for name, size in sizes.items()),
        "#define to_element narrow",
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
