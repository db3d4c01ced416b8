"""The `shardwise` command: finds the subcommand, imports only that, and turns our errors into one line and a code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from cluster.errors import ShardwiseError, UserError
from cluster.files import no_room
from launch import progress  # noqa: F401  whose clock begins with the command
from launch.outputs import drop_if_gone, hung_up

COMMANDS = {
    "plan": "pick the layout for a model on a machine, and say why the others lost",
    "compare": "predict, measure and check every layout on this machine",
    "generate": "answer prompts, under any layout",
    "validate": "the cost model beside figures that others measured, and its error",
    "claims": "what deployment guides promise, and what physics gives",
    "advise": "which machine to buy or rent for so many requests a day",
    "serve": "serve a model over OpenAI's HTTP API, under any layout",
    "up": "bring a deployment up from one file, to stay: on this machine or in a Ray cluster",
    "down": "end what is up, once what is in flight has ended",
    "status": "what is up and what it does: devices, plan, queue, tokens a second, failures",
    "logs": "what a deployment's server says",
    "batch": "answer a file of requests, by a server or in this process",
    "quality": "what fewer bits cost: perplexity, divergence and agreement on a text",
    "bench": "put a load on any OpenAI endpoint, and tell its latencies and throughput",
    "quantize": "write a model's weights in four bits or in float8, calibrated on text or plain",
    "profile": "prove the links of this machine and time all that plans are made of",
    "doctor": "what is here, what is wrong with it, and the fix",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(UserError.exit_code, f"{self.prog}: {message}; see {self.prog} --help\n")

    def refuse(self, unknown: str) -> NoReturn:
        """An argument that no parser knows, and the flag that it may have been meant for."""
        known = self._option_string_actions
        near = difflib.get_close_matches(unknown.partition("=")[0], known, n=1, cutoff=0.75)
        self.error(f"unknown argument {unknown}" + (f", the nearest is {near[0]}" if near else ""))


def main(argv: list[str] | None = None) -> int:
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # amid the imports, most likely
        return _interrupted(signal.SIGINT)


def _interrupted(by: signal.Signals) -> int:
    print("interrupted", file=sys.stderr)
    return 128 + by


def _main(argv: list[str]) -> int:
    parser = _Parser(prog="shardwise", description="Splits a language model over whatever GPUs are there.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == named:
            module = importlib.import_module(f"launch.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices.get(args.command, parser).refuse(unknown[0])
    if args.command is None:
        parser.print_help(sys.stderr)
        return UserError.exit_code
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    """The exit code. Ctrl-C, SIGTERM and SIGHUP end what was started, in the same order as if it had come to its
    end."""
    ended_by = signal.SIGINT

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal ended_by
        ended_by = signal.Signals(number)
        if number == signal.SIGHUP:
            hung_up()
        # asyncio has its own; a shell's background job ignores it.
        interrupt = signal.getsignal(signal.SIGINT)
        (interrupt if callable(interrupt) else signal.default_int_handler)(number, frame)

    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup a terminal may go
        signal.signal(signal.SIGHUP, terminate)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings meant for those who write with torch
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except ShardwiseError as error:
        print(f"shardwise {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _interrupted(ended_by)
    except BrokenPipeError:
        if not drop_if_gone(sys.stdout):
            raise
        return 128 + signal.SIGPIPE
    except OSError as error:
        if (told := no_room(error)) is None:
            raise
        print(f"shardwise {args.command}: {told}", file=sys.stderr)
        return UserError.exit_code


if __name__ == "__main__":
    sys.exit(main())
