"""`shardwise quality`: what a format or a quantized checkpoint costs, on a text, beside the model in full precision."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launch.options import EngineOptions
    from launch.progress import Progress
    from orchestrator.engine.quality import Quality
    from orchestrator.engine_config import EngineConfig

MOST_CONTEXT = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from strategies.spec import BYTES_PER_ELEMENT

    parser.add_argument("model", metavar="MODEL", help="a directory, a .gguf file, or smollm2")
    parser.add_argument(
        "--layout", default="tp1", metavar="NAME", help="tp1+int4, tp1+int8, …: MODEL's weights in fewer bits"
    )
    parser.add_argument(
        "--against", metavar="REFERENCE", help="the model to be like, in float32; default: MODEL itself"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: Python's language reference")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="of the text, at most (2048)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", *BYTES_PER_ELEMENT), default="auto", help="of MODEL")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    from cluster.errors import BadModel, BadRequest
    from launch.texts import BUNDLED, bundled, read_text

    if args.tokens < 2:
        raise BadRequest(f"--tokens is {args.tokens}; it must be at least 2")
    text = bundled() if args.text is None else read_text(args.text)
    asked = with_float8(options_of(args.model, args.device, args.dtype, args.layout), args.dtype)
    import torch  # after what can be refused without

    from launch.progress import Progress
    from orchestrator.engine.memory import check_float8
    from orchestrator.engine.quality import check_memory, windows_of
    from orchestrator.text import text_of
    from strategies.formats import FORMATS

    if asked.device != "cpu":
        check_float8(FORMATS[asked.format], torch.device(asked.device))
    of = options_of(args.against or args.model, args.device, "float32", "tp1")
    if asked.spec.vocab != of.spec.vocab:
        raise BadModel(
            f"{asked.spec.name} has {asked.spec.vocab:,} tokens and {of.spec.name} {of.spec.vocab:,}; "
            "compare models of one vocabulary"
        )
    tokenizer = text_of(of.source) or text_of(asked.source)
    if tokenizer is None:
        raise BadModel(f"{of.spec.name} has no tokenizer, which a text needs")
    context = min(MOST_CONTEXT, asked.spec.max_positions, of.spec.max_positions)
    windows = windows_of(tokenizer.encode(text), context, args.tokens)
    check_memory(windows, of.spec.vocab)
    found = _measured(asked, of, windows, Progress(quiet=args.json))
    name = BUNDLED if args.text is None else args.text.name
    if args.json:
        print(json.dumps(to_json(found, asked, of, args.layout, name), indent=2))
    else:
        print(sentence(found, asked, of, args.layout, name))
    return 0


def options_of(model: str, device: str, dtype: str, layout: str) -> EngineOptions:
    from cluster.errors import BadLayout, BadModel
    from launch.models import resolve
    from launch.options import add_engine_arguments, add_layout_arguments, engine_options
    from launch.options import layout as dims_of

    if resolve(model).path is None:
        raise BadModel(
            f"{model} is a built-in spec, a config without weights; give a directory or a .gguf file"
        )
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    add_layout_arguments(parser)
    args = parser.parse_args([model, "--device", device, "--dtype", dtype, "--layout", layout])
    dims = dims_of(args)
    if dims is None or dims.world_size > 1:
        raise BadLayout(f"--layout {layout}: quality runs on one device; give tp1, or tp1+int4")
    return engine_options(args)


def with_float8(options: EngineOptions, dtype: str) -> EngineOptions:
    """A CPU emulates what a GPU does in float8, of a checkpoint stored in it too, which it would run widened."""
    from strategies.formats import FORMATS
    from strategies.quantize import or_native
    from strategies.source import spec_of

    spec = spec_of(options.source)
    kept = or_native(spec, FORMATS[options.format])
    if options.device != "cpu" or kept.weights != "fp8":
        return options
    return replace(
        options, spec=spec, format=kept.name, dtype="bfloat16" if dtype == "auto" else options.dtype
    )


def _measured(
    asked: EngineOptions, of: EngineOptions, windows: Sequence[Sequence[int]], progress: Progress
) -> Quality:
    from orchestrator.engine.quality import compared, scored

    with progress.bar(f"{of.spec.name} in float32", unit_is_bytes=False) as bar:
        reference = list(scored(config_of(of), windows, bar.update))
    with progress.bar(f"{asked.spec.name} in {precision(asked)}", unit_is_bytes=False) as bar:
        return compared(reference, scored(config_of(asked), windows, bar.update), windows)


def config_of(options: EngineOptions) -> EngineConfig:
    from launch.configured import engine_config
    from strategies.plan import ParallelDims

    config = engine_config(options, ParallelDims())
    return replace(config, graphs=False, emulates_float8=options.device == "cpu")


def precision(options: EngineOptions) -> str:
    from strategies.formats import FORMATS

    kept = FORMATS[options.format]
    emulated = ", emulated" if kept.weights == "fp8" and options.device == "cpu" else ""
    parts = [f"{kept.weights} weights{emulated}"] if kept.weights else []
    parts += ["a cache in float8"] if kept.has_float8_kv else []
    return options.dtype + (f" with {' and '.join(parts)}" if parts else "")


def sentence(found: Quality, asked: EngineOptions, of: EngineOptions, layout: str, text: str) -> str:
    return (
        f"{asked.spec.name} {layout} in {precision(asked)}, against {of.spec.name} in float32: "
        f"perplexity {found.perplexity:.4g} ({found.rise_percent:+.2f} %), KL divergence {found.kl_divergence:.4f}, "
        f"top-1 agreement {found.top1_agreement:.1%}, over {found.tokens:,} tokens of {text}"
    )


def to_json(
    found: Quality, asked: EngineOptions, of: EngineOptions, layout: str, text: str
) -> dict[str, object]:
    return {
        "model": asked.spec.name,
        "layout": layout,
        "dtype": asked.dtype,
        "format": asked.format or None,
        "against": of.spec.name,
        "text": text,
        "tokens": found.tokens,
        "perplexity": round(found.perplexity, 6),
        "reference_perplexity": round(found.reference_perplexity, 6),
        "perplexity_rise_percent": round(found.rise_percent, 4),
        "kl_divergence": round(found.kl_divergence, 7),
        "top1_agreement": round(found.top1_agreement, 6),
    }
