"""What a comparison measured makes the next plan better."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import plan as plan_command
from launch.__main__ import main
from launch.kept import shelf
from launch.report import kept_of
from strategies.kept import MODEL, Kept, informed
from strategies.planner import plan
from strategies.spec import Objective, Workload
from tests.unit.machines import LLAMA_8B, SMOL, box
from tests.unit.test_report import swept

PAIR = box("h100", 2)
LOAD = Workload(512, 128, 32, Objective.THROUGHPUT)


def kept(layout: str, concurrency: int = 32, slower: float = 1.0, **changes: Any) -> Kept:
    """As the model says, but so many times slower."""
    made = by_model(layout, concurrency)
    one = Kept(
        layout,
        512,
        128,
        concurrency,
        made.ttft_s * slower,
        made.tpot_s * slower,
        made.output_tokens_per_s / slower,
        made.ttft_s,
        made.tpot_s,
        made.output_tokens_per_s,
        "2026-11-22",
    )
    return replace(one, **changes)


def by_model(layout: str, concurrency: int = 32) -> Any:
    made = plan(LLAMA_8B, PAIR, replace(LOAD, concurrency=concurrency), "bfloat16")
    return next(c.estimate for c in made.candidates if c.layout.name == layout)


def test_the_very_load_is_as_it_was_measured() -> None:
    made = informed(by_model("tp2"), "tp2", LOAD, [kept("tp2", slower=3.0), kept("tp2", slower=2.0)])
    assert made.tpot_s == pytest.approx(2 * by_model("tp2").tpot_s)  # the newest
    assert made.output_tokens_per_s == pytest.approx(by_model("tp2").output_tokens_per_s / 2)
    assert made.source == "measured here on 2026-11-22"


def test_a_load_nearby_is_scaled_and_one_far_off_is_not() -> None:
    before = [kept("tp2", 8, slower=1.5), kept("tp2", 64, slower=2.0)]
    near = informed(by_model("tp2"), "tp2", LOAD, before)  # 64 is nearer to 32 than 8
    assert near.ttft_s == pytest.approx(2 * by_model("tp2").ttft_s)
    assert near.source == "scaled by what was measured here with 64 at once on 2026-11-22"
    for far in (
        replace(LOAD, concurrency=512),
        replace(LOAD, prompt_tokens=4096),
        replace(LOAD, steady=True),
    ):
        assert informed(by_model("tp2"), "tp2", far, before).source == MODEL
    assert informed(by_model("dp2"), "dp2", LOAD, before).source == MODEL


@given(st.floats(0.01, 100.0))
def test_no_measurement_passes_the_limit(slower: float) -> None:
    made = informed(by_model("tp2"), "tp2", LOAD, [kept("tp2", slower=slower)])
    assert 0 < made.share_of_limit <= 1


def test_the_next_plan_does_not_repeat_a_wrong_choice() -> None:
    first = plan(LLAMA_8B, PAIR, LOAD, "bfloat16")
    assert first.chosen is not None
    name = first.chosen.layout.name
    again = plan(LLAMA_8B, PAIR, LOAD, "bfloat16", kept=[kept(name, slower=5.0)])
    assert again.chosen is not None and again.chosen.layout.name != name
    sure = plan(LLAMA_8B, PAIR, LOAD, "bfloat16", kept=[kept(name)])
    assert any("measured here on 2026-11-22" in sentence for sentence in sure.explanation)


def test_a_shelf_keeps_the_newest_of_each_load(tmp_path: Path) -> None:
    def own(**changes: Any) -> Any:
        asked = {"chunk_tokens": 2048, "max_sequences": 256} | changes
        return shelf(tmp_path, PAIR, SMOL, "bfloat16", **asked)

    assert own().read() == []
    own().add([kept("tp2"), kept("dp2")])
    own().add([kept("tp2", slower=2.0), kept("tp2", 8)])
    assert own().read() == [kept("dp2"), kept("tp2", slower=2.0), kept("tp2", 8)]
    assert own(chunk_tokens=8192).read() == []
    other = replace(own(), fingerprint="another driver")
    assert other.read() == []
    own().path.write_text("{")
    assert own().read() == []


def test_a_comparison_is_what_is_kept() -> None:
    found = {(one.layout, one.concurrency): one for one in kept_of(swept())}
    assert set(found) == {(name, n) for name in ("tp1", "tp2") for n in (2, 32)}
    heavy = found["tp1", 32]
    assert (heavy.tpot_s, heavy.output_tokens_per_s) == (0.008, 3000)
    candidate = swept().candidate("tp1", 32)
    assert candidate is not None and candidate.estimate is not None
    assert heavy.predicted_tpot_s == candidate.estimate.tpot_s


def test_plan_says_what_was_measured_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plan_command, "found_here", lambda: PAIR)
    asked = [
        "plan",
        "llama-3.1-8b",
        "--prompt-tokens",
        "512",
        "--output-tokens",
        "128",
        "--concurrency",
        "32",
    ]
    assert main([*asked, "--json"]) == 0
    before = {c["layout"]: c for c in json.loads(capsys.readouterr().out)["candidates"]}
    assert "source" not in before["tp2"]
    spec = plan_command.spec_of("llama-3.1-8b")
    own = shelf(tmp_path / "shardwise", PAIR, spec, "bfloat16", chunk_tokens=2048, max_sequences=256)
    own.add([kept("tp2", slower=2.0)])
    assert main([*asked, "--json"]) == 0
    after = {c["layout"]: c for c in json.loads(capsys.readouterr().out)["candidates"]}
    assert after["tp2"]["source"] == "measured here on 2026-11-22"
    assert after["tp2"]["predicted"]["tpot_ms"] == pytest.approx(
        kept("tp2", slower=2.0).tpot_s * 1e3, rel=1e-4
    )
    assert after["dp2"] == before["dp2"]
