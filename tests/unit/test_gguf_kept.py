"""A GGUF file's blocks stay codes in memory, to the bit, on every rank; what devices keep by themselves."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.errors import BadLayout
from launch.options import EngineOptions, add_engine_arguments, add_layout_arguments, engine_options
from orchestrator.engine.checkpoint import open_checkpoint
from orchestrator.engine.gguf_blocks import taken_apart
from orchestrator.engine.kernels.quantized import quantized
from orchestrator.engine.kernels.quantized_groups import groups_of_8
from orchestrator.engine.loader import load
from orchestrator.engine.model import Transformer
from orchestrator.engine.quantized import Quantized
from orchestrator.engine.stored import StoredCodes
from strategies import tensor
from strategies.formats import FORMATS
from strategies.gguf_kept import KEPT, together
from strategies.pipeline import shard_replica
from strategies.plan import Layout, ParallelDims
from strategies.planner import plan
from strategies.published import Published, Stored
from strategies.quantize import as_kept, kept_on
from strategies.scheme import GGUF, Scheme
from strategies.source import spec_of
from strategies.spec import ModelSpec, Workload
from strategies.ways_out import ways_out
from tests.interpreted import *  # noqa: F403
from tests.unit.machines import LLAMA_8B, box
from tests.unit.test_checkpoint import source_of
from tests.unit.test_gguf import WIDE, gguf_of, random_blocks

LINEARS = ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down")
CPU = torch.device("cpu")


def mixed(name: str) -> str:
    """As llama.cpp's Q4_K_M: some tensors of a product in more bits; one in full."""
    if ".v_proj." in name or ".down_proj." in name:
        return "Q6_K"
    if ".o_proj." in name:
        return "F16"
    return "Q4_K"


def loaded(spec: ModelSpec, file: Path, kept: str, dims: ParallelDims) -> list[Transformer]:
    checkpoint, ranks = open_checkpoint(source_of(file), spec), []
    for shard in shard_replica(spec, dims, kept=FORMATS[kept]):
        with torch.device("meta"):
            model = Transformer(tensor.local_spec(spec, shard), embed=shard.is_first, head=shard.is_last)
        load(model, shard, spec, checkpoint, CPU, torch.float32, None, FORMATS[kept])
        ranks.append(model)
    return ranks


def weights_of(layer: torch.nn.Module) -> Tensor:
    if isinstance(layer, Quantized):
        return layer.dequantized(slice(None))
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


@pytest.mark.parametrize("kind", ["Q4_1", mixed], ids=["Q4_1", "mixed"])
def test_every_rank_keeps_the_weights_that_gguf_itself_gives(
    kind: str | Callable[[str], str], tmp_path: Path
) -> None:
    wide = {
        **WIDE,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "intermediate_size": 768,
    }
    file, _ = gguf_of(tmp_path, "llama", kind, **wide)
    spec = spec_of(source_of(file))
    for dims in (ParallelDims(), ParallelDims(tp=2), ParallelDims(tp=3)):
        for small, plain in zip(loaded(spec, file, GGUF, dims), loaded(spec, file, "", dims), strict=True):
            for name in LINEARS:
                kept = small.layers[0].get_submodule(name)
                assert isinstance(kept, Quantized) == (kind != mixed or name != "attention.o")
                assert torch.equal(weights_of(kept), weights_of(plain.layers[0].get_submodule(name)))
    x = torch.randn(3, spec.hidden)
    given, expected = small.layers[0].mlp(x), plain.layers[0].mlp(x)
    assert (given - expected).norm() <= 2e-6 * expected.norm()  # sums in another order; terms cancel out


def blocks(kind: str, rows: int, columns: int) -> tuple[StoredCodes, Tensor]:
    """As a file has them, and what gguf makes of them."""
    quantization = gguf.GGMLQuantizationType[kind]
    if kind.endswith("K"):
        raw = random_blocks((rows, columns), quantization)
    else:
        values = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
        raw = gguf.quants.quantize(values, quantization)
    found = taken_apart(raw, kind, gguf.GGML_QUANT_SIZES[quantization][1])
    least = None if found.least_RG is None else torch.from_numpy(found.least_RG)
    stored = StoredCodes(torch.from_numpy(found.codes_RK), torch.from_numpy(found.scales_RG), None, least)
    return stored, torch.from_numpy(gguf.quants.dequantize(raw, quantization))


@pytest.mark.parametrize("kind", KEPT)
def test_gpus_keep_four_bits_where_there_are_four(kind: str) -> None:
    stored, wanted = blocks(kind, 6, 512)
    of = Quantized((6, 512), KEPT[kind], False, CPU, torch.bfloat16)
    of.put(0, stored)
    of.finish()
    assert torch.equal(of.dequantized(slice(None)), wanted)
    assert of.row_bytes == 512 * KEPT[kind].bytes_per_weight


