"""Triton kernels against plain torch, run by Triton's interpreter: no GPU, small shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orchestrator.engine.kernels import gated as gated_module
from orchestrator.engine.kernels import gemv as gemv_module
from orchestrator.engine.kernels.activation import silu_mul
from orchestrator.engine.kernels.argmax import PART, argmax
from orchestrator.engine.kernels.gated import gated_many
from orchestrator.engine.kernels.gemv import MAX_ROWS, Tile, choose_tile, gate_up, gemv
from orchestrator.engine.kernels.norm import FEW_TOKENS, add_rms_norm
from orchestrator.engine.kernels.rope import rope_and_cache
from tests.interpreted import *  # noqa: F403

DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype and shape, and values up to the dtype's rounding."""
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """With the rounding of transformers: the weight multiplies after it."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotated(x_THD: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    """In float32, rounded once."""
    first, second = x_THD.float().chunk(2, dim=-1)
    halves = (first * cos_T1P - second * sin_T1P, second * cos_T1P + first * sin_T1P)
    return torch.cat(halves, dim=-1).to(x_THD.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (3, 576), (5, 37), (FEW_TOKENS + 1, 48)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_rms_norm(dtype: torch.dtype, tokens: int, size: int, with_residual: bool) -> None:
    x, weight = randn(tokens, size, dtype=dtype), randn(size, dtype=dtype, seed=1)
    residual = randn(tokens, size, dtype=dtype, seed=2) if with_residual else None
    total = x if residual is None else x + residual
    normed, carried = add_rms_norm(x, residual, weight, 1e-5)
    assert carried is (x if residual is None else residual)
    assert torch.equal(carried, total)
    assert_near(normed, rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (4, 4, 16), (8, 1, 24)],  # SmolLM2's groups of three; no groups; an uneven half
)
@pytest.mark.parametrize("with_norm", [True, False])
def test_rope_and_cache(
    dtype: torch.dtype, index_dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, with_norm: bool
) -> None:
    tokens, eps, scale = 3, 1e-6, 1.25
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    positions = torch.tensor([0, 7, 131_071], dtype=index_dtype)
    rows = torch.tensor([4, 0, 6], dtype=index_dtype)
    frequencies = 1e4 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    keys, values = torch.full((2, 8, kv_heads, head_dim), -9.0, dtype=dtype)
    q_norm, k_norm = (randn(head_dim, dtype=dtype, seed=s) for s in (1, 2)) if with_norm else (None, None)
    q, k, v = qkv.clone().view(tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    angles = (positions.float()[:, None] * frequencies)[:, None]
    cos, sin = angles.cos() * scale, angles.sin() * scale

    rope_and_cache(
        qkv, positions, rows, frequencies, scale, keys, values,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, q_norm=q_norm, k_norm=k_norm, eps=eps,
    )  # fmt: skip

    assert_near(qkv.view(tokens, -1, head_dim)[:, :heads], rotated(q, cos, sin))
    assert_near(keys[rows.long()], rotated(k, cos, sin))
    assert torch.equal(values[rows.long()], v)
    untouched = [row for row in range(8) if row not in rows]
    assert (keys[untouched] == -9).all()
    assert (values[untouched] == -9).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows"), [(1, 3072), (3, 130), (2, 2)])
def test_silu_mul(dtype: torch.dtype, tokens: int, rows: int) -> None:
    gate_up_TN = randn(tokens, rows, dtype=dtype)
    gate, up = gate_up_TN.float().chunk(2, dim=-1)
    assert_near(silu_mul(gate_up_TN), (torch.nn.functional.silu(gate) * up).to(dtype))


def test_gated_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a program, ragged at all sides, groups of two row tiles of which the last has one."""
    for name, size in {"ROWS": 32, "COLUMNS": 32, "DEPTH": 64, "GROUP": 2}.items():
        monkeypatch.setattr(gated_module, name, size)
    x = randn(70, 200, dtype=torch.float16)
    weight = randn(2 * 72, 200, dtype=torch.float16, seed=1) / 200**0.5
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=-1)
    assert_near(gated_many(x, weight), (torch.nn.functional.silu(gate) * up).half())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", range(1, MAX_ROWS + 1))
@pytest.mark.parametrize(
    ("n", "k"), [(34, 576), (6, 1536), (7, 4096 + 24), (33, 37)]
)  # the columns of SmolLM2's qkv and down; several tiles with a ragged last; nothing even
def test_gemv(dtype: torch.dtype, b: int, n: int, k: int) -> None:
    x, weight = randn(b, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1) / k**0.5
    bias = randn(n, dtype=dtype, seed=2) if b % 2 else None
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    assert_near(gemv(x, weight, bias), expected.to(dtype))


def test_gemv_writes_where_it_is_told_in_that_dtype() -> None:
    x, weight = randn(2, 64, dtype=torch.float16), randn(9, 64, dtype=torch.float16, seed=1)
    out = torch.full((2, 9), -9.0)
    assert gemv(x, weight, out=out) is out
    assert_near(out, torch.nn.functional.linear(x.float(), weight.float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [1, MAX_ROWS])
@pytest.mark.parametrize(("n", "k"), [(38, 576), (10, 2056)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gate_up(dtype: torch.dtype, b: int, n: int, k: int, with_bias: bool) -> None:
    x, weight = randn(b, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1) / k**0.5
    bias = randn(n, dtype=dtype, seed=2) if with_bias else None
    product = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    gate, up = product.chunk(2, dim=-1)
    assert_near(gate_up(x, weight, bias), (torch.nn.functional.silu(gate) * up).to(dtype))


@pytest.mark.parametrize("tile", [Tile(1, 256, 4), Tile(4, 64, 2), Tile(8, 128, 8)])
def test_every_tile_gives_the_same_product(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv_module, "choose_tile", lambda *_: tile)
    x, weight = randn(2, 200, dtype=torch.float32), randn(21, 200, dtype=torch.float32, seed=1)
    assert_near(gemv(x, weight), x @ weight.T)


def test_a_tile_fits_the_matrix_and_a_gate_row_has_its_up_row() -> None:
    for k in (37, 576, 1536, 4096, 7168, 14336):
        for itemsize in (2, 4):
            tile = choose_tile(k, itemsize)
            assert tile.rows % 2 == 0
            assert tile.columns < 2 * k
            assert tile.columns & (tile.columns - 1) == 0


def test_tiles_that_were_measured() -> None:
    assert choose_tile(2048, 2) == Tile(4, 1024, 4)
    assert choose_tile(4096, 2) == Tile(4, 2048, 8)
    assert choose_tile(7168, 2) == choose_tile(14336, 2) == Tile(2, 4096, 8)
    assert choose_tile(4096, 4) == Tile(4, 1024, 8)  # as many bytes a thread


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (4, PART), (3, 2 * PART + 17)])
def test_argmax(dtype: torch.dtype, rows: int, vocab: int) -> None:
    logits = randn(rows, vocab, dtype=dtype)
    indices = argmax(logits)
    assert indices.dtype == torch.int64
    assert indices.tolist() == logits.double().argmax(dim=-1).tolist()


def test_argmax_takes_the_lowest_of_equals_and_stays_in_the_vocabulary() -> None:
    vocab = 2 * PART + 17
    logits = torch.full((4, vocab), -1.0)
    logits[0, [PART - 1, PART, vocab - 1]] = 2.0  # ties within a part and across parts
    logits[0, 3] = float("nan")
    logits[1] = float("-inf")
    logits[2] = float("nan")
    logits[3, vocab - 1] = float("inf")
    assert argmax(logits).tolist() == [PART - 1, 0, 0, vocab - 1]
