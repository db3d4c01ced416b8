"""Flags that `generate` and `compare` share, and what they come to. Spelled as vLLM spells them."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from cluster.errors import BadLayout, UserError
from launch.models import resolve
from strategies.plan import ParallelDims
from strategies.source import ModelSource, spec_of
from strategies.spec import BYTES_PER_ELEMENT, ModelSpec


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the user asked of the engine, checked; None where they left it to us."""

    source: ModelSource
    spec: ModelSpec
    device: str  # cpu or cuda
    dtype: str
    dummy_weights: bool
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int | None  # of the KV cache; None: what fits
    prefix_caching: bool
    seed: int
    address: str | None  # of a Ray cluster; None: a private one
    peer_access: bool  # False: NCCL_P2P_DISABLE is set


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a directory, a .gguf file, a built-in name, or smollm2"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *BYTES_PER_ELEMENT),
        default="auto",
        help="default: float32 on cpu, half precision on cuda",
    )
    parser.add_argument(
        "--weights",
        choices=("checkpoint", "dummy"),
        default="checkpoint",
        help="dummy: random, from the config alone",
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="context length in tokens; default: the model's, or what fits",
    )
    parser.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="sequences at once (256)")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=2048, metavar="N", help="tokens a step (2048)"
    )
    parser.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens a KV block (16)")
    parser.add_argument(
        "--num-gpu-blocks-override", type=int, metavar="N", help="KV blocks; default: what fits"
    )
    parser.add_argument(
        "--no-enable-prefix-caching", action="store_true", help="compute every prompt from its start"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of dummy weights, and of requests that give none"
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="an existing Ray cluster; default: a private one, gone at exit"
    )


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout",
        default=None,
        metavar="NAME",
        help="tp2, pp2, tp2pp2dp2, …; auto: the planner's choice (default)",
    )
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, metavar="N")
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, metavar="N")
    parser.add_argument("--data-parallel-size", "-dp", type=int, metavar="N")


def layout(args: argparse.Namespace) -> ParallelDims | None:
    """The layout that --layout or the three sizes name; None: the planner's choice."""
    sizes = (args.tensor_parallel_size, args.pipeline_parallel_size, args.data_parallel_size)
    named = None if args.layout in (None, "auto") else ParallelDims.parse(args.layout)
    if all(size is None for size in sizes):
        return named
    if args.layout is not None:
        raise BadLayout(
            f"--layout {args.layout} and -tp, -pp or -dp say the same thing twice; give one of them"
        )
    if any(size is not None and size < 1 for size in sizes):
        raise BadLayout(f"-tp, -pp and -dp must be at least 1, not {min(s for s in sizes if s is not None)}")
    tp, pp, dp = (size or 1 for size in sizes)
    return ParallelDims(tp, pp, dp)


def engine_options(args: argparse.Namespace, *, needs_weights: bool = True) -> EngineOptions:
    """Checks every flag, reads the model's config and the headers of its weights. Raises UserError."""
    for flag in (
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "block_size",
        "num_gpu_blocks_override",
    ):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {value}; it must be at least 1")
    source = resolve(args.model)
    spec = spec_of(source)
    if needs_weights and source.path is None and args.weights == "checkpoint":
        raise UserError(
            f"{args.model} is a built-in spec, a config without weights; add --weights dummy, or give a directory "
            "or a .gguf file"
        )
    if args.max_model_len is not None and args.max_model_len > spec.max_positions:
        raise UserError(
            f"--max-model-len is {args.max_model_len}; {spec.name} was made for at most {spec.max_positions} positions"
        )
    if needs_weights and args.weights == "checkpoint":
        from orchestrator.engine.checkpoint import open_checkpoint

        open_checkpoint(source, spec).verify()
    device = _device(args.device)
    return EngineOptions(
        source=source,
        spec=spec,
        device=device,
        dtype=_dtype(args.dtype, device, spec),
        dummy_weights=args.weights == "dummy",
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        num_blocks=args.num_gpu_blocks_override,
        prefix_caching=not args.no_enable_prefix_caching,
        seed=args.seed,
        address=args.address,
        peer_access=os.environ.get("NCCL_P2P_DISABLE", "0") != "1",
    )


def _device(asked: str) -> str:
    import torch

    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        built = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA device"
        raise UserError(f"--device cuda: {built}; see `shardwise doctor`, or use --device cpu")
    return ("cuda" if found else "cpu") if asked == "auto" else asked


def _dtype(asked: str, device: str, spec: ModelSpec) -> str:
    if asked != "auto":
        return asked
    if device == "cpu":
        return "float32"
    return spec.dtype if spec.dtype in ("bfloat16", "float16") else "bfloat16"
