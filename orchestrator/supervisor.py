"""Replicas that died are started again; what may have killed them is found out. The deciding is pure, the doing thin.

A gang lives and dies whole, so it is started again whole, by whoever knows how: `restart` is handed in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from cluster.errors import GangDied, ShardwiseError
from orchestrator.replica import Replica

LOG = logging.getLogger("shardwise")

ATTEMPTS = 2  # a request that may have killed so many replicas is not run again
SUSPICIONS = 6  # nor one that had to be cleared so often: it may kill now and then
CLEARED_TOKENS = 4
"""So many new tokens after a death put a request above suspicion. It goes on from what was shown, and so comes at once
to the step that it died in; steps in flight ahead of what was shown, and tokens lost on their way, are the others."""


# -- whether and when a replica is started again: pure --


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    first_s: float = 1.0  # after one life that served nothing; after one that did, it goes at once
    factor: float = 2.0
    most_s: float = 60.0
    failures: int = 6  # so many lives in a row that served nothing open the breaker
    rest_s: float = 600.0  # an open one lets a start through every so often
    patience_s: float = 900.0  # requests wait so long for a replica, where none is left

    def wait_s(self, failures: int) -> float:
        """Before the next start, after so many lives in a row that served nothing."""
        if failures >= self.failures:
            return self.rest_s
        if failures == 0:
            return 0.0
        return min(self.first_s * self.factor ** (failures - 1), self.most_s)


DEFAULT_POLICY = RestartPolicy()


class Breaker:
    """Of one replica: closed, it is started again; open, nobody counts on it, and it is tried now and then."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self.failures = 0

    @property
    def is_open(self) -> bool:
        return self.failures >= self._policy.failures

    def ended(self, *, has_served: bool) -> float:
        """A life is over. → seconds to wait before the next. One that finished a request starts the count anew."""
        self.failures = 0 if has_served else self.failures + 1
        return self._policy.wait_s(self.failures)


# -- which request is to blame: pure --


@dataclass(frozen=True, slots=True)
class Record:
    """What a request has to do with deaths of replicas."""

    blamed: int = 0  # deaths that may be its doing
    suspicions: int = 0  # of those and earlier ones, which it was cleared of
    cleared_at: int = 0  # so many tokens of its answer put it above suspicion

    @property
    def is_spent(self) -> bool:
        return self.blamed >= ATTEMPTS or self.suspicions >= SUSPICIONS

    def after_death(self, tokens: int, *, is_blamed: bool) -> Record:
        """`tokens`: how many of its answer there are."""
        return Record(self.blamed + is_blamed, self.suspicions + is_blamed, tokens + CLEARED_TOKENS)

    def after_tokens(self, tokens: int) -> Record:
        """Above suspicion where it came so far: what it dies of later has nothing to do with the last time."""
        return replace(self, blamed=0) if self.blamed and tokens >= self.cleared_at else self


class Suspect(Protocol):
    @property
    def record(self) -> Record: ...


S = TypeVar("S", bound=Suspect)


class Trials(Generic[S]):
    """Requests that were there when a replica died: each replica takes one at a time, until it is cleared.

    Thus one that kills what runs it is alone under suspicion the second time, and its neighbours are not blamed.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, S] = {}  # by id: in order, and quick to leave
        self._tried: dict[int, S] = {}  # by replica

    def __len__(self) -> int:
        """Those that wait for their trial."""
        return len(self._waiting)

    def add(self, suspect: S) -> None:
        self._waiting[id(suspect)] = suspect

    def is_free(self, replica: int) -> bool:
        return replica not in self._tried

    def begin(self, replica: int) -> S:
        """The next one's trial."""
        suspect = self._waiting.pop(next(iter(self._waiting)))
        self._tried[replica] = suspect
        return suspect

    def tried_by(self, replica: int) -> S | None:
        return self._tried.get(replica)

    def end(self, replica: int) -> None:
        self._tried.pop(replica, None)

    def leave(self, suspect: S, replica: int) -> None:
        """It is finished, or nobody wants it any more."""
        self._waiting.pop(id(suspect), None)
        if self._tried.get(replica) is suspect:
            del self._tried[replica]


def spent(record: Record, last: ShardwiseError) -> str:
    """What a request is told that is not run again."""
    if record.blamed >= ATTEMPTS:
        return f"{record.blamed} replicas died while they ran this request, which is not tried again; the last: {last}"
    return f"{record.suspicions} replicas died under this request, which is not tried again; the last: {last}"


# -- the doing --

Restart = Callable[[int], Awaitable[Replica]]
"""A replica in the place of the one of that number, which is dead. Raises ShardwiseError where that fails."""


class Supervisor:
    def __init__(
        self,
        restart: Restart,
        policy: RestartPolicy = DEFAULT_POLICY,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.policy = policy
        self._restart, self._sleep = restart, sleep
        self._breakers: dict[int, Breaker] = {}
        self.restarts: dict[int, int] = {}  # by replica; those that succeeded

    def expects(self, number: int) -> bool:
        """Whether a dead replica is likely to be back."""
        return not self._breaker(number).is_open

    async def again(
        self, number: int, death: ShardwiseError, *, has_served: bool, on_open: Callable[[GangDied], None]
    ) -> Replica:
        """The replica's next life, as soon as there is one. `on_open` is told why, when nobody should wait for it."""
        breaker, error = self._breaker(number), death
        while True:
            wait_s = breaker.ended(has_served=has_served)
            told = f"replica {number} is down ({_first_line(error)})"
            if breaker.is_open:
                LOG.error("%s, %d times in a row: next try in %g s", told, breaker.failures, wait_s)
                failed = "" if error is death else f"\nIt could not be started again: {error}"
                on_open(GangDied(f"{death}{failed}"))
            else:
                LOG.warning("%s: starting it again%s", told, f" in {wait_s:g} s" if wait_s else "")
            await self._sleep(wait_s)
            begun_s, has_served = time.monotonic(), False
            try:
                found = await self._restart(number)
            except ShardwiseError as failure:
                error = failure
            except Exception as failure:  # ours to mend, but the next start may do better
                LOG.exception("replica %d could not be started", number)
                error = GangDied(f"it could not be started: {type(failure).__name__}: {failure}")
            else:
                self.restarts[number] = self.restarts.get(number, 0) + 1
                LOG.warning("replica %d is back after %.1f s", number, time.monotonic() - begun_s)
                return found

    def _breaker(self, number: int) -> Breaker:
        return self._breakers.setdefault(number, Breaker(self.policy))


def _first_line(error: ShardwiseError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
