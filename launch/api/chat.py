"""/v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.errors import BadRequest
from launch.api.asking import ask_all, checked, sampling_of, truncated
from launch.api.messages import conversation, template_options, tools_for_template
from launch.api.schemas import ChatRequest, NamedTool, TokenizeRequest
from launch.api.service import LONG_TEXT, Service
from launch.api.streaming import Events
from launch.api.structure import grammar_of, tool_grammar
from launch.api.told import chat_logprobs, new_id, usage, usage_of
from launch.api.tools import Call, CallFinder, Form, calls_in, form_of, new_call
from orchestrator.answer import Answers, Terms, Update
from orchestrator.request import Completion, FinishReason
from orchestrator.text import Text

_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Calling:
    """How this request's answers may call tools."""

    named: str | None = None  # the whole answer is this function's arguments
    required: bool = False  # the whole answer is a list of calls
    form: Form | None = None  # calls may stand in the text, in this form


class Chat:
    """A chat whose answers are on their way (satisfies asking.Begun)."""

    def __init__(
        self,
        asked: ChatRequest,
        service: Service,
        calling: Calling,
        prompt_tokens: int,
        n: int,
        answers: Sequence[Answers],
    ) -> None:
        self.answers = answers
        self._asked, self._text, self._calling = asked, service.text(), calling
        self._prompt_tokens, self._n = prompt_tokens, n
        self._head = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": asked.model or service.name,
        }

    def events(self) -> Events:
        return ChatEvents(self._head, self._asked, self._n, self._text, self._calling, self._prompt_tokens)

    def whole(self, done: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        (choices,) = done
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                _choice(i, one, self._asked, self._text, self._calling) for i, one in enumerate(choices)
            ],
            "usage": usage_of(done),
            "system_fingerprint": None,
        }


async def begin_chat(asked: ChatRequest, service: Service, terms: Terms) -> Chat:
    """Raises what is wrong with it, or why it is not taken."""
    service.check_model(asked.model)
    text = service.text()
    calling = _calling(asked, service, text)
    prompt = truncated(await encode_chat(asked, service), asked, service)
    max_tokens = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    sampling = sampling_of(asked, service, len(prompt), max_tokens, _logprobs(asked))
    if calling.form is not None and _is_special(text, calling.form):
        sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)
    grammar, forced = grammar_of(asked), tool_grammar(asked)
    if grammar is not None and forced is not None:
        raise BadRequest("response_format and a tool_choice that demands a call are given; give one of them")
    grammar = await checked(grammar or forced, service)
    answers = ask_all(service, terms, [(prompt, sampling)], grammar)
    return Chat(asked, service, calling, len(prompt), sampling.n, answers)


async def encode_chat(asked: ChatRequest | TokenizeRequest, service: Service) -> list[int]:
    """The conversation's tokens. Raises BadRequest."""
    if isinstance(asked, ChatRequest) and asked.chat_template is not None:
        raise BadRequest("chat_template is not taken from requests; the model's own is used")
    messages = conversation(asked.messages or [])
    hides_tools = isinstance(asked, ChatRequest) and asked.tool_choice == "none"
    tools = tools_for_template(asked.tools) if asked.tools and not hides_tools else None
    options = template_options(
        asked.chat_template_kwargs,
        generate=asked.add_generation_prompt,
        proceed=bool(asked.continue_final_message),
    )
    if isinstance(asked, ChatRequest) and asked.documents is not None:
        options = {**options, "documents": asked.documents}
    encode = service.text().encode_chat
    if sum(len(str(message.get("content", ""))) for message in messages) < LONG_TEXT:
        return encode(messages, tools, options)
    return await asyncio.to_thread(encode, messages, tools, options)


def _logprobs(asked: ChatRequest) -> int | None:
    if not asked.logprobs:
        if asked.top_logprobs:
            raise BadRequest("top_logprobs is given without logprobs; set logprobs to true")
        return None
    return asked.top_logprobs or 0


def _calling(asked: ChatRequest, service: Service, text: Text) -> Calling:
    choice = asked.tool_choice
    if isinstance(choice, NamedTool):
        return Calling(named=choice.function.name)
    if choice == "required":
        return Calling(required=True)
    if not asked.tools or choice == "none":
        return Calling()
    form = form_of(text.template, service.tool_parser)
    if form is None:
        raise BadRequest(
            f"{service.name}'s chat template knows of no tools; demand a call by tool_choice (required, or a function)"
        )
    return Calling(form=form)


def _is_special(text: Text, form: Form) -> bool:
    """Whether the sign of a call is a token that text leaves out."""
    ids = text.encode(form.start, add_special_tokens=False)
    return len(ids) == 1 and ids[0] in text.special_ids


def _choice(index: int, done: Completion, asked: ChatRequest, text: Text, calling: Calling) -> dict[str, Any]:
    content, calls = _parsed(done.text or "", calling)
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    if calls:
        message["tool_calls"] = [call.told() for call in calls]
    told = None
    if done.logprobs is not None:
        told = chat_logprobs(text, done.token_ids, done.logprobs, asked.top_logprobs or 0)
    is_call = bool(calls) and calling.named is None
    choice = {
        "index": index,
        "message": message,
        "logprobs": told,
        "finish_reason": _reason(done.finish_reason, is_call=is_call),
    }
    if asked.return_token_ids:
        choice["token_ids"] = done.token_ids
    return choice


