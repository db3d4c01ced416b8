"""/v1/files and /v1/batches over a replica that answers by itself, across restarts of the server."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from launch.api import server
from launch.api.batches import Batches
from launch.api.files import FileStore
from launch.progress import Progress
from tests.fakes import FakeReplica, TalkingReplica
from tests.served_api import Served, in_loop, says, served

KEYS = ("sk-0123456789abcdef", "sk-fedcba9876543210")
CONDITIONS = {"model": "bytes"}


def line(custom_id: str, url: str = "/v1/chat/completions", **body: Any) -> str:
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


@asynccontextmanager
async def serving(
    root: Path, replica: Any = None, conditions: Mapping[str, Any] = CONDITIONS, **changes: Any
) -> AsyncIterator[tuple[Served, Batches]]:
    """A server over what lies in `root`."""
    made: list[Batches] = []

    def stored(service: Any) -> dict[str, Any]:
        files = FileStore(root / "files")
        made.append(Batches(root / "batches", files, service, conditions))
        return {"files": files, "batches": made[0]}

    (root / "files").mkdir(exist_ok=True)
    async with served(replica or TalkingReplica(says("Hello")), stored=stored, **changes) as api:
        made[0].resume()
        try:
            yield api, made[0]
        finally:
            api.coordinator.drain()
            await made[0].stop()


def client_of(api: Served, key: str = "any") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key=key, base_url="http://localhost/v1", http_client=api.http, max_retries=0
    )


async def submit(client: openai.AsyncOpenAI, *lines: str) -> str:
    content = "\n".join(lines).encode()
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    assert file.bytes == len(content)
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    return batch.id


async def wait(client: openai.AsyncOpenAI, batch_id: str) -> Any:
    while (batch := await client.batches.retrieve(batch_id)).status in (
        "validating",
        "in_progress",
        "finalizing",
        "cancelling",
    ):
        await asyncio.sleep(0.005)
    return batch


async def read(client: openai.AsyncOpenAI, file_id: str | None) -> list[Any]:
    assert file_id is not None
    return [json.loads(line) for line in (await client.files.content(file_id)).text.splitlines()]


@in_loop
async def test_a_batch_by_the_openai_package(tmp_path: Path) -> None:
    async with serving(tmp_path) as (api, _):
        client = client_of(api)
        good = [line(f"r{i}", max_tokens=3) for i in range(20)]
        bad = [
            line("hot", temperature=-1),
            line("elsewhere", url="/v1/completions"),
            line("gpt", model="gpt-4"),
            line("r3"),
            '{"custom_id": "naked"}',
            line("form", messages="hi"),
        ]
        batch = await wait(client, await submit(client, *good, *bad))
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (26, 20, 6)
        output = await read(client, batch.output_file_id)
        assert sorted(one["custom_id"] for one in output) == sorted(f"r{i}" for i in range(20))
        for one in output:
            assert one["response"]["body"]["choices"][0]["message"]["content"] == "Hel"
            assert one["error"] is None
        errors = {one["custom_id"]: one for one in await read(client, batch.error_file_id)}
        assert set(errors) == {"hot", "elsewhere", "gpt", "r3", None, "form"}
        assert "temperature is -1" in errors["hot"]["error"]["message"]
        assert errors["gpt"]["response"]["status_code"] == 404
        assert "this batch is POST /v1/chat/completions" in errors["elsewhere"]["error"]["message"]
        assert "messages is" in errors["form"]["error"]["message"]
        assert [one.id async for one in client.batches.list()] == [batch.id]


@in_loop
async def test_a_batch_goes_on_where_the_last_server_ended(tmp_path: Path) -> None:
    replica = FakeReplica()
    async with serving(tmp_path, replica) as (api, _):
        batch_id = await submit(client_of(api), *(line(f"r{i}", max_tokens=1) for i in range(30)))
        for _ in range(7):
            request = await replica.submitted.get()
            assert request.sampling.max_tokens == 1
            replica.say(request, 65, end=None)
            replica.say(request, 256, end="stop")  # type: ignore[arg-type]
        client = client_of(api)
        while (await client.batches.retrieve(batch_id)).request_counts.completed < 7:  # type: ignore[union-attr]
            await asyncio.sleep(0.005)
        replica.die(ConnectionError("killed"))
    async with serving(tmp_path, conditions={"model": "other"}) as (api, _):
        failed = await wait(client_of(api), batch_id)
        assert failed.status == "failed"
        assert "begun with model 'bytes', and now it is 'other'" in failed.errors.data[0].message
    talking = TalkingReplica(says("Hello"))
    async with serving(tmp_path, talking) as (api, _):
        client = client_of(api)
        batch = await wait(client, batch_id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 30)
        output = await read(client, batch.output_file_id)
        assert sorted(one["custom_id"] for one in output) == sorted(f"r{i}" for i in range(30))
        assert api.coordinator.meter.finished.total() == 23


@in_loop
async def test_cancelling(tmp_path: Path) -> None:
    replica = FakeReplica()
    async with serving(tmp_path, replica) as (api, _):
        client = client_of(api)
        batch_id = await submit(client, *(line(f"r{i}") for i in range(30)))
        first = await replica.submitted.get()
        replica.say(first, 256, end="stop")  # type: ignore[arg-type]
        while not (await client.batches.retrieve(batch_id)).request_counts.completed:  # type: ignore[union-attr]
            await asyncio.sleep(0.005)
        assert (await client.batches.cancel(batch_id)).status in ("cancelling", "cancelled")
        batch = await wait(client, batch_id)
        assert (batch.status, batch.request_counts.completed) == ("cancelled", 1)
        assert [one["custom_id"] for one in await read(client, batch.output_file_id)] == ["r0"]
        assert api.coordinator.open_requests == 0


@in_loop
async def test_files_are_their_owners(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=KEYS) as (api, _):
        mine, other = (client_of(api, key) for key in KEYS)
        batch = await wait(mine, await submit(mine, line("a")))
        assert [one.id async for one in other.files.list()] == []
        assert [one.id async for one in other.batches.list()] == []
        output = batch.output_file_id
        for method, path in (
            ("GET", f"/v1/files/{output}"),
            ("GET", f"/v1/files/{output}/content"),
            ("DELETE", f"/v1/files/{output}"),
            ("GET", f"/v1/batches/{batch.id}"),
            ("POST", f"/v1/batches/{batch.id}/cancel"),
            ("GET", "/v1/files/..%2f..%2fetc%2fpasswd/content"),
            ("GET", "/v1/batches/..%2f..%2fetc"),
        ):
            bearer = {"authorization": f"Bearer {KEYS[1]}"}
            assert (await api.http.request(method, path, headers=bearer)).status_code == 404, path
        assert (await mine.files.delete(batch.output_file_id)).deleted


@in_loop
async def test_batches_that_cannot_be(tmp_path: Path) -> None:
    async with serving(tmp_path) as (api, _):
        client = client_of(api)
        file = await client.files.create(file=("in.jsonl", b"\n\n"), purpose="batch")
        asked = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        for change, status in (
            ({"input_file_id": "nope"}, 404),
            ({"endpoint": "/v1/embeddings"}, 400),
            ({"completion_window": "soon"}, 400),
        ):
            assert (await api.post("/v1/batches", **{**asked, **change})).status_code == status
        empty = await wait(client, (await api.post("/v1/batches", **asked)).json()["id"])
        assert (empty.status, "holds no requests" in empty.errors.data[0].message) == ("failed", True)
        assert (await api.http.post("/v1/files", content=b"x")).status_code == 400


def test_batches_are_gone_on_with_before_a_request_can_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A batch that came between was taken for one of the server before: two jobs answered it into one file."""
    order = []

    class Known(Batches):
        def resume(self) -> None:
            order.append("resumed")

    async def serve(self: server._Server, sockets: object) -> None:
        order.append("serving")
        self.started = True

    async def main() -> None:
        async with served() as api:
            known = Known(tmp_path / "batches", FileStore(tmp_path), api.service, CONDITIONS)
            with socket.create_server(("127.0.0.1", 0)) as listener:
                await server.serve_http(
                    api.service, listener, keys=[], progress=Progress(quiet=True), drain_s=1, batches=known,
                    takes_signals=False,
                )  # fmt: skip

    monkeypatch.setattr(server._Server, "serve", serve)
    asyncio.run(main())
    assert order == ["resumed", "serving"]
