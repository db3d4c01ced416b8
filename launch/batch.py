"""`shardwise batch`: a file of requests to a server and a file of answers back, or both in this process."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError

if TYPE_CHECKING:
    from launch.batch_client import Server
    from launch.batch_input import Source
    from launch.progress import Progress

ADDRESS = "http://127.0.0.1:8000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    submit = verbs.add_parser("submit", help="send a file to a server or a cluster; prints the batch's id")
    _add_source(submit)
    submit.add_argument("--wait", action="store_true", help="until it is done")
    submit.add_argument(
        "-o", "--output", type=Path, metavar="OUT.jsonl", help="wait, and write the answers there"
    )
    _add_server(submit)
    for verb, says in (
        ("status", "how far it is"),
        ("wait", "until it is done"),
        ("results", "write its answers"),
        ("cancel", "stop it; what is answered stays"),
    ):
        command = verbs.add_parser(verb, help=says)
        command.add_argument("id", metavar="BATCH")
        if verb == "results":
            command.add_argument("-o", "--output", type=Path, metavar="OUT.jsonl", required=True)
        _add_server(command)
    _add_server(verbs.add_parser("list", help="all of them, the newest first"))
    _add_run(verbs.add_parser("run", help="answer a file in this process, without a server; again, to go on"))


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="JSONL (OpenAI's or prompts), .txt, .csv or .parquet"
    )
    parser.add_argument("--column", metavar="NAME", help="of a table, that holds the prompts (prompt)")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer that says nothing itself")
    parser.add_argument("--temperature", type=float, metavar="T", help="the same")


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default=ADDRESS,
        metavar="URL",
        help=f"of the server ({ADDRESS}), or ray://HEAD:10001 of the cluster that it is up in",
    )
    parser.add_argument("--name", help="ray://: of the deployment; default: the only one")
    parser.add_argument(
        "--dashboard", metavar="URL", help="ray://: the cluster's HTTP port (http://HEAD:8265)"
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="default: OPENAI_API_KEY, if it is set"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _add_run(parser: argparse.ArgumentParser) -> None:
    from launch.options import add_engine_arguments, add_layout_arguments

    add_layout_arguments(parser)
    add_engine_arguments(parser)  # MODEL comes first
    _add_source(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.jsonl", required=True)
    parser.add_argument("--job-dir", type=Path, metavar="DIR", help="the journal; default: beside the output")


def run(args: argparse.Namespace) -> int:
    if args.verb == "run":
        from launch.batch_run import run_here

        return run_here(args, source_of(args))
    if getattr(args, "output", None) is not None:
        check_output(args.output)
    with closing(_server(args)) as client:
        return _ask(args, client)


def _ask(args: argparse.Namespace, client: Server) -> int:
    if args.verb == "submit":
        return _submit(args, client)
    if args.verb == "list":
        return _list(args, client)
    if args.verb == "cancel":
        _show(args, client.post(f"/v1/batches/{args.id}/cancel", {}))
        return 0
    if args.verb == "wait":
        return _wait(args, client, args.id)
    batch = client.get(f"/v1/batches/{args.id}")
    if args.verb == "results":
        return _results(args, client, batch)
    _show(args, batch)
    return 0


def source_of(args: argparse.Namespace) -> Source:
    from launch.batch_input import Source

    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    given = {name: value for name, value in sampling.items() if value is not None}
    return Source(args.file, args.column, args.chat, given)


def _server(args: argparse.Namespace) -> Server:
    """Checked. Raises UserError."""
    from launch.batch_client import open_server

    key = os.environ.get("OPENAI_API_KEY")
    if args.api_key_file is not None:
        from launch.keys import own_key

        key = own_key(args.api_key_file)
    return open_server(args.address, key, args.name, args.dashboard, _progress(args))


def _submit(args: argparse.Namespace, client: Server) -> int:
    from launch.batch_follow import submit

    progress = _progress(args)
    batch = submit(client, source_of(args), progress)
    if not (args.wait or args.output):
        _show(args, batch, short=True)
        return 0
    progress.say(f"batch {batch['id']}")
    job = str(batch["id"])
    return _wait(args, client, job) if args.output is None else _wait_and_write(args, client, job)


def _wait_and_write(args: argparse.Namespace, client: Server, job: str) -> int:
    from launch.batch_follow import follow

    batch = follow(client, job, _progress(args))
    return _results(args, client, batch)


def _wait(args: argparse.Namespace, client: Server, job: str) -> int:
    from launch.batch_follow import follow

    batch = follow(client, job, _progress(args))
    _show(args, batch)
    return 0 if batch["status"] == "completed" else 1


def _results(args: argparse.Namespace, client: Server, batch: Mapping[str, Any]) -> int:
    """What there is of it. Exit code 1 where it is not complete."""
    from launch.batch_follow import OVER

    if batch["status"] not in OVER:
        raise UserError(
            f"batch {batch['id']} is {batch['status']}; wait for it: shardwise batch wait {batch['id']}"
        )
    if batch["status"] == "failed":
        raise UserError(f"batch {batch['id']} failed: {batch['errors']['data'][0]['message']}")
    for field, path in (("output_file_id", args.output), ("error_file_id", errors_path(args.output))):
        if batch[field] is not None:
            try:
                client.download(batch[field], path)
            except OSError as error:
                raise UserError(
                    f"--output {path}: {error.strerror}; the server keeps the answers: "
                    f"shardwise batch results {batch['id']} -o FILE"
                ) from None
    _progress(args).say(told_of(batch["request_counts"], args.output))
    if args.json:
        _show(args, batch)
    return 0 if batch["status"] == "completed" else 1


def check_output(path: Path) -> None:
    """Raises UserError where it cannot be written; better now than after an hour."""
    is_new = not os.path.lexists(path)
    try:
        path.open("ab").close()
        if is_new:  # nothing is taken for answers until there are some
            path.unlink()
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}; give a file that can be written") from None


def errors_path(output: Path) -> Path:
    return output.with_suffix(".errors.jsonl")


def told_of(counts: Mapping[str, int], output: Path) -> str:
    failed = f", {counts['failed']} errors in {errors_path(output)}" if counts["failed"] else ""
    return f"{counts['completed']} answers in {output}{failed}"


def _list(args: argparse.Namespace, client: Server) -> int:
    after = ""
    while True:
        page = client.get(f"/v1/batches?limit=100&after={after}")
        for batch in page["data"]:
            _show(args, batch)
        if not page["has_more"]:
            return 0
        after = page["data"][-1]["id"]


def _show(args: argparse.Namespace, batch: Mapping[str, Any], *, short: bool = False) -> None:
    if args.json:
        print(json.dumps(batch), flush=True)
    elif short:
        print(batch["id"], flush=True)
    else:
        counts, errors = batch["request_counts"], batch.get("errors")
        why = f": {errors['data'][0]['message']}" if errors else ""
        told = f"{counts['completed']} of {counts['total']} answered, {counts['failed']} failed"
        print(f"{batch['id']}  {batch['status']}  {told}{why}", flush=True)
    sys.stdout.flush()


def _progress(args: argparse.Namespace) -> Progress:
    from launch.progress import Progress

    return Progress(quiet=args.json)
