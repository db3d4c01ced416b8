"""A Ray Serve application whose health is that of an object of a plain class: what RayService waits for and watches.

No request goes through it. It is made where Ray Serve is installed (pip install "ray[serve]") and asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ray import serve

HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 10.0, 30.0


class Kept(Protocol):
    def check(self) -> None:
        """Raises where it is not well."""

    def told(self) -> dict[str, Any]:
        """For who asks by HTTP."""


def application(hosted: type, args: Mapping[str, Any]) -> Any:
    """`hosted(args)` is made, a Kept, and asked again and again."""

    @serve.deployment(
        name="Keeper",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
    )
    class Keeper:
        def __init__(self, hosted: type, args: Mapping[str, Any]) -> None:
            self._kept: Kept = hosted(args)

        def check_health(self) -> None:
            self._kept.check()

        async def __call__(self, request: Any) -> dict[str, Any]:
            return self._kept.told()

    keeper: Any = Keeper  # what the decorator made of it has more than a class
    return keeper.bind(hosted, dict(args))
