"""The tensors that a model's checkpoint must hold, by their Hugging Face names, and their shapes."""

from __future__ import annotations

from cluster.errors import BadModel
from strategies.spec import ModelSpec

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Weights are [out, in], as in torch.nn.Linear."""
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (spec.vocab, spec.hidden)}
    for layer in range(spec.layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(spec).items()}
    shapes["model.norm.weight"] = (spec.hidden,)
    if not spec.tied:
        shapes[_HEAD] = (spec.vocab, spec.hidden)
    return shapes


def _layer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    q, kv, hidden, mlp = (
        spec.heads * spec.head_dim,
        spec.kv_heads * spec.head_dim,
        spec.hidden,
        spec.intermediate,
    )
    linears = {
        "self_attn.q_proj": (q, hidden, spec.qkv_bias),
        "self_attn.k_proj": (kv, hidden, spec.qkv_bias),
        "self_attn.v_proj": (kv, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, q, spec.o_bias),
        "mlp.gate_proj": (mlp, hidden, spec.mlp_bias),
        "mlp.up_proj": (mlp, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, mlp, spec.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, (rows, cols, bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, cols)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    if spec.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (spec.head_dim,)
    return shapes


def check_shape(spec: ModelSpec, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises BadModel where a checkpoint's tensor is not of the shape that its config promises."""
    if found == expected:
        return
    if name in (_EMBEDDING, _HEAD) and found[1:] == expected[1:]:
        raise BadModel(
            f"{spec.name}: {name} has {found[0]} rows, but vocab_size is {expected[0]}; they must be equal: "
            "take config and weights from one release"
        )
    raise BadModel(
        f"{spec.name}: {name} is {list(found)} in the checkpoint, but {list(expected)} by its config; "
        "take both from one release"
    )
