"""Architectures that only transformers knows: what is read of them, and which layouts they have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import BadModel, UserError
from launch.options import engine_options
from strategies.plan import Layout
from strategies.runnable import is_known, why_not
from strategies.source import ModelSource, SourceKind, spec_of
from tests.unit.test_options import parsed

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": 12,
    "n_embd": 768,
    "n_head": 12,
}
GPT2 |= {"n_inner": None, "n_positions": 1024, "vocab_size": 50257, "eos_token_id": 50256}
GELU = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "gelu",
    "num_hidden_layers": 2,
    "hidden_size": 64,
}
GELU |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 131}
MOE = {"architectures": ["OddForCausalLM"], "model_type": "odd", "num_hidden_layers": 2, "d_model": 64}
MOE |= {
    "n_heads": 4,
    "moe_intermediate_size": 32,
    "vocab_size": 9,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def written(directory: Path, config: dict[str, object]) -> ModelSource:
    (directory / "config.json").write_text(json.dumps(config))
    return ModelSource("odd", directory, SourceKind.HF)


def test_sizes_are_read_by_the_names_that_architectures_give_them(tmp_path: Path) -> None:
    spec = spec_of(written(tmp_path, GPT2))
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (12, 768, 12, 12, 64)
    assert (spec.intermediate, spec.max_positions, spec.eos_ids) == (3072, 1024, (50256,))
    assert not is_known(spec)
    mixture = spec_of(written(tmp_path, MOE))
    assert mixture.experts is not None
    assert (mixture.experts.count, mixture.experts.per_token, mixture.experts.intermediate) == (8, 2, 32)


def test_a_known_family_with_an_unknown_trait_is_not_the_engines(tmp_path: Path) -> None:
    spec = spec_of(written(tmp_path, GELU))
    assert not is_known(spec)
    assert (spec.heads, spec.kv_heads, spec.intermediate) == (4, 2, 96)


def test_plain_tp_and_dp_alone_run(tmp_path: Path) -> None:
    spec = spec_of(written(tmp_path, GELU))
    assert [why_not(spec, Layout.parse(name)) for name in ("tp1", "tp2", "dp4", "tp2dp2")] == [None] * 4
    for name in ("pp2", "tp1+int8", "tp1+offload"):
        assert f"has plain tp and dp alone, not {name}; use " in (why_not(spec, Layout.parse(name)) or "")
    assert "4 heads and 2 KV heads, not for tp4; use dp4" in (why_not(spec, Layout.parse("tp4")) or "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_layer": None}, "GPT2LMHeadModel is not supported.*num_hidden_layers must be a whole number"),
        ({"n_embd": "768"}, "hidden_size must be a whole number"),
        ({"is_encoder_decoder": True}, "runs decoders alone"),
        ({"text_config": {"architectures": ["Odd"]}}, "that also see or hear are not run"),
    ],
)
def test_what_cannot_be_run_is_said_with_the_reason(
    changes: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(BadModel, match=says):
        spec_of(written(tmp_path, GPT2 | changes))


def test_options_of_such_a_model(tmp_path: Path) -> None:
    written(tmp_path, GELU)
    asked = parsed("--layout", "tp2", "--device", "cpu")
    asked.model = str(tmp_path)
    with pytest.raises(BadModel, match=r"has no .safetensors files, and other formats may hold code"):
        engine_options(asked)
    asked.weights = "dummy"
    made = engine_options(asked)
    assert made.compatible
    assert not made.prefix_caching
    asked.layout = "pp2"
    with pytest.raises(UserError, match="plain tp and dp alone"):
        engine_options(asked)


def test_files_that_transformers_would_misread_are_refused_before_a_start(tmp_path: Path) -> None:
    written(tmp_path, GELU)
    asked = parsed("--layout", "tp1", "--device", "cpu")
    asked.model = str(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.zeros(4), "a.bias": torch.zeros(2, dtype=torch.bool)}, file)
    assert engine_options(asked).compatible
    save_file({"a.weight": torch.zeros(4, dtype=torch.int32)}, file)
    with pytest.raises(BadModel, match=r"a.weight is stored as I32; supported are F64"):
        engine_options(asked)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadModel, match=r"model.safetensors is cut short or corrupt .*; fetch it again"):
        engine_options(asked)
