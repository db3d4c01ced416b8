"""`shardwise serve`: a model behind OpenAI's HTTP API, under any layout, until it is told to stop."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import ipaddress
import re
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import BadRequest, UserError
from cluster.files import DAMAGED, tell_damaged, write_whole
from launch.state import state_directory

if TYPE_CHECKING:
    from launch.api.metrics import Facts
    from launch.generation_config import GenerationConfig
    from launch.options import EngineOptions
    from launch.predict import Planned
    from launch.progress import Progress
    from orchestrator.text import Text
    from strategies.plan import ParallelDims
    from strategies.spec import Workload

MOST_FILES = 65_536
_LAYOUT = "layout"  # a file of --batch-dir: what a server that was killed ran


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from launch.options import add_engine_arguments, add_layout_arguments
    from launch.plan import add_workload_arguments

    http = parser.add_argument_group("http")
    http.add_argument("--host", default="127.0.0.1", help="the interface to listen on (127.0.0.1)")
    http.add_argument("--port", type=int, default=8000, help="0: any that is free (8000)")
    http.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="an API key a line; without one, loopback alone is served",
    )
    http.add_argument(
        "--allow-without-key", action="store_true", help="listen on other interfaces though there is no key"
    )
    http.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="what clients call the model; default: MODEL"
    )
    http.add_argument(
        "--tool-call-parser", metavar="FORM", help="hermes, mistral or llama3_json; default: by template"
    )
    http.add_argument(
        "--batch-dir",
        type=Path,
        metavar="DIR",
        help="files and batches; default: one a port, in ~/.local/state",
    )
    http.add_argument(
        "--no-generation-config",
        action="store_true",
        help="OpenAI's sampling defaults, not those of the model's generation_config.json",
    )
    http.add_argument(
        "--kept-as",
        metavar="NAME",
        help="with --address: if it is killed, the next server of this name finds its replicas, loaded",
    )
    http.add_argument("--access-log", action="store_true", help="a line a request")
    _add_bounds(parser)
    add_layout_arguments(parser)
    add_workload_arguments(parser)
    add_engine_arguments(parser)


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument(
        "--max-queue", type=int, default=1024, metavar="N", help="requests that may wait for a replica (1024)"
    )
    bounds.add_argument(
        "--max-queue-tokens", type=int, metavar="N", help="prompt tokens that may wait; default: no bound"
    )
    bounds.add_argument(
        "--request-timeout",
        type=float,
        metavar="S",
        help="a request's deadline; default: none, or its own timeout_s",
    )
    bounds.add_argument(
        "--drain-timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="for what is in flight, at the end (300)",
    )


def run(args: argparse.Namespace) -> int:
    from launch.keys import read_keys

    _check_bounds(args)
    _raise_open_files()
    keys = read_keys(args.api_key_file)
    with listen(args.host, args.port, is_open=bool(keys) or args.allow_without_key) as listener:
        return _run(args, listener, keys)


def _run(args: argparse.Namespace, listener: socket.socket, keys: list[str]) -> int:
    from launch.api.tools import form_of
    from launch.generation_config import GenerationConfig
    from launch.generation_config import read as read_generation
    from launch.options import check_blocks, engine_options, layout
    from launch.plan import workload_of

    workload = workload_of(args)
    dims = layout(args)
    form_of("", args.tool_call_parser)  # raises where there is none of that name
    with _store(args.batch_dir, listener.getsockname()[1]) as store:
        note = store / _LAYOUT
        if args.kept_as is not None and dims is None:  # where its replicas hold what is free
            dims = _ran_before(note, args)
        options = replace(engine_options(args), grammars=True, kept_as=args.kept_as)
        check_blocks(options)
        from launch.predict import planned  # torch: after what can be refused without
        from launch.progress import Progress
        from orchestrator.text import text_of

        generation = GenerationConfig() if args.no_generation_config else read_generation(options.source)
        options = replace(options, spec=generation.applied(options.spec))
        text = text_of(options.source)
        threading.Thread(target=_warm_up, args=(text,), daemon=True).start()
        progress = Progress()
        chosen = planned(options, workload, dims, progress)
        try:
            write_whole(chosen.candidate.layout.name.encode(), note)
            return _serve(args, listener, store, keys, options, generation, text, chosen, workload, progress)
        finally:  # but not where it is killed
            note.unlink(missing_ok=True)


def _ran_before(note: Path, args: argparse.Namespace) -> ParallelDims | None:
    """What the last server of this name ran, which was killed; the arguments get it too."""
    from launch.options import layout

    try:
        args.layout = note.read_text(encoding="utf-8")
        return layout(args)
    except FileNotFoundError:
        return None
    except DAMAGED as error:  # BadLayout is a ValueError
        tell_damaged(note, error)
        args.layout = None
        return None


def _raise_open_files() -> None:
    """A connection is a file, and many systems give a process 1024 unless it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _warm_up(text: Text | None) -> None:
    """What the first request else waits for, and everybody with it: imports and tables, seconds of them."""
    import xgrammar  # noqa: F401  brings transformers

    if text is not None:
        len(text.pieces or ())
        with suppress(BadRequest):  # it may have no template, or one that wants more
            text.encode_chat([{"role": "user", "content": "Hello"}])


