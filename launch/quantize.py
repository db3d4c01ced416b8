"""`shardwise quantize`: a model's weights in fewer bits, as a directory that vLLM and transformers read as well."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch import Tensor

    from launch.progress import Progress
    from orchestrator.engine.checkpoint import Checkpoint
    from orchestrator.engine.model import Transformer
    from orchestrator.engine.stored import StoredCodes
    from orchestrator.text import Text
    from strategies.source import ModelSource
    from strategies.spec import ModelSpec

BUNDLED = "bundled"
CONTEXT = 512
_COPIED = (
    "token*",
    "vocab*",
    "merges*",
    "special_tokens*",
    "added_tokens*",
    "chat_template*",
    "generation_config.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory, a .gguf file, or smollm2")
    parser.add_argument(
        "--to",
        choices=("int4", "fp8"),
        required=True,
        help="int4: groups of 128, 64 or 32 columns; fp8: e4m3",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="a directory, made anew")
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        nargs="?",
        const=BUNDLED,
        help="with error feedback (GPTQ) on a file of text; without a file on Python's language reference",
    )
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="of the text, at most (16384)")
    parser.add_argument(
        "--group", type=int, choices=(128, 64, 32), help="of int4; default: the largest that divides"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What weights become."""

    told: str
    config: dict[str, object]
    to_nearest: Callable[[Tensor], StoredCodes]
    with_feedback: Callable[[Tensor, Tensor], StoredCodes]


def _kind(group: int | None, dtype: torch.dtype) -> _Kind:
    """fp8, or int4 in groups of so many columns. `dtype`: of scales."""
    from orchestrator.engine import float8, gptq
    from orchestrator.engine.write_packed import float8_config, four_bits_config

    if group is None:
        return _Kind(
            "fp8",
            float8_config(),
            partial(float8.to_nearest, dtype=dtype),
            partial(float8.with_feedback, dtype=dtype),
        )
    return _Kind(
        f"int4, groups of {group}",
        four_bits_config(group),
        partial(gptq.to_nearest, group=group, dtype=dtype),
        partial(gptq.with_feedback, group=group, dtype=dtype),
    )


def _group(args: argparse.Namespace, spec: ModelSpec) -> int | None:
    """None: of fp8, which has none. Raises UserError."""
    from cluster.errors import BadRequest
    from strategies.quantize import one_group

    if args.to == "int4":
        return one_group(spec, args.group)
    if args.group is not None:
        raise BadRequest(f"--group {args.group} is of int4; fp8 has a scale a channel: leave it away")
    return None


def run(args: argparse.Namespace) -> int:
    from cluster.errors import BadModel, BadRequest
    from cluster.files import no_room
    from launch.models import resolve
    from strategies.quantize import can_remake
    from strategies.runnable import check_known
    from strategies.source import spec_of

    source = resolve(args.model)
    spec = spec_of(source)
    check_known(spec)
    if not can_remake(spec):
        raise BadModel(f"{spec.name} is in fewer bits already; start from its source")
    if args.out.exists():
        raise BadRequest(f"{args.out} is there already; give a directory that is not")
    if args.tokens < 2:
        raise BadRequest(f"--tokens is {args.tokens}; it must be at least 2")
    group = _group(args, spec)
    from launch.progress import Progress, tell_torch

    tell_torch()  # after what can be refused without it
    import torch

    from launch.options import choose_device
    from orchestrator.engine.checkpoint import open_checkpoint
    from orchestrator.text import text_of

    stored = spec.dtype if spec.dtype in ("bfloat16", "float16") else "bfloat16"
    dtype: torch.dtype = getattr(torch, stored)
    kind = _kind(group, dtype)
    device = choose_device(args.device)
    text = text_of(source)
    windows = _windows(args, spec, text)
    checkpoint = open_checkpoint(source, spec)
    checkpoint.verify()
    progress = Progress()
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(
            tempfile.mkdtemp(prefix=f".{args.out.name}.", suffix=".partial", dir=args.out.parent)
        )
        unfinished.chmod(0o755)
    except OSError as error:
        raise BadRequest(f"{args.out} cannot be made ({error.strerror}); give another directory") from None
    try:
        written = _write(unfinished, spec, checkpoint, windows, kind, dtype, device, progress)
        config = _config(source, spec, stored) | {"quantization_config": kind.config}
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _copy_text(source, spec, text, unfinished)
        unfinished.rename(args.out)
    except OSError as error:
        if no_room(error) is not None:
            raise
        raise BadRequest(f"{args.out} cannot be written ({error.strerror}); give another directory") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    way = "to nearest" if windows is None else f"calibrated on {sum(map(len, windows)):,} tokens"
    print(f"{args.out}: {spec.name} in {kind.told}, {way}; {written / 1e9:.2f} GB")
    return 0


