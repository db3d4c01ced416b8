"""The HTTP application over a replica that answers by itself: all of the server but its socket and its model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import httpx2
from tokenizers import Tokenizer

from launch.api.app import create_app
from launch.api.guard import HttpLimits
from launch.api.metrics import Facts, LinkFact
from launch.api.service import Service
from orchestrator.admission import QueueLimits
from orchestrator.coordinator import Coordinator
from orchestrator.replica import Replica
from orchestrator.request import Request
from orchestrator.scheduler import SchedulerConfig
from orchestrator.supervisor import Supervisor
from orchestrator.text import Message, Text
from tests.byte_text import BYTES
from tests.fakes import TalkingReplica

P = ParamSpec("P")
LIMITS = SchedulerConfig(num_blocks=64, block_size=16, max_model_len=512, max_num_seqs=4)
EOS, VOCAB = 256, 257
PATIENCE_S = 20.0
FACTS = Facts(
    "bytes", "tp1", 1, {"time_to_first_token_seconds": 0.5}, [LinkFact("0", "1", "pcie", 1e-5, 1e10)]
)
PLAN: Mapping[str, object] = {"layout": "tp1", "plan": None, "reasons": ["It is the only one."]}
TEMPLATE = "tools <tool_call>"  # what is looked for in one


def render(messages: Sequence[Message], tools: Sequence[Message] | None, options: Mapping[str, Any]) -> str:
    return "".join(f"{m['role']}: {m.get('content', '')}\n" for m in messages) + ("tools\n" if tools else "")


def chat_text(template: str = TEMPLATE) -> Text:
    """A byte a token, and a template."""
    return Text("bytes", Tokenizer.from_str(BYTES._tokenizer.to_str()), render, template)


def says(text: str) -> Callable[[Request], list[int]]:
    """The same answer to everybody."""
    return lambda _: [*BYTES.encode(text), EOS]


@dataclass
class Served:
    coordinator: Coordinator
    http: httpx2.AsyncClient
    service: Service

    async def post(self, path: str, **body: Any) -> httpx2.Response:
        return await self.http.post(path, json=body)

    async def chat(self, content: str = "hi", **body: Any) -> httpx2.Response:
        return await self.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": content}], **body
        )


@asynccontextmanager
async def served(
    replica: Replica | None = None,
    *,
    text: Text | None = None,
    queue: QueueLimits | None = None,
    keys: Sequence[str] = (),
    limits: HttpLimits | None = None,
    loopback_only: bool = True,
    scheduler: SchedulerConfig = LIMITS,
    supervisor: Supervisor | None = None,
    stored: Callable[[Service], Mapping[str, Any]] = lambda _: {},
    **changes: Any,
) -> AsyncIterator[Served]:
    replica = replica if replica is not None else TalkingReplica(says("Hello, you."))
    coordinator = Coordinator(
        [replica],
        scheduler,
        vocab=VOCAB,
        eos_ids=(EOS,),
        text=text if text is not None else chat_text(),
        queue=queue or QueueLimits(),
        supervisor=supervisor,
    )
    async with coordinator:
        service = Service(coordinator, ["bytes", "alias"], PLAN, FACTS, **changes)
        app = create_app(
            service,
            keys=keys,
            limits=limits or HttpLimits(),
            loopback_only=loopback_only,
            **stored(service),
        )
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            yield Served(coordinator, http, service)


def in_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), PATIENCE_S))

    return run
