"""Files that we keep and read back, damaged: each counts as missing, in one line; no start ends with a traceback."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster import files, profile, proof
from cluster.errors import UserError
from cluster.topology import Topology
from launch import deployments, gateway
from launch.batch_run import _begun_with
from launch.compare_journal import NAME, open_journal
from launch.keeper import ORDER, STATE
from launch.kept import shelf
from launch.serve import _ran_before
from launch.state import up_directory
from orchestrator.engine import product_choice
from orchestrator.engine.kernels import hopper
from orchestrator.engine.product_choice import CUBLAS, Decision, Kept, Kind
from orchestrator.journal import MANIFEST, OUTPUT, Journal, line_of
from tests.fakes import TalkingReplica
from tests.served_api import in_loop, says
from tests.unit.machines import SMOL, box
from tests.unit.test_api_batches import client_of, line, serving, submit, wait
from tests.unit.test_compare import DONE, FACTS
from tests.unit.test_kept import kept
from tests.unit.test_measure import profile_of

PAIR: Topology = box("h100", 2)
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "no UTF-8": lambda content: content[:-1].replace(b'"', b'"\xff', 1) + content[-1:],
    "another type": lambda _: b"null",
    "too deep": lambda _: b'{"format":' + b"[" * 100_000,
}


@pytest.fixture(params=DAMAGES)
def damage(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    def strike(path: Path) -> None:
        path.write_bytes(DAMAGES[request.param](path.read_bytes()))

    return strike


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines that were said of it."""
    files._tell.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_profile(damage: Callable[[Path], None], told: Callable[[], list[str]], tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile.save(profile_of(), path)
    damage(path)
    assert profile.read(path) is None
    assert profile.read(path) is None
    [said] = told()
    assert said.startswith(f"{path} is damaged (") and "\n" not in said
    profile.save(profile_of(), path)
    assert profile.read(path) == profile_of()


def test_a_folder_in_its_place_is_named_once(told: Callable[[], list[str]], tmp_path: Path) -> None:
    assert profile.read(tmp_path) is None
    assert told() == [f"{tmp_path} is damaged (Is a directory): it counts as missing"]


def test_a_proof(damage: Callable[[Path], None], told: Callable[[], list[str]], tmp_path: Path) -> None:
    one = proof.Proof(proof.FORMAT, PAIR.name, profile.fingerprint_of(PAIR), "2026-11-22", 2, (), {})
    proof.keep(one, tmp_path, PAIR)
    damage(proof.proof_path(tmp_path, PAIR))
    assert proof.kept(tmp_path, PAIR) is None
    assert len(told()) == 1
    proof.keep(one, tmp_path, PAIR)
    assert proof.kept(tmp_path, PAIR) == one


def test_what_comparisons_measured(
    damage: Callable[[Path], None], told: Callable[[], list[str]], tmp_path: Path
) -> None:
    own = shelf(tmp_path, PAIR, SMOL, "bfloat16", chunk_tokens=2048, max_sequences=256)
    own.add([kept("tp2")])
    damage(own.path)
    own.add([kept("dp2")])
    assert own.read() == [kept("dp2")]
    assert len(told()) == 1


def test_choices_of_kernels(
    damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(product_choice.cublaslt, "version", lambda: 130100)
    spots = [(Kind(64, 64, False), place) for place in product_choice.places(256)]

    def opened() -> Kept:
        return Kept(spots, torch.bfloat16, torch.device("cpu"), alone=True)

    made = [Decision("a", 2e-6, 1e-6)] * len(spots)
    opened().put(made)
    [path] = tmp_path.rglob(product_choice._KEPT_FILE)
    damage(path)
    found = opened()
    assert found.decisions == [None] * len(spots)
    assert product_choice.told(made, found.damaged).reason.endswith("was damaged, and is measured anew")
    found.put(made)
    assert (opened().decisions, opened().damaged) == (made, False)
    path.write_text(json.dumps([["a", 2e-6, 1e-6]]))  # whole, but not of so many cases
    assert opened().decisions == [None] * len(spots)
    assert product_choice.told([Decision(CUBLAS, 1.0, 1.0)]).reason == "the fastest in all of 1 cases"


def test_compiled_kernels(
    damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    compiled: list[int] = []

    def compile_sources(sources: list[str], _: str) -> list[bytes]:
        compiled.append(len(sources))
        return [b'{"\x7fELF' + bytes(range(64))] * len(sources)

    monkeypatch.setattr(hopper.cuda, "compile_sources", compile_sources)
    whole = hopper.binaries([hopper.MANY], torch.bfloat16)
    damage(next(tmp_path.rglob("kernel.cubin")))
    assert hopper.binaries([hopper.MANY], torch.bfloat16) == whole
    assert hopper.binaries([hopper.MANY], torch.bfloat16) == whole
    assert compiled == [1, 1]


@pytest.mark.parametrize("which", [STATE, ORDER])
def test_what_is_up(
    damage: Callable[[Path], None],
    which: str,
    told: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    here = deployments.Here("one", up_directory("one"))
    here.directory.mkdir(parents=True)
    for name in (STATE, ORDER):
        (here.directory / name).write_text(json.dumps({"state": "ready", "keeper_pid": 0, "told": {}}))
    damage(here.directory / which)
    assert deployments.recorded() == {"one": None}
    assert here.describe()["state"] == deployments.DEAD
    here.stop()
    assert here.live() is None
    assert len(told()) == 1
    here.forget()
    assert deployments.recorded() == {}


def test_what_a_coordinators_actor_ran(damage: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("1")
    (tmp_path / STATE).write_text(json.dumps({"port": "4321"}))
    assert gateway._before(tmp_path, "1") == "4321"
    damage(tmp_path / STATE)
    assert gateway._before(tmp_path, "1") is None
    (tmp_path / "run").write_bytes(b"\xff")
    assert gateway._before(tmp_path, "1") is None


@pytest.mark.parametrize("content", [b"", b"tp", b"\xff\xfe", bytes(8)])
def test_the_layout_that_a_killed_server_ran(
    content: bytes, told: Callable[[], list[str]], tmp_path: Path
) -> None:
    note = tmp_path / "layout"
    nothing = {"layout": None, "tensor_parallel_size": None, "pipeline_parallel_size": None}
    args = argparse.Namespace(**nothing, data_parallel_size=None, expert_parallel_size=None)
    assert _ran_before(note, args) is None
    note.write_bytes(content)
    assert _ran_before(note, args) is None
    assert args.layout is None
    assert len(told()) == 1


def test_the_manifest_of_a_batch_that_was_run_here(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """Its answers may be of another model: nothing is mixed with them."""
    manifest = tmp_path / MANIFEST
    manifest.write_text(json.dumps({"model": "tiny"}))
    assert _begun_with(manifest) == {"model": "tiny"}
    damage(manifest)
    with pytest.raises(UserError, match=r"manifest.json cannot be read, .* give another --job-dir"):
        _begun_with(manifest)


def test_a_comparisons_journal(damage: Callable[[Path], None], tmp_path: Path) -> None:
    open_journal(tmp_path, FACTS, fresh=False).add("tp1", 1, DONE)
    path = tmp_path / NAME
    whole = path.read_bytes()
    head, one, _ = whole.split(b"\n")
    path.write_bytes(one)
    damage(path)
    path.write_bytes(head + b"\n" + path.read_bytes() + b"\n" + one + b"\n")
    assert open_journal(tmp_path, FACTS, fresh=False).trials == {"tp1": {1: DONE}}
    path.write_bytes(whole)
    damage(path)
    if not path.read_bytes().startswith(head):
        with pytest.raises(UserError, match="is damaged, or no journal of this version; give another --out"):
            open_journal(tmp_path, FACTS, fresh=False)
    assert open_journal(tmp_path, FACTS, fresh=True).trials == {}


def test_a_batchs_journal(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / OUTPUT
    path.write_bytes(line_of(0))
    damage(path)
    torn = path.read_bytes()
    huge = b'{"id":"batch_req_' + b"9" * 5000 + b'"}\n'
    path.write_bytes(line_of(3) + torn + b"\n" + huge + line_of(7) + torn)
    journal = Journal(tmp_path)
    assert (3 in journal, 7 in journal, journal.completed >= 2) == (True, True, True)


def test_files_and_batches_of_a_server(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """A server starts over them; what is damaged is not there, and the rest is."""

    @in_loop
    async def go() -> None:
        async with serving(tmp_path) as (api, _):
            client = client_of(api)
            lost = await wait(client, await submit(client, line("a")))
            sound = await wait(client, await submit(client, line("b")))
        damage(tmp_path / "batches" / lost.id / MANIFEST)
        damage(tmp_path / "files" / lost.input_file_id / "meta.json")
        async with serving(tmp_path, TalkingReplica(says("Hello"))) as (api, _):
            client = client_of(api)
            assert [one.id async for one in client.batches.list()] == [sound.id]
            assert lost.input_file_id not in [one.id async for one in client.files.list()]
            for path in (f"/v1/batches/{lost.id}", f"/v1/files/{lost.input_file_id}"):
                assert (await api.http.get(path)).status_code == 404
            assert (await wait(client, await submit(client, line("c")))).status == "completed"

    go()


def test_rays_own_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from launch.facts import ray_cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_bytes(b"\xff\xfe")
    assert ray_cluster(tmp_path) is None
