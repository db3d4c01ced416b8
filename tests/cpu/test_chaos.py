"""Replicas killed and stopped at random under load, for as long as CHAOS_S says: nothing lost, doubled or leaked."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from cluster.errors import ShardwiseError
from launch.start import Deployment
from orchestrator.coordinator import Coordinator
from orchestrator.request import SamplingParams
from orchestrator.supervisor import RestartPolicy
from orchestrator.worker import Worker
from tests.hosts import gone
from tests.serving import Hosting, Processes, options, served
from tests.tiny import make_model

SECONDS = float(os.environ.get("CHAOS_S", "30"))
CLIENTS, STEP_TIMEOUT_S, SETTLE_S = 32, 3.0, 60.0
CALM_S = (0.5, 6.0)  # between two blows
MOST_MB = 16.0  # that a run may add: a request that stayed would be kilobytes, and there are thousands


@dataclass(slots=True)
class Tally:
    asked: int = 0
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    blows: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Question:
    prompt: list[int]
    sampling: SamplingParams


def questions() -> list[Question]:
    """Short and long, greedy and seeded, some with a shared beginning."""
    rnd, found = random.Random(1), []
    shared = [rnd.randrange(120) for _ in range(40)]
    for i in range(48):
        prompt = shared[: 8 * (i % 5)] + [rnd.randrange(120) for _ in range(1 + i % 9)]
        temperature = 0.8 if i % 2 else 0.0
        tokens = rnd.randrange(4, 120)
        found.append(
            Question(
                prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=temperature, seed=i)
            )
        )
    return found


async def client(
    coordinator: Coordinator, truth: dict[int, list[int]], tally: Tally, end_s: float, seed: int
) -> None:
    rnd, asks = random.Random(seed), questions()
    while time.monotonic() < end_s:
        i = rnd.randrange(len(asks))
        shown: list[int] = []
        tally.asked += 1
        try:
            (done,) = await coordinator.ask(
                asks[i].prompt,
                asks[i].sampling,
                on_update=lambda update, to=shown: to.append(update.token_id),  # type: ignore[misc]
            ).all()
        except ShardwiseError as error:
            tally.wrong.append(f"question {i} after {len(shown)} tokens: {error}")
            continue
        tally.answered += 1
        if not truth[i] == shown == done.token_ids:
            tally.wrong.append(f"question {i}: {shown}, {done.token_ids}, not {truth[i]}")


async def strike(coordinator: Coordinator, where: Hosting, tally: Tally, end_s: float) -> None:
    rnd = random.Random(int(SECONDS))
    while time.monotonic() < end_s:
        await asyncio.sleep(rnd.uniform(*CALM_S))
        alive = [gang for gang in where.gangs if not gone(gang)]
        if not alive:
            continue
        member = rnd.choice(rnd.choice(alive).members)
        number = signal.SIGSTOP if rnd.random() < 0.2 else signal.SIGKILL
        try:
            os.kill(member.pid, number)
        except ProcessLookupError:
            continue
        tally.blows[number.name] += 1


def resources() -> tuple[float, int, int]:
    """Of this process: megabytes, descriptors, threads."""
    gc.collect()
    me = psutil.Process()
    return me.memory_info().rss / 1e6, me.num_fds(), threading.active_count()


async def settled(coordinator: Coordinator) -> None:
    end_s = time.monotonic() + SETTLE_S
    while not all(coordinator.replicas_alive):
        assert time.monotonic() < end_s
        await asyncio.sleep(0.05)


async def play(
    found: Deployment, where: Hosting, layout_options: object
) -> tuple[Tally, list[tuple[float, int, int]]]:
    tally, seen, truth = Tally(), [], dict[int, list[int]]()
    async with found.coordinator(layout_options, None, restarts=RestartPolicy(first_s=0.1)) as coordinator:  # type: ignore[arg-type]
        for i, asked in enumerate(questions()):
            (done,) = await coordinator.complete(asked.prompt, asked.sampling)
            truth[i] = done.token_ids
        for part in range(3):
            end_s = time.monotonic() + SECONDS / 3
            await asyncio.gather(
                strike(coordinator, where, tally, end_s),
                *(client(coordinator, truth, tally, end_s, CLIENTS * part + i) for i in range(CLIENTS)),
            )
            await settled(coordinator)
            assert (coordinator.open_requests, coordinator.waiting_requests) == (0, 0)
            assert [lane.outstanding.tokens for lane in coordinator._lanes] == [0, 0]
            seen.append(resources())
        print(f"{SECONDS:g} s: {tally.answered} answers, {coordinator.meter.replayed} replays, ", end="")
        print(f"{dict(tally.blows)}, restarts {coordinator.restarts}, MB/fds/threads {seen}")
    return tally, seen


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize("layout", ["dp2", "tp2dp2"])
def test_random_kills_under_load(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path, "llama", max_position_embeddings=512)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    asked = options(
        tmp_path,
        max_model_len=256,
        max_num_seqs=24,
        max_num_batched_tokens=128,
        num_blocks=400,
        step_timeout_s=STEP_TIMEOUT_S,
    )
    where = Hosting(Processes(), Worker)
    with served(layout, asked, where) as found:
        tally, seen = asyncio.run(play(found, where, asked))
    assert tally.wrong == []
    assert tally.asked == tally.answered > 0
    assert tally.blows.total() >= SECONDS / 10
    assert all(gone(gang) for gang in where.gangs)
    pids = {str(member.pid) for gang in where.gangs for member in gang.members}
    assert not [name for name in os.listdir("/dev/shm") if any(pid in name for pid in pids)]
    (first_mb, first_fds, first_threads), *_, (last_mb, last_fds, last_threads) = seen
    assert last_fds <= first_fds + 2
    assert last_threads <= first_threads + 2
    assert last_mb < first_mb + MOST_MB
