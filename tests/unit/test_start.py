"""The limits that a deployment's memory leaves; replicas that are started once more."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, cast

import pytest

from cluster import actors
from cluster.errors import BadLayout, GangDied, PlacementFailed
from cluster.gang import Answer, Call, Gang, Member
from launch import start
from launch.configured import limits_for
from launch.options import EngineOptions
from launch.placed import Placed
from launch.progress import Progress
from launch.start import Restarting
from orchestrator.scheduler import SchedulerConfig
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims, Shard
from strategies.source import ModelSource, SourceKind
from tests.unit.machines import SMOL

OPTIONS = EngineOptions(
    source=ModelSource("smol", None, SourceKind.BUILTIN),
    spec=SMOL,  # 8192 positions
    device="cpu",
    dtype="float32",
    dummy_weights=True,
    max_model_len=None,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    block_size=16,
    num_blocks=None,
    prefix_caching=True,
    seed=0,
    address=None,
    peer_access=True,
)
ONE = ParallelDims()
LIMITS = SchedulerConfig(num_blocks=8)


def test_the_context_is_the_models_where_it_fits() -> None:
    limits = limits_for(10_000, ONE, OPTIONS)
    assert limits.max_model_len == 8192
    assert limits.num_blocks == 4 * 512  # more than four sequences fill is of no use


def test_the_context_is_what_fits_where_that_is_less() -> None:
    limits = limits_for(40, ONE, OPTIONS)
    assert (limits.max_model_len, limits.num_blocks) == (640, 40)


def test_a_context_asked_for_is_what_there_is_room_for() -> None:
    limits = limits_for(40, ONE, replace(OPTIONS, max_model_len=100))
    assert (limits.max_model_len, limits.num_blocks) == (100, 4 * 7)  # of 7 blocks each, the last not full


def test_fewer_blocks_may_be_asked_for_but_no_more_than_fit() -> None:
    assert limits_for(100, ONE, replace(OPTIONS, num_blocks=33)).num_blocks == 33
    assert limits_for(100, ONE, replace(OPTIONS, num_blocks=500)).num_blocks == 100


def test_as_many_batches_in_flight_as_stages() -> None:
    assert limits_for(100, ParallelDims(tp=2, pp=3), OPTIONS).groups == 3


@pytest.mark.parametrize(
    ("blocks", "asked", "says"),
    [
        (31, None, "tp2: 496 KV tokens fit beside the weights, fewer than a context of 512"),
        (40, 641, "tp2: 640 KV tokens fit beside the weights, fewer than a context of 641"),
        (0, None, "tp2: 0 KV tokens fit"),
    ],
)
def test_a_context_that_does_not_fit(blocks: int, asked: int | None, says: str) -> None:
    with pytest.raises(BadLayout, match=says):
        limits_for(blocks, ParallelDims(tp=2), replace(OPTIONS, max_model_len=asked))
    whole = replace(OPTIONS, max_model_len=asked, format="int4", offload=True)
    with pytest.raises(BadLayout, match=re.escape(says.replace("tp2:", "tp2+int4+offload:"))):
        limits_for(blocks, ParallelDims(tp=2), whole)


class OneGang:
    """A gang of one that does nothing."""

    def __init__(self) -> None:
        self.members = (Member(0, "127.0.0.1", "local", 1, 0, ""),)
        self.killed = threading.Event()

    def kill(self) -> None:
        self.killed.set()


class Roomy(OneGang):
    """Two ranks on one host, one on another, of whose memory each says how much there is."""

    def __init__(self) -> None:
        super().__init__()
        hosts = ("here", "there", "here")
        self.members = tuple(Member(i, host, host, i, 0, "") for i, host in enumerate(hosts))

    def call(self, index: int, method: str) -> Any:
        assert method == "host_bytes"
        found: Future[int] = Future()
        found.set_result({"here": 20, "there": 7}[self.members[index].node] * 10**9)
        return found


def test_every_host_has_room_for_the_kv_of_its_ranks() -> None:
    placed = [Placed(cast(Gang, Roomy()), (0, 1, 2))]
    start._check_host_room(placed, 7)
    with pytest.raises(BadLayout, match=r"of there is 7.5 GB of host memory, of which 7.0 GB is"):
        start._check_host_room(placed, 7.5)
    with pytest.raises(BadLayout, match=r"11 for 2 ranks of here is 22.0 GB .*20.0 GB .*give 10.0 or less"):
        start._check_host_room(placed, 11)


def test_host_memory_of_less_than_a_block_is_refused_before_a_worker_starts() -> None:
    asked = replace(OPTIONS, host_kv_gb=1e-5)  # 10,000 bytes
    nobody = cast(Any, object())  # of whom nothing can be asked
    with (
        pytest.raises(BadLayout, match=r"--host-kv-gb 1e-05 holds no KV block: .* give 0\.\d+ or more"),
        start.deployment(nobody, ONE, asked, Progress(quiet=True)),
    ):
        pass


class OneByOne:
    """Satisfies Devices; the deployment's replicas were two."""

    def __init__(self) -> None:
        self.gangs = [OneGang(), OneGang()]
        self.given: list[OneGang] = []
        self.restarting = Restarting(
            self, ONE, OPTIONS, [], SchedulerConfig(num_blocks=8), cast(list[Gang], self.gangs)
        )

    def acquire(
        self, worker_class: type, sizes: Sequence[int], device: str, *, timeout_s: float
    ) -> Sequence[Gang]:
        assert list(sizes) == [1]
        self.given.append(OneGang())
        return cast(list[Gang], self.given[-1:])


