"""`shardwise up`: a deployment from one file, that goes on when the command and its terminal are gone."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from launch.config import find_recipe
from launch.deployments import (
    DEAD,
    UNREADABLE,
    Deployment,
    Here,
    There,
    locked,
    record_there,
    recorded,
)
from launch.keeper import OVER, READY, STOPPING
from launch.progress import Progress
from launch.state import state_directory, up_directory
from launch.up_recipe import Wanted, read_wanted

if TYPE_CHECKING:
    from cluster.topology import Topology

LOOK_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one that ships")
    parser.add_argument("--name", help="of the deployment; default: the recipe's")
    parser.add_argument("--model", help="in place of the recipe's")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster, in place of the recipe's")
    parser.add_argument("--port", type=int, metavar="N", help="in place of the recipe's")
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="serve in this process, as a service manager or a container wants it",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    path = find_recipe(args.recipe)
    asked = {key: getattr(args, key) for key in ("name", "model", "address", "port")}
    wanted = read_wanted(path, asked)
    if args.foreground:
        return _serve(wanted)
    progress = Progress(quiet=args.json)
    with ExitStack() as joined_to:
        with locked():
            is_there = wanted.address is not None
            deployment = _there(wanted, progress, joined_to) if is_there else _here(wanted, progress)
        return _follow(deployment, progress, as_json=args.json)


def _serve(wanted: Wanted) -> int:
    """`shardwise serve`, in a cluster or here: nothing is recorded, and who started us keeps us."""
    from launch import serve

    _check_machine(wanted, None if wanted.machine is None or wanted.address else _gpus_here())
    asked = wanted.arguments(
        device=wanted.device, key_file=wanted.key_file, address=wanted.address, batch_dir=_batches(wanted)
    )
    return serve.run(_serve_arguments(asked))


def _serve_arguments(asked: Sequence[str]) -> argparse.Namespace:
    from launch import serve

    parser = argparse.ArgumentParser(prog="shardwise serve")
    serve.add_arguments(parser)
    return parser.parse_args(asked)


def _batches(wanted: Wanted) -> Path:
    return wanted.batch_dir or state_directory() / "batches" / wanted.name


# --- on this machine ----------------------------------------------------------------------------------------


def _here(wanted: Wanted, progress: Progress) -> Deployment:
    """It runs, or is started. Raises UserError where it runs with another recipe."""
    deployment = Here(wanted.name, up_directory(wanted.name))
    known = recorded()
    if known.get(wanted.name) is not None:
        raise UserError(_other(wanted.name, f"in the cluster at {known[wanted.name]}"))
    keys = wanted.key_file
    asked = wanted.arguments(device=wanted.device, key_file=keys, address=None, batch_dir=_batches(wanted))
    argv = ["serve", *asked]
    digest = _digest(argv, [])
    if wanted.name in known:
        told = deployment.describe()
        if told["state"] not in (*OVER, DEAD):
            _check_same(told, digest, progress)
            return deployment
        deployment.forget()
    port = _free_port(wanted)
    taken = _gpus_for(wanted, progress)
    environment = (
        {}
        if taken is None
        else {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, taken)),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        }
    )
    if keys is not None:
        from launch.keys import read_keys

        read_keys(keys)  # raises where they cannot be read
    told = {
        "digest": digest,
        "key_file": None if keys is None else str(keys),
        "gpus": taken or [],
        "port": port,
    }
    deployment.start({"argv": argv, "environment": environment, "told": told})
    progress.say(f"starting {wanted.name}; its log: shardwise logs {wanted.name} -f")
    return deployment


def _free_port(wanted: Wanted) -> int:
    """The one asked for; 0: any. Raises UserError where it could not listen there, before anything is started."""
    from launch.serve import listen

    asked = wanted.arguments(device=wanted.device, key_file=wanted.key_file, address=None, batch_dir=None)
    args = _serve_arguments(asked)
    for name, told in _running():
        if args.port and args.port == told["order"].get(
            "port"
        ):  # one that starts is bound, but not in the way yet
            raise UserError(
                f"port {args.port} is {name}'s; give another --port, or end that: shardwise down {name}"
            )
    is_open = args.api_key_file is not None or args.allow_without_key
    listen(args.host, args.port, is_open=is_open).close()
    return int(args.port)


def _gpus_for(wanted: Wanted, progress: Progress) -> list[int] | None:
    """Of those that no other deployment holds, the ones that the plan takes; None where there is none to choose."""
    if wanted.device == "cpu":
        _check_machine(wanted, None)
        return None
    from launch.machine import visible_here

    visible = visible_here()
    if not visible:
        _check_machine(wanted, None)
        return None
    held = _held()
    free = [gpu for gpu in visible if gpu not in held]
    if not free:
        who = ", ".join(sorted(set(held.values())))
        raise UserError(
            f"all {len(visible)} GPUs are held by {who}; end one: shardwise down {who.split(', ')[0]}"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, free))
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    from launch.machine import found_here

    _check_machine(wanted, found_here("cuda"))
    chosen = sorted(_planned_devices(wanted, progress))
    taken = [free[i] for i in chosen]
    if held:
        progress.say(
            f"GPUs {', '.join(map(str, taken))}; {len(held)} are held by {', '.join(sorted(set(held.values())))}"
        )
    return taken


def _held() -> dict[int, str]:
    """GPUs of this machine → the deployment that holds each."""
    held: dict[int, str] = {}
    for name, told in _running():
        held |= dict.fromkeys(told["order"].get("gpus", []), name)
    return held


def _running() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Deployments that this machine keeps, by name: what they tell of themselves."""
    for name, address in recorded().items():
        if address is None:
            told = Here(name, up_directory(name)).describe()
            if told["state"] not in (*OVER, DEAD):
                yield name, told


