"""A Ray cluster's head, asked before anybody connects: with a wrong token Ray itself tries for 20 to 30 s.

By HTTP, its dashboard tells the version too; where that listens on the head alone, which is Ray's default, by an empty
call of the service that one would connect to: who may not come in is told so before anything else.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

from cluster.errors import PlacementFailed, UserError
from launch.batch_client import check_version
from launch.version import our_version

CLIENT = "ray://"
CLIENT_PORT, DASHBOARD_PORT = 10_001, 8265  # Ray's defaults
LOOK_S = 0.8  # each of two looks: a mistake is told within 2 s
VERSION, PYTHON = "SHARDWISE_VERSION", "SHARDWISE_PYTHON"
ACTOR = "shardwise:"  # what a deployment's name begins with: cluster/detached.py
_ACTORS = [
    ("detail", "1"),
    ("limit", "1000"),
    ("filter_keys", "state"),
    ("filter_predicates", "="),
    ("filter_values", "ALIVE"),
    ("filter_keys", "ray_namespace"),
    ("filter_predicates", "="),
    ("filter_values", "shardwise"),
]
_GCS_METHOD, _CLIENT_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId", "/ray.rpc.RayletDriver/ClusterInfo"
_WAY_OUT = {
    _GCS_METHOD: "give HOST:PORT of its head, as ray start says, or ray://HOST:PORT of its client server",
    _CLIENT_METHOD: "give ray://HOST:PORT of its client server, as ray start's --ray-client-server-port says",
}
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


def check_head(address: str, dashboard: str | None = None, name: str | None = None) -> Token | None:
    """→ the token that the cluster takes. Raises UserError, PlacementFailed where connecting would be in vain.

    `address`: HOST:PORT of the head, auto, or as `client_address` gives it; `dashboard`: the URL of the cluster's HTTP
    port, by default Ray's; `name` of the deployment that will be asked, None: any.
    """
    token = own_token()
    if address == "auto":
        return token
    if not address.startswith(CLIENT):
        _call(address, address, _GCS_METHOD, token)
        return token
    parts = urlsplit(address)
    url = (dashboard or f"http://{_bracketed(parts.hostname or '')}:{DASHBOARD_PORT}").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UserError(
            f"--dashboard {dashboard} is no http:// or https:// address, such as http://head:8265"
        )
    try:
        theirs = str(_get(f"{url}/api/version", token).get("ray_version", ""))
    except HTTPError as error:
        if error.code in (401, 403):
            raise UserError(_refused(address, token)) from None
        theirs = ""
    except (OSError, ValueError, AttributeError):  # it listens on the head alone, or elsewhere
        theirs = ""
    if theirs:
        _check_version(address, theirs)
        _check_deployments(address, url, token, name)
    else:
        _call(address, parts.netloc, _CLIENT_METHOD, token)
    return token


def versions() -> dict[str, str]:
    """For the environment of a deployment's actor."""
    return {VERSION: our_version(), PYTHON: platform.python_version()}


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


def _check_deployments(address: str, url: str, token: Token | None, name: str | None) -> None:
    """What the environments of the actors say, as far as the dashboard tells it. Raises UserError."""
    try:
        actors = _get(f"{url}/api/v0/actors?{urlencode(_ACTORS)}", token)["data"]["result"]["result"]
        found = {actor["name"]: json.loads(actor["serialized_runtime_env"])["env_vars"] for actor in actors}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):  # seen once we are connected
        return
    ours = versions()
    for actor, environment in found.items():
        if not actor.startswith(ACTOR) or (name is not None and actor != f"{ACTOR}{name}"):
            continue
        what = f"{actor.removeprefix(ACTOR)} in {address}"
        check_version(what, environment.get(VERSION, ours[VERSION]), ours[VERSION])
        theirs = environment.get(PYTHON, ours[PYTHON])
        if theirs.split(".")[:2] != ours[PYTHON].split(".")[:2]:
            raise UserError(
                f"{what} runs Python {theirs}, and this is {ours[PYTHON]}; Ray's client wants the same"
            )


def _get(url: str, token: Token | None) -> dict[str, Any]:
    asked = Request(url)
    if token is not None:
        asked.add_header("Authorization", f"Bearer {token.value}")
    with urlopen(asked, timeout=LOOK_S) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def _refused(address: str, token: Token | None) -> str:
    if token is None:
        return (
            f"{address} wants a token, and none is here: write the head's (`ray get-auth-token` there) to "
            f"~/.ray/auth_token, or set {_TOKEN}"
        )
    return f"{address} refuses the token in {token.source}: put the head's in its place (`ray get-auth-token` there)"


def _call(address: str, target: str, method: str, token: Token | None) -> None:
    """An empty call. Raises UserError where it is not let in, PlacementFailed where nobody answers."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):  # Ray's own certificates are Ray's to find
        return
    import grpc

    metadata = [] if token is None else [("authorization", f"Bearer {token.value}")]
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=LOOK_S, metadata=metadata)
        except grpc.RpcError as error:
            code, details = error.code(), str(error.details())
        else:
            return
    if code is grpc.StatusCode.UNAUTHENTICATED:
        raise UserError(_refused(address, token))
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        reason = (
            "Connection refused"
            if "refused" in details
            else "name or port is wrong, or a firewall is between"
        )
        raise PlacementFailed(f"no Ray cluster answers at {address}: {reason}; {_WAY_OUT[method]}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        raise PlacementFailed(f"what answers at {address} is another service; {_WAY_OUT[method]}")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
