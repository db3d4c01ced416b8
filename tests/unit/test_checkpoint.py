"""What is read from a checkpoint is what transformers wrote, slice by slice; what is broken says so."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from cluster.errors import BadModel
from orchestrator.engine.checkpoint import (
    Checkpoint,
    DummyCheckpoint,
    SafetensorsCheckpoint,
    open_checkpoint,
)
from orchestrator.engine.loader import load
from orchestrator.engine.model import Transformer
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims, Shard
from strategies.read_spec import builtin
from strategies.source import ModelSource, SourceKind, spec_of
from strategies.spec import ModelSpec
from strategies.tensor import local_spec
from strategies.tensor_shapes import tensor_shapes
from tests.tiny import make_model

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_attention_heads": 10, "num_key_value_heads": 5, "hidden_size": 80, "head_dim": 8}),
    ("mistral", {"sliding_window": 7}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}),
]


def source_of(path: Path) -> ModelSource:
    return ModelSource("m", path, SourceKind.GGUF if path.suffix == ".gguf" else SourceKind.HF)


def opened(path: Path) -> tuple[ModelSpec, Any]:
    source = source_of(path)
    spec = spec_of(source)
    return spec, open_checkpoint(source, spec)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to copy and break."""
    path = tmp_path_factory.mktemp("qwen2")
    make_model(path, "qwen2")
    return path


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_slices_equal_what_transformers_saved(
    family: str, overrides: dict[str, Any], max_shard_size: str, tmp_path: Path
) -> None:
    expected = make_model(tmp_path, family, max_shard_size=max_shard_size, **overrides).state_dict()
    spec, checkpoint = opened(tmp_path)
    checkpoint.verify()
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size == "1GB"
    names = expected.keys() - ({"lm_head.weight"} if spec.tied else set())
    assert tensor_shapes(spec).keys() == names
    for name in names:
        assert_slices_equal(checkpoint, name, expected[name])


def assert_slices_equal(checkpoint: Checkpoint, name: str, full: Tensor) -> None:
    assert torch.equal(checkpoint.read(name), full)
    rows = range(3, len(full) - 2)
    assert torch.equal(checkpoint.read(name, rows), full[3:-2])
    if full.dim() == 2:
        assert torch.equal(checkpoint.read(name, cols=range(5, 37)), full[:, 5:37])
        assert torch.equal(checkpoint.read(name, rows, range(5, 37)), full[3:-2, 5:37])


# --- loading a rank's transformer


def loaded(spec: ModelSpec, shard: Shard, checkpoint: Checkpoint, told: list[tuple[int, int]]) -> Any:
    with torch.device("meta"):
        model = Transformer(local_spec(spec, shard), embed=shard.is_first, head=shard.is_last)
    load(
        model,
        shard,
        spec,
        checkpoint,
        torch.device("cpu"),
        torch.float32,
        lambda done, total: told.append((done, total)),
    )
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())
    return model


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
@pytest.mark.parametrize("name", ["tp1", "tp2", "pp2", "tp2pp3"])
def test_the_shards_hold_the_whole_model(
    family: str, overrides: dict[str, Any], name: str, tmp_path: Path
) -> None:
    expected = make_model(tmp_path, family, **overrides).state_dict()
    spec, checkpoint = opened(tmp_path)
    dims = ParallelDims.parse(name)
    shards = shard_replica(spec, dims)
    models = []
    for shard in shards:
        told: list[tuple[int, int]] = []
        models.append(loaded(spec, shard, checkpoint, told))
        assert told[-1][0] == told[-1][1] == sum(p.nbytes for p in models[-1].parameters())
    heads = torch.cat([m.head.weight for m, s in zip(models, shards, strict=True) if s.is_last])
    assert torch.equal(heads, expected["lm_head.weight"])
    start = 0
    for stage in range(dims.pp):
        ranks = [m for m, s in zip(models, shards, strict=True) if s.stage == stage]
        for layer in range(len(ranks[0].layers)):
            down = torch.cat([m.layers[layer].mlp.down.weight for m in ranks], dim=1)
            assert torch.equal(down, expected[f"model.layers.{start + layer}.mlp.down_proj.weight"])
            out = torch.cat([m.layers[layer].attention.o.weight for m in ranks], dim=1)
            assert torch.equal(out, expected[f"model.layers.{start + layer}.self_attn.o_proj.weight"])
        start += len(ranks[0].layers)


def test_parameters_are_read_in_chunks(qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, checkpoint = opened(qwen2)
    shards = shard_replica(spec, ParallelDims(tp=2))
    whole = [loaded(spec, shard, checkpoint, []).state_dict() for shard in shards]
    monkeypatch.setattr(
        SafetensorsCheckpoint, "chunk_bytes", 1000
    )  # three rows of 64 float32, and part of a fourth
    for shard, expected in zip(shards, whole, strict=True):
        told: list[tuple[int, int]] = []
        model = loaded(spec, shard, checkpoint, told)
        assert len(told) > 2 * len(expected)
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_only_the_first_rank_adds_the_bias_of_a_sum(tmp_path: Path) -> None:
    expected = make_model(tmp_path, "llama", attention_bias=True, mlp_bias=True).state_dict()
    spec, checkpoint = opened(tmp_path)
    first, second = (loaded(spec, shard, checkpoint, []) for shard in shard_replica(spec, ParallelDims(tp=2)))
    assert torch.equal(first.layers[0].mlp.down.bias, expected["model.layers.0.mlp.down_proj.bias"])
    assert not second.layers[0].mlp.down.bias.any()
    assert not second.layers[0].attention.o.bias.any()


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen2", tie_word_embeddings=True)
    spec, checkpoint = opened(tmp_path)
    (shard,) = shard_replica(spec, ParallelDims())
    model = loaded(spec, shard, checkpoint, [])
    assert model.head.weight is model.embed.weight


# --- broken directories


def broken(qwen2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen2, tmp_path / "broken"))