def _parsed(text: str, calling: Calling) -> tuple[str, Sequence[Call]]:
    if calling.named is not None:
        return "", [new_call(calling.named, text)]
    if calling.required:
        calls = calls_in(text)
        return ("" if calls else text), calls
    if calling.form is None:
        return text, ()
    finder = CallFinder(calling.form)
    shown, found = finder.push(text)
    rest, more = finder.finish()
    return shown + rest, [*found, *more]


def _reason(reason: FinishReason, *, is_call: bool) -> str:
    return "tool_calls" if is_call and reason is FinishReason.STOP else str(reason)


class _Choice:
    """What is known of one answer of a stream."""

    def __init__(self, calling: Calling) -> None:
        self.is_begun = False
        self.tokens = 0
        self.finder = CallFinder(calling.form) if calling.form is not None else None
        self.held = ""  # where the whole answer is a list of calls
        self.calls = 0


class ChatEvents:
    """Chunks of a chat completion (satisfies streaming.Events)."""

    def __init__(
        self,
        head: dict[str, Any],
        asked: ChatRequest,
        n: int,
        text: Text,
        calling: Calling,
        prompt_tokens: int,
    ) -> None:
        self._head = {**head, "object": "chat.completion.chunk"}
        self._asked, self._text, self._calling = asked, text, calling
        self._prompt_tokens = prompt_tokens
        options = asked.stream_options
        self._tells_usage = bool(options and options.include_usage)
        self._tells_always = bool(options and options.include_usage and options.continuous_usage_stats)
        self._choices = [_Choice(calling) for _ in range(n)]
        self._is_plain = calling == Calling() and not asked.logprobs and not asked.return_token_ids
        self._is_plain = self._is_plain and not self._tells_always
        # A plain chunk is its text between two constants: a tenth of encoding it whole.
        opening = _encode(self._head)[:-1]
        self._openings = [
            b"data: " + opening + b',"choices":[{"index":%d,"delta":{"content":' % i for i in range(n)
        ]
        self._closing = b'},"logprobs":null,"finish_reason":null}]%s}\n\n' % (
            b',"usage":null' if self._tells_usage else b""
        )

    def update(self, asked: int, update: Update) -> bytes:
        choice = self._choices[update.choice]
        choice.tokens += 1
        if self._is_plain and choice.is_begun and update.finish_reason is None:
            if not update.text:
                return b""
            return self._openings[update.choice] + _encode(update.text) + self._closing
        return self._any(choice, update)

    def end(self) -> bytes:
        if not self._tells_usage:
            return b""
        told = usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices))
        return b"data: " + _encode({**self._head, "choices": [], "usage": told}) + b"\n\n"

    def _any(self, choice: _Choice, update: Update) -> bytes:
        chunks = b""
        if not choice.is_begun:
            choice.is_begun = True
            chunks += self._chunk(update, {"role": "assistant", "content": ""}, None)
        told = None
        if update.logprobs is not None:
            most = self._asked.top_logprobs or 0
            told = chat_logprobs(self._text, [update.token_id], [update.logprobs], most)
        deltas = self._deltas(choice, update)
        if not deltas and (told is not None or self._asked.return_token_ids):
            deltas = [{"content": ""}]
        for delta in deltas:
            chunks += self._chunk(update, delta, told)
            told = None
        if update.finish_reason is not None:
            reason = _reason(update.finish_reason, is_call=bool(choice.calls) and not self._calling.named)
            chunks += self._chunk(update, {}, None, reason)
        return chunks

    def _deltas(self, choice: _Choice, update: Update) -> list[dict[str, Any]]:
        is_last = update.finish_reason is not None
        if self._calling.named is not None:
            return self._arguments(choice, update.text)
        if self._calling.required:
            choice.held += update.text
            if not is_last:
                return []
            calls = calls_in(choice.held)
            return self._told(choice, "" if calls else choice.held, calls)
        if choice.finder is None:
            return self._told(choice, update.text, ())
        deltas = self._told(choice, *choice.finder.push(update.text))
        if is_last:
            deltas += self._told(choice, *choice.finder.finish())
        return deltas

    def _arguments(self, choice: _Choice, text: str) -> list[dict[str, Any]]:
        """The call's name once, then its arguments as they come."""
        if choice.calls:
            return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}] if text else []
        choice.calls = 1
        return [{"tool_calls": [new_call(self._calling.named or "", text).told(0)]}]

    def _told(self, choice: _Choice, text: str, calls: Sequence[Call]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        for call in calls:
            deltas.append({"tool_calls": [call.told(choice.calls)]})
            choice.calls += 1
        return deltas

    def _chunk(
        self,
        update: Update,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        reason: str | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": update.choice,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        if self._asked.return_token_ids and "content" in delta and "role" not in delta:
            choice["token_ids"] = [update.token_id]
        chunk = {**self._head, "choices": [choice]}
        if self._tells_usage:
            tokens = sum(choice.tokens for choice in self._choices)
            chunk["usage"] = usage(self._prompt_tokens, tokens) if self._tells_always else None
        return b"data: " + _encode(chunk) + b"\n\n"
