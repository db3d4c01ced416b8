"""For KubeRay's RayService: `import_path: launch.ray_serve:app` with `args: {recipe: …}` keeps a deployment up.

Ray Serve carries no request: each token would take two more hops (its proxy and its replica). It brings the detached
coordinator up and tells RayService whether that is well, which is what upgrades without a gap wait for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import BadRecipe, GangDied
from launch.config import find_recipe
from launch.keeper import FAILED, OVER, READY
from launch.progress import Progress
from launch.up_recipe import read_wanted

LOOK_S = 1.0
_KEYS = ("recipe", "name", "model", "port")


def app(args: Mapping[str, Any]) -> Any:
    """`args`: recipe, a path on the head; name, model and port stand in for its own."""
    for key in args:
        if key not in _KEYS:
            raise BadRecipe(
                f"args of launch.ray_serve:app have an unknown key {key!r}; known are {', '.join(_KEYS)}"
            )
    if "recipe" not in args:
        raise BadRecipe("args of launch.ray_serve:app lack recipe, a path on the head")
    from cluster.serve_app import application

    return application(Kept, args)


class Kept:
    def __init__(self, args: Mapping[str, Any]) -> None:
        """Returns once it serves. Raises GangDied, with the server's words, where it cannot."""
        from launch.up import bring_up

        path: Path = find_recipe(str(args["recipe"]))
        wanted = read_wanted(path, {key: args.get(key) for key in _KEYS[1:]} | {"address": "auto"})
        self._deployment = bring_up(wanted, Progress(), replace=True)
        while (told := self._deployment.describe())["state"] not in (READY, *OVER):
            time.sleep(LOOK_S)
        if told["state"] == FAILED:
            words = [line for failure in told["failures"] for line in failure["words"]]
            self._deployment.forget()
            raise GangDied(f"{wanted.name} does not start: {words[-1] if words else told['exit_code']}")

    def check(self) -> None:
        state = self._deployment.describe()["state"]
        if state in OVER:
            raise GangDied(f"{self._deployment.name} is {state}")

    def told(self) -> dict[str, Any]:
        told = self._deployment.describe()
        return {key: told[key] for key in ("name", "state", "url", "version", "restarts")}
