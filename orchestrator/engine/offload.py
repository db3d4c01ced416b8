"""Streams layers' weights from host memory through the device's two buffers (strategies/offload.py says which).

The model does not know: a streamed layer's parameters are views of its buffer, and hooks before and behind the layer
wait for its weights and send for the next. On a GPU the copies go on a stream of their own, out of pinned memory, and
may be captured: a step ends with none under way. On a CPU they are plain copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from orchestrator.engine.disk import DiskLayers, LayerFile, Reads, Spot
from orchestrator.engine.host_memory import paged, pin
from orchestrator.engine.packed import packed_bytes
from strategies.offload import Streaming

ALIGNED_BYTES = 256  # as torch's own allocator does: kernels read words of 16


class Layers(Protocol):
    """Where streamed layers come from, by position."""

    def take(self, layer: int) -> Tensor:
        """Its bytes, in host memory."""

    def sent(self, copied: torch.cuda.Event | None) -> None:
        """What was taken last is on the device once `copied` is reached."""

    def whole(self, layer: int) -> Tensor:
        """Its bytes, out of turn."""


class HostLayers:
    """All of them in host memory (satisfies Layers)."""

    def __init__(self, packed: Sequence[Tensor]) -> None:
        self._packed = packed

    def take(self, layer: int) -> Tensor:
        return self._packed[layer]

    def sent(self, copied: torch.cuda.Event | None) -> None:
        pass

    def whole(self, layer: int) -> Tensor:
        return self._packed[layer]


def stream(
    model: nn.Module,
    streaming: Streaming,
    device: torch.device,
    file: LayerFile | None = None,
    reads: Reads | None = None,
) -> Stream | None:
    """Hooks the layers that are streamed on. None: all are resident.

    They are packed in host memory, unless they are in a `file` already, of which `reads` tells how it is read.
    """
    if not streaming.buffers:
        return None
    return Stream(model, streaming, device, file, reads)


class Stream:
    def __init__(
        self,
        model: nn.Module,
        streaming: Streaming,
        device: torch.device,
        file: LayerFile | None = None,
        reads: Reads | None = None,
    ) -> None:
        parts: Any = model
        layers = [parts.layers[i] for i in streaming.streamed]
        self._streaming = streaming
        self._sizes = [_packed_bytes(layer) for layer in layers] if file is None else file.sizes
        n_bytes = max(self._sizes)
        self._buffers = [
            torch.empty(n_bytes, dtype=torch.uint8, device=device) for _ in range(streaming.buffers)
        ]
        on_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._copied: list[torch.cuda.Event | None] = [None] * streaming.buffers
        self._holds = list(range(streaming.buffers))
        packed: list[Tensor] = []
        for position, layer in enumerate(layers):
            if file is None:
                packed.append(_packed(layer))
                if on_gpu:
                    pin(packed[-1])
            _point(layer, self._buffers[streaming.buffer_of(position)])
        if file is not None:
            file.finish()
            self.disk = DiskLayers(file, streaming.order, on_gpu=on_gpu, reads=reads)
        self._layers: Layers = HostLayers(packed) if file is None else self.disk
        for buffer, position in enumerate(self._holds):
            self._buffers[buffer][: self._sizes[position]].copy_(self._layers.whole(position))
        for position, layer in enumerate(layers):
            self._hook(layer, position)
        model.register_forward_hook(lambda *_: self._end())

    @property
    def step_bytes(self) -> int:
        """What comes from the host at every step. Two layers alone stay where they are."""
        return sum(self._sizes[position] for position in self._streaming.order)

    def _hook(self, layer: nn.Module, position: int) -> None:
        layer.register_forward_pre_hook(lambda *_: self._await(position))
        layer.register_forward_hook(lambda *_: self._leave(position))

    def _await(self, position: int) -> None:
        """Before a layer: its weights are there."""
        buffer = self._streaming.buffer_of(position)
        assert self._holds[buffer] == position, f"buffer {buffer} has {self._holds[buffer]}, not {position}"
        copied = self._copied[buffer]
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)

    def _leave(self, position: int) -> None:
        """Behind a layer: its buffer is free for the next.

        Of a batch in two parts (strategies/overlap.py) the first to be through sends for it: the other has launched
        all that reads these weights by then.
        """
        buffer, following = self._streaming.buffer_of(position), self._streaming.after(position)
        if self._holds[buffer] != position or following == position:
            return
        self._holds[buffer] = following
        source = self._layers.take(following)
        target = self._buffers[buffer][: len(source)]
        if self._copies is None:
            target.copy_(source)
            self._layers.sent(None)
            return
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            landed.record()
        self._copied[buffer] = landed
        self._layers.sent(landed)

    def _end(self) -> None:
        """Behind the last layer: nothing is on its way, for a graph must not end, nor begin, with copies open."""
        # Where nothing was sent there is nothing to wait for, and a graph must not wait for what it did not begin.
        if self._copies is not None and any(copied is not None for copied in self._copied):
            torch.cuda.current_stream().wait_stream(self._copies)
            self._copied = [None] * len(self._buffers)


def spots(layer: nn.Module, prefix: str) -> tuple[dict[str, Spot], int]:
    """Where a layer's parameters lie once it is packed, by name, and how much it is."""
    found, at = {}, 0
    for name, parameter in layer.named_parameters():
        found[f"{prefix}.{name}"] = Spot(at, parameter.shape, parameter.dtype)
        at += _aligned(parameter.nbytes)
    return found, at


def _packed_bytes(layer: nn.Module) -> int:
    return sum(_aligned(parameter.nbytes) for parameter in layer.parameters())


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNED_BYTES) * ALIGNED_BYTES


def _packed(layer: nn.Module) -> Tensor:
    """A layer's parameters one after another in host memory."""
    packed = paged(_packed_bytes(layer))
    at = 0
    for parameter in layer.parameters():
        flat = parameter.data.contiguous().view(-1).view(torch.uint8)
        packed[at : at + len(flat)].copy_(flat)
        at += _aligned(len(flat))
    return packed


def _point(layer: nn.Module, buffer: Tensor) -> None:
    """Makes a layer's parameters views of where they come to, in the order of `_packed`."""
    at = 0
    for name, parameter in list(layer.named_parameters()):
        view = buffer[at : at + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        at += _aligned(parameter.nbytes)
        owner, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(owner), leaf, nn.Parameter(view, requires_grad=False))


def resident_bytes(model: nn.Module) -> int:
    """Of all weights on their device, those in one buffer once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values()) + packed_bytes(model)
