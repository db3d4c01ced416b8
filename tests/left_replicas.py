"""A coordinator in somebody's cluster, to be killed: `python -m tests.left_replicas ADDRESS MODEL NAME`.

It prints the workers' pids, its start's seconds, and the answer to a prompt, all as JSON, and then answers for ever.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from cluster.actors import Cluster, Kept
from launch.progress import Progress
from launch.start import Deployment, deployment
from orchestrator.request import SamplingParams
from strategies.plan import ParallelDims
from tests.serving import options

LAYOUT, PROMPT, TOKENS, LEASE_S = "pp2dp2", [3, 1, 4, 1, 5], 24, 12.0


async def answer(found: Deployment, told: dict[str, object], asked: object) -> None:
    async with found.coordinator(asked, None) as coordinator:  # type: ignore[arg-type]
        done = [await coordinator.complete(PROMPT, SamplingParams(max_tokens=TOKENS)) for _ in range(2)]
        print(json.dumps({**told, "answers": [one.token_ids for (one,) in done]}), flush=True)
        endless = SamplingParams(max_tokens=8000, ignore_eos=True)
        while True:
            await asyncio.gather(*(coordinator.complete(PROMPT, endless) for _ in range(8)))


def main(address: str, model: str, name: str) -> None:
    asked = options(Path(model), max_model_len=None, num_blocks=4096)
    begun_s = time.monotonic()
    with (
        Cluster.connect(address, Kept(name, LEASE_S)) as cluster,
        deployment(cluster, ParallelDims.parse(LAYOUT), asked, Progress(quiet=True)) as found,
    ):
        pids = sorted(member.pid for gang in cluster._gangs for member in gang.members)
        asyncio.run(answer(found, {"pids": pids, "seconds": time.monotonic() - begun_s}, asked))


if __name__ == "__main__":
    main(*sys.argv[1:])
