"""What the engine must agree with: tiny random models of each family, made by transformers, and SmolLM2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from launch.models import resolve, spec_of
from orchestrator.engine.checkpoint import open_checkpoint
from strategies.tensor_shapes import tensor_shapes

_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
}


def make_model(
    directory: Path | None,
    family: str,
    *,
    seed: int = 0,
    std: float = 0.2,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> transformers.PreTrainedModel:
    """A float32 model of `family` (llama, mistral, qwen2, qwen3), saved to `directory` unless that is None.

    `overrides` are config fields, by transformers' names, over a model of 3 layers, 4 heads in 2 KV groups
    and 131 tokens. Every parameter is random, norms (about 1) and biases too, and large enough that greedy
    tokens vary; wider models need a smaller `std`, lest attention sees one key alone.
    A small `max_shard_size` (such as "20KB") makes a sharded checkpoint with an index.
    """
    config_class, model_class = _CLASSES[family]
    config = config_class(**{**_DEFAULTS, **_FAMILY_DEFAULTS.get(family, {}), **overrides})
    config.dtype = torch.float32
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if "norm" in name:
                parameter.add_(1.0)
    if directory is not None:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def smollm2() -> transformers.PreTrainedModel:
    """transformers' Llama with SmolLM2's weights, in float32: its reader of GGUF files needs accelerate."""
    source = resolve("smollm2")
    spec = spec_of(source)
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.max_positions,
        rms_norm_eps=spec.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
        tie_word_embeddings=spec.tied,
        bos_token_id=spec.bos_id,
        eos_token_id=list(spec.eos_ids),
    )
    checkpoint = open_checkpoint(source, spec)
    model = transformers.LlamaForCausalLM(config).eval()
    weights = {name: checkpoint.read(name) for name in tensor_shapes(spec)}
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    assert left.missing_keys == ["lm_head.weight"], "tied to the embedding"
    return model
