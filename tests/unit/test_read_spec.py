"""Specs from configs: as transformers writes them, as older releases wrote them, and wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from cluster.errors import BadModel
from strategies.read_spec import builtin, builtin_names, from_hf_config
from strategies.spec import ModelSpec, RopeSpec

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 80,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
OLD_LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], **SIZES}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def old(**changes: Any) -> ModelSpec:
    return from_hf_config({**OLD_LLAMA, **changes}, "m")


def new(config_class: type[Any], **fields: Any) -> ModelSpec:
    return from_hf_config(config_class(**{**SIZES, **fields}).to_dict(), "m")


def test_llama_as_transformers_writes_it() -> None:
    spec = new(transformers.LlamaConfig, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    assert spec == ModelSpec(
        name="m",
        family="llama",
        layers=4,
        hidden=80,
        heads=10,
        kv_heads=5,
        head_dim=8,
        intermediate=96,
        vocab=131,
        max_positions=512,
        rms_eps=1e-5,
        rope=RopeSpec(theta=10000.0),
        tied=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        eos_ids=(2,),
        bos_id=1,
    )


@pytest.mark.parametrize(
    ("config_class", "family", "qkv_bias", "qk_norm"),
    [
        (transformers.LlamaConfig, "llama", False, False),
        (transformers.MistralConfig, "mistral", False, False),
        (transformers.Qwen2Config, "qwen2", True, False),
        (transformers.Qwen3Config, "qwen3", False, True),
    ],
)
def test_families(config_class: type[Any], family: str, qkv_bias: bool, qk_norm: bool) -> None:
    spec = new(config_class, head_dim=16, sliding_window=None)
    assert (spec.family, spec.qkv_bias, spec.o_bias, spec.qk_norm) == (family, qkv_bias, False, qk_norm)
    assert (spec.head_dim, spec.tied, spec.windows) == (16, False, ())


def test_qwen3_attention_bias_covers_the_output() -> None:
    spec = new(transformers.Qwen3Config, attention_bias=True)
    assert (spec.qkv_bias, spec.o_bias) == (True, True)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_missing_fields_mean_what_transformers_takes_them_for(name: str) -> None:
    bare = {
        key: value
        for key, value in SIZES.items()
        if key not in ("num_key_value_heads", "num_attention_heads")
    }
    bare |= {"architectures": [f"{name}ForCausalLM"], "num_attention_heads": 32, "hidden_size": 320}
    oracle = getattr(transformers, f"{name}Config").from_dict(dict(bare))
    spec = from_hf_config(bare, "m")
    assert spec.kv_heads == oracle.num_key_value_heads
    assert spec.head_dim == getattr(oracle, "head_dim", 10)
    assert spec.tied == oracle.tie_word_embeddings
    window = oracle.sliding_window if name == "Mistral" else None
    assert spec.windows == ((window,) * 4 if window else ())


def test_old_and_new_keys_give_one_spec() -> None:
    scaled = old(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}, torch_dtype="float16")
    renewed = old(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, dtype="torch.float16")
    assert scaled == renewed
    assert scaled.rope == RopeSpec(5e5, "llama3", 8.0, 64, 1.0, 4.0)
    assert scaled.dtype == "float16"
    assert old(head_dim=None) == old()
    assert old(num_key_value_heads=None).kv_heads == 10


def test_eos_and_bos_may_be_null_or_many() -> None:
    assert old(eos_token_id=None, bos_token_id=None).eos_ids == ()
    assert old(eos_token_id=[7, 9], bos_token_id=3).eos_ids == (7, 9)
    assert old(bos_token_id=3).bos_id == 3


def test_rope_kinds() -> None:
    assert old().rope == RopeSpec(10000.0)
    assert old(rope_scaling={"type": "linear", "factor": 2}).rope == RopeSpec(10000.0, "linear", 2.0)
    spec = old(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512})
    assert spec.rope == RopeSpec(10000.0, "yarn", 4.0, 512)
    assert spec.max_positions == 2048
    full = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "attention_factor": 1.5, "truncate": False}
    spec = old(rope_scaling=full, original_max_position_embeddings=128)
    assert spec.rope == RopeSpec(
        10000.0, "yarn", 4.0, 128, beta_fast=16.0, attention_factor=1.5, truncate=False
    )
    assert spec.max_positions == 512
    spec = old(rope_scaling={"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0})
    assert (spec.rope.mscale, spec.rope.mscale_all_dim, spec.rope.original_max_positions) == (0.7, 1.0, 512)


def test_windows() -> None:
    assert new(transformers.MistralConfig, sliding_window=7).windows == (7,) * 4
    assert new(transformers.Qwen2Config, sliding_window=7).windows == ()
    upper = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}
    assert new(transformers.Qwen2Config, **upper).windows == (None, None, None, 7)
    config = {"architectures": ["Qwen3ForCausalLM"], **SIZES, **upper}
    assert from_hf_config(config, "m").windows == (None, None, None, 7)
    types = ["sliding_attention", "full_attention"] * 2
    assert new(transformers.Qwen3Config, **upper, layer_types=types).windows == (7, None, 7, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel is not supported.*Qwen3ForCausalLM"),
        ({"architectures": None, "model_type": "gemma"}, r"model_type gemma is not supported"),
        ({"hidden_size": None}, r"no hidden_size"),
        ({"vocab_size": "131"}, r"vocab_size is '131'; it must be a number"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, r"10 query heads over 3 KV heads"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only silu"),
        ({"rope_scaling": {"type": "longrope"}}, r"'longrope' is not supported.*yarn"),
        ({"rope_scaling": {"type": "linear"}}, r"no factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"no low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor"),
        ({"head_dim": 7}, r"head_dim is 7"),
        ({"torch_dtype": "float8_e4m3fn"}, r"float8_e4m3fn is not supported"),
        ({"quantization_config": {"quant_method": "hqq"}}, r"quantized by hqq are not read"),
        ({"eos_token_id": "</s>"}, r"eos_token_id is '</s>'"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings is 'yes'"),
    ],
)
def test_bad_configs_are_named_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadModel, match=said) as caught:
        old(**changes)
    assert "\n" not in str(caught.value)


def test_layer_types_must_fit() -> None:
    config = {"architectures": ["Qwen2ForCausalLM"], **SIZES, "use_sliding_window": True, "sliding_window": 7}
    with pytest.raises(BadModel, match="2 entries for 4 layers"):
        from_hf_config({**config, "layer_types": ["full_attention"] * 2}, "m")
    with pytest.raises(BadModel, match="layer_types is"):
        from_hf_config({**config, "layer_types": ["chunked_attention"] * 4}, "m")


@pytest.mark.parametrize(
    ("name", "billions"),  # the parameters that the model cards give
    [
        ("Llama-3.1-8B", 8.03),
        ("Llama-3.3-70B", 70.55),
        ("Qwen2.5-7B", 7.62),
        ("Qwen2.5-14B", 14.77),
        ("Qwen2.5-32B", 32.76),
        ("Qwen2.5-72B", 72.71),
        ("Qwen3-8B", 8.19),
        ("Qwen3-14B", 14.77),
        ("Qwen3-32B", 32.76),
        ("DeepSeek-R1-Distill-Qwen-7B", 7.62),
        ("DeepSeek-R1-Distill-Qwen-14B", 14.77),
        ("DeepSeek-R1-Distill-Qwen-32B", 32.76),
        ("DeepSeek-R1-Distill-Llama-8B", 8.03),
        ("DeepSeek-R1-Distill-Llama-70B", 70.55),
    ],
)
def test_builtin_sizes(name: str, billions: float) -> None:
    spec = builtin(name)
    assert spec is not None
    assert spec.name == name
    assert round(spec.total_params / 1e9, 2) == billions


def test_builtin_names_and_ids_in_any_case() -> None:
    assert all(builtin(name.upper()) == builtin(name) for name in builtin_names())
    assert builtin("meta-llama/llama-3.3-70b-instruct") == builtin("LLAMA-3.3-70B")
    assert builtin("qwen/qwen3-32b") == builtin("Qwen3-32B")
    assert builtin("gpt-2") is None
