"""The whole path under Ray: right tokens on one node and on two, deaths told, refusals in words, nothing left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
import ray

from cluster.errors import GangDied, PlacementFailed
from launch.progress import Progress
from launch.start import Deployment, Devices, cluster
from orchestrator.request import Completion, SamplingParams
from orchestrator.supervisor import RestartPolicy
from tests.hosts import PATIENCE_S, ROOT, gone, head_address, second_node
from tests.left_replicas import LEASE_S
from tests.oracle import greedy
from tests.serving import Hosting, answers, options, served, struck
from tests.tiny import make_model
from tests.workers import FrailWorker

SLOTS = 4
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], list(range(60))]
OUTPUT_TOKENS = 24
OUTPUTS = (OUTPUT_TOKENS, 1, 12)  # where each prompt asks for its own: they finish in another order

Tiny = tuple[Path, list[list[int]]]  # a model and the tokens that transformers answers PROMPTS with


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    directory = tmp_path_factory.mktemp("model")
    model = make_model(directory, "llama", max_position_embeddings=8192)
    return directory, [greedy(model, prompt, OUTPUT_TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def devices(tiny: Tiny) -> Iterator[Devices]:
    with cluster(options(tiny[0]), SLOTS, Progress(quiet=True)) as found:
        yield found


def assert_right(found: Deployment, tiny: Tiny) -> None:
    sampling = SamplingParams(max_tokens=OUTPUT_TOKENS)
    done = answers(found, options(tiny[0]), [(prompt, sampling) for prompt in PROMPTS])
    assert [answer.token_ids for answer in done] == tiny[1]


def hosts() -> list[psutil.Process]:
    """Our actors' processes."""
    return [child for child in psutil.Process().children(recursive=True) if child.name() == "ray::Host"]


def test_pp2_answers_as_transformers(devices: Devices, tiny: Tiny) -> None:
    with served("pp2", options(tiny[0]), devices) as found:
        assert_right(found, tiny)
    assert hosts() == []


def test_a_killed_actor_fails_the_request_with_its_last_words(devices: Devices, tiny: Tiny) -> None:
    asked = options(tiny[0], max_model_len=None)
    where = Hosting(devices, FrailWorker)
    with served("tp2", asked, where) as found:
        (gang,) = where.gangs
        error, seconds = struck(
            found, asked, PROMPTS[0], lambda: os.kill(gang.members[1].pid, signal.SIGKILL)
        )
        assert isinstance(error, GangDied)
        assert str(error).startswith(f"{gang.members[1]} died: killed or crashed")
        assert "rank 1 is ready" in str(error)
        assert seconds < 5
        assert gone(gang)
    assert hosts() == []


@pytest.mark.slow
def test_a_killed_actor_is_replaced_where_all_devices_are_held(devices: Devices, tiny: Tiny) -> None:
    asked = options(tiny[0], max_model_len=256)
    where = Hosting(devices, FrailWorker)
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)

    async def ask(found: Deployment) -> list[Completion]:
        async with found.coordinator(asked, None, restarts=RestartPolicy(first_s=0.1)) as coordinator:
            begun = asyncio.Event()
            asking = [
                coordinator.ask(PROMPTS[0], sampling, on_update=lambda _: begun.set()) for _ in range(SLOTS)
            ]
            await asyncio.wait_for(begun.wait(), PATIENCE_S)
            os.kill(where.gangs[0].members[1].pid, signal.SIGKILL)
            done = [one for answer in asking for one in await answer.all()]
            async with asyncio.timeout(PATIENCE_S):
                while coordinator.restarts != {0: 1}:
                    await asyncio.sleep(0.05)
            done += [one for _ in range(2) for one in await coordinator.complete(PROMPTS[0], sampling)]
            assert coordinator.replicas_alive == [True, True]
        return done

    with served("tp2dp2", asked, where) as found:
        done = asyncio.run(ask(found))
        assert [gone(gang) for gang in where.gangs] == [True, False, False]
    assert hosts() == []
    assert len({tuple(one.token_ids) for one in done}) == 1
    assert done[0].token_ids[:OUTPUT_TOKENS] == tiny[1][0]