CUT_BY_A_PLAN = tuple(
    replace(shard, layers=layers)
    for shard, layers in zip(shard_replica(SMOL, ParallelDims(pp=2)), (range(20), range(20, 30)), strict=True)
)


class LeftGang(OneGang):
    """What a coordinator that was killed left: a replica of two stages, at rest and loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.members = tuple(Member(i, "127.0.0.1", "local", i, i, "") for i in range(2))

    def call(self, index: int, method: str, *args: object) -> Call:
        told = {"rest": LIMITS, "weight_bytes": 1000 + index, "its_shard": CUT_BY_A_PLAN[index]}
        call = Call(self.members[index], method)
        call.settle(Answer(told[method]))
        return call


class LeftBehind:
    """Satisfies Keeping."""

    def __init__(self) -> None:
        self.terms: list[str] = []

    def acquire(
        self, worker_class: type, sizes: Sequence[int], device: str, *, timeout_s: float
    ) -> Sequence[Gang]:
        pytest.fail("they are here")

    def left(self, terms: str) -> Sequence[Gang]:
        self.terms.append(terms)
        return cast(list[Gang], [LeftGang()])


def test_who_finds_replicas_that_a_plan_cut_takes_them_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next coordinator has no plan, and would cut them otherwise."""
    served: list[Sequence[Shard]] = []
    monkeypatch.setattr(start, "_serve", lambda placed, shards, options: served.append(tuple(shards)))
    found, dims, quiet = LeftBehind(), ParallelDims(pp=2), Progress(quiet=True)
    for by_plan in (CUT_BY_A_PLAN, ()):
        with start.deployment(found, dims, OPTIONS, quiet, shards=by_plan) as deployed:
            assert (deployed.limits, deployed.weight_bytes) == (LIMITS, (1000, 1001))
    assert served == [CUT_BY_A_PLAN, CUT_BY_A_PLAN]
    assert found.terms[0] == found.terms[1]


class SlowToStart:
    """Satisfies Devices; its workers come once somebody has been told so often that they are waited for."""

    def __init__(self, times: int) -> None:
        self.told = threading.Semaphore(0)
        self._times = times

    def acquire(
        self, worker_class: type, sizes: Sequence[int], device: str, *, timeout_s: float
    ) -> Sequence[Gang]:
        assert timeout_s >= 600
        for _ in range(self._times):
            assert self.told.acquire(timeout=20)
        raise GangDied("enough was seen")


