"""Which layouts a comparison takes where nothing in the model's own precision fits, and which it does not run. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from strategies.plan import Candidate, Layout, Plan

FEWER_BITS = ("int8", "int4")


def beyond_memory(wide: Plan, own: str, devices: int) -> list[Layout]:
    """Of a plan that has searched formats and offload: every layout in the model's `own` precision, refused as it is,
    and the best that streams it; in each format the pure splits of the whole machine, or the best that streams it."""
    named = [c for c in wide.candidates if not c.offload and c.format.name == own]
    found = [c.layout for c in sorted(named, key=lambda c: (c.dims.world_size, c.dims.dp, c.dims.pp))]
    for kept in (own, *FEWER_BITS):
        found += _of_format(
            [c for c in wide.candidates if c.format.name == kept], devices, resident=kept != own
        )
    return list(dict.fromkeys(found))


def _of_format(candidates: Sequence[Candidate], devices: int, *, resident: bool) -> Iterator[Layout]:
    pure = [
        c
        for c in candidates
        if not c.offload and max(c.dims.tp, c.dims.pp, c.dims.dp) == devices and c.dims.ep == 1
    ]
    if resident and any(c.feasible for c in pure):
        yield from (c.layout for c in pure)
        return
    streamed = sorted(  # of equals, one over the whole machine says most
        (c for c in candidates if c.offload and not c.feasible), key=lambda c: (-c.dims.world_size, c.dims.pp)
    )
    fit = [c for c in candidates if c.offload and c.feasible]
    yield from (c.layout for c in [*fit, *streamed][:1])


def refused(made: Plan) -> list[tuple[str, str]]:
    """(layout, why) of those that are not run."""
    return [(c.layout.name, why) for c in made.candidates if (why := c.reason or c.not_runnable)]
