"""The scheduler against a model whose KV can be checked: a cache row holds the whole prefix it was made from."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import BadRequest
from orchestrator.request import FinishReason, Request, SamplingParams
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.step import NOT_FINITE, Step, StepResult


def next_token(tokens: list[int]) -> int:
    return (7 * len(tokens) + sum(t * (i % 5 + 1) for i, t in enumerate(tokens))) % 50


def answer(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class CheckedRanks:
    """Runs steps as ranks would, and fails if a row sees KV that is not its own sequence's."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.cache: dict[int, tuple[int, ...]] = {}
        self.host: dict[int, dict[int, tuple[int, ...]]] = {}  # by block, what each of its rows holds
        self.tokens: dict[int, list[int]] = {}
        self.tables: dict[int, dict[int, int]] = {}
        self.newest: dict[int, int] = {}  # what each slot sampled last

    def run(self, step: Step) -> StepResult:
        assert sum(row.count for row in step.rows) <= self.config.max_num_batched_tokens
        assert len({row.slot for row in step.rows}) == len(step.rows)
        self._move(step)
        for admit in step.admits:
            self.tokens[admit.slot] = list(admit.token_ids)
            self.tables[admit.slot] = dict(enumerate(admit.blocks))
        for row in step.rows:  # all KV is written before any of it is read, as in a layer
            tokens = self.tokens[row.slot]
            if row.new_block >= 0:
                self.tables[row.slot][row.start // self.config.block_size] = row.new_block
            if row.start == len(tokens):
                assert row.token_id >= 0 or self.config.run_ahead
                assert row.token_id in (-1, self.newest[row.slot])
                tokens.append(self.newest[row.slot])
            for position in range(row.start, row.start + row.count):
                self.cache[self._place(row.slot, position)] = tuple(tokens[: position + 1])
        sampled = []
        for row in step.rows:
            tokens, end = self.tokens[row.slot], row.start + row.count
            for position in range(end):
                assert self.cache[self._place(row.slot, position)] == tuple(tokens[: position + 1])
            if row.samples:
                assert end == len(tokens)
                self.newest[row.slot] = next_token(tokens)
                sampled.append(self.newest[row.slot])
        return StepResult(step.id, sampled)

    def _move(self, step: Step) -> None:
        """Copies of a step in the order that ranks promise: all that is saved, then all that is loaded."""
        size, loads = self.config.block_size, [move for admit in step.admits for move in admit.loads]
        moved = [*step.saves, *loads]
        assert all(0 <= m.host < self.config.host_blocks for m in moved)
        assert len({m.host for m in step.saves}) == len(step.saves), "one of two copies to a block is in vain"
        assert len({m.device for m in loads}) == len(loads)
        for move in step.saves:
            rows = range(move.device * size, (move.device + 1) * size)
            self.host[move.host] = {row % size: self.cache[row] for row in rows}
        for move in loads:
            for row, prefix in self.host[move.host].items():
                self.cache[move.device * size + row] = prefix

    def _place(self, slot: int, position: int) -> int:
        block, offset = divmod(position, self.config.block_size)
        assert 0 <= self.tables[slot][block] < self.config.num_blocks
        return self.tables[slot][block] * self.config.block_size + offset


def request(
    name: str, prompt: list[int], max_tokens: int, stop_ids: frozenset[int] = frozenset(), **kw: int
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **kw)
    return Request(id=name, prompt_token_ids=prompt, sampling=sampling, stop_ids=stop_ids)


def run_all(
    scheduler: Scheduler, aborts: dict[int, str] | None = None
) -> tuple[dict[str, list[int]], dict[str, FinishReason]]:
    """Keeps `depth` steps in flight, as the leader does; results arrive late and in order."""
    ranks = CheckedRanks(scheduler.config)
    in_flight: deque[StepResult] = deque()
    tokens: dict[str, list[int]] = {}
    reasons: dict[str, FinishReason] = {}
    for turn in range(10_000):
        if aborts and turn in aborts:
            scheduler.abort(aborts[turn])
        step = scheduler.schedule() if len(in_flight) < scheduler.config.depth else None
        if step is not None:
            in_flight.append(ranks.run(step))
        if in_flight and (step is None or len(in_flight) == scheduler.config.depth):
            for token in scheduler.update(in_flight.popleft()):
                tokens.setdefault(token.request_id, []).append(token.token_id)
                if token.finish_reason is not None:
                    reasons[token.request_id] = token.finish_reason
        elif step is None:
            assert not scheduler.has_work, "nothing can run and nothing is in flight: stuck"
            return tokens, reasons
    raise AssertionError("the scheduler never finished")


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(
            st.integers(0, 30), st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 20)
        ),
        min_size=1,
        max_size=9,
    ),
    block_size=st.sampled_from([1, 3, 8]),
    spare_tokens=st.integers(0, 60),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 40),
    groups=st.integers(1, 3),
    prefix_caching=st.booleans(),
    run_ahead=st.booleans(),
    abort_turn=st.integers(0, 30),
    host_blocks=st.sampled_from([0, 1, 2, 5, 60]),
)
def test_every_answer_is_right_under_chunks_prefix_hits_preemption_and_aborts(
    prompts: list[tuple[int, list[int], int]],
    block_size: int,
    spare_tokens: int,
    max_num_seqs: int,
    budget: int,
    groups: int,
    prefix_caching: bool,
    run_ahead: bool,
    abort_turn: int,
    host_blocks: int,
) -> None:
    common = [i % 4 for i in range(30)]
    asked = {f"r{i}": (common[:shared] + own, count) for i, (shared, own, count) in enumerate(prompts)}
    longest = max(len(p) + n for p, n in asked.values())
    blocks = -(-(longest + spare_tokens) // block_size)
    config = SchedulerConfig(
        blocks, block_size, max_num_seqs, budget, 200, groups, prefix_caching, run_ahead, host_blocks
    )
    scheduler = Scheduler(config)
    for name, (prompt, count) in asked.items():
        scheduler.add(request(name, prompt, count))
    tokens, reasons = run_all(scheduler, {abort_turn: "r0"})
    for name, (prompt, count) in asked.items():
        expected = answer(prompt, count)
        if name == "r0":
            assert tokens.get(name, []) == expected[: len(tokens.get(name, []))]
        else:
            assert tokens[name] == expected
            assert reasons[name] is FinishReason.LENGTH
    assert scheduler.pool.free_blocks == blocks
    assert scheduler.load.running == scheduler.load.waiting == 0


def test_preemption_happens_and_is_counted() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=6, block_size=4, max_num_seqs=4, prefix_caching=False))
    for i in range(3):
        scheduler.add(request(f"r{i}", [i, 1, 2, 3], 16))
    tokens, _ = run_all(scheduler)
    assert scheduler.load.preemptions > 0
    assert tokens["r2"] == answer([2, 1, 2, 3], 16)


