"""Round trips over the channel, and what an idle reader costs: `python -m tests.bench.channel_bench`.

One round: the writer sends to every reader and reader 0 answers: a step from the leader to its ranks and
back.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time

from rich.console import Console
from rich.table import Table

from cluster.channel import Address, Reader, Via, Writer

ROUNDS = 2000
IDLE_S = 2.0


def follow(address: Address, answers: bool, conn) -> None:
    reader = Reader.open(address)
    back = Writer.create([Via.MEMORY if address.url.startswith("memory") else Via.SOCKET])
    conn.send(back.address(0))
    while message := reader.recv(timeout_s=60.0):
        if answers:
            back.send(message)
    before = time.process_time()
    reader.recv(timeout_s=IDLE_S)
    conn.send(time.process_time() - before)
    reader.close()
    back.close()


def measure(via: Via, readers: int, message_bytes: int) -> tuple[float, float, float]:
    """Median and 99th percentile of a round trip in µs, and the share of a core that an idle reader takes."""
    spawn = multiprocessing.get_context("spawn")
    writer = Writer.create([via] * readers)
    pipes = [spawn.Pipe() for _ in range(readers)]
    gang = [
        spawn.Process(target=follow, args=(writer.address(i), i == 0, pipes[i][1])) for i in range(readers)
    ]
    for process in gang:
        process.start()
    addresses = [mine.recv() for mine, _ in pipes]
    back = Reader.open(addresses[0])
    message = os.urandom(message_bytes)
    rounds_s = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        writer.send(message)
        if back.recv(timeout_s=60.0) != message:
            raise RuntimeError("the answer is not what was sent")
        rounds_s.append(time.perf_counter() - start)
    writer.send(b"")
    idle_s = max(mine.recv() for mine, _ in pipes)
    for process in gang:
        process.join()
    writer.close()
    back.close()
    percentiles = statistics.quantiles(rounds_s[ROUNDS // 10 :], n=100)
    return percentiles[49] * 1e6, percentiles[98] * 1e6, idle_s / IDLE_S


def main() -> None:
    table = Table("channel", "readers", "message", "round trip p50", "p99", "idle reader")
    for via in Via:
        for readers, message_bytes in ((1, 200), (1, 20_000), (1, 1_000_000), (3, 2000), (7, 2000)):
            p50_us, p99_us, idle = measure(via, readers, message_bytes)
            table.add_row(
                via,
                str(readers),
                f"{message_bytes} B",
                f"{p50_us:.0f} µs",
                f"{p99_us:.0f} µs",
                f"{idle:.2%} of a core",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
