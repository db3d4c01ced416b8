"""What GPUs went through while something ran on them: clocks, heat, watts, throttling, and the energy that it took."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.nvml import Vitals

EVERY_S = 0.25
THROTTLED_SHARE = 0.05
"""Of the moments looked at, in which a GPU must have been throttled for its run to be flagged: one blip is none."""

Read = Callable[[], Sequence[Vitals]]


@dataclass(frozen=True, slots=True)
class Health:
    """One GPU over one run. None: the driver did not say."""

    uuid: str
    sm_clock_mhz: float | None  # mean
    temperature_c: float | None  # most
    watts: float | None  # mean
    joules: float | None  # over the whole run
    throttled_by: dict[str, float] = field(default_factory=dict)  # reason -> share of the moments looked at

    @property
    def is_throttled(self) -> bool:
        return any(share >= THROTTLED_SHARE for share in self.throttled_by.values())


class Watch:
    """Moments of a run; `seconds` and `health` are of all so far."""

    def __init__(self, read: Read, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        self._moments: list[tuple[float, Sequence[Vitals]]] = []

    def look(self) -> bool:
        """False where there is nothing to look at: no GPU, no driver."""
        seen = self._read()
        if seen and (
            not self._moments or len(seen) == len(self._moments[0][1])
        ):  # a driver may miss one for once
            self._moments.append((self._clock(), seen))
        return bool(seen)

    def health(self) -> tuple[Health, ...]:
        """Of each GPU; empty where nothing was seen."""
        if not self._moments:
            return ()
        columns = zip(*(seen for _, seen in self._moments), strict=True)
        times = [at for at, _ in self._moments]
        return tuple(_health(times, column) for column in columns)


def _health(times: Sequence[float], seen: Sequence[Vitals]) -> Health:
    reasons = sorted({reason for moment in seen for reason in moment.throttled_by})
    return Health(
        uuid=seen[0].uuid,
        sm_clock_mhz=_mean(v.sm_clock_mhz for v in seen),
        temperature_c=max((v.temperature_c for v in seen if v.temperature_c is not None), default=None),
        watts=_mean(v.watts for v in seen),
        joules=_joules(times, seen),
        throttled_by={r: sum(r in v.throttled_by for v in seen) / len(seen) for r in reasons},
    )


def _joules(times: Sequence[float], seen: Sequence[Vitals]) -> float | None:
    """By the card's own counter; else watts over time."""
    first, last = seen[0].joules, seen[-1].joules
    if first is not None and last is not None and last > first:
        return last - first
    watts = [v.watts for v in seen]
    if len(seen) < 2 or any(w is None for w in watts):
        return None
    pairs = zip(times, times[1:], watts, watts[1:], strict=False)
    return sum((b - a) * ((w or 0.0) + (v or 0.0)) / 2 for a, b, w, v in pairs)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


@contextmanager
def watched(read: Read, every_s: float = EVERY_S) -> Iterator[Watch]:
    """Looks at the start, every so often on a thread of its own, and at the end."""
    watch = Watch(read)
    ended = threading.Event()
    if not watch.look():
        yield watch
        return

    def keep_looking() -> None:
        while not ended.wait(every_s):
            watch.look()

    watcher = threading.Thread(target=keep_looking, daemon=True)
    watcher.start()
    try:
        yield watch
    finally:
        ended.set()
        watcher.join()
        watch.look()


def joules_per_token(health: Sequence[Health], tokens: int) -> float | None:
    """Of output, over all the GPUs of a layout; None unless each of them told."""
    told = [h.joules for h in health]
    if not told or any(j is None for j in told) or not tokens:
        return None
    return sum(j for j in told if j is not None) / tokens
