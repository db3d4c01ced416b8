"""Heads of requests that do not end, on a real socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from launch.api import connection
from launch.api.server import serve_http
from launch.progress import Progress
from tests.served_api import in_loop, served

GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n"


@asynccontextmanager
async def listening() -> AsyncIterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    async with served() as api:
        serving = asyncio.create_task(
            serve_http(
                api.service, listener, keys=[], progress=Progress(quiet=True), drain_s=1, takes_signals=False
            )
        )
        try:
            yield listener.getsockname()[1]
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


@in_loop
async def test_requests_follow_each_other_on_a_connection() -> None:
    async with listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(GET + b"\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.write(GET + b"x-large: " + b"a" * 70_000 + b"\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 431")
        writer.close()


async def flood(port: int) -> bytes:
    """Headers until the connection is closed. → what came back"""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET)
    try:
        for i in range(10_000):
            writer.write(b"x-%d: " % i + b"a" * 1000 + b"\r\n")
            await writer.drain()
        return await reader.read()
    except ConnectionError:
        return b""


@in_loop
async def test_headers_without_end_are_cut_off() -> None:
    async with listening() as port:
        assert await flood(port) == b""


def test_a_head_that_never_comes_costs_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.05)
    monkeypatch.setattr(connection, "IDLE_S", 0.05)

    @in_loop
    async def wait() -> None:
        async with listening() as port:
            for sent in (b"", GET):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(sent)
                assert await reader.read() == b""
                writer.close()

    wait()
