"""A CPU's linear layers, packed: torch's products by another order of summation, and no weight kept twice."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cluster import onednn
from cluster.discover import Cpu, cpu_topology
from orchestrator.engine.checkpoint import DummyCheckpoint
from orchestrator.engine.loader import load
from orchestrator.engine.model import GateUp, Linear, Transformer
from orchestrator.engine.offload import resident_bytes
from orchestrator.engine.packed import Packed, PackedGateUp, pack
from strategies.cost_memory import weight_bytes
from strategies.pipeline import shard_replica
from strategies.place import place
from strategies.plan import Layout, ParallelDims, Shard
from strategies.spec import ModelSpec
from strategies.tensor import local_spec
from tests.unit.machines import SMOL

pytestmark = pytest.mark.skipif(not onednn.has_packed(torch.float32), reason="torch is built without oneDNN")


def filled(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    layer.requires_grad_(False).to(dtype)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    return layer


@pytest.mark.parametrize("dtype", onednn.DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(96, 64), (37, 5), (1, 129), (576, 1536)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_torchs(n: int, k: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = filled(Linear(k, n, bias=bias), dtype)
    layer = Packed(linear)
    for rows in (0, 1, 2, 3, 17, 64):
        x = torch.randn(rows, 2 * k).to(dtype)[:, :k]  # rows that do not lie one behind the other
        exact = F.linear(
            x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
        )
        torch.testing.assert_close(
            layer(x).double(), exact, rtol=1e-2, atol=1e-4 if dtype.itemsize == 4 else 5e-2
        )


def test_gate_and_up_are_joined_by_silu() -> None:
    linear = filled(GateUp(24, 2 * 40, bias=False), torch.float32)
    x = torch.randn(3, 24)
    torch.testing.assert_close(PackedGateUp(linear)(x), linear(x))


TIED = replace(SMOL, layers=3, hidden=96, heads=6, kv_heads=3, head_dim=16, intermediate=160, vocab=131)
CPUS = cpu_topology(2, Cpu("Some CPU", cores=2, memory_bytes=1 << 34, free_bytes=1 << 33))


def loaded(spec: ModelSpec, shard: Shard) -> Transformer:
    with torch.device("meta"):
        model = Transformer(local_spec(spec, shard), embed=shard.is_first, head=shard.is_last)
    load(model, shard, spec, DummyCheckpoint(spec), torch.device("cpu"), torch.float32)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2"])
def test_a_plan_reckons_with_what_ranks_hold(layout: str, tied: bool) -> None:
    """A tied head's packed copy too."""
    spec = replace(TIED, tied=tied)
    placement = place(spec, Layout.parse(layout), "float32", CPUS)
    for rank, shard in enumerate(shard_replica(spec, ParallelDims.parse(layout))):
        model = loaded(spec, shard)
        pack(model, ())
        assert resident_bytes(model) == weight_bytes(placement, rank)


def test_no_weight_is_kept_twice_but_a_tied_heads() -> None:
    (shard,) = shard_replica(TIED, ParallelDims.parse("tp1"))
    model = loaded(TIED, shard)
    plain = {name: weakref.ref(p) for name, p in model.named_parameters() if p.dim() == 2}
    pack(model, ())
    gc.collect()
    assert [name for name, weight in plain.items() if weight() is not None] == ["embed.weight"]


def test_layers_that_are_streamed_stay_as_they_lie() -> None:
    (shard,) = shard_replica(TIED, ParallelDims.parse("tp1"))
    model = loaded(TIED, shard)
    pack(model, (1,))
    assert [isinstance(layer.mlp.down, Packed) for layer in model.layers] == [True, False, True]
    assert isinstance(model.head, Packed)
    assert isinstance(model.layers[0].mlp.gate_up, PackedGateUp)


def test_float16_and_float64_stay_torchs() -> None:
    for dtype in (torch.float16, torch.float64):
        model = nn.ModuleDict({"head": filled(Linear(8, 8), dtype)})
        pack(model, ())
        assert type(model["head"]) is Linear
