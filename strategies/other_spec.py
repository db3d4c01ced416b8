"""Sizes of an architecture that only transformers knows, to plan by: names differ, what they say does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.errors import BadModel
from strategies.read_spec import Unsupported
from strategies.spec import BYTES_PER_ELEMENT, Experts, ModelSpec, RopeSpec

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_MLP = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_topk")


def sizes_of(config: Mapping[str, object], name: str, why: Unsupported) -> ModelSpec:
    """Of a config.json beyond the engine, `why` says what of it. Raises BadModel where a size is missing."""
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        raise BadModel(f"{why}; models that also see or hear are not run")
    if config.get("auto_map") and not config.get("model_type"):
        raise BadModel(f"{why}; it brings code of its own, which is not run")
    if config.get("is_encoder_decoder"):
        raise BadModel(f"{why}; the compatibility runtime runs decoders alone")

    def size(keys: Sequence[str], default: int | None = None) -> int:
        value = next((config[key] for key in keys if config.get(key) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadModel(
                f"{why}; for the compatibility runtime its {keys[0]} must be a whole number, at least 1"
            )
        return value

    layers, hidden, heads = size(_LAYERS), size(_HIDDEN), size(_HEADS)
    mlp = size(_MLP, 4 * hidden)
    experts = None
    if any(config.get(key) for key in _EXPERTS):
        one = size(("moe_intermediate_size",), mlp)
        experts = Experts(size(_EXPERTS), size(_PER_TOKEN, 1), one)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return ModelSpec(
        name=name,
        family=str(config.get("model_type") or "unknown"),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=size(_KV_HEADS, heads),
        head_dim=size(("head_dim", "kv_channels"), max(1, hidden // heads)),
        intermediate=mlp,
        vocab=size(("vocab_size", "padded_vocab_size")),
        max_positions=size(_POSITIONS, 2048),
        rms_eps=1e-6,
        rope=RopeSpec(),
        tied=bool(config.get("tie_word_embeddings", True)),  # transformers' default
        dtype=dtype if dtype in BYTES_PER_ELEMENT else "bfloat16",
        eos_ids=_ids(config.get("eos_token_id")),
        bos_id=next(iter(_ids(config.get("bos_token_id"))), None),
        experts=experts,
        sizes_only=True,
    )


def _ids(value: object) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [value]
    return tuple(one for one in found if isinstance(one, int) and not isinstance(one, bool))
