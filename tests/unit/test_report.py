"""A comparison: the object that programs read, and the table that people do."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from launch.compare_quality import FormatQuality
from launch.compare_vitals import Health
from launch.memory import capped
from launch.report import Comparison, comparison_to_json, error_percent, outputs, rows, to_csv
from launch.report_text import comparison_table, show_comparison
from launch.trial import Measured, Trial
from strategies.plan import Layout, Plan
from strategies.planner import plan
from strategies.spec import Workload
from tests.unit.machines import LLAMA_70B, SMOL, box, with_devices

WORKLOAD = Workload(prompt_tokens=100, output_tokens=11, concurrency=2)
PAIR = box("h100", 2)
PLAN = plan(SMOL, PAIR, WORKLOAD, "bfloat16")
HEAVY = replace(WORKLOAD, concurrency=32)


def trial(ttft_ms: float, tpot_ms: float, rate: float, tokens: str = "same", **more: Any) -> Trial:
    return Trial(Measured(ttft_ms / 1e3, tpot_ms / 1e3, rate), tokens, **more)


TRIALS = {
    "tp1": trial(20, 3, 500),  # 20 + 10 × 3 = 50 ms a request
    "tp2": trial(30, 1, 400, "others"),  # 40 ms
    "pp2": trial(90, 9, 100),
    "dp2": Trial(None, failure="dp2: one GPU is held by another"),
}


def comparison(made: Plan = PLAN, trials: Mapping[str, Trial] = TRIALS) -> Comparison:
    at_two = {name: {2: one} for name, one in trials.items()}
    return Comparison({2: made}, at_two, WORKLOAD, PAIR, "float32")


def compared(made: Plan = PLAN, trials: Mapping[str, Trial] = TRIALS) -> dict[str, Any]:
    return json.loads(json.dumps(comparison_to_json(comparison(made, trials))))


def by_layout(found: dict[str, Any]) -> dict[str, Any]:
    return {candidate["layout"]: candidate for candidate in found["candidates"]}


def test_the_object_is_the_plans_with_results() -> None:
    found = compared()
    assert {"model", "machine", "workload", "chosen", "candidates", "verdicts"} <= set(found)
    tp2 = by_layout(found)["tp2"]
    told = {"layout", "feasible", "reason", "predicted", "breakdown", "interval"}
    assert told | {"notes", "results", "outputs", "quality", "refused"} == set(tp2)
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
    assert outputs(comparison(), "tp2pp2") is None


def test_outputs_in_half_precision_are_logits_within_the_slack() -> None:
    near = trial(1, 1, 1, "others", forced_error=0.010, allowed_error=0.015)
    far = trial(1, 1, 1, forced_error=0.016, allowed_error=0.015)
    made = comparison(trials={"tp1": trial(1, 1, 1), "tp2": near, "pp2": far})
    made = replace(made, dtype="bfloat16")
    assert (outputs(made, "tp2"), outputs(made, "pp2")) == ("equal", "different")
    assert outputs(made, "tp1") is None  # nobody looked at its logits


def test_offloaded_layers_answer_as_resident_ones_and_weights_of_their_own_as_nothing() -> None:
    far, other = trial(1, 1, 1, "others"), trial(1, 1, 1, "")
    trials = {"tp1": {2: trial(1, 1, 1)}, "tp2+offload": {2: far}, "zero3+offload": {2: other}}
    made = Comparison({2: PLAN}, trials, WORKLOAD, PAIR, "float32")
    told = [outputs(made, name) for name in trials]
    assert told == ["equal", "different", None]


def test_outputs_are_compared_within_a_format_and_a_load() -> None:
    one = Comparison({2: PLAN}, {"tp1": {2: trial(1, 1, 1)}}, WORKLOAD, PAIR, "float32")
    eight = trial(1, 1, 1, "in 8 bits")
    alone = replace(one, trials={**one.trials, "tp1+int8": {2: eight}})
    assert outputs(alone, "tp1+int8") is None
    both = replace(one, trials={**one.trials, "tp1+int8": {2: eight}, "tp2+int8": {2: eight}})
    assert (outputs(both, "tp1+int8"), outputs(both, "tp2+int8")) == ("equal", "equal")
    assert (
        outputs(replace(both, trials={**both.trials, "tp2+int8": {2: trial(1, 1, 1)}}), "tp2+int8")
        == "different"
    )


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
    slow = {candidate.layout.name: trial(20, 3, 500) for candidate in PLAN.candidates}
    assert {v["regret_percent"] for v in compared(trials=slow)["verdicts"]} >= {0}
    assert PLAN.chosen is not None
    slow[PLAN.chosen.layout.name] = trial(40, 6, 250)  # twice as long
    latency = next(v for v in compared(trials=slow)["verdicts"] if v["objective"] == "latency")
    assert latency["chosen"] == PLAN.chosen.dims.name
    assert latency["regret_percent"] == pytest.approx(100)


def test_nothing_measured_has_no_verdict() -> None:
    found = compared(trials={})
    assert found["verdicts"] == []
    assert all(candidate["results"] == [] for candidate in found["candidates"])


def test_devices_are_told_with_what_they_did() -> None:
    hot = Health("GPU-1", 1980.0, 71, 412.5, 800.0, {"power cap": 0.5, "sync boost": 0.01})
    trials = {"tp1": trial(1, 1, 1, health=(hot,), joules_per_token=0.25)}
    (result,) = by_layout(compared(trials=trials))["tp1"]["results"]
    (device,) = result["devices"]
    assert (device["uuid"], device["watts"], device["temperature_c"]) == ("GPU-1", 412.5, 71)
    assert result["joules_per_token"] == 0.25
    assert result["throttled_by"] == ["power cap", "sync boost"]
    cool = replace(hot, throttled_by={"power cap": 0.01})
    assert trial(1, 1, 1, health=(cool,)).throttled_by == ()


def swept() -> Comparison:
    """tp1 and tp2 at 2 and at 32 at once; an endpoint beside them."""
    trials = {
        "tp1": {2: trial(20, 3, 500), 32: trial(40, 8, 3000)},
        "tp2": {2: trial(30, 1, 400), 32: trial(60, 9, 2000)},
    }
    plans = {2: PLAN, 32: plan(SMOL, PAIR, HEAVY, "bfloat16")}
    beside = {"http://127.0.0.1:8000/v1": {32: trial(70, 7, 2500)}}
    return Comparison(plans, trials, WORKLOAD, PAIR, "float32", beside)


def test_each_load_has_its_own_prediction_and_verdicts() -> None:
    found = json.loads(json.dumps(comparison_to_json(swept())))
    assert found["concurrencies"] == [2, 32]
    light, heavy = by_layout(found)["tp1"]["results"]
    assert (light["concurrency"], heavy["concurrency"]) == (2, 32)
    assert light["predicted"] != heavy["predicted"]
    winners = {(v["concurrency"], v["objective"]): v["winner"] for v in found["verdicts"]}
    assert winners[2, "latency"] == "tp2"  # 40 ms against 50
    assert winners[32, "latency"] == "tp1"
    assert all({"pp2", "dp2"} <= set(v["not_measured"]) for v in found["verdicts"])
    assert found["against"][0]["results"][0]["measured"]["tpot_ms"] == 7


def test_a_rows_figures_are_those_of_the_object() -> None:
    found = json.loads(json.dumps(comparison_to_json(swept())))
    every = list(rows(found))
    assert [(row["layout"], row["concurrency"]) for row in every if "http" not in str(row["layout"])] == [
        (candidate["layout"], result["concurrency"])
        for candidate in found["candidates"]
        for result in candidate["results"]
    ]
    assert every[-1]["layout"] == "http://127.0.0.1:8000/v1"
    read = list(csv.DictReader(io.StringIO(to_csv(found))))
    heavy = next(row for row in read if (row["layout"], row["concurrency"]) == ("tp1", "32"))
    assert float(heavy["tpot_ms_measured"]) == 8
    predicted = float(heavy["tpot_ms_predicted"])
    assert float(heavy["tpot_ms_error_percent"]) == pytest.approx(100 * (predicted - 8) / 8, abs=0.01)
    limit = float(heavy["output_tokens_per_s_predicted"]) / float(heavy["share_of_limit_predicted"])
    assert float(heavy["share_of_limit_measured"]) == pytest.approx(3000 / limit, rel=0.01)


def rendered(made: Plan, trials: Mapping[str, Trial], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(comparison(made, trials), 2))
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
    trials = {c.layout.name: trial(98_765, 1_234, 12_345.6) for c in made.candidates if c.feasible}
    lines = rendered(made, trials, 80)
    assert not any("…" in line for line in lines)
    assert any(line.split()[:1] == ["tp2pp2dp2"] for line in lines)


def test_people_are_told_what_was_best(capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(comparison())
    out = capsys.readouterr().out
    assert "2 requests at once of 100 prompt + 11 output tokens" in " ".join(out.split())
    assert "For throughput the plan chose" in out
    assert "(dp2 not measured)" in out
    assert "dp2 could not be run: dp2: one GPU is held by another" in out


def test_people_get_a_plan_where_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(comparison(trials={}))
    out = capsys.readouterr().out
    assert "share of" in out
    assert "meas." not in out


BEYOND = tuple(map(Layout.parse, ("tp2", "tp2+int8+offload", "tp2+int4", "dp2+int4", "tp2+fp4")))


def beyond_memory(**more: Any) -> Comparison:
    """70B on two cards of 24 GB."""
    machine = capped(box("rtx-4090", 2), 25.3, 64)
    made = plan(LLAMA_70B, machine, WORKLOAD, "bfloat16", layouts=BEYOND)
    trials = {"tp2+int8+offload": {2: trial(2000, 1000, 20)}, "tp2+int4": {2: trial(300, 40, 80)}}
    return Comparison({2: made}, trials, WORKLOAD, machine, "bfloat16", named=True, **more)


def test_what_is_refused_stands_in_the_table_with_its_arithmetic_below(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_comparison(beyond_memory(quality_unknown="the weights are random (--weights dummy)"))
    lines = capsys.readouterr().out.splitlines()
    out = " ".join(" ".join(lines).split())
    rows_ = {line.split()[0]: line.split()[1] for line in lines if line.startswith(("tp2", "dp2"))}
    assert {name for name, first in rows_.items() if first == "refused"} == {"tp2", "dp2+int4", "tp2+fp4"}
    assert "tp2 141.1 GB of bfloat16 weights over two cards of 25.3 GB: 70.6 GB on the fullest" in out
    assert "dp2+int4 40.6 GB of int4 weights over one card of 25.3 GB" in out
    assert "tp2+fp4 +fp4 is planned only" in out
    assert (
        "What +int4 and +int8 do to answers cannot be told: the weights are random (--weights dummy)." in out
    )
    assert sum("ppl ?" in line for line in lines) == 2
    assert re.search(
        r"tp2\+int8\+offload: \d+ of a rank's 80 layers resident; [\d.]+ GB come from host memory", out
    )


def test_quality_stands_beside_speed() -> None:
    quality = {"int4": FormatQuality(6.6, 0.108, 0.833, 1533, "a text")}
    made = beyond_memory(quality=quality)
    found = json.loads(json.dumps(comparison_to_json(made)))
    assert by_layout(found)["tp2+int4"]["quality"]["perplexity_rise_percent"] == 6.6
    assert by_layout(found)["tp2+int8+offload"]["quality"] is None
    assert by_layout(found)["dp2+int4"]["refused"].startswith("40.6 GB of int4 weights")
    (row,) = [r for r in csv.DictReader(io.StringIO(to_csv(found))) if r["layout"] == "tp2+int4"]
    assert (row["perplexity_rise_percent"], row["kl_divergence"]) == ("6.6", "0.108")
    console = Console(file=io.StringIO(), width=100)
    console.print(comparison_table(made, 2))
    assert isinstance(console.file, io.StringIO)
    assert "ppl +6.6%" in console.file.getvalue() and "ppl ?" in console.file.getvalue()


def test_people_get_the_ways_out_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    small = with_devices(PAIR, free_bytes=10**9, memory_bytes=10**9)
    made = plan(LLAMA_70B, small, WORKLOAD, "bfloat16")
    show_comparison(Comparison({2: made}, {}, WORKLOAD, small, "bfloat16"))
    out = capsys.readouterr().out
    assert "Does not fit:" in out
    assert "No layout of Llama-3.3-70B fits" in out
    assert "pred." not in out
