"""A batch of a million lines, answered at once: memory, rate, what going on costs.

`python -m tests.bench.batch_bench`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import tempfile
import time
from pathlib import Path

from orchestrator.jobs import Answered, Job, examine
from orchestrator.journal import OUTPUT, Journal

BODY = {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}


def resident_mb() -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


async def run(path: Path, directory: Path) -> tuple[float, float, int]:
    """→ seconds, the most memory in MB, lines answered"""
    answered, most_mb = 0, 0.0

    async def answer(number: int, line: bytes) -> Answered:
        nonlocal answered, most_mb
        answered += 1
        if answered % 1000 == 0:
            most_mb = max(most_mb, resident_mb())
        await asyncio.sleep(0)
        return Answered(json.loads(line)["custom_id"], 200, {"choices": [{"text": "Because of Rayleigh."}]})

    begun_s = time.perf_counter()
    journal = Journal(directory)
    await Job(path, examine(path), journal, answer, window=512).run()
    await journal.close()
    return time.perf_counter() - begun_s, max(most_mb, resident_mb()), answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = directory / "in.jsonl"
        with path.open("w") as file:
            for i in range(lines):
                line = {
                    "custom_id": f"request-{i}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": BODY,
                }
                file.write(json.dumps(line) + "\n")
        before_mb = resident_mb()
        seconds, most_mb, answered = asyncio.run(run(path, directory))
        print(f"{answered} lines in {seconds:.1f} s, {answered / seconds:.0f} a second")
        print(f"memory {before_mb:.0f} MB before, {most_mb:.0f} MB at most")
        (directory / OUTPUT).open("ab").write(b'{"id":"batch_req_5","cus')  # a torn end
        seconds, _, answered = asyncio.run(run(path, directory))
        print(f"again: {answered} lines computed, {seconds:.1f} s")
        ids = {line.split(b'"', 4)[3] for line in (directory / OUTPUT).open("rb")}
        print(f"{len(ids)} different ids in the output")


if __name__ == "__main__":
    main()
