"""What offload_bench.py makes of its measurements, and what the plan says of two that were taken."""

from __future__ import annotations

import pytest

from launch.memory import capped
from launch.options import EngineOptions
from strategies.plan import Layout
from strategies.read_spec import builtin
from strategies.source import ModelSource, SourceKind
from tests.bench.offload_bench import Measured, Timed, predicted, residents
from tests.unit.machines import box, with_links

HOST = {"bytes_per_s": 29e9, "latency_s": 15e-6}  # sums between cards without peer access, as NCCL does them


def test_a_loads_rates() -> None:
    one, many = (
        Timed(1, 0.25, 1),
        Timed(32, 0.5, 2),
    )  # groups of 16 take turns: each step brings the layers anew
    found = Measured(52e9, 64, 38, 12_500_000_000, 22.0, 0, (one, many))
    assert found.bytes_per_s(0) == found.bytes_per_s(1) == 50e9
    assert (one.tokens_per_s, many.tokens_per_s) == (4, 64)


def test_few_most_and_some_layers_stay_where_tokens_are_compared() -> None:
    assert residents(28) == [2, 5, 26]
    assert residents(4) == [2]
    assert residents(1) == []


# One H100 and two without peer access, Qwen2.5-32B in bfloat16 in 25.3 GB of each, 2026-11-22 (docs/offload.md):
# GB/s of each link, ms from token to token of 1 and of 32 sequences, layers resident.
@pytest.mark.parametrize(
    ("name", "gb_per_s", "measured_ms", "resident"),
    [("tp1", 55.3, (849.8, 849.1), 16), ("tp2", 52.0, (252.7, 245.7), 38)],
)
def test_the_plan_says_what_the_card_did(
    name: str, gb_per_s: float, measured_ms: tuple[float, float], resident: int
) -> None:
    layout = Layout.parse(f"{name}+offload")
    machine = capped(with_links(box("h100", layout.dims.tp), **HOST), 25.3)
    source = ModelSource("qwen2.5-32b", None, SourceKind.BUILTIN)
    options = EngineOptions(
        source, builtin("qwen2.5-32b"), "cuda", "bfloat16", True, 4096, 32, 2048, 16, None, False, 0, None, False,
        offload=True, device_memory_gb=25.3, offload_kv_tokens=8192,
    )  # fmt: skip
    for rows, ms in zip((1, 32), measured_ms, strict=True):
        found = predicted(options, layout, machine, gb_per_s * 1e9, rows, tokens=12)
        assert found.token_s * 1e3 == pytest.approx(ms, rel=0.04)
        assert abs(found.resident - resident) <= 1
