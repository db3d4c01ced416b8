"""What a detached actor of a Ray cluster hosts: a keeper of the server, and the way to its API for who comes by Ray.

Who may call it may run anything in the cluster anyway; Ray's token is what lets them in. Answers are of Python's own
types (cluster/detached.py).
"""

from __future__ import annotations

import platform
import re
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from cluster.errors import BadRequest
from cluster.files import read_back
from launch.batch_client import BatchClient, ServerGone
from launch.keeper import SHARDWISE, STATE, Keeper
from launch.keeper_log import LOG, OLDER, Cursor, read_log
from launch.live import told_by
from launch.state import coordinator_directory
from launch.version import our_version

KEYS = "keys.txt"
_UPLOAD = re.compile(r"[0-9a-f]{32}")
_PATHS = ("/v1/batches", "/v1/files", "/v1/models", "/version")
_PIECE_BYTES = 4 * 2**20


class _Served(msgspec.Struct):
    """Of a keeper's state."""

    port: str | None


class Gateway:
    def __init__(self, name: str, order: Mapping[str, Any]) -> None:
        """`order`: argv of `shardwise`, changes to the environment, the API keys, what `up` wants to be told again."""
        self._name, self._order = name, dict(order)
        directory = coordinator_directory(name)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory, self._uploads = directory, directory / "uploads"
        shutil.rmtree(self._uploads, ignore_errors=True)  # of one that was killed
        self._uploads.mkdir()
        argv, keys = list(order["argv"]), list(order["keys"])
        if "--batch-dir" not in argv:
            argv += ["--batch-dir", str(directory / "batches")]
        if "--kept-as" not in argv:  # what its actors' death kills, the next finds again
            argv += ["--kept-as", name]
        self._key: str | None = None
        if keys:
            self._key = secrets.token_hex(32)
            _write_private(directory / KEYS, [*keys, self._key])
            argv += ["--api-key-file", str(directory / KEYS)]
        port = _before(directory, str(order["run"]))
        self._keeper = Keeper(argv, order["environment"], directory, port=port, program=SHARDWISE)
        self._keeping = threading.Thread(target=self._keeper.run, daemon=True)
        self._keeping.start()

    def describe(self) -> dict[str, Any]:
        told = {"name": self._name, "version": our_version(), "python": platform.python_version()}
        return {**told, "order": self._order["told"], **asdict(self._keeper.state())}

    def live(self) -> dict[str, Any]:
        """Raises BadRequest where it does not serve now."""
        return told_by(self._client())

    def log(self, cursor: Sequence[int] | None, last_lines: int) -> tuple[Cursor, bytes]:
        known = None if cursor is None else (cursor[0], cursor[1])
        return read_log(self._directory, known, last_lines=last_lines)

    def stop(self) -> None:
        self._keeper.stop()

    def kill(self) -> None:
        self._keeper.kill()

    # -- batches --

    def get(self, path: str) -> dict[str, Any]:
        return self._ask("get", path)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask("post", path, body)

    def append(self, upload: str, offset: int, chunk: bytes) -> int:
        """→ bytes that are here. The same chunk again changes nothing."""
        path = self._upload(upload)
        with path.open("r+b" if path.exists() else "w+b") as file:
            size = file.seek(0, 2)
            if offset > size:
                raise BadRequest(f"the chunk begins at {offset}, and {size} bytes have come; send it again")
            file.seek(offset)
            file.write(chunk)
            return file.tell()

    def finish(self, upload: str) -> str:
        """→ the file's id, as of /v1/files."""
        path = self._upload(upload)
        try:
            return self._client().upload(path)
        except ServerGone as error:
            raise BadRequest(f"{error}; submit it again once it serves") from None
        finally:
            path.unlink(missing_ok=True)

    def piece(self, file_id: str, offset: int) -> bytes:
        """Of a file of /v1/files; empty at its end."""
        if not re.fullmatch(r"file-[0-9a-f]{32}", file_id):
            raise BadRequest(f"{file_id[:60]!r} is no file's id")
        try:
            return self._client().piece(file_id, offset, _PIECE_BYTES)
        except ServerGone as error:
            raise BadRequest(f"{error}; ask again once it serves") from None

    def _ask(self, method: str, path: str, *args: Any) -> dict[str, Any]:
        """What the server tells; {"gone": why} where it does not answer."""
        if not path.startswith(_PATHS):
            raise BadRequest(f"{path[:60]!r} is not asked by way of Ray")
        try:
            found: dict[str, Any] = getattr(self._client(), method)(path, *args)
        except ServerGone as error:
            return {"gone": str(error)}
        return found

    def _upload(self, upload: str) -> Path:
        if not _UPLOAD.fullmatch(upload):
            raise BadRequest(f"{upload[:60]!r} is no upload's id")
        return self._uploads / upload

    def _client(self) -> BatchClient:
        url = self._keeper.state().url
        if url is None:
            state = self._keeper.state().state
            raise ServerGone(f"{self._name} does not serve now: it is {state}")
        return BatchClient(here(url), self._key)


def _before(directory: Path, run: str) -> str | None:
    """The port on which it served before its actor was killed; None: it is new, or never did."""
    note, state = directory / "run", directory / STATE
    if note.exists() and note.read_bytes() == run.encode() and state.exists():
        known = read_back(state, _Served)
        return None if known is None else known.port
    for path in (state, directory / LOG, directory / OLDER):
        path.unlink(missing_ok=True)
    note.write_text(run)
    return None


def here(url: str) -> str:
    """Where a server that listens everywhere is reached from its own machine."""
    parts = urlsplit(url)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(parts.hostname or "", "")
    return f"{parts.scheme}://{host}:{parts.port}" if host else url


def _write_private(path: Path, lines: Sequence[str]) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
