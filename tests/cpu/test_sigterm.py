"""SIGTERM or a hang-up under load: not ready at once, what is in flight ends, nothing new is taken, exit code 0."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx2
import pytest

from tests.hosts import PATIENCE_S, ROOT

STREAMS, TEXT, STEP_S = 50, "Hello, hello.", 0.05  # seconds in all: the signal comes in good time


async def text_of(http: httpx2.AsyncClient, started: asyncio.Semaphore) -> list[str]:
    """A stream's lines of data."""
    lines = []
    async with http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                if not lines:
                    started.release()
                lines.append(line.removeprefix("data: "))
    return lines


async def under_load(
    url: str, process: subprocess.Popen[str], how: Sequence[signal.Signals]
) -> list[list[str]]:
    """The last of the signals ends it; those before must not."""
    limits = httpx2.Limits(max_connections=2 * STREAMS)
    async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as http:
        assert (await http.get("/readyz")).status_code == 200
        started = asyncio.Semaphore(0)
        asked = [asyncio.create_task(text_of(http, started)) for _ in range(STREAMS)]
        await started.acquire()
        for number in how[:-1]:
            process.send_signal(number)
            assert (await http.get("/readyz")).status_code == 200
        process.send_signal(how[-1])
        while (await http.get("/readyz")).status_code == 200:
            pass
        assert not all(task.done() for task in asked)
        assert (await http.get("/livez")).status_code == 200
        refused = await http.post("/v1/completions", json={"prompt": "b"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        return await asyncio.gather(*asked)


@pytest.mark.parametrize(
    ("how", "nohup"),
    [([signal.SIGHUP, signal.SIGTERM], True), ([signal.SIGHUP], False)],
    ids=["SIGTERM, and nohup before", "SIGHUP"],
)
def test_told_to_end_under_load(how: Sequence[signal.Signals], nohup: bool, tmp_path: Path) -> None:
    argv = [*(["nohup"] * nohup), sys.executable, "-m", "tests.fake_server", str(tmp_path), str(STEP_S), TEXT]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = asyncio.run(
                asyncio.wait_for(under_load(process.stdout.readline().strip(), process, how), PATIENCE_S)
            )
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
    assert [lines[-1] for lines in found] == ["[DONE]"] * STREAMS
    chunks = [[json.loads(line)["choices"][0] for line in lines[:-1]] for lines in found]
    assert ["".join(chunk["text"] for chunk in one) for one in chunks] == [TEXT] * STREAMS
