"""Replicas that died are started again; what may have killed them is found out. The deciding is pure, the doing thin.

A gang lives and dies whole, so it is started again whole, by whoever knows how: `restart` is handed in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from typing import Generic, Protocol, TypeVar

from cluster.errors import GangDied, ShardwiseError
from orchestrator.replica import Replica

LOG = logging.getLogger("shardwise")

ATTEMPTS = 2  # deaths under suspicion, at the last of them alone: such a request is not run again
KILLED_ATTEMPTS = 4  # where the last replica was killed: seldom the doing of what it ran
MOST_UNRELATED = 8  # killed replicas that it had no part in: so many at most put off its end, by one each
UNRELATED_S = 600.0  # so recent
CLEARED_TOKENS = 4
"""So many new tokens after a death put a request above suspicion. It goes on from what was shown, and so comes at once
to the step that it died in; steps in flight ahead of what was shown, and tokens lost on their way, are the others."""
MOST_DOUBLINGS = 4  # of these tokens, for one that was under suspicion before: it may kill now and then
CROWD = 16
"""Of more suspects than this, so many are tried at once: 200 one by one, each a prompt and some steps, took longer than
a start. It costs the guilty one's neighbours a third start."""


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


class End(Enum):
    """Of a replica's life."""

    SERVED = "it had finished a request: failures are counted anew"
    EXPLAINED = "a request is to blame, which will not come again: no failure of the replica's"
    IN_VAIN = "nothing came of it"


class Breaker:
    """Of one replica: closed, it is started again; open, nobody counts on it, and it is tried now and then."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self.failures = 0

    @property
    def is_open(self) -> bool:
        return self.failures >= self._policy.failures

    def ended(self, end: End) -> float:
        """A life is over. → seconds to wait before the next."""
        if end is End.SERVED:
            self.failures = 0
        elif end is End.IN_VAIN:
            self.failures += 1
        return self._policy.wait_s(self.failures)


# -- which request is to blame: pure --


@dataclass(frozen=True, slots=True)
class Record:
    """What a request has to do with deaths of replicas."""

    blamed: int = 0  # deaths that may be its doing
    suspects: int = 0  # of the last of them, with this one
    was_killed: bool = False  # so the last one ended
    unrelated: int = 0  # kills of late that it had no part in
    suspicions: int = 0  # those and earlier ones, which it was cleared of
    cleared_at: int = 0  # so many tokens of its answer put it above suspicion

    @property
    def is_spent(self) -> bool:
        most = KILLED_ATTEMPTS + min(self.unrelated, MOST_UNRELATED) if self.was_killed else ATTEMPTS
        return self.suspects == 1 and self.blamed >= most

    def after_death(
        self, tokens: int, suspects: int, *, was_killed: bool = False, unrelated: int = 0
    ) -> Record:
        """It is one of so many that may have done it. `tokens`: how many of its answer there are."""
        needed = CLEARED_TOKENS << min(self.suspicions, MOST_DOUBLINGS)
        return Record(self.blamed + 1, suspects, was_killed, unrelated, self.suspicions + 1, tokens + needed)

    def after_tokens(self, tokens: int) -> Record:
        """Above suspicion where it came so far: what it dies of later has nothing to do with the last time."""
        return replace(self, blamed=0) if self.blamed and tokens >= self.cleared_at else self


class Kills:
    """Replicas killed of late, and who may have done it: one killed without a request might have been with it too."""

    def __init__(self) -> None:
        self._kills: deque[tuple[float, frozenset[str]]] = deque(maxlen=64)

    def add(self, now_s: float, suspects: Iterable[str]) -> None:
        self._kills.append((now_s, frozenset(suspects)))

    def without(self, request_id: str, now_s: float) -> int:
        """How many it had no part in."""
        return sum(
            request_id not in suspects and now_s - at_s <= UNRELATED_S for at_s, suspects in self._kills
        )


class Suspect(Protocol):
    @property
    def record(self) -> Record: ...


S = TypeVar("S", bound=Suspect)


class Trials(Generic[S]):
    """Requests that were there when a replica died: each replica takes one at a time, until it is cleared.

    Thus one that kills what runs it is alone under suspicion the second time, and its neighbours are not blamed.
    Of a crowd each replica takes several at a time, and one by one only those among whom it died again.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, S] = {}  # by id: in order, and quick to leave
        self._tried: dict[int, dict[int, S]] = {}  # by replica, and by id

    def __len__(self) -> int:
        """Those that wait for their trial."""
        return len(self._waiting)

    def add(self, suspect: S) -> None:
        self._waiting[id(suspect)] = suspect

    def is_free(self, replica: int) -> bool:
        return replica not in self._tried

    def begin(self, replica: int) -> list[S]:
        """The next trial: of one, or of several from a crowd."""
        waiting = iter(self._waiting.values())
        tried = [next(waiting)]
        if tried[0].record.suspects > CROWD:
            crowd = (suspect for suspect in waiting if suspect.record.suspects > CROWD)
            tried += islice(crowd, CROWD - 1)
        for suspect in tried:
            del self._waiting[id(suspect)]
        self._tried[replica] = {id(suspect): suspect for suspect in tried}
        return tried

    def tries(self, suspect: S, replica: int) -> bool:
        return id(suspect) in self._tried.get(replica, ())

    def end(self, replica: int) -> None:
        """It is dead."""
        self._tried.pop(replica, None)

    def leave(self, suspect: S, replica: int) -> None:
        """It is cleared, or finished, or nobody wants it any more."""
        self._waiting.pop(id(suspect), None)
        if (tried := self._tried.get(replica)) is not None:
            tried.pop(id(suspect), None)
            if not tried:
                del self._tried[replica]


def spent(record: Record, last: ShardwiseError) -> str:
    """What a request is told that is not run again."""
    return f"{record.blamed} replicas died while they ran this request, which is not tried again; the last: {last}"


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
        self, number: int, death: ShardwiseError, end: End, on_open: Callable[[GangDied], None]
    ) -> Replica:
        """The replica's next life, as soon as there is one. `on_open` is told why, when nobody should wait for it."""
        breaker, error = self._breaker(number), death
        while True:
            wait_s = breaker.ended(end)
            told = f"replica {number} is down ({_first_line(error)})"
            if breaker.is_open:
                LOG.error("%s, %d times in a row: next try in %g s", told, breaker.failures, wait_s)
                failed = "" if error is death else f"\nIt could not be started again: {error}"
                on_open(GangDied(f"{death}{failed}"))
            else:
                LOG.warning("%s: starting it again%s", told, f" in {wait_s:g} s" if wait_s else "")
            await self._sleep(wait_s)
            begun_s, end = time.monotonic(), End.IN_VAIN
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
