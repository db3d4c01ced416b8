"""Codes of four bits and of float8: to nearest, and with error feedback."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch

from launch.models import resolve, spec_of
from orchestrator.engine import float8
from orchestrator.engine.calibrate import calibrated, prompt_context, rounded
from orchestrator.engine.checkpoint import open_checkpoint
from orchestrator.engine.gptq import to_nearest, with_feedback
from orchestrator.engine.loader import load
from orchestrator.engine.model import Transformer
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims
from strategies.quantize import LINEARS
from tests.tiny import make_model


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


def test_float8_to_nearest_is_torchs_rounding() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    found = float8.to_nearest(weight, torch.bfloat16)
    assert found.scales_NG.shape == (8, 1) and found.scales_NG.dtype == torch.bfloat16
    ratios = (weight / found.scales_NG.float()).clamp(-448, 448)
    assert torch.equal(found.codes_NK.float(), ratios.to(torch.float8_e4m3fn).float())
    assert (
        (found.dequantized() - weight).abs().le(weight.abs() / 16 + 1e-4).all()
    )  # three bits behind the first
    assert not found.dequantized()[3].any()


def test_feedback_makes_float8s_error_much_smaller() -> None:
    x = inputs(256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[5] = 0

    def error(wide: torch.Tensor) -> float:
        return ((x @ (wide - weight).T).norm() / (x @ weight.T).norm()).item()

    nearest = error(float8.to_nearest(weight, torch.bfloat16).dequantized())
    found = float8.with_feedback(weight, x.T @ x, torch.bfloat16)
    assert error(found.dequantized()) < 0.6 * nearest, (error(found.dequantized()), nearest)
    assert not found.dequantized()[5].any()
    assert found.codes_NK.dtype == torch.float8_e4m3fn and found.codes_NK.float().isfinite().all()


def test_the_column_that_weighs_most_chooses_float8s_scale() -> None:
    """Where the largest of a channel is 448, 232 lies half way between 224 and 240."""
    weight = torch.full((1, 32), 0.5)
    weight[0, 0], weight[0, 7] = 448, 232
    hessian = torch.eye(32)
    hessian[7, 7] = 1e6
    nearest = float8.to_nearest(weight, torch.float32)
    found = float8.with_feedback(weight, hessian, torch.float32)
    assert nearest.scales_NG.item() == 1
    assert (nearest.dequantized()[0, 7] - 232).abs() == 8
    assert (found.dequantized()[0, 7] - 232).abs() < 2


def test_columns_that_nothing_reads_are_rounded_to_nearest() -> None:
    x = inputs(64)
    x[:, 32:] = 0
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    found = with_feedback(weight, x.T @ x, 32, torch.float32)
    scale = found.scales_NG[:, 1:].repeat_interleave(32, 1)
    assert ((found.dequantized() - weight)[:, 32:].abs() <= 5.5 * scale).all()
    inside = (found.codes_NK[:, 32:] > 0) & (found.codes_NK[:, 32:] < 15)
    assert ((found.dequantized() - weight)[:, 32:].abs() <= 0.5001 * scale)[inside].all()


FOUR_BITS = {"group": 32, "dtype": torch.float32}
NEAREST = {
    "int4": partial(to_nearest, **FOUR_BITS),
    "fp8": partial(float8.to_nearest, dtype=torch.float32),
}
FEEDBACK = {
    "int4": partial(with_feedback, **FOUR_BITS),
    "fp8": partial(float8.with_feedback, dtype=torch.float32),
}


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_a_model_calibrated_on_a_text_is_nearer_to_itself(kind: str, tmp_path: Path) -> None:
    """Of a random Llama: the logits of tokens like those that it was calibrated on, beside plain rounding's."""
    make_model(tmp_path, "llama", std=0.1, hidden_size=128, intermediate_size=192, num_attention_heads=4)
    source = resolve(str(tmp_path))
    spec = spec_of(source)
    rnd = random.Random(0)
    windows = [[rnd.randrange(131) for _ in range(48)] for _ in range(24)]

    def logits(codes: str) -> torch.Tensor:
        (shard,) = shard_replica(spec, ParallelDims())
        with torch.device("meta"):
            model = Transformer(spec)
        load(model, shard, spec, open_checkpoint(source, spec), torch.device("cpu"), torch.float32)
        seen: list[tuple[int, str]] = []
        if codes == "rounded":
            for index, linear, found in rounded(model, NEAREST[kind], lambda done, total: None):
                model.layers[index].get_submodule(linear).get_parameter("weight").data.copy_(
                    found.dequantized()
                )
                seen.append((index, linear))
        if codes == "calibrated":
            told: list[tuple[int, int]] = []
            for index, linear, _ in calibrated(
                model, windows[1:], FEEDBACK[kind], lambda done, total: told.append((done, total))
            ):
                seen.append((index, linear))
            assert told == [(1, 3), (2, 3), (3, 3)]
        assert not codes or seen == [(i, linear) for i in range(3) for linear in LINEARS]
        with torch.no_grad():
            return model.logits(model(torch.tensor(windows[0]), prompt_context(model, 48)))

    wanted = logits("")
    error = {codes: (logits(codes) - wanted).norm().item() for codes in ("rounded", "calibrated")}
    assert error["calibrated"] < 0.85 * error["rounded"], error
