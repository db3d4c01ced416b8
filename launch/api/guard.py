"""What every request passes first: its id, its key, its size. Plain ASGI: it is on the way of every token."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import ShardwiseError
from launch.api.errors import ApiError, api_error
from launch.api.streaming import RAW_SEND

_SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_KEYED = ("/v1", "/tokenize", "/detokenize", "/plan")  # everything else tells nothing that a key protects
_UPLOADS = "/v1/files"
_GENERATING = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True, slots=True)
class HttpLimits:
    body_bytes: int = 16 * 2**20
    file_bytes: int = 2**30  # of what is uploaded to /v1/files
    header_bytes: int = 64 * 2**10
    body_s: float = 60.0  # between two pieces of a body
    file_s: float = 3600.0  # for a whole body of any kind


class Keys:
    """API keys, compared in constant time. None at all: every bearer is welcome."""

    def __init__(self, keys: Iterable[str]) -> None:
        digests = [_digest(key.encode()) for key in keys]
        self._digests = [(digest, digest.hex()[:12]) for digest in digests]  # a name that tells no key

    def __bool__(self) -> bool:
        return bool(self._digests)

    def client(self, authorization: bytes | None) -> str | None:
        """Whose key it is; None: nobody's. All keys are looked at, whichever it is."""
        if not self._digests:
            return ""
        scheme, _, given = (authorization or b"").partition(b" ")
        digest, found = _digest(given.strip()), None
        for known, name in self._digests:
            if hmac.compare_digest(known, digest):
                found = name
        return found if scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Guard:
    def __init__(
        self,
        app: ASGIApp,
        check_open: Callable[[], None],
        *,
        keys: Keys,
        limits: HttpLimits,
        loopback_only: bool,
    ) -> None:
        """`check_open` raises where no request would be taken: under ten times the load there is no time to read them.

        `loopback_only`: without keys on a loopback bind, other names for it are refused: a web page elsewhere
        could reach us under its own name (DNS rebinding).
        """
        self._app, self._check_open = app, check_open
        self._keys, self._limits, self._loopback_only = keys, limits, loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            client = self._check(scope, headers)
            if scope["path"] in _GENERATING and scope["method"] == "POST":
                self._check_open()
        except (ApiError, ShardwiseError) as error:
            await api_error(error).response()(scope, receive, send_with_id)
            return
        scope.setdefault("state", {})
        scope["state"]["client"] = client
        scope["state"][RAW_SEND] = send
        limit = self._limit(scope["path"])
        await self._app(scope, _Bounded(receive, limit, self._limits).receive, send_with_id)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Whose request it is. Raises ApiError."""
        self._check_size(scope, headers)
        path = scope["path"]
        if self._loopback_only:
            _check_host(headers.get(b"host", b"localhost"))
        if not path.startswith(_KEYED):
            return ""
        client = self._keys.client(headers.get(b"authorization"))
        if client is None:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as `authorization: Bearer KEY`",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return client

    def _check_size(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["query_string"])
        if size > self._limits.header_bytes:
            raise ApiError(
                431, f"headers and query have {size} bytes; at most {self._limits.header_bytes} may come"
            )
        length, limit = headers.get(b"content-length", b"0"), self._limit(scope["path"])
        if not length.isdigit() or int(length[:20]) > limit:
            raise _too_large(limit)

    def _limit(self, path: str) -> int:
        return self._limits.file_bytes if path == _UPLOADS else self._limits.body_bytes


def _check_host(host: bytes) -> None:
    name = host.decode("latin-1").lower()
    name = name.rpartition(":")[0] if re.search(r":\d+$", name) and not name.endswith("::1") else name
    if name not in _LOOPBACK_HOSTS:
        raise ApiError(
            403,
            f"host {name[:100]!r} is not this machine's loopback; start the server with --api-key-file to serve others",
            kind="permission_error",
        )


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is too large; at most {limit} bytes may come", code="body_too_large")


class _Bounded:
    """A request's body, no larger and no slower than it may be."""

    def __init__(self, receive: Receive, limit: int, limits: HttpLimits) -> None:
        self._receive, self._limit, self._limits = receive, limit, limits
        self._bytes, self._is_whole = 0, False
        self._begun_s = time.monotonic()

    async def receive(self) -> Message:
        if self._is_whole:  # what comes now is that the client left
            return await self._receive()
        try:
            async with asyncio.timeout(self._limits.body_s):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body does not come; send it at once") from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._bytes > self._limit:
                raise HTTPException(413, _too_large(self._limit).message)
            if time.monotonic() - self._begun_s > self._limits.file_s:
                raise HTTPException(408, f"the body takes longer than {self._limits.file_s:.0f} s")
        return message


def unused(names: Sequence[str]) -> str:
    """A header's value that names what was ignored."""
    return ", ".join(sorted(re.sub(r"[^\x21-\x7e]", "?", name)[:64] for name in names)[:32])
