"""A KV cache in float8: what is kept and read, what it wants of a device, and its price."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster.errors import BadLayout
from orchestrator.engine.kv_cache import KVCache
from strategies.plan import Layout, ParallelDims
from strategies.planner import plan
from strategies.spec import Workload
from tests.unit.machines import LLAMA_8B, SMOL, box


def test_what_is_read_is_float8_and_nothing_becomes_nan() -> None:
    spec = replace(SMOL, layers=1)
    cache = KVCache(spec, 2, 4, torch.bfloat16, torch.device("cpu"), float8=True)
    new_TKD = torch.randn(3, spec.kv_heads, spec.head_dim).to(torch.bfloat16)
    new_TKD[0, 0, :2] = torch.tensor([1e4, -500.0])
    rows = torch.tensor([5, 0, 2])
    cache.write(0, rows, new_TKD, -new_TKD)
    expected = new_TKD.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(cache.read(cache.keys[0], rows), expected)
    assert torch.equal(cache.read(cache.values[0], rows), -expected)
    assert torch.equal(cache.read(cache.keys[0], slice(0, 1)), expected[1:2])
    assert cache.keys[0].nbytes == 12 * spec.kv_heads * spec.head_dim


def test_a_cache_in_float8_says_what_it_wants_and_halves_the_cache() -> None:
    layout = Layout.parse("tp1+kvfp8")
    workload = Workload(64, 16)
    (old,) = plan(LLAMA_8B, box("a100-80gb-pcie", 1), workload, "bfloat16", layouts=[layout]).candidates
    assert old.reason is not None and "+kvfp8 is read in float8, which the" in old.reason
    (new,) = plan(LLAMA_8B, box("rtx-4090", 1), workload, "bfloat16", layouts=[layout]).candidates
    (plain,) = plan(LLAMA_8B, box("rtx-4090", 1), workload, "bfloat16", layouts=[ParallelDims()]).candidates
    assert new.not_runnable is None and new.estimate is not None and plain.estimate is not None
    assert new.estimate.kv_tokens // 2 == pytest.approx(plain.estimate.kv_tokens, abs=1)
    with pytest.raises(BadLayout, match="it may have one, such as"):
        Layout.parse("tp1+int4+int8+kvfp8")
    assert Layout.parse("tp1+kvfp8+int4").name == "tp1+int4+kvfp8"
