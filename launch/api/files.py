"""/v1/files: what batches read and write, in a directory that outlives the server."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
from fastapi import FastAPI, File, Form, Request, UploadFile
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from cluster.files import read_back
from launch.api.errors import ApiError
from orchestrator.journal import write_durably

_ID = re.compile(r"file-[0-9a-f]{32}")
_META, _DATA = "meta.json", "data"


@dataclass(frozen=True, slots=True)
class FileStore:
    """A directory a file: what it is, and its bytes. Clients see their own."""

    root: Path

    def create(self, content: BinaryIO, name: str, purpose: str, owner: str) -> dict[str, Any]:
        directory = self._new()
        with (directory / _DATA).open("wb") as file:
            shutil.copyfileobj(content, file, 2**20)
            file.flush()
            os.fsync(file.fileno())
        return self._describe(directory, name, purpose, owner)

    def adopt(self, path: Path, name: str, owner: str) -> str:
        """A file that is here already, under an id of its own."""
        directory = self._new()
        (directory / _DATA).hardlink_to(path)
        told = self._describe(directory, name, "batch_output", owner)
        return str(told["id"])

    def get(self, file_id: str, owner: str) -> dict[str, Any]:
        """Raises ApiError 404."""
        known = _ID.fullmatch(file_id) is not None
        meta = read_back(self.root / file_id / _META, dict[str, Any]) if known else None
        if meta is not None and meta.pop("owner") == owner:
            return meta
        raise ApiError(404, f"there is no file {file_id[:60]!r}", param="file_id", code="file_not_found")

    def data(self, file_id: str, owner: str) -> Path:
        self.get(file_id, owner)
        return self.root / file_id / _DATA

    def delete(self, file_id: str, owner: str) -> None:
        self.get(file_id, owner)
        shutil.rmtree(self.root / file_id)

    def all(self, owner: str) -> Iterator[dict[str, Any]]:
        """The newest first."""
        found = []
        for directory in self.root.iterdir():
            try:
                found.append(self.get(directory.name, owner))
            except ApiError:
                continue
        yield from sorted(found, key=lambda meta: meta["created_at"], reverse=True)

    def _new(self) -> Path:
        directory = self.root / f"file-{uuid.uuid4().hex}"
        directory.mkdir(parents=True)
        return directory

    def _describe(self, directory: Path, name: str, purpose: str, owner: str) -> dict[str, Any]:
        meta = {
            "id": directory.name,
            "object": "file",
            "bytes": (directory / _DATA).stat().st_size,
            "created_at": int(time.time()),
            "filename": name[:256],
            "purpose": purpose[:64],
            "status": "processed",
        }
        write_durably(directory / _META, {**meta, "owner": owner})
        return meta


def add_files(app: FastAPI, store: FileStore) -> None:
    @app.post("/v1/files")
    async def create(
        request: Request, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()]
    ) -> Response:
        owner, name = request.state.client, file.filename or "file"
        return _json(await run_in_threadpool(store.create, file.file, name, purpose, owner))

    @app.get("/v1/files")
    async def listed(request: Request) -> Response:
        return _json({"object": "list", "data": list(store.all(request.state.client)), "has_more": False})

    @app.get("/v1/files/{file_id}")
    async def described(request: Request, file_id: str) -> Response:
        return _json(store.get(file_id, request.state.client))

    @app.get("/v1/files/{file_id}/content")
    async def content(request: Request, file_id: str) -> Response:
        return FileResponse(store.data(file_id, request.state.client), media_type="application/octet-stream")

    @app.delete("/v1/files/{file_id}")
    async def deleted(request: Request, file_id: str) -> Response:
        store.delete(file_id, request.state.client)
        return _json({"id": file_id, "object": "file", "deleted": True})


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
