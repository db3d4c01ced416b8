"""`shardwise status`: what is up, and what it does; live on a terminal, once elsewhere."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import ShardwiseError
from launch.deployments import Deployment, opened, recorded
from launch.keeper import READY, how
from launch.live import Live

if TYPE_CHECKING:
    from rich.console import RenderableType

LOOK_S = 1.0  # between two readings: tokens a second are their difference
FAILURES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="of deployments; default: all")
    parser.add_argument(
        "--address", metavar="ADDRESS", help="of a Ray cluster; default: as they were brought up"
    )
    parser.add_argument("--once", action="store_true", help="on a terminal, too")
    parser.add_argument("--json", action="store_true", help="once, as one JSON object on standard output")


@dataclass(frozen=True, slots=True)
class Reading:
    """A deployment at a moment."""

    told: Mapping[str, Any]  # Deployment.describe
    where: str
    live: Live | None
    at_s: float  # monotonic

    @property
    def name(self) -> str:
        return str(self.told["name"])


def run(args: argparse.Namespace) -> int:
    if not args.names and args.address is None and not recorded():
        print(
            json.dumps({"deployments": []})
            if args.json
            else "nothing is up; shardwise up RECIPE starts something"
        )
        return 0
    with opened(args.names, args.address) as deployments:
        before = [reading(one) for one in deployments]
        if any(one.live is not None for one in before):
            time.sleep(LOOK_S)
        after = [reading(one) for one in deployments]
        if args.json:
            print(json.dumps({"deployments": [as_json(a, b) for a, b in zip(before, after, strict=True)]}))
        elif args.once or not sys.stdout.isatty():
            for lines in map(described, before, after):
                print("\n".join(lines))
        else:
            _watch(deployments, before, after)
    return 0


def _watch(deployments: Sequence[Deployment], before: Sequence[Reading], after: Sequence[Reading]) -> None:
    from rich.live import Live as Screen

    with Screen(page(before, after), auto_refresh=False) as screen, suppress(KeyboardInterrupt):
        while True:
            time.sleep(LOOK_S)
            before, after = after, [reading(one) for one in deployments]
            screen.update(page(before, after), refresh=True)


def reading(deployment: Deployment) -> Reading:
    try:
        told = deployment.describe()
        live = deployment.live() if told["state"] == READY else None
    except ShardwiseError as error:  # its actor is starting again, say
        told = {
            "name": deployment.name,
            "state": f"no answer: {error}",
            "failures": [],
            "restarts": 0,
            "url": None,
        }
        live = None
    return Reading(told, deployment.where, live, time.monotonic())


def tokens_per_s(before: Reading, after: Reading) -> float | None:
    """None where it did not serve, or started anew in between."""
    if before.live is None or after.live is None or after.at_s <= before.at_s:
        return None
    made = after.live.generated_tokens - before.live.generated_tokens
    return made / (after.at_s - before.at_s) if made >= 0 else None


def as_json(before: Reading, after: Reading) -> dict[str, Any]:
    told = after.told
    kept = {
        key: told.get(key) for key in ("name", "state", "url", "restarts", "since_s", "version", "failures")
    }
    live = None if after.live is None else asdict(after.live)
    return {**kept, "where": after.where, "tokens_per_s": tokens_per_s(before, after), "live": live}


def page(before: Sequence[Reading], after: Sequence[Reading]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for earlier, later in zip(before, after, strict=True):
        parts.append(Text("\n".join(described(earlier, later)), no_wrap=False))
        parts.append(Text(""))
    return Group(*parts[:-1])


def described(before: Reading, after: Reading) -> list[str]:
    """A deployment, in lines."""
    told, live = after.told, after.live
    since = f" for {_span(time.time() - told['since_s'])}" if told.get("since_s") else ""
    lines = [
        f"{after.name}: {told['state']}{since}, on {after.where}"
        + (f", {told['url']}" if told["url"] else "")
    ]
    if live is not None:
        gpus = told.get("order", {}).get("gpus")
        where = f", GPUs {', '.join(map(str, gpus))}" if gpus else ""
        alive = sum(live.replicas_alive)
        lines.append(
            f"  {live.model} as {live.layout} on {live.devices} device{'s' * (live.devices > 1)}{where}; "
            f"{alive} of {len(live.replicas_alive)} replicas alive"
        )
        lines += [f"  plan: {reason}" for reason in live.reasons[:2]]
        rate = tokens_per_s(before, after)
        lines.append(
            f"  {'–' if rate is None else f'{rate:.1f}'} tokens/s; {live.running} requests running, {live.waiting} "
            f"waiting; KV cache {live.kv_used:.0%}; {live.finished} finished, {live.generated_tokens} tokens in all"
        )
    lines += [f"  ! {line}" for line in failures(told, live)]
    return lines


def failures(told: Mapping[str, Any], live: Live | None) -> list[str]:
    """What went wrong of late, of the server and of requests."""
    found = []
    for failure in list(told.get("failures", []))[-FAILURES:]:
        ago, words = _span(time.time() - failure["at_s"]), failure["words"]
        why = f": {words[-1][:160]}" if words else ""
        found.append(f"{ago} ago the server ended, {how(failure['code'])}{why}")
    if live is not None:
        found += [f"{count} requests refused: {error}" for error, count in live.refused.items()]
        found += [f"{count} requests failed: {error}" for error, count in live.failed.items()]
        if live.replica_restarts:
            found.append(
                f"{live.replica_restarts} restarts of replicas; shardwise logs {told['name']} says why"
            )
    return found


def _span(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
