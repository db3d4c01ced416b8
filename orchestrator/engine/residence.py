"""A rank's transformer with its weights, all on the device or, offloaded, as many layers as fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from cluster.discover import read_cpu
from cluster.errors import BadLayout
from orchestrator.engine.checkpoint import Checkpoint
from orchestrator.engine.loader import load
from orchestrator.engine.memory import available_host_bytes, multiplies_float8
from orchestrator.engine.model import Transformer
from orchestrator.engine.offload import stream
from orchestrator.engine_config import EngineConfig
from strategies import tensor
from strategies.cost_memory import work_bytes
from strategies.formats import FORMATS
from strategies.offload import Streaming, check_host, resident_layers
from strategies.plan import Shard


class Residence(NamedTuple):
    layers: int  # of the rank
    resident: int  # of them, on the device
    step_bytes: int  # that come from host memory at every step


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
        model = Transformer(tensor.local_spec(spec, shard), embed=shard.is_first, head=shard.is_last)
    kept = FORMATS[config.format]
    if kept.name == "fp8" and not multiplies_float8(device):
        raise BadLayout("+fp8 wants GPUs of compute capability 8.9 on, and this device has less; use +int8")
    layers = len(shard.layers)
    streaming = Streaming(layers, resident_of(config, shard, device, free) if config.offload else layers)
    load(model, shard, spec, checkpoint, device, dtype, progress, kept, streaming.streamed)
    streams = stream(model, streaming, device)
    return model, Residence(layers, streaming.resident, streams.step_bytes if streams else 0)


def resident_of(config: EngineConfig, shard: Shard, device: torch.device, free: int) -> int:
    """Of a rank's layers, how many stay on a device with `free` bytes. Raises BadLayout."""
    layers = len(shard.layers)
    if config.resident_layers is not None:
        return min(layers, config.resident_layers)
    if device.type != "cuda":  # the host's memory is the device's
        return layers
    needs = work_bytes(
        config.spec,
        shard,
        config.dtype,
        FORMATS[config.format],
        tokens=config.max_num_batched_tokens,
        rows=config.max_num_seqs,
        cached=config.offload_kv_tokens,
    )
    resident = resident_layers(layers, needs.layer, free - needs.beside_layers)
    ranks = shard.tp * shard.pp  # on this host, as far as a rank knows
    # A control group counts pages of files that were read as used: its limit alone says something.
    check_host(
        (layers - resident) * needs.layer * ranks, min(available_host_bytes(), read_cpu().memory_bytes)
    )
    return resident
