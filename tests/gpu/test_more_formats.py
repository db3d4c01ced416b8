"""GGUF's blocks, int8 by int8, 2:4 sparsity and a cache in float8, compiled, at real sizes, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.engine.quantized import Quantized
from orchestrator.engine.sparse import Sparse24, pruned
from orchestrator.engine.stored import StoredCodes
from strategies.gguf_kept import KEPT
from strategies.scheme import SPARSE24, W8A8, Scheme

pytestmark = pytest.mark.gpu
ROWS = (1, 2, 3, 16, 17, 40, 128, 129, 1000)
SHAPES = [(6144, 4096), (4096, 14336)]
GPU = "cuda"


def worst(layer: Any, wide: Tensor, k: int) -> float:
    """The largest relative error over all numbers of rows."""
    found = []
    for rows in ROWS:
        x = torch.randn(rows, k, device=GPU).to(torch.bfloat16)
        expected = x.double() @ wide.T
        found.append(((layer(x).double() - expected).norm() / expected.norm()).item())
    return max(found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q8_0", "Q5_K", "Q6_K"])
@torch.no_grad()
def test_blocks_of_a_gguf_file(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    how, (n, k) = KEPT[kind], shape
    low, high = (0, 16) if how.bits == 4 and how.least else (-8, 8) if how.bits == 4 else (-32, 32)
    codes = torch.randint(low, high, (n, k), dtype=torch.int8)
    scales = (torch.rand(n, k // how.group) * 0.01).half().float()
    least = -8 * scales if how.least else None
    stored = StoredCodes(codes, scales, None, least)
    layer = Quantized((n, k), how, False, torch.device(GPU), torch.bfloat16)
    layer.put(0, stored)
    layer.finish()
    assert worst(layer, stored.dequantized().to(GPU).double(), k) < 5e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_int8_by_int8(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    n, k = shape
    layer = Quantized((n, k), Scheme(W8A8), False, torch.device(GPU), torch.bfloat16)
    layer.fill(0, torch.randn(n, k, device=GPU), None)
    on_cpu = Quantized((n, k), Scheme(W8A8), False, torch.device("cpu"), torch.bfloat16)
    on_cpu.load_state_dict(layer.state_dict())
    x = torch.randn(20, k).to(torch.bfloat16)
    torch.testing.assert_close(layer(x.to(GPU)).cpu(), on_cpu(x), rtol=1e-2, atol=1e-2)
    assert worst(layer, layer.codes.double() * layer.scales.double()[:, None], k) < 2e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_two_of_four(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    n, k = shape
    layer = Sparse24((n, k), Scheme(SPARSE24, 4), False, torch.device(GPU), torch.bfloat16)
    weight = torch.randn(n, k, device=GPU).to(torch.bfloat16)
    layer.fill(0, weight, None)
    layer.finish()
    assert sum(p.nbytes for p in layer.parameters()) < 0.6 * weight.nbytes
    assert worst(layer, pruned(weight.float()).double(), k) < 5e-3


@torch.no_grad()
def test_attention_over_a_cache_in_float8() -> None:
    from orchestrator.engine.kernels.attention import decode_attention, prefill_attention

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not convert float8")
    torch.manual_seed(0)
    heads, kv_heads, dim, length, block = 32, 8, 128, 1000, 16
    blocks = -(-length // block)
    tables = torch.randperm(blocks, device=GPU).to(torch.int32)[None]
    keys, values = (
        torch.randn(blocks * block, kv_heads, dim, device=GPU).to(torch.float8_e4m3fn) for _ in range(2)
    )
    place = torch.arange(length, device=GPU)
    rows = tables[0, place // block].long() * block + place % block
    k, v = (
        x[rows].double().transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
        for x in (keys.float(), values.float())
    )
    q = torch.randn(length, heads, dim, device=GPU).to(torch.bfloat16)
    expected = F.scaled_dot_product_attention(q.double().transpose(0, 1), k, v, is_causal=True).transpose(
        0, 1
    )
    common: dict[str, Any] = {"block_size": block, "scale": dim**-0.5, "window": None}
    zero = torch.zeros(1, dtype=torch.int32, device=GPU)
    ends = torch.tensor([0, length], dtype=torch.int32, device=GPU)
    prompt = prefill_attention(q, keys, values, tables, zero, zero, ends, longest=length, **common)
    assert ((prompt.double() - expected).norm() / expected.norm()).item() < 1e-2
    last = zero + length - 1
    for splits in (1, 8):
        one = decode_attention(q[-1:].contiguous(), keys, values, tables, zero, last, splits=splits, **common)
        assert ((one.double() - expected[-1:]).norm() / expected[-1:].norm()).item() < 1e-2
