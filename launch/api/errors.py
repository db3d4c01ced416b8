"""Errors as OpenAI tells them: a status and one JSON object."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.errors import (
    AttemptsSpent,
    DeadlineExceeded,
    Draining,
    GangDied,
    NotFinite,
    Overloaded,
    ShardwiseError,
    UserError,
)

LOG = logging.getLogger("shardwise")
_LONGEST_VALUE = 80  # characters of a bad value that an error repeats
DRAIN_RETRY_S = 5


class ApiError(Exception):
    """What a client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, dict(headers or {})

    @property
    def body(self) -> bytes:
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": told})

    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, media_type="application/json")


def api_error(error: Exception) -> ApiError:
    """Any error, as a client is told of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        wait = {"retry-after": str(math.ceil(error.retry_after_s))}
        return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=wait)
    if isinstance(error, Draining):
        wait = {"retry-after": str(DRAIN_RETRY_S)}
        return ApiError(503, str(error), kind="server_error", code="draining", headers=wait)
    if isinstance(error, DeadlineExceeded):
        final = {"x-should-retry": "false"}  # the openai package heeds it
        return ApiError(504, str(error), kind="server_error", code="deadline_exceeded", headers=final)
    if isinstance(error, AttemptsSpent):
        final = {"x-should-retry": "false"}
        return ApiError(500, str(error), kind="server_error", code="attempts_spent", headers=final)
    if isinstance(error, NotFinite):
        final = {"x-should-retry": "false"}
        return ApiError(500, str(error), kind="server_error", code="not_finite", headers=final)
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, GangDied):
        return ApiError(503, str(error), kind="server_error", code="replica_died")
    if isinstance(error, ShardwiseError):
        return ApiError(500, str(error), kind="server_error", code="internal_error")
    LOG.error("a request failed", exc_info=error)
    return ApiError(
        500, "an error of ours; the server's log says more", kind="server_error", code="internal_error"
    )


def install(app: FastAPI) -> None:
    async def ours(_: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return of_validation(error.errors()).response()

    async def plain(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = "not_found" if error.status_code == 404 else None
        told = ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
        return told.response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(ShardwiseError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)
    app.add_exception_handler(Exception, ours)


def of_validation(errors: Any) -> ApiError:
    """The first thing that is wrong: where, what was given, the rule."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if not where:
        return ApiError(400, "the body must be a JSON object, sent with content-type: application/json")
    param = ".".join(where)
    given = "" if first["type"] == "missing" else f" is {_quoted(first.get('input'))}:"
    return ApiError(400, f"{param}{given} {first['msg'][:300].lower()}", param=where[0])


def _quoted(value: object) -> str:
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError):  # a lone surrogate, for one
        text = ascii(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
