"""Hugging Face config fields → ModelSpec, and the built-in models, which are such fields in models.yaml.

Defaults of missing fields are those of transformers' own configuration classes (5.x), which is the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import BadModel
from strategies.published import published
from strategies.spec import BYTES_PER_ELEMENT, Experts, Latent, ModelSpec, RopeSpec


class Unsupported(BadModel):
    """Well formed, and beyond the engine."""


@dataclass(frozen=True, slots=True)
class _Family:
    """What a family fixes, and its defaults for fields that a config may leave out."""

    name: str
    kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden / heads
    qkv_bias: bool | None = False  # None: the config's attention_bias says, for q, k, v and o alike
    mlp_bias: bool = False  # whether the config's mlp_bias is read
    qk_norm: bool = False
    window_everywhere: int | None = None  # default of sliding_window, where it bounds every layer
    window_by_layer: bool = False  # use_sliding_window with max_window_layers or layer_types
    window_types: bool = False  # layer_types alone says which layers slide
    experts: bool = False  # a mixture of experts
    latent: bool = False  # multi-head latent attention


_ARCHITECTURES = {
    "LlamaForCausalLM": _Family("llama", qkv_bias=None, mlp_bias=True),
    "MistralForCausalLM": _Family("mistral", kv_heads=8, window_everywhere=4096),
    "Qwen2ForCausalLM": _Family("qwen2", kv_heads=32, qkv_bias=True, window_by_layer=True),
    "Qwen3ForCausalLM": _Family(
        "qwen3", kv_heads=32, head_dim=128, qkv_bias=None, qk_norm=True, window_by_layer=True
    ),
    # To plan for; strategies/runnable.py says which the engine runs.
    "Qwen3MoeForCausalLM": _Family(
        "qwen3_moe", kv_heads=4, head_dim=128, qkv_bias=None, qk_norm=True, experts=True
    ),
    "MixtralForCausalLM": _Family("mixtral", kv_heads=8, experts=True),
    "Glm4MoeForCausalLM": _Family("glm4_moe", qkv_bias=None, qk_norm=True, experts=True),
    "GptOssForCausalLM": _Family("gpt_oss", kv_heads=8, qkv_bias=None, window_types=True, experts=True),
    "MiniMaxM2ForCausalLM": _Family("minimax_m2", kv_heads=8, qk_norm=True, experts=True),
    "DeepseekV3ForCausalLM": _Family("deepseek_v3", experts=True, latent=True),
}
_MODEL_TYPES = {family.name: family for family in _ARCHITECTURES.values()}
_MODEL_TYPES["kimi_k2"] = _ARCHITECTURES["DeepseekV3ForCausalLM"]
_ROPE_KINDS = ("default", "linear", "llama3", "yarn")


class _Fields:
    """A config's fields, typed. What is missing or of the wrong type is a BadModel naming model and field."""

    def __init__(self, values: Mapping[str, object], model: str) -> None:
        self.values = values
        self.model = model

    def bad(self, key: str, rule: str) -> BadModel:
        return BadModel(f"{self.model}: {key} is {self.values.get(key)!r}; {rule}")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise BadModel(f"{self.model}: the config has no {key}, which is required")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.bad(key, "it must be a number")
        return float(value)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number, at least 1."""
        value = self.number(key, default)
        if value != int(value) or value < 1:
            raise self.bad(key, "it must be a whole number, at least 1")
        return int(value)

    def optional_size(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.size(key)

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(key, "it must be true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """null, one id or a list of ids."""
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in found):
            raise self.bad(key, "it must be null, a token id or a list of them")
        return tuple(found)


def from_hf_config(config: Mapping[str, object], name: str) -> ModelSpec:
    """The spec that a config.json describes, with old or new keys. Raises BadModel."""
    inner = config.get("text_config")
    if isinstance(inner, Mapping):  # a model that also sees; its language part is what is planned
        config = inner
    family = _family(config, name)
    fields = _Fields(config, name)
    stored = config.get("quantization_config")
    if stored is not None and not isinstance(stored, Mapping):
        raise fields.bad("quantization_config", "it must be an object")
    activation = config.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise Unsupported(f"{name}: hidden_act is {activation!r}; only silu is supported")
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    bias = fields.flag("attention_bias") if family.qkv_bias is None else family.qkv_bias
    has_kv_heads = config.get("num_key_value_heads", family.kv_heads) is not None
    max_positions = fields.size("max_position_embeddings")
    rope = _rope(config, name, max_positions)
    spec = ModelSpec(
        name=name,
        family=family.name,
        layers=fields.size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=fields.size("num_key_value_heads", family.kv_heads) if has_kv_heads else heads,
        head_dim=fields.size("head_dim", family.head_dim or max(1, hidden // heads)),
        intermediate=fields.size("intermediate_size"),
        vocab=fields.size("vocab_size"),
        max_positions=_extended(max_positions, rope),
        rms_eps=fields.number("rms_norm_eps"),
        rope=rope,
        tied=fields.flag("tie_word_embeddings"),
        qkv_bias=bias,
        o_bias=bias and family.qkv_bias is None,
        mlp_bias=family.mlp_bias and fields.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        windows=_windows(family, fields),
        dtype=_dtype(config, name),
        eos_ids=fields.token_ids("eos_token_id"),
        bos_id=next(iter(fields.token_ids("bos_token_id")), None),
        experts=_experts(fields) if family.experts else None,
        latent=_latent(fields) if family.latent else None,
        published=None if stored is None else published(stored, name),
    )
    return checked(spec)


def _experts(fields: _Fields) -> Experts:
    """Families name the same sizes differently; the first name that a config has counts."""

    def first(*keys: str) -> int:
        return fields.size(next((key for key in keys if fields.values.get(key) is not None), keys[0]))

    intermediate = first("moe_intermediate_size", "intermediate_size")
    shared = fields.number("n_shared_experts", 0)
    if not shared:
        shared = fields.number("shared_expert_intermediate_size", 0) / intermediate
    return Experts(
        count=first("num_experts", "n_routed_experts", "num_local_experts"),
        per_token=first("num_experts_per_tok", "experts_per_token"),
        intermediate=intermediate,
        shared=int(shared),
        dense_layers=int(fields.number("first_k_dense_replace", 0)),
    )


def _latent(fields: _Fields) -> Latent:
    return Latent(
        q_rank=fields.optional_size("q_lora_rank") or 0,
        kv_rank=fields.size("kv_lora_rank"),
        nope_dim=fields.size("qk_nope_head_dim"),
        rope_dim=fields.size("qk_rope_head_dim"),
        v_dim=fields.size("v_head_dim"),
    )


def checked(spec: ModelSpec) -> ModelSpec:
    """The spec, if its sizes fit one another. Raises BadModel."""
    if spec.heads % spec.kv_heads:
        raise BadModel(
            f"{spec.name}: {spec.heads} query heads over {spec.kv_heads} KV heads; "
            "the second must divide the first"
        )
    if spec.head_dim % 2:
        raise BadModel(f"{spec.name}: head_dim is {spec.head_dim}; rotary embedding needs an even one")
    if spec.windows and len(spec.windows) != spec.layers:
        raise BadModel(f"{spec.name}: layer_types has {len(spec.windows)} entries for {spec.layers} layers")
    return spec


def _family(config: Mapping[str, object], name: str) -> _Family:
    architectures = config.get("architectures")
    if not architectures:
        model_type = config.get("model_type")
        if isinstance(model_type, str) and model_type in _MODEL_TYPES:
            return _MODEL_TYPES[model_type]
        architectures = [f"model_type {model_type}"]
    named = architectures[0] if isinstance(architectures, list) else architectures
    if named not in _ARCHITECTURES:
        raise Unsupported(f"{name}: {named} is not supported; supported are {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[str(named)]


def _rope(config: Mapping[str, object], name: str, max_positions: int) -> RopeSpec:
    """Old: rope_theta beside rope_scaling with `type` or `rope_type`. New: rope_parameters holds both."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise BadModel(f"{name}: rope_scaling is {given!r}; it must be an object")
    fields = _Fields(given, f"{name}: rope_scaling")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _ROPE_KINDS:
        raise Unsupported(
            f"{name}: RoPE type {kind!r} is not supported; supported are {', '.join(_ROPE_KINDS)}"
        )
    for holder in (config, given):
        if holder.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise Unsupported(f"{name}: partial_rotary_factor is not supported; it must be 1")
    outer = _Fields(config, name)
    theta = fields.number("rope_theta", outer.number("rope_theta", 10000.0))
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind=kind, factor=fields.number("factor"))
    original = outer.optional_size(
        "original_max_position_embeddings"
    )  # transformers gives this one precedence
    original = original or fields.size("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        return RopeSpec(
            theta=theta,
            kind=kind,
            factor=fields.number("factor"),
            original_max_positions=original,
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
        )
    return RopeSpec(
        theta=theta,
        kind=kind,
        factor=fields.number("factor", max_positions / original),
        original_max_positions=original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=fields.optional_number("attention_factor"),
        mscale=fields.optional_number("mscale"),
        mscale_all_dim=fields.optional_number("mscale_all_dim"),
        truncate=fields.flag("truncate", default=True),
    )


