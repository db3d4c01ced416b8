"""The `shardwise` command: finds the subcommand, imports only that, and turns our errors into one line and a code."""

from __future__ import annotations

import argparse
import importlib
import sys

from cluster.errors import ShardwiseError

COMMANDS = {
    "plan": "pick the layout for a model on a machine, and say why the others lost",
    "compare": "predict, measure and check every layout on this machine",
    "generate": "answer prompts, under any layout",
    "doctor": "what is here, what is wrong with it, and the fix",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="shardwise", description="Splits a language model over whatever GPUs are there.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == named:
            module = importlib.import_module(f"launch.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except ShardwiseError as error:
        print(f"shardwise {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
