"""A thin client of a server's /v1/files and /v1/batches, by Python's own http.client: a batch needs nothing more."""

from __future__ import annotations

import http.client
import json
import ssl
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from cluster.errors import ShardwiseError, UserError
from launch.version import our_version

if TYPE_CHECKING:
    from launch.progress import Progress

CONNECT_S = 2.0  # a wrong address is told at once
TIMEOUT_S = 60.0
RANGE_IS_OVER = 416
_BLOCK = 2**20


class ServerGone(ShardwiseError):
    """It does not answer; it may come back."""


class Server(Protocol):
    """What answers batches, however it is reached: BatchClient by HTTP, launch.ray_batch.RayBatchClient by Ray."""

    @property
    def address(self) -> str: ...

    def check(self, version: str) -> None: ...

    def get(self, path: str) -> dict[str, Any]: ...

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]: ...

    def upload(self, path: Path) -> str:
        """→ the file's id."""

    def download(self, file_id: str, to: Path) -> None: ...

    def close(self) -> None: ...


def open_server(
    address: str, key: str | None, name: str | None, dashboard: str | None, progress: Progress
) -> Server:
    """Checked: it is there, lets us in and is of our version. Raises UserError, within seconds."""
    if address.startswith("ray://"):
        from launch.ray_batch import RayBatchClient

        by_ray = RayBatchClient(address, name, dashboard, progress)
        try:
            by_ray.check(our_version())
        except BaseException:
            by_ray.close()
            raise
        return by_ray
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address} is no http:// or https:// address, such as http://127.0.0.1:8000, nor ray://HOST:PORT"
        )
    if name is not None or dashboard is not None:
        raise UserError("--name and --dashboard are for ray:// addresses; an http:// one names its server")
    client = BatchClient(address.rstrip("/"), key)
    client.check(our_version())
    return client


def check_version(what: str, theirs: str, ours: str) -> None:
    """Raises UserError."""
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise UserError(
            f"{what} is shardwise {theirs}, and this is {ours}; use the same: pip install shardwise=={theirs}"
        )


@dataclass(frozen=True, slots=True)
class BatchClient:
    address: str
    key: str | None

    def check(self, version: str) -> None:
        """Whether it is one of ours, of our version, and takes the key. Raises UserError within seconds."""
        try:
            told = self.get("/version", timeout_s=CONNECT_S)
        except ServerGone as error:
            raise UserError(f"{error}; start `shardwise serve`, or give its --address") from None
        if told.get("name") != "shardwise":
            raise UserError(f"{self.address} is no shardwise server; give the address of one")
        check_version(self.address, str(told.get("version")), version)
        self.get("/v1/models", timeout_s=CONNECT_S)

    def close(self) -> None:
        """Each call has a connection of its own."""

    def get(self, path: str, *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        return self._json("GET", path, None, {}, timeout_s)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._json(
            "POST", path, json.dumps(body).encode(), {"content-type": "application/json"}, TIMEOUT_S
        )

    def text(self, path: str, *, timeout_s: float = TIMEOUT_S) -> str:
        connection, response = self._ask("GET", path, None, {}, timeout_s)
        with closing(connection):
            return self._read(response).decode(errors="replace")

    def upload(self, path: Path) -> str:
        """→ the file's id. It is sent in pieces."""
        mark = uuid.uuid4().hex
        head = (
            f'--{mark}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{mark}\r\ncontent-disposition: form-data; name="file"; filename="input.jsonl"\r\n'
            "content-type: application/octet-stream\r\n\r\n"
        ).encode()
        tail = f"\r\n--{mark}--\r\n".encode()

        def pieces() -> Iterator[bytes]:
            yield head
            with path.open("rb") as file:
                while piece := file.read(_BLOCK):
                    yield piece
            yield tail

        headers = {
            "content-type": f"multipart/form-data; boundary={mark}",
            "content-length": str(len(head) + path.stat().st_size + len(tail)),
        }
        return str(self._json("POST", "/v1/files", pieces(), headers, TIMEOUT_S)["id"])

    def download(self, file_id: str, to: Path) -> None:
        connection, response = self._ask("GET", f"/v1/files/{file_id}/content", None, {}, TIMEOUT_S)
        with closing(connection), to.open("wb") as file:
            while piece := self._read(response, _BLOCK):
                file.write(piece)

    def piece(self, file_id: str, offset: int, most_bytes: int) -> bytes:
        """Of a file, from `offset`; empty at its end."""
        wanted = {"range": f"bytes={offset}-{offset + most_bytes - 1}"}
        connection, response = self._ask("GET", f"/v1/files/{file_id}/content", None, wanted, TIMEOUT_S)
        with closing(connection):
            return b"" if response.status == RANGE_IS_OVER else self._read(response)

    def _json(
        self, method: str, path: str, body: Any, headers: Mapping[str, str], timeout_s: float
    ) -> dict[str, Any]:
        connection, response = self._ask(method, path, body, headers, timeout_s)
        with closing(connection):
            try:
                told = json.loads(self._read(response))
            except ValueError:
                raise UserError(
                    f"{self.address}{path} does not answer in JSON; is it a shardwise server?"
                ) from None
        if not isinstance(told, dict):
            raise UserError(f"{self.address}{path} answers with something else; is it a shardwise server?")
        return told

    def _ask(
        self, method: str, path: str, body: Any, headers: Mapping[str, str], timeout_s: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Raises UserError with the server's reason, ServerGone where there is none."""
        connection = self._connection(timeout_s)
        told = {**headers, **({"authorization": f"Bearer {self.key}"} if self.key else {})}
        try:
            connection.request(method, path, body, told)
            response = connection.getresponse()
        except (http.client.InvalidURL, ValueError):  # told without the key
            connection.close()
            raise UserError(
                f"{self.address}{path[:200]} cannot be asked: ids and keys are of plain ASCII, without spaces"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ServerGone(f"{self.address} does not answer ({error})") from None
        if response.status == 401:
            connection.close()
            raise UserError(
                f"{self.address} wants an API key, and {'another' if self.key else 'none was given'}: "
                "give --api-key-file or set OPENAI_API_KEY"
            )
        if response.status >= 500:
            connection.close()
            raise ServerGone(f"{self.address} answers {response.status} {response.reason}")
        if response.status >= 400 and response.status != RANGE_IS_OVER:
            with closing(connection):
                raise UserError(f"{self.address} refuses: {_reason(self._read(response))}")
        return connection, response

    def _read(self, response: http.client.HTTPResponse, most_bytes: int | None = None) -> bytes:
        """Raises ServerGone where the body ends before its content-length: http.client tells of that only at times."""
        try:
            found = response.read(most_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise ServerGone(f"{self.address} broke off its answer ({error})") from None
        if response.length and len(found) < (most_bytes or 1):
            raise ServerGone(f"{self.address} broke off its answer, {response.length} bytes before its end")
        return found

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.address)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(parts.netloc, timeout=timeout_s, context=context)
        return http.client.HTTPConnection(parts.netloc, timeout=timeout_s)


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
