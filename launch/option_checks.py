"""What no engine can be asked for, whatever the machine: each raises UserError in a line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cluster.errors import BadModel, UserError
from launch.memory import check_memory
from strategies.plan import Layout, ParallelDims
from strategies.runnable import why_not
from strategies.source import ModelSource, SourceKind
from strategies.spec import ModelSpec

_MOST = {  # far over what serves well anywhere, under what would fail only for want of memory
    "max_model_len": 10**8,
    "max_num_seqs": 65_536,
    "max_num_batched_tokens": 10**6,
    "block_size": 1024,
    "num_gpu_blocks_override": 10**9,
}
_LONGEST_STEP_S = 86_400


def check_sizes(args: argparse.Namespace) -> None:
    """Each number by itself."""
    for flag, most in _MOST.items():
        value = getattr(args, flag)
        if value is not None and not 1 <= value <= most:
            raise UserError(f"--{flag.replace('_', '-')} is {value}; it must be from 1 to {most}")
    share = args.gpu_memory_utilization
    if not 0 < share <= 1:  # nan too
        raise UserError(f"--gpu-memory-utilization is {share:g}; it must be over 0 and at most 1")
    resident = args.resident_layers
    if resident is not None and resident < 0:
        raise UserError(f"--resident-layers is {resident}; it must be at least 0")
    check_memory(args)
    patience_s = args.step_timeout
    if patience_s is not None and not 1 <= patience_s <= _LONGEST_STEP_S:  # nan too
        raise UserError(f"--step-timeout is {patience_s:g}; it must be from 1 to {_LONGEST_STEP_S} seconds")


def check_address(asked: str | None) -> None:
    """Of a Ray cluster; whether one answers there is found out later."""
    if asked is None or asked == "auto" or asked.startswith("ray://"):  # which is refused with its own reason
        return
    host, _, port = asked.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--address {asked} is not HOST:PORT, such as 10.0.0.1:6379, nor auto")


def check_offload(args: argparse.Namespace, spec: ModelSpec, *, is_here: bool) -> None:
    """What tells of offload has an offloaded layout to tell of. Raises UserError."""
    resident, folder = args.resident_layers, args.offload_dir
    names = str(getattr(args, "layouts", None) or getattr(args, "layout", None) or "auto").split(",")
    named = [Layout.parse(name) for name in names if name != "auto"]
    offloaded = [made for made in named if made.offload and not made.zero3]
    for flag, value in (("resident-layers", resident), ("offload-dir", folder)):
        if value is not None and any(made.zero3 for made in named) and not offloaded:
            raise UserError(
                f"--{flag} is of the engine's +offload; ZeRO-3 keeps every layer off the device: leave it away"
            )
        if value is not None and not offloaded:
            raise UserError(f"--{flag} is of offloaded layouts; add --layout tp1+offload, or leave it away")
    if args.offload_io is not None and folder is None:
        raise UserError("--offload-io is of --offload-dir; give a folder on a disk, or leave it away")
    if resident is not None and resident > spec.layers:
        raise UserError(f"--resident-layers is {resident}; {spec.name} has {spec.layers} layers")
    if folder is not None and is_here:
        _check_folder(folder.expanduser().absolute())


def _check_folder(folder: Path) -> None:
    """A folder is made where there is none, but no path to one: a disk that is not mounted, or mistyped, has none."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--offload-dir {folder} is a file; give a folder on a disk with room")
    if not os.path.isdir(folder.parent):
        raise UserError(
            f"--offload-dir {folder} is in no folder that is there; mkdir -p {folder.parent}, or give another on a "
            "disk with room"
        )


def check_compatible(
    args: argparse.Namespace, named: Layout | None, source: ModelSource, spec: ModelSpec
) -> None:
    """Raises UserError for what the compatibility runtime cannot do."""
    if source.kind != SourceKind.HF:
        raise UserError(
            f"{spec.name} ({spec.family}) would run under the compatibility runtime, which wants a directory in the "
            "Hugging Face layout; give one"
        )
    assert source.path is not None, "only built-in specs have none"
    if args.weights == "checkpoint" and not any(source.path.glob("*.safetensors")):
        raise BadModel(
            f"{source.path} has no .safetensors files, and other formats may hold code; convert it, or give "
            "--weights dummy"
        )
    reason = why_not(spec, named or Layout(ParallelDims()))
    if reason is not None:
        raise UserError(reason)
    if args.weights == "checkpoint":
        from orchestrator.engine.safetensors_files import check_files

        check_files(source.path, spec.name)
