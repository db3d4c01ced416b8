"""The scheduler under simulated time: what queueing theory says of it, and what it says of layouts at a rate."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.__main__ import main
from orchestrator.scheduler import SchedulerConfig
from orchestrator.simulate import (
    Arrival,
    Queueing,
    StepTimes,
    highest_rate,
    percentile,
    poisson,
    priced,
    queueing,
    rounded,
    simulate,
)
from strategies.cost import estimate
from strategies.cost_ops import Pass
from strategies.cost_steps import pass_s
from strategies.place import place
from strategies.plan import Layout, Placement
from strategies.spec import Workload
from tests.unit.machines import LLAMA_8B, box

ONE_AT_A_TIME = SchedulerConfig(
    num_blocks=1000, max_num_seqs=1, max_num_batched_tokens=64, max_model_len=256, prefix_caching=False
)


def always(*seconds: float) -> StepTimes:
    return lambda work: seconds


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_waits_as_queueing_theory_has_it(load: float) -> None:
    """M/D/1: answers of one step D each, one at a time; the mean wait is load × D / (2 (1 − load))."""
    d = 0.1
    seen = simulate(ONE_AT_A_TIME, poisson(8_000, load / d, 8, 1, seed=3), always(d))
    wait_s = statistics.fmean(a.ttft_s for a in seen.answered) - d
    assert wait_s == pytest.approx(load * d / (2 * (1 - load)), rel=0.2)


def test_nobody_waits_who_comes_alone() -> None:
    every = [Arrival(10.0 * i, 8, 5) for i in range(20)]
    seen = simulate(ONE_AT_A_TIME, every, always(0.1))
    assert all(a.ttft_s == pytest.approx(0.1) and a.tpot_s == pytest.approx(0.1) for a in seen.answered)
    assert seen.seconds == pytest.approx(190.0 + 0.5)
    assert seen.output_tokens_per_s == pytest.approx(100 / seen.seconds)


def test_a_batch_that_fits_shares_its_steps() -> None:
    many = replace(ONE_AT_A_TIME, max_num_seqs=8)
    seen = simulate(many, [Arrival(0.0, 8, 5)] * 8, always(0.1))
    assert seen.steps == 5
    assert {round(a.latency_s, 6) for a in seen.answered} == {0.5}
    one_by_one = simulate(ONE_AT_A_TIME, [Arrival(0.0, 8, 5)] * 8, always(0.1))
    assert one_by_one.answered[-1].latency_s == pytest.approx(8 * 0.5)


def test_prompts_beyond_the_budget_go_in_chunks() -> None:
    (alone,) = simulate(ONE_AT_A_TIME, [Arrival(0.0, 200, 1)], always(0.1)).answered
    assert alone.ttft_s == pytest.approx(0.4)  # 64 + 64 + 64 + 8


def test_a_pipeline_keeps_both_stages_busy() -> None:
    """Two groups of two take turns: a step every 0.1 s though each needs 0.2."""
    two = replace(ONE_AT_A_TIME, max_num_seqs=4, groups=2)
    seen = simulate(two, [Arrival(0.0, 8, 101)] * 4, always(0.1, 0.1))
    alone = simulate(two, [Arrival(0.0, 8, 101)], always(0.1, 0.1))
    assert alone.answered[0].tpot_s == pytest.approx(0.2)
    assert seen.answered[0].tpot_s == pytest.approx(0.2, rel=0.05)
    assert seen.output_tokens_per_s == pytest.approx(4 * alone.output_tokens_per_s, rel=0.05)


def test_running_ahead_hides_nothing_of_a_device_that_is_busy() -> None:
    ahead = replace(ONE_AT_A_TIME, run_ahead=True)
    (seen,) = simulate(ahead, [Arrival(0.0, 8, 11)], always(0.1)).answered
    assert seen.tpot_s == pytest.approx(0.1)


def test_a_full_cache_preempts_and_all_are_answered() -> None:
    tight = replace(ONE_AT_A_TIME, num_blocks=12, max_num_seqs=8)
    seen = simulate(tight, [Arrival(0.0, 16, 60)] * 8, always(0.01))
    assert seen.preemptions > 0
    assert [a.output_tokens for a in seen.answered] == [60] * 8


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.floats(0, 2), st.integers(1, 150), st.integers(1, 30)), min_size=1, max_size=20
    ),
    groups=st.integers(1, 3),
    ahead=st.booleans(),
)
def test_everybody_is_answered_in_full_and_in_order_of_time(
    sizes: Sequence[tuple[float, int, int]], groups: int, ahead: bool
) -> None:
    config = replace(ONE_AT_A_TIME, max_num_seqs=4, groups=groups, run_ahead=ahead)
    every = [Arrival(*one) for one in sorted(sizes)]
    seen = simulate(config, every, always(*[0.01] * groups))
    assert [a.output_tokens for a in seen.answered] == [arrival.output_tokens for arrival in every]
    assert all(0 < a.ttft_s <= a.latency_s for a in seen.answered)
    least_s = [(a.output_tokens - 1) * 0.01 for a in seen.answered]
    assert all(a.latency_s - a.ttft_s >= s - 1e-9 for a, s in zip(seen.answered, least_s, strict=True))


# --- with the cost model ------------------------------------------------------------------------------------


def put(layout: str) -> tuple[Placement, int]:
    placement = place(LLAMA_8B, Layout.parse(layout), "bfloat16", box("h100", 2))
    return placement, estimate(placement, Workload()).kv_tokens


def at(layout: str, rate: float, requests: int = 150) -> Queueing:
    placement, kv_tokens = put(layout)
    return queueing(placement, kv_tokens, 512, 64, rate, requests=requests)


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2"])
def test_requests_that_come_alone_take_what_the_cost_model_says(layout: str) -> None:
    placement, _ = put(layout)
    one = estimate(placement, Workload(512, 64, 1))
    seen = at(layout, 0.2, requests=5)
    assert seen.ttft_p50_s == pytest.approx(one.ttft_s, rel=0.1)
    assert seen.tpot_p50_s == pytest.approx(one.tpot_s, rel=0.1)


@pytest.mark.parametrize("layout", ["tp1", "tp2", "dp2", "pp2"])
def test_a_batch_takes_what_the_cost_model_says(layout: str) -> None:
    placement, _ = put(layout)
    together = estimate(placement, Workload(512, 64, 64))
    seen = at(layout, 1e6, requests=64)
    assert seen.output_tokens_per_s == pytest.approx(together.output_tokens_per_s, rel=0.15)


def test_waits_grow_with_the_rate() -> None:
    seen = [at("tp1", rate) for rate in (1, 10, 40)]
    for slow, fast in pairwise(seen):
        assert slow.ttft_p99_s < fast.ttft_p99_s
        assert slow.tpot_p50_s < fast.tpot_p50_s


def test_steps_priced_alike_are_nearly_alike() -> None:
    placement, _ = put("tp2")
    step_s = priced(placement)
    for work in (Pass(57, 1234.5), Pass(200, 700), Pass(3, 40, 777, 388, 2), Pass(0, 0, 2048, 1024, 1)):
        assert sum(step_s(work)) == pytest.approx(sum(pass_s(placement, 0, work)), rel=0.06)
    assert rounded(Pass(31, 64)) == rounded(Pass(31, 1))
    assert rounded(Pass(31, 64))[0] == 31


def test_the_highest_rate_is_found_by_halving() -> None:
    def seen(rate: float) -> Queueing:
        return Queueing(rate, 0, rate / 10, 0, 0, 0)

    found = highest_rate(seen, 0.7, None, 20.0, tries=12)
    assert found is not None and found.requests_per_s == pytest.approx(7.0, rel=0.01)
    assert highest_rate(seen, 1e-9, None, 20.0) is None


def test_percentiles_lie_between_their_neighbours() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 1.0], 99) == pytest.approx(0.99)


# --- plan ---------------------------------------------------------------------------------------------------


def planned(capsys: pytest.CaptureFixture[str], *more: str, code: int = 0) -> dict[str, object]:
    sizes = ["--prompt-tokens", "256", "--output-tokens", "16", "--layouts", "tp1,dp2"]
    assert main(["plan", "llama-3.1-8b", "--on", "2xh100", *sizes, "--json", *more]) == code
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_plan_simulates_the_rate_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--request-rate", "5")
    simulated = {one["layout"]: one for one in found["simulated"]}  # type: ignore[attr-defined]
    assert set(simulated) == {"tp1", "dp2"}
    assert all(one["requests_per_s"] == 5 for one in simulated.values())
    assert all(one["ttft_p50_ms"] <= one["ttft_p99_ms"] for one in simulated.values())
    assert "simulated" not in planned(capsys)


@pytest.mark.parametrize("rate", ["1e-9", "1e308"])
def test_plan_simulates_any_rate(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--request-rate", rate)
    for one in found["simulated"]:  # type: ignore[attr-defined]
        assert 0 < one["ttft_p50_ms"] <= one["ttft_p99_ms"] < math.inf
        assert 0 <= one["output_tokens_per_s"] < math.inf


def test_plan_finds_the_highest_rate_within_limits(capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--max-ttft-ms", "200", "--max-tpot-ms", "20", "--objective", "throughput"]
    found = planned(capsys, "--request-rate", "max", *limits)
    simulated = {one["layout"]: one for one in found["simulated"]}  # type: ignore[attr-defined]
    assert found["chosen"] == "dp2"
    assert simulated["dp2"]["requests_per_s"] > 1.5 * simulated["tp1"]["requests_per_s"]
    assert all(one["ttft_p99_ms"] <= 200 and one["tpot_p99_ms"] <= 20 for one in simulated.values())
    none = planned(capsys, "--request-rate", "max", "--max-tpot-ms", "0.1", "--layouts", "tp1", code=3)
    assert none["chosen"] is None


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "soon", "5e-324"])
def test_a_rate_that_is_none_is_refused(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3.1-8b", "--on", "2xh100", "--request-rate", rate]) == 2
    assert "it must be requests a second, 1e-09 at least, or max" in capsys.readouterr().err
