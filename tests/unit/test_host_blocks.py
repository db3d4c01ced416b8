"""Which KV blocks go to host memory and come back: the scheduler's part, and the arithmetic of whether it pays."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import BadLayout, UserError
from orchestrator.engine.kv_cache import block_bytes, kept_dtype
from orchestrator.host_blocks import HostPool
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.step import NOT_FINITE, Move, Step, StepResult
from strategies.host_kv import (
    HostRoom,
    block_flops,
    check_asked,
    check_block,
    check_room,
    told,
    useful_blocks,
)
from strategies.pipeline import shard_replica
from strategies.plan import Layout, ParallelDims
from strategies.tensor import local_spec
from tests.unit.machines import LLAMA_8B
from tests.unit.test_scheduler import CheckedRanks, answer, request, run_all


def assert_accounts_agree(scheduler: Scheduler) -> None:
    """Every block of the device is free or held, by as many as have it; every one of the host is free or has a name."""
    pool, host = scheduler.pool, scheduler.host
    held = [block for sequence in scheduler.running for block in sequence.blocks]
    assert sorted({*held, *pool._free}) == list(range(pool.num_blocks))
    assert set(held).isdisjoint(pool._free)
    assert [held.count(block) for block in range(pool.num_blocks)] == pool._references
    assert {key: block for block, key in pool._hash_of.items()} == pool._block_of
    assert sorted([*host._free, *host._block_of.values()]) == list(range(host.num_blocks))


def same(step: Step, token_id: int = 7) -> StepResult:
    return StepResult(step.id, [token_id] * sum(row.samples for row in step.rows))


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(1, 12)), min_size=3, max_size=10
    ),
    host_blocks=st.sampled_from([0, 1, 3, 50]),
    depth=st.integers(1, 3),
    strikes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9), st.booleans()), max_size=3),
)
def test_no_block_is_lost_nor_both_free_and_used(
    asked: list[tuple[int, int, int]],
    host_blocks: int,
    depth: int,
    strikes: list[tuple[int, int, bool]],
) -> None:
    """Requests share prompts, are preempted, are aborted, or come to have no numbers."""
    config = SchedulerConfig(11, 3, 4, 9, 33, groups=depth, run_ahead=depth == 2, host_blocks=host_blocks)
    scheduler, in_flight = Scheduler(config), list[Step]()
    for i, (kind, length, count) in enumerate(asked):
        scheduler.add(request(f"r{i}", [kind] * (1 + length), count))
    for turn in range(400):
        for at, who, is_abort in strikes:
            if at == turn and is_abort:
                scheduler.abort(f"r{who}")
        step = scheduler.schedule() if len(in_flight) < config.depth else None
        assert_accounts_agree(scheduler)
        if step is not None:
            assert all(move.host < host_blocks for move in step.saves)
            in_flight.append(step)
        if in_flight and (step is None or len(in_flight) == config.depth):
            bad = any(at == turn and not is_abort for at, _, is_abort in strikes)
            scheduler.update(same(in_flight.pop(0), NOT_FINITE if bad else 7))
            assert_accounts_agree(scheduler)
        elif step is None:
            break
    assert not scheduler.has_work
    assert scheduler.pool.free_blocks == config.num_blocks


def tokens_computed(config: SchedulerConfig, rounds: list[dict[str, tuple[list[int], int]]]) -> int:
    """By all rows, while every answer is the right one."""
    scheduler, ranks, computed = Scheduler(config), CheckedRanks(config), 0
    for asked in rounds:
        found: dict[str, list[int]] = {name: [] for name in asked}
        for name, (prompt, count) in asked.items():
            scheduler.add(request(name, prompt, count))
        while (step := scheduler.schedule()) is not None:
            computed += sum(row.count for row in step.rows)
            for token in scheduler.update(ranks.run(step)):
                found[token.request_id].append(token.token_id)
        assert found == {name: answer(prompt, count) for name, (prompt, count) in asked.items()}
    assert scheduler.load.host_hit_tokens == scheduler.load.host_loaded_blocks * config.block_size
    return computed


def test_what_was_preempted_comes_back_and_is_not_computed_again() -> None:
    asked = {f"r{i}": ([i] * 24, 24) for i in range(3)}
    config = SchedulerConfig(num_blocks=20, block_size=4, max_num_seqs=4, max_model_len=64)
    least = tokens_computed(replace(config, num_blocks=99), [asked])
    without = tokens_computed(config, [asked])
    kept = tokens_computed(replace(config, host_blocks=40), [asked])
    assert least == 3 * (24 + 24 - 1)
    assert without > least + 24
    assert kept <= least + 3 * 4, "of each preemption no more than the last, partial block"


def test_a_conversation_goes_on_from_host_memory() -> None:
    """Three talks in turn, each longer than half the cache: without host memory each turn is read from its start."""
    config = SchedulerConfig(num_blocks=16, block_size=4, max_model_len=64)
    talks = {f"t{i}": [i] * 30 for i in range(3)}
    rounds = [{name: (prompt + [9] * 6 * turn, 4)} for turn in range(3) for name, prompt in talks.items()]
    without = tokens_computed(config, rounds)
    kept = tokens_computed(replace(config, host_blocks=48), rounds)
    little = tokens_computed(replace(config, host_blocks=4), rounds)
    assert without == sum(len(prompt) + 3 for asked in rounds for prompt, _ in asked.values())
    assert kept == without - 3 * (28 + 36)  # the full blocks of what was asked before
    assert kept < little <= without


def test_blocks_come_while_others_compute_and_at_once_where_nobody_does() -> None:
    config = SchedulerConfig(num_blocks=14, block_size=4, max_model_len=48, host_blocks=20)
    scheduler, ranks = Scheduler(config), CheckedRanks(config)

    def stepped() -> Step:
        step = scheduler.schedule()
        assert step is not None
        scheduler.update(ranks.run(step))
        return step

    for name, token in (("a", 1), ("b", 2)):
        scheduler.add(request(name, [token] * 33, 1))
        stepped()
    scheduler.add(request("again", [1] * 33, 2))
    alone = stepped()
    assert alone.admits[0].loads and alone.rows[0].start == 32
    stepped()
    scheduler.add(request("long", [3] * 5, 9))
    stepped()
    scheduler.add(request("again", [2] * 33, 2))
    beside, then = stepped(), stepped()
    assert beside.admits[0].loads
    assert [row.count for row in beside.rows] == [1], "the other's token alone"
    assert [(row.slot, row.start) for row in then.rows][1] == (beside.admits[0].slot, 32)


def test_what_is_taken_next_has_left_before() -> None:
    config = SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32, host_blocks=16)
    scheduler, ranks = Scheduler(config), CheckedRanks(config)
    for name, token in (("a", 1), ("b", 2)):
        scheduler.add(request(name, [token] * 9, 1))
        while (step := scheduler.schedule()) is not None:
            scheduler.update(ranks.run(step))
    for name, token in (("c", 3), ("d", 4)):
        scheduler.add(request(name, [token] * 9, 1))
        step = scheduler.schedule()
        assert step is not None
        scheduler.update(ranks.run(step))
        assert step.saves, "of what was asked just before"
        assert {move.device for move in step.saves}.isdisjoint(step.admits[0].blocks), "those are clean"


def test_what_has_no_numbers_is_not_found_in_host_memory() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=4, block_size=4, max_model_len=16, host_blocks=8))
    for name, prompt, token_id in (
        ("bad", [1] * 9, 5),
        ("other", [2] * 13, 5),
        ("bad", [1] * 10, NOT_FINITE),
    ):
        scheduler.add(request(name, prompt, 1))
        step = scheduler.schedule()
        assert step is not None
        scheduler.update(same(step, token_id))
    assert [row.start for row in step.rows] == [8], "it was found before"
    scheduler.add(request("bad", [1] * 10, 1))
    again = scheduler.schedule()
    assert again is not None
    assert [row.start for row in again.rows] == [0]


def test_the_prefix_wanted_longest_ago_gives_way_but_to_nothing_of_the_same_step() -> None:
    host = HostPool(2)
    assert [host.save(i, bytes([i])) for i in range(3)] == [True, True, False]
    assert host.end_step() == [Move(0, 0), Move(1, 1)]
    assert not host.save(7, b"\0"), "it is here, and now the newest"
    host.hold([b"\1"])
    assert not host.save(2, b"\2"), "both are wanted"
    host.end_step()
    assert host.save(2, b"\2")
    assert b"\0" not in host and b"\1" in host
    assert host.end_step() == [Move(2, 0)]


def test_without_host_memory_nothing_is_copied() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=6, block_size=4, max_num_seqs=4))
    for i in range(3):
        scheduler.add(request(f"r{i}", [i, 1, 2, 3], 16))
    run_all(scheduler)
    assert scheduler.load.preemptions
    assert scheduler.load.host_saved_blocks == scheduler.load.host_hit_tokens == 0


# --- whether it pays ---


def test_a_block_comes_back_where_that_is_faster_than_to_compute_it() -> None:
    (shard,) = shard_replica(LLAMA_8B, ParallelDims())
    flops = block_flops(LLAMA_8B, shard, 16)
    assert flops == pytest.approx(2 * 16 * 6.98e9, rel=0.01)  # its tables are not among them
    halves = shard_replica(LLAMA_8B, ParallelDims(2, 2))
    assert sum(block_flops(LLAMA_8B, half, 16) for half in halves) == pytest.approx(flops)
    room = HostRoom(1000, 16 * 131072, 50e9, 989e12, flops)
    assert useful_blocks([room, replace(room, blocks=900)]) == 900
    assert told([room], 16) == (
        "host memory keeps 16000 KV tokens more (2.1 GB a rank): a block of 16 tokens comes back in 0.042 ms "
        "(2.10 MB at 50.0 GB/s), computing it takes 0.226 ms or more (223.3 GFLOP at 989 TFLOP/s)"
    )
    assert "keeps 320 KV tokens more (41.9 MB a rank)" in told([replace(room, blocks=20)], 16)
    slow = replace(room, bytes_per_s=5e9)
    assert useful_blocks([room, slow]) == 0
    assert "no KV is kept in host memory, for a block of 16 tokens comes back in 0.419 ms" in told(
        [room, slow], 16
    )
    unknown = replace(slow, flops_per_s=None)
    assert useful_blocks([unknown]) == 1000
    assert "not known" in told([unknown], 16)


def test_mistakes_are_told_with_their_way_out() -> None:
    for gb in (0, -1, float("nan"), 1e9):
        with pytest.raises(UserError, match="must be over 0 and at most 10000 GB"):
            check_asked(gb, prefix_caching=True, has_blocks=True)
    with pytest.raises(UserError, match="leave it away, or --no-enable-prefix-caching"):
        check_asked(4, prefix_caching=False, has_blocks=True)
    with pytest.raises(UserError, match="compatibility runtime has none"):
        check_asked(4, prefix_caching=True, has_blocks=False)
    check_asked(None, prefix_caching=False, has_blocks=False)
    with pytest.raises(
        BadLayout, match=r"--host-kv-gb 32 for 2 ranks of here is 64.0 GB.*48.0 GB .*give 24.0 or"
    ):
        check_room(32, 2, 48 * 10**9, "here")
    check_room(24, 2, 48 * 10**9, "here")
    with pytest.raises(BadLayout, match=r"give 21\.9 or less"):
        check_room(22, 1, 21_990_000_000, "here")


@pytest.mark.parametrize("name", ["tp1", "tp2", "pp2", "pp3", "tp2+kvfp8"])
@pytest.mark.parametrize("block_size", [4, 16])
def test_what_holds_no_block_of_the_engines_is_refused_with_what_would(name: str, block_size: int) -> None:
    layout = Layout.parse(name)
    shards = shard_replica(LLAMA_8B, layout.dims)
    told_of = LLAMA_8B, shards, layout.format, "bfloat16", block_size
    dtype = kept_dtype(torch.bfloat16, layout.format.has_float8_kv)
    most = max(block_bytes(local_spec(LLAMA_8B, shard), block_size, dtype) for shard in shards)
    check_block(most / 1e9 + 1e-9, *told_of)
    with pytest.raises(BadLayout, match=f"holds no KV block: one of {block_size} tokens") as refused:
        check_block((most - 1) / 1e9, *told_of)
    enough = re.search("give (.+) or more, or leave it away$", str(refused.value))
    assert enough is not None
    check_block(float(enough[1]), *told_of)
    assert float(enough[1]) * 1e9 - most <= 10_000
