"""Fills one rank's transformer from a checkpoint, reading only what the rank holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from orchestrator.engine.checkpoint import Checkpoint
from strategies.plan import Shard
from strategies.spec import ModelSpec
from strategies.tensor import Piece, pieces


def load(
    model: nn.Module,
    shard: Shard,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Replaces every parameter of `model`, which may be on the meta device, by its weights. Raises BadModel.

    `spec` is the whole model's. `progress` is told after each parameter: bytes loaded, bytes in all.
    """
    tied = spec.tied and shard.is_first and shard.is_last
    empty = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    if tied:
        del empty["head.weight"]
    sources = pieces(spec, shard)
    assert empty.keys() == sources.keys(), f"parameters and pieces differ: {empty.keys() ^ sources.keys()}"
    total = sum(shape.numel() for shape in empty.values()) * dtype.itemsize
    done = 0
    for name, shape in empty.items():
        weights = torch.empty(shape, device=device, dtype=dtype)
        _fill(weights, sources[name], checkpoint)
        _assign(model, name, nn.Parameter(weights, requires_grad=False))
        done += weights.nbytes
        if progress is not None:
            progress(done, total)
    if tied:
        _assign(model, "head.weight", model.get_parameter("embed.weight"))


def _fill(weights: Tensor, parts: tuple[Piece, ...], checkpoint: Checkpoint) -> None:
    """The parts are the rows of `weights`, in order; no parts are zeros."""
    if not parts:
        weights.zero_()
        return
    at = 0
    for part in parts:
        values = checkpoint.read(part.name, part.rows, part.cols)
        weights[at : at + len(values)].copy_(values)
        at += len(values)
    assert at == len(weights), f"{parts} gave {at} rows for {len(weights)}"


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
