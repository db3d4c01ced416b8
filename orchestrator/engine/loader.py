"""Fills one rank's transformer from a checkpoint, reading only what the rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.engine.checkpoint import Checkpoint
from strategies.plan import Shard
from strategies.spec import ModelSpec
from strategies.tensor import Piece, pieces

READERS = 8
"""Threads of a rank. One fills no NVMe disk's queue, and copies at less than a memory channel's rate."""


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

    `spec` is the whole model's. `progress` is told after each chunk: bytes loaded, bytes in all.
    """
    tied = spec.tied and shard.is_first and shard.is_last
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    if tied:
        del shapes["head.weight"]
    sources = pieces(spec, shard)
    assert shapes.keys() == sources.keys(), f"parameters and pieces differ: {shapes.keys() ^ sources.keys()}"
    empty = {name: torch.empty(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
    chunks = [
        chunk for name, weights in empty.items() for chunk in _chunks(weights, sources[name], checkpoint)
    ]
    total, done = sum(chunk.to.nbytes for chunk in chunks), 0
    with ThreadPoolExecutor(READERS, initializer=_begin_reader, initargs=(device,)) as readers:
        for n_bytes in readers.map(lambda chunk: _fill(chunk, checkpoint), chunks):
            done += n_bytes
            if progress is not None:
                progress(done, total)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for name, weights in empty.items():
        _assign(model, name, nn.Parameter(weights, requires_grad=False))
    if tied:
        _assign(model, "head.weight", model.get_parameter("embed.weight"))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows of a parameter, and the slice of a checkpoint's tensor that they are; without one they are zeros."""

    to: Tensor
    source: Piece | None


def _chunks(weights: Tensor, parts: tuple[Piece, ...], checkpoint: Checkpoint) -> Iterator[_Chunk]:
    """The parts are the rows of `weights`, in order; no parts are zeros."""
    if not parts:
        yield _Chunk(weights, None)
        return
    step = max(1, checkpoint.chunk_bytes // weights[0].nbytes)
    at = 0
    for part in parts:
        rows = range(len(weights)) if part.rows is None else part.rows
        for start in range(rows.start, rows.stop, step):
            some = range(start, min(start + step, rows.stop))
            yield _Chunk(weights[at : at + len(some)], Piece(part.name, some, part.cols))
            at += len(some)
    assert at == len(weights), f"{parts} gave {at} rows for {len(weights)}"


def _begin_reader(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else it would pin memory in a context on the first GPU


def _fill(chunk: _Chunk, checkpoint: Checkpoint) -> int:
    """In a reader's thread. → bytes. On a GPU the copy may still be under way: all are in one stream's order."""
    to, source = chunk.to, chunk.source
    if source is None:
        to.zero_()
        return to.nbytes
    values = checkpoint.read(source.name, source.rows, source.cols)
    if to.is_cuda and not values.is_cuda:
        # From pinned memory the copy goes on while this thread reads the next chunk; torch's allocator hands the
        # memory out again once the copy is done. The dtype changes on the GPU.
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
        values = pinned.to(to.device, non_blocking=True)
    to.copy_(values)
    return to.nbytes


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
