"""A rank's transformer with its weights, all on the device or, offloaded, as many layers as fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cluster.discover import read_cpu
from orchestrator.engine.checkpoint import Checkpoint
from orchestrator.engine.disk import LayerFile, Reads, ThreadReads, free_bytes
from orchestrator.engine.loader import load
from orchestrator.engine.memory import available_host_bytes, check_float8
from orchestrator.engine.model import Transformer
from orchestrator.engine.offload import spots, stream
from orchestrator.engine.packed import pack
from orchestrator.engine_config import EngineConfig
from strategies import tensor
from strategies.cost_memory import work_bytes
from strategies.formats import FORMATS
from strategies.offload import DEEPSPEED, Streaming, check_host, resident_layers
from strategies.plan import Shard
from strategies.quantize import as_kept
from strategies.scheme import SPARSE24


class DiskRate(NamedTuple):
    bytes_per_s: float
    is_direct: bool  # past the page cache
    by: str

    def told(self, step_bytes: int) -> str:
        how = (
            "directly"
            if self.is_direct
            else "through the page cache, for the file system refuses direct reads"
        )
        most = f", which allows {self.bytes_per_s / step_bytes:.2f} steps a second" if step_bytes else ""
        return f"a disk (read {how} by {self.by}, {self.bytes_per_s / 1e9:.2f} GB/s{most})"


class Residence(NamedTuple):
    layers: int  # of the rank
    resident: int  # of them, on the device
    step_bytes: int  # that come from host memory, or a disk, at every step
    disk: DiskRate | None = None  # None: from host memory

    @property
    def told(self) -> str:
        """What a user is told of it."""
        if not self.step_bytes:
            kept = f"all {self.layers} layers of a rank stay on its device"
            return (
                kept
                if self.resident == self.layers
                else f"{kept}, {self.layers - self.resident} in the buffers"
            )
        came = "host memory" if self.disk is None else self.disk.told(self.step_bytes)
        return (
            f"{self.resident} of a rank's {self.layers} layers stay on its device; {self.step_bytes / 1e9:.2f} GB come "
            f"from {came} at every step"
        )


class DiskRoom(NamedTuple):
    """Of a rank, on the disk of its host."""

    file_bytes: int  # that it will keep there
    step_bytes: int  # that it will read at every step
    free_bytes: int
    bytes_per_s: float | None = None  # read; None: not timed, or no room to


def disk_room(
    config: EngineConfig, shard: Shard, device: torch.device, free: int, *, timed: bool
) -> DiskRoom:
    """Before anything is loaded, with `free` bytes of the device to be had. Raises BadLayout."""
    from cluster.copy_probes import disk_read

    assert config.offload_dir is not None
    layers = len(shard.layers)
    streaming = Streaming(layers, resident_of(config, shard, device, free))
    kept = as_kept(config.spec, FORMATS[config.format], device.type)
    layer = work_bytes(config.spec, shard, config.dtype, kept, tokens=1, rows=1, cached=0).layer
    room = free_bytes(config.offload_dir)
    found = disk_read(str(config.offload_dir)) if timed and streaming.order else None
    return DiskRoom(
        len(streaming.streamed) * layer,
        len(streaming.order) * layer,
        room,
        None if found is None else found.bytes_per_s,
    )


def loaded(
    config: EngineConfig,
    shard: Shard,
    checkpoint: Checkpoint,
    device: torch.device,
    free: int,
    progress: Callable[[int, int], None],
) -> tuple[Transformer, Residence]:
    """`free` bytes of the device are to be had. Raises BadLayout and BadModel."""
    spec, dtype = config.spec, getattr(torch, config.dtype)
    with torch.device("meta"):
        model = Transformer(tensor.local_spec(spec, shard), embed=shard.is_first, head=shard.is_last).to(
            dtype
        )
    kept = FORMATS[config.format]
    if not config.emulates_float8:
        check_float8(kept, device)
    layers = len(shard.layers)
    streaming = Streaming(layers, resident_of(config, shard, device, free) if config.offload else layers)
    assert kept.weights != SPARSE24 or not streaming.buffers, "strategies.runnable refuses it"
    room = _Room(config.offload_dir, streaming) if config.offload_dir and streaming.buffers else None
    load(model, shard, spec, checkpoint, device, dtype, progress, kept, streaming.streamed, room)
    file = None if room is None else room.file
    reads = None if file is None else _reads(config, file, on_gpu=device.type == "cuda")
    streams = stream(model, streaming, device, file, reads)
    if device.type == "cpu":
        pack(model, streaming.streamed)
    if streams is None:
        return model, Residence(layers, layers, 0)
    rate = (
        None
        if file is None or reads is None
        else DiskRate(streams.disk.bytes_per_s, file.is_direct, reads.told)
    )
    return model, Residence(layers, streaming.resident, streams.step_bytes, rate)


def _reads(config: EngineConfig, file: LayerFile, *, on_gpu: bool) -> Reads:
    """As asked for, or by threads where that is not to be had; who started it has said why."""
    if config.offload_io == DEEPSPEED:
        from orchestrator.engine import deepspeed_io  # brings DeepSpeed

        extension, _ = deepspeed_io.opened()
        if extension is not None and file.is_direct:
            return deepspeed_io.AsyncReads(extension, file, on_gpu=on_gpu)
    return ThreadReads(file)


class _Room:
    """On a disk, for the layers that are streamed."""

    def __init__(self, directory: Path, streaming: Streaming) -> None:
        self._directory, self._streaming = directory, streaming

    def __call__(self, model: nn.Module) -> Callable[[str], Tensor | None]:
        """A file that fits the model's layers as they are now. Raises BadLayout."""
        layers: Any = model.layers
        parts = [spots(layers[i], f"layers.{i}") for i in self._streaming.streamed]
        self.file = LayerFile(self._directory, [part for part, _ in parts], [size for _, size in parts])
        return self.file.allocate


def resident_of(config: EngineConfig, shard: Shard, device: torch.device, free: int) -> int:
    """Of a rank's layers, how many stay on a device with `free` bytes. Raises BadLayout."""
    layers = len(shard.layers)
    if config.resident_layers is not None:
        return min(layers, config.resident_layers)
    if device.type != "cuda":  # the host's memory is the device's
        return layers
    kept, batch = as_kept(config.spec, FORMATS[config.format]), config.max_num_batched_tokens
    most, least = config.offload_kv_tokens, config.least_kv_tokens or config.offload_kv_tokens
    needs, poorer = (
        work_bytes(config.spec, shard, config.dtype, kept, tokens=batch, rows=config.max_num_seqs, cached=n)
        for n in (most, min(most, least))
    )
    spare = needs.beside_layers - poorer.beside_layers
    resident = resident_layers(layers, needs.layer, free - needs.beside_layers, spare)
    ranks = shard.tp * shard.pp  # on this host, as far as a rank knows
    if config.offload_dir is not None:  # whose room is looked at when the file is made
        return resident
    # A control group counts pages of files that were read as used: its limit alone says something.
    available = config.host_memory_bytes or min(available_host_bytes(), read_cpu().memory_bytes)
    available -= config.host_kv_bytes * ranks
    check_host((layers - resident) * needs.layer * ranks, available)
    return resident
