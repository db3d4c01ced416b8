"""A Ray cluster's head, asked over HTTP before anybody connects: with a wrong token Ray's client tries for 30 s."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from cluster.errors import PlacementFailed, UserError

CLIENT = "ray://"
CLIENT_PORT, DASHBOARD_PORT = 10_001, 8265  # Ray's defaults
LOOK_S = 0.8  # each of two looks: a mistake is told within 2 s
_MODE, _TOKEN, _TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True, slots=True)
class Token:
    value: str
    source: str  # for people


def own_token() -> Token | None:
    """As Ray finds it: in the environment, in a file that it names, in the home directory."""
    if os.environ.get(_MODE) == "disabled":
        return None
    if value := os.environ.get(_TOKEN, "").strip():
        return Token(value, _TOKEN)
    path = Path(os.environ.get(_TOKEN_FILE) or "~/.ray/auth_token").expanduser()
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return Token(value, str(path)) if value else None


def client_address(address: str) -> str:
    """ray://HOST:PORT, with Ray's default port where there is none. Raises UserError."""
    parts = urlsplit(address)
    try:
        host, port = parts.hostname, parts.port or CLIENT_PORT
    except ValueError:
        host, port = None, 0
    if not host or parts.path not in ("", "/"):
        raise UserError(f"--address {address[:100]} is not ray://HOST:PORT, such as ray://head:{CLIENT_PORT}")
    return f"{CLIENT}{_bracketed(host)}:{port}"


def check_head(address: str, dashboard: str | None, token: Token | None) -> str:
    """→ what could not be found out, or nothing. Raises UserError, PlacementFailed where connecting would be in vain.

    `address`: as `client_address` gives it; `dashboard`: the URL of the cluster's HTTP port, by default Ray's.
    """
    parts = urlsplit(address)
    url = (dashboard or f"http://{_bracketed(parts.hostname or '')}:{DASHBOARD_PORT}").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UserError(
            f"--dashboard {dashboard} is no http:// or https:// address, such as http://head:8265"
        )
    asked = Request(f"{url}/api/version")
    if token is not None:
        asked.add_header("Authorization", f"Bearer {token.value}")
    try:
        with urlopen(asked, timeout=LOOK_S) as answer:
            theirs = str(json.load(answer).get("ray_version", ""))
    except HTTPError as error:
        if error.code in (401, 403):
            raise UserError(_refused(address, token)) from None
        return f"{url} answers {error.code}: neither version nor token could be checked"
    except (OSError, ValueError, AttributeError):
        _knock(address, parts.hostname or "", parts.port or CLIENT_PORT)
        return f"no dashboard answers at {url} (--dashboard says where it is): neither version nor token is checked"
    _check_version(address, theirs)
    return ""


def adopt(token: Token | None) -> None:
    """Ray's client sends a token only in this mode, which it reads when it is first imported."""
    if token is not None:
        os.environ.setdefault(_MODE, "token")


def _check_version(address: str, theirs: str) -> None:
    ours = version("ray")
    if theirs and theirs != ours:
        raise UserError(
            f"{address} runs Ray {theirs}, and here is {ours}; use the same: pip install ray=={theirs}"
        )


def _refused(address: str, token: Token | None) -> str:
    if token is None:
        return (
            f"{address} wants a token, and none is here: write the head's (`ray get-auth-token` there) to "
            f"~/.ray/auth_token, or set {_TOKEN}"
        )
    return f"{address} refuses the token in {token.source}: put the head's in its place (`ray get-auth-token` there)"


def _knock(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=LOOK_S).close()
    except OSError as error:
        raise PlacementFailed(
            f"no Ray cluster answers at {address}: {error.strerror or error}; give ray://HOST:PORT of its client "
            f"server (ray start --head --ray-client-server-port {CLIENT_PORT})"
        ) from None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