def test_decodes_go_before_prompts_within_the_budget() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4, max_num_batched_tokens=8))
    scheduler.add(request("old", [1, 2, 3], 5))
    ranks = CheckedRanks(scheduler.config)
    first = scheduler.schedule()
    assert first is not None
    scheduler.update(ranks.run(first))
    scheduler.add(request("long", list(range(20)), 5))
    second = scheduler.schedule()
    assert second is not None
    assert [(r.start, r.count) for r in second.rows] == [(3, 1), (0, 7)]


def test_a_long_prompt_fills_the_pipeline_before_its_first_chunk_returns() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4, max_num_batched_tokens=8, groups=2))
    scheduler.add(request("long", list(range(20)), 5))
    steps = [scheduler.schedule() for _ in range(4)]
    assert [s and (s.rows[0].start, s.rows[0].count, s.rows[0].samples) for s in steps] == [
        (0, 8, False),
        (8, 8, False),
        (16, 4, True),
        None,  # its token is awaited
    ]


def test_pipeline_groups_share_the_sequences() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4, groups=2))
    ranks = CheckedRanks(scheduler.config)
    for i in range(6):
        scheduler.add(request(f"r{i}", [i], 8))
    prompts = scheduler.schedule()
    assert prompts is not None
    assert scheduler.schedule() is None
    scheduler.update(ranks.run(prompts))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert {r.slot for r in first.rows} | {r.slot for r in second.rows} == {r.slot for r in prompts.rows}
    assert len(first.rows) == len(second.rows) == 3


def test_a_prefix_is_computed_once() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4))
    shared = list(range(17))
    scheduler.add(request("a", [*shared, 1], 2))
    scheduler.add(request("b", [*shared, 2], 2))
    tokens, _ = run_all(scheduler)
    assert scheduler.load.prefix_hit_tokens == 16
    assert tokens["b"] == answer([*shared, 2], 2)


def test_stop_tokens_end_an_answer_but_not_before_min_tokens() -> None:
    prompt = [1, 2, 3]
    expected = answer(prompt, 8)
    stop = frozenset({expected[2]})
    first = expected.index(expected[2])
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4))
    scheduler.add(request("a", prompt, 8, stop))
    tokens, reasons = run_all(scheduler)
    assert tokens["a"] == expected[: first + 1]
    assert reasons["a"] is FinishReason.STOP
    scheduler.add(request("b", prompt, 8, stop, min_tokens=first + 2))
    tokens, _ = run_all(scheduler)
    assert len(tokens["b"]) >= first + 2


