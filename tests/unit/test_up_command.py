"""`up`, `status`, `logs` and `down` on this machine: real processes, with a stand-in for the server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.catalog import sheet
from cluster.errors import BadRecipe
from launch import deployments, ray_serve
from launch.__main__ import main
from launch.keeper import PID, READY, started
from launch.live import gpu_states
from launch.state import up_directory
from tests.fake_nvml import dual_h100

PATIENCE_S = 20.0
TINY = "model: {name: /models/tiny}\nserve: {device: cpu, port: 0}\n"
Ran = tuple[int, str, str]


@pytest.fixture
def shardwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.setattr(deployments, "SHARDWISE", (sys.executable, "-m", "tests.kept_server", PID))
    monkeypatch.setattr("launch.status.LOOK_S", 0.1)
    (tmp_path / "tiny.yaml").write_text(TINY)

    def run(*argv: str) -> Ran:
        code = main(list(argv))
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    for name in deployments.recorded():
        deployments.Here(name, up_directory(name)).forget()


def state(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((up_directory(name) / "state.json").read_text())
    return found


def test_up_status_logs_down(shardwise: Callable[..., Ran], tmp_path: Path) -> None:
    recipe = str(tmp_path / "tiny.yaml")
    code, url, said = shardwise("up", recipe)
    assert code == 0
    assert url.startswith("http://127.0.0.1:")
    assert "loading nothing" in said
    assert "serving /models/tiny on" in said

    code, again, said = shardwise("up", recipe)
    assert (code, again) == (0, url)
    assert "tiny is up already: ready" in said

    (tmp_path / "other.yaml").write_text(TINY.replace("port: 0", "port: 1"))
    code, out, said = shardwise("up", str(tmp_path / "other.yaml"), "--name", "tiny")
    assert (code, out) == (2, "")
    assert said.splitlines()[-1].startswith(
        "shardwise up: tiny is up already, with another recipe: shardwise down"
    )

    code, out, _ = shardwise("status", "--json")
    [told] = json.loads(out)["deployments"]
    assert (told["name"], told["state"], told["url"] + "\n", told["where"]) == (
        "tiny",
        READY,
        url,
        "this machine",
    )
    live = told["live"]
    assert (live["layout"], live["devices"], live["running"], live["waiting"]) == ("dp2", 2, 3, 2)
    assert (live["finished"], live["failed"], live["refused"]) == (5, {"GangDied": 1}, {"Overloaded": 7})
    assert live["replicas_alive"] == [True, False]
    assert 1000 < told["tokens_per_s"] <= 10_000  # 1000 between two looks, 0.1 s and a bit apart

    code, out, _ = shardwise("status")
    assert code == 0
    assert "tiny as dp2 on 2 devices; 1 of 2 replicas alive" in out
    assert "plan: It is the only one." in out
    assert "3 requests running, 2 waiting; KV cache 25%" in out
    assert "! 7 requests refused: Overloaded" in out
    assert "! 2 restarts of replicas" in out

    code, out, _ = shardwise("logs", "tiny", "-n", "1")
    assert code == 0
    [line] = out.splitlines()
    assert line.endswith("serving /models/tiny on " + url.strip())

    pids = [state("tiny")[key] for key in ("keeper_pid", "server_pid")]
    code, out, said = shardwise("down", "tiny")
    assert (code, out) == (0, "")
    assert said.splitlines()[-1].endswith("tiny is down")
    assert [started(pid) for pid in pids] == [None, None]
    assert json.loads(shardwise("status", "--json")[1]) == {"deployments": []}
    assert shardwise("status")[1] == "nothing is up; shardwise up RECIPE starts something\n"


def test_a_taken_port_is_told_before_anything_starts(
    shardwise: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        pytest.fail("it was started")

    with monkeypatch.context() as patched, socket.create_server(("127.0.0.1", 0)) as server:
        patched.setattr(deployments.Here, "start", start)
        patched.setattr("launch.up._gpus_for", start)
        port = server.getsockname()[1]
        code, out, said = shardwise("up", str(tmp_path / "tiny.yaml"), "--port", str(port))
    assert (code, out) == (2, "")
    assert said == (
        f"shardwise up: cannot listen on 127.0.0.1:{port}: Address already in use; give another --port\n"
    )
    assert deployments.recorded() == {}

    assert shardwise("up", str(tmp_path / "tiny.yaml"), "--port", str(port))[0] == 0
    again = shardwise("up", str(tmp_path / "tiny.yaml"), "--port", str(port))
    assert again[0] == 0, "its own port is in nobody's way"
    code, _, said = shardwise("up", str(tmp_path / "tiny.yaml"), "--port", str(port), "--name", "second")
    assert (code, said) == (
        2,
        f"shardwise up: port {port} is tiny's; give another --port, or end that: shardwise down tiny\n",
    )


def test_a_start_that_fails_is_told_in_its_own_words_and_leaves_nothing(
    shardwise: Callable[..., Ran], tmp_path: Path
) -> None:
    code, out, said = shardwise("up", str(tmp_path / "tiny.yaml"), "--model", "refused")
    assert (code, out) == (2, "")
    assert said.splitlines()[-1] == "shardwise up: no such model; give another"
    assert said.count("no such model") == 1
    assert deployments.recorded() == {}


def test_what_was_killed_is_told_and_brought_up_again(shardwise: Callable[..., Ran], tmp_path: Path) -> None:
    shardwise("up", str(tmp_path / "tiny.yaml"))
    before = state("tiny")
    os.kill(before["keeper_pid"], signal.SIGKILL)
    end_s = time.monotonic() + PATIENCE_S
    while started(before["keeper_pid"]) or started(before["server_pid"]):
        assert time.monotonic() < end_s
        time.sleep(0.01)
    _, out, _ = shardwise("status")
    assert out.startswith("tiny: dead")
    code, _, said = shardwise("up", str(tmp_path / "tiny.yaml"))
    assert code == 0
    assert "serving" in said
    assert state("tiny")["keeper_pid"] != before["keeper_pid"]
    assert shardwise("down", "--all", "--now")[0] == 0


@pytest.mark.parametrize("asked", [("far", "tiny"), ("--all",)])
def test_a_cluster_that_is_lost_is_forgotten_and_the_rest_ended(
    shardwise: Callable[..., Ran], tmp_path: Path, asked: tuple[str, ...]
) -> None:
    shardwise("up", str(tmp_path / "tiny.yaml"))
    deployments.record_there("far", "127.0.0.1:1")
    code, _, said = shardwise("down", *asked)
    assert code == 2
    assert "To forget what was up there: --now" in said
    code, _, said = shardwise("down", *asked, "--now")
    assert code == 0
    assert "far: forgotten; its cluster does not answer" in said
    assert "tiny is down" in said
    assert deployments.recorded() == {}


def test_only_what_was_brought_up_in_a_lost_cluster_is_forgotten(
    shardwise: Callable[..., Ran], tmp_path: Path
) -> None:
    shardwise("up", str(tmp_path / "tiny.yaml"))
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("tiny", str(mine), "../.."):
        code, _, said = shardwise("down", name, "--address", "127.0.0.1:1", "--now")
        assert code != 0
        assert "no Ray cluster answers at 127.0.0.1:1" in said
    assert mine.is_dir()
    assert set(deployments.recorded()) == {"tiny"}


def test_mistakes_are_one_line(shardwise: Callable[..., Ran], tmp_path: Path) -> None:
    for argv, says in (
        (("down",), "name what shall end, or give --all; up from this machine: nothing"),
        (("down", "x"), "x is not up; up from this machine: nothing"),
        (("down", "x", "--timeout", "0"), "--timeout is 0; it must be over 0"),
        (("logs", "x"), "x is not up"),
        (("logs", "x", "-n", "-1"), "--lines is -1"),
        (("status", "x"), "x is not up"),
        (("status", "--address", "ray://127.0.0.1:1"), "no Ray cluster answers at ray://127.0.0.1:1"),
        (("up", "nowhere"), "recipe nowhere does not exist"),
        (
            ("up", str(tmp_path / "tiny.yaml"), "--address", "127.0.0.1:1"),
            "no Ray cluster answers at 127.0.0.1:1",
        ),
        (
            ("up", str(tmp_path / "tiny.yaml"), "--address", "ray://127.0.0.1:1"),
            "up takes HOST:PORT of the head",
        ),
        (("up", "dual-4090", "--model", "m"), "the recipe is for 2 × NVIDIA GeForce RTX 4090; free here: "),
    ):
        code, out, said = shardwise(*argv)
        line = said.splitlines()[-1]
        assert (code, out) == (2, ""), said
        assert line.startswith(f"shardwise {argv[0]}: "), said
        assert says in line


def test_in_the_foreground_it_is_serve_itself(
    shardwise: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []
    monkeypatch.setattr("launch.serve.run", lambda args: served.append(args) or 3)
    code, out, _ = shardwise("up", str(tmp_path / "tiny.yaml"), "--foreground", "--port", "7")
    assert (code, out) == (3, "")
    [args] = served
    assert (args.model, args.device, args.port) == ("/models/tiny", "cpu", 7)
    assert args.batch_dir == tmp_path / "state" / "shardwise" / "batches" / "tiny"
    assert deployments.recorded() == {}


@pytest.mark.parametrize(
    ("args", "says"), [({}, "lack recipe"), ({"recipe": "x", "prot": 1}, "have an unknown key 'prot'")]
)
def test_what_rayservice_hands_over_is_checked(args: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRecipe, match=says):
        ray_serve.app(args)


def test_gpus_go_to_who_comes_first_and_the_rest_to_the_next(
    shardwise: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four cards; each deployment takes what its plan does, of those that are free."""
    wanted: list[tuple[str, str]] = []

    def planned(asked: Any, progress: Any) -> tuple[int, ...]:
        wanted.append((asked.name, os.environ["CUDA_VISIBLE_DEVICES"]))
        return (1, 0) if asked.name != "third" else (0,)

    card = sheet("rtx-4090").device(0, "here", free_bytes=1)
    monkeypatch.setattr("launch.machine.visible_here", lambda: [0, 1, 2, 3])
    monkeypatch.setattr("launch.machine.found_here", lambda device: type("M", (), {"devices": [card]})())
    monkeypatch.setattr("launch.up._planned_devices", planned)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("device: cpu", "device: cuda"))
    for name in ("first", "second"):
        assert shardwise("up", str(tmp_path / "tiny.yaml"), "--name", name)[0] == 0
    assert wanted == [("first", "0,1,2,3"), ("second", "2,3")]
    order = json.loads((up_directory("second") / "order.json").read_text())
    assert order["environment"] == {"CUDA_VISIBLE_DEVICES": "2,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    code, _, said = shardwise("up", str(tmp_path / "tiny.yaml"), "--name", "third")
    assert code == 2
    assert said.splitlines()[-1] == (
        "shardwise up: all 4 GPUs are held by first, second; end one: shardwise down first"
    )
    assert shardwise("down", "first")[0] == 0
    assert shardwise("up", str(tmp_path / "tiny.yaml"), "--name", "third")[0] == 0
    assert wanted[-1] == ("third", "0,1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)


def test_gpus_of_a_deployment_are_told_as_the_driver_sees_them() -> None:
    first, second = gpu_states([0, 1], dual_h100())
    assert [first.index, second.index] == [0, 1]
    assert str(second).startswith("GPU 1, NVIDIA H100 80GB HBM3: ")
    assert " of 85.5 GB, " in str(second)
    assert " W, " in str(second)
    assert gpu_states([1], dual_h100()) == [second]


@pytest.mark.parametrize("loss", ["damaged", "removed"])
def test_a_keeper_of_which_nothing_is_written_any_more_is_found_and_ended(
    loss: str, shardwise: Callable[..., Ran], tmp_path: Path
) -> None:
    recipe = str(tmp_path / "tiny.yaml")
    assert shardwise("up", recipe)[0] == 0
    keeper, server = state("tiny")["keeper_pid"], state("tiny")["server_pid"]
    if loss == "removed":
        shutil.rmtree(up_directory("tiny"))
    for name in ("order.json", "state.json") if loss == "damaged" else ():
        (up_directory("tiny") / name).write_bytes(b"\0\0")
    told = json.loads(shardwise("status", "--json")[1])["deployments"]
    assert [(one["name"], one["state"]) for one in told] == [("tiny", deployments.UNREADABLE)]
    code, _, said = shardwise("up", recipe)
    assert code == 2
    assert f"tiny is {deployments.UNREADABLE}; end it first: shardwise down tiny" in said
    code, _, said = shardwise("down", "tiny")
    assert code == 0
    assert said.splitlines()[-1].endswith("tiny is down")
    assert started(keeper) is None or until_gone(keeper)
    assert started(server) is None
    assert deployments.recorded() == {}
    assert not up_directory("tiny").exists()


def until_gone(pid: int) -> bool:
    end_s = time.monotonic() + PATIENCE_S
    while started(pid) is not None and time.monotonic() < end_s:
        time.sleep(0.01)
    return started(pid) is None


def test_what_may_be_in_a_cluster_is_not_said_to_be_down(
    shardwise: Callable[..., Ran], tmp_path: Path
) -> None:
    deployments.record_there("far", "10.0.0.1:6379")
    (up_directory("far") / "order.json").write_bytes(b"\0")
    code, _, said = shardwise("down", "far")
    assert code == 0
    assert "far is down" not in said
    assert "were it in a Ray cluster, it is up there still: shardwise down far --address HOST:PORT" in said
    assert deployments.recorded() == {}
