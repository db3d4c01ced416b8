"""What a child process times for the guides' claims: products with a pruned weight, through the engine's own layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from cluster.errors import BadLayout
from cluster.probes import Target, graphed_s, repeated_s
from launch.claim_measured import Product
from orchestrator.engine.sparse import Sparse24
from strategies.scheme import SPARSE24, Scheme

ROWS = {"cpu": (1, 64), "cuda": (1, 512)}  # of a token, of a prompt
SHAPE = {"cpu": (2048, 2048), "cuda": (14336, 4096)}  # N, K: an 8B model's gate
WEIGHTS = {"cpu": 8, "cuda": 8}  # one after another, so that none comes from a cache
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
PRUNED = 0.3  # of a weight, by the guides
TURNS = 4
_FOUR = 4


def weight_name(kind: str) -> str:
    n, k = SHAPE[kind]
    return f"a {n} × {k} weight in {str(DTYPE[kind]).removeprefix('torch.')}"


@torch.inference_mode()
def products(target: Target) -> list[Product]:
    device = target.open()
    kind = device.type
    dense = [torch.randn(*SHAPE[kind], dtype=DTYPE[kind], device=device) for _ in range(WEIGHTS[kind])]
    zeros = [_without_smallest(weight) for weight in dense]
    sparse, refused = _sparse(dense, device)
    return [_timed(target, device, rows, dense, zeros, sparse, refused) for rows in ROWS[kind]]


def _without_smallest(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.abs().float().flatten()
    some = flat[:: max(1, len(flat) // 2**20)]  # of random numbers a million tell where the cut is
    return torch.where(weight.abs() < some.quantile(PRUNED), 0, weight)


def _sparse(dense: list[torch.Tensor], device: torch.device) -> tuple[list[Sparse24], str]:
    """The engine's layers, or why the device's kernels refuse."""
    made = []
    for weight in dense:
        n, k = weight.shape
        layer = Sparse24((n, k), Scheme(SPARSE24, _FOUR), False, device, weight.dtype)
        layer.fill(0, weight, None)
        try:
            layer.finish()
        except BadLayout as error:
            return [], str(error)
        made.append(layer)
    return made, ""


def _timed(
    target: Target,
    device: torch.device,
    rows: int,
    dense: list[torch.Tensor],
    zeros: list[torch.Tensor],
    sparse: list[Sparse24],
    refused: str,
) -> Product:
    x = torch.randn(rows, dense[0].shape[1], dtype=dense[0].dtype, device=device)
    runs: dict[str, Callable[[], object]] = {
        "dense": lambda: [functional.linear(x, weight) for weight in dense],
        "zeros": lambda: [functional.linear(x, weight) for weight in zeros],
    }
    if sparse:
        runs["sparse24"] = lambda: [layer(x) for layer in sparse]
    seconds = _fastest(target, device, runs)
    return Product(
        rows,
        dense_s=seconds["dense"] / len(dense),
        zeros_s=seconds["zeros"] / len(dense),
        sparse24_s=seconds["sparse24"] / len(dense) if sparse else None,
        is_halved=bool(sparse) and sparse[0].weight is None,
        refused=refused,
    )


def _fastest(target: Target, device: torch.device, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each, in turns: what else runs on the machine then slows all of them alike."""
    timed = graphed_s if device.type == "cuda" else repeated_s
    turns = [{name: timed(run, device, target.probe_s) for name, run in runs.items()} for _ in range(TURNS)]
    return {name: min(turn[name] for turn in turns) for name in runs}
