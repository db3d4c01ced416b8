"""`shardwise plan` as its users see it: the JSON contract, exit codes, one-line errors, and speed."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster.profile import FORMAT, MachineProfile, Rates, fingerprint_of, profile_path, save
from launch import __main__
from launch.machine import found_here
from launch.plan_json import plan_to_json
from strategies.planner import plan
from strategies.spec import Workload
from tests.unit.machines import LLAMA_8B, box

ROOT = Path(__file__).parents[2]
PREDICTED = {
    "ttft_ms",
    "tpot_ms",
    "output_tokens_per_s",
    "memory_gb_per_gpu",
    "kv_tokens",
    "share_of_limit",
    "usd_per_million_tokens",
}


def shardwise(capsys, *argv: str) -> tuple[int, str, str]:
    code = __main__.main(["plan", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_is_one_object_of_the_contracts_shape(capsys):
    code, out, err = shardwise(capsys, "llama-3.1-8b", "--on", "2xh100", "--concurrency", "8", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert list(found) == ["model", "machine", "workload", "chosen", "candidates"]
    assert found["model"] == "Llama-3.1-8B"
    assert found["machine"] == "2xh100"
    workload = {"prompt_tokens": 1024, "output_tokens": 256, "concurrency": 8, "objective": "latency"}
    assert found["workload"] == workload
    plain = {c["layout"] for c in found["candidates"] if "+" not in c["layout"]}
    assert plain == {"tp1", "tp2", "pp2", "dp2"}
    assert found["chosen"] == found["candidates"][0]["layout"]
    for candidate in found["candidates"]:
        assert list(candidate) == ["layout", "feasible", "reason", "predicted", "breakdown", "interval"]
        assert candidate["feasible"]
        assert candidate["reason"] is None
        assert set(candidate["predicted"]) == PREDICTED
        assert sum(candidate["breakdown"].values()) == pytest.approx(1)
        assert {"weights", "kv", "compute", "all_reduce", "send_recv", "host"} <= set(candidate["breakdown"])


def test_json_carries_the_estimate_in_its_units():
    made = plan(LLAMA_8B, box("h100", 2), Workload(), "bfloat16")
    found = plan_to_json(made, Workload())["candidates"][0]
    estimate = made.candidates[0].estimate
    assert found["predicted"]["ttft_ms"] == pytest.approx(estimate.ttft_s * 1e3, abs=1e-3)
    assert found["predicted"]["memory_gb_per_gpu"] == pytest.approx(
        estimate.memory_bytes_per_device / 1e9, abs=1e-3
    )
    assert found["predicted"]["kv_tokens"] == estimate.kv_tokens


def test_json_tells_how_far_off_each_figure_may_be(capsys):
    code, out, _ = shardwise(capsys, "llama-3.1-8b", "--on", "2xh100", "--json")
    assert code == 0
    _, text, _ = shardwise(capsys, "llama-3.1-8b", "--on", "2xh100")
    found = json.loads(out)["candidates"][0]
    said = re.search(r"tokens may take (\d+)% more or less, the first (\d+)%", " ".join(text.split()))
    for name, percent in (("tpot_ms", said[1]), ("ttft_ms", said[2])):
        value, interval = found["predicted"][name], found["interval"][name]
        assert interval["high"] / value - 1 == pytest.approx(int(percent) / 100, abs=0.006)
        assert 1 - interval["low"] / value == pytest.approx(int(percent) / 100, abs=0.006)
    assert set(found["interval"]) == PREDICTED - {"memory_gb_per_gpu", "kv_tokens"}
    for name, interval in found["interval"].items():
        assert 0 < interval["low"] < found["predicted"][name] <= interval["high"]
    assert found["interval"]["share_of_limit"]["high"] <= 1


def test_nothing_feasible_is_exit_3_with_the_reasons(capsys):
    named = ("llama-3.3-70b", "--on", "dual-4090", "--layouts", "tp1,tp2,pp2,dp2")
    code, out, _ = shardwise(capsys, *named, "--json")
    found = json.loads(out)
    assert (code, found["chosen"]) == (3, None)
    for candidate in found["candidates"]:
        assert (candidate["feasible"], candidate["predicted"], candidate["breakdown"]) == (False, None, None)
        assert "141.1 GB of bfloat16 weights over" in candidate["reason"]
    code, out, _ = shardwise(capsys, *named)
    assert code == 3
    assert "141.1 GB of bfloat16 weights over two cards of 25.8 GB" in out
    assert "such cards would hold it" in out


def test_people_get_a_table_and_sentences(capsys):
    code, out, err = shardwise(capsys, "Llama-3.1-8B", "--on", str(ROOT / "launch/recipes/dual-4090.yaml"))
    assert (code, err) == (0, "")
    first = next(
        line for line in out.splitlines() if line.split()[:1] in (["tp1"], ["tp2"], ["pp2"], ["dp2"])
    )
    assert first.split()[0] == "tp2"
    assert "Use tp2 for latency." in out
    assert "A decode step takes" in out
    assert "…" not in out  # nothing was cut off


def test_only_the_layouts_asked_for_each_once(capsys):
    argv = ("llama-3.1-8b", "--on", "h100-node", "--layouts", "dp2,tp4pp2,TP16,dp2", "--json")
    code, out, _ = shardwise(capsys, *argv)
    found = json.loads(out)
    assert code == 0
    assert {c["layout"]: c["reason"] for c in found["candidates"]} == {
        "dp2": None,
        "tp4pp2": None,
        "tp16": "tp16 needs 16 devices; h100-node has 8",
    }


def test_without_a_recipe_it_plans_for_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, out, _ = shardwise(capsys, "qwen2.5-7b", "--layouts", "tp1", "--prompt-tokens", "8", "--json")
    found = json.loads(out)
    assert code == (3 if found["chosen"] is None else 0)
    assert "cores" in found["machine"]
    assert [c["layout"] for c in found["candidates"]] == ["tp1"]


def test_what_was_measured_of_this_machine_takes_the_place_of_priors(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    argv = ("smollm2", "--layouts", "tp1", "--prompt-tokens", "8", "--dtype", "float32", "--json")

    def tpot_ms() -> float:
        _, out, _ = shardwise(capsys, *argv)
        return json.loads(out)["candidates"][0]["predicted"]["tpot_ms"]

    topology = found_here()
    assumed = topology.devices[0].bandwidth_bytes_per_s
    before = tpot_ms()
    profile = MachineProfile(
        format=FORMAT,
        machine=topology.name,
        fingerprint=fingerprint_of(topology),
        measured_at="2026-01-01T00:00:00+00:00",
        torch_version=version("torch"),
        driver="",
        nccl_version="",
        devices=topology.devices,
        links=tuple((a, b, link) for (a, b), link in topology.links.items()),
        rates=(
            Rates(
                {"float32": assumed / 10},
                {"float32": 1e12},
                layer_overhead_s=10 * topology.devices[0].layer_overhead_s,
                products={"float32": {1: assumed / 20, 256: 1e12}},
            ),
        ),
    )
    save(profile, profile_path(tmp_path / "shardwise", topology))
    assert tpot_ms() > 4 * before


def test_max_model_len_makes_room_for_a_longer_sequence(capsys):
    argv = ("llama-3.1-8b", "--on", "dual-4090", "--max-model-len", "131072", "--json")
    _, out, _ = shardwise(capsys, *argv)
    found = json.loads(out)["candidates"]
    feasible = {c["layout"]: c["feasible"] for c in found if "+" not in c["layout"]}
    assert feasible == {"tp1": False, "dp2": False, "tp2": True, "pp2": True}


MISTAKES = {
    "--prompt-tokens 0": "--prompt-tokens is 0; it must be at least 1",
    "--output-tokens -5": "--output-tokens is -5; it must be at least 1",
    "--concurrency 0": "--concurrency is 0; it must be at least 1",
    "--max-model-len 100": "may have 100: ask for less, or --max-model-len 1280",
    "--max-model-len 0": "--max-model-len is 0; it must be at least 1",
    "--max-model-len 999999": "--max-model-len is 999,999; Llama-3.1-8B has 131,072 positions",
    "--prompt-tokens 131072": "131,328; a sequence of Llama-3.1-8B may have 131,072",
    "--layouts tp2,xp2": "layout 'xp2' is not a name such as tp2",
    "--layouts tp0": "every size must be at least 1",
    "--device-memory-gb 0.5": "--device-memory-gb is 0.5; it must be from 1 to 10000 GB",
    "--host-memory-gb nan": "--host-memory-gb is nan; it must be from 1 to 10000 GB",
    "--on nowhere.yaml": "recipe nowhere.yaml does not exist",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(capsys, flags):
    code, out, err = shardwise(capsys, "llama-3.1-8b", "--on", "dual-4090", *flags.split())
    assert (code, out) == (2, "")
    assert MISTAKES[flags] in err
    assert err.count("\n") == 1


def test_an_empty_recipe_is_not_taken_for_this_machine(capsys):
    code, out, err = shardwise(capsys, "llama-3.1-8b", "--on", "")
    assert (code, out) == (2, "")
    assert err.startswith("shardwise plan: recipe has no name; give a YAML file, or one that ships: ")
    assert err.count("\n") == 1


def test_it_answers_at_once_and_imports_neither_torch_nor_ray():
    script = (
        "import sys; from launch.__main__ import main; "
        "code = main(['plan', 'llama-3.3-70b', '--on', 'dual-4090']); "
        "heavy = sorted({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)); "
        "print('heavy:', heavy); sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout
    assert time.perf_counter() - start < 5  # 0.5 s on an idle machine; the promise is 1.5
