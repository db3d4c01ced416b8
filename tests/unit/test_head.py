"""A Ray head asked before anybody connects: wrong token, no token, another version, nobody there; each at once."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest

from cluster.errors import PlacementFailed, UserError
from launch.__main__ import main
from launch.head import Token, check_head, client_address, own_token, versions


def actors(environment: dict[str, str]) -> dict[str, Any]:
    """As Ray 2.60 lists them."""
    told = [
        {"name": "shardwise:llama", "serialized_runtime_env": json.dumps({"env_vars": environment})},
        {"name": "shardwise-gang:llama:1:0", "serialized_runtime_env": json.dumps({"env_vars": {}})},
    ]
    return {"result": True, "data": {"result": {"total": 2, "result": told}}}


class Dashboard(http.server.BaseHTTPRequestHandler):
    tells = ""
    environment: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        given = self.headers["Authorization"]
        known = {"/api/version": {"ray_version": self.tells}, "/api/v0/actors": actors(self.environment)}
        path = self.path.partition("?")[0]
        self.send_response({"Bearer secret": 200, None: 401}.get(given, 403) if path in known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(known.get(path)).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Dashboard, "tells", version("ray"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """What is here to show, by the environment."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return lambda value: monkeypatch.setenv("RAY_AUTH_TOKEN", value)


NO_TOKEN = r"wants a token, and none is here: write the head's .* to ~/\.ray/auth_token"
WRONG = "refuses the token in RAY_AUTH_TOKEN: put the head's in its place"


def test_the_right_token_and_version_pass(dashboard: str, token: Callable[[str], None]) -> None:
    token("secret")
    assert check_head("ray://127.0.0.1:1", dashboard) == Token("secret", "RAY_AUTH_TOKEN")


def test_what_is_wrong_is_told_with_the_fix(
    dashboard: str, token: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, says in (("", NO_TOKEN), ("wrong", WRONG)):
        token(value)
        with pytest.raises(UserError, match=says):
            check_head("ray://127.0.0.1:1", dashboard)
    token("secret")
    monkeypatch.setattr(Dashboard, "tells", "2.9.9")
    with pytest.raises(
        UserError, match=r"runs Ray 2\.9\.9, and here is .*; use the same: pip install ray==2\.9\.9"
    ):
        check_head("ray://127.0.0.1:1", dashboard)


def test_another_shardwise_or_python_is_told_before_connecting(
    dashboard: str, token: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    token("secret")
    address = "ray://127.0.0.1:1"
    monkeypatch.setattr(Dashboard, "environment", versions())
    assert check_head(address, dashboard) is not None
    monkeypatch.setattr(Dashboard, "environment", versions() | {"SHARDWISE_VERSION": "9.8.7"})
    with pytest.raises(UserError, match=rf"llama in {address} is shardwise 9\.8\.7, and this is "):
        check_head(address, dashboard)
    assert check_head(address, dashboard, "other") is not None
    monkeypatch.setattr(Dashboard, "environment", versions() | {"SHARDWISE_PYTHON": "2.7.1"})
    with pytest.raises(
        UserError, match=rf"llama in {address} runs Python 2\.7\.1, and this is 3\..*wants the same"
    ):
        check_head(address, dashboard, "llama")


@pytest.fixture
def service() -> Iterator[str]:
    """A head's gRPC port: it lets in who has the token, then knows no empty call."""

    class Door(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            if not details.method.startswith("/ray.rpc."):
                return None
            given = dict(details.invocation_metadata).get("authorization")
            code = grpc.StatusCode.NOT_FOUND if given == "Bearer secret" else grpc.StatusCode.UNAUTHENTICATED
            return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(code, "told"))

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Door()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize("scheme", ["ray://", ""])
def test_where_no_dashboard_answers_the_port_itself_is_asked(
    scheme: str, service: str, token: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = f"http://127.0.0.1:{closed_port()}"
    for value, says in (("", NO_TOKEN), ("wrong", WRONG)):
        token(value)
        with pytest.raises(UserError, match=says):
            check_head(f"{scheme}{service}", nobody)
    token("secret")
    assert check_head(f"{scheme}{service}", nobody) == Token("secret", "RAY_AUTH_TOKEN")
    with pytest.raises(
        PlacementFailed, match=f"no Ray cluster answers at {scheme}127.*: Connection refused; give "
    ):
        check_head(f"{scheme}127.0.0.1:{closed_port()}", nobody)
    monkeypatch.setattr("launch.head._GCS_METHOD", "/other/Method")
    monkeypatch.setattr("launch.head._CLIENT_METHOD", "/other/Method")
    monkeypatch.setattr("launch.head._WAY_OUT", {"/other/Method": "give HOST:PORT"})
    with pytest.raises(
        PlacementFailed, match=f"what answers at {scheme}{service} is another service; give HOST:PORT"
    ):
        check_head(f"{scheme}{service}", nobody)


def test_a_node_of_the_cluster_asks_nobody(token: Callable[[str], None]) -> None:
    token("secret")
    assert check_head("auto") == Token("secret", "RAY_AUTH_TOKEN")


@pytest.mark.parametrize(
    ("token", "says"),
    [("", "wants a token, and none is here"), ("wrong", "refuses the token in RAY_AUTH_TOKEN")],
)
def test_the_command_tells_it_in_one_line_within_two_seconds(
    token: str,
    says: str,
    dashboard: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    start_s = time.monotonic()
    code = main(["batch", "list", "--address", "ray://127.0.0.1:1", "--dashboard", dashboard])
    assert time.monotonic() - start_s < 2
    out, said = capsys.readouterr()
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert said.startswith(f"shardwise batch: ray://127.0.0.1:1 {says}")


def test_an_address_has_rays_port_unless_it_says_another() -> None:
    assert client_address("ray://head") == "ray://head:10001"
    assert client_address("ray://[::1]:7") == "ray://[::1]:7"
    for wrong in ("ray://", "ray://head:x", "ray://head:1/path", "ray://head:99999"):
        with pytest.raises(UserError, match="is not ray://HOST:PORT"):
            client_address(wrong)


def test_a_token_is_looked_for_where_ray_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert own_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("at home\n")
    assert own_token() == Token("at home", str(tmp_path / ".ray" / "auth_token"))
    (tmp_path / "named").write_text("named")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert own_token() == Token("named", str(tmp_path / "named"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "told")
    assert own_token() == Token("told", "RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert own_token() is None
