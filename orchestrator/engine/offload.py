"""Streams layers' weights from host memory through the device's two buffers (strategies/offload.py says which).

The model does not know: a streamed layer's parameters are views of its buffer, and hooks before and behind the layer
wait for its weights and send for the next. On a GPU the copies go on a stream of their own, out of pinned memory, and
may be captured: a step ends with none under way. On a CPU they are plain copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.engine.host_memory import paged, pin
from strategies.offload import Streaming

ALIGNED_BYTES = 256  # as torch's own allocator does: kernels read words of 16


def stream(model: nn.Module, streaming: Streaming, device: torch.device) -> Stream | None:
    """Packs the layers that are streamed in host memory, and hooks them on. None: all are resident."""
    if not streaming.buffers:
        return None
    return Stream(model, streaming, device)


class Stream:
    def __init__(self, model: nn.Module, streaming: Streaming, device: torch.device) -> None:
        parts: Any = model
        layers = [parts.layers[i] for i in streaming.streamed]
        self._streaming = streaming
        self._host: list[Tensor] = []
        n_bytes = max(_packed_bytes(layer) for layer in layers)
        self._buffers = [
            torch.empty(n_bytes, dtype=torch.uint8, device=device) for _ in range(streaming.buffers)
        ]
        on_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._copied: list[torch.cuda.Event | None] = [None] * streaming.buffers
        self._holds = list(range(streaming.buffers))
        for position, layer in enumerate(layers):
            self._host.append(_packed(layer))
            if on_gpu:
                pin(self._host[-1])
            _point(layer, self._buffers[streaming.buffer_of(position)])
        for buffer, position in enumerate(self._holds):
            self._buffers[buffer][: len(self._host[position])].copy_(self._host[position])
        for position, layer in enumerate(layers):
            self._hook(layer, position)
        model.register_forward_hook(lambda *_: self._end())

    @property
    def step_bytes(self) -> int:
        """What comes from the host at every step. Two layers alone stay where they are."""
        moving = len(self._host) > len(self._buffers)
        return sum(host.nbytes for host in self._host) if moving else 0

    @property
    def host_bytes(self) -> int:
        return sum(host.nbytes for host in self._host)

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
        source = self._host[following]
        target = self._buffers[buffer][: len(source)]
        if self._copies is None:
            target.copy_(source)
            return
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            landed.record()
        self._copied[buffer] = landed

    def _end(self) -> None:
        """Behind the last layer: nothing is on its way, for a graph must not end, nor begin, with copies open."""
        # Where nothing was sent there is nothing to wait for, and a graph must not wait for what it did not begin.
        if self._copies is not None and any(copied is not None for copied in self._copied):
            torch.cuda.current_stream().wait_stream(self._copies)
            self._copied = [None] * len(self._buffers)


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
    """Of all parameters on their device, those in one buffer once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())
