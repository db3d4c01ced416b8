"""A Ray head asked before anybody connects: wrong token, no token, another version, nobody there; each at once."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster.errors import PlacementFailed, UserError
from launch.__main__ import main
from launch.head import Token, check_head, client_address, own_token

RIGHT = Token("secret", "RAY_AUTH_TOKEN")


class Dashboard(http.server.BaseHTTPRequestHandler):
    tells = ""

    def do_GET(self) -> None:
        given = self.headers["Authorization"]
        self.send_response(
            {"Bearer secret": 200, None: 401}.get(given, 403) if self.path == "/api/version" else 404
        )
        self.end_headers()
        self.wfile.write(f'{{"ray_version": "{self.tells}"}}'.encode())

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


def test_the_right_token_and_version_pass(dashboard: str) -> None:
    assert check_head("ray://127.0.0.1:1", dashboard, RIGHT) == ""


def test_what_is_wrong_is_told_with_the_fix(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"wants a token, and none is here: write the head's .* to ~/\.ray/auth_token"
    ):
        check_head("ray://127.0.0.1:1", dashboard, None)
    with pytest.raises(UserError, match="refuses the token in /home/me/token: put the head's in its place"):
        check_head("ray://127.0.0.1:1", dashboard, Token("wrong", "/home/me/token"))
    monkeypatch.setattr(Dashboard, "tells", "2.9.9")
    with pytest.raises(
        UserError, match=r"runs Ray 2\.9\.9, and here is .*; use the same: pip install ray==2\.9\.9"
    ):
        check_head("ray://127.0.0.1:1", dashboard, RIGHT)


def test_without_a_dashboard_the_client_server_is_knocked_at() -> None:
    nobody = f"http://127.0.0.1:{closed_port()}"
    with socket.create_server(("127.0.0.1", 0)) as client_server:
        address = f"ray://127.0.0.1:{client_server.getsockname()[1]}"
        assert check_head(address, nobody, RIGHT).startswith(f"no dashboard answers at {nobody}")
    with pytest.raises(
        PlacementFailed, match=r"no Ray cluster answers at ray://127\.0\.0\.1:.*: Connection refused"
    ):
        check_head(f"ray://127.0.0.1:{closed_port()}", nobody, RIGHT)


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