def _planned_devices(wanted: Wanted, progress: Progress) -> Sequence[int]:
    """Positions among the GPUs that are visible now. Raises NoFeasiblePlan, BadLayout."""
    from launch.options import engine_options, layout
    from launch.plan import workload_of
    from launch.predict import planned

    asked = wanted.arguments(device=wanted.device, key_file=None, address=None, batch_dir=None)
    args = _serve_arguments(asked)
    return planned(engine_options(args), workload_of(args), layout(args), progress).candidate.devices


def _gpus_here() -> Topology | None:
    from launch.machine import found_here, visible_here

    return found_here("cuda") if visible_here() else None


def _check_machine(wanted: Wanted, here: Topology | None) -> None:
    """Raises UserError where the recipe was made for another machine."""
    if wanted.machine is None or wanted.machine.devices[0].kind == "cpu" or wanted.address is not None:
        return
    names = [device.name for device in wanted.machine.devices]
    have = [device.name for device in here.devices] if here is not None else []
    if any(have.count(name) < names.count(name) for name in names):
        raise UserError(
            f"the recipe is for {_counted(names)}; free here: {_counted(have) or 'no GPU'}. Take out its section "
            "machine, or write this machine's: shardwise profile --out machine.yaml"
        )


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


# --- in a cluster -------------------------------------------------------------------------------------------


def _there(wanted: Wanted, progress: Progress, joined_to: ExitStack) -> Deployment:
    from launch.head import CLIENT, adopt, check_head

    assert wanted.address is not None
    if wanted.address.startswith(CLIENT):
        raise UserError(
            f"up takes HOST:PORT of the head, such as 10.0.0.1:6379, or auto, not {wanted.address}"
        )
    adopt(check_head(wanted.address))
    from cluster import detached

    if wanted.name in recorded() and recorded()[wanted.name] is None:
        raise UserError(_other(wanted.name, "on this machine"))
    progress.say(f"connecting to the Ray cluster at {wanted.address}")
    joined_to.enter_context(detached.joined(wanted.address))
    deployment = bring_up(wanted, progress, replace=False)
    record_there(wanted.name, wanted.address)
    return deployment


