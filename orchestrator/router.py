"""Which replica takes a request, and whether one has room for any: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AHEAD = 0.25  # of a replica's sequences: so many requests more wait there, lest a slot stand free for a step
STEPS_OF_PROMPTS = 4  # so many steps' budgets of prompts wait there: two steps in flight, and the next two
BATCH_STEPS_OF_PROMPTS = 2
LEAST_UNSTARTED = 32  # so many may wait however long they are: of most of a prompt the prefix cache may know


@dataclass(frozen=True, slots=True)
class Outstanding:
    """What a replica has been given and has not finished."""

    replica: int
    requests: int
    tokens: int  # prompt and still possible output: what is left for it to do at most
    unstarted: int = 0  # that have no first token yet
    unstarted_tokens: int = 0  # of their prompts


def choose(replicas: Sequence[Outstanding]) -> int:
    """The replica with the least left to do; on a tie the one with the fewest requests, then the first."""
    return min(replicas, key=lambda r: (r.tokens, r.requests, r.replica)).replica


def has_room(
    replica: Outstanding, max_num_seqs: int, max_num_batched_tokens: int, *, is_batch: bool = False
) -> bool:
    """Whether another request would be begun soon: what waits here, in the coordinator, can still change its order.

    A full KV cache shows by prompts that are not begun. Batches never wait there, so that a live request gets the
    next slot that is free.
    """
    ahead = 0 if is_batch else max(1, int(max_num_seqs * AHEAD))
    steps = BATCH_STEPS_OF_PROMPTS if is_batch else STEPS_OF_PROMPTS
    starts_soon = replica.unstarted < LEAST_UNSTARTED or (
        replica.unstarted_tokens < steps * max_num_batched_tokens
    )
    return replica.requests < max_num_seqs + ahead and starts_soon
