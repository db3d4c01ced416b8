"""The batch client before a server that breaks off amid an answer, and with what no request can carry."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from launch.batch_client import BatchClient, ServerGone
from launch.batch_follow import follow
from launch.progress import Progress

PATIENCE_S = 20.0


@pytest.fixture
def broken() -> Iterator[BatchClient]:
    """A server that promises 100 bytes, sends 10 and goes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n0123456789")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield BatchClient(f"http://127.0.0.1:{listener.getsockname()[1]}", None)
        thread.join(PATIENCE_S)


@pytest.mark.parametrize(
    "ask",
    [
        lambda client, to: client.download("file-1", to),
        lambda client, to: client.piece("file-1", 0, 100),
        lambda client, to: client.get("/v1/batches/1"),
        lambda client, to: client.text("/metrics"),
    ],
    ids=["download", "piece", "get", "text"],
)
def test_an_answer_that_breaks_off_is_not_taken_for_whole(
    broken: BatchClient, tmp_path: Path, ask: Callable[[BatchClient, Path], object]
) -> None:
    with pytest.raises(ServerGone, match="broke off its answer"):
        ask(broken, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("key", "job"), [(None, "a b"), (None, "ä"), ("first\nsecond", "1"), ("schlüssel☃", "1")]
)
def test_what_no_request_can_carry_is_a_mistake_and_no_key_is_told(key: str | None, job: str) -> None:
    with pytest.raises(UserError, match="cannot be asked") as caught:
        BatchClient("http://127.0.0.1:1", key).get(f"/v1/batches/{job}")
    assert key is None or key not in str(caught.value)


@pytest.mark.parametrize(
    ("before", "says"),
    [(7, "completed: 7 of 7 requests\n"), (3, "completed: 7 of 7 requests, 4 of them in ")],
)
def test_a_batch_that_is_over_already_is_told_by_its_counts(
    before: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.batch_follow.POLL_S", (0.0, 0.0))
    looks = [("in_progress", before)] * (before < 7) + [("completed", 7)]

    class Told:
        def get(self, path: str) -> dict[str, Any]:
            status, done = looks.pop(0)
            return {"status": status, "request_counts": {"completed": done, "failed": 0, "total": 7}}

    assert follow(Told(), "batch_1", Progress())["status"] == "completed"  # type: ignore[arg-type]
    assert says in capsys.readouterr().err
