"""Fills one rank's transformer from a checkpoint, reading only what the rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor, nn

from orchestrator.engine.checkpoint import Checkpoint
from orchestrator.engine.gguf_checkpoint import GgufCheckpoint
from orchestrator.engine.model import GateUp, Layer
from orchestrator.engine.published import PublishedCheckpoint
from orchestrator.engine.quantized import Quantized, QuantizedGateUp, round_on_the_way
from orchestrator.engine.sparse import Sparse24, Sparse24GateUp
from strategies.formats import PLAIN, Format
from strategies.plan import Shard
from strategies.quantize import native, scheme
from strategies.scheme import GGUF, SPARSE24, Scheme
from strategies.spec import ModelSpec
from strategies.tensor import Piece, pieces

READERS = 8
"""Threads of a rank. One fills no NVMe disk's queue, and copies at less than a memory channel's rate."""

QUANTIZED_CHUNK_BYTES = 16 * 2**20
"""Of what is quantized at once: each reader needs some five times as much on the way, and the rest of the memory may
be small."""


def load(
    model: nn.Module,
    shard: Shard,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    kept: Format = PLAIN,
    streamed: Sequence[int] = (),
    room: Callable[[nn.Module], Callable[[str], Tensor | None]] | None = None,
) -> None:
    """Replaces every parameter of `model`, which may be on the meta device, by its weights. Raises BadModel.

    `spec` is the whole model's. `progress` is told after each chunk: bytes loaded, bytes in all. Layers that `kept`
    has in fewer bits are replaced whole; of their weights in `dtype` no more is ever in memory than the chunks at hand.
    The weights of layers that are `streamed` stay in host memory, or where `room` has some for them: it is asked once,
    when all layers are what they will be, and then for each parameter by name.
    """
    tied = spec.tied and shard.is_first and shard.is_last
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    if tied:
        del shapes["head.weight"]
    sources = pieces(spec, shard)
    assert shapes.keys() == sources.keys(), f"parameters and pieces differ: {shapes.keys() ^ sources.keys()}"
    away = torch.device("cpu" if room is None else "meta")
    homes = {name: _home(name, streamed, device, away) for name in shapes}
    small = _replace_quantized(model, spec, kept, homes, device, dtype, checkpoint, sources)
    shapes = {name: shape for name, shape in shapes.items() if name not in small}
    allocate = _nowhere if room is None else room(model)
    for name, layer in small.items():
        _move_in(layer, name.removesuffix("weight"), allocate)
    empty = {}
    for name, shape in shapes.items():
        given = allocate(name)
        empty[name] = torch.empty(shape, device=homes[name], dtype=dtype) if given is None else given
    chunks: list[_Chunk | _QuantizedChunk | _StoredChunk] = [
        chunk for name, weights in empty.items() for chunk in _chunks(weights, sources[name], checkpoint)
    ]
    for name, layer in small.items():
        if isinstance(layer, Quantized) and _has_codes(layer, checkpoint, sources[name]):
            chunks += _stored_chunks(layer, sources[name])
        else:
            chunks += _quantized_chunks(layer, sources[name], checkpoint, dtype)
    total, done = sum(chunk.nbytes for chunk in chunks), 0
    with ThreadPoolExecutor(READERS, initializer=_begin_reader, initargs=(device,)) as readers:
        for n_bytes in readers.map(lambda chunk: _fill(chunk, checkpoint, device), chunks):
            done += n_bytes
            if progress is not None:
                progress(done, total)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for name, weights in empty.items():
        _assign(model, name, nn.Parameter(weights, requires_grad=False))
    for layer in small.values():
        layer.finish()
    round_on_the_way(layer for layer in model.modules() if isinstance(layer, Layer))
    if tied:
        _assign(model, "head.weight", model.get_parameter("embed.weight"))


def _home(name: str, streamed: Sequence[int], device: torch.device, away: torch.device) -> torch.device:
    """Where a parameter's weights are kept: those of streamed layers `away`, if only until there is room for them."""
    part, _, rest = name.partition(".")
    return away if part == "layers" and int(rest.partition(".")[0]) in streamed else device


def _nowhere(name: str) -> None:
    """No parameter has a place of its own."""


def _move_in(layer: nn.Module, prefix: str, allocate: Callable[[str], Tensor | None]) -> None:
    """Gives a stand-in's parameters the places that there are for them."""
    for name in [name for name, _ in layer.named_parameters()]:
        given = allocate(prefix + name)
        if given is not None:
            setattr(layer, name, nn.Parameter(given, requires_grad=False))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows of a parameter, and the slice of a checkpoint's tensor that they are; without one they are zeros."""

    to: Tensor
    source: Piece | None

    @property
    def nbytes(self) -> int:
        return self.to.nbytes

    @property
    def on_gpu(self) -> bool:
        return self.to.is_cuda

    def fill(self, values: Tensor) -> None:
        self.to.copy_(values)


@dataclass(frozen=True, slots=True)
class _QuantizedChunk:
    """Channels of a layer from `start` on, and the whole rows of a checkpoint's tensor that they are made from.

    Of these the rank has the columns `cols`, but a channel's scale is that of all.
    """

    to: Quantized | Sparse24
    start: int
    source: Piece
    cols: range | None

    @property
    def nbytes(self) -> int:
        assert self.source.rows is not None
        return len(self.source.rows) * self.to.row_bytes

    @property
    def on_gpu(self) -> bool:
        return self.to.device.type == "cuda"

    def fill(self, values: Tensor) -> None:
        self.to.fill(self.start, values, self.cols)


