"""The report's pictures show what was measured; its page needs no network and no script."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import report_folder
from launch.report import comparison_to_json, rows
from launch.report_figures import MOST_LAYOUTS, figures, verdict
from launch.report_folder import render, write
from launch.report_image import image
from launch.report_page import page
from launch.report_svg import ticks
from tests.unit.test_report import swept


@pytest.fixture(scope="module")
def results() -> Any:
    return json.loads(json.dumps(comparison_to_json(swept()))) | {"made_at": "2026-11-22T10:00:00+00:00"}


class Page(HTMLParser):
    """Every tag that is opened is closed; what it asks the network for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.asked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.asked += [
            v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")
        ]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_folder_has_all_four(tmp_path: Path) -> None:
    said = list(write(tmp_path, swept()))
    assert {p.name for p in tmp_path.iterdir()} == {
        "results.json",
        "results.csv",
        "report.html",
        "report.png",
    }
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert said == [f"results and report are in {tmp_path}"]


def test_without_matplotlib_the_rest_is_there(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*given: object) -> bytes:
        raise ImportError("matplotlib")

    monkeypatch.setattr(report_folder, "image", absent)
    said = list(render(tmp_path, results))
    assert "no report.png" in said[0]
    assert (tmp_path / "report.html").exists()


def html_of(results: Any) -> str:
    return page(results, figures(results), list(rows(results)), results["made_at"])


def test_the_page_stands_alone(results: Any) -> None:
    html = html_of(results)
    read = Page()
    read.feed(html)
    assert read.open == [] and read.asked == []
    assert "script" not in read.seen
    assert not re.search(r"@import|url\(", html)
    assert read.seen.count("svg") == 4
    assert all(sentence.replace("'", "&#x27;") in html for sentence in verdict(results))


def test_what_others_name_is_no_markup(results: Any) -> None:
    assert "<script" not in html_of({**results, "model": "<script>alert(1)</script>"})


def test_points_are_tokens_a_user_and_a_gpu(results: Any) -> None:
    tp2 = next(one for one in figures(results).pareto if one.name == "tp2")
    light, heavy = tp2.measured
    assert (light.concurrency, light.per_user, light.per_gpu) == (
        2,
        1000,
        200,
    )  # TPOT 1 ms, 400 tokens/s over 2
    assert (heavy.concurrency, heavy.per_gpu) == (32, 1000)
    assert [s.concurrency for s in tp2.predicted] == [2, 32]
    beside = figures(results).pareto[-1]
    assert (beside.name, beside.predicted, len(beside.measured)) == ("127.0.0.1:8000", (), 1)


def test_a_bar_is_the_predicted_token_and_its_mark_the_measured(results: Any) -> None:
    for candidate in results["candidates"]:
        for result in candidate["results"]:
            name = f"{candidate['layout']}, {result['concurrency']}"
            bar = next(bar for bar in figures(results).steps if bar.name == name)
            assert bar.total == pytest.approx(result["predicted"]["tpot_ms"], rel=0.01)
            assert bar.mark == result["measured"]["tpot_ms"]
    memory = {bar.name: bar for bar in figures(results).memory}
    for candidate in results["candidates"]:
        if candidate["results"]:
            heaviest = candidate["results"][-1]["predicted"]["memory_gb_per_gpu"]
            assert memory[candidate["layout"]].total == pytest.approx(heaviest, rel=1e-3)


def test_the_verdict_names_winners_errors_and_doubts(results: Any) -> None:
    which, right, believe = verdict(results)
    assert "tp2 at 2 at once and tp1 at 32 at once for latency" in which
    assert "TPOT by" in right and "TTFT by" in right and "throughput by" in right
    assert "outputs are equal" in believe
    broken = json.loads(json.dumps(results))
    ran = next(c for c in broken["candidates"] if c["results"])
    ran["outputs"], ran["results"][0]["throttled_by"] = "different", ["power cap"]
    name = ran["layout"]
    believe = verdict(broken)[2]
    assert f"outputs of {name} are NOT" in believe
    assert f"throttled in 1 of 4 runs ({name} at 2)" in believe
    assert verdict({**results, "verdicts": []}) == ()


def test_of_many_layouts_pictures_show_the_best(results: Any) -> None:
    many = json.loads(json.dumps(results))
    tp2 = next(c for c in many["candidates"] if c["layout"] == "tp2")
    many["candidates"] = [{**tp2, "layout": f"tp{n}"} for n in range(3, 40)] + many["candidates"]
    shown = [one.name for one in figures(many).pareto]
    assert len(shown) == MOST_LAYOUTS + 1  # and the endpoint
    assert {"tp1", "tp2"} <= set(shown)
    assert image(figures(many), "many").startswith(b"\x89PNG")


@given(st.floats(0.001, 1e6), st.floats(1.001, 1e6), st.booleans())
def test_ticks_are_a_few_within_the_range(low: float, times: float, log: bool) -> None:
    high = low * times
    found = ticks(low, high, log=log)
    assert len(found) <= 18
    assert all(low * (1 - 1e-6) <= t <= high * (1 + 1e-6) for t in found)
    assert sorted(found) == found
    assert log or len(found) >= 2
