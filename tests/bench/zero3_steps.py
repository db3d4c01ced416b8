"""Decode steps of DeepSpeed's ZeRO-3 with all weights in pinned host memory, for offload_bench.py to put beside ours.

transformers' model with random weights, split over the ranks while it is made (zero.Init: host memory holds it once),
a KV cache, no graphs. ZeRO is data-parallel: every rank has a batch of its own, and gathers each layer for it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from launch.models import resolve
from orchestrator.engine.deepspeed_parts import LIVE, PREFETCHED, ready
from orchestrator.engine.host_memory import paged, pin
from strategies.source import spec_of
from strategies.spec import ModelSpec

CONTEXT_BYTES = 950_000_000  # of a cap, for CUDA's context and NCCL: the rest is torch's
PERSISTENT = 100_000  # weights of a tensor that stays on the device: norms and biases
WARM_UP = 3  # the first step records the order of modules, from the second on they are sent for ahead
KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@dataclass(frozen=True, slots=True)
class Timed:
    """By one rank."""

    rows: int
    step_s: float
    bytes_per_s: float  # that it pulled, its part of the weights

    @property
    def tokens_per_s(self) -> float:
        return self.rows / self.step_s


def run_rank(rank: int, args: argparse.Namespace, ends: Any) -> list[Timed]:
    """`ends`: as offload_bench.py makes them."""
    on_gpu, ranks = args.device == "cuda", len(ends.tokens)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu and args.device_memory_gb:
        own = args.device_memory_gb * 1e9 - CONTEXT_BYTES
        torch.cuda.set_per_process_memory_fraction(min(1.0, own / torch.cuda.mem_get_info()[1]))
    if not on_gpu:
        torch.set_num_threads(1)
    meeting = f"tcp://127.0.0.1:{ends.ports[0]}"
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=meeting, rank=rank, world_size=ranks
    )
    os.environ |= {"LOCAL_RANK": str(rank), "DS_BUILD_OPS": "0", "DS_IGNORE_CUDA_DETECTION": "1"}
    spec = spec_of(resolve(args.model))
    began = time.perf_counter()
    engine = streamed(spec, device, ranks)
    n_bytes = sum(p.ds_numel * p.element_size() for p in engine.parameters())
    if not rank:
        print(f"ZeRO-3: {n_bytes / 1e9:.1f} GB, ready after {time.perf_counter() - began:.0f} s", flush=True)
    found = []
    for rows in dict.fromkeys((1, args.rows)):
        step_s = decode_s(engine, spec.vocab, rows, args.steps, device)
        found.append(Timed(rows, step_s, n_bytes / ranks / step_s))
    if not rank and on_gpu:
        print(f"ZeRO-3: torch took {torch.cuda.max_memory_reserved() / 1e9:.1f} GB of a card", flush=True)
    return found


def streamed(spec: ModelSpec, device: torch.device, ranks: int) -> Any:
    """DeepSpeed's engine around transformers' model of the same shape."""
    deepspeed = ready(device, ranks)
    import transformers
    from deepspeed.accelerator import get_accelerator

    def pinned(tensor: Tensor, *_: object, **__: object) -> Tensor:
        """In place: torch's own pinned memory comes in powers of two, 116 GB for 65."""
        host = paged(tensor.nbytes)
        pin(host)
        kept.append(host)
        return host.view(tensor.dtype).view(tensor.shape)

    kept: list[Tensor] = []
    on_gpu = device.type == "cuda"
    if on_gpu:
        get_accelerator().pin_memory = pinned
    zero = {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": on_gpu},
        "stage3_prefetch_bucket_size": PREFETCHED,
        "stage3_max_live_parameters": LIVE,
        "stage3_param_persistence_threshold": PERSISTENT,
        "overlap_comm": True,
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
    }
    made = getattr(transformers, f"{KINDS[spec.family]}Config")(
        vocab_size=spec.vocab, hidden_size=spec.hidden, intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers, num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim, max_position_embeddings=4096, tie_word_embeddings=spec.tied,
        attn_implementation="sdpa",
    )  # fmt: skip
    transformers.PreTrainedModel.init_weights = lambda *_, **__: None  # torch's own filling is random enough
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = getattr(transformers, f"{KINDS[spec.family]}ForCausalLM")._from_config(
            made, dtype=torch.bfloat16
        )
    engine = deepspeed.initialize(model=model.eval(), config=config)[0]
    engine.module.eval()
    return engine


@torch.no_grad()
def decode_s(engine: Any, vocab: int, rows: int, steps: int, device: torch.device) -> float:
    """Seconds of a step that decodes a token of each row, in the median."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else int
    ids, cache, took_s = torch.randint(0, vocab, (rows, 128), device=device), None, []
    for _ in range(WARM_UP + steps):
        synchronize()
        began = time.perf_counter()
        told = engine(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = told.past_key_values, told.logits[:, -1:].argmax(-1)
        synchronize()
        took_s.append(time.perf_counter() - began)
    return statistics.median(took_s[WARM_UP:])


def show(ours: Sequence[float], theirs: Sequence[Sequence[Timed]]) -> None:
    """`ours`: tokens/s by load; `theirs`: by rank and load, of as many sequences on each card as ours has in all."""
    table = Table(
        "sequences", "ours, tokens/s", "ZeRO-3, all cards", "ms a step", "GB/s a card", "ours by ZeRO-3"
    )
    for own, found in zip(ours, zip(*theirs, strict=True), strict=True):
        rate, one = sum(rank.tokens_per_s for rank in found), found[0]
        table.add_row(
            f"{one.rows}; ZeRO-3 {one.rows} a card",
            f"{own:,.2f}",
            f"{rate:,.2f}",
            f"{one.step_s * 1e3:,.0f}",
            f"{one.bytes_per_s / 1e9:,.1f}",
            f"{own / rate:.2f}",
        )
    Console(width=120).print(table)
