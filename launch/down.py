"""`shardwise down`: what is in flight ends, then the server and all that belongs to it."""

from __future__ import annotations

import argparse
import shutil
import time

from cluster.errors import PlacementFailed, UserError
from launch.deployments import DEAD, Deployment, opened, recorded
from launch.keeper import OVER
from launch.progress import Progress
from launch.state import up_directory

LOOK_S = 0.2
AGAIN_S = 1.0  # between two signals of --now
PATIENCE_S = 330.0  # serve's --drain-timeout is 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the deployment, or several")
    parser.add_argument("--all", action="store_true", help="every one")
    parser.add_argument(
        "--address", metavar="ADDRESS", help="of the Ray cluster; default: as it was brought up"
    )
    parser.add_argument("--now", action="store_true", help="without waiting for what is in flight")
    parser.add_argument(
        "--timeout", type=float, default=PATIENCE_S, metavar="S", help="then it is killed (330)"
    )


def run(args: argparse.Namespace) -> int:
    if bool(args.names) == args.all:
        known = ", ".join(recorded()) or "nothing"
        raise UserError(f"name what shall end, or give --all; up from this machine: {known}")
    if not args.timeout > 0:
        raise UserError(f"--timeout is {args.timeout:g}; it must be over 0")
    progress = Progress()
    try:
        with opened(args.names, args.address) as deployments:
            for deployment in deployments:
                _end(deployment, progress, now=args.now, timeout_s=args.timeout)
    except PlacementFailed as error:
        if not args.now:
            raise UserError(f"{error} To forget what was up there: --now") from None
        return _forget_lost(args, error, progress)
    return 0


def _forget_lost(args: argparse.Namespace, error: PlacementFailed, progress: Progress) -> int:
    """What was brought up from here in the cluster that does not answer; the others are ended."""
    known = recorded()
    asked = list(known) if args.all else args.names
    lost = [n for n in asked if known.get(n) is not None and args.address in (None, known[n])]
    if not lost:
        raise error
    for name in lost:
        shutil.rmtree(up_directory(name), ignore_errors=True)
        progress.say(f"{name}: forgotten; its cluster does not answer")
    rest = [name for name in asked if name not in lost]
    if args.address is not None or not rest:
        return 0
    return run(argparse.Namespace(**{**vars(args), "names": rest, "all": False}))


def _end(deployment: Deployment, progress: Progress, *, now: bool, timeout_s: float) -> None:
    deadline = time.monotonic() + (min(timeout_s, 10.0) if now else timeout_s)
    told_s = signalled_s = 0.0
    known = deployment.describe()
    while (state := deployment.describe()["state"]) not in (*OVER, DEAD) and time.monotonic() < deadline:
        if not signalled_s or (now and time.monotonic() - signalled_s > AGAIN_S):
            signalled_s = time.monotonic()
            deployment.stop()
        if time.monotonic() - told_s > 5:
            told_s = time.monotonic()
            live = deployment.live()
            flying = f", {live.running + live.waiting} requests in flight" if live is not None else ""
            progress.say(f"{deployment.name}: {state}{flying}")
        time.sleep(LOOK_S)
    deployment.forget()
    if known["state"] == DEAD and not known["order"] and not known["keeper_pid"]:
        progress.say(
            f"{deployment.name}: what was known of it is lost, and it is forgotten; were it in a Ray cluster, it is up "
            f"there still: shardwise down {deployment.name} --address HOST:PORT"
        )
        return
    progress.say(f"{deployment.name} is down")
