"""Whose turn it is, and at which replica: the queue, those under suspicion, and what each replica has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cluster.errors import GangDied, Overloaded, ShardwiseError
from orchestrator.admission import FairQueue, QueueLimits
from orchestrator.answer import Ongoing
from orchestrator.lane import Lane
from orchestrator.router import Outstanding, choose, has_room
from orchestrator.scheduler import SchedulerConfig
from orchestrator.supervisor import Kills, Trials

_RETRY_S = (1.0, 60.0)  # the least and the most that a client is told to wait


class Turns:
    def __init__(self, lanes: Sequence[Lane], limits: SchedulerConfig, queue: QueueLimits) -> None:
        self._lanes, self._limits, self._queue = lanes, limits, queue
        self._waiting: FairQueue[Ongoing] = FairQueue()
        self._trials: Trials[Ongoing] = Trials()
        self._kills = Kills()

    def __len__(self) -> int:
        """Those that no replica has."""
        return len(self._waiting) + len(self._trials)

    def check(
        self, requests: int, prompt_tokens: int, seconds_for: Callable[[int, float], float | None]
    ) -> None:
        """Raises Overloaded. One that finds nobody waiting is taken, however long it is. Batches bound themselves."""
        waiting, limits = self._waiting, self._queue
        if not waiting.live:
            return
        asked = (
            ("requests", waiting.live, requests, limits.requests),
            ("prompt tokens", waiting.live_tokens, requests * prompt_tokens, limits.tokens),
        )
        for what, have, new, most in asked:
            if most is not None and have + new > most:
                least_s, most_s = _RETRY_S
                estimate_s = seconds_for(len(waiting), time.perf_counter()) or least_s
                raise Overloaded(
                    f"the queue is full: {have} {what} wait, {new} more would pass {most}; try again later",
                    min(max(estimate_s, least_s), most_s),
                )

    def join(self, one: Ongoing, *, again: bool = False) -> None:
        """`again`: its replica died under it."""
        if one.record.blamed:
            self._trials.add(one)
        else:
            self._waiting.push(one, again=again)

    def deal(self) -> None:
        """Give those whose turn it is to replicas that have room; those under suspicion first, by themselves."""
        while len(self._trials):
            quiet = [load for load in self._rooms(is_batch=False) if not load.unstarted]
            if not quiet:  # nor is anything new begun, or it would never get quiet
                return
            lane = self._lanes[choose(quiet)]
            for one in self._trials.begin(lane.number):
                self._give(one, lane)
        while len(self._waiting):
            rooms = self._rooms(is_batch=self._waiting.next_is_batch)
            if not rooms:
                return
            self._give(self._waiting.pop(), self._lanes[choose(rooms)])

    def note_token(self, one: Ongoing) -> None:
        """Of one under suspicion: its trial is over once it has come further than where a replica died."""
        one.record = one.record.after_tokens(len(one.token_ids))
        if not one.record.blamed:
            self._trials.leave(one, one.replica)

    def leave(self, one: Ongoing) -> None:
        """It is finished, or nobody wants it any more."""
        self._trials.leave(one, one.replica)
        if one.replica < 0:
            self._waiting.discard(one)
        else:
            self._lanes[one.replica].end(one.prefill_tokens, one.tokens_left, is_begun=one.is_begun)
        if one.token_ids:
            self._waiting.charge(one.client, len(one.token_ids))

    def bury(self, lane: Lane, error: ShardwiseError, given: Sequence[Ongoing]) -> None:
        """A replica is dead: `given` is what it had, and each remembers whether it may be to blame."""
        unsent, was_killed = lane.die(error), isinstance(error, GangDied) and error.was_killed
        sent = [one for one in given if one.request.id not in unsent]
        suspects = [one for one in sent if self._trials.tries(one, lane.number)] or sent
        self._trials.end(lane.number)
        for one in given:
            one.replica = -1
        now_s = time.monotonic()
        if was_killed:
            self._kills.add(now_s, (one.request.id for one in suspects))
        for one in suspects:
            one.record = one.record.after_death(
                len(one.token_ids),
                len(suspects),
                was_killed=was_killed,
                unrelated=self._kills.without(one.request.id, now_s),
            )

    def _rooms(self, *, is_batch: bool) -> list[Outstanding]:
        """Replicas with room, and nobody's trial."""
        seqs, tokens = self._limits.max_num_seqs, self._limits.max_num_batched_tokens
        lanes = (lane for lane in self._lanes if lane.error is None and self._trials.is_free(lane.number))
        loads = (lane.outstanding for lane in lanes)
        return [load for load in loads if has_room(load, seqs, tokens, is_batch=is_batch)]

    def _give(self, one: Ongoing, lane: Lane) -> None:
        request = one.give(lane.number, time.perf_counter())
        lane.give(one.prefill_tokens, one.tokens_left)
        lane.submit(request)
