"""A load on any OpenAI endpoint: streamed requests, so many at once or as they come by chance; each event is timed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import aiohttp
import msgspec

from cluster.errors import ShardwiseError, UserError

CONNECT_S = 5.0
_DONE = b"[DONE]"
_SAID_OF_ERRORS = 200  # characters


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    error: Any = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids; or text, for endpoints that take no ids."""

    token_ids: Sequence[int] | None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds on the load's own clock. With an `error`, the rest says nothing."""

    start_s: float
    first_s: float = 0.0  # from the start to the first event with a choice
    gaps_s: tuple[float, ...] = ()  # between such events
    latency_s: float = 0.0  # from the start to the last of them
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


class Endpoint(Protocol):
    async def ask(self, prompt: Prompt, output_tokens: int) -> Answer: ...


@dataclass(frozen=True, slots=True)
class OpenAI:
    """`base` ends in /v1."""

    http: aiohttp.ClientSession
    base: str
    model: str
    chat: bool = False
    ignore_eos: bool = True  # not OpenAI's own, but of vLLM, SGLang, llama.cpp and us

    async def ask(self, prompt: Prompt, output_tokens: int) -> Answer:
        start_s = time.perf_counter()
        try:
            return await self._ask(prompt, output_tokens, start_s)
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            return Answer(start_s, error=str(error) or type(error).__name__)

    async def _ask(self, prompt: Prompt, output_tokens: int, start_s: float) -> Answer:
        path = "chat/completions" if self.chat else "completions"
        times: list[float] = []
        used: _Usage | None = None
        async with self.http.post(f"{self.base}/{path}", json=self.body(prompt, output_tokens)) as response:
            if response.status != 200:
                said = " ".join((await response.text())[:_SAID_OF_ERRORS].split())
                return Answer(start_s, error=f"status {response.status}: {said}")
            async for data in _data_of(response.content):
                event = msgspec.json.decode(data, type=_Event)
                if event.error is not None:
                    return Answer(start_s, error=str(event.error)[:_SAID_OF_ERRORS])
                if event.choices:
                    times.append(time.perf_counter())
                used = event.usage or used
        if not times:
            return Answer(start_s, error="the answer had no tokens")
        gaps = tuple(b - a for a, b in pairwise(times))
        return Answer(
            start_s=start_s,
            first_s=times[0] - start_s,
            gaps_s=gaps,
            latency_s=times[-1] - start_s,
            prompt_tokens=used.prompt_tokens if used else len(prompt.token_ids or ()),
            output_tokens=used.completion_tokens if used and used.completion_tokens else len(times),
        )

    def body(self, prompt: Prompt, output_tokens: int) -> Mapping[str, object]:
        body: dict[str, object] = {
            "model": self.model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.chat:
            return body | {"messages": [{"role": "user", "content": prompt.text}]}
        return body | {"prompt": prompt.text if prompt.token_ids is None else list(prompt.token_ids)}


async def _data_of(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """What server-sent events carry."""
    held = b""
    async for piece in stream.iter_any():
        held += piece
        *whole, held = held.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data:") and (data := line[5:].strip()) != _DONE:
                    yield data


def base_of(url: str) -> str:
    """`http://host:8000` and `http://host:8000/v1/` → the same. Raises UserError."""
    base = url.rstrip("/")
    if not base.startswith(("http://", "https://")) or not base.partition("://")[2]:
        raise UserError(f"{url} is no address of an endpoint, such as http://127.0.0.1:8000")
    return base if base.endswith("/v1") else f"{base}/v1"


@asynccontextmanager
async def connected(
    url: str, *, model: str | None = None, key: str | None = None, chat: bool = False, ignore_eos: bool = True
) -> AsyncIterator[OpenAI]:
    """The endpoint, once it has told which models it has. Raises UserError where it does not answer."""
    base = base_of(url)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers=headers, timeout=timeout, read_bufsize=2**20
    ) as http:
        served = await _models(http, base)
        if model is not None and served and model not in served:
            raise UserError(f"{url} serves {', '.join(served)}, not {model}; give one of them as --model")
        if model is None and not served:
            raise UserError(f"{url} names no model; give its name as --model")
        yield OpenAI(http, base, model or served[0], chat, ignore_eos)


async def _models(http: aiohttp.ClientSession, base: str) -> list[str]:
    try:
        async with http.get(f"{base}/models", timeout=aiohttp.ClientTimeout(CONNECT_S)) as response:
            if response.status in (401, 403):
                raise UserError(
                    f"{base} refuses the key (status {response.status}); give one in --api-key-file"
                )
            found = await response.json(content_type=None) if response.status == 200 else {}
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        said = str(error) or type(error).__name__
        raise UserError(f"{base} does not answer ({said}); start it, or give another address") from None
    listed = found.get("data") if isinstance(found, dict) else None
    return [str(one["id"]) for one in listed or [] if isinstance(one, dict) and "id" in one]


# --- prompts ------------------------------------------------------------------------------------------------


def random_prompts(count: int, tokens: int, *, vocab: int, seed: str, as_text: bool) -> list[Prompt]:
    """Of `tokens` each. As text by words of one letter, about a token each with most tokenizers."""
    rnd = random.Random(f"shardwise {seed}")
    if as_text:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return [Prompt(None, " ".join(rnd.choice(letters) for _ in range(tokens))) for _ in range(count)]
    return [Prompt([rnd.randrange(vocab) for _ in range(tokens)]) for _ in range(count)]


# --- loads --------------------------------------------------------------------------------------------------

Told = Callable[[Answer], None]


async def closed_loop(
    endpoint: Endpoint, prompts: Sequence[Prompt], output_tokens: int, at_once: int, told: Told
) -> list[Answer]:
    """So many in flight all the time, each that ends replaced at once."""
    left = iter(prompts)
    done: list[Answer] = []

    async def stream() -> None:
        for prompt in left:
            done.append(await endpoint.ask(prompt, output_tokens))
            told(done[-1])

    await _all(stream() for _ in range(min(at_once, len(prompts))))
    return done


async def open_loop(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    output_tokens: int,
    waits_s: Sequence[float],
    told: Told,
    at_once: int | None = None,
) -> list[Answer]:
    """A request after each wait, whether or not those before it are answered; `at_once` holds the rest back."""
    room = asyncio.Semaphore(at_once) if at_once else None
    done: list[Answer] = []

    async def one(prompt: Prompt) -> None:
        if room is not None:
            async with room:
                done.append(await endpoint.ask(prompt, output_tokens))
        else:
            done.append(await endpoint.ask(prompt, output_tokens))
        told(done[-1])

    async with asyncio.TaskGroup() as tasks:
        at_s = time.perf_counter()
        for prompt, wait_s in zip(prompts, waits_s, strict=True):
            at_s += wait_s
            await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
            tasks.create_task(one(prompt))
    return done


def arrivals(count: int, per_s: float, burstiness: float, seed: str) -> list[float]:
    """Seconds before each request, gamma-distributed: `burstiness` 1 is a Poisson process, less comes in bursts."""
    rnd = random.Random(f"shardwise {seed}")
    return [0.0, *(rnd.gammavariate(burstiness, 1 / (per_s * burstiness)) for _ in range(count - 1))]


async def _all(streams: Iterable[Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for stream in streams:
            tasks.create_task(stream)


def first_error(answers: Sequence[Answer]) -> str | None:
    return next((a.error for a in answers if a.error is not None), None)


def check_any(answers: Sequence[Answer], url: str) -> None:
    """Raises ShardwiseError where every request failed."""
    if answers and all(a.error is not None for a in answers):
        raise ShardwiseError(f"{url}: all {len(answers)} requests failed: {first_error(answers)}")
