"""A full profile of two H100s, with probes that answer at once: what is asked, kept, applied and shown."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest

from cluster import measure as measure_module
from cluster.children import ChildFailed, Failure
from cluster.discover import discover
from cluster.link_probes import Sweep, Swept
from cluster.measure import by_driver, measure
from cluster.paths import Curve, Op, Path, best_path, curve_of
from cluster.profile import Detail, DiskRead, HostCopy, HostPull, MachineProfile, PairCopy, Rates, apply, kept
from cluster.proof import Outcome, Proof, Step, Trusted
from cluster.prove import NO_PEERS
from cluster.topology import Provenance
from launch import profile as profile_command
from launch.__main__ import main
from launch.config import read_machine
from launch.profile import show, to_json
from tests.fake_nvml import dual_4090, dual_h100, no_driver

H100S = discover(binding=dual_h100())
PRODUCTS = {"bfloat16": {1: 3e12, 2048: 7e14}, "int8": {2048: 1.2e15}}
LATENCY_S = {Path.PEER: 3e-6, Path.MAPPED: 5e-6, Path.NCCL: 12e-6, Path.SYMMETRIC: 8e-6}
RATE = {Path.PEER: 100e9, Path.MAPPED: 13e9, Path.NCCL: 300e9, Path.SYMMETRIC: 200e9}
MOST = {Path.PEER: 4 << 20, Path.MAPPED: 1 << 20}


def swept(asked: Sweep) -> Swept:
    [path] = asked.paths
    curves: list[Curve] = []
    for op in asked.ops:
        if op is Op.ALL_REDUCE or path is Path.NCCL:
            for in_graph in (False, True):
                sizes = [n for n in asked.sizes if n <= MOST.get(path, n)]
                points = [(n, LATENCY_S[path] + n / RATE[path] + (not in_graph) * 2e-5) for n in sizes]
                curves.append(curve_of(op, path, 2, in_graph, points, MOST.get(path)))
    return Swept(tuple(curves), {}, None)


PROOF = Proof(
    1,
    "2 × NVIDIA H100 80GB HBM3",
    "",
    "2026-11-22T07:00:00+00:00",
    2,
    (Step("sums through peer memory", Path.PEER, Outcome.PASSED), Step("NCCL's", Path.NCCL, Outcome.PASSED)),
    {},
)


class Probes:
    """Satisfies cluster.children.Ranks."""

    def __init__(self, hangs: Callable[[str, tuple[object, ...]], bool] = lambda name, args: False) -> None:
        self.hangs = hangs
        self.asked: list[str] = []
        self.environment: dict[str, str] = {}

    def __call__(self, count: int, environment: dict[str, str], said: object) -> Probes:
        self.environment = environment
        return self

    def each(self, job: Callable[..., Any], args: Sequence[Sequence[Any]], limit_s: float) -> list[Any]:
        name = job.__name__
        self.asked.append(name)
        if self.hangs(name, tuple(args[0])):
            raise ChildFailed(1, Failure.HUNG, f"no sign of life for {limit_s:g} s")
        if name == "sweep":
            return [swept(own[-1]) for own in args]
        if name == "host_copies":
            return [
                (
                    [HostCopy(rank, True, True, at_once, 5e10 / (1 + at_once)) for at_once in (False, True)],
                    (5, 16),
                )
                for rank in range(len(args))
            ]
        if name == "host_pulls":
            return [HostPull(rank, 5.4e10, 5.2e10) for rank in range(len(args))]
        answers = {
            "rates": Rates({"bfloat16": 3e12}, {"bfloat16": 7e14}, 2e-5),
            "detail": Detail(3.1e12, 2.9e12, PRODUCTS, 8192, 4e-6, 1e-6),
            "pair_copies": [PairCopy(0, 1, 3.9e11), PairCopy(1, 0, 3.8e11)],
            "disk_read": DiskRead("/cache", 6e9, True),
        }
        return [answers[name]] * len(args)

    def close(self) -> None:
        pass


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Probes:
    found = Probes()
    monkeypatch.setattr(measure_module, "Children", found)
    return found


TRUSTED = Trusted((Path.PEER, Path.MAPPED, Path.NCCL, Path.SYMMETRIC))


def full(cache: File, said: Callable[[str], None] = print, trusted: Trusted = TRUSTED) -> MachineProfile:
    return measure(H100S, cache, said, full=True, trusted=trusted)


def test_a_full_profile_holds_everything_and_the_planner_gets_it(probes: Probes, tmp_path: File) -> None:
    profile = full(tmp_path)
    assert kept(tmp_path, H100S) == profile
    assert measure(H100S, tmp_path, print) == profile, "it serves where a quick one is asked for"
    assert probes.asked.count("rates") == 1
    machine = apply(profile, H100S, "bfloat16")
    first = machine.devices[0]
    assert (first.products, first.provenance) == (PRODUCTS, Provenance.MEASURED)
    assert (first.host_bytes_per_s, first.host_together_bytes_per_s) == (5.4e10, 5.2e10)
    assert machine.host_bytes and profile.topology.host_bytes == machine.host_bytes
    link = machine.link(0, 1)
    small = best_path(link.curves, Op.ALL_REDUCE, 2, 16 << 10, in_graph=True)
    assert small is not None
    assert small.path is Path.PEER
    assert profile.details[0].pcie_generation == 5
    assert {c.op for c in profile.curves if c.path is Path.NCCL and c.in_graph} == set(Op)
    assert max(n for c in profile.curves for n, _ in c.points) == 256 << 20


def test_a_profile_without_pulls_goes_by_what_both_directions_carried(probes: Probes, tmp_path: File) -> None:
    before = replace(full(tmp_path), host_pulls=())
    both = (
        HostCopy(0, True, True, False, 5.4e10),
        HostCopy(0, True, True, True, 2.8e10),
        HostCopy(0, False, True, True, 4.2e10),
        HostCopy(1, True, True, False, 5.4e10),
        HostCopy(1, True, True, True, 1.0e10),
        HostCopy(1, False, True, True, 1.5e10),
    )
    devices = apply(replace(before, host_copies=both), H100S, "bfloat16").devices
    assert [d.host_bytes_per_s for d in devices] == [5.4e10, 5.4e10]
    assert [d.host_together_bytes_per_s for d in devices] == [5.4e10, 2.5e10]
    prior = apply(replace(before, host_copies=()), H100S, "bfloat16").devices
    assert [d.host_bytes_per_s for d in prior] == [d.host_bytes_per_s for d in H100S.devices]


def test_a_quick_profile_is_no_answer_to_who_wants_a_full_one(probes: Probes, tmp_path: File) -> None:
    quick = measure(H100S, tmp_path, print)
    assert not quick.full
    assert {c.path for c in quick.curves} == {Path.PEER, Path.MAPPED, Path.NCCL}
    assert {c.op for c in quick.curves} == {Op.ALL_REDUCE, Op.SEND_RECV}
    assert quick.host_copies == ()
    assert [pull.together_bytes_per_s for pull in quick.host_pulls] == [5.2e10, 5.2e10]
    assert full(tmp_path).full


def test_only_trusted_paths_are_measured_and_nccl_is_told(probes: Probes, tmp_path: File) -> None:
    profile = full(tmp_path, trusted=Trusted((Path.MAPPED, Path.NCCL), NO_PEERS))
    assert {c.path for c in profile.curves} == {Path.MAPPED, Path.NCCL}
    assert probes.environment["NCCL_P2P_DISABLE"] == "1"
    assert probes.environment["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"


def test_unproved_the_drivers_word_decides() -> None:
    assert Path.PEER in by_driver(H100S).paths
    assert Path.PEER not in by_driver(discover(binding=dual_4090())).paths


def test_a_collective_that_hangs_is_told_of_and_costs_no_other(probes: Probes, tmp_path: File) -> None:
    probes.hangs = lambda name, args: name == "sweep" and args[-1].ops == (Op.ALL_TO_ALL,)  # type: ignore[attr-defined]
    said: list[str] = []
    profile = full(tmp_path, said.append)
    assert profile.absent == {"all-to-all of 2 ranks by nccl": "rank 1 hung: no sign of life for 60 s"}
    assert {c.op for c in profile.curves if c.path is Path.NCCL} == set(Op) - {Op.ALL_TO_ALL}
    assert any("hung" in line for line in said)


@pytest.mark.parametrize("name", ["pair_copies", "disk_read"])
def test_what_plans_can_do_without_may_fail(probes: Probes, tmp_path: File, name: str) -> None:
    probes.hangs = lambda job, args: job == name
    profile = full(tmp_path)
    assert len(profile.absent) == 1
    assert profile.curves


def test_people_see_tables_paths_and_crossovers(
    probes: Probes, tmp_path: File, capsys: pytest.CaptureFixture[str]
) -> None:
    show(full(tmp_path), None)
    shown = capsys.readouterr().out
    for words in (
        "2 × NVIDIA H100 80GB HBM3",
        "3,100",
        "TFLOP/s with a 8192 × 8192 weight, by rows",
        "pinned memory, GPU 1",
        "disk of /cache: 6.0 GB/s read",
        "GB/s pulled from pinned memory",
        "all-reduce of 2 ranks, µs",
        "send-recv, nccl, in a graph",
        "fastest all-reduce of 2 ranks, inside graphs: peer memory, nccl from 1.3",
        "(16 KB: 3.2 µs)",
    ):
        assert words in shown, shown


def test_json_is_one_object_with_the_proof(
    probes: Probes, tmp_path: File, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(profile_command, "found_here", lambda device: discover(1, binding=dual_h100()))
    asked = argparse.Namespace(json=True, refresh=False, out=None, address=None, device="auto")
    assert profile_command.run(asked) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["machine"] == "1 × NVIDIA H100 80GB HBM3"
    assert printed["proof"] is None, "one GPU has nothing to prove"
    assert printed["details"][0]["products"]["bfloat16"]["2048"] == 7e14
    assert to_json(full(tmp_path), None)["driver"] == "550.54.14"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--out /nowhere/box.json", "it must be a .json or .yaml file in a directory that exists"),
        ("--out box.txt", "it must be a .json or .yaml file"),
        ("--device cuda", "use --device cpu"),
        ("--address 10.0.0.1:6379", "add --out FILE.yaml"),
        ("--devices cpu", "the nearest is --device"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    flags: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        profile_command, "found_here", lambda device: discover(device=device, binding=no_driver())
    )
    try:
        code = main(["profile", *flags.split()])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_profile_can_be_written_as_a_recipe(
    probes: Probes, tmp_path: File, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(profile_command, "found_here", lambda device: H100S)
    monkeypatch.setattr(profile_command, "proved", lambda *asked, **more: PROOF)
    assert main(["profile", "--out", str(tmp_path / "box.yaml")]) == 0
    assert "sums through peer memory  passed" in capsys.readouterr().out
    machine = read_machine(str(tmp_path / "box.yaml"))
    assert (
        machine.devices[1].bandwidth_bytes_per_s == 3.1e12
    )  # a plain read is faster than the library's product
    assert machine.link(0, 1).latency_s == pytest.approx(12e-6, rel=0.01)
    assert (tmp_path / "box.yaml").read_text().startswith("# Measured by shardwise profile, ")