def _windows(args: argparse.Namespace, spec: ModelSpec, text: Text | None) -> list[list[int]] | None:
    from cluster.errors import BadModel
    from launch.texts import bundled, read_text
    from orchestrator.engine.quality import windows_of

    if args.calibrate is None:
        return None
    if text is None:
        raise BadModel(f"{spec.name} has no tokenizer, which --calibrate needs")
    given = bundled(to_calibrate=True) if args.calibrate == BUNDLED else read_text(Path(args.calibrate))
    return windows_of(text.encode(given), min(CONTEXT, spec.max_positions), args.tokens)


def _write(
    directory: Path,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]] | None,
    kind: _Kind,
    dtype: torch.dtype,
    device: str,
    progress: Progress,
) -> int:
    """Its weights. → bytes."""
    from orchestrator.engine.write_packed import plain_tensors, write_shards

    with progress.bar(f"{spec.name}: loading weights") as bar:
        model = _model(spec, checkpoint, device, bar.update)
    with progress.bar(f"{spec.name}: {kind.told}, by layer", unit_is_bytes=False) as bar:

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from _made(model, spec, windows, kind, bar.update)
            yield from plain_tensors(spec, checkpoint, dtype)

        return write_shards(directory, tensors())


def _made(
    model: Transformer,
    spec: ModelSpec,
    windows: Sequence[Sequence[int]] | None,
    kind: _Kind,
    told: Callable[[int, int], None],
) -> Iterator[tuple[str, Tensor]]:
    from orchestrator.engine.calibrate import calibrated, rounded
    from orchestrator.engine.write_packed import layer_tensors

    found = (
        rounded(model, kind.to_nearest, told)
        if windows is None
        else calibrated(model, windows, kind.with_feedback, told)
    )
    for layer, linear, codes in found:
        yield from layer_tensors(spec, layer, linear, codes)


def _model(
    spec: ModelSpec, checkpoint: Checkpoint, device: str, told: Callable[[int, int], None]
) -> Transformer:
    """The whole model on one device, in float32."""
    import torch

    from orchestrator.engine.loader import load
    from orchestrator.engine.model import Transformer
    from strategies.pipeline import shard_replica
    from strategies.plan import ParallelDims

    (shard,) = shard_replica(spec, ParallelDims())
    with torch.device("meta"):
        model = Transformer(spec)
    load(model, shard, spec, checkpoint, torch.device(device), torch.float32, told)
    return model


def _config(source: ModelSource, spec: ModelSpec, dtype: str) -> dict[str, object]:
    from strategies.hf_config import to_hf_config
    from strategies.source import SourceKind, read_json

    if source.kind == SourceKind.HF and source.path is not None:
        return dict(read_json(source.path / "config.json"))
    return to_hf_config(spec, dtype)


def _copy_text(source: ModelSource, spec: ModelSpec, text: Text | None, directory: Path) -> None:
    """The tokenizer and its template: the files, or what a GGUF file has of them."""
    from strategies.source import SourceKind

    if source.kind == SourceKind.HF and source.path is not None:
        for pattern in _COPIED:
            for file in source.path.glob(pattern):
                shutil.copyfile(file, directory / file.name)
    elif text is not None:
        text.save(directory, spec.bos_id, next(iter(spec.eos_ids), None))
