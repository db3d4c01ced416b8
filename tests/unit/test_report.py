"""A comparison: the object that programs read, and the table that people do."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from cluster.nvml import Vitals
from launch.report import comparison_table, comparison_to_json, error_percent, outputs, show_comparison
from launch.trial import Measured, Trial
from strategies.plan import Layout, Plan
from strategies.planner import plan
from strategies.spec import Workload
from tests.unit.machines import LLAMA_70B, SMOL, box, with_devices

WORKLOAD = Workload(prompt_tokens=100, output_tokens=11, concurrency=2)
PAIR = box("h100", 2)
PLAN = plan(SMOL, PAIR, WORKLOAD, "bfloat16")
TP1, TP2, PP2, DP2 = (Layout.parse(name) for name in ("tp1", "tp2", "pp2", "dp2"))
TOKENS = ((1, 2), (3, 4))


def trial(ttft_ms: float, tpot_ms: float, rate: float, tokens: Any = TOKENS, **more: Any) -> Trial:
    return Trial(Measured(ttft_ms / 1e3, tpot_ms / 1e3, rate), tokens, **more)


TRIALS = {
    TP1: trial(20, 3, 500),  # 20 + 10 × 3 = 50 ms a request
    TP2: trial(30, 1, 400, ((1, 2), (3, 5))),  # 40 ms
    PP2: trial(90, 9, 100),
    DP2: Trial(None, failure="dp2: one GPU is held by another"),
}


def compared(made: Plan = PLAN, trials: Mapping[Layout, Trial] = TRIALS) -> dict[str, Any]:
    return json.loads(json.dumps(comparison_to_json(made, trials, WORKLOAD, PAIR)))


def by_layout(found: dict[str, Any]) -> dict[str, Any]:
    return {candidate["layout"]: candidate for candidate in found["candidates"]}


def test_the_object_is_the_plans_with_results() -> None:
    found = compared()
    assert list(found) == ["model", "machine", "workload", "chosen", "candidates", "verdicts"]
    tp2 = by_layout(found)["tp2"]
    assert {"layout", "feasible", "reason", "predicted", "breakdown", "results", "outputs"} == set(tp2)
    (result,) = tp2["results"]
    assert result["concurrency"] == 2
    assert result["predicted"] == tp2["predicted"]
    assert result["measured"] == {"ttft_ms": 30, "tpot_ms": 1, "output_tokens_per_s": 400}
    assert set(result["error_percent"]) == set(result["measured"])


def test_errors_are_signed_and_relative_to_what_was_measured() -> None:
    assert error_percent(3.0, 2.0) == 50
    assert error_percent(1.0, 2.0) == -50
    assert error_percent(1.0, 0.0) is None  # the TPOT of one-token answers
    tp2 = by_layout(compared())["tp2"]
    (result,) = tp2["results"]
    for metric, error in result["error_percent"].items():
        predicted, measured = tp2["predicted"][metric], result["measured"][metric]
        assert error == pytest.approx(100 * (predicted - measured) / measured)


def test_a_layout_that_could_not_be_run_says_why() -> None:
    dp2 = by_layout(compared())["dp2"]
    (result,) = dp2["results"]
    assert (result["measured"], result["error_percent"]) == (None, None)
    assert result["failure"] == "dp2: one GPU is held by another"
    assert dp2["outputs"] is None


def test_outputs_in_float32_are_the_first_ones_tokens() -> None:
    said = {name: candidate["outputs"] for name, candidate in by_layout(compared()).items()}
    assert said == {"tp1": "equal", "tp2": "different", "pp2": "equal", "dp2": None}
    assert outputs(Layout.parse("tp2pp2"), TRIALS) is None


def test_outputs_in_half_precision_are_logits_within_the_slack() -> None:
    near = trial(1, 1, 1, ((9, 9),), forced_error=0.010, allowed_error=0.015)
    far = trial(1, 1, 1, forced_error=0.016, allowed_error=0.015)
    trials = {TP1: trial(1, 1, 1), TP2: near, PP2: far}
    assert (outputs(TP2, trials), outputs(PP2, trials)) == ("equal", "different")


def test_outputs_are_compared_within_a_format() -> None:
    other = ((7, 7),)
    eight, split = Layout.parse("tp1+int8"), Layout.parse("tp2+int8")
    alone = {TP1: trial(1, 1, 1), eight: trial(1, 1, 1, other)}
    assert outputs(eight, alone) is None
    both = alone | {split: trial(1, 1, 1, other)}
    assert (outputs(eight, both), outputs(split, both)) == ("equal", "equal")
    assert outputs(split, both | {split: trial(1, 1, 1)}) == "different"


def test_verdicts_name_the_choice_the_winner_and_the_loss() -> None:
    verdicts = {verdict["objective"]: verdict for verdict in compared()["verdicts"]}
    assert list(verdicts) == ["latency", "throughput", "cost"]
    assert {verdict["concurrency"] for verdict in verdicts.values()} == {2}
    latency = verdicts["latency"]
    seconds = {"tp1": 50, "tp2": 40, "pp2": 180}
    assert latency["winner"] == "tp2"
    loss = 100 * (seconds[latency["chosen"]] / 40 - 1)
    assert latency["regret_percent"] == pytest.approx(loss, abs=1e-3)
    assert verdicts["throughput"]["winner"] == "tp1"


def test_a_wrong_choice_is_regretted() -> None:
    slow = {candidate.layout: trial(20, 3, 500) for candidate in PLAN.candidates}
    assert {v["regret_percent"] for v in compared(trials=slow)["verdicts"]} >= {0}
    assert PLAN.chosen is not None
    slow[PLAN.chosen.layout] = trial(40, 6, 250)  # twice as long
    latency = next(v for v in compared(trials=slow)["verdicts"] if v["objective"] == "latency")
    assert latency["chosen"] == PLAN.chosen.dims.name
    assert latency["regret_percent"] == pytest.approx(100)


def test_nothing_measured_has_no_verdict() -> None:
    found = compared(trials={})
    assert found["verdicts"] == []
    assert all(candidate["results"] == [] for candidate in found["candidates"])


def test_devices_are_told_with_what_they_did() -> None:
    hot = Vitals("GPU-1", 1980, 2619, 71, 412.5, 700.0, ("power",))
    (device,) = by_layout(compared(trials={TP1: trial(1, 1, 1, vitals=(hot,))}))["tp1"]["results"][0][
        "devices"
    ]
    assert device == {
        "uuid": "GPU-1",
        "sm_clock_mhz": 1980,
        "temperature_c": 71,
        "watts": 412.5,
        "throttled_by": ["power"],
    }


def rendered(made: Plan, trials: Mapping[Layout, Trial], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(made, trials))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_in_the_table_is_cut_off(width: int) -> None:
    lines = rendered(PLAN, TRIALS, width)
    assert not any("…" in line or len(line) > width for line in lines)
    words = " ".join(lines).split()
    assert words.count("pred.") == words.count("meas.") == words.count("error") == 3
    assert {"outputs", "equal", "different", "TTFT", "TPOT", "tok/s"} <= set(words)


def test_large_figures_and_long_names_fit_too() -> None:
    eight = box("h100", 8)
    made = plan(LLAMA_70B, eight, replace(WORKLOAD, concurrency=256), "bfloat16")
    trials = {c.dims: trial(98_765, 1_234, 12_345.6) for c in made.candidates if c.feasible}
    lines = rendered(made, trials, 80)
    assert not any("…" in line for line in lines)
    assert any(line.split()[:1] == ["tp2pp2dp2"] for line in lines)


def test_people_are_told_what_was_best(capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(PLAN, TRIALS, WORKLOAD, PAIR, "bfloat16")
    out = capsys.readouterr().out
    assert "2 requests at once of 100 prompt + 11 output tokens" in " ".join(out.split())
    assert "For throughput the plan chose" in out
    assert "dp2 could not be run: dp2: one GPU is held by another" in out


def test_people_get_a_plan_where_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(PLAN, {}, WORKLOAD, PAIR, "bfloat16")
    out = capsys.readouterr().out
    assert "share of" in out
    assert "meas." not in out


def test_people_get_the_ways_out_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    small = with_devices(PAIR, free_bytes=10**9, memory_bytes=10**9)
    made = plan(LLAMA_70B, small, WORKLOAD, "bfloat16")
    show_comparison(made, {}, WORKLOAD, small, "bfloat16")
    out = capsys.readouterr().out
    assert "Does not fit:" in out
    assert "No layout of Llama-3.3-70B fits" in out
    assert "pred." not in out
