"""GGUF metadata → ModelSpec. Keys are listed in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.errors import BadModel
from strategies.read_spec import from_hf_config
from strategies.spec import ModelSpec, RopeSpec

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_REQUIRED = {  # GGUF's key, after the architecture → the config's
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_DTYPES = {0: "float32", 1: "float16"}  # general.file_type; quantized ones are computed in bfloat16
_EMBEDDING = "token_embd.weight"


def from_gguf_metadata(
    metadata: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    name: str,
    rope_factors: Sequence[float] = (),
) -> ModelSpec:
    """The spec that a GGUF header describes. Raises BadModel.

    `shapes` are the tensors', by their names in the file: they tell vocabulary, biases and whether the head
    is tied. `rope_factors` are the values of the tensor rope_freqs.weight: how GGUF keeps llama3's RoPE.
    """
    arch = metadata.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise BadModel(
            f"{name}: GGUF architecture {arch} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    _refuse(metadata, shapes, name)
    config: dict[str, object] = {
        "architectures": [_ARCHITECTURES[str(arch)]],
        "vocab_size": shapes[_EMBEDDING][0],
        "eos_token_id": _eos(metadata),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "torch_dtype": _DTYPES.get(_file_type(metadata)),
        "rope_scaling": _scaling(metadata, str(arch), name),
    }
    for key, field in _REQUIRED.items():
        if f"{arch}.{key}" not in metadata:
            raise BadModel(f"{name}: the GGUF header has no {arch}.{key}, which is required")
        config[field] = metadata[f"{arch}.{key}"]
    config |= {field: metadata.get(f"{arch}.{key}") for key, field in _OPTIONAL.items()}
    spec = replace(
        from_hf_config(config, name),
        tied="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        o_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
    )
    rotated = metadata.get(f"{arch}.rope.dimension_count", spec.head_dim)
    if rotated != spec.head_dim:
        raise BadModel(f"{name}: RoPE turns {rotated} of {spec.head_dim} dimensions; it must turn them all")
    return replace(spec, rope=_llama3(spec, rope_factors)) if rope_factors else spec


def _refuse(metadata: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    arch = metadata["general.architecture"]
    if metadata.get(f"{arch}.expert_count"):
        raise BadModel(f"{name}: mixtures of experts are not supported; use a dense model")
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise BadModel(f"{name}: the file is one of {parts} parts; join them with llama-gguf-split --merge")
    if _EMBEDDING not in shapes:
        raise BadModel(f"{name}: the GGUF file has no tensor {_EMBEDDING}, which is required")


def _eos(metadata: Mapping[str, object]) -> list[object]:
    """The end of a text and, where it differs, of a turn."""
    found = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot"))
    return list(dict.fromkeys(token for token in found if token is not None))


def _file_type(metadata: Mapping[str, object]) -> int:
    value = metadata.get("general.file_type")
    return value if isinstance(value, int) else -1


def _scaling(metadata: Mapping[str, object], arch: str, name: str) -> dict[str, object] | None:
    def given(key: str) -> object:
        return metadata.get(f"{arch}.rope.scaling.{key}")

    kind, factor = given("type"), given("factor")
    if kind in (None, "none"):
        return None
    scaling: dict[str, object] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = given("original_context_length")
        scaling["beta_fast"], scaling["beta_slow"] = given("yarn_beta_fast"), given("yarn_beta_slow")
        extra = given("attn_factor")
        if isinstance(extra, float) and isinstance(factor, float):
            scaling["attention_factor"] = extra * (
                0.1 * math.log(factor) + 1
            )  # llama.cpp multiplies YaRN's own
    elif kind != "linear":
        raise BadModel(f"{name}: RoPE scaling {kind!r} is not supported; supported are none, linear, yarn")
    return scaling


def _llama3(spec: ModelSpec, factors: Sequence[float]) -> RopeSpec:
    """The llama3 scaling that divides each frequency by these factors. Raises BadModel where there is none.

    The file keeps the outcome alone. Every release (3.1, 3.2, 3.3) blends between wavelengths of 8192 and
    8192 / 4, so the largest factor tells the rest; that it does is checked against all of them.
    """
    rope = RopeSpec(
        theta=spec.rope.theta,
        kind="llama3",
        factor=round(max(factors), 3),
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    for index, found in enumerate(factors):
        turns = 8192 / (2 * math.pi * rope.theta ** (2 * index / spec.head_dim))
        smooth = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected = 1 / ((1 - smooth) / rope.factor + smooth)
        if len(factors) != spec.head_dim // 2 or not math.isclose(found, expected, rel_tol=1e-3):
            raise BadModel(
                f"{spec.name}: rope_freqs.weight is not llama3's RoPE scaling, which alone is supported"
            )
    return rope
