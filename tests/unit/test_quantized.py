"""Small weights: their arithmetic against plain numpy, a rank's slice of them against the whole, and their products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import BadLayout
from orchestrator.engine import cpu_products
from orchestrator.engine.checkpoint import DummyCheckpoint
from orchestrator.engine.loader import load
from orchestrator.engine.model import Transformer
from orchestrator.engine.quantized import FLOAT8_ROWS, Quantized, dequantize, pack, unpack
from strategies.formats import FORMATS
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims
from strategies.quantize import mlp_unit, scheme
from strategies.scheme import Scheme
from strategies.spec import ModelSpec
from strategies.tensor import local_spec
from tests.unit.machines import LLAMA_8B

INT8, FP8 = Scheme("int8"), Scheme("fp8")
Floats = NDArray[np.float32]


def small_spec(**sizes: int) -> ModelSpec:
    return replace(LLAMA_8B, name="small", dtype="float32", **sizes)  # type: ignore[arg-type]


def weights(n: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn((n, k), generator=torch.Generator().manual_seed(n * k)) * 0.02
    made[0], made[-1] = 0.0, 0.25  # no range at all; and one that is not about zero
    return made.to(dtype)


def quantized(weight_NK: Tensor, how: Scheme, cols: range | None = None) -> Quantized:
    k = weight_NK.shape[1] if cols is None else len(cols)
    layer = Quantized((len(weight_NK), k), how, False, weight_NK.device, weight_NK.dtype)
    for start in range(0, len(weight_NK), 5):  # as a loader's chunks
        layer.fill(start, weight_NK[start : start + 5], cols)
    return layer


def rounded(values: Floats, dtype: torch.dtype) -> Floats:
    return torch.from_numpy(values).to(dtype).float().numpy()


def int8_by_numpy(weight: Floats, dtype: torch.dtype) -> tuple[NDArray[Any], Floats]:
    """Codes, and what they come to before it is rounded."""
    scales = rounded(np.abs(weight).max(1) / np.float32(127), dtype)
    scales[scales == 0] = 1
    codes = np.clip(np.rint(weight / scales[:, None]), -127, 127)
    return codes.astype(np.int8), (codes * scales[:, None]).astype(np.float32)


def int4_by_numpy(weight: Floats, group: int, dtype: torch.dtype) -> tuple[NDArray[Any], Floats]:
    groups = weight.reshape(len(weight), -1, group)
    least, most = groups.min(2), groups.max(2)
    scales = rounded((most - least) / np.float32(15), dtype)
    scales[scales == 0] = 1
    zeros = rounded(least + 8 * scales, dtype)
    codes = np.clip(np.rint((groups - zeros[..., None]) / scales[..., None]) + 8, 0, 15)
    made = (codes.astype(np.float32) - 8) * scales[..., None] + zeros[..., None]
    return codes.astype(np.uint8).reshape(weight.shape), made.reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_bit_exact(dtype: torch.dtype) -> None:
    weight = weights(23, 96, dtype)
    layer = quantized(weight, INT8)
    codes, made = int8_by_numpy(weight.float().numpy(), dtype)
    assert np.array_equal(layer.codes.numpy(), codes)
    assert torch.equal(layer.dequantized(slice(None)), torch.from_numpy(made).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_is_bit_exact(dtype: torch.dtype, group: int) -> None:
    weight = weights(23, 3 * group, dtype)
    layer = quantized(weight, Scheme("int4", group))
    codes, made = int4_by_numpy(weight.float().numpy(), group, dtype)
    assert layer.codes.nbytes == codes.size // 2
    assert np.array_equal(unpack(layer.codes, group).numpy(), codes)
    assert torch.equal(layer.dequantized(slice(None)), torch.from_numpy(made).to(dtype))


def test_fp8_is_what_torch_rounds_to() -> None:
    weight = weights(7, 64)
    layer = quantized(weight, FP8)
    scales = weight.abs().amax(1) / 448
    scales[scales == 0] = 1
    expected = (weight / scales[:, None]).to(torch.float8_e4m3fn)
    assert torch.equal(layer.codes.view(torch.uint8), expected.view(torch.uint8))


def test_many_rows_are_multiplied_in_float8_too_as_a_gpu_does() -> None:
    """In float64, of what torch rounds x and the weights to; of few rows, of x itself. Shapes that GPUs do not take
    so, and other dtypes, are widened."""
    layer = quantized(weights(32, 96, torch.bfloat16), FP8)
    codes, scales = layer.codes.double(), layer.scales.double()
    x = torch.randn((FLOAT8_ROWS + 1, 96), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[1] = 0
    of_row = (x.float().abs().amax(1, keepdim=True) / 448).clamp(min=1e-12)
    small = (x.float() / of_row).to(torch.float8_e4m3fn).double()
    in_float8 = (small @ codes.T) * of_row.double() * scales
    wide = x.double() @ codes.T * scales
    assert (in_float8 - wide).norm() > 0.01 * wide.norm()
    torch.testing.assert_close(layer(x).double(), in_float8, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(layer(x[1:]).double(), wide[1:], rtol=2**-6, atol=1e-3)
    torch.testing.assert_close(layer(x.float()).double(), wide, rtol=1e-5, atol=1e-3)
    odd = quantized(weights(33, 96, torch.bfloat16), FP8)
    wide = x.double() @ odd.codes.double().T * odd.scales.double()
    torch.testing.assert_close(odd(x).double(), wide, rtol=2**-6, atol=1e-2)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_packed_codes_come_back_and_a_word_has_a_column_of_each_eighth(group: int) -> None:
    codes = torch.randint(0, 16, (3, 2 * group), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, group)
    assert torch.equal(unpack(packed, group), codes)
    words = packed.contiguous().view(torch.int32)
    eighth = group // 8
    for plane in range(8):
        got = (words[:, eighth : 2 * eighth] >> (4 * plane)) & 15  # of the second group
        assert torch.equal(got, codes[:, group + plane * eighth :][:, :eighth].int())


def test_int4_errs_less_than_half_a_step_and_symmetric_groups_would_err_more() -> None:
    weight = torch.randn((64, 1024), generator=torch.Generator().manual_seed(0))
    layer = quantized(weight, Scheme("int4", 128))
    error = (layer.dequantized(slice(None)) - weight).reshape(64, 8, 128)
    assert (error.abs() <= 0.5001 * layer.scales[:, :, :1]).all()
    groups = weight.view(64, 8, 128)
    scale = groups.abs().amax(2, keepdim=True) / 7
    symmetric = (groups / scale).round() * scale - groups
    assert error.norm() < 0.95 * symmetric.norm()


@pytest.mark.parametrize("how", [INT8, FP8, Scheme("int4", 64)])
def test_a_ranks_columns_are_a_slice_of_the_whole(how: Scheme) -> None:
    weight = weights(12, 384)
    whole = quantized(weight, how).dequantized(slice(None))
    for cols in (range(0, 128), range(128, 320), range(320, 384)):
        # A channel's scale needs the whole row; groups need no more than their own columns.
        part = (
            quantized(weight[:, cols.start : cols.stop], how) if how.group else quantized(weight, how, cols)
        )
        assert torch.equal(part.dequantized(slice(None)), whole[:, cols.start : cols.stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [INT8, Scheme("int4", 64), Scheme("int4", 32)])
@pytest.mark.parametrize("rows", [1, 3, cpu_products.INT8_MOST_ROWS + 1])
@pytest.mark.parametrize("channels", [96, 37, 528])
def test_products_are_those_of_the_weights_widened(
    dtype: torch.dtype, how: Scheme, rows: int, channels: int
) -> None:
    """By torch's kernels in bfloat16, in blocks otherwise; 37 channels are too odd for the former."""
    weight = weights(channels, 192, dtype)
    layer = quantized(weight, how)
    expected_weight = dequantize(layer.codes, layer.scales, how).double()
    if not how.group:
        expected_weight = layer.codes.double() * layer.scales.double()[:, None]
    x = torch.randn((rows, 192), generator=torch.Generator().manual_seed(1)).to(dtype)
    layer.finish()
    if dtype == torch.bfloat16 and how.group:
        assert layer.packed == (channels % 16 == 0)
    expected = x.double() @ expected_weight.T
    distance = ((layer(x).double() - expected).norm() / expected.norm()).item()
    assert distance < (1e-6 if dtype == torch.float32 else 4e-3)


