"""`shardwise bench`: a load on any OpenAI endpoint, told as `vllm bench serve` tells it."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError

if TYPE_CHECKING:
    from launch.bench_load import Answer, OpenAI, Prompt
    from launch.progress import Progress

MOST_FIRST = 16  # requests that warm the endpoint up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", metavar="URL", help="of an endpoint: http://127.0.0.1:8000, with or without /v1"
    )
    parser.add_argument("--model", metavar="NAME", help="default: the first that it serves")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="whose first key it shows: one a line"
    )
    parser.add_argument("--chat", action="store_true", help="ask /v1/chat/completions, not /v1/completions")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    load = parser.add_argument_group("load", "the second names are those of `vllm bench serve`")
    load.add_argument("--requests", "--num-prompts", type=int, default=200, metavar="N", help="in all (200)")
    load.add_argument(
        "--concurrency",
        "--max-concurrency",
        type=int,
        metavar="N",
        help="so many at once, each that ends replaced; default: 32",
    )
    load.add_argument(
        "--request-rate",
        type=float,
        metavar="R",
        help="so many a second by chance (Poisson), answered or not",
    )
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="of the rate: below 1 in bursts, above steadier (1)",
    )
    for flag, theirs, default in (("prompt", "input", 1024), ("output", "output", 128)):
        load.add_argument(
            f"--{flag}-tokens",
            f"--random-{theirs}-len",
            type=int,
            default=default,
            metavar="N",
            help=f"of each request ({default})",
        )
    load.add_argument(
        "--text", action="store_true", help="prompts as text, for endpoints that take no token ids"
    )
    load.add_argument("--vocab", type=int, default=32_000, metavar="N", help="token ids are below N (32000)")
    load.add_argument(
        "--keep-eos",
        action="store_true",
        help="let answers end by themselves: ignore_eos is not OpenAI's own",
    )
    load.add_argument("--no-warm-up", action="store_true", help="time the first requests too")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals")
    for flag, of in (("--max-ttft-ms", "first token"), ("--max-tpot-ms", "each next one")):
        load.add_argument(
            flag, type=float, metavar="MS", help=f"goodput: count answers whose {of} takes no longer"
        )


def run(args: argparse.Namespace) -> int:
    from launch.bench_figures import Limits, lines, summarise
    from launch.bench_load import check_any, first_error
    from launch.progress import Progress

    _check(args)
    limits = Limits(args.max_ttft_ms, args.max_tpot_ms)
    progress = Progress()
    model, answers = asyncio.run(_load(args, progress))
    check_any(answers, args.url)
    seconds = max(a.start_s + a.latency_s for a in answers) - min(a.start_s for a in answers)
    made = {**_head(args, model), **summarise(answers, seconds, limits)}
    if args.json:
        print(json.dumps(made, indent=2))
    else:
        for line in lines(made):
            print(line)
    if made["failed"]:
        progress.say(f"{made['failed']} of {len(answers)} requests failed; the first: {first_error(answers)}")
    return 0


def _head(args: argparse.Namespace, model: str) -> dict[str, object]:
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if args.chat else "openai",
        "model_id": model,
        "num_prompts": args.requests,
        "request_rate": args.request_rate if args.request_rate is not None else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": _at_once(args),
    }


def _at_once(args: argparse.Namespace) -> int | None:
    """Without a rate there must be a bound."""
    if args.concurrency is None and args.request_rate is None:
        return 32
    return int(args.concurrency) if args.concurrency is not None else None


def _check(args: argparse.Namespace) -> None:
    for flag in ("requests", "concurrency", "prompt_tokens", "output_tokens", "vocab"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {value}; it must be at least 1")
    for flag in ("request_rate", "burstiness", "max_ttft_ms", "max_tpot_ms"):
        value = getattr(args, flag)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{flag.replace('_', '-')} is {value:g}; it must be above 0")


async def _load(args: argparse.Namespace, progress: Progress) -> tuple[str, list[Answer]]:
    from launch.bench_load import check_any, closed_loop, connected, random_prompts
    from launch.keys import own_key

    as_text = args.text or args.chat
    key = own_key(args.api_key_file)
    asked = connected(args.url, model=args.model, key=key, chat=args.chat, ignore_eos=not args.keep_eos)
    async with asked as endpoint:
        if not args.no_warm_up:
            first = random_prompts(
                min(MOST_FIRST, args.requests, _at_once(args) or MOST_FIRST),
                args.prompt_tokens,
                vocab=args.vocab,
                seed=f"warm-up {args.seed}",
                as_text=as_text,
            )
            warm = await closed_loop(endpoint, first, min(4, args.output_tokens), len(first), lambda _: None)
            check_any(warm, args.url)
        prompts = random_prompts(
            args.requests, args.prompt_tokens, vocab=args.vocab, seed=str(args.seed), as_text=as_text
        )
        return endpoint.model, await _timed(args, endpoint, prompts, progress)


async def _timed(
    args: argparse.Namespace, endpoint: OpenAI, prompts: list[Prompt], progress: Progress
) -> list[Answer]:
    from launch.bench_load import arrivals, closed_loop, open_loop

    told = f"{endpoint.model}: {args.requests} requests"
    with progress.bar(told, unit_is_bytes=False) as bar:
        done = 0

        def one_done(_: Answer) -> None:
            nonlocal done
            done += 1
            bar.update(done, args.requests)

        at_once = _at_once(args)
        if args.request_rate is None:
            assert at_once is not None
            return await closed_loop(endpoint, prompts, args.output_tokens, at_once, one_done)
        waits_s = arrivals(args.requests, args.request_rate, args.burstiness, str(args.seed))
        return await open_loop(endpoint, prompts, args.output_tokens, waits_s, one_done, at_once)