def _check_bounds(args: argparse.Namespace) -> None:
    for flag in ("max_queue", "max_queue_tokens", "request_timeout", "drain_timeout"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < 10**9:
            raise UserError(f"--{flag.replace('_', '-')} is {value:g}; it must be over 0 and under 1e9")
    if args.kept_as is not None and args.address is None:
        raise UserError(
            "--kept-as wants --address: a private Ray ends with its server, and all replicas with it"
        )
    if args.kept_as is not None and not re.fullmatch(r"[\w.-]{1,64}", args.kept_as):
        raise UserError(
            f"--kept-as is {args.kept_as[:80]!r}; it must be up to 64 letters, digits, dots, dashes and underscores"
        )
    if not all(name.strip() for name in args.served_model_name or ()):
        raise UserError("--served-model-name has an empty name; give what clients are to call the model")
    if not 0 <= args.port <= 65_535:
        raise UserError(f"--port is {args.port}; it must be from 0 to 65535")


def listen(host: str, port: int, *, is_open: bool) -> socket.socket:
    """A socket that is bound, before anything slow. Raises UserError where that cannot be, or must not."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host {host[:100]} is no address of this machine ({error}); try 127.0.0.1"
        ) from None
    family, kind, protocol, _, address = found[0]
    if not is_open and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UserError(
            f"--host {host} lets others in and there is no API key: give --api-key-file, "
            "or --allow-without-key if the network is trusted"
        )
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port") from None
    return bound


def conditions_of(options: EngineOptions) -> dict[str, object]:
    """What a batch's answers depend on."""
    source = options.source
    weights = f"random, of seed {options.seed}"
    if not options.dummy_weights and source.path is not None:
        files = sorted(source.path.iterdir()) if source.path.is_dir() else [source.path]
        told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        weights = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
    kept = {"format": options.format} if options.format else {}
    return {"model": source.name, "weights": weights, "dtype": options.dtype, **kept}


@contextmanager
def _store(asked: Path | None, port: int) -> Iterator[Path]:
    """The directory of files and batches, ours alone while we run. Raises UserError."""
    path = (asked or state_directory() / f"port-{port}").expanduser().absolute()
    try:
        for part in ("files", "batches"):
            (path / part).mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"--batch-dir {path}: {error.strerror}; give a directory that can be written"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--batch-dir {path} is another server's; give one of its own") from None
        yield path


def _serve(
    args: argparse.Namespace,
    listener: socket.socket,
    store: Path,
    keys: list[str],
    options: EngineOptions,
    generation: GenerationConfig,
    text: Text | None,
    chosen: Planned,
    workload: Workload,
    progress: Progress,
) -> int:
    import asyncio

    progress.say("importing Ray")  # seconds, where the disk is cold or the machine busy
    import uvloop

    from launch.api.batches import Batches
    from launch.api.files import FileStore
    from launch.api.server import serve_http
    from launch.api.service import Service
    from launch.start import cluster, deployment
    from orchestrator.admission import QueueLimits
    from orchestrator.supervisor import DEFAULT_POLICY

    names = args.served_model_name or [args.model]
    facts, told = _facts(names[0], chosen), _told(chosen, workload)
    candidate = chosen.candidate
    with (
        cluster(options, candidate.dims.world_size, progress) as found,
        deployment(found, candidate.dims, options, progress, shards=candidate.shards) as served,
    ):

        async def serve() -> None:
            queue = QueueLimits(args.max_queue, args.max_queue_tokens)
            async with served.coordinator(options, text, queue, restarts=DEFAULT_POLICY) as coordinator:
                service = Service(
                    coordinator,
                    names,
                    told,
                    facts,
                    args.request_timeout,
                    args.tool_call_parser,
                    generation.sampling,
                )
                files = FileStore(store / "files")
                batches = Batches(store / "batches", files, service, conditions_of(options))
                await serve_http(
                    service,
                    listener,
                    keys=keys,
                    progress=progress,
                    drain_s=args.drain_timeout,
                    access_log=args.access_log,
                    files=files,
                    batches=batches,
                )

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            loop.run(serve())
    return 0


def _told(chosen: Planned, workload: Workload) -> dict[str, object]:
    """The plan, for the page."""
    from launch.plan_json import plan_to_json

    told: dict[str, object] = {"layout": chosen.candidate.layout.name, "plan": None, "reasons": []}
    if chosen.plan is not None:
        told |= {"plan": plan_to_json(chosen.plan, workload), "reasons": list(chosen.plan.explanation)}
    return told


def _facts(model: str, chosen: Planned) -> Facts:
    """For the metrics: the layout, what was predicted of it, the links that it uses."""
    from launch.api.metrics import Facts, LinkFact

    candidate, topology, predicted = chosen.candidate, chosen.topology, {}
    if (made := candidate.estimate) is not None:
        predicted = {
            "time_to_first_token_seconds": made.ttft_s,
            "time_per_output_token_seconds": made.tpot_s,
            "output_tokens_per_second": made.output_tokens_per_s,
        }
    links = []
    if topology is not None:
        used = set(candidate.devices)
        links = [
            LinkFact(str(a), str(b), str(link.kind), link.latency_s, link.bytes_per_s)
            for (a, b), link in topology.links.items()
            if {a, b} <= used
        ]
    return Facts(model, candidate.layout.name, candidate.dims.world_size, predicted, links)