def loaded(spec: ModelSpec, layout: str, kept: str, dtype: torch.dtype = torch.float32) -> list[Transformer]:
    dims = ParallelDims.parse(layout)
    made = []
    for shard in shard_replica(spec, dims, kept=FORMATS[kept]):
        with torch.device("meta"):
            model = Transformer(local_spec(spec, shard), embed=shard.is_first, head=shard.is_last)
        load(model, shard, spec, DummyCheckpoint(spec), torch.device("cpu"), dtype, None, FORMATS[kept])
        made.append(model)
    return made


@pytest.mark.parametrize("kept", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("layout", ["tp2", "tp3", "pp2", "tp2pp2"])
def test_ranks_hold_slices_of_one_processs_weights(kept: str, layout: str) -> None:
    """Uneven too: 9 heads in 3 KV groups of 192 columns, and an MLP of 5 groups of 64."""
    spec = small_spec(hidden=192, heads=9, kv_heads=3, head_dim=64, intermediate=320, layers=3, vocab=131)
    dims = ParallelDims.parse(layout)
    (whole,) = loaded(spec, "tp1", kept)
    parts = loaded(spec, layout, kept)
    for shard, part in zip(shard_replica(spec, dims, kept=FORMATS[kept]), parts, strict=True):
        if kept == "int4":
            assert shard.mlp.start % 64 == shard.mlp.stop % 64 == 0
        for local, layer in enumerate(shard.layers):
            mine, theirs = (m.layers[i].mlp for m, i in ((part, local), (whole, layer)))  # type: ignore[union-attr]
            down = theirs.down.dequantized(slice(None))[:, shard.mlp.start : shard.mlp.stop]  # type: ignore[union-attr]
            assert torch.equal(mine.down.dequantized(slice(None)), down)  # type: ignore[union-attr]
            gate_up = theirs.gate_up.dequantized(slice(None))  # type: ignore[union-attr]
            rows = [*shard.mlp, *(r + spec.intermediate for r in shard.mlp)]
            assert torch.equal(mine.gate_up.dequantized(slice(None)), gate_up[rows])  # type: ignore[union-attr]


@pytest.mark.parametrize("kept", ["int8", "int4"])
def test_what_is_held_is_what_the_planner_assumes(kept: str) -> None:
    """Of layers, in groups of 128; norms and int8's scales make the difference."""
    spec = small_spec(hidden=1024, heads=8, kv_heads=2, head_dim=128, intermediate=2048, layers=2, vocab=64)
    (model,) = loaded(spec, "tp1", kept, torch.bfloat16)
    held = sum(p.nbytes for p in model.layers.parameters())
    assumed = spec.layers * spec.layer_params * FORMATS[kept].bytes_per_weight("bfloat16")
    assert held == pytest.approx(assumed, rel=0.003)


def test_groups_are_the_largest_that_divide_a_ranks_columns() -> None:
    spec = small_spec(hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536, layers=1, vocab=64)
    found = {
        name: scheme(spec, FORMATS["int4"], f"layers.0.{name}.weight")
        for name in ("attention.qkv", "attention.o", "mlp.down")
    }
    assert [how and how.group for how in found.values()] == [64, 64, 128]
    assert scheme(spec, FORMATS["int4"], "head.weight") is None
    assert scheme(spec, FORMATS["int4"], "layers.0.input_norm.weight") is None
    assert mlp_unit(spec, FORMATS["int4"]) == 128
    assert mlp_unit(spec, FORMATS["int8"]) == 1


def test_columns_that_no_group_divides_are_refused() -> None:
    spec = small_spec(hidden=72, heads=9, kv_heads=3, head_dim=8, intermediate=96, layers=1, vocab=64)
    with pytest.raises(
        BadLayout, match=r"int4 needs groups of 128, 64, 32 columns; .* 24 columns of a KV group"
    ):
        shard_replica(spec, ParallelDims(), kept=FORMATS["int4"])


def test_a_kv_head_over_ranks_that_cut_groups_is_refused() -> None:
    spec = small_spec(hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=256, layers=1, vocab=64)
    shard_replica(spec, ParallelDims(tp=2), kept=FORMATS["int4"])
    with pytest.raises(
        BadLayout, match=r"tp=4: rank 0 has columns 0 to 64 .* groups are 128; use tp2 or less"
    ):
        shard_replica(spec, ParallelDims(tp=4), kept=FORMATS["int4"])
