"""`shardwise generate`: answer prompts under any layout, in the order in which they were given."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError

if TYPE_CHECKING:
    from launch.options import EngineOptions
    from launch.prompts import Prompt
    from launch.start import Deployment
    from orchestrator.request import Completion, SamplingParams
    from orchestrator.text import Text
    from strategies.plan import Candidate

LABEL_WIDTH = 80  # characters of a prompt that are shown above its answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from launch.options import add_engine_arguments, add_layout_arguments

    prompts = parser.add_argument_group("prompts")
    what = prompts.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="prompt, messages or prompt_token_ids a line, and sampling fields",
    )
    prompts.add_argument(
        "--chat", action="store_true", help="each --prompt is a user's message in the model's chat template"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of an answer (128)")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="of the likeliest tokens that add up to it (1: all)",
    )
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="of the K likeliest tokens (0: all)"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line on standard output, nothing else"
    )
    add_layout_arguments(parser)
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from launch.options import check_blocks, engine_options, layout
    from orchestrator.request import SamplingParams

    sampling = SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k
    )
    if args.chat and args.prompts is not None:
        raise UserError("--chat is for --prompt; a line of a --prompts file says it with messages")
    dims = layout(args)
    options = engine_options(args)
    check_blocks(options)
    from launch.predict import planned, workload_of  # torch: after what can be refused without
    from launch.progress import Progress
    from orchestrator.text import text_of

    text = text_of(options.source)
    prompts = _prompts(args, sampling, text, options)
    progress = Progress()
    chosen = planned(options, workload_of(options, prompts), dims, progress).candidate
    return _generate(prompts, chosen, options, text, progress, as_json=args.json)


def _prompts(
    args: argparse.Namespace, sampling: SamplingParams, text: Text | None, options: EngineOptions
) -> list[Prompt]:
    from launch.prompts import check, from_file, from_texts

    if args.prompts is not None:
        prompts = from_file(args.prompts, sampling, text)
    else:
        prompts = from_texts(args.prompt, sampling, text, chat=args.chat)
    check(prompts, vocab=options.spec.vocab, context=options.most_context, has_tokenizer=text is not None)
    return prompts


def _generate(
    prompts: Sequence[Prompt],
    chosen: Candidate,
    options: EngineOptions,
    text: Text | None,
    progress: Progress,
    *,
    as_json: bool,
) -> int:
    from launch.prompts import check
    from launch.start import cluster, deployment

    dims = chosen.dims
    with (
        cluster(options, dims.world_size, progress) as found,
        deployment(found, dims, options, progress, shards=chosen.shards) as served,
    ):
        check(
            prompts,
            vocab=options.spec.vocab,
            context=served.limits.max_model_len,  # what fits may be less than the model's
            has_tokenizer=text is not None,
        )
        printer = _JsonLines() if as_json else _People(prompts)
        started = time.perf_counter()
        tokens = asyncio.run(_answer_all(prompts, served, options, text, printer))
        seconds = time.perf_counter() - started
    progress.say(f"{chosen.layout.name}: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s")
    return 0


async def _answer_all(
    prompts: Sequence[Prompt], served: Deployment, options: EngineOptions, text: Text | None, printer: Printer
) -> int:
    """All at once; printed in order, each as soon as those before it are out."""
    async with served.coordinator(options, text) as coordinator:
        on_text = printer.stream if len(prompts) == 1 else None
        asked = [asyncio.create_task(coordinator.complete(p.token_ids, p.sampling, on_text)) for p in prompts]
        try:
            tokens = 0
            for prompt, task in zip(prompts, asked, strict=True):
                completions = await task
                printer.answer(prompt, completions)
                tokens += sum(len(c.token_ids) for c in completions)
            return tokens
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            printer.end()


class _JsonLines:
    stream = None

    def end(self) -> None:
        """Every line was whole."""

    def answer(self, prompt: Prompt, completions: Sequence[Completion]) -> None:
        for choice, done in enumerate(completions):
            line: dict[str, object] = {
                "token_ids": done.token_ids,
                "text": done.text,
                "finish_reason": str(done.finish_reason),
                "prompt_tokens": done.prompt_tokens,
            }
            if len(completions) > 1:
                line["choice"] = choice
            if done.logprobs is not None:
                line["logprobs"] = [
                    {"logprob": p.logprob, "top": dict(zip(map(str, p.top_ids), p.top_logprobs, strict=True))}
                    for p in done.logprobs
                ]
            print(json.dumps(line, ensure_ascii=False), flush=True)


class _People:
    """A single answer as it comes; several one after another, each under its prompt."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._single = len(prompts) == 1
        self._is_in_line = False

    def stream(self, new_text: str) -> None:
        self._is_in_line = True
        sys.stdout.write(new_text)
        sys.stdout.flush()

    def answer(self, prompt: Prompt, completions: Sequence[Completion]) -> None:
        for choice, done in enumerate(completions):
            number = f" ({choice + 1} of {len(completions)})" if len(completions) > 1 else ""
            if not self._single or choice:
                print(f"── {_one_line(prompt.label)}{number}")
            shown = self._single and choice == 0 and done.text is not None
            text = done.text if done.text is not None else " ".join(map(str, done.token_ids))
            print("" if shown else text, flush=True)
            self._is_in_line = False

    def end(self) -> None:
        """What is told next, on an answer that was broken off too, has a line of its own."""
        if self._is_in_line:
            print(flush=True)


def _one_line(label: str) -> str:
    line = " ".join(label.split())
    return line if len(line) <= LABEL_WIDTH else line[: LABEL_WIDTH - 1] + "…"


if TYPE_CHECKING:
    from launch.progress import Progress

    Printer = _JsonLines | _People
