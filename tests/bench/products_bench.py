"""A layer's products in each format, by rows of x: `python -m tests.bench.products_bench --formats bf16,int4,Q4_K`.

µs of the four products of one layer of --model, SiLU counted, on random weights that a GPU's L2 cache does not hold: a
CUDA graph of some layers' worth, the fastest of a few replays. Formats are the layouts' (int8, int4, fp8) and the
quantizations that a GGUF file may keep its weights in. Without a GPU the times mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from launch.models import resolve
from orchestrator.engine import ops
from orchestrator.engine.quantized import Quantized, QuantizedGateUp
from strategies.gguf_kept import KEPT
from strategies.scheme import GGUF, Scheme
from strategies.source import spec_of
from strategies.spec import ModelSpec

LAYERS = 4  # of a replay: the same weights in turn, more of them than an L2 cache holds
REPLAYS = 5
FULL = "bf16"
SCHEMES = {"int8": Scheme("int8"), "int4": Scheme("int4"), "fp8": Scheme("fp8"), **KEPT}


class Full(nn.Linear):
    """Gate and up in the model's dtype, with SiLU."""

    def forward(self, x_MK: Tensor) -> Tensor:
        return ops.gate_up(x_MK, self.weight, None)


def layer_of(spec: ModelSpec, kept: str, device: torch.device, dtype: torch.dtype) -> list[nn.Module]:
    """qkv, o, gate and up, down."""
    qkv = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    shapes = (
        (qkv, spec.hidden),
        (spec.hidden, spec.heads * spec.head_dim),
        (2 * spec.intermediate, spec.hidden),
        (spec.hidden, spec.intermediate),
    )
    return [made(shape, kept, i == 2, device, dtype) for i, shape in enumerate(shapes)]


def made(
    shape: tuple[int, int], kept: str, gated: bool, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    n, k = shape
    if kept == FULL:
        return (Full if gated else nn.Linear)(k, n, bias=False, device=device, dtype=dtype)
    how = SCHEMES[kept]
    if kept == "int4":
        how = Scheme(kept, next(group for group in (128, 64, 32) if k % group == 0))
    small = (QuantizedGateUp if gated else Quantized)(shape, how, False, device, dtype)
    if how.format == GGUF:
        codes = small.codes.data
        codes.copy_(torch.randint(-100, 100, codes.shape, device=device, dtype=torch.int8).view(codes.dtype))
        small.scales.data.uniform_(0.001, 0.01)
    else:
        small.fill(0, torch.randn(n, k, device=device).to(dtype), None)
    small.finish()
    return small


def layer_us(layer: Sequence[nn.Module], rows: int, device: torch.device, dtype: torch.dtype) -> float:
    widths = [int(product.in_features) for product in layer]  # type: ignore[arg-type]
    xs = [torch.randn(rows, width, device=device).to(dtype) for width in widths]

    def run() -> None:
        for _ in range(LAYERS):
            for product, x in zip(layer, xs, strict=True):
                product(x)

    run()
    if device.type != "cuda":
        return _seconds(run) / LAYERS * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return min(_seconds(graph.replay) for _ in range(REPLAYS)) / LAYERS * 1e6


def _seconds(run: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--formats", default=",".join((FULL, *SCHEMES)))
    parser.add_argument("--rows", default="1,2,8,16,32,64,128,512")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    args = parser.parse_args()
    device, spec = torch.device(args.device), spec_of(resolve(args.model))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [int(one) for one in args.rows.split(",")]
    if unknown := set(args.formats.split(",")) - {FULL, *SCHEMES}:
        parser.error(f"--formats {', '.join(sorted(unknown))}: not one of {FULL}, {', '.join(SCHEMES)}")
    table = Table("µs a layer", "MB", *map(str, rows))
    for kept in args.formats.split(","):
        layer = layer_of(spec, kept, device, dtype)
        n_bytes = sum(parameter.nbytes for product in layer for parameter in product.parameters())
        times = [layer_us(layer, count, device, dtype) for count in rows]
        print(kept, *(f"{us:.1f}" for us in times), flush=True)
        table.add_row(kept, f"{n_bytes / 1e6:.1f}", *(f"{us:.1f}" for us in times))
        del layer
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
