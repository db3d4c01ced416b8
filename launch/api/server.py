"""Runs the application until it is told to stop: readiness goes first, then what is in flight ends, then we leave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import signal
import socket
from collections.abc import Generator, Iterator, Sequence

import uvicorn

from launch.api.app import create_app
from launch.api.batches import Batches
from launch.api.connection import BoundedConnection
from launch.api.files import FileStore
from launch.api.service import Service
from launch.outputs import hung_up
from launch.progress import Progress

KEEP_ALIVE_S = 75  # longer than a load balancer's 60: else it sends into a connection that we are closing
LAST_WRITES_S = 5.0  # for answers that are finished and not yet read
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """They are ours."""
        yield


async def serve_http(
    service: Service,
    listener: socket.socket,
    *,
    keys: Sequence[str],
    progress: Progress,
    drain_s: float,
    access_log: bool = False,
    files: FileStore | None = None,
    batches: Batches | None = None,
    takes_signals: bool = True,
) -> None:
    """Returns once everything in flight has ended, `drain_s` after the first of our signals at the latest."""
    # Else a connection's second answer has its first token 40 ms late: Nagle waits for the client's delayed ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    host, port = listener.getsockname()[:2]
    is_loopback = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    config = uvicorn.Config(
        create_app(service, keys=keys, loopback_only=is_loopback, files=files, batches=batches),
        http=BoundedConnection,
        lifespan="off",
        log_level="warning" if not access_log else "info",
        access_log=access_log,
        server_header=False,
        proxy_headers=False,  # nobody is believed who says that he speaks for another
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_WRITES_S,  # type: ignore[arg-type]  # any number will do
    )
    config.load()  # imports what it needs
    gc.collect()
    gc.freeze()  # all that was made so far stays: to look through it takes tenths of a second, amid answers
    server = _Server(config)
    stopping = asyncio.Event()
    with _signals(stopping) if takes_signals else contextlib.nullcontext():
        if batches is not None:
            batches.resume()  # before a request can come: else a batch of this very moment would be begun twice
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        shown = f"[{host}]" if ":" in host else host
        progress.say(f"serving {service.name} on http://{shown}:{port}")
        asked = asyncio.create_task(stopping.wait())
        await asyncio.wait({asked, serving}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not serving.done():
            await _drain(service, stopping, progress, drain_s)
            if batches is not None:
                await batches.stop()
            server.should_exit = True
        await serving


async def _drain(service: Service, stopping: asyncio.Event, progress: Progress, drain_s: float) -> None:
    """Until nothing is open, time is over, or somebody asks again."""
    coordinator = service.coordinator
    coordinator.drain()
    stopping.clear()
    if coordinator.open_requests:
        progress.say(
            f"stopping: {coordinator.open_requests} requests in flight, at most {drain_s:g} s for them"
        )
    waits = {asyncio.create_task(coordinator.idle()), asyncio.create_task(stopping.wait())}
    await asyncio.wait(waits, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if coordinator.open_requests:
        progress.say(f"stopping: {coordinator.open_requests} requests are cut off")


@contextlib.contextmanager
def _signals(stopping: asyncio.Event) -> Iterator[None]:
    """They set `stopping`, but for a hang-up that is ignored, as under nohup; afterwards they do what they did."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def stop(number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            hung_up()
        stopping.set()

    for number in before:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
