"""Which replica takes a request, and whether one has room for any: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AHEAD = 0.25  # of a replica's sequences: so many requests more wait there, lest a slot stand free for a step
STEPS_OF_PROMPTS = 4  # so many steps' budgets of prompts wait there: two steps in flight, and the next two


@dataclass(frozen=True, slots=True)
class Outstanding:
    """What a replica has been given and has not finished."""

    replica: int
    requests: int
    tokens: int  # prompt and still possible output: what is left for it to do at most
    unstarted_tokens: int = 0  # of prompts that have no first token yet


def choose(replicas: Sequence[Outstanding]) -> int:
    """The replica with the least left to do; on a tie the one with the fewest requests, then the first."""
    return min(replicas, key=lambda r: (r.tokens, r.requests, r.replica)).replica


def has_room(replica: Outstanding, max_num_seqs: int, max_num_batched_tokens: int) -> bool:
    """Whether another request would be begun soon: what waits here, in the coordinator, can still change its order.

    A full KV cache shows by prompts that are not begun.
    """
    most = max_num_seqs + max(1, int(max_num_seqs * AHEAD))
    return replica.requests < most and replica.unstarted_tokens < STEPS_OF_PROMPTS * max_num_batched_tokens
