"""What options come to: the engine of every rank, and the scheduler's limits."""

from __future__ import annotations

import os

from cluster.errors import BadLayout
from launch.links import ways_beside_nccl
from launch.options import EngineOptions
from orchestrator.engine_config import EngineConfig
from orchestrator.scheduler import SchedulerConfig
from strategies.engines import CPU, OURS, Engine, engine, with_limits
from strategies.formats import FORMATS
from strategies.offload import Room
from strategies.plan import Layout, ParallelDims

JOIN_TIMEOUT_S = 120.0
OFFLOAD_KV_TOKENS = 8192  # of cache, that offloaded layers leave room for


def layout_name(options: EngineOptions, dims: ParallelDims) -> str:
    """`tp2+int4+offload`."""
    return Layout(dims, FORMATS[options.format], options.offload, options.zero3).name


def engine_config(options: EngineOptions, dims: ParallelDims) -> EngineConfig:
    cores = len(os.sched_getaffinity(0))
    return EngineConfig(
        source=options.source,
        spec=options.spec,
        dtype=options.dtype,
        device=options.device,
        format=options.format,
        compatible=options.compatible,
        zero3=options.zero3,
        offload=options.offload,
        resident_layers=options.resident_layers,
        offload_dir=options.offload_dir,
        offload_io=options.offload_io,
        offload_kv_tokens=kv_reserve(options),
        least_kv_tokens=options.least_context,
        host_memory_bytes=None if options.host_memory_gb is None else int(options.host_memory_gb * 1e9),
        host_kv_bytes=int((options.host_kv_gb or 0) * 1e9),
        memory_cap_bytes=None if options.device_memory_gb is None else int(options.device_memory_gb * 1e9),
        dummy_weights=options.dummy_weights,
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        threads=max(1, cores // dims.world_size),
        graphs=options.captures,
        memory_utilization=options.gpu_memory_utilization,
        seed=options.seed,
        grammars=options.grammars,
        join_timeout_s=JOIN_TIMEOUT_S,
        ways=ways_beside_nccl(options, dims),
    )


def kv_reserve(options: EngineOptions) -> int:
    """Tokens of a replica's cache that offloading leaves room for: all sequences at once, as far as they are known."""
    most = min(options.max_num_seqs * options.most_context, options.offload_kv_tokens or OFFLOAD_KV_TOKENS)
    return max(options.least_context, most)


def priced_engine(options: EngineOptions) -> Engine:
    """Our engine with these options, as the planner knows it."""
    return with_limits(
        engine(CPU if options.device == "cpu" else OURS),
        chunk_tokens=options.max_num_batched_tokens,
        max_sequences=options.max_num_seqs,
    )


def room_of(options: EngineOptions, cached: int | None = None) -> Room:
    """What offloading leaves room for: `cached` tokens, 0 for what the workload wants; by default what a start does."""
    return Room(
        longest=options.least_context,
        cached=kv_reserve(options) if cached is None else cached,
        resident=options.resident_layers,
        on_disk=options.offload_dir is not None,
        disk_bytes_per_s=options.disk_bytes_per_s,
        host_kv_bytes=int((options.host_kv_gb or 0) * 1e9),
    )


def limits_for(blocks: int, dims: ParallelDims, options: EngineOptions) -> SchedulerConfig:
    """The scheduler's limits where every rank has room for `blocks`. Raises BadLayout if a context does not fit."""
    size, asked = options.block_size, options.max_model_len
    blocks = min(blocks, options.num_blocks or blocks)
    least = options.least_context
    if blocks * size < least:
        raise BadLayout(
            f"{layout_name(options, dims)}: {blocks * size} KV tokens fit beside the weights, fewer than a context of "
            f"{least}. Lower --max-model-len, or split the model over more devices"
        )
    context = asked or min(options.spec.max_positions, blocks * size)
    useful = options.max_num_seqs * -(-context // size)
    return SchedulerConfig(
        num_blocks=min(blocks, useful),
        block_size=size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=context,
        groups=dims.pp,
        prefix_caching=options.prefix_caching,
        run_ahead=options.device == "cuda" and options.dtype != "float64" and not options.compatible,
    )