@dataclass(frozen=True, slots=True)
class _StoredChunk:
    """Channels of a layer from `start` on, whose codes are the checkpoint's."""

    to: Quantized
    start: int
    source: Piece

    @property
    def nbytes(self) -> int:
        assert self.source.rows is not None
        return len(self.source.rows) * self.to.row_bytes

    def fill_from(self, checkpoint: PublishedCheckpoint | GgufCheckpoint) -> None:
        rows, cols = self.source.rows, self.source.cols
        assert rows is not None
        cols = range(self.to.in_features) if cols is None else cols
        self.to.put(
            self.start, checkpoint.codes(self.source.name, rows, cols, self.to.how.group or len(cols))
        )


def _is_stored(checkpoint: Checkpoint, parts: tuple[Piece, ...]) -> TypeGuard[PublishedCheckpoint]:
    """Whether all that makes up a layer is there in codes that are kept as they are."""
    if not isinstance(checkpoint, PublishedCheckpoint) or not native(checkpoint.spec).name:
        return False
    return all(checkpoint.keeps(part.name) for part in parts)


def _has_codes(layer: Quantized, checkpoint: Checkpoint, parts: tuple[Piece, ...]) -> bool:
    return layer.how.format == GGUF or _is_stored(checkpoint, parts)


def _scales_dtype(checkpoint: Checkpoint, parts: tuple[Piece, ...]) -> torch.dtype | None:
    return checkpoint.scales_dtype(parts[0].name) if _is_stored(checkpoint, parts) else None


def _stored_chunks(layer: Quantized, parts: tuple[Piece, ...]) -> Iterator[_StoredChunk]:
    at = 0
    for part in parts:
        rows = range(layer.out_features) if part.rows is None else part.rows
        yield _StoredChunk(layer, at, Piece(part.name, rows, part.cols))
        at += len(rows)
    assert at == layer.out_features, f"{parts} gave {at} rows for {layer.out_features}"


def _replace_quantized(
    model: nn.Module,
    spec: ModelSpec,
    kept: Format,
    homes: Mapping[str, torch.device],
    device: torch.device,
    dtype: torch.dtype,
    checkpoint: Checkpoint,
    sources: Mapping[str, tuple[Piece, ...]],
) -> dict[str, Quantized | Sparse24]:
    """By the names of the weights that they keep. What a published checkpoint has in full stays so."""
    found: dict[str, Quantized | Sparse24] = {}
    for name, weight in list(model.named_parameters()):
        how = _scheme(spec, kept, name, checkpoint, sources.get(name, ()), device)
        if how is None:
            continue
        is_stored = _is_stored(checkpoint, sources[name])
        if isinstance(checkpoint, PublishedCheckpoint) and native(spec).name and not is_stored:
            continue
        owner = name.removesuffix(".weight")
        linear = model.get_submodule(owner)
        n, k = weight.shape
        if how.format == SPARSE24:
            sparse = Sparse24GateUp if isinstance(linear, GateUp) else Sparse24
            found[name] = sparse((n, k), how, linear.bias is not None, device, dtype)
            _set_module(model, owner, found[name])
            continue
        stand_in = QuantizedGateUp if isinstance(linear, GateUp) else Quantized
        of_stored = _scales_dtype(checkpoint, sources[name])
        layer = stand_in((n, k), how, linear.bias is not None, device, dtype, of_stored, homes[name])
        _set_module(model, owner, layer)
        found[name] = layer
    return found


def _set_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _scheme(
    spec: ModelSpec,
    kept: Format,
    name: str,
    checkpoint: Checkpoint,
    parts: tuple[Piece, ...],
    device: torch.device,
) -> Scheme | None:
    """How a rank's parameter is kept; None: in full."""
    if kept.weights != GGUF or not isinstance(checkpoint, GgufCheckpoint):
        return scheme(spec, kept, name)
    is_linear = bool(parts) and parts[0].name.endswith("_proj.weight")
    how = checkpoint.scheme([part.name for part in parts]) if is_linear else None
    return replace(how, bits=8) if how is not None and device.type == "cpu" else how


def _quantized_chunks(
    layer: Quantized | Sparse24, parts: tuple[Piece, ...], checkpoint: Checkpoint, dtype: torch.dtype
) -> Iterator[_QuantizedChunk]:
    at = 0
    for part in parts:
        rows = range(layer.out_features) if part.rows is None else part.rows
        chunk_bytes = min(checkpoint.chunk_bytes, QUANTIZED_CHUNK_BYTES)
        step = max(1, chunk_bytes // (layer.in_features * dtype.itemsize))
        for start in range(rows.start, rows.stop, step):
            some = range(start, min(start + step, rows.stop))
            # Groups lie within a rank's columns: no need of the others.
            read, cols = (part.cols, None) if layer.how.group else (None, part.cols)
            yield _QuantizedChunk(layer, at, Piece(part.name, some, read), cols)
            at += len(some)
    assert at == layer.out_features, f"{parts} gave {at} rows for {layer.out_features}"


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


def _fill(
    chunk: _Chunk | _QuantizedChunk | _StoredChunk, checkpoint: Checkpoint, device: torch.device
) -> int:
    """In a reader's thread. → bytes. On a GPU the copy may still be under way: all are in one stream's order."""
    if isinstance(chunk, _StoredChunk):
        assert isinstance(checkpoint, PublishedCheckpoint | GgufCheckpoint)
        chunk.fill_from(checkpoint)
        return chunk.nbytes
    source = chunk.source
    if source is None:
        chunk.fill(torch.zeros(()))
        return chunk.nbytes
    values = checkpoint.read(source.name, source.rows, source.cols)
    if chunk.on_gpu and not values.is_cuda:
        # From pinned memory the copy goes on while this thread reads the next chunk; torch's allocator hands the
        # memory out again once the copy is done. The dtype changes on the GPU.
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
        values = pinned.to(device, non_blocking=True)
    chunk.fill(values)
    return chunk.nbytes


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
