"""A client that is killed, for real: its batch goes on to the end, its live request is dropped from the engine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from launch.batch_client import BatchClient
from orchestrator.journal import ERRORS, OUTPUT
from tests.cpu.test_batch_kill import counted, done, server, write_batch
from tests.hosts import PATIENCE_S, ROOT

LINES = 160
STREAMS = """
import sys, httpx2
asked = {"prompt": "a", "stream": True, "max_tokens": 400}
with httpx2.stream("POST", sys.argv[1] + "/v1/completions", json=asked) as response:
    for line in response.iter_lines():
        print(line, flush=True)
"""


def test_a_client_killed_amid_a_batch_and_a_stream(tmp_path: Path) -> None:
    path, out = write_batch(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    with server(tmp_path, step_s=0.03, answer="-" * 400) as (_, client):
        submitting = [
            sys.executable,
            "-m",
            "launch",
            "batch",
            "submit",
            str(path),
            "--address",
            client.address,
            "-o",
            str(out),
        ]
        with (
            subprocess.Popen(
                [sys.executable, "-c", STREAMS, client.address], cwd=ROOT, stdout=subprocess.PIPE, text=True
            ) as live,
            subprocess.Popen(
                submitting, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as batch,
        ):
            assert live.stdout is not None
            assert live.stdout.readline().startswith("data: ")
            (batch_id,) = await_batches(client)
            while done(client, batch_id)[1] < LINES // 4:
                time.sleep(0.01)
            assert batch.poll() is None
            assert counted(client, "abort") == 0
            for process in (live, batch):
                process.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        while counted(client, "abort") < 1:
            assert time.monotonic() - killed_s < PATIENCE_S
        dropped_s = time.monotonic() - killed_s
        status, completed = done(client, batch_id)
        assert (status, completed < LINES) == ("in_progress", True), (
            "it was done before its client was killed"
        )
        while done(client, batch_id)[0] != "completed":
            assert time.monotonic() - killed_s < PATIENCE_S
            time.sleep(0.01)
        assert (counted(client, "abort"), counted(client, "length")) == (1, LINES)
    assert dropped_s < 2
    output = tmp_path / "batches" / batch_id / OUTPUT
    ids = Counter(json.loads(line)["custom_id"] for line in output.read_text().splitlines())
    assert ids == Counter(f"r{i}" for i in range(LINES))
    assert not output.with_name(ERRORS).read_bytes()


def await_batches(client: BatchClient) -> list[str]:
    end_s = time.monotonic() + PATIENCE_S
    while not (found := client.get("/v1/batches")["data"]):
        assert time.monotonic() < end_s
        time.sleep(0.01)
    return [one["id"] for one in found]
