"""The application: what is asked where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import ASGIApp

from launch.api import errors
from launch.api.asking import respond, terms_of
from launch.api.batches import Batches, add_batches
from launch.api.chat import begin_chat, encode_chat
from launch.api.completions import begin_completions
from launch.api.direct import DirectRoute
from launch.api.errors import ApiError
from launch.api.files import FileStore, add_files
from launch.api.guard import Guard, HttpLimits, Keys
from launch.api.metrics import Snapshot
from launch.api.page import add_page
from launch.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from launch.api.service import Service
from launch.version import our_version
from orchestrator.request import SamplingParams, check_tokens

LOAD_TIMEOUT_S = 2.0  # for replicas to say what they do, when metrics are read
_NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}  # ours is at /metrics
_NO_SAMPLING = SamplingParams()
_RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"description": "An error, as OpenAI tells it"}}


def create_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    limits: HttpLimits = HttpLimits(),  # noqa: B008  frozen
    loopback_only: bool = False,
    files: FileStore | None = None,
    batches: Batches | None = None,
) -> ASGIApp:
    """`loopback_only`: without keys, requests must name the loopback interface as their host."""
    app = FastAPI(
        title="shardwise", version=our_version(), docs_url=None, redoc_url=None, telemetry=_NO_TELEMETRY
    )
    errors.install(app)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_probes(app, service)
    add_page(app, service)
    if files is not None and batches is not None:
        add_files(app, files)
        add_batches(app, batches)
    check_open = service.coordinator.check_open
    return Guard(app, check_open, keys=Keys(keys), limits=limits, loopback_only=loopback_only and not keys)


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _add_models(app: FastAPI, service: Service) -> None:
    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created_s,
            "owned_by": "shardwise",
            "root": service.name,
            "parent": None,
            "max_model_len": service.coordinator.limits.max_model_len,
        }

    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        terms = terms_of(asked, service, request.state.client)
        return await respond(request, asked, await begin_chat(asked, service, terms))

    async def completions(request: Request, asked: CompletionRequest) -> Response:
        terms = terms_of(asked, service, request.state.client)
        return await respond(request, asked, await begin_completions(asked, service, terms))

    for path, endpoint in (
        ("/v1/chat/completions", chat_completions),
        ("/v1/completions", completions),
    ):
        app.router.add_api_route(
            path, endpoint, methods=["POST"], responses=_RESPONSES, route_class_override=DirectRoute
        )

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [card(name) for name in service.names]})

    @app.get("/v1/models/{name:path}", responses=_RESPONSES)
    async def model(name: str) -> Response:
        service.check_model(name)
        return _json(card(name))


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=_RESPONSES)
    async def tokenize(asked: TokenizeRequest) -> Response:
        service.check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if asked.prompt is not None:
            tokens = await service.encode(asked.prompt, add_special_tokens=asked.add_special_tokens)
        else:
            tokens = await encode_chat(asked, service)
        told: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": service.coordinator.limits.max_model_len,
            "tokens": tokens,
        }
        if asked.return_token_strs:
            text = service.text()
            told["token_strs"] = [text.piece(token).decode(errors="replace") for token in tokens]
        return _json(told)

    @app.post("/detokenize", responses=_RESPONSES)
    async def detokenize(asked: DetokenizeRequest) -> Response:
        service.check_model(asked.model)
        text = service.text()
        check_tokens(asked.tokens, _NO_SAMPLING, vocab=service.coordinator.vocab, has_tokenizer=True)
        return _json({"prompt": text.decode(asked.tokens, skip_special_tokens=False)})


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/livez")
    async def livez() -> Response:
        return Response(status_code=200)

    async def ready() -> Response:
        """Whether a new request would be taken."""
        coordinator = service.coordinator
        if coordinator.is_alive and not coordinator.is_draining:
            return Response(status_code=200)
        why = "draining" if coordinator.is_draining else "no replica is alive"
        return _json({"status": why}, 503)

    app.get("/readyz")(ready)
    app.get("/health")(ready)

    @app.get("/metrics")
    async def metrics() -> Response:
        coordinator = service.coordinator
        loads = await coordinator.loads(LOAD_TIMEOUT_S)
        return Response(Snapshot(service.facts, coordinator, loads).text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def versions() -> Response:
        return _json({"version": our_version(), "name": "shardwise"})