def _extended(max_positions: int, rope: RopeSpec) -> int:
    """Qwen's model cards add YaRN without raising max_position_embeddings; the factor says by how much."""
    if rope.kind != "yarn":
        return max_positions
    return max(max_positions, int(rope.factor * rope.original_max_positions))


def _windows(family: _Family, fields: _Fields) -> tuple[int | None, ...]:
    layers = fields.size("num_hidden_layers")
    if family.window_everywhere is not None:
        given = "sliding_window" in fields.values
        window = fields.optional_size("sliding_window") if given else family.window_everywhere
        return (window,) * layers if window else ()
    types = fields.values.get("layer_types")
    if not family.window_types and not (family.window_by_layer and fields.flag("use_sliding_window")):
        return ()
    window = fields.size("sliding_window", 4096)
    if types is None and family.window_types:
        return ()
    if types is None:
        first = int(fields.number("max_window_layers", 28))
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(types, list) or not set(types) <= {"sliding_attention", "full_attention"}:
        raise fields.bad("layer_types", "it must be a list of sliding_attention and full_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _dtype(config: Mapping[str, object], name: str) -> str:
    """As stored. A config that does not say is taken for bfloat16, as these families are published."""
    value = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if value not in BYTES_PER_ELEMENT:
        raise BadModel(
            f"{name}: dtype {value} is not supported; supported are {', '.join(BYTES_PER_ELEMENT)}"
        )
    return value


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    text = Path(__file__).with_name("models.yaml").read_text(encoding="utf-8")
    models: Mapping[str, Mapping[str, Any]] = yaml.safe_load(text)["models"]
    return models


@cache
def _canonical() -> Mapping[str, str]:
    """Every spelling, in lower case → the built-in name: itself, its ids, and those without the owner."""
    found = {}
    for name, entry in _table().items():
        ids = entry["ids"]
        for spelling in (name, *ids, *(hf_id.split("/")[-1] for hf_id in ids)):
            found[spelling.lower()] = name
    return found


def builtin_names() -> tuple[str, ...]:
    return tuple(_table())


def builtin(name: str) -> ModelSpec | None:
    """The built-in spec called `name` (any case; Hugging Face ids too), or None."""
    canonical = _canonical().get(name.lower())
    if canonical is None:
        return None
    return from_hf_config(_table()[canonical]["config"], canonical)
