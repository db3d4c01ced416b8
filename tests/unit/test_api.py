"""OpenAI's API over a replica that answers by itself: what comes back, streamed or whole, and every refusal."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import msgspec
import openai
import pytest

from cluster.errors import GangDied
from launch.api.guard import HttpLimits
from orchestrator.admission import QueueLimits
from orchestrator.replica import Replica
from orchestrator.request import FinishReason, Request, Token, TokenLogprobs
from orchestrator.supervisor import RestartPolicy, Supervisor
from tests.byte_text import BYTES
from tests.fakes import FakeReplica, TalkingReplica
from tests.served_api import EOS, Served, chat_text, in_loop, says, served

SAID = "Hello, you."
KEY = "sk-0123456789abcdef"


def events(body: str) -> list[Any]:
    lines = [line for line in body.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@in_loop
async def test_a_chat() -> None:
    async with served() as api:
        whole = (await api.chat(model="bytes")).json()
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": SAID}
    assert (choice["finish_reason"], whole["object"], whole["model"]) == ("stop", "chat.completion", "bytes")
    prompt, output = len("user: hi\n"), len(SAID) + 1
    assert whole["usage"]["prompt_tokens"] == prompt
    assert whole["usage"]["completion_tokens"] == output
    assert whole["usage"]["total_tokens"] == prompt + output


@in_loop
async def test_a_streamed_chat_adds_up_to_the_whole_one() -> None:
    async with served() as api:
        response = await api.chat(stream=True, n=2, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    for index in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == SAID
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert len({c["id"] for c in (*chunks, last)}) == 1
    assert all(c["usage"] is None for c in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2 * (len(SAID) + 1))


@in_loop
async def test_completions_of_texts_and_token_ids() -> None:
    async with served() as api:
        for prompt in ("ab", ["ab"], BYTES.encode("ab"), [BYTES.encode("ab")]):
            done = (await api.post("/v1/completions", prompt=prompt, max_tokens=5, echo=True)).json()
            assert [c["text"] for c in done["choices"]] == ["abHello"]
            assert done["choices"][0]["finish_reason"] == "length"
        several = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 5}
        done = (await api.post("/v1/completions", **several)).json()
        assert [(c["index"], c["text"]) for c in done["choices"]] == [(i, "Hello") for i in range(4)]
        assert done["usage"]["prompt_tokens"] == 3  # each prompt once
        streamed = events((await api.post("/v1/completions", **several, stream=True, echo=True)).text)
    for index, echo in enumerate(["ab", "ab", "c", "c"]):
        mine = [c["choices"][0] for c in streamed if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == echo + "Hello"
        assert mine[-1]["finish_reason"] == "length"


@in_loop
async def test_stop_strings_max_tokens_and_seed_reach_the_request() -> None:
    replica = FakeReplica()
    async with served(replica) as api:
        asking = asyncio.create_task(
            api.chat(max_completion_tokens=7, max_tokens=9, seed=5, stop=["lo"], temperature=0.5, top_k=3)
        )
        request = await replica.submitted.get()
        sampling = request.sampling
        assert (sampling.max_tokens, sampling.seed, sampling.stop) == (7, 5, ("lo",))
        assert (sampling.temperature, sampling.top_k) == (0.5, 3)
        replica.say(request, *BYTES.encode("Hello"))
        done = (await asking).json()["choices"][0]
        assert await replica.aborted.get() == request.id
    assert (done["message"]["content"], done["finish_reason"]) == ("Hel", "stop")


@in_loop
async def test_defaults_are_openais_and_the_context_bounds_a_chat() -> None:
    replica = FakeReplica()
    async with served(replica) as api:
        chat = asyncio.create_task(api.chat())
        first = await replica.submitted.get()
        assert first.sampling.temperature == 1.0
        assert first.sampling.max_tokens == 512 - len(first.prompt_token_ids)
        text = asyncio.create_task(api.post("/v1/completions", prompt="a"))
        second = await replica.submitted.get()
        assert second.sampling.max_tokens == 16
        for request in (first, second):
            replica.say(request, EOS, end=FinishReason.STOP)
        assert [(await asked).status_code for asked in (chat, text)] == [200, 200]


class Telling(TalkingReplica):
    """Tells log-probabilities."""

    def __init__(self) -> None:
        super().__init__(says("a"))

    def _next(self, request: Request, left: list[int]) -> Token:
        token = super()._next(request, left)
        wanted = request.sampling.logprobs
        assert wanted is not None
        told = TokenLogprobs(-0.5, [token.token_id, 0][:wanted], [-0.5, float("-inf")][:wanted])
        return msgspec.structs.replace(token, logprobs=told)


@in_loop
async def test_logprobs() -> None:
    async with served(Telling()) as api:
        whole = (await api.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]
        first = whole["content"][0]
        assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.5, [97])
        assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -9999.0]  # JSON has no infinity
        streamed = events((await api.chat(logprobs=True, top_logprobs=2, stream=True)).text)
        told = [c["choices"][0]["logprobs"] for c in streamed if c["choices"][0]["logprobs"]]
        assert [entry for one in told for entry in one["content"]] == whole["content"]
        text = (await api.post("/v1/completions", prompt="x", logprobs=1)).json()["choices"][0]["logprobs"]
        assert text["tokens"][0] == "a"
        assert text["top_logprobs"][0] == {"a": -0.5}
        assert text["text_offset"] == [0, 1]


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/chat/completions", {"messages": []}, 400, "messages is empty"),
    ("/v1/chat/completions", {}, 400, "messages"),
    ("/v1/chat/completions", {"messages": "hi"}, 400, "messages is"),
    ("/v1/chat/completions", {"messages": [{"content": "x"}]}, 400, "messages.0.role"),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature is -1"),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "top_p": 2}, 400, "top_p is 2"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10**30}, 400, "max_tokens is"),
    ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n is 0"),
    ("/v1/completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs is 21"),
    ("/v1/completions", {"prompt": "a", "model": "gpt-4"}, 404, "'gpt-4' does not exist here"),
    ("/v1/completions", {"prompt": "a" * 600}, 400, "the prompt has 600 tokens; the context is 512"),
    ("/v1/completions", {"prompt": []}, 400, "prompt is an empty list"),
    ("/v1/completions", {"prompt": ""}, 400, "the prompt has no tokens"),
    ("/v1/completions", {"prompt": [99999]}, 400, "token id 99999 is outside the vocabulary"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "no token id"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"1": 500}}, 400, "from -100 to 100"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported"),
    ("/v1/completions", {"prompt": "a", "use_beam_search": True}, 400, "use_beam_search is not supported"),
    ("/v1/completions", {"prompt": "a", "guided_regex": "("}, 400, "the regex is refused"),
    ("/v1/completions", {"prompt": "a", "guided_json": {"type": "x"}}, 400, "the json_schema is refused"),
    ("/v1/completions", {"prompt": "a", "guided_regex": "a", "guided_json": {}}, 400, "give one of them"),
    ("/v1/completions", {"prompt": "a", "guided_regex": "a" * 9000}, 400, "at most 8192 are taken"),
    ("/v1/completions", {"prompt": "a", "timeout_s": -1}, 400, "timeout_s"),
    ("/v1/completions", {"prompt": ["a"] * 256, "n": 5}, 400, "at most 1024 are given"),
    ("/tokenize", {}, 400, "either prompt or messages"),
    ("/tokenize", {"prompt": "\ud800"}, 400, "half a character"),
    ("/detokenize", {"tokens": [-1]}, 400, "outside the vocabulary"),
]
CHATS: list[tuple[dict[str, Any], str]] = [
    ({"top_logprobs": 3}, "set logprobs to true"),
    ({"chat_template": "{{ 1 }}"}, "chat_template is not taken from requests"),
    ({"chat_template_kwargs": {"tokenize": False}}, "may not set 'tokenize'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema is missing"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"tool_choice": "required"}, "there are no tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "none of the tools"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "set add_generation_prompt to false"),
]


@in_loop
async def test_what_is_refused_says_why_in_openais_form() -> None:
    async with served() as api:
        for path, body, status, says_ in REFUSED:
            # Not httpx's json=: it refuses a lone surrogate itself.
            response = await api.http.post(
                path, content=json.dumps(body), headers={"content-type": "application/json"}
            )
            error = response.json()["error"]
            assert (response.status_code, says_ in error["message"]) == (status, True), (body, error)
            assert set(error) == {"message", "type", "param", "code"}
        for body, says_ in CHATS:
            response = await api.chat(**body)
            message = response.json()["error"]["message"]
            assert (response.status_code, says_ in message) == (400, True), (body, message)
        image = [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}}]
        response = await api.post("/v1/chat/completions", messages=[{"role": "user", "content": image}])
        assert "takes text alone" in response.json()["error"]["message"]


@in_loop
async def test_bodies_that_are_no_json() -> None:
    async with served() as api:
        deep = "[" * 100_000
        bodies = (b"{", b"", b"null", b"[1]", b"\xff\xfe", deep.encode(), b'{"prompt": ' + b"9" * 5000 + b"}")
        for content in bodies:
            for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
                sent = {"content": content, "headers": {"content-type": "application/json"}}
                response = await api.http.post(path, **sent)
                assert response.status_code == 400, (content[:20], response.text)
                assert response.json()["error"]["message"]
        assert (await api.http.get("/nowhere")).json()["error"]["code"] == "not_found"
        assert (await api.http.get("/v1/completions")).status_code == 405


@in_loop
async def test_keys() -> None:
    async with served(keys=[KEY, "sk-other-0123456789"]) as api:
        for sent in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": KEY},
            {"authorization": "Bearer"},
        ):
            for path in ("/v1/models", "/plan", "/tokenize"):
                refused = await api.http.get(path, headers=sent)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
        taken = await api.http.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
        assert [card["id"] for card in taken.json()["data"]] == ["bytes", "alias"]
        for open_path in ("/health", "/livez", "/readyz", "/metrics", "/version", "/"):
            assert (await api.http.get(open_path)).status_code == 200


@in_loop
async def test_without_keys_any_bearer_is_welcome_by_a_loopback_name_alone() -> None:
    async with served() as api:
        bearer = {"authorization": "Bearer whatever"}
        assert (await api.http.get("/v1/models", headers=bearer)).status_code == 200
        for host, status in (
            ("127.0.0.1:8000", 200),
            ("[::1]:80", 200),
            ("evil.example", 403),
            ("evil:80", 403),
        ):
            assert (await api.http.get("/v1/models", headers={"host": host})).status_code == status


@in_loop
async def test_request_ids_come_back() -> None:
    async with served() as api:
        own = {"x-request-id": "abc-123"}
        assert (await api.http.get("/nowhere", headers=own)).headers["x-request-id"] == "abc-123"
        made = {(await api.http.get("/version")).headers["x-request-id"] for _ in range(2)}
        assert len(made) == 2
        long = {"x-request-id": "x" * 500}
        assert len((await api.http.get("/version", headers=long)).headers["x-request-id"]) == 32


@in_loop
async def test_sizes_are_limited() -> None:
    async with served(limits=HttpLimits(body_bytes=1000, header_bytes=2000)) as api:
        told = await api.post("/v1/completions", prompt="a" * 1000)
        assert (told.status_code, told.json()["error"]["code"]) == (413, "body_too_large")

        async def chunks() -> Any:  # no content-length
            for _ in range(100):
                yield b"a" * 100

        headers = {"content-type": "application/json"}
        assert (await api.http.post("/v1/completions", content=chunks(), headers=headers)).status_code == 413
        assert (await api.http.get("/version", headers={"x-long": "a" * 3000})).status_code == 431


@in_loop
async def test_a_full_queue_says_when_to_come_back_at_once() -> None:
    replica = FakeReplica()
    async with served(replica, queue=QueueLimits(requests=2)) as api:
        room = 5  # that the replica holds: four sequences and one ahead
        asked = [asyncio.create_task(api.chat(max_tokens=1)) for _ in range(room + 2)]
        requests = [await replica.submitted.get() for _ in range(room)]
        begun_s = time.perf_counter()
        refused = await api.chat()
        assert time.perf_counter() - begun_s < 1.0  # it takes a millisecond; the rest is for a busy machine
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        for request in requests:
            replica.say(request, EOS, end=FinishReason.STOP)
        for _ in range(2):
            replica.say(await replica.submitted.get(), EOS, end=FinishReason.STOP)
        assert {(await one).status_code for one in asked} == {200}


@in_loop
async def test_draining() -> None:
    replica = FakeReplica()
    async with served(replica) as api:
        asked = asyncio.create_task(api.chat())
        request = await replica.submitted.get()
        assert (await api.http.get("/readyz")).status_code == 200
        api.coordinator.drain()
        assert (await api.http.get("/readyz")).json() == {"status": "draining"}
        assert (await api.http.get("/livez")).status_code == 200
        refused = await api.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        idle = asyncio.create_task(api.coordinator.idle())
        await asyncio.sleep(0)
        assert not idle.done()
        replica.say(request, EOS, end=FinishReason.STOP)
        assert (await asked).status_code == 200
        await idle


@in_loop
async def test_deadlines() -> None:
    replica = FakeReplica()
    async with served(replica) as api:
        late = await api.chat(timeout_s=0.01)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert await replica.aborted.get() == (await replica.submitted.get()).id
        streaming = asyncio.create_task(api.chat(timeout_s=0.05, stream=True))
        replica.say(await replica.submitted.get(), *BYTES.encode("a"))
        told = events((await streaming).text)
        assert told[-1]["error"]["code"] == "deadline_exceeded"  # amid the stream there is no status any more


@in_loop
async def test_a_death_is_told() -> None:
    replica = FakeReplica()
    async with served(replica) as api:
        streaming = asyncio.create_task(api.chat(stream=True))
        request = await replica.submitted.get()
        whole = asyncio.create_task(api.chat())
        await replica.submitted.get()
        replica.say(request, *BYTES.encode("a"))
        replica.die(GangDied("worker 0 died. Its last words: out of memory"))
        assert "out of memory" in events((await streaming).text)[-1]["error"]["message"]
        assert (await whole).status_code == 503
        assert (await api.http.get("/readyz")).status_code == 503
        assert (await api.chat()).status_code == 503


@in_loop
async def test_a_stream_outlives_its_replica_and_poison_is_told() -> None:
    lives = [FakeReplica() for _ in range(4)]
    starts = iter(lives[1:])

    async def restart(number: int) -> Replica:
        return next(starts)

    async with served(lives[0], supervisor=Supervisor(restart, RestartPolicy(first_s=0))) as api:
        streaming = asyncio.create_task(api.chat(stream=True, stream_options={"include_usage": True}))
        lives[0].say(await lives[0].submitted.get(), *BYTES.encode("Hel"))
        lives[0].die(GangDied("worker 0 died"))
        again = await lives[1].submitted.get()
        assert again.output_token_ids == BYTES.encode("Hel")
        lives[1].say(again, *BYTES.encode("lo"), EOS, end=FinishReason.STOP)
        *chunks, last = events((await streaming).text)
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello"
        assert last["usage"]["completion_tokens"] == len("Hello") + 1
        poison = asyncio.create_task(api.chat())
        for life in lives[1:3]:
            await life.submitted.get()
            life.die(GangDied("worker 0 died. Its last words: out of memory"))
        refused = await poison
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (500, "attempts_spent")
        assert refused.headers["x-should-retry"] == "false"
        assert "out of memory" in error["message"]
        while (await api.http.get("/readyz")).status_code != 200:
            await asyncio.sleep(0)
        told = await text_of_metrics(api)
        assert told['shardwise:replica_restarts_total{replica="0"}'] == 3
        assert told["shardwise:requests_replayed_total"] == 2
        assert told['shardwise:requests_failed_total{error="AttemptsSpent"}'] == 1


@in_loop
async def test_tokenize_and_back() -> None:
    async with served() as api:
        told = (await api.post("/tokenize", prompt="héllo", return_token_strs=True)).json()
        assert (told["count"], told["max_model_len"]) == (6, 512)
        assert told["token_strs"][0] == "h"
        back = await api.post("/detokenize", tokens=told["tokens"])
        assert back.json() == {"prompt": "héllo"}
        chat = (await api.post("/tokenize", messages=[{"role": "user", "content": "hi"}])).json()
        assert chat["count"] == len("user: hi\n")


@in_loop
async def test_fields_without_meaning_are_named() -> None:
    async with served() as api:
        response = await api.chat(temprature=0.2, store=True)
        assert response.status_code == 200
        assert response.headers["x-ignored-fields"] == "temprature"


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@in_loop
async def test_tool_calls_in_the_text() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    async with served(TalkingReplica(says(f"Let me see. {call}"))) as api:
        (choice,) = (await api.chat(tools=[TOOL])).json()["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Let me see. "
        (made,) = choice["message"]["tool_calls"]
        assert (made["type"], made["function"]["name"]) == ("function", "weather")
        assert json.loads(made["function"]["arguments"]) == {"city": "Paris"}
        streamed = [c["choices"][0] for c in events((await api.chat(tools=[TOOL], stream=True)).text)]
        assert "".join(c["delta"].get("content") or "" for c in streamed) == "Let me see. "
        (delta,) = [call for c in streamed for call in c["delta"].get("tool_calls", [])]
        assert (delta["index"], delta["function"]) == (0, made["function"])
        assert streamed[-1]["finish_reason"] == "tool_calls"
        plain = (await api.chat(tools=[TOOL], tool_choice="none")).json()["choices"][0]
        assert plain["message"]["content"] == f"Let me see. {call}"


@in_loop
async def test_demanded_calls_are_grammars() -> None:
    arguments = '{"city": "Paris"}'
    async with served(TalkingReplica(says(arguments))) as api:
        named = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
        (choice,) = (await api.chat(**named)).json()["choices"]
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": arguments}
        streamed = [c["choices"][0] for c in events((await api.chat(**named, stream=True)).text)]
        deltas = [call for c in streamed for call in c["delta"].get("tool_calls", [])]
        assert deltas[0]["function"]["name"] == "weather"
        assert "".join(delta["function"]["arguments"] for delta in deltas) == arguments
    replica = FakeReplica()
    async with served(replica, text=chat_text("no sign of them")) as api:
        asking = asyncio.create_task(api.chat(tools=[TOOL], tool_choice="required"))
        request = await replica.submitted.get()
        assert request.grammar is not None
        assert '"enum": ["weather"]' in request.grammar.source
        told = [{"name": "weather", "parameters": {"city": "Paris"}}]
        replica.say(request, *BYTES.encode(json.dumps(told)), EOS, end=FinishReason.STOP)
        message = (await asking).json()["choices"][0]["message"]
        assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Paris"}
        refused = await api.chat(tools=[TOOL])
        assert "knows of no tools" in refused.json()["error"]["message"]


@in_loop
async def test_forms_become_grammars() -> None:
    asked: list[tuple[dict[str, Any], str, str]] = [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}},
            "json_schema",
            '{"type": "integer"}',
        ),
        ({"response_format": {"type": "regex", "regex": "a+"}}, "regex", "a+"),
        ({"guided_choice": ['a"', "b"]}, "ebnf", 'root ::= "a\\"" | "b"'),
        ({"structured_outputs": {"regex": "b+"}}, "regex", "b+"),
    ]
    replica = FakeReplica()
    async with served(replica) as api:
        for body, kind, source in asked:
            asking = asyncio.create_task(api.chat(**body))
            request = await replica.submitted.get()
            assert request.grammar is not None
            assert (str(request.grammar.kind), request.grammar.source) == (kind, source)
            replica.say(request, EOS, end=FinishReason.STOP)
            assert (await asking).status_code == 200


async def text_of_metrics(api: Served) -> dict[str, float]:
    lines = (await api.http.get("/metrics")).text.splitlines()
    return {name: float(v) for name, v in (ln.rsplit(" ", 1) for ln in lines if not ln.startswith("#"))}


@in_loop
async def test_metrics_have_vllms_names() -> None:
    async with served() as api:
        for _ in range(2):
            await api.chat()
        await api.post("/v1/completions", prompt="")
        told = await text_of_metrics(api)
    of = 'model_name="bytes"'
    tokens = len(SAID) + 1
    assert told[f"vllm:prompt_tokens_total{{{of}}}"] == 2 * len("user: hi\n")
    assert told[f"vllm:generation_tokens_total{{{of}}}"] == 2 * tokens
    assert told[f'vllm:request_success_total{{finished_reason="stop",{of}}}'] == 2
    assert told[f"vllm:time_to_first_token_seconds_count{{{of}}}"] == 2
    assert told[f'vllm:time_to_first_token_seconds_bucket{{le="+Inf",{of}}}'] == 2
    assert told[f"vllm:inter_token_latency_seconds_count{{{of}}}"] == 2 * (tokens - 1)
    assert told[f"vllm:num_requests_running{{{of}}}"] == told[f"vllm:num_requests_waiting{{{of}}}"] == 0
    assert told[f"vllm:external_prefix_cache_queries_total{{{of}}}"] == 96
    assert told[f"vllm:external_prefix_cache_hits_total{{{of}}}"] == 48
    assert told[f"shardwise:host_kv_blocks_out_total{{{of}}}"] == 5
    assert told[f"shardwise:host_kv_blocks_in_total{{{of}}}"] == 3
    assert told['shardwise:requests_refused_total{error="BadRequest"}'] == 1
    assert told['shardwise:layout_info{devices="1",layout="tp1",model_name="bytes"}'] == 1
    assert told['shardwise:link_bytes_per_second{first="0",kind="pcie",second="1"}'] == 1e10


@in_loop
async def test_the_page_is_there_and_may_load_nothing_foreign() -> None:
    async with served() as api:
        page = await api.http.get("/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for name in ("page.css", "page.js"):
            assert name in page.text
            assert (await api.http.get(f"/{name}")).status_code == 200
        assert (await api.http.get("/plan")).json()["reasons"] == ["It is the only one."]


@in_loop
async def test_the_openai_package() -> None:
    async with served() as api:
        client = openai.AsyncOpenAI(
            api_key="any", base_url="http://localhost/v1", http_client=api.http, max_retries=0
        )
        messages: Any = [{"role": "user", "content": "hi"}]
        done = await client.chat.completions.create(model="bytes", messages=messages)
        assert done.choices[0].message.content == SAID
        stream = await client.chat.completions.create(model="bytes", messages=messages, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == SAID
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="gpt-4", messages=messages)
        with pytest.raises(openai.BadRequestError, match="temperature is 3"):
            await client.chat.completions.create(model="bytes", messages=messages, temperature=3e9)
        assert [model.id async for model in client.models.list()] == ["bytes", "alias"]
