"""What a comparison measures is kept as it comes, gone on with, and watched; nothing is started here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.discover import device_vitals, gpu_topology
from cluster.errors import UserError
from cluster.nvml import Vitals, read_gpus
from cluster.topology import Topology
from launch import compare_quality, compare_run
from launch.compare_journal import NAME, key_of, open_journal
from launch.compare_layouts import refused
from launch.compare_quality import FormatQuality, formats_of, why_unknown
from launch.compare_run import Clock, Sweep, facts_of, plans_of, predict_all, run_s, told
from launch.compare_vitals import Health, Watch, joules_per_token
from launch.memory import capped
from launch.progress import Progress
from launch.trial import Measured, Trial, middle, prompts_of
from strategies.plan import Candidate, Layout
from strategies.spec import Workload
from tests import serving
from tests.fake_nvml import FakeNvml, dual_h100
from tests.unit.machines import box

FACTS = {"model": "smol", "dtype": "float32"}
DONE = Trial(
    Measured(0.1, 0.01, 90.0),
    "digest",
    health=(Health("GPU-1", 1980.0, 71, 412.5, 80.0, {"power cap": 0.2}),),
    joules_per_token=0.5,
    rounds=3,
    seconds=2.5,
)


# --- the journal --------------------------------------------------------------------------------------------


def test_what_is_added_is_there_for_the_next_run(tmp_path: Path) -> None:
    first = open_journal(tmp_path / "out", FACTS, fresh=False)
    first.add("tp2", 8, DONE)
    again = open_journal(tmp_path / "out", dict(reversed(FACTS.items())), fresh=False)
    assert again.trials == {"tp2": {8: DONE}}
    assert again.has("tp2", 8) and not again.has("tp2", 1) and not again.has("tp1", 8)


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, FACTS, fresh=False)
    journal.add("tp2", 8, Trial(None, failure="held by another"))
    assert not open_journal(tmp_path, FACTS, fresh=False).has("tp2", 8)


def test_a_line_cut_short_costs_only_itself(tmp_path: Path) -> None:
    open_journal(tmp_path, FACTS, fresh=False).add("tp1", 1, DONE)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole + whole.splitlines()[1][:40])  # killed in the middle of the next
    journal = open_journal(tmp_path, FACTS, fresh=False)
    assert journal.trials == {"tp1": {1: DONE}}
    journal.add("tp1", 8, DONE)
    assert open_journal(tmp_path, FACTS, fresh=False).trials == {"tp1": {1: DONE, 8: DONE}}


def test_another_runs_journal_is_refused_and_kept(tmp_path: Path) -> None:
    open_journal(tmp_path, FACTS, fresh=False).add("tp1", 1, DONE)
    other = {**FACTS, "dtype": "bfloat16"}
    with pytest.raises(UserError, match=r"dtype was float32, is bfloat16.*--out.*--fresh"):
        open_journal(tmp_path, other, fresh=False)
    assert open_journal(tmp_path, other, fresh=True).trials == {}
    assert (tmp_path / "journal.before.jsonl").read_bytes().count(b"\n") == 2
    assert key_of(FACTS) != key_of(other)


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("hello\n")
    with pytest.raises(UserError, match="no journal of this version"):
        open_journal(tmp_path, FACTS, fresh=False)
    with pytest.raises(UserError, match="give a folder that can be written"):
        open_journal(tmp_path / NAME / "inside", FACTS, fresh=False)


# --- what formats do to answers -----------------------------------------------------------------------------


def test_quality_is_told_of_where_it_cannot_be_known() -> None:
    machine = capped(box("h100", 1), 25.3)
    random = serving.options("qwen3-8b", dummy_weights=True, dtype="bfloat16")
    assert why_unknown(random, machine) == "the weights are random (--weights dummy)"
    large = why_unknown(replace(random, dummy_weights=False), machine)
    assert large is not None
    assert large.startswith("its reference takes 32.8 GB in float32, and one device has 24.8 GB free")
    assert formats_of(["", "int8", "int4", "int8"], random) == ["int8", "int4"]


def test_quality_is_measured_once_a_format_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(command: Sequence[str], **given: object) -> subprocess.CompletedProcess[str]:
        layout = command[command.index("--layout") + 1]
        asked.append(layout)
        if layout == "tp1+fp8":
            return subprocess.CompletedProcess(command, 2, "", "shardwise quality: no float8 here\n")
        made = {"perplexity_rise_percent": 0.5, "kl_divergence": 0.01, "top1_agreement": 0.97}
        return subprocess.CompletedProcess(command, 0, json.dumps({**made, "tokens": 511, "text": "t"}), "")

    monkeypatch.setattr(compare_quality.subprocess, "run", run)
    options, said = serving.options("qwen3-8b", dtype="bfloat16"), Progress(quiet=True)
    first = compare_quality.measure("m", ["int8", "fp8"], options, tmp_path, said, {})
    assert first == {"int8": FormatQuality(0.5, 0.01, 0.97, 511, "t")} == compare_quality.read(tmp_path)
    again = compare_quality.measure("m", ["int8", "int4"], options, tmp_path, said, first)
    assert set(again) == {"int8", "int4"}
    assert asked == ["tp1+int8", "tp1+fp8", "tp1+int4"]


# --- what is left, and for how long -------------------------------------------------------------------------


def test_facts_change_with_what_a_measurement_depends_on() -> None:
    asked, machine, load = serving.options("qwen3-8b", dummy_weights=True), box("h100", 2), Workload()
    same = facts_of(asked, machine, load)
    assert same == facts_of(asked, machine, Workload(concurrency=32))
    for other in (
        facts_of(serving.options("qwen3-8b", dummy_weights=True, dtype="bfloat16"), machine, load),
        facts_of(asked, box("h100", 4), load),
        facts_of(asked, machine, Workload(prompt_tokens=7)),
        facts_of(serving.options("qwen3-14b", dummy_weights=True), machine, load),
        facts_of(replace(asked, offload_dir=Path("/disk")), machine, load),
    ):
        assert key_of(other) != key_of(same)


def test_named_layouts_that_cannot_run_are_told() -> None:
    asked, machine = serving.options("qwen3-8b", dummy_weights=True, dtype="bfloat16"), box("h100", 2)
    named = [Layout.parse(name) for name in ("tp1", "tp4", "tp2+fp4")]
    (made,) = predict_all(asked, machine, [Workload()], named).values()
    assert dict(refused(made)) == {
        "tp4": "tp4 needs four devices; 2 × h100 has 2",
        "tp2+fp4": "+fp4 is planned only",
    }


def test_where_nothing_fits_fewer_bits_and_host_memory_are_compared() -> None:
    """Two cards of 24 GB: bf16 refused and streamed, int8 streamed, int4 as tp and pp, and dp refused."""
    asked = serving.options(
        "llama-3.3-70b", dummy_weights=True, dtype="bfloat16", device="cuda", device_memory_gb=25.3
    )
    machine, loads = capped(box("h100", 2), 25.3, 256), [Workload(128, 128, n) for n in (1, 32)]
    made = plans_of(replace(asked, max_model_len=256), machine, loads, None)[1]
    runs = [c.layout.name for c in made.candidates if c.feasible and c.not_runnable is None]
    assert set(runs) == {"tp2+int4", "pp2+int4", "tp2+int8+offload", "tp2+offload"}
    why = dict(refused(made))
    assert set(why) == {"tp1", "tp2", "pp2", "dp2", "dp2+int4"}
    assert why["tp2"].startswith(
        "141.1 GB of bfloat16 weights over two cards of 25.3 GB: 70.6 GB on the fullest"
    )
    assert why["dp2+int4"].startswith("40.6 GB of int4 weights over one card of 25.3 GB")
    short = plans_of(replace(asked, max_model_len=256), capped(machine, None, 20), loads, None)[1]
    why = dict(refused(short))
    assert "tp2+offload" in why and "tp2+int8+offload" in why, "as they do not fit the host"
    assert "in host memory, which has 20.0 GB free; tp2+int4 needs none" in why["tp2+offload"]
    small = serving.options("qwen3-8b", dummy_weights=True, dtype="bfloat16", device="cuda")
    plain = plans_of(small, box("h100", 2), loads, None)[1]
    assert {c.layout.name for c in plain.candidates} == {"tp1", "tp2", "pp2", "dp2"}


def sweep(tmp_path: Path, concurrencies: Sequence[int] = (1, 8)) -> Sweep:
    asked = serving.options(
        "qwen3-8b", dummy_weights=True, dtype="bfloat16", device="cuda", max_model_len=2048
    )
    machine = box("h100", 2)
    loads = [Workload(concurrency=n) for n in concurrencies]
    journal = open_journal(tmp_path, facts_of(asked, machine, loads[0]), fresh=False)
    plans = predict_all(asked, machine, loads, None)
    return Sweep(asked, machine, loads, plans, journal, Progress(quiet=True))


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    asked = sweep(tmp_path)
    assert [(c.layout.name, len(loads)) for c, loads in asked.left()] == [
        ("tp1", 2),
        ("tp2", 2),
        ("pp2", 2),
        ("dp2", 2),
    ]
    asked.journal.add("tp1", 1, DONE)
    asked.journal.add("tp1", 8, DONE)
    asked.journal.add("tp2", 8, DONE)
    again = sweep(tmp_path, (1, 8, 32))
    left = {c.layout.name: [w.concurrency for w in loads] for c, loads in again.left()}
    assert left == {"tp1": [32], "tp2": [1, 32], "pp2": [1, 8, 32], "dp2": [1, 8, 32]}


def test_an_interrupted_sweep_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def interrupted_in_the_second(found: Any, candidate: Candidate, *given: Any) -> None:
        loads, on_trial = given[1], given[-1]
        started.append(candidate.layout.name)
        on_trial(loads[0], DONE)
        if len(started) == 2:
            raise KeyboardInterrupt
        for load in loads[1:]:
            on_trial(load, DONE)

    monkeypatch.setattr(compare_run, "cluster", FakeCluster)
    monkeypatch.setattr(compare_run, "run_trials", interrupted_in_the_second)
    monkeypatch.setattr(compare_run, "measure_truth", lambda *given: None)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path).run()
    kept = {name: set(trials) for name, trials in sweep(tmp_path).journal.trials.items()}
    assert kept == {"tp1": {1, 8}, "tp2": {1}}
    sweep(tmp_path).run()
    assert sweep(tmp_path).left() == []
    assert started == ["tp1", "tp2", "tp2", "pp2", "dp2"]


class FakeCluster:
    def __init__(self, *given: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *given: Any) -> None: ...


def test_the_time_left_is_learned_from_what_was_seen(tmp_path: Path) -> None:
    asked = sweep(tmp_path, (1,))
    (candidate, (load,)) = asked.left()[0]
    made = asked.estimate(candidate, load)
    assert made is not None
    clock = Clock("cuda")
    before = clock.left_s(2, [(made, load)] * 3)
    assert before == pytest.approx(2 * compare_run.START_S["cuda"] + 3 * run_s(made, load))
    clock.saw_start(5.0)
    clock.saw_run(made, load, 2 * run_s(made, load))
    assert clock.left_s(2, [(made, load)] * 3) == pytest.approx(2 * 5.0 + 3 * 2 * run_s(made, load))
    assert (told(0.2), told(59), told(200)) == ("1 s", "59 s", "3 min 20 s")


def test_stages_are_cut_alike_for_every_load(tmp_path: Path) -> None:
    asked = sweep(tmp_path, (1, 256))
    cuts = {
        n: next(c.shards for c in plan.candidates if c.dims.name == "pp2") for n, plan in asked.plans.items()
    }
    assert cuts[1] == cuts[256]


# --- rounds -------------------------------------------------------------------------------------------------


def test_the_middle_round_counts() -> None:
    rounds = [Measured(0.1, 0.01, 90.0), Measured(0.2, 0.02, 80.0), Measured(9.0, 0.015, 1.0)]
    assert middle(rounds) == Measured(0.2, 0.015, 80.0)


def test_prompts_are_equal_for_all_layouts_and_new_in_every_round() -> None:
    load = Workload(prompt_tokens=20, concurrency=3)
    first = prompts_of("3 0", 100, load)
    assert first == prompts_of("3 0", 100, load)
    assert [len(p) for p in first] == [20, 20, 20]
    others = [tuple(p) for p in (*prompts_of("3 1", 100, load), *first)]
    assert len(set(others)) == 6


# --- GPUs under load ----------------------------------------------------------------------------------------


class Hour:
    """A clock and a machine that are moved on by hand."""

    def __init__(self, nvml: FakeNvml) -> None:
        self.nvml, self.now_s = nvml, 0.0
        report = read_gpus(nvml)
        self.topology: Topology = gpu_topology(report, report.gpus)
        self.watch = Watch(self.read, lambda: self.now_s)

    def read(self) -> Sequence[Vitals]:
        return device_vitals(self.topology.devices, self.nvml)

    def look(self, after_s: float, **changes: Any) -> None:
        self.now_s += after_s
        for gpu in self.nvml.gpus:
            for name, value in changes.items():
                setattr(gpu, name, value)
        assert self.watch.look()


def test_energy_is_the_cards_own_count() -> None:
    hour = Hour(dual_h100())
    hour.look(0, joules=1000.0, watts=100)
    hour.look(1, joules=1400.0, watts=700)
    hour.look(1, joules=2100.0, watts=700)
    health = hour.watch.health()
    assert [h.joules for h in health] == [1100.0, 1100.0]
    assert health[0].watts == pytest.approx(500)
    assert joules_per_token(health, 1100) == pytest.approx(2.0)


def test_energy_is_watts_over_time_where_the_card_does_not_count() -> None:
    hour = Hour(dual_h100())
    hour.look(0, watts=100)
    hour.look(2, watts=300)
    hour.look(1, watts=300)
    (health, _) = hour.watch.health()
    assert health.joules == pytest.approx(2 * 200 + 1 * 300)


def test_a_run_that_was_held_back_is_flagged_and_a_blip_is_not() -> None:
    power_cap, sync_boost = 0x4, 0x10
    hour = Hour(dual_h100())
    for i in range(40):
        hour.look(0.25, throttle=power_cap if i < 10 else sync_boost if i == 10 else 0)
    (health, _) = hour.watch.health()
    assert health.throttled_by == {"power cap": 0.25, "sync boost": 0.025}
    assert health.is_throttled
    assert Trial(None, health=(health,)).throttled_by == ("power cap", "sync boost")
    hour = Hour(dual_h100())
    for i in range(40):
        hour.look(0.25, throttle=sync_boost if i == 10 else 0)
    assert not hour.watch.health()[0].is_throttled


def test_a_look_that_misses_a_gpu_does_not_count() -> None:
    hour = Hour(dual_h100())
    hour.look(0, watts=100)
    both, seen = hour.watch._read, hour.read()
    hour.watch._read = lambda: seen[:1]
    hour.look(1)
    hour.watch._read = both
    hour.look(1, watts=300)
    assert [h.watts for h in hour.watch.health()] == [200.0, 200.0]


def test_nothing_is_told_of_a_machine_without_gpus() -> None:
    watch = Watch(lambda: ())
    assert not watch.look()
    assert watch.health() == ()
    assert joules_per_token((), 5) is None
