"""A page without a build step: chat, the plan with its reasons, live throughput. Its files lie beside this one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.responses import Response

from launch.api.service import Service

_FILES: Mapping[str, tuple[str, str]] = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {  # nothing but its own files and our API
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def add_page(app: FastAPI, service: Service) -> None:
    for path, (name, kind) in _FILES.items():
        _add_file(app, path, Path(__file__).with_name(name).read_bytes(), kind)

    @app.get("/plan")
    async def plan() -> Response:
        """What is served, and why."""
        return _json({"model": service.name, **service.plan})

    @app.get("/stats", include_in_schema=False)
    async def stats() -> Response:
        coordinator = service.coordinator
        waiting = coordinator.waiting_requests
        return _json(
            {
                "time_s": time.monotonic(),
                "generated_tokens": coordinator.meter.generated_tokens,
                "running": coordinator.open_requests - waiting,
                "waiting": waiting,
            }
        )


def _add_file(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
