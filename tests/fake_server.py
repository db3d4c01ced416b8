"""A server whose replica answers by itself, as a process: `python -m tests.fake_server DIRECTORY STEP_S [ANSWER]`.

It says where it listens on standard output. `--kept PARENT_PID DIRECTORY …` stands for a `serve` behind a keeper.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

from launch.api.batches import Batches
from launch.api.files import FileStore
from launch.api.server import serve_http
from launch.api.service import Service
from launch.bound import bound
from launch.progress import Progress
from orchestrator.coordinator import Coordinator
from tests.fakes import TalkingReplica
from tests.served_api import EOS, FACTS, LIMITS, PLAN, VOCAB, chat_text, says


async def main(root: Path, step_s: float, answer: str = "Hello", *, kept: bool = False) -> None:
    (root / "files").mkdir(exist_ok=True)
    listener = socket.create_server(("127.0.0.1", 0))
    replica = TalkingReplica(says(answer), step_s=step_s)
    async with Coordinator([replica], LIMITS, vocab=VOCAB, eos_ids=(EOS,), text=chat_text()) as coordinator:
        service = Service(coordinator, ["bytes"], PLAN, FACTS)
        files = FileStore(root / "files")
        batches = Batches(root / "batches", files, service, {"model": "bytes"})
        if not kept:
            print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        await serve_http(
            service,
            listener,
            keys=[],
            progress=Progress(quiet=not kept),
            drain_s=30,
            files=files,
            batches=batches,
        )


if __name__ == "__main__":
    if sys.argv[1] == "--kept":
        bound(int(sys.argv[2]))
        asyncio.run(main(Path(sys.argv[3]), 0.0, kept=True))
    else:
        asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]))
