"""Replicas that are killed or stopped under load, for real: requests outlive them, and the replicas come back."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import AttemptsSpent, NotFinite
from cluster.gang import Gang
from launch.options import EngineOptions
from launch.start import Deployment
from orchestrator.answer import Answers
from orchestrator.coordinator import Coordinator
from orchestrator.request import Completion, SamplingParams
from orchestrator.supervisor import RestartPolicy
from tests.hosts import PATIENCE_S, gone
from tests.oracle import greedy
from tests.serving import Hosting, Processes, options, served
from tests.tiny import make_model
from tests.workers import OverflowingWorker, PoisonedWorker

POLICY = RestartPolicy(first_s=0.1)
DETECTION_S = 2.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("model")
    return directory, make_model(directory, "llama", max_position_embeddings=8192)


@contextmanager
def mortal(
    layout: str, asked: EngineOptions, worker: type = PoisonedWorker
) -> Iterator[tuple[Deployment, Hosting]]:
    where = Hosting(Processes(), worker)
    with served(layout, asked, where) as found:
        yield found, where
    assert all(gone(gang) for gang in where.gangs)


async def until(holds: Callable[[], bool]) -> float:
    """Seconds until it does."""
    begun_s = time.monotonic()
    while not holds():
        assert time.monotonic() - begun_s < PATIENCE_S
        await asyncio.sleep(0.01)
    return time.monotonic() - begun_s


@pytest.mark.slow
def test_one_of_two_replicas_is_killed_under_200_requests(tiny: tuple[Path, Any]) -> None:
    directory, model = tiny
    asked = options(directory, max_model_len=256, max_num_seqs=64, max_num_batched_tokens=256)
    requests, tokens = 200, 24
    prompts = [[3, 1, 4, 1, 5, i % 100] for i in range(requests)]

    def sampling(i: int) -> SamplingParams:
        """Half of them greedy, half sampled with a seed."""
        temperature = 0.0 if i % 2 else 1.0
        return SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=temperature, seed=i)

    async def ask(found: Deployment, where: Hosting) -> tuple[list[list[int]], list[list[int]], Counter[int]]:
        """Answers under which a replica died, the same ones asked again of both, and the tokens shown of each."""
        shown: Counter[int] = Counter()
        async with found.coordinator(asked, None, restarts=POLICY) as coordinator:

            def begin(i: int) -> Answers:
                return coordinator.ask(prompts[i], sampling(i), on_update=lambda _: shown.update([i]))

            answers = [begin(i) for i in range(requests)]
            await until(lambda: shown.total() > requests * tokens // 10)
            assert coordinator.open_requests > requests // 2
            os.kill(where.gangs[0].members[0].pid, signal.SIGKILL)
            assert await until(lambda: coordinator.replicas_alive == [False, True]) < DETECTION_S
            struck = [await one.all() for one in answers]
            assert coordinator.meter.replayed > 0
            assert (coordinator.open_requests, coordinator.waiting_requests) == (0, 0)
            await until(lambda: coordinator.replicas_alive == [True, True])
            assert coordinator.restarts == {0: 1}
            before = dict(coordinator.meter.of_replica)
            calm = await asyncio.gather(
                *(coordinator.complete(ids, sampling(i)) for i, ids in enumerate(prompts))
            )
            assert all(coordinator.meter.of_replica[i] > before[i] for i in range(2))
        return [one.token_ids for (one,) in struck], [one.token_ids for (one,) in calm], shown

    with mortal("dp2", asked) as (found, where):
        struck, calm, shown = asyncio.run(ask(found, where))
    assert shown == Counter(dict.fromkeys(range(requests), tokens))  # none lost, none twice
    assert struck == calm
    some = range(1, requests, 50)
    assert [struck[i] for i in some] == [greedy(model, prompts[i], tokens) for i in some]


@pytest.mark.parametrize("layout", [pytest.param("tp2", marks=pytest.mark.slow), "pp2"])
def test_a_rank_is_killed_and_then_one_is_stopped(
    layout: str, tiny: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, model = tiny
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    deadline_s, tokens, prompt = 5.0, 300, [3, 1, 4, 1, 5]
    asked = options(directory, max_model_len=1024, step_timeout_s=deadline_s)
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)

    async def strike(coordinator: Coordinator, gang: Gang, number: int) -> tuple[list[int], float]:
        """A signal to rank 1 in mid-decode. → the answer, and when the whole gang was gone."""
        shown: list[int] = []
        answers = coordinator.ask(prompt, sampling, on_update=lambda update: shown.append(update.token_id))
        await until(lambda: len(shown) > 20)
        os.kill(gang.members[1].pid, number)
        seconds = await until(lambda: gone(gang))
        (done,) = await answers.all()
        assert done.token_ids == shown
        return shown, seconds

    async def both(found: Deployment, where: Hosting) -> list[tuple[list[int], float]]:
        async with found.coordinator(asked, None, restarts=POLICY) as coordinator:
            return [await strike(coordinator, where.gangs[-1], n) for n in (signal.SIGKILL, signal.SIGSTOP)]

    with mortal(layout, asked) as (found, where):
        (killed, gone_s), (stopped, stuck_s) = asyncio.run(both(found, where))
        assert len(where.gangs) == 3
    assert gone_s < 3
    assert stuck_s < deadline_s + 5  # stacks take up to a second each
    assert killed == stopped == greedy(model, prompt, tokens)
    (path,) = tmp_path.glob("stacks-*.txt")
    told = path.read_text()
    assert all(f"=== {member} ===" in told for member in where.gangs[1].members)
    assert "T (stopped)" in told
    assert [("lead" in part, "follow" in part) for part in told.split("===")[2::2]] == [
        (True, False),
        (False, True),
    ]
    pids = [str(member.pid) for gang in where.gangs for member in gang.members]
    assert not [name for name in os.listdir("/dev/shm") if any(pid in name for pid in pids)]
    assert "shardwise-ring" not in Path("/proc/self/maps").read_text()  # a ring lives while somebody maps it


@pytest.mark.parametrize(
    ("poison", "words"),
    [
        pytest.param(PoisonedWorker.EXIT, "exit code 9", marks=pytest.mark.slow),
        pytest.param(PoisonedWorker.MEMORY, "80 GiB", marks=pytest.mark.slow),
    ],
)
def test_a_request_that_kills_fails_alone(poison: int, words: str, tiny: tuple[Path, Any]) -> None:
    directory, model = tiny
    asked = options(directory, max_model_len=256, max_num_seqs=16, max_num_batched_tokens=64)
    tokens = 60
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    prompts = [[3, 1, 4, i] for i in range(12)]

    async def ask(found: Deployment) -> tuple[BaseException, list[Completion], dict[int, int]]:
        async with found.coordinator(asked, None, restarts=POLICY) as coordinator:
            good = [asyncio.ensure_future(coordinator.complete(ids, sampling)) for ids in prompts[:6]]
            bad = asyncio.ensure_future(coordinator.complete([poison], sampling))
            good += [asyncio.ensure_future(coordinator.complete(ids, sampling)) for ids in prompts[6:]]
            (error,) = await asyncio.gather(bad, return_exceptions=True)
            assert isinstance(error, BaseException)
            done = [await one for one in good]
            return error, [one for (one,) in done], coordinator.restarts

    with mortal("tp1", asked) as (found, where):
        error, good, restarts = asyncio.run(ask(found))
    assert isinstance(error, AttemptsSpent)
    assert words in str(error)
    assert [done.token_ids for done in good] == [greedy(model, ids, tokens) for ids in prompts]
    assert restarts == {0: 2}
    assert len(where.gangs) == 3


@pytest.mark.parametrize("layout", ["tp1", pytest.param("tp2pp2", marks=pytest.mark.slow)])
def test_a_request_whose_numbers_overflow_fails_alone(layout: str, tiny: tuple[Path, Any]) -> None:
    """Without a death; others run beside it, and in the blocks that it leaves."""
    directory, model = tiny
    asked = options(directory, max_model_len=64, max_num_seqs=16, max_num_batched_tokens=64, num_blocks=40)
    tokens = 40
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    good = [[3, 1, 4, i] for i in range(12)]
    bad = [[3, 1, 4, 1, 5, 9, 2, 6, OverflowingWorker.NAN, i] for i in range(8)]

    async def ask(found: Deployment) -> tuple[list[Any], dict[int, int]]:
        async with found.coordinator(asked, None, restarts=POLICY) as coordinator:
            mixed = [ids for pair in zip(good, bad, strict=False) for ids in pair] + good[len(bad) :]
            asks = [coordinator.complete(ids, sampling) for ids in mixed + good]
            return await asyncio.gather(*asks, return_exceptions=True), coordinator.restarts

    with mortal(layout, asked, OverflowingWorker) as (found, _):
        answers, restarts = asyncio.run(ask(found))
    failed = [one for one in answers if isinstance(one, BaseException)]
    assert len(failed) == len(bad)
    assert all(isinstance(one, NotFinite) and "after 10 prompt tokens" in str(one) for one in failed)
    expected = [greedy(model, ids, tokens) for ids in good] * 2
    assert not any(OverflowingWorker.NAN in ids for ids in expected)
    assert [one[0].token_ids for one in answers if isinstance(one, list)] == expected
    assert restarts == {}
