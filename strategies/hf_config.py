"""A ModelSpec as a Hugging Face config.json: what read_spec.py reads, written."""

from __future__ import annotations

from cluster.errors import BadModel
from strategies.spec import ModelSpec, RopeSpec

_ARCHITECTURE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def to_hf_config(spec: ModelSpec, dtype: str) -> dict[str, object]:
    """Raises BadModel for what such a config would not tell."""
    if (
        spec.family not in _ARCHITECTURE
        or spec.windows
        or spec.rope.kind not in ("default", "linear", "llama3")
    ):
        raise BadModel(f"{spec.name} cannot be told in a config.json; start from its Hugging Face directory")
    return {
        "architectures": [_ARCHITECTURE[spec.family]],
        "model_type": spec.family,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.rms_eps,
        "rope_theta": spec.rope.theta,
        "rope_scaling": _rope_scaling(spec.rope),
        "tie_word_embeddings": spec.tied,
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
        "hidden_act": "silu",
        "bos_token_id": spec.bos_id,
        "eos_token_id": list(spec.eos_ids) or None,
        "torch_dtype": dtype,
    }


def _rope_scaling(rope: RopeSpec) -> dict[str, object] | None:
    if rope.kind == "default":
        return None
    found: dict[str, object] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        found |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return found