def refusal(path: Path) -> str:
    with pytest.raises(BadModel) as caught:
        opened(path)[1].verify()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(path: Path, drop: str = "", **changes: Tensor) -> None:
    weights = safetensors.torch.load_file(path / "model.safetensors")
    weights.pop(drop, None)
    safetensors.torch.save_file({**weights, **changes}, path / "model.safetensors")


def test_no_directory(tmp_path: Path) -> None:
    assert "no readable config.json (No such file" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(keep: float, qwen2: Path, tmp_path: Path) -> None:
    file = broken(qwen2, tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep) if 0 < keep < 1 else int(keep)])
    assert "is cut short or corrupt" in refusal(file.parent)


def test_a_file_cut_short_while_it_is_read(qwen2: Path, tmp_path: Path) -> None:
    path = broken(qwen2, tmp_path)
    spec, checkpoint = opened(path)
    checkpoint.verify()
    os.truncate(path / "model.safetensors", 5000)
    (shard,) = shard_replica(spec, ParallelDims())
    with pytest.raises(
        BadModel, match=r"model\.safetensors has nothing at byte .*cut short since it was opened"
    ):
        loaded(spec, shard, checkpoint, [])


def test_a_missing_tensor(qwen2: Path, tmp_path: Path) -> None:
    path = broken(qwen2, tmp_path)
    edit_weights(path, drop="model.layers.1.self_attn.q_proj.bias")
    assert "has no tensor model.layers.1.self_attn.q_proj.bias" in refusal(path)


def test_a_tensor_of_another_shape(qwen2: Path, tmp_path: Path) -> None:
    path = broken(qwen2, tmp_path)
    edit_config(path, intermediate_size=112)
    assert "gate_proj.weight is [96, 64] in the checkpoint, but [112, 64] by its config" in refusal(path)


def test_a_vocabulary_of_another_size(qwen2: Path, tmp_path: Path) -> None:
    path = broken(qwen2, tmp_path)
    edit_config(path, vocab_size=140)
    assert "model.embed_tokens.weight has 131 rows, but vocab_size is 140" in refusal(path)


def test_a_tensor_of_whole_numbers(qwen2: Path, tmp_path: Path) -> None:
    path = broken(qwen2, tmp_path)
    edit_weights(path, **{"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    assert "model.norm.weight is stored as I8; supported are F64, F32, F16, BF16" in refusal(path)


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    make_model(tmp_path, "llama", max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    assert f"names {gone.name}, which is not beside it; fetch that file" in refusal(tmp_path)


def test_an_index_that_names_files_elsewhere(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    make_model(directory, "llama", max_shard_size="20KB")
    moved = sorted(directory.glob("*.safetensors"))[1]
    moved.rename(tmp_path / moved.name)
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(moved.name, f"../{moved.name}"))
    assert f"names ../{moved.name}, which is not beside it" in refusal(directory)


def test_an_index_without_a_map_or_a_tensor(qwen2: Path, tmp_path: Path) -> None:
    path = broken(qwen2, tmp_path)
    index = path / "model.safetensors.index.json"
    index.write_text("{}")
    assert "has no weight_map" in refusal(path)
    index.write_text('{"weight_map": {"model.norm.weight": "model.safetensors"}}')
    assert "has no tensor model.embed_tokens.weight" in refusal(path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickles_are_refused(file: str, qwen2: Path, tmp_path: Path) -> None:
    path = broken(qwen2, tmp_path)
    (path / "model.safetensors").rename(path / file)
    said = refusal(path)
    assert f"pickle checkpoint, {file}: unpickling runs code" in said
    assert "convert it to safetensors" in said


def test_no_weights_at_all(qwen2: Path, tmp_path: Path) -> None:
    path = broken(qwen2, tmp_path)
    (path / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(path)


def test_built_in_models_have_no_weights() -> None:
    spec = builtin("Qwen3-8B")
    assert spec is not None
    with pytest.raises(BadModel, match=r"sizes without weights; give a directory"):
        open_checkpoint(ModelSource("Qwen3-8B", None, SourceKind.BUILTIN), spec)


# --- dummies


def test_dummies_are_the_same_in_every_layout(qwen2: Path) -> None:
    spec = replace(spec_of(source_of(qwen2)), qk_norm=True)
    full = {name: DummyCheckpoint(spec).read(name) for name in tensor_shapes(spec)}
    for name, tensor in reversed(full.items()):
        assert_slices_equal(DummyCheckpoint(spec), name, tensor)
    gate, norm = full["model.layers.0.mlp.gate_proj.weight"], full["model.layers.0.self_attn.q_norm.weight"]
    assert gate.std().item() == pytest.approx(0.02, rel=0.1)
    assert norm.mean().item() == pytest.approx(1.0, abs=0.05)
    assert norm.std() > 0
    assert torch.unique(gate, dim=0).shape == gate.shape
    assert not torch.equal(gate, full["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(gate, DummyCheckpoint(spec, seed=1).read("model.layers.0.mlp.gate_proj.weight"))
