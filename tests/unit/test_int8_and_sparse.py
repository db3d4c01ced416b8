"""int8 by int8, and 2:4 sparsity: their arithmetic, kernels interpreted, and ranks that hold slices of one model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cluster.errors import BadLayout
from orchestrator.engine import ops
from orchestrator.engine.checkpoint import DummyCheckpoint
from orchestrator.engine.kernels.activation import silu_mul, silu_mul_small
from orchestrator.engine.kernels.int8_products import int8_by_int8, takes_int8
from orchestrator.engine.kernels.norm import add_rms_norm
from orchestrator.engine.kernels.rounding import rounded
from orchestrator.engine.loader import load
from orchestrator.engine.model import Layer, Transformer
from orchestrator.engine.quantized import Quantized, QuantizedGateUp, round_on_the_way
from orchestrator.engine.small_rows import SmallRows
from orchestrator.engine.sparse import Sparse24, pruned
from strategies import tensor
from strategies.formats import FORMATS
from strategies.pipeline import shard_replica
from strategies.place import place
from strategies.plan import Layout, ParallelDims
from strategies.scheme import SPARSE24, W8A8, Scheme
from strategies.spec import ModelSpec
from tests.interpreted import *  # noqa: F403
from tests.unit.machines import LLAMA_8B, SMOL, box

CPU = torch.device("cpu")
SPEC = replace(SMOL, layers=1, vocab=64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def eight_bits(n: int, k: int, kind: type[Quantized] = Quantized) -> Quantized:
    made = kind((n, k), Scheme(W8A8), True, CPU, torch.float32)
    made.fill(0, randn(n, k), None)
    assert made.bias is not None
    made.bias.data.copy_(randn(n, seed=1))
    return made


def by_hand(x: Tensor, of: Quantized) -> Tensor:
    scales = x.abs().amax(1, keepdim=True) / 127
    whole = (x / scales).round().long() @ of.codes.long().T
    assert of.bias is not None
    return whole.double() * scales.double() * of.scales.double() + of.bias.double()


@pytest.mark.parametrize("rows", [1, 17])
def test_rows_in_int8_are_summed_exactly(rows: int) -> None:
    of, x = eight_bits(24, 576), randn(rows, 576, seed=2)
    torch.testing.assert_close(of(x).double(), by_hand(x, of), rtol=1e-6, atol=1e-6)
    assert takes_int8(x, of.codes) == (rows == 17)
    assert not takes_int8(randn(17, 570), eight_bits(24, 570).codes)


def test_the_kernels_do_the_same() -> None:
    of, x = eight_bits(24, 576), randn(19, 576, seed=2)
    x[3] = 0
    small = rounded(x, torch.int8)
    assert torch.equal(small.codes_MK, (x / small.scales_M[:, None]).round().to(torch.int8))
    actual = int8_by_int8(x, of.codes, of.scales, of.bias)
    torch.testing.assert_close(actual, of(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("small", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [576, 300])
def test_rows_are_rounded_on_the_way_as_they_are_later(small: torch.dtype, size: int) -> None:
    x, residual = randn(5, size).half(), randn(5, size, seed=1).half()
    weight, gate_up = randn(size, seed=2).half(), randn(5, 2 * size, seed=3).half()
    x[2] = residual[2] = gate_up[2] = 0
    later, total = add_rms_norm(x, residual.clone(), weight, 1e-5)
    on_the_way, carried = add_rms_norm(x, residual.clone(), weight, 1e-5, small)
    assert torch.equal(carried, total)
    for one, other in (
        (on_the_way, rounded(later, small)),
        (silu_mul_small(gate_up, small), rounded(silu_mul(gate_up), small)),
    ):
        assert isinstance(one, SmallRows)
        assert torch.equal(one.scales_M, other.scales_M)
        assert torch.equal(one.codes_MK.float(), other.codes_MK.float())
        assert one.dtype == torch.float16


def test_layers_hand_on_rows_that_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """From norm to product, and from gate and up to down; few rows as they are; the same numbers."""
    monkeypatch.setattr(ops, "has_kernels", lambda x: True)
    monkeypatch.setattr(ops, "overlaps", lambda x: False)
    layer = Layer(replace(SMOL, hidden=32, intermediate=48))
    torch.nn.init.ones_(layer.post_norm.weight)
    layer.mlp.gate_up = eight_bits(96, 32, QuantizedGateUp)
    layer.mlp.down = eight_bits(32, 48)

    def run(rows: int) -> tuple[list[type], Tensor]:
        kinds: list[type] = []
        hooks = [
            part.register_forward_pre_hook(lambda _, args: kinds.append(type(args[0])))
            for part in (layer.mlp.gate_up, layer.mlp.down)
        ]
        out = layer.mlp(layer.post_norm(randn(rows, 32, seed=5))[0])
        for hook in hooks:
            hook.remove()
        return kinds, out

    plain = {rows: run(rows) for rows in (16, 17)}
    round_on_the_way([layer])
    handed = {rows: run(rows) for rows in (16, 17)}
    assert [kinds for kinds, _ in plain.values()] == [[Tensor, Tensor]] * 2
    assert [kinds for kinds, _ in handed.values()] == [[Tensor, Tensor], [SmallRows, SmallRows]]
    assert all(torch.equal(handed[rows][1], plain[rows][1]) for rows in (16, 17))


def test_two_of_four_stay_and_they_are_the_largest() -> None:
    weight = torch.tensor([[1.0, -5.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 3.0]])
    assert pruned(weight).tolist() == [[0, -5, 2, 0, 0, 0, 0, 0, 3, 3, 0, 0]]
    many = pruned(randn(8, 64))
    assert (many.view(8, -1, 4).count_nonzero(2) == 2).all()


def ranks(spec: ModelSpec, kept: str, dims: ParallelDims) -> list[Transformer]:
    found = []
    for shard in shard_replica(spec, dims, kept=FORMATS[kept]):
        with torch.device("meta"):
            model = Transformer(tensor.local_spec(spec, shard), embed=shard.is_first, head=shard.is_last)
        load(model, shard, spec, DummyCheckpoint(spec), CPU, torch.float32, None, FORMATS[kept])
        found.append(model)
    return found


@pytest.mark.parametrize("kept", [SPARSE24, W8A8])
@pytest.mark.parametrize("tp", [2, 3])
def test_every_rank_has_a_slice_of_the_models_weights(kept: str, tp: int) -> None:
    (whole,) = ranks(SPEC, kept, ParallelDims())
    parts = ranks(SPEC, kept, ParallelDims(tp=tp))
    for name in ("attention.o", "mlp.down"):  # those that are split by columns
        layers = [model.layers[0].get_submodule(name) for model in (whole, *parts)]
        of_whole, *of_parts = [x.weight if isinstance(x, Sparse24) else x.codes for x in layers]
        assert torch.equal(torch.cat(of_parts, 1), of_whole)
    if kept == SPARSE24:
        dense = DummyCheckpoint(SPEC).read("model.layers.0.mlp.down_proj.weight")
        assert torch.equal(whole.layers[0].mlp.down.weight, pruned(dense.float()))
        x = randn(2, SPEC.hidden, seed=4)
        gate, up = torch.nn.functional.linear(x, whole.layers[0].mlp.gate_up.weight).chunk(2, 1)
        torch.testing.assert_close(whole.layers[0].mlp.gate_up(x), torch.nn.functional.silu(gate) * up)


def test_what_they_take_is_priced_where_they_take_it() -> None:
    on_gpu = place(LLAMA_8B, Layout.parse("tp1+sparse24"), "bfloat16", box("rtx-4090", 1))
    assert on_gpu.format.bytes_per_weight("bfloat16") == 1.125
    odd = replace(LLAMA_8B, head_dim=5, heads=2, kv_heads=2)
    with pytest.raises(BadLayout, match=r"\+sparse24 of .* rank 0 has columns 0 to 5 .* groups are 4"):
        shard_replica(odd, ParallelDims(tp=2), kept=FORMATS[SPARSE24])
