"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from cluster.errors import BadRequest
from launch.api.asking import ask_all, checked, sampling_of, truncated
from launch.api.schemas import CompletionRequest
from launch.api.service import Service
from launch.api.streaming import Events
from launch.api.structure import grammar_of
from launch.api.told import completion_logprobs, new_id, usage, usage_of
from orchestrator.answer import Answers, Terms, Update
from orchestrator.request import Completion
from orchestrator.text import Text

_encode = msgspec.json.encode
DEFAULT_TOKENS = 16  # OpenAI's


class TextCompletion:
    """Completions on their way (satisfies asking.Begun)."""

    def __init__(
        self,
        asked: CompletionRequest,
        service: Service,
        prompt_tokens: int,
        echoes: Sequence[str],
        n: int,
        answers: Sequence[Answers],
    ) -> None:
        self.answers = answers
        self._asked, self._text, self._echoes = asked, service.coordinator.text, echoes
        self._prompt_tokens, self._n = prompt_tokens, n
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model or service.name,
        }

    def events(self) -> Events:
        return CompletionEvents(
            self._head, self._asked, self._text, self._prompt_tokens, self._echoes, self._n
        )

    def whole(self, done: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        choices = [
            _choice(one, self._asked, self._text, echo)
            for echo, prompt in zip(self._echoes, done, strict=True)
            for one in prompt
        ]
        for index, choice in enumerate(choices):
            choice["index"] = index
        return {**self._head, "choices": choices, "usage": usage_of(done)}


async def begin_completions(asked: CompletionRequest, service: Service, terms: Terms) -> TextCompletion:
    """Raises what is wrong with it, or why it is not taken."""
    service.check_model(asked.model)
    if asked.suffix:
        raise BadRequest(
            "suffix is not supported: no text is filled in before another; put all in the prompt"
        )
    max_tokens = DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
    prompts, echoes = await _prompts(asked, service)
    grammar = await checked(grammar_of(asked), service)
    sampled = [(p, sampling_of(asked, service, len(p), max_tokens, asked.logprobs)) for p in prompts]
    answers = ask_all(service, terms, sampled, grammar)
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    return TextCompletion(asked, service, prompt_tokens, echoes, sampled[0][1].n, answers)


async def _prompts(asked: CompletionRequest, service: Service) -> tuple[list[list[int]], list[str]]:
    """Each prompt's tokens, and what of it is echoed. Raises BadRequest."""
    given = asked.prompt
    texts: list[str] = []
    if isinstance(given, str):
        texts = [given]
    elif given and isinstance(given[0], str):
        texts = [one for one in given if isinstance(one, str)]
    special = asked.add_special_tokens is not False
    if texts:
        prompts = [await service.encode(text, add_special_tokens=special) for text in texts]
    elif given and isinstance(given[0], int):
        prompts = [[i for i in given if isinstance(i, int)]]
    else:
        prompts = [list(one) for one in given if isinstance(one, list)]
    if not prompts:
        raise BadRequest("prompt is an empty list; give a text, token ids, or a list of either")
    prompts = [truncated(prompt, asked, service) for prompt in prompts]
    if not asked.echo:
        return prompts, [""] * len(prompts)
    if asked.logprobs is not None:
        raise BadRequest("echo with logprobs is not supported: logprobs are told of generated tokens only")
    return prompts, texts or [service.text().decode(prompt) for prompt in prompts]


def _choice(done: Completion, asked: CompletionRequest, text: Text | None, echo: str) -> dict[str, Any]:
    told = None
    if done.logprobs is not None:
        told = completion_logprobs(text, done.token_ids, done.logprobs, asked.logprobs or 0, len(echo))
    choice: dict[str, Any] = {
        "index": 0,
        "text": echo + (done.text or ""),
        "logprobs": told,
        "finish_reason": str(done.finish_reason),
    }
    if asked.return_token_ids or done.text is None:  # without a tokenizer they are all there is
        choice["token_ids"] = done.token_ids
    return choice


class CompletionEvents:
    """Chunks of completions (satisfies streaming.Events)."""

    def __init__(
        self,
        head: dict[str, Any],
        asked: CompletionRequest,
        text: Text | None,
        prompt_tokens: int,
        echoes: Sequence[str],
        n: int,
    ) -> None:
        self._head, self._asked, self._text, self._n = head, asked, text, n
        self._prompt_tokens = prompt_tokens
        options = asked.stream_options
        self._tells_usage = bool(options and options.include_usage)
        self._tells_always = bool(options and options.include_usage and options.continuous_usage_stats)
        self._tells_ids = bool(asked.return_token_ids) or text is None
        self._tokens = 0
        self._lengths = [len(echo) for echo in echoes for _ in range(n)]  # characters given so far, by choice
        self._echoes = [echo for echo in echoes for _ in range(n)]
        self._is_plain = asked.logprobs is None and not self._tells_ids and not self._tells_always
        self._opening = b"data: " + _encode(head)[:-1]
        self._closing = b',"logprobs":null,"finish_reason":null}]%s}\n\n' % (
            b',"usage":null' if self._tells_usage else b""
        )

    def update(self, asked: int, update: Update) -> bytes:
        index = asked * self._n + update.choice
        self._tokens += 1
        echo, self._echoes[index] = self._echoes[index], ""
        new = echo + update.text
        if self._is_plain and update.finish_reason is None:
            if not new:
                return b""
            return self._opening + b',"choices":[{"index":%d,"text":' % index + _encode(new) + self._closing
        return self._any(index, update, new)

    def end(self) -> bytes:
        if not self._tells_usage:
            return b""
        told = usage(self._prompt_tokens, self._tokens)
        return b"data: " + _encode({**self._head, "choices": [], "usage": told}) + b"\n\n"

    def _any(self, index: int, update: Update, new: str) -> bytes:
        told = None
        if update.logprobs is not None:
            most, at = self._asked.logprobs or 0, self._lengths[index]
            told = completion_logprobs(self._text, [update.token_id], [update.logprobs], most, at)
        self._lengths[index] += len(update.text)
        reason = str(update.finish_reason) if update.finish_reason is not None else None
        choice: dict[str, Any] = {"index": index, "text": new, "logprobs": told, "finish_reason": reason}
        if self._tells_ids:
            choice["token_ids"] = [update.token_id]
        chunk = {**self._head, "choices": [choice]}
        if self._tells_usage:
            chunk["usage"] = usage(self._prompt_tokens, self._tokens) if self._tells_always else None
        return b"data: " + _encode(chunk) + b"\n\n"
