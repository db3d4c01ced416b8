"""A route for what is asked most: its body goes to pydantic as it came.

A request of 16 tokens costs the server 1.1 ms of a core, 1.35 by FastAPI's own way (`python -m tests.bench.http_bench
--only rate`, two cores of a shared virtual machine, 2026-11-22).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, get_type_hints

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from launch.api.errors import ApiError, of_validation
from launch.api.streaming import CLIENT_LEFT

_ONLY_JSON = "the body must be a JSON object, sent with content-type: application/json"


class DirectRoute(APIRoute):
    """Of endpoints that take a request and its parsed body, `asked`, and nothing else; described as any other."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        model: type[BaseModel] = get_type_hints(self.endpoint)["asked"]
        endpoint: Callable[[Request, Any], Awaitable[Response]] = self.endpoint

        async def handle(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":  # which a foreign page cannot send unasked
                raise ApiError(400, _ONLY_JSON)
            try:
                asked = model.model_validate_json(await request.body())
            except ValidationError as error:
                raise of_validation(error.errors()) from None
            except ClientDisconnect:
                raise ApiError(CLIENT_LEFT, "the client left") from None
            return await endpoint(request, asked)

        return handle
