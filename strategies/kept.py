"""What was measured here before, put in place of predictions, or scaling those of loads nearby. Pure.

A layout's own measurements know what the model does not: this host, this engine's version. At the very load they count
themselves; near it, the model's figure counts times how wrong the model was there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from strategies.plan import Estimate
from strategies.spec import Workload

MOST_APART = 4.0
"""Times as many requests at once, or as long a prompt or answer, up to which a measurement says something of a load."""

MODEL = "model"


@dataclass(frozen=True, slots=True)
class Kept:
    """One layout under one load, with what the model said of it then."""

    layout: str
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float
    predicted_ttft_s: float
    predicted_tpot_s: float
    predicted_tokens_per_s: float
    measured_on: str  # 2026-11-22

    @property
    def load(self) -> tuple[int, int, int]:
        return self.prompt_tokens, self.output_tokens, self.concurrency


def informed(made: Estimate, layout: str, workload: Workload, kept: Sequence[Kept]) -> Estimate:
    """The estimate with what is known of this layout; the newest counts. Loads that never end were never measured."""
    own = [one for one in kept if one.layout == layout]
    if not own or workload.steady:
        return made
    load = (workload.prompt_tokens, workload.output_tokens, workload.concurrency)
    nearest = min(reversed(own), key=lambda one: _apart(one.load, load))
    if nearest.load == load:
        figures = nearest.ttft_s, nearest.tpot_s, nearest.output_tokens_per_s
        return _with(made, *figures, f"measured here on {nearest.measured_on}")
    if _apart(nearest.load, load) > math.log(MOST_APART):
        return made
    at_once = f"{nearest.concurrency} at once"
    return _with(
        made,
        made.ttft_s * _ratio(nearest.ttft_s, nearest.predicted_ttft_s),
        made.tpot_s * _ratio(nearest.tpot_s, nearest.predicted_tpot_s),
        made.output_tokens_per_s * _ratio(nearest.output_tokens_per_s, nearest.predicted_tokens_per_s),
        f"scaled by what was measured here with {at_once} on {nearest.measured_on}",
    )


def _apart(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return max(abs(math.log(x / y)) for x, y in zip(a, b, strict=True))


def _ratio(measured: float, predicted: float) -> float:
    """1 where there was nothing to measure, as the TPOT of one-token answers."""
    return measured / predicted if measured > 0 and predicted > 0 else 1.0


def _with(made: Estimate, ttft_s: float, tpot_s: float, rate: float, source: str) -> Estimate:
    share = made.share_of_limit * rate / made.output_tokens_per_s
    usd = made.usd_per_million_tokens
    return replace(
        made,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        output_tokens_per_s=rate,
        share_of_limit=min(1.0, share),
        usd_per_million_tokens=None if usd is None else usd * made.output_tokens_per_s / rate,
        source=source,
    )
