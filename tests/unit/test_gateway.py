"""The way of a batch through a detached actor, without Ray: the client's half, the actor's half, a server behind."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import BadRequest, GangDied, UserError
from launch import gateway as gateways
from launch.batch_client import ServerGone
from launch.batch_follow import submit
from launch.batch_input import Source
from launch.gateway import Gateway, here
from launch.keeper import PID, READY
from launch.progress import Progress
from launch.ray_batch import RayBatchClient
from launch.version import our_version

PATIENCE_S = 20.0
QUIET = Progress(quiet=True)


class Actor:
    """cluster.detached.Detached without Ray. It dies as often as asked, before a call is made."""

    name = "tiny"

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.deaths = gateway, 0

    def call(self, method: str, *args: object, timeout_s: float) -> Any:
        if self.deaths:
            self.deaths -= 1
            raise GangDied("tiny is gone")
        return getattr(self.gateway, method)(*args)


def client_of(actor: Actor) -> RayBatchClient:
    client = RayBatchClient.__new__(RayBatchClient)
    client.address, client._actor = "ray://test:1", actor  # type: ignore[assignment]
    return client


def until(right: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not right():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Actor]:
    """Behind it the real API over a replica that answers by itself."""
    root, store = str(Path(__file__).parents[2]), tmp_path_factory.mktemp("store")
    order = {"argv": [], "environment": {"PYTHONPATH": root}, "keys": [], "run": "1", "told": {"digest": "d"}}
    program = (sys.executable, "-m", "tests.fake_server", "--kept", PID, str(store))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patched.setattr(gateways, "SHARDWISE", program)
        gateway = Gateway("tiny", order)
        until(lambda: gateway.describe()["state"] == READY)
        yield Actor(gateway)
        gateway.stop()
        gateway._keeping.join(PATIENCE_S)


def rows(path: Path, count: int) -> Source:
    path.write_text("".join(json.dumps({"prompt": f"row {i}", "max_tokens": 2}) + "\n" for i in range(count)))
    return Source(path)


def test_a_batch_goes_up_in_chunks_and_comes_down_in_pieces(
    actor: Actor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.ray_batch.CHUNK_BYTES", 100)
    monkeypatch.setattr("launch.ray_batch._PAUSE_S", 0.0)
    monkeypatch.setattr(gateways, "_PIECE_BYTES", 1000)
    client = client_of(actor)
    client.check(our_version())
    source = rows(tmp_path / "in.jsonl", 40)
    actor.deaths = 1  # at the first chunk
    job = submit(client, source, QUIET)["id"]
    until(lambda: client.get(f"/v1/batches/{job}")["status"] == "completed")
    batch = client.get(f"/v1/batches/{job}")
    client.download(batch["output_file_id"], tmp_path / "out.jsonl")
    told = [json.loads(line)["custom_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(told) == sorted(f"row-{i}" for i in range(1, 41))
    assert (tmp_path / "out.jsonl").stat().st_size > 4000, "several pieces"
    assert list((gateways.coordinator_directory("tiny") / "uploads").iterdir()) == []


def test_what_is_wrong_is_told(actor: Actor, tmp_path: Path) -> None:
    client = client_of(actor)
    with pytest.raises(UserError, match="there is no batch 'batch_nope'"):
        client.get("/v1/batches/batch_nope")
    with pytest.raises(BadRequest, match="'/v1/chat/completions' is not asked by way of Ray"):
        client.post("/v1/chat/completions", {})
    with pytest.raises(BadRequest, match="is no upload's id"):
        actor.gateway.append("../../x", 0, b"")
    with pytest.raises(BadRequest, match="is no file's id"):
        actor.gateway.piece("../../x", 0)
    with pytest.raises(BadRequest, match="the chunk begins at 5, and 0 bytes have come"):
        actor.gateway.append("0" * 32, 5, b"x")
    with pytest.raises(UserError, match=rf"is shardwise {our_version()}, and this is 9\.9\.9; use the same"):
        client.check("9.9.9")
    actor.deaths = 1
    with pytest.raises(ServerGone, match="tiny is gone"):
        client.get("/v1/batches")


def test_a_chunk_that_comes_twice_is_there_once(actor: Actor) -> None:
    upload = "a" * 32
    assert actor.gateway.append(upload, 0, b"abc") == 3
    assert actor.gateway.append(upload, 3, b"def") == 6
    assert actor.gateway.append(upload, 3, b"def") == 6
    assert (gateways.coordinator_directory("tiny") / "uploads" / upload).read_bytes() == b"abcdef"


def test_a_server_that_died_is_waited_for_by_those_who_poll(actor: Actor) -> None:
    client = client_of(actor)
    os.kill(actor.gateway.describe()["server_pid"], 9)
    until(lambda: actor.gateway.describe()["state"] != READY)
    with pytest.raises(ServerGone, match="tiny does not serve now"):
        client.get("/v1/batches")
    until(lambda: actor.gateway.describe()["state"] == READY)
    assert client.get("/v1/models")["data"][0]["id"] == "bytes"


def test_an_actor_made_again_serves_on_the_same_port_and_another_deployment_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    directory = gateways.coordinator_directory("tiny")
    directory.mkdir(parents=True)
    assert gateways._before(directory, "1") is None
    (directory / "state.json").write_text('{"state": "waiting to start again", "url": null, "port": "4321"}')
    (directory / "log").write_text("said")
    assert gateways._before(directory, "1") == "4321"
    assert gateways._before(directory, "2") is None
    assert not (directory / "log").exists()


def test_keys_travel_to_a_file_for_the_server_alone_with_one_for_who_comes_by_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    show = "import sys; print('shardwise serve:', *sys.argv[1:]); sys.exit(2)"
    monkeypatch.setattr(gateways, "SHARDWISE", (sys.executable, "-c", show))
    order = {"argv": ["serve"], "environment": {}, "keys": ["k" * 16], "run": "1", "told": {"digest": "d"}}
    gateway = Gateway("keyed", order)
    gateway._keeping.join(PATIENCE_S)
    path = gateways.coordinator_directory("keyed") / gateways.KEYS
    given, ours = path.read_text().splitlines()
    assert given == "k" * 16
    assert gateway._key == ours
    assert len(ours) >= 32
    assert path.stat().st_mode & 0o777 == 0o600
    [failure] = gateway.describe()["failures"]
    [told] = failure["words"]
    assert f"--api-key-file {path}" in told
    assert f"--batch-dir {path.with_name('batches')}" in told


def test_where_a_server_that_listens_everywhere_is_asked() -> None:
    assert here("http://0.0.0.0:80") == "http://127.0.0.1:80"
    assert here("http://[::]:80") == "http://[::1]:80"
    assert here("http://10.0.0.1:80") == "http://10.0.0.1:80"
