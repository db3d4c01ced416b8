"""A server that is killed amid a batch, for real: the next one ends it, with each answer once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.batch_client import BatchClient, ServerGone
from orchestrator.journal import ERRORS, OUTPUT
from tests.hosts import PATIENCE_S, ROOT

LINES = 1000


@contextmanager
def server(
    root: Path, *, step_s: float = 0.001, answer: str = "Hello"
) -> Iterator[tuple[subprocess.Popen[str], BatchClient]]:
    argv = [sys.executable, "-m", "tests.fake_server", str(root), str(step_s), answer]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = BatchClient(process.stdout.readline().strip(), None)
        end_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                client.get("/version")
                break
            except ServerGone:
                assert time.monotonic() < end_s
        yield process, client
        process.terminate()
        assert process.wait(PATIENCE_S) in (0, -9)


def done(client: BatchClient, batch_id: str) -> tuple[str, int]:
    told = client.get(f"/v1/batches/{batch_id}")
    return told["status"], told["request_counts"]["completed"]


def write_batch(path: Path, lines: int) -> Path:
    with path.open("w") as file:
        for i in range(lines):
            body = {"prompt": f"{i}", "max_tokens": 2}
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def test_a_server_killed_amid_a_batch(tmp_path: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", LINES)
    with server(tmp_path) as (process, client):
        asked = {
            "input_file_id": client.upload(path),
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        }
        batch_id = client.post("/v1/batches", asked)["id"]
        while done(client, batch_id)[1] < LINES // 2:
            time.sleep(0.005)
        process.kill()
        process.wait()
    output = tmp_path / "batches" / batch_id / OUTPUT
    before = output.read_bytes().count(b"\n")
    assert LINES // 2 <= before < LINES, "it was done before it was killed"
    with output.open("ab") as file:
        file.write(b'{"id":"batch_req_999","custom_id":"r9')  # a write that the kill cut off
    with server(tmp_path) as (_, client):
        while done(client, batch_id)[0] != "completed":
            time.sleep(0.005)
        computed = counted(client)
    ids = Counter(json.loads(line)["custom_id"] for line in output.read_text().splitlines())
    assert ids == Counter(f"r{i}" for i in range(LINES))
    assert not output.with_name(ERRORS).read_bytes()
    assert computed == LINES - before  # what was in the file was not computed again


def counted(client: BatchClient, reason: str = "") -> int:
    """Requests that this server has finished, for this reason or for any."""
    lines = client.text("/metrics").splitlines()
    counts = [
        line for line in lines if line.startswith("vllm:request_success_total") and f'"{reason}' in line
    ]
    return int(sum(float(line.rpartition(" ")[2]) for line in counts))
