"""How far off predictions are where their figures come from so: what nine of ten measured ones lie within. Pure.

From docs/accuracy.md: of 605 rows of dense models on machines known by data sheets alone, 95 % of the TPOTs lie within
25 %; of 899 of mixtures, whose routing no table tells, 87 % within 30; of our engine's 30 runs on two H100s after a
profile 28 within 8 %. First tokens scatter twice as far: servers and load generators hold them up.
"""

from __future__ import annotations

import math
from itertools import pairwise

from cluster.topology import Provenance
from strategies.kept import MODEL
from strategies.plan import Estimate, Placement

DEVICES = {Provenance.MEASURED: 0.08, Provenance.TABLE: 0.15, Provenance.DATASHEET: 0.25}
LINKS = {Provenance.MEASURED: 0.12, Provenance.TABLE: 0.25, Provenance.DATASHEET: 0.40}
MIXTURES = 0.30
MEASURED_HERE = 0.05  # the same load again, another day
FIRST_TOKEN = 2.0  # times as far

_OVER_LINKS = ("all_reduce", "all_gather", "all_to_all", "send_recv")


def spread(placement: Placement, made: Estimate) -> float:
    """Of TPOT and throughput, as a share: each cause by where its figures come from.

    Devices and links are wrong independently of each other; all that one of them causes is wrong together. A device
    pulls streamed layers over its own slot, known as well as the device is: there are no other devices to link to.
    """
    if made.source != MODEL:
        return MEASURED_HERE
    devices = [placement.topology.devices[i].provenance for i in placement.devices]
    links = [placement.topology.link(a, b).provenance for a, b in pairwise(placement.devices)]
    total = sum(made.breakdown.values())
    over_links = sum(made.breakdown.get(cause, 0.0) for cause in _OVER_LINKS) / total
    over_slots = made.breakdown.get("offload", 0.0) / total
    parts = [(1 - over_links - over_slots) * max(DEVICES[p] for p in devices)]
    parts.append(over_links * max((LINKS[p] for p in links), default=0.0))
    parts.append(over_slots * max(LINKS[p] for p in devices))
    if not placement.spec.is_dense:
        parts.append(MIXTURES)
    return math.hypot(*parts)


def ends(spread: float) -> dict[str, tuple[float, float]]:
    """Times a predicted figure, by the name that it is printed by: what nine of ten measured ones lie between."""
    later, first = min(0.99, spread), min(0.99, FIRST_TOKEN * spread)
    about = (1 - later, 1 + later)
    return {
        "ttft_ms": (1 - first, 1 + first),
        "tpot_ms": about,
        "output_tokens_per_s": about,
        "share_of_limit": about,
        "usd_per_million_tokens": (1 / (1 + later), 1 / (1 - later)),
    }
