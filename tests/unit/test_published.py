"""Checkpoints in fewer bits, each written here as its format's documentation has it, in numpy, and read to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.errors import BadLayout, BadModel
from launch.__main__ import main
from launch.models import resolve, spec_of
from orchestrator.engine.checkpoint import open_checkpoint
from orchestrator.engine.loader import load
from orchestrator.engine.model import Transformer
from orchestrator.engine.published import PublishedCheckpoint, packed, unpacked
from orchestrator.engine.quantized import Quantized
from strategies import tensor
from strategies.formats import FORMATS
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims
from strategies.quantize import native
from strategies.spec import ModelSpec
from tests.tiny import make_model

SIZES = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 192, "intermediate_size": 320}
RND = np.random.default_rng(0)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's: nibble i holds channel order[i]


def pack_rows(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    """Along the last axis, the lowest bits first."""
    per = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // per), np.uint32)
    for i in range(per):
        words |= codes[:, i::per].astype(np.uint32) << (bits * i)
    return words.view(np.int32)


def tensors_of(how: str, n: int, k: int, group: int) -> tuple[dict[str, Tensor], np.ndarray]:
    """One linear layer's tensors, and what its weights are, in float32."""
    g = k // group
    scale = (RND.random((n, g)).astype(np.float16) / 50 + np.float16(0.002)).astype(np.float16)
    codes, points = RND.integers(0, 16, (n, k)), RND.integers(0, 16, (n, g))
    wide = lambda x: np.repeat(x.astype(np.float32), group, axis=1)  # noqa: E731
    t = torch.from_numpy
    if how in ("packed", "packed symmetric"):
        scales = t(scale.astype(np.float32)).to(torch.bfloat16)
        points = np.full_like(points, 8) if how == "packed symmetric" else points
        found = {"weight_packed": t(pack_rows(codes)), "weight_scale": scales}
        found["weight_shape"] = torch.tensor([n, k])
        if how == "packed":
            found["weight_zero_point"] = t(pack_rows(points.T.copy()).T.copy())
        return found, (codes - wide(points)) * wide(scales.float().numpy())
    if how in ("gptq", "gptq_v2"):
        points = np.maximum(points, 1)
        stored = points - 1 if how == "gptq" else points
        found = {"qweight": t(pack_rows(codes.T.copy().T).T.copy()), "scales": t(scale.T.copy())}
        found["qzeros"] = t(pack_rows(stored.T.copy()))
        found["g_idx"] = torch.arange(k, dtype=torch.int32) // group
        return found, (codes - wide(points)) * wide(scale)
    if how == "gptq act-order":
        order = RND.permutation(k) // group
        found = {"qweight": t(pack_rows(codes).T.copy()), "scales": t(scale.T.copy())}
        found["qzeros"] = t(pack_rows(np.maximum(points, 1).T.copy() - 1))
        found["g_idx"] = t(order.astype(np.int32))
        return found, (codes - np.maximum(points, 1)[:, order]) * scale.astype(np.float32)[:, order]
    if how == "awq":
        mixed = lambda x: x.T.reshape(x.shape[1], -1, 8)[:, :, AWQ_ORDER].reshape(x.shape[1], -1)  # noqa: E731
        found = {"qweight": t(pack_rows(mixed(codes))), "qzeros": t(pack_rows(mixed(points)))}
        return found | {"scales": t(scale.T.copy())}, (codes - wide(points)) * wide(scale)
    small = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(torch.float8_e4m3fn)
    if how.startswith("nf4"):
        return nf4(n, k, nested=how == "nf4 nested")
    if how == "blocks":
        scales = RND.random((-(-n // 128), -(-k // 128))).astype(np.float32)
        every = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:n, :k]
        return {"weight": small, "weight_scale_inv": t(scales)}, small.float().numpy() * every
    if how == "int8":
        eight = t(RND.integers(-127, 128, (n, k)).astype(np.int8))
        scales = t(scale[:, :1].astype(np.float32)).to(torch.bfloat16)
        return {"weight": eight, "weight_scale": scales}, eight.numpy() * scales.float().numpy()
    shape = (1,) if how == "fp8 tensor" else (n, 1)
    scales = t(RND.random(shape).astype(np.float32))
    found = {"weight": small, "weight_scale": scales.reshape(()) if how == "fp8 tensor" else scales}
    return found, small.float().numpy() * scales.numpy()


def nf4(n: int, k: int, *, nested: bool) -> tuple[dict[str, Tensor], np.ndarray]:
    """As bitsandbytes 0.50's QuantState.as_dict(packed=True) has it, whose dequantize_4bit gives the same."""
    codes, table = (
        RND.integers(0, 16, n * k).astype(np.uint8),
        np.sort(RND.normal(size=16)).astype(np.float32),
    )
    scales = RND.random(n * k // 64).astype(np.float32) + np.float32(0.1)
    told: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
    t = torch.from_numpy
    found = {"weight": t((codes[0::2] << 4 | codes[1::2])[:, None]), "weight.quant_map": t(table)}
    if nested:
        eight, of_eight = (
            RND.integers(0, 256, len(scales)).astype(np.uint8),
            RND.random(256).astype(np.float32),
        )
        second = RND.random(-(-len(scales) // 256)).astype(np.float32)
        scales = of_eight[eight] * np.repeat(second, 256)[: len(scales)] + np.float32(0.25)
        told |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        found |= {"weight.nested_absmax": t(second), "weight.nested_quant_map": t(of_eight)}
    found["weight.absmax"] = t(eight) if nested else t(scales)
    found["weight.quant_state.bitsandbytes__nf4"] = t(
        np.frombuffer(json.dumps(told).encode(), np.uint8).copy()
    )
    return found, (table[codes].reshape(-1, 64) * scales[:, None]).reshape(n, k)


def compressed(form: str, kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
        **more,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


CONFIGS = {
    "packed": compressed("pack-quantized", "int", 4, "group", group_size=64, symmetric=False),
    "packed symmetric": compressed("pack-quantized", "int", 4, "group", group_size=64),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"},
    "gptq act-order": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    "blocks": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "fp8 tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    "fp8 channel": compressed("float-quantized", "float", 8, "channel"),
    "int8": compressed("int-quantized", "int", 8, "channel"),
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 nested": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}


def published(directory: Path, how: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    """A tiny Llama's directory with its linear layers stored so. → its spec, and what they are."""
    make_model(directory, "llama", std=0.05, **SIZES)
    file = directory / "model.safetensors"
    plain, wanted = load_file(file), {}
    for name, weight in list(plain.items()):
        if "_proj" in name:
            stored, wide = tensors_of(how, *weight.shape, 64)
            del plain[name]
            plain |= {name.replace("weight", part): t.contiguous() for part, t in stored.items()}
            wanted[name] = torch.from_numpy(np.ascontiguousarray(wide, np.float32))
    save_file(plain, file)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIGS[how]}))
    return spec_of(resolve(str(directory))), wanted


@pytest.mark.parametrize("how", CONFIGS)
def test_reads_to_the_bit(how: str, tmp_path: Path) -> None:
    spec, wanted = published(tmp_path, how)
    checkpoint = open_checkpoint(resolve(str(tmp_path)), spec)
    checkpoint.verify()
    for name, wide in wanted.items():
        assert torch.equal(checkpoint.read(name).float(), wide), name
        rows, cols = range(3, 50), range(32, 160)
        part = checkpoint.read(name, rows, cols)
        assert torch.equal(part.float(), wide[3:50, 32:160]), name


@pytest.mark.parametrize(
    "how", [how for how in CONFIGS if how not in ("blocks", "gptq act-order") and how[0] != "n"]
)
@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp3"])
def test_ranks_hold_the_codes_themselves(how: str, layout: str, tmp_path: Path) -> None:
    """A KV group is 64 columns and the MLP five groups: ranks get unlike parts, and no code is made anew."""
    spec, wanted = published(tmp_path, how)
    checkpoint, kept = open_checkpoint(resolve(str(tmp_path)), spec), native(spec)
    assert kept.name == {"p": "int4", "g": "int4", "a": "int4", "f": "fp8", "i": "int8"}[how[0]]
    for shard in shard_replica(spec, ParallelDims.parse(layout), kept=kept):
        with torch.device("meta"):
            model = Transformer(tensor.local_spec(spec, shard))
        load(model, shard, spec, checkpoint, torch.device("cpu"), torch.float32, kept=kept)
        for to, parts in tensor.pieces(spec, shard).items():
            if "attention." not in to and "mlp." not in to:
                continue
            layer = model.get_submodule(to.removesuffix(".weight"))
            assert isinstance(layer, Quantized), to
            whole = [
                wanted[p.name][:, p.cols.start : p.cols.stop] if p.cols else wanted[p.name] for p in parts
            ]
            own = torch.cat(
                [w[p.rows.start : p.rows.stop] if p.rows else w for w, p in zip(whole, parts, strict=True)]
            )
            actual = layer.dequantized(slice(None)).float()
            if layer.scales.dtype == torch.float32:
                assert torch.equal(actual, own), to
            else:  # which rounds as the format's own arithmetic does
                assert torch.equal(actual, own.to(layer.scales.dtype).float()), to


@pytest.mark.parametrize("how", ["nf4 nested", "blocks"])
def test_what_is_widened_may_be_made_small_anew(how: str, tmp_path: Path) -> None:
    spec, wanted = published(tmp_path, how)
    (shard,) = shard_replica(spec, ParallelDims(), kept=FORMATS["int8"])
    with torch.device("meta"):
        model = Transformer(spec)
    checkpoint = open_checkpoint(resolve(str(tmp_path)), spec)
    load(model, shard, spec, checkpoint, torch.device("cpu"), torch.float32, None, FORMATS["int8"])
    down, wide = model.layers[0].mlp.down, wanted["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(down, Quantized)
    apart = (down.dequantized(slice(None)) - wide).abs().amax(1)
    assert (apart <= 0.51 * down.scales).all() and apart.max() > 0


def test_packing_is_undone() -> None:
    for bits in (4, 8):
        codes = torch.from_numpy(RND.integers(0, 1 << bits, (5, 37)).astype(np.uint8))
        assert torch.equal(unpacked(packed(codes, bits), bits)[:, :37], codes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "bitsandbytes' 8 bits are not read, its 4 bits are; use the bf16 weights",
        ),
        ({}, "quantized by no named method"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits is 3; it must be 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 12}, "group_size is 12"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ's gemv layout is not read, gemm is"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128"),
        (
            compressed("marlin-24", "int", 4, "group", group_size=128),
            "marlin-24, 4-bit int by group is not read",
        ),
        ({"quant_method": "compressed-tensors"}, "do not say how weights are stored; one way is read"),
        ([], "must be an object"),
    ],
)
def test_refuses_what_it_does_not_know(config: object, message: str, tmp_path: Path) -> None:
    make_model(tmp_path, "llama", **SIZES)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "quantization_config": config}))
    with pytest.raises(BadModel, match=message):
        spec_of(resolve(str(tmp_path)))


def test_a_mislabelled_checkpoint_is_found_before_it_is_loaded(tmp_path: Path) -> None:
    spec, _ = published(tmp_path, "packed")
    assert spec.published is not None
    wrong = replace(spec, published=replace(spec.published, group=128))
    with pytest.raises(
        BadModel, match=r"weight_scale is \[192, 3\] in the checkpoint, but \[192, 2\] by its config"
    ):
        open_checkpoint(resolve(str(tmp_path)), wrong).verify()


def test_zero_points_beside_a_config_without_any_are_refused(tmp_path: Path) -> None:
    """They would be left out: garbage, without a word."""
    spec, _ = published(tmp_path, "packed")
    assert spec.published is not None
    wrong = replace(spec, published=replace(spec.published, symmetric=True))
    with pytest.raises(
        BadModel, match=r"weight_zero_point, which symmetric weights.* take both from one release"
    ):
        open_checkpoint(resolve(str(tmp_path)), wrong).verify()


NF4_STATE = "quant_state.bitsandbytes__nf4"


def as_bytes(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def offset_nan(state: Tensor) -> Tensor:
    return as_bytes(bytes(state.tolist()).replace(b'"nested_offset": 0.25', b'"nested_offset": NaN'))


def restored(directory: Path, part: str, change: Callable[[Tensor], Tensor]) -> None:
    """With one layer's part of its checkpoint as `change` makes it."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.mlp.down_proj.{part}"
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file)


@pytest.mark.parametrize(
    ("how", "part", "change", "message"),
    [
        ("gptq", "g_idx", lambda x: x[:-8], r"g_idx is \[312\] in the checkpoint, but \[320\] by its config"),
        ("int8", "weight_scale", lambda x: x[1:], r"weight_scale is \[191, 1\] in the .*, but \[192, 1\]"),
        (
            "fp8 channel",
            "weight_scale",
            lambda x: x.T,
            r"weight_scale is \[1, 192\] in the .*, but \[192, 1\]",
        ),
        (
            "fp8 tensor",
            "weight_scale",
            lambda x: x.repeat(3),
            r"weight_scale is \[3\] in the .*, but \[192, 1\]",
        ),
        (
            "packed",
            "weight_scale",
            lambda x: x.to(torch.int32),
            "weight_scale is stored as I32; supported are",
        ),
        ("nf4 nested", "weight.absmax", lambda x: x.float(), "absmax is stored as F32; .*writes U8"),
        ("nf4", "weight.absmax", lambda x: x.to(torch.int8), "absmax is stored as I8; supported are F64"),
        ("nf4", "weight", lambda x: x.to(torch.int8), "down_proj.weight is stored as I8; .*writes U8"),
        (
            "nf4 nested",
            f"weight.{NF4_STATE}",
            lambda _: as_bytes(b'{"blocksize": 1e400}'),
            "is no quantization that",
        ),
        ("nf4 nested", f"weight.{NF4_STATE}", offset_nan, "is no quantization that"),
    ],
)
def test_scales_and_orders_of_another_shape_are_found_before_it_is_loaded(
    how: str, part: str, change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    spec, _ = published(tmp_path, how)
    restored(tmp_path, part, change)
    with pytest.raises(BadModel, match=message):
        open_checkpoint(resolve(str(tmp_path)), spec).verify()


def test_an_order_that_the_config_denies_is_told(tmp_path: Path) -> None:
    spec, _ = published(tmp_path, "gptq")
    restored(tmp_path, "g_idx", lambda x: x.flip(0))
    checkpoint = open_checkpoint(resolve(str(tmp_path)), spec)
    assert isinstance(checkpoint, PublishedCheckpoint)
    with pytest.raises(
        BadModel, match=r"down_proj.g_idx has an order of its own, but desc_act is false by its"
    ):
        checkpoint.codes("model.layers.1.mlp.down_proj.weight", range(192), range(320))
    restored(tmp_path, "g_idx", lambda x: x + 1)
    with pytest.raises(BadModel, match=r"g_idx names group 5, but there are 5, of 64 columns by its config"):
        open_checkpoint(resolve(str(tmp_path)), spec).read("model.layers.1.mlp.down_proj.weight")


def test_groups_that_no_rank_can_have_whole_are_told_as_several(tmp_path: Path) -> None:
    spec, _ = published(tmp_path, "packed")
    assert spec.published is not None
    for group in (96, 160):
        of = replace(spec, published=replace(spec.published, group=group))
        with pytest.raises(BadLayout) if group % 32 else nullcontext():
            shard_replica(of, ParallelDims(2), kept=FORMATS["int4"])


def test_quantize_writes_what_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "model", "llama", std=0.05, **SIZES)
    out = tmp_path / "made"
    asked = ["quantize", str(tmp_path / "model"), "--to", "int4", "-o", str(out), "--device", "cpu"]
    assert main(asked) == 0
    assert "in int4, groups of 64, to nearest" in capsys.readouterr().out
    spec = spec_of(resolve(str(out)))
    assert spec.published is not None
    assert (spec.published.group, spec.published.symmetric, native(spec).name) == (64, False, "int4")
    made, source = (
        open_checkpoint(resolve(str(d)), spec_of(resolve(str(d)))) for d in (out, tmp_path / "model")
    )
    assert isinstance(made, PublishedCheckpoint)
    made.verify()
    name = "model.layers.1.mlp.down_proj.weight"
    weight, back = source.read(name).clone(), made.read(name).clone()
    groups = weight.view(192, 5, 64)
    step = (groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)) / 15
    assert ((back - weight).abs().view(192, 5, 64) <= 0.55 * step[:, :, None]).all()
    assert main(asked) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["quantize", str(out), "--to", "int4", "-o", str(tmp_path / "again"), "--device", "cpu"]) == 2
    assert "in fewer bits already" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "model"]


def test_quantize_writes_float8_that_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the tensors of compressed-tensors' float-quantized: codes, and a scale a channel."""
    make_model(tmp_path / "model", "llama", std=0.05, **SIZES)
    out = tmp_path / "made"
    asked = ["quantize", str(tmp_path / "model"), "--to", "fp8", "-o", str(out), "--device", "cpu"]
    assert main([*asked, "--group", "64"]) == 2
    assert "--group 64 is of int4; fp8 has a scale a channel" in capsys.readouterr().err
    assert main(asked) == 0
    assert "in fp8, to nearest; " in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized"
    x = config["config_groups"]["group_0"]["input_activations"]
    assert (x["num_bits"], x["type"], x["strategy"], x["dynamic"]) == (8, "float", "token", True)
    tensors, plain = (load_file(d / "model.safetensors") for d in (out, tmp_path / "model"))
    name = "model.layers.1.mlp.down_proj.weight"
    codes, scales = tensors[name], tensors[f"{name}_scale"]
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == (192, 320)
    assert scales.dtype == torch.bfloat16 and scales.shape == (192, 1)
    assert ((codes.float() * scales.float() - plain[name]).abs() <= plain[name].abs() / 16 + 1e-5).all()
    assert tensors.keys() - plain.keys() == {f"{n}_scale" for n in plain if "_proj" in n}
    spec = spec_of(resolve(str(out)))
    made = open_checkpoint(resolve(str(out)), spec)
    made.verify()
    assert native(spec).name == "fp8"
    assert torch.equal(made.read(name).float(), codes.float() * scales.float())


def test_another_format_than_the_stored_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published(tmp_path, "awq")
    asked = ["generate", str(tmp_path), "--prompt", "a", "--device", "cpu", "--layout", "tp1+int8"]
    assert main(asked) == 2
    assert "is stored in int4 already; leave +int8 away" in capsys.readouterr().err
