"""What is known of serving engines: shares of a device's rates that their kernels reach, and time that the host takes.

The figures and where they come from are in engines.yaml. `kernels` are common to all engines; an engine differs by what
its host does, and by few factors. An engine that is not listed gets the middle of those that are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

OURS = "shardwise"
CPU = "cpu"  # ours, where devices are a CPU's cores
_FILE = Path(__file__).with_name("engines.yaml")


@dataclass(frozen=True, slots=True)
class Kernels:
    """Shares of the data sheet's rates, by bits of a weight where that matters, and times that sizes do not change."""

    weights: Mapping[int, float]  # of bandwidth, reading a product's weights
    few_rows: Mapping[int, float]  # times as large a share where rows are so few that own kernels read them
    gaps_on: Mapping[
        str, float
    ]  # device's name -> times the gaps: each generation of GPUs launches in its own time
    compute: Mapping[int, float]  # of FLOP/s, in a product
    expert_weights: Mapping[int, float]
    expert_compute: Mapping[int, float]
    kv: float  # of bandwidth, reading the cache in decode
    latent: float  # times as long, where the cache is latent
    prompt_attention: float  # of FLOP/s in the dtype
    expert_tile: float  # rows that an expert's product is padded to
    residual_passes: float  # a layer's readings and writings of the hidden states beside products
    sampling_passes: float  # readings of the float32 logits
    product_gap_s: float  # that a product takes however small it is
    attention_gap_s: float  # the same, of a layer's attention with norms and rotation
    latent_gap_s: float  # more, where the cache is latent
    experts_gap_s: float  # of routing, permuting and gathering
    all_reduce: float  # times the bare collective's time, within a step
    exchange: float  # times the all-reduce that stands for experts' exchange between replicas
    # Of small weights, by their bits, where own kernels multiply them as they are:
    codes: Mapping[int, float] = field(
        default_factory=dict
    )  # widened a second, per FLOP/s in float32; none: hidden
    few_codes: Mapping[int, float] = field(default_factory=dict)  # the same at the rows of few_rows
    few_gap_s: Mapping[int, float] = field(default_factory=dict)  # that each product takes there besides
    blocks: Mapping[int, float] = field(default_factory=dict)  # times as long, of a GGUF file's short groups
    few_blocks: Mapping[int, float] = field(default_factory=dict)
    dot_rows: int = 0  # up to so many; beyond, all are widened first
    dot_compute: Mapping[int, float] = field(default_factory=dict)  # of FLOP/s in the dtype, up to there
    hopper: Sequence[str] = ()  # devices where 4 bits go by wgmma, which the lines below are of
    hopper_from: int = 0  # rows; fewer go as elsewhere
    hopper_rows: int = 0  # up to so many
    hopper_gap_s: float = 0.0  # that each product takes besides
    hopper_codes: float = 0.0
    hopper_compute: float = 0.0
    widened_reads: float = 0.0  # of bandwidth, widening all first
    widened_compute: float = 0.0  # of FLOP/s in the dtype, that products of these reach
    kv_float8: float = 0.0  # as `kv`, of a cache in float8, which is widened on the way; 0: as any
    int8_compute: float = 0.0  # of FLOP/s in int8, where x is rounded to it as well
    pruned_reads: float = (
        0.0  # of bandwidth, reading two of four weights; 0: these are multiplied as if all were there
    )
    pruned_compute: float = 0.0  # of FLOP/s, as if all were there
    float8_rows: int = 0  # from which on x is rounded to float8 as well
    float8_reads: float = 0.0  # of bandwidth, reading weights from there on


@dataclass(frozen=True, slots=True)
class Engine:
    name: str
    kernels: Kernels
    reads: float  # times the shared share of bandwidth
    launches: float  # times the shared gaps
    prompts: float  # times as long for a prompt's products
    experts: float  # times as long for experts' products
    step_s: float  # host time of a step that the GPU waits for
    sequence_s: float  # the same for each sequence
    prompt_s: float  # the same for each prompt
    ungraphed_s: Mapping[str, float]  # device's name -> more host time a step of several sequences, there
    first_s: float  # before a request's first token: HTTP, tokenizer, the load generator's own
    token_out_s: float  # that the server in front takes to send one token
    burst: float  # times the queue of prompts that a request would meet which comes at random
    chunk_tokens: int  # of prompts, in a step
    max_sequences: int
    memory_share: float  # of a device's memory that it takes
    runtime_bytes: int  # that a process holds on a GPU besides its shard: context, workspaces, graphs
    joined_bytes: int  # the same where ranks have met
    eight_bit_kv: bool  # keeps the cache in 8 bits where weights are quantized
    pipelines: bool  # stages work at the same time, on groups of sequences
    eager_layer_s: (
        float  # host time to launch a layer of a step that is not replayed as a graph; 0: hidden always
    )
    eager_layers: float  # the same in layers that a profile timed, which counts where there is one
    eager_sum: float  # of a layer's, that launching a sum between its ranks takes
    graph_tokens: int  # steps of so many tokens are replayed
    overlap_tokens: int  # longer ones run in two halves, one's sums beside the other's products; 0: never
    mapped_sums: bool  # small sums through mapped host memory, where cards have no peer access


@functools.cache
def engine(name: str) -> Engine:
    """By its name in tables of measurements, in any case; the default's figures for one that is not listed."""
    rows = _rows()["engines"]
    row = rows.get(name.lower())
    return engine_from({**rows["default"], **(row or {})}, _rows()["kernels"], name)


def engine_from(row: Mapping[str, Any], kernels: Mapping[str, Any], name: str) -> Engine:
    """An engine of the rows of engines.yaml: times there are in µs and ms. `row` may set kernels of its own."""
    own = {**kernels, **row.get("kernels", {})}
    scale = {"us": 1e-6, "ms": 1e-3}

    def values(source: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in source.items():
            stem, _, unit = key.rpartition("_")
            if unit not in scale:
                found[key] = value
            elif isinstance(value, Mapping):
                found[f"{stem}_s"] = {name: each * scale[unit] for name, each in value.items()}
            else:
                found[f"{stem}_s"] = value * scale[unit]
        return found

    known = {one.name for one in fields(Engine)} - {"name", "kernels"}
    made = {key: value for key, value in values(row).items() if key in known}
    return Engine(name=name, kernels=Kernels(**values(own)), **made)


def with_limits(base: Engine, *, chunk_tokens: int, max_sequences: int) -> Engine:
    """The engine told to take so many tokens a step and sequences at once."""
    return replace(base, chunk_tokens=chunk_tokens, max_sequences=max_sequences)


@functools.cache
def _rows() -> Mapping[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    rows: Mapping[str, Any] = yaml.load(_FILE.read_text(encoding="utf-8"), Loader=loader)
    return rows
