"""From a parsed request to answers on their way, and back. The same for chat and completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from fastapi import Request
from starlette.responses import Response

from cluster.errors import BadRequest
from launch.api.guard import unused
from launch.api.schemas import Sampling, sampling_params
from launch.api.service import Service
from launch.api.streaming import Events, EventStream, unless_gone
from orchestrator import grammar as grammars
from orchestrator.answer import Answers, Terms
from orchestrator.request import Completion, Grammar, SamplingParams
from orchestrator.text import Text

MOST_SEQUENCES = 1024  # of one HTTP request: prompts × n


def context_of(service: Service) -> int:
    """Tokens that a sequence may have: the context, or what fits the KV cache."""
    limits = service.coordinator.limits
    return min(limits.max_model_len, limits.num_blocks * limits.block_size)


def truncated(prompt: list[int], asked: Sampling, service: Service) -> list[int]:
    most = asked.truncate_prompt_tokens
    if most is None:
        return prompt
    if most < -1 or most == 0:
        raise BadRequest(f"truncate_prompt_tokens is {most}; it must be at least 1, or -1 for the context")
    return prompt[-(context_of(service) - 1 if most == -1 else most) :]


def sampling_of(
    asked: Sampling, service: Service, prompt_tokens: int, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """`max_tokens` None: as many as the context holds. Raises BadRequest."""
    room = max(1, context_of(service) - prompt_tokens)
    sampling = sampling_params(asked, room if max_tokens is None else max_tokens, logprobs, service.defaults)
    if not asked.bad_words:
        return sampling
    return msgspec.structs.replace(sampling, bad_words_ids=_bad_words(asked.bad_words, service.text()))


def _bad_words(words: Sequence[str], text: Text) -> tuple[tuple[int, ...], ...]:
    """Each as it stands at the start of a text, and after a space."""
    spelled = (
        text.encode(lead + word.lstrip(), add_special_tokens=False) for word in words for lead in ("", " ")
    )
    return tuple(dict.fromkeys(tuple(ids) for ids in spelled))


async def checked(grammar: Grammar | None, service: Service) -> Grammar | None:
    """Raises BadRequest where it is no grammar. A thread does it: some take long."""
    if grammar is not None:
        service.text()
        await asyncio.to_thread(grammars.check, grammar)
    return grammar


def terms_of(asked: Sampling, service: Service, client: str, *, is_batch: bool = False) -> Terms:
    timeout_s = asked.timeout_s if asked.timeout_s is not None else service.timeout_s
    return Terms(client, is_batch, None if is_batch and asked.timeout_s is None else timeout_s)


def ask_all(
    service: Service,
    terms: Terms,
    prompts: Sequence[tuple[Sequence[int], SamplingParams]],
    grammar: Grammar | None,
) -> list[Answers]:
    """All of them, or none. Raises what Coordinator.ask does."""
    sequences = sum(sampling.n for _, sampling in prompts)
    if sequences > MOST_SEQUENCES:
        raise BadRequest(f"{sequences} answers are asked for at once; at most {MOST_SEQUENCES} are given")
    answers: list[Answers] = []
    try:
        for token_ids, sampling in prompts:
            answers.append(service.coordinator.ask(token_ids, sampling, terms, grammar=grammar))
    except BaseException:
        for one in answers:
            one.drop()
        raise
    return answers


class Begun(Protocol):
    """A request whose answers are on their way."""

    answers: Sequence[Answers]

    def events(self) -> Events:
        """To tell them as they come."""

    def whole(self, done: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """To tell them once they are all there."""


async def respond(request: Request, asked: Sampling, begun: Begun) -> Response:
    """To be called in the turn of the loop in which the answers were asked for."""
    extra = list(asked.model_extra or ())
    headers = {"x-ignored-fields": unused(extra)} if extra else {}  # what was sent and means nothing here
    if asked.stream:
        return EventStream(begun.answers, begun.events(), headers)
    done = await unless_gone(request, begun.answers, lambda: all_of(begun))
    return Response(msgspec.json.encode(begun.whole(done)), headers=headers, media_type="application/json")


async def all_of(begun: Begun) -> list[list[Completion]]:
    return await asyncio.gather(*(one.all() for one in begun.answers))