def test_the_context_ends_an_answer() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4, max_model_len=10))
    scheduler.add(request("a", [1] * 7, 50))
    tokens, reasons = run_all(scheduler)
    assert len(tokens["a"]) == 3
    assert reasons["a"] is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "says"),
    [
        ([], 4, "no tokens"),
        ([1] * 100, 4, "100 tokens; the context is 100"),
        ([1] * 60, 30, "need 90 KV tokens; 64 fit"),
    ],
)
def test_what_can_never_run_is_refused(prompt: list[int], max_tokens: int, says: str) -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=16, block_size=4, max_model_len=100))
    with pytest.raises(BadRequest, match=says):
        scheduler.add(request("a", prompt, max_tokens))
    assert not scheduler.has_work


def test_running_ahead_takes_sequences_whose_token_is_in_flight_but_none_that_will_surely_end() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4, run_ahead=True))
    scheduler.add(request("long", [1, 2, 3], 5))
    scheduler.add(request("short", [4, 5], 2))
    scheduler.add(request("penalised", [6, 7], 5, repetition_penalty=2))
    steps = [scheduler.schedule() for _ in range(3)]
    assert steps[1] is not None and steps[2] is None
    assert [(r.start, r.token_id) for r in steps[1].rows] == [(3, -1), (2, -1)]
    assert steps[0] is not None
    scheduler.update(StepResult(steps[0].id, [10, 11, 12]))
    third = scheduler.schedule()
    assert third is not None  # "short" has its last token in flight
    assert [(r.start, r.token_id) for r in third.rows] == [(4, -1), (2, 12)]


def test_a_token_computed_ahead_of_a_stop_is_dropped() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4, run_ahead=True))
    scheduler.add(request("r", [1, 2, 3], 9, frozenset([7])))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None
    assert [t.finish_reason for t in scheduler.update(StepResult(first.id, [7]))] == [FinishReason.STOP]
    assert scheduler.update(StepResult(second.id, [8])) == []
    assert not scheduler.has_work and scheduler.pool.free_blocks == 64


def test_a_pipelines_next_step_does_not_wait_for_tokens_of_the_last() -> None:
    """While prompts come in, each step takes the sequences that the step before the last computed."""
    limits = SchedulerConfig(num_blocks=99, block_size=4, max_num_batched_tokens=8, groups=2, run_ahead=True)
    scheduler = Scheduler(limits)
    for i in range(6):
        scheduler.add(request(f"r{i}", [i, 1, 2, 3], 30))
    steps: list[Step] = []
    for _ in range(24):
        step = scheduler.schedule()
        assert step is not None
        steps.append(step)
        if len(steps) > 2:
            done = steps[-3]
            scheduler.update(StepResult(done.id, [7] * sum(row.samples for row in done.rows)))
    for before, now in pairwise(steps):
        just_sampled = {row.slot for row in before.rows if row.samples}
        assert just_sampled.isdisjoint(row.slot for row in now.rows)
    assert all(len(step.rows) == 3 for step in steps[-4:])


def test_a_lone_sequence_runs_ahead_through_a_pipeline() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=9, block_size=4, groups=2, run_ahead=True))
    scheduler.add(request("r", [1, 2, 3], 9))
    assert [scheduler.schedule() is not None for _ in range(3)] == [True, True, False]


def test_an_answer_that_another_replica_began_goes_on() -> None:
    """Its tokens are as many as they would have been, and its stop tokens count from the same one on."""
    prompt, stop = [3, 1, 4], frozenset(range(50))
    config = SchedulerConfig(num_blocks=6, block_size=4)
    for begun in range(1, 6):
        scheduler = Scheduler(config)
        scheduler.add(
            Request(
                id="a",
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=8, min_tokens=6),
                stop_ids=stop,
                output_token_ids=answer(prompt, begun),
            )
        )
        ranks, told = CheckedRanks(config), []
        while (step := scheduler.schedule()) is not None:
            assert all((a.prompt_tokens, len(a.token_ids)) == (3, 3 + begun) for a in step.admits)
            told += scheduler.update(ranks.run(step))
        assert [token.token_id for token in told] == answer(prompt, 6)[begun:]
        assert told[-1].finish_reason is FinishReason.STOP


def test_what_has_no_numbers_ends_and_its_prefix_is_not_found_again() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32))
    prompt = list(range(9))
    for name in ("bad", "same"):
        scheduler.add(Request(id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=3)))
        step = scheduler.schedule()
        assert step is not None
        assert [row.start for row in step.rows] == [0], "the whole prompt is computed"
        (token,) = scheduler.update(StepResult(step.id, [NOT_FINITE]))
        assert (token.request_id, token.finish_reason) == (name, FinishReason.ABORT)
        assert not scheduler.has_work
    assert scheduler.pool.free_blocks == 8
