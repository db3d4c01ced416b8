"""Why a gang cannot be placed, in one line: need, have, who holds it, the way out. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.errors import PlacementFailed


def refusal(
    count: int, resource: str, nodes: Mapping[str, float], free: float, holders: Mapping[str, float]
) -> PlacementFailed:
    """nodes: address → how many it has; free: in all; holders: name → how many it holds."""
    total = sum(nodes.values())
    have = ", ".join(f"{amount:g} on {address}" for address, amount in nodes.items() if amount) or "none"
    held = ", ".join(f"{name} ({amount:g})" for name, amount in holders.items() if amount) or "nobody"
    if total < count:
        way_out = f"Use at most {total:g}, or add nodes." if total else f"Add nodes that have a {resource}."
    elif free:
        way_out = f"Use at most {free:g}, or end who holds the others."
    else:
        way_out = "Wait for them, or end who holds them."
    return PlacementFailed(
        f"{count} {resource} needed; the cluster has {have}; free: {free:g}; held by {held}. {way_out}"
    )
