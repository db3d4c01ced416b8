"""What the formats of a comparison do to answers: perplexity and divergence of each beside the model in float32.

Each is measured by `shardwise quality`, in a process of its own that gives its memory back.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.files import read_back, write_whole
from cluster.topology import Topology
from launch.options import EngineOptions
from launch.progress import Progress
from strategies.quantize import native
from strategies.spec import BYTES_PER_ELEMENT

TOKENS = 512
NAME = "quality.json"
LIMIT_S = 1800.0


@dataclass(frozen=True, slots=True)
class FormatQuality:
    perplexity_rise_percent: float
    kl_divergence: float
    top1_agreement: float
    tokens: int
    text: str


Qualities = Mapping[str, FormatQuality]
"""By format."""


def formats_of(names: Sequence[str], options: EngineOptions) -> list[str]:
    """Those that change a model's answers: what a checkpoint is stored in is its own."""
    return [name for name in dict.fromkeys(names) if name and name != native(options.spec).name]


def why_unknown(options: EngineOptions, topology: Topology) -> str | None:
    """Why nothing can be told of quality; None where it can be measured."""
    if options.dummy_weights:
        return "the weights are random (--weights dummy)"
    if options.compatible or options.address is not None:
        return "it is measured by the engine on this machine alone; see `shardwise quality`"
    need, free = BYTES_PER_ELEMENT["float32"] * options.spec.total_params, topology.devices[0].free_bytes
    if need > free:
        return (
            f"its reference takes {need / 1e9:.1f} GB in float32, and one device has {free / 1e9:.1f} GB free; "
            "`shardwise quality --against` takes another"
        )
    from orchestrator.text import text_of

    return "the model has no tokenizer, which a text needs" if text_of(options.source) is None else None


def measure(
    model: str,
    formats: Sequence[str],
    options: EngineOptions,
    folder: Path,
    progress: Progress,
    known: Qualities,
) -> dict[str, FormatQuality]:
    """Of each format that is not `known`; kept in the folder one by one. What fails is told of."""
    found = dict(known)
    for name in formats:
        if name in found:
            continue
        progress.say(
            f"+{name}: quality on {TOKENS} tokens of text, beside float32 (--skip-quality leaves it out)"
        )
        argv = ["quality", model, "--layout", f"tp1+{name}", "--tokens", str(TOKENS), "--json"]
        argv += ["--device", options.device, "--dtype", options.dtype]
        command = [sys.executable, "-m", "launch", *argv]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
                cwd=Path(__file__).parents[1],
            )
        except subprocess.TimeoutExpired:
            progress.say(f"+{name}: quality took over {LIMIT_S:.0f} s; it is left out")
            continue
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            progress.say(f"+{name}: quality could not be measured: {last}")
            continue
        found[name] = msgspec.json.decode(done.stdout, type=FormatQuality)
        write_whole(msgspec.json.encode(found), folder / NAME)
    return found


def read(folder: Path) -> dict[str, FormatQuality]:
    """What an earlier run of the same comparison left; nothing where it cannot be read."""
    return read_back(folder / NAME, dict[str, FormatQuality]) or {}


def told(found: FormatQuality) -> str:
    return (
        f"perplexity {found.perplexity_rise_percent:+.2f} %, KL divergence {found.kl_divergence:.4f}, top-1 agreement "
        f"{found.top1_agreement:.1%}, over {found.tokens:,} tokens of {found.text}"
    )