class Importing:
    """Two of a gang's workers, one of which never ends its imports."""

    def __init__(self) -> None:
        member = Member(0, "127.0.0.1", "local", 1, 0, "")
        self.calls = [Call(member, "Worker") for _ in range(2)]
        self.calls[0].settle(Answer(None))

    def host(self, worker_class: type) -> list[Call]:
        return self.calls


def test_workers_that_import_for_too_long_are_told_with_the_time_and_the_way_out() -> None:
    gang = Importing()
    with pytest.raises(PlacementFailed) as caught:
        actors._host(cast(Any, [gang]), start.Worker, time.monotonic(), start.ACQUIRE_TIMEOUT_S)
    assert str(caught.value) == (
        "1 of 2 workers did not import orchestrator.worker in 600 s, the most that is waited; look at the load and "
        "disk of their nodes: `python -X importtime -c 'import orchestrator.worker'` tells what takes long"
    )
    assert caught.value.exit_code == 2
    gang.calls[1].fail(GangDied("worker 0 died: no memory"))
    with pytest.raises(GangDied, match="no memory"):
        actors._host(cast(Any, [gang]), start.Worker, time.monotonic() + 600, 600)


@pytest.mark.parametrize("times", [0, 2])
def test_who_waits_for_workers_is_told_for_how_long(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.progress.SAY_AGAIN_S", 0.01 if times else 60.0)
    monkeypatch.setattr(start, "prove_first_layer", lambda *_: None)
    slow, progress, said = SlowToStart(times), Progress(quiet=True), list[str]()

    def say(line: str) -> None:
        said.append(line)
        if "starting workers" in line:
            slow.told.release()

    monkeypatch.setattr(progress, "say", say)
    with pytest.raises(GangDied, match="enough"), start.deployment(slow, ONE, OPTIONS, progress):
        pass
    waited = [line for line in said if "starting workers" in line]
    assert len(waited) >= times
    assert all(re.fullmatch(r"tp1: starting workers … \d+ s", line) for line in waited)
    assert times or not waited


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> OneByOne:
    """The steps of a start are others' to test."""
    for step in ("engine_config", "_join", "_load", "_fit"):
        monkeypatch.setattr(start, step, lambda *_, **__: None)
    monkeypatch.setattr(start, "_serve", lambda replica, *_: replica)
    return OneByOne()


def test_a_new_gang_takes_the_place_of_the_dead_one(devices: OneByOne) -> None:
    dead, other = devices.gangs
    served: Any = asyncio.run(devices.restarting.restart(0))
    (made,) = devices.given
    assert served.gang is made
    assert devices.gangs == [made, other]
    assert [gang.killed.is_set() for gang in (dead, other, made)] == [True, False, False]


def test_a_start_that_fails_leaves_nothing(devices: OneByOne, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise GangDied("no weights")

    monkeypatch.setattr(start, "_load", fail)
    with pytest.raises(GangDied, match="no weights"):
        asyncio.run(devices.restarting.restart(1))
    assert [gang.killed.is_set() for gang in (devices.gangs[0], *devices.given)] == [False, True]


def test_a_start_that_nobody_wants_any_more_has_ended_before_we_leave(
    devices: OneByOne, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, ended = threading.Event(), threading.Event()

    def load(placed: Sequence[start.Placed], *_: object) -> None:
        loading.set()
        assert cast(OneGang, placed[0].gang).killed.wait(10)
        ended.set()
        raise GangDied("the gang of 1 was stopped")

    async def leave() -> None:
        starting = asyncio.ensure_future(devices.restarting.restart(0))
        await asyncio.to_thread(loading.wait, 10)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert ended.is_set()

    monkeypatch.setattr(start, "_load", load)
    asyncio.run(leave())
    assert devices.given[0].killed.is_set()