@pytest.mark.parametrize("rows", [1, 2, 5, 30, 60, 128, 140])
@pytest.mark.parametrize(
    ("kind", "columns"), [("Q8_0", 768), ("Q8_0", 576), ("Q8_0", 1056), ("Q5_K", 768), ("Q6_K", 768)]
)
def test_kernels_of_eight_bits_in_groups(kind: str, columns: int, rows: int) -> None:
    stored, wanted = blocks(kind, 37, columns)
    of = Quantized((37, columns), KEPT[kind], True, CPU, torch.float32)
    of.put(0, stored)
    assert of.bias is not None
    of.bias.data.normal_()
    x = torch.randn(rows, columns)
    expected = x.double() @ wanted.double().T + of.bias.double()
    for actual in (groups_of_8(x, of.codes, of.scales, of.bias), of(x)):
        assert ((actual - expected).norm() / expected.norm()).item() < 2e-6


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_kernels_of_four_bits_read_zero_in_place_of_the_least(kind: str) -> None:
    stored, wanted = blocks(kind, 9, 512)
    of = Quantized((9, 512), KEPT[kind], False, CPU, torch.float32)
    of.put(0, stored)
    pairs = of.scales.data.clone()
    pairs[:, :, 1] += 8 * pairs[:, :, 0]  # as `finish` does on a GPU
    x = torch.randn(2, 512)
    expected = x.double() @ wanted.double().T
    actual = quantized(x, of.codes, pairs, None, 32)
    assert ((actual - expected).norm() / expected.norm()).item() < 2e-6


def test_rows_of_several_kinds_take_what_holds_them_all() -> None:
    assert together(["Q4_K", "Q4_K", "Q6_K"]) == Scheme(GGUF, 16, 8)
    assert together(["Q4_0", "Q8_0"]) == Scheme(GGUF, 32, 8, least=False, half=True)
    assert together(["Q4_K", "F16"]) is None


def options(model: Path, *flags: str) -> EngineOptions:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    add_layout_arguments(parser)
    return engine_options(parser.parse_args([str(model), "--device", "cpu", *flags]))


def test_a_cpu_widens_the_blocks_unless_they_are_named(tmp_path: Path) -> None:
    file, _ = gguf_of(tmp_path, "llama", "Q8_0", **WIDE)
    widened, named, anew = (
        options(file, *flags) for flags in ((), ("--layout", "tp1+gguf"), ("--layout", "tp1+int4"))
    )
    assert [(o.format, o.dtype) for o in (widened, named, anew)] == [
        ("", "float32"),
        (GGUF, "float32"),
        ("int4", "bfloat16"),
    ]


def test_a_gpu_is_planned_to_keep_them_at_their_bytes_where_they_are_named(tmp_path: Path) -> None:
    file, _ = gguf_of(tmp_path, "llama", mixed, **WIDE)
    spec = spec_of(source_of(file))
    q, kv, hidden, mlp = 256, 2 * 64, 256, 512
    assert spec.published is not None
    params = (q + 2 * kv) * hidden, hidden * q, 2 * mlp * hidden, hidden * mlp
    held = 1.5 * params[0] + 2 * params[1] + 0.75 * params[2] + 1.25 * params[3]
    assert spec.published.kept_bytes == pytest.approx(held / sum(params))
    workload, machine = Workload(64, 16), box("rtx-4090", 2)
    made = plan(spec, machine, workload, "bfloat16")
    assert {c.layout.format.name for c in made.candidates if c.not_runnable is None} == {""}
    named = Layout(ParallelDims(tp=2), as_kept(spec, FORMATS[GGUF]))
    (kept,) = plan(spec, machine, workload, "bfloat16", layouts=[named]).candidates
    assert kept.layout.name == "tp2+gguf"
    assert as_kept(spec, FORMATS[GGUF]).weight_bytes == spec.published.kept_bytes
    on_cpu = kept_on("cpu", spec).published
    assert on_cpu is not None and (on_cpu.format, on_cpu.kept_bytes > spec.published.kept_bytes) == ("", True)


def test_what_fits_only_in_its_own_blocks_is_told_how() -> None:
    stored = Published(Stored.GGUF, 0, format=GGUF, kept_bytes=0.63, kept_bytes_on_cpu=1.06)
    ways = ways_out(replace(LLAMA_8B, layers=70, published=stored), box("rtx-4090", 1), "bfloat16", 64)
    (own,) = (way for way in ways if "gguf" in way)
    assert own.startswith("Fewer bits: gguf (5 bits a weight")
    assert own.endswith("as --layout tp1+gguf; the file's own weights.")


def test_models_without_blocks_are_told_so(tmp_path: Path) -> None:
    with pytest.raises(BadLayout, match=r"\+gguf keeps the blocks of a GGUF file, and Llama-3.1-8B has none"):
        as_kept(LLAMA_8B, FORMATS[GGUF])
    file, _ = gguf_of(tmp_path, "llama", "F16", **WIDE)
    assert spec_of(source_of(file)).published is None


def test_groups_that_ranks_would_share_are_refused() -> None:
    odd = replace(LLAMA_8B, head_dim=48, heads=5, kv_heads=5)
    with pytest.raises(
        BadLayout, match=r"\+gguf of .* at tp=5: rank 0 has columns 0 to 48 of .* groups are 32"
    ):
        shard_replica(odd, ParallelDims(tp=5), kept=FORMATS[GGUF])
