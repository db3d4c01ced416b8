"""GGUF files give the Hugging Face layout back, slice by slice, from every quantization; and their spec."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.errors import BadModel
from orchestrator.engine.checkpoint import open_checkpoint
from orchestrator.engine.gguf_checkpoint import gguf_name
from strategies.read_gguf import from_gguf_metadata
from strategies.source import spec_of
from strategies.spec import ModelSpec, RopeSpec
from strategies.tensor_shapes import tensor_shapes
from tests.tiny import make_model
from tests.unit.test_checkpoint import assert_slices_equal, opened, refusal, source_of

QUANTIZABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # by the gguf package in Python
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute: what the reader must undo."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    file: Path,
    spec: ModelSpec,
    weights: dict[str, Tensor],
    kind: str | Callable[[str], str],
    rope_freqs: np.ndarray | None = None,
    **extra: Any,
) -> None:
    """`kind`: of each matrix, or by name. `extra` are methods of GGUFWriter, and what to call them with."""
    arch = spec.family
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    for method, value in extra.items():
        getattr(writer, method)(value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    for name in tensor_shapes(spec):
        kind_here = kind if isinstance(kind, str) else kind(name)
        quantization = gguf.GGMLQuantizationType[kind_here]
        values = weights[name].numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = permuted(values, spec.heads if ".q_proj." in name else spec.kv_heads)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            raw = random_blocks(values.shape, quantization) if kind_here in K_QUANTS else None
            raw = gguf.quants.quantize(values, quantization) if raw is None else raw
            writer.add_tensor(gguf_name(name), raw, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Any bytes are a block, but for the float16 scales, which must be finite."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (shape[0], shape[1] // elements, size), dtype=np.uint8)
    scale = rng.normal(size=(*blocks.shape[:2], 2)).astype(np.float16).view(np.uint8)
    if kind.name == "Q6_K":
        blocks[..., -2:] = scale[..., :2]  # the scale comes last
    else:
        blocks[..., :4] = scale  # scale and minimum come first
    return blocks.reshape(shape[0], -1)


def gguf_of(
    tmp_path: Path, family: str, kind: str | Callable[[str], str], **overrides: Any
) -> tuple[Path, dict[str, Tensor]]:
    """A GGUF file, and what transformers' model was before quantization."""
    weights = make_model(tmp_path, family, **overrides).state_dict()
    file = tmp_path / "m.gguf"
    write_gguf(file, spec_of(source_of(tmp_path)), weights, kind)
    return file, weights


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 64}),
    ],
)
def test_gguf_gives_the_hugging_face_layout_back(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    file, weights = gguf_of(tmp_path, family, "F32", **overrides)
    spec, checkpoint = opened(file)
    checkpoint.verify()
    assert replace(spec_of(source_of(tmp_path)), dtype=spec.dtype, rms_eps=spec.rms_eps) == spec
    for name in tensor_shapes(spec):
        assert_slices_equal(checkpoint, name, weights[name])


@pytest.mark.parametrize("kind", [*QUANTIZABLE, *K_QUANTS])
def test_gguf_slices_of_each_quantization(kind: str, tmp_path: Path) -> None:
    file, weights = gguf_of(tmp_path, "llama", kind, **WIDE)
    spec, checkpoint = opened(file)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, shape in tensor_shapes(spec).items():
        if len(shape) == 1:
            continue
        tensor = stored[gguf_name(name)]
        full = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if ".q_proj." in name or ".k_proj." in name:
            heads = shape[0] // spec.head_dim
            full = full.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        assert_slices_equal(checkpoint, name, torch.from_numpy(full.copy()))
        assert torch.equal(checkpoint.read(name, cols=range(0, 256)), torch.from_numpy(full[:, :256].copy()))
        if kind not in K_QUANTS:
            assert np.abs(full - weights[name].numpy()).max() < 0.2, "quantization of normal values of 0.2"


def test_gguf_reads_only_its_own_rows(tmp_path: Path) -> None:
    file, _ = gguf_of(tmp_path, "qwen2", "Q8_0")
    _, checkpoint = opened(file)
    name = "model.layers.0.mlp.gate_proj.weight"
    before = checkpoint.read(name, range(0, 48))
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == gguf_name(name))
    with file.open("r+b") as stream:  # spoil the other half
        stream.seek(tensor.data_offset + tensor.n_bytes // 2)
        stream.write(b"\xff" * (tensor.n_bytes // 2))
    assert torch.equal(checkpoint.read(name, range(0, 48)), before)
    assert not torch.isfinite(checkpoint.read(name, range(48, 96))).all()


def test_truncated_gguf(tmp_path: Path) -> None:
    file, _ = gguf_of(tmp_path, "qwen2", "F16")
    whole = file.read_bytes()
    for keep in (20, 100, len(whole) // 2, len(whole) - 64):
        file.write_bytes(whole[:keep])
        assert "is cut short" in refusal(file)


def test_gguf_quantizations_that_are_not_supported_are_named(tmp_path: Path) -> None:
    file, _ = gguf_of(tmp_path, "qwen2", "TQ2_0", **WIDE)
    said = refusal(file)
    assert "token_embd.weight is quantized as TQ2_0, which is not supported" in said
    assert "Q4_K" in said


def test_gguf_without_a_tensor_or_with_another_shape(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen2")
    spec = spec_of(source_of(tmp_path))
    zeros = {name: torch.zeros(shape) for name, shape in tensor_shapes(spec).items()}
    file = tmp_path / "m.gguf"
    write_gguf(file, replace(spec, layers=2), zeros, "F32", add_file_type=0)
    assert spec_of(source_of(file)).dtype == "float32"
    more = open_checkpoint(source_of(file), spec)
    with pytest.raises(BadModel, match=r"m\.gguf has no tensor blk\.2\.attn_norm\.weight"):
        more.verify()
    write_gguf(file, replace(spec, intermediate=96), zeros, "F32")
    wider = open_checkpoint(source_of(file), replace(spec, intermediate=128))
    with pytest.raises(BadModel, match=r"gate_proj\.weight is \[96, 64\] in the checkpoint, but \[128, 64\]"):
        wider.verify()


def test_gguf_yarn(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen2")
    spec = spec_of(source_of(tmp_path))
    zeros = {name: torch.zeros(shape) for name, shape in tensor_shapes(spec).items()}
    file = tmp_path / "m.gguf"
    yarn: dict[str, Any] = {
        "add_rope_freq_base": 1e6,
        "add_rope_scaling_type": gguf.RopeScalingType.YARN,
        "add_rope_scaling_factor": 4.0,
        "add_rope_scaling_orig_ctx_len": 512,
    }
    write_gguf(file, spec, zeros, "F32", **yarn)
    found = spec_of(source_of(file))
    assert (found.rope.kind, found.rope.factor, found.rope.original_max_positions) == ("yarn", 4.0, 512)
    assert (found.rope.theta, found.max_positions) == (1e6, 2048)
    write_gguf(file, spec, zeros, "F32", add_rope_scaling_type=gguf.RopeScalingType.LONGROPE)
    assert "'longrope' is not supported" in refusal(file)


METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 131072,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.eot_token_id": 5,
}
SHAPES = {"token_embd.weight": (131, 256), "output.weight": (131, 256)}


def test_a_header_alone() -> None:
    spec = from_gguf_metadata(METADATA, SHAPES, "m")
    assert (spec.vocab, spec.head_dim, spec.tied, spec.eos_ids) == (131, 64, False, (3, 5))
    assert from_gguf_metadata(METADATA, {"token_embd.weight": (131, 256)}, "m").tied


def _llama3_factors(factor: float, head_dim: int, theta: float) -> list[float]:
    """As llama.cpp's convert_hf_to_gguf.py computes them for original_max_position_embeddings of 8192."""
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recovered_from_its_outcome(factor: float) -> None:
    factors = _llama3_factors(factor, 64, 500000.0)
    spec = from_gguf_metadata(METADATA, SHAPES, "m", [float(np.float32(f)) for f in factors])
    assert spec.rope == RopeSpec(500000.0, "llama3", factor, 8192, 1.0, 4.0)
    factors[10] *= 1.1
    with pytest.raises(BadModel, match="rope_freqs"):
        from_gguf_metadata(METADATA, SHAPES, "m", factors)


def test_rope_factors_are_read_from_the_file(tmp_path: Path) -> None:
    make_model(tmp_path, "llama", head_dim=64, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    spec = spec_of(source_of(tmp_path))
    zeros = {name: torch.zeros(shape) for name, shape in tensor_shapes(spec).items()}
    factors = np.array(_llama3_factors(8.0, 64, 5e5), dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", spec, zeros, "F32", add_rope_freq_base=5e5, rope_freqs=factors)
    assert spec_of(source_of(tmp_path / "m.gguf")).rope.kind == "llama3"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general.architecture": "gemma2"}, "architecture gemma2 is not supported.*llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"split.count": 3}, "one of 3 parts; join them with llama-gguf-split --merge"),
        ({"llama.rope.dimension_count": 32}, "turns 32 of 64 dimensions"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"num_key_value_heads is \[2, 1\]; it must be a number"),
    ],
)
def test_headers_that_are_not_supported(changes: dict[str, object], said: str) -> None:
    with pytest.raises(BadModel, match=said):
        from_gguf_metadata({**METADATA, **changes}, SHAPES, "m")


def test_headers_that_lack_something() -> None:
    less = {key: value for key, value in METADATA.items() if key != "llama.block_count"}
    with pytest.raises(BadModel, match=r"no llama\.block_count"):
        from_gguf_metadata(less, SHAPES, "m")
    with pytest.raises(BadModel, match=r"no tensor token_embd\.weight"):
        from_gguf_metadata(METADATA, {}, "m")
