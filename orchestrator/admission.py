"""Who waits for a replica: how many may, and whose turn it is. Pure.

Between clients the one that was served the fewest tokens goes first (the virtual token counter of Sheng et al.,
"Fairness in Serving Large Language Models", 2024, https://arxiv.org/abs/2401.00588); a client that comes back starts
level with those that wait, so that idleness earns no credit. Live requests go before those of batches.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Of what waits for a replica; None: any number."""

    requests: int | None = None
    tokens: int | None = None  # of prompts


class Waiting(Protocol):
    """What can stand in the queue."""

    @property
    def client(self) -> str: ...

    @property
    def is_batch(self) -> bool: ...

    @property
    def prompt_tokens(self) -> int: ...


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    def __init__(self) -> None:
        self._lines: dict[
            tuple[bool, str], OrderedDict[int, T]
        ] = {}  # (is_batch, client) -> what it waits for
        self._served: dict[str, int] = {}  # client -> tokens; of those that wait or lately did
        self.live = self.live_tokens = 0  # requests that are not of batches, and the tokens of their prompts
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, item: T, *, again: bool = False) -> None:
        """`again`: it had its turn, in vain, and goes before the client's others."""
        line = (item.is_batch, item.client)
        if line not in self._lines:
            self._lines[line] = OrderedDict()
            self._level(item.client)
        self._lines[line][id(item)] = item
        if again:
            self._lines[line].move_to_end(id(item), last=False)
            self.charge(item.client, -item.prompt_tokens)  # as it was when its turn came
        self._note(item, 1)

    @property
    def next_is_batch(self) -> bool:
        return bool(self._lines) and all(is_batch for is_batch, _ in self._lines)

    def pop(self) -> T:
        """The next one's turn. Raises IndexError where nobody waits."""
        if not self._lines:
            raise IndexError("nobody waits")
        # dicts keep their order: on a tie the line that has stood for longest goes first.
        line = min(self._lines, key=lambda line: (line[0], self._served[line[1]]))
        item = next(iter(self._lines[line].values()))
        self._leave(item)
        self.charge(item.client, item.prompt_tokens)
        return item

    def discard(self, item: T) -> bool:
        """Whether it stood in the queue."""
        here = id(item) in self._lines.get((item.is_batch, item.client), ())
        if here:
            self._leave(item)
        return here

    def charge(self, client: str, tokens: int) -> None:
        """Count what a client was served."""
        self._served[client] = self._served.get(client, 0) + tokens

    def _level(self, client: str) -> None:
        others = [
            self._served[other] for _, other in self._lines if other != client and other in self._served
        ]
        self._served[client] = max(self._served.get(client, 0), min(others, default=0))

    def _leave(self, item: T) -> None:
        line = (item.is_batch, item.client)
        del self._lines[line][id(item)]
        if not self._lines[line]:
            del self._lines[line]
        self._note(item, -1)

    def _note(self, item: T, change: int) -> None:
        self._count += change
        if not item.is_batch:
            self.live += change
            self.live_tokens += change * item.prompt_tokens
