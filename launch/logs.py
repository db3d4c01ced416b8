"""`shardwise logs`: what the server of a deployment said, and says."""

from __future__ import annotations

import argparse
import sys
import time

from cluster.errors import UserError
from launch.deployments import DEAD, opened
from launch.keeper import OVER

LOOK_S = (0.3, 1.0)  # between two looks: on this machine, in a cluster


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the deployment")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until it ends, or Ctrl-C")
    parser.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="how many of the last (50)")
    parser.add_argument(
        "--address", metavar="ADDRESS", help="of the Ray cluster; default: as it was brought up"
    )


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.lines <= 100_000:
        raise UserError(f"--lines is {args.lines}; it must be from 0 to 100000")
    with opened([args.name], args.address) as (deployment,):
        cursor, text = deployment.log(None, args.lines)
        while True:
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
            if not text:
                if not args.follow or deployment.describe()["state"] in (*OVER, DEAD):
                    return 0
                time.sleep(LOOK_S[deployment.where != "this machine"])
            cursor, text = deployment.log(cursor, 0)