def bring_up(wanted: Wanted, progress: Progress, *, replace: bool) -> There:
    """In the cluster that this process has joined. `replace` what is up with another recipe. Raises UserError."""
    from cluster import detached
    from launch.gateway import Gateway
    from launch.head import versions
    from launch.keys import read_keys

    keys, where = read_keys(wanted.key_file), str(wanted.address)
    device = wanted.device or ("cuda" if detached.has_gpus() else "cpu")
    address, batches = detached.gcs_address(), wanted.batch_dir  # by default beside the log, on the head
    argv = ["serve", *wanted.arguments(device=device, key_file=None, address=address, batch_dir=batches)]
    digest = _digest(argv, keys)
    known = detached.find(wanted.name)
    if known is not None:
        deployment = There(wanted.name, where, known)
        told = deployment.describe()
        is_other = told["order"].get("digest") != digest
        if told["state"] not in OVER and not (replace and is_other):
            _check_same(told, digest, progress)
            return deployment
        deployment.forget()
    environment = {"CUDA_VISIBLE_DEVICES": None} if device == "cuda" else {}
    order = {
        "argv": argv,
        "environment": environment,
        "keys": keys,
        "run": secrets.token_hex(8),
        "told": {"digest": digest},
    }
    may_move = wanted.batch_dir is not None
    actor = detached.start(wanted.name, Gateway, (wanted.name, order), may_move=may_move, told=versions())
    progress.say(f"starting {wanted.name} on the cluster's head; its log: shardwise logs {wanted.name} -f")
    return There(wanted.name, where, actor)


# --- either -------------------------------------------------------------------------------------------------


def _digest(argv: Sequence[str], keys: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([list(argv), list(keys)]).encode()).hexdigest()


def _other(name: str, where: str) -> str:
    return f"{name} is up already, {where}: shardwise down {name} ends it, --name gives this one another"


def _check_same(told: Mapping[str, Any], digest: str, progress: Progress) -> None:
    """Raises UserError where it was brought up from something else."""
    name = told["name"]
    if told["state"] == UNREADABLE:
        raise UserError(f"{name} is {UNREADABLE}; end it first: shardwise down {name}")
    if told["order"].get("digest") != digest:
        raise UserError(_other(name, "with another recipe"))
    if told["state"] == STOPPING:
        raise UserError(f"{name} is stopping; wait for it: shardwise down {name}")
    progress.say(f"{name} is up already: {told['state']}")


def _follow(deployment: Deployment, progress: Progress, *, as_json: bool) -> int:
    """Tells of its start until it serves. Raises UserError where it does not."""
    told = deployment.describe()
    cursor, _ = deployment.log(None, 0)
    if told["state"] != READY:
        cursor = (cursor[0], 0)  # from its beginning
    try:
        while told["state"] not in (READY, *OVER, DEAD, STOPPING):
            cursor = _echo(deployment, cursor, quiet=as_json)
            time.sleep(LOOK_S)
            told = deployment.describe()
    except KeyboardInterrupt:
        print(
            f"{deployment.name} goes on starting; shardwise down {deployment.name} ends it", file=sys.stderr
        )
        raise
    if told["state"] != READY:
        return _failed(deployment, told)
    _echo(deployment, cursor, quiet=as_json)
    if as_json:
        shown = {key: told[key] for key in ("name", "state", "url", "restarts")}
        print(json.dumps(shown), flush=True)
    else:
        print(told["url"], flush=True)
    return 0


def _echo(deployment: Deployment, cursor: tuple[int, int], *, quiet: bool) -> tuple[int, int]:
    cursor, text = deployment.log(cursor, 0)
    for line in text.decode(errors="replace").splitlines() if not quiet else ():
        said = line.partition(" ")[2]
        if not said.startswith("shardwise serve:"):  # its last line, told at the end
            print(said, file=sys.stderr, flush=True)
    return cursor


def _failed(deployment: Deployment, told: Mapping[str, Any]) -> int:
    """Its own words, its own exit code; nothing of it is left."""
    words = [line for failure in told.get("failures", []) for line in failure["words"]]
    code = told.get("exit_code") or 1
    why = "\n".join(words[-3:]) if code == 1 else (words[-1] if words else "")
    deployment.forget()
    print(
        why.replace("shardwise serve:", "shardwise up:") or f"{deployment.name} is {told['state']}",
        file=sys.stderr,
    )
    return int(code) if code > 0 else 1
