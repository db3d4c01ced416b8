"""Four-bit codes: to nearest, and with error feedback."""

from __future__ import annotations

import pytest
import torch

from orchestrator.engine.gptq import to_nearest, with_feedback


def inputs(k: int, tokens: int = 512) -> torch.Tensor:
    """Correlated, some columns much larger than others, as a layer's are."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(k, k, generator=generator) / k**0.5
    return torch.randn(tokens, k, generator=generator) @ mix * torch.logspace(-1, 1, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_to_nearest_is_the_nearest_code(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    found = to_nearest(weight, 32, dtype)
    assert found.scales_NG.dtype == dtype
    scale = found.scales_NG.double().repeat_interleave(32, 1)
    point = found.zero_points_NG.double().repeat_interleave(32, 1)
    every = (torch.arange(16).double() - point[..., None]) * scale[..., None]
    distances = (every - weight.double()[..., None]).abs()
    chosen = distances.gather(2, found.codes_NK.long()[..., None]).squeeze(2)
    torch.testing.assert_close(chosen, distances.amin(2), rtol=0, atol=1e-6)
    assert found.codes_NK.view(8, 4, 32).amax(2).ge(14).all()  # the range is used


def test_a_group_of_one_sign_still_holds_zero() -> None:
    weight = torch.rand(4, 64) + 1
    found = to_nearest(weight, 32, torch.float32)
    assert (found.zero_points_NG == 0).all()
    torch.testing.assert_close(found.dequantized(), weight, rtol=0, atol=2 / 15)


def test_zeros_stay_zeros() -> None:
    assert not to_nearest(torch.zeros(4, 64), 32, torch.bfloat16).dequantized().any()
    hessian = inputs(64).T @ inputs(64)
    assert not with_feedback(torch.zeros(4, 64), hessian, 32, torch.bfloat16).dequantized().any()


def test_feedback_makes_the_products_error_much_smaller() -> None:
    x = inputs(256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))

    def error(wide: torch.Tensor) -> float:
        return ((x @ (wide - weight).T).norm() / (x @ weight.T).norm()).item()

    nearest = error(to_nearest(weight, 64, torch.bfloat16).dequantized())
    fed_back = error(with_feedback(weight, x.T @ x, 64, torch.bfloat16).dequantized())
    assert fed_back < 0.6 * nearest, (fed_back, nearest)


def test_columns_that_nothing_reads_are_rounded_to_nearest() -> None:
    x = inputs(64)
    x[:, 32:] = 0
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    found = with_feedback(weight, x.T @ x, 32, torch.float32)
    scale = found.scales_NG[:, 1:].repeat_interleave(32, 1)
    assert ((found.dequantized() - weight)[:, 32:].abs() <= 5.5 * scale).all()
    inside = (found.codes_NK[:, 32:] > 0) & (found.codes_NK[:, 32:] < 15)
    assert ((found.dequantized() - weight)[:, 32:].abs() <= 0.5001 * scale)[inside].all()