def coordinator_that_is_killed(model: Path) -> dict[str, Any]:
    """What it said of its replicas before it was killed, amid requests."""
    argv = [sys.executable, "-m", "tests.left_replicas", head_address(), str(model), "test"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        time.sleep(0.5)  # so that its steps are under way
        process.kill()
    assert said, "it ended by itself"
    found: dict[str, Any] = json.loads(said)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("devices")
def test_a_coordinator_finds_the_replicas_that_a_killed_one_left(tiny: Tiny) -> None:
    first, second, third = (coordinator_that_is_killed(tiny[0]) for _ in range(3))
    os.kill(third["pids"][0], signal.SIGKILL)
    fourth = coordinator_that_is_killed(tiny[0])
    print([round(one["seconds"], 1) for one in (first, second, third, fourth)])
    assert first["pids"] == second["pids"] == third["pids"]
    assert len(first["pids"]) == SLOTS
    assert not {*third["pids"]} & {*fourth["pids"]}, "half of what was left is of no use"
    assert [one["answers"] for one in (first, second, third, fourth)] == [[tiny[1][0]] * 2] * 4
    assert second["seconds"] < first["seconds"]
    begun_s = time.monotonic()
    while any(os.path.exists(f"/proc/{pid}/exe") for pid in third["pids"] + fourth["pids"]):
        assert time.monotonic() - begun_s < PATIENCE_S
        time.sleep(0.1)
    left_s = time.monotonic() - begun_s
    print(f"gone {left_s:.1f} s after the last coordinator")
    assert left_s < LEASE_S + 10
    while ray.available_resources().get("CPU", 0) < SLOTS:
        assert time.monotonic() - begun_s < PATIENCE_S
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("devices")
def test_a_server_that_is_killed_is_back_with_its_replicas(tiny: Tiny, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "launch", "serve", str(tiny[0]), "--device", "cpu", "--port", "0"]
    argv += [
        "--address",
        head_address(),
        "--kept-as",
        "served",
        "--batch-dir",
        str(tmp_path),
        "--max-model-len",
        "64",
    ]
    workers, layouts = [], []
    for end in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        begun_s, said = time.monotonic(), []
        with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            while not (said and "serving" in said[-1]):
                said.append(process.stderr.readline())
                assert said[-1], said
            layouts.append((tmp_path / "layout").read_text())
            print(f"{layouts[-1]} serves after {time.monotonic() - begun_s:.1f} s")
            assert ("are here, and loaded" in "".join(said)) == bool(workers), said
            url = said[-1].split()[-1]
            body = json.dumps(
                {
                    "prompt": PROMPTS[0],
                    "max_tokens": OUTPUT_TOKENS,
                    "temperature": 0,
                    "return_token_ids": True,
                }
            )
            asked = Request(f"{url}/v1/completions", body.encode(), {"content-type": "application/json"})
            with urlopen(asked, timeout=PATIENCE_S) as response:
                assert json.load(response)["choices"][0]["token_ids"] == tiny[1][0]
            workers.append({child.pid for child in hosts()})
            process.send_signal(end)
            threading.Thread(target=process.stderr.read, daemon=True).start()
            assert process.wait(PATIENCE_S) in (0, -signal.SIGKILL)
    assert workers[0] == workers[1] == workers[2] != set()
    assert len(set(layouts)) == 1
    assert not any(os.path.exists(f"/proc/{pid}/exe") for pid in workers[0]), "it ended in peace"


@pytest.fixture(scope="class")
def holder(devices: Devices, tiny: Tiny) -> Iterator[Deployment]:
    with served("tp2dp2", options(tiny[0]), devices) as found:
        yield found


class TestWhereAllDevicesAreHeld:
    def test_who_holds_them_answers_as_transformers(self, holder: Deployment, tiny: Tiny) -> None:
        assert_right(holder, tiny)

    @pytest.mark.parametrize(
        ("layout", "need", "way_out"),
        [("tp2dp4", 8, "Use at most 4, or add nodes."), ("pp2", 2, "Wait for them, or end who holds them.")],
    )
    def test_others_are_told_so(
        self, layout: str, need: int, way_out: str, holder: Deployment, devices: Devices, tiny: Tiny
    ) -> None:
        assert len(before := hosts()) == SLOTS
        start_s = time.monotonic()
        with pytest.raises(PlacementFailed) as caught, served(layout, options(tiny[0]), devices):
            pass
        assert time.monotonic() - start_s < 8
        message = str(caught.value)
        assert message.startswith(f"{need} CPU needed; the cluster has {SLOTS} on ")
        assert "; free: 0; held by Worker-" in message
        assert message.count(f" of process {os.getpid()} on {os.uname().nodename} (2)") == 2
        assert message.endswith(way_out)
        assert hosts() == before


@pytest.fixture(scope="class")
def a_device_on_each(devices: Devices) -> Iterator[None]:
    taken = ray.util.placement_group([{"CPU": 1}] * (SLOTS - 1))
    assert taken.wait(PATIENCE_S)
    with second_node(1):
        yield
    ray.util.remove_placement_group(taken)


@pytest.mark.usefixtures("a_device_on_each")
class TestOnTwoNodes:
    def test_tp2_answers_as_transformers(self, devices: Devices, tiny: Tiny) -> None:
        where = Hosting(devices, FrailWorker)
        with served("tp2", options(tiny[0]), where) as found:
            assert len({member.node_id for member in where.gangs[0].members}) == 2
            assert_right(found, tiny)

    def test_a_guest_command_prints_pp2_answers_in_order_and_nothing_else(
        self, devices: Devices, tiny: Tiny, tmp_path: Path
    ) -> None:
        asked = [{"prompt_token_ids": p, "max_tokens": n} for p, n in zip(PROMPTS, OUTPUTS, strict=True)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
        arguments = [str(tiny[0]), "--prompts", str(tmp_path / "prompts.jsonl"), "--json", "--device", "cpu"]
        arguments += ["--layout", "pp2", "--address", head_address()]
        command = [sys.executable, "-m", "launch", "generate", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        assert all(line.startswith("· ") for line in done.stderr.splitlines())
        assert [json.loads(line) for line in done.stdout.splitlines()] == [
            {
                "token_ids": tokens[:count],
                "text": None,
                "finish_reason": "length",
                "prompt_tokens": len(prompt),
            }
            for prompt, tokens, count in zip(PROMPTS, tiny[1], OUTPUTS, strict=True)
        ]

    @pytest.mark.slow
    def test_layers_on_a_disk_are_the_nodes_own(self, devices: Devices, tmp_path: Path) -> None:
        make_model(tmp_path / "model", "llama", num_hidden_layers=8)
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt_token_ids": [5, 6, 7], "max_tokens": 3}))
        arguments = [str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.jsonl"), "--device", "cpu"]
        arguments += ["--layout", "pp2+offload", "--resident-layers", "0", "--address", head_address()]
        command = [sys.executable, "-m", "launch", "generate", *arguments, "--offload-dir"]
        runs = {"": tmp_path / "disk", "refused": Path("/proc/nothing")}
        done = {
            name: subprocess.run(
                [*command, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
            )
            for name, folder in runs.items()
        }
        assert done[""].returncode == 0, done[""].stderr
        assert done[""].stderr.count("come from the disk of ") == 2
        assert list((tmp_path / "disk").iterdir()) == []
        assert done["refused"].returncode == 2
        assert "--offload-dir /proc/nothing: " in done["refused"].stderr
        assert "Traceback" not in done["refused"].stderr
