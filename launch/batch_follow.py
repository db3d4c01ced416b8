"""A batch's way: a file up to who answers it, and its counts until it is over."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.batch_client import Server, ServerGone
from launch.batch_input import Source, endpoint_of, is_batch_file, write_lines
from launch.progress import Progress

OVER = ("completed", "failed", "expired", "cancelled")
POLL_S = (0.2, 2.0)  # between two looks: at first, and later
PATIENCE_S = 600.0  # with a server that does not answer: it may be starting again


def submit(server: Server, source: Source, progress: Progress) -> dict[str, Any]:
    """→ the batch. Raises BadRequest where the file is none."""
    endpoint = endpoint_of(source)
    with tempfile.TemporaryDirectory(prefix="shardwise-batch-") as directory:
        path = source.path
        if not is_batch_file(source):
            path = Path(directory, "input.jsonl")
            write_lines(source, path)
        progress.say(f"sending {path.stat().st_size / 1e6:.1f} MB to {server.address}")
        file_id = server.upload(path)
    asked = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"}
    return server.post("/v1/batches", asked)


def follow(server: Server, job: str, progress: Progress) -> Mapping[str, Any]:
    """Until it is over. A server that does not answer is waited for: the batch goes on when it is back."""
    batch = patiently(server, job)
    counts = batch["request_counts"]
    begun_s, before = time.monotonic(), counts["completed"] + counts["failed"]
    with progress.bar(job, unit_is_bytes=False) as bar:
        while batch["status"] not in OVER:
            time.sleep(POLL_S[time.monotonic() - begun_s > 10])
            batch = patiently(server, job)
            counts = batch["request_counts"]
            bar.update(counts["completed"] + counts["failed"], counts["total"])
    done, seconds = counts["completed"] + counts["failed"] - before, time.monotonic() - begun_s
    pace = f", {done} of them in {seconds:.1f} s, {done / max(seconds, 1e-9):.1f} a second" if done else ""
    progress.say(
        f"{batch['status']}: {counts['completed'] + counts['failed']} of {counts['total']} requests{pace}"
    )
    return batch


def patiently(server: Server, job: str) -> Mapping[str, Any]:
    """The batch, once the server answers. Raises ServerGone after PATIENCE_S."""
    begun_s = time.monotonic()
    while True:
        try:
            return server.get(f"/v1/batches/{job}")
        except ServerGone:
            if time.monotonic() - begun_s > PATIENCE_S:
                raise
            time.sleep(POLL_S[1])
