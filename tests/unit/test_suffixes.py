"""Every one and every two of a layout's suffixes: refused in one line before anything starts, or run by the engine."""

from __future__ import annotations

import argparse
import json
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from cluster.errors import UserError
from launch.configured import engine_config
from launch.disk_limit import streamed_bytes
from launch.options import add_engine_arguments, add_layout_arguments, check_blocks, engine_options, layout
from launch.predict import planned
from launch.progress import Progress
from orchestrator.engine.checkpoint import DummyCheckpoint, open_checkpoint
from orchestrator.engine.residence import Residence, loaded
from strategies.formats import FORMATS
from strategies.scheme import GGUF
from strategies.spec import ModelSpec, Workload
from tests.unit.test_gguf import WIDE, gguf_of

CPU = torch.device("cpu")
SUFFIXES = [*dict.fromkeys(part for name in FORMATS for part in name.split("+") if part), "offload"]
NAMES = [
    "tp1",
    *(f"tp1+{one}" for one in SUFFIXES),
    *(f"tp1+{one}+{other}" for one, other in product(SUFFIXES, repeat=2)),
]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


MODELS = ("in full", GGUF)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    file, _ = gguf_of(tmp_path_factory.mktemp("gguf"), "llama", "Q8_0", **WIDE | {"num_hidden_layers": 4})
    return dict(zip(MODELS, (folder, file), strict=True))


@cache
def random_weights(spec: ModelSpec) -> DummyCheckpoint:
    return DummyCheckpoint(spec, CPU, seed=0)


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def run_by_the_engine(name: str, model: Path) -> Residence:
    """As `generate --layout NAME` does, as far as a rank's weights. Raises UserError before a rank is made."""
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    add_layout_arguments(parser)
    weights = "checkpoint" if model.is_file() else "dummy"
    streamed = ["--resident-layers", "1"] if name.endswith("+offload") else []
    argv = [str(model), "--layout", name, "--device", "cpu", "--weights", weights, *streamed]
    args = parser.parse_args(argv)
    dims = layout(args)
    assert dims is not None
    options = engine_options(args)
    check_blocks(options)
    chosen = planned(options, Workload(16, 16), dims, Progress(quiet=True)).candidate
    config = engine_config(options, dims)
    spec = options.spec
    checkpoint = open_checkpoint(options.source, spec) if model.is_file() else random_weights(spec)
    try:
        _, found = loaded(config, chosen.shards[0], checkpoint, CPU, 1 << 40, lambda done, total: None)
    except Exception as error:
        raise AssertionError(f"{name} is refused once workers run: {error}") from error
    return found


def asked(name: str, model: Path) -> str | Residence:
    try:
        return run_by_the_engine(name, model)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("name", "stored"),
    [(name, stored) for name in NAMES for stored in MODELS if stored != GGUF or GGUF in name],
)
def test_what_is_refused_is_refused_before_anything_starts(
    name: str, stored: str, models: dict[str, Path]
) -> None:
    told = asked(name, models[stored])
    if isinstance(told, str):
        assert "\n" not in told and len(told) < 300, told
        assert any(suffix in told for suffix in name.split("+")), told


@pytest.mark.parametrize(
    ("name", "resident"),
    [("tp1+int4+kvfp8", 4), ("tp1+kvfp8+int8", 4), ("tp1+sparse24+kvfp8", 4), ("tp1+int8w8a8+offload", 1)],
)
def test_what_goes_together_runs(name: str, resident: int, models: dict[str, Path]) -> None:
    found = asked(name, models[MODELS[0]])
    assert isinstance(found, Residence) and found.resident == resident


def test_a_start_is_priced_by_the_disk_that_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served tells users and metrics no more tokens/s than the disk allows."""
    monkeypatch.setattr("launch.disk_limit.disk_rate", lambda options, reads: 1e7)
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    add_layout_arguments(parser)
    flags = ["--layout", "tp1+offload", "--resident-layers", "10", "--offload-dir", str(tmp_path)]
    args = parser.parse_args(
        ["qwen3-8b", "--weights", "dummy", "--device", "cpu", "--dtype", "bfloat16", *flags]
    )
    options, dims = engine_options(args), layout(args)
    made = planned(options, Workload(16, 16), dims, Progress(quiet=True))
    assert made.topology is not None and made.candidate.estimate is not None
    n_bytes = streamed_bytes(options, made.candidate, made.topology, Workload(16, 16))
    assert n_bytes > 10**9
    assert made.candidate.estimate.tpot_s > 0.9 * n_bytes / 1e7
