"""Kernels of small weights, compiled, at real sizes: every way that rows may go, against float64."""

from __future__ import annotations

import pytest
import torch

from orchestrator.engine.kernels import quantized as kernels
from orchestrator.engine.quantized import Quantized
from strategies.scheme import Scheme

SCHEMES = [Scheme("int8"), Scheme("fp8"), Scheme("int4", 128), Scheme("int4", 64), Scheme("int4", 32)]
ROWS = (1, kernels.MAX_ROWS, kernels.MAX_ROWS + 1, 17, 40, kernels.MIDDLE_ROWS, kernels.MIDDLE_ROWS + 1, 1000)


@pytest.mark.gpu
@pytest.mark.parametrize("how", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 14336), (960, 576)], ids=str)
@torch.no_grad()
def test_products(how: Scheme, shape: tuple[int, int]) -> None:
    n, k = shape
    if how.group and k % how.group:
        pytest.skip(f"groups of {how.group} do not divide {k}")
    if how.format == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply float8")
    torch.manual_seed(0)
    layer = Quantized((n, k), how, True, torch.device("cuda"), torch.bfloat16)
    layer.fill(0, torch.randn(n, k, device="cuda").to(torch.bfloat16), None)
    assert layer.bias is not None
    layer.bias.data.normal_()
    wide = layer.dequantized(slice(None)).double()
    if not how.group:
        wide = layer.codes.double() * layer.scales.double()[:, None]
    for rows in ROWS:
        x = torch.randn(rows, k, device="cuda").to(torch.bfloat16)
        expected = x.double() @ wide.T + layer.bias.double()
        error = ((layer(x).double() - expected).norm() / expected.norm()).item()
        # x is rounded to float8 too where many rows are multiplied in it.
        assert error < (5e-2 if how.format == "fp8" and rows > kernels.FLOAT8_ROWS else 5e-3), rows
