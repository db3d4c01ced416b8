"""KV blocks that go to host memory and come back: their bytes, and their order among steps that nothing waits for."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from orchestrator.engine import host_cache
from orchestrator.engine.host_cache import HostCache, runs
from orchestrator.engine.kv_cache import KVCache
from orchestrator.request import Request, SamplingParams
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.step import Admit, Move, Row, Step, StepResult
from tests.engine import LocalWorker, limits
from tests.serving import options
from tests.tiny import make_model
from tests.unit.machines import SMOL
from tests.unit.test_scheduler import CheckedRanks, answer, request

CPU = torch.device("cpu")


def admit(slot: int, blocks: list[int], loads: list[Move]) -> Admit:
    return Admit(slot, [1] * 4 * len(blocks), 1, blocks, SamplingParams(), [], loads)


@pytest.mark.parametrize(
    ("dtype", "float8", "head_dim"),
    [(torch.float32, False, 8), (torch.bfloat16, False, 3), (torch.bfloat16, True, 1)],
)
@pytest.mark.parametrize("buffer_blocks", [1, 2, 64])
def test_what_left_comes_back_elsewhere_bit_for_bit(
    dtype: torch.dtype, float8: bool, head_dim: int, buffer_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SMOL, layers=3, kv_heads=1, head_dim=head_dim)
    cache = KVCache(spec, 9, 5, dtype, CPU, float8=float8)
    for tensor in (*cache.keys, *cache.values):
        tensor.view(torch.uint8).random_(0, 120)  # no NaN, which equals nothing
    block_bytes = cache.by_block()[0].numel() * cache.by_block().itemsize
    monkeypatch.setattr(host_cache, "BUFFER_BYTES", buffer_blocks * block_bytes)
    host = HostCache(cache, 5)
    before = [t.view(torch.uint8).clone() for t in (*cache.keys, *cache.values)]
    host.move(Step(1, [], [], [Move(7, 3), Move(2, 4), Move(5, 0)]))
    loads = [Move(0, 4), Move(1, 0), Move(8, 3)]
    host.move(Step(2, [admit(0, [0, 1, 8], loads)], []))
    after = [t.view(torch.uint8) for t in (*cache.keys, *cache.values)]
    for was, now in zip(before, after, strict=True):
        for to, source in ((0, 2), (1, 5), (8, 7), (3, 3), (2, 2)):
            assert torch.equal(now[5 * to : 5 * to + 5], was[5 * source : 5 * source + 5])


def test_copies_of_neighbours_are_one() -> None:
    assert list(runs([4, 5, 6, 1, 2, 9, 8])) == [(0, 4, 3), (3, 1, 2), (5, 9, 1), (6, 8, 1)]
    assert list(runs([3])) == [(0, 3, 1)]


def test_a_step_travels_with_its_moves() -> None:
    step = Step(3, [admit(0, [1], [Move(1, 7)])], [Row(0, 0, 1, True, -1, -1)], [Move(4, 2)])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=Step) == step


class Late:
    """A queue that does nothing until it must (satisfies Queue)."""

    def __init__(self) -> None:
        self.work: deque[Callable[[], object] | tuple[Late, int]] = deque()
        self.given = self.done = 0

    def do(self, work: Callable[[], object]) -> None:
        self._give(work)

    def mark(self) -> tuple[Late, int]:
        return self, self.given

    def wait(self, mark: tuple[Late, int]) -> None:
        self._give(mark)

    def _give(self, item: Callable[[], object] | tuple[Late, int]) -> None:
        self.work.append(item)
        self.given += 1

    def goes_on(self) -> bool:
        """Whether its next piece may be done; if so, it is."""
        if not self.work:
            return False
        item = self.work[0]
        if isinstance(item, tuple):
            if item[0].done < item[1]:
                return False
        else:
            item()
        self.work.popleft()
        self.done += 1
        return True


class LateRanks(CheckedRanks):
    """Checks again, of a real cache, in some order that the queues allow, what every row of every step sees."""

    def __init__(self, config: SchedulerConfig, rnd: random.Random) -> None:
        super().__init__(config)
        spec = replace(SMOL, layers=1, kv_heads=1, head_dim=1)
        self.real = KVCache(spec, config.num_blocks, config.block_size, torch.float64, CPU)
        self.queues = Late(), Late(), Late()
        self.moving = HostCache(self.real, config.host_blocks, self.queues)
        self.rnd = rnd
        self.favour = rnd.random()

    def run(self, step: Step) -> StepResult:
        result = super().run(step)
        self.moving.move(step)
        seen = {}
        for row in step.rows:
            tokens = self.tokens[row.slot]
            for position in range(row.start + row.count):
                seen[self._place(row.slot, position)] = float(hash(tuple(tokens[: position + 1])) % 2**40)
        written = {
            self._place(row.slot, position)
            for row in step.rows
            for position in range(row.start, row.start + row.count)
        }

        def compute() -> None:
            for place in written:
                self.real.keys[0][place], self.real.values[0][place] = seen[place], -seen[place]
            for place, value in seen.items():
                assert self.real.keys[0][place].item() == value, f"step {step.id}"
                assert self.real.values[0][place].item() == -value

        self.queues[0].do(compute)
        while self.rnd.random() < self.favour:  # the device is as fast as it likes
            self.rnd.choice(self.queues).goes_on()
        return result

    def finish(self) -> None:
        while any(queue.work for queue in self.queues):
            goes_on = any(queue.goes_on() for queue in self.rnd.sample(self.queues, 3))
            assert goes_on, "they wait for each other"


# The last four alone see that what comes waits for a step that is still at work on the block.
@pytest.mark.parametrize("seed", [*range(6), 34, 39, 42, 51])
def test_no_step_sees_a_block_before_it_came_or_after_it_was_taken(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_cache, "BUFFER_BYTES", 64 * (1 + seed % 3))  # of 2 × 4 × 8 bytes a block
    rnd = random.Random(seed)
    config = SchedulerConfig(
        14, 4, 4, 12, 56, groups=1 + seed % 2, run_ahead=seed % 4 > 1, host_blocks=(5, 40)[seed % 5 > 0]
    )
    scheduler, ranks = Scheduler(config), LateRanks(config, rnd)
    shared = [[rnd.randrange(4) for _ in range(24)] for _ in range(3)]
    asked = {}
    for i in range(20):
        prompt = rnd.choice(shared)[: rnd.randrange(25)] + [rnd.randrange(50) for _ in range(1 + i % 7)]
        asked[f"r{i}"] = prompt, rnd.randrange(1, 20)
    told: dict[str, list[int]] = {name: [] for name in asked}
    waiting, in_flight = deque(asked.items()), deque[StepResult]()
    while waiting or in_flight or scheduler.has_work:
        if waiting and rnd.random() < 0.3:
            name, (prompt, count) = waiting.popleft()
            scheduler.add(request(name, prompt, count))
        step = scheduler.schedule() if len(in_flight) < config.depth else None
        if step is not None:
            in_flight.append(ranks.run(step))
        if in_flight and (step is None or len(in_flight) == config.depth):
            for token in scheduler.update(in_flight.popleft()):
                told[token.request_id].append(token.token_id)
    ranks.finish()
    assert told == {name: answer(prompt, count) for name, (prompt, count) in asked.items()}
    assert scheduler.load.preemptions
    assert scheduler.load.host_saved_blocks and scheduler.load.host_loaded_blocks


def test_answers_are_the_same_with_blocks_in_host_memory(tmp_path: Path) -> None:
    """Of a model on the CPU, with a cache that holds a third of what is asked for at once."""
    model = make_model(tmp_path, "qwen3", num_hidden_layers=2)
    rnd = random.Random(2)
    shared = [rnd.randrange(model.config.vocab_size) for _ in range(40)]
    prompts = [shared[: 10 * (i % 5)] + [rnd.randrange(131) for _ in range(5 + i)] for i in range(8)]
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    requests = [Request(id=str(i), prompt_token_ids=p, sampling=sampling) for i, p in enumerate(prompts)]
    found = []
    worker = LocalWorker(options(tmp_path))
    for blocks, host_blocks in ((200, 0), (18, 3), (18, 100)):
        asked = limits(options(tmp_path, num_blocks=blocks), run_ahead=False)
        worker.allocate(replace(asked, host_blocks=host_blocks))
        found.append([a.token_ids for a in worker.answers(requests)])
        load = worker.scheduler.load
        assert bool(load.preemptions) == bool(load.host_saved_blocks) == bool(host_blocks)
    assert found[0] == found[1] == found[2]
    assert load.host_loaded_blocks
