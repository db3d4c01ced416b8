"""Whose turn it is: fair between clients by tokens, live before batch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.admission import FairQueue
from orchestrator.router import Outstanding, has_room


@dataclass(eq=False)
class Item:
    client: str
    prompt_tokens: int = 10
    is_batch: bool = False


def served(queue: FairQueue[Item], count: int) -> str:
    return "".join(queue.pop().client for _ in range(count))


def test_turns_alternate_however_many_one_client_sent() -> None:
    queue: FairQueue[Item] = FairQueue()
    for client in "aaaaaabb":
        queue.push(Item(client))
    assert served(queue, 8) == "ababaaaa"


def test_a_client_pays_by_the_token() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(8):
        queue.push(Item("a", 30))
        queue.push(Item("b", 10))
    assert served(queue, 8).count("b") == 6
    queue.charge("b", 1000)  # what it was answered
    assert served(queue, 4) == "aaaa"


def test_idleness_earns_no_credit() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(100):
        queue.push(Item("a"))
    served(queue, 50)
    for _ in range(50):
        queue.push(Item("b"))
    assert served(queue, 20).count("b") in (10, 11)


def test_live_goes_before_batch() -> None:
    queue: FairQueue[Item] = FairQueue()
    queue.push(Item("a", is_batch=True))
    queue.push(Item("b"))
    queue.charge("b", 10**6)
    queue.push(Item("b"))
    assert served(queue, 3) == "bba"


def test_leaving_the_queue() -> None:
    queue: FairQueue[Item] = FairQueue()
    items = [Item("a", 5), Item("a", 7)]
    for item in items:
        queue.push(item)
    assert queue.discard(items[0])
    assert not queue.discard(items[0])
    assert (len(queue), queue.live_tokens, queue.pop()) == (1, 7, items[1])
    with pytest.raises(IndexError):
        queue.pop()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.booleans()), max_size=60))
def test_everybody_is_served_once_and_the_account_ends_at_nothing(asked: list[tuple[str, int, bool]]) -> None:
    queue: FairQueue[Item] = FairQueue()
    items = [Item(*one) for one in asked]
    for item in items:
        queue.push(item)
    assert queue.live_tokens == sum(item.prompt_tokens for item in items if not item.is_batch)
    assert (len(queue), queue.live) == (len(items), sum(not item.is_batch for item in items))
    assert {id(queue.pop()) for _ in items} == {id(item) for item in items}
    assert (len(queue), queue.live, queue.live_tokens) == (0, 0, 0)


@pytest.mark.parametrize(
    ("outstanding", "room"),
    [
        (Outstanding(0, 0, 0), True),
        (Outstanding(0, 9, 0), True),
        (Outstanding(0, 10, 0), False),  # eight, and a quarter of them ahead
        (Outstanding(0, 1, 0, unstarted=1, unstarted_tokens=9999), True),
    ],
)
def test_room_at_a_replica(outstanding: Outstanding, room: bool) -> None:
    assert has_room(outstanding, max_num_seqs=8, max_num_batched_tokens=100) == room


@pytest.mark.parametrize(
    ("unstarted", "tokens", "room"), [(32, 399, True), (32, 400, False), (31, 400, True)]
)
def test_a_replica_holds_a_few_steps_of_prompts(unstarted: int, tokens: int, room: bool) -> None:
    outstanding = Outstanding(0, 40, 0, unstarted, tokens)
    assert has_room(outstanding, max_num_seqs=64, max_num_batched_tokens=100) == room
    assert not has_room(outstanding, max_num_seqs=40, max_num_batched_tokens=100, is_batch=True)
