"""Anything may be sent: the answer is a result or a refusal in OpenAI's form, never an error of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from launch.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.fakes import TalkingReplica
from tests.served_api import says, served

REQUESTS: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
NUMBERS = st.one_of(
    st.integers(-2, 40), st.integers(), st.floats(), st.sampled_from([2**63, -(2**63), 1e308, 1e-320])
)
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "\ud800", "auto", "required", "none", "text", "user", "a" * 600, "[", "(a|b)*", "\0"]
    ),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": WORDS, "content": st.one_of(WORDS, VALUES)}, optional={"tool_calls": VALUES}
    ),
    max_size=3,
)
FUNCTION = st.fixed_dictionaries({"name": WORDS}, optional={"parameters": VALUES, "arguments": VALUES})
TOOLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}), max_size=2)
SCHEMA = st.one_of(
    VALUES, st.fixed_dictionaries({"type": st.sampled_from(["object", "array", "string", "integer", "x"])})
)
FORMS = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"schema": SCHEMA})}
    ),
    st.fixed_dictionaries({"type": st.just("regex"), "regex": WORDS}),
    VALUES,
)
LIKELY: Mapping[str, st.SearchStrategy[Any]] = {  # values that come further than the first check
    "model": st.just("bytes"),
    "messages": MESSAGES,
    "prompt": st.one_of(WORDS, st.lists(st.integers(-1, 300), max_size=4), st.lists(WORDS, max_size=3)),
    "tokens": st.lists(st.integers(-1, 300), max_size=4),
    "tools": TOOLS,
    "response_format": FORMS,
    "guided_json": SCHEMA,
    "stream": st.booleans(),
    "max_tokens": st.integers(-1, 30),
    "stop": st.lists(WORDS, max_size=3),
    "logit_bias": st.dictionaries(st.integers(-1, 300).map(str), NUMBERS, max_size=3),
}


def names_of(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def body_of(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    names = names_of(model)
    fields = {name: LIKELY.get(name, VALUES) | VALUES for name in names}
    required = {name: LIKELY[name] for name in ("messages", "prompt", "tokens") if name in names}
    some = st.sets(st.sampled_from(names), max_size=5)
    chosen = some.flatmap(lambda kept: st.fixed_dictionaries({name: fields[name] for name in sorted(kept)}))
    return st.builds(lambda base, more: {**base, **more}, st.fixed_dictionaries(required), chosen)


ASKED = st.sampled_from(sorted(REQUESTS)).flatmap(
    lambda path: st.tuples(st.just(path), body_of(REQUESTS[path]))
)


async def answers(asked: list[tuple[str, dict[str, Any]]]) -> None:
    async with served(TalkingReplica(says("Hello"))) as api:
        for path, body in asked:
            content = json.dumps(body)
            sent = {"content-type": "application/json"}
            response = await asyncio.wait_for(api.http.post(path, content=content, headers=sent), 30)
            if response.status_code != 200:
                assert 400 <= response.status_code < 500, (path, body, response.text)
                assert response.json()["error"]["message"], (path, body)
            elif response.headers["content-type"].startswith("text/event-stream"):
                assert response.text.endswith("data: [DONE]\n\n")
                assert '"error"' not in response.text, (path, body, response.text)
            else:
                response.json()
        assert api.coordinator.open_requests == 0


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ASKED, min_size=5, max_size=5))
def test_anything_may_be_sent(asked: list[tuple[str, dict[str, Any]]]) -> None:
    asyncio.run(answers(asked))


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["application/json", "text/plain", ""]))
def test_any_bytes_may_be_sent(content: bytes, kind: str) -> None:
    async def send() -> None:
        async with served() as api:
            for path in REQUESTS:
                response = await api.http.post(path, content=content, headers={"content-type": kind})
                assert 400 <= response.status_code < 500, (path, content, response.text)
                assert response.json()["error"]["message"]

    asyncio.run(send())
