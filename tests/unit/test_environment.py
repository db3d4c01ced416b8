"""An environment with pip where Python brings no ensurepip, against a package index on this host."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launch import environment

# All of pip that matters here: run from its wheel, it unpacks itself where it was told to be installed.
FAKE_PIP = """
import sys, sysconfig, zipfile
assert sys.argv[1:3] == ["install", "--no-index"]
zipfile.ZipFile(sys.argv[3]).extractall(sysconfig.get_path("purelib"))
"""


def wheel() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pip/__init__.py", "")
        archive.writestr("pip/__main__.py", FAKE_PIP)
    return file.getvalue()


@contextmanager
def index(listed: str, content: bytes) -> Iterator[str]:
    """A simple index that has one file of pip. → its URL"""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = json.dumps({"files": [{"filename": listed, "url": f"../../files/{listed}"}]}).encode()
            found = {"/simple/pip/": page, f"/files/{listed}": content}.get(self.path)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *_: object) -> None:
            """Not on standard error."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/simple"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def debian(monkeypatch: pytest.MonkeyPatch) -> None:
    """This Python as Debian has it: no ensurepip, no proxy in the way of this host."""
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.usefixtures("debian")
def test_pip_comes_from_the_index_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PIP_SHA256", hashlib.sha256(wheel()).hexdigest())
    with index(environment.PIP_WHEEL, wheel()) as url:
        assert environment.main([str(tmp_path / "made")], url) == 0
    python = tmp_path / "made" / "bin" / "python"
    where = subprocess.run([python, "-c", "import pip; print(pip.__file__)"], capture_output=True, text=True)
    assert where.stdout.startswith(str(tmp_path / "made"))
    assert environment.main([str(tmp_path / "made")], "http://127.0.0.1:1") == 0  # needs nothing more


@pytest.mark.usefixtures("debian")
@pytest.mark.parametrize(
    ("listed", "says"),
    [(environment.PIP_WHEEL, "it must be " + environment.PIP_SHA256), ("pip-1.0.tar.gz", "not listed")],
)
def test_another_file_is_refused_in_one_line(
    listed: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with index(listed, wheel()) as url:
        assert environment.main([str(tmp_path / "made")], url) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "made" / "bin" / "pip").exists()


@pytest.mark.usefixtures("debian")
def test_no_index_says_what_root_may_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert environment.main([str(tmp_path / "made")], "http://127.0.0.1:1/simple") == 2
    assert "As root: apt install python3-venv" in capsys.readouterr().err
