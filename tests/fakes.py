"""Stand-ins for what is slow or rare: each satisfies the same Protocol as the real one."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from cluster.errors import GangDied
from cluster.gang import Answer, Call, Fate, Member, attempt, failed, obituary, read_last_words
from cluster.life import machine
from orchestrator.request import FinishReason, Request, Token
from orchestrator.scheduler import Load

START_TIMEOUT_S = 180.0


class FakeReplica:
    """orchestrator.replica.Replica, whose tokens and whose death a test puts in by hand."""

    def __init__(self) -> None:
        self.submitted: asyncio.Queue[Request] = asyncio.Queue()
        self.calls: list[int] = []  # of `submit`: how many requests each brought
        self.aborted: asyncio.Queue[str] = asyncio.Queue()
        self._steps: asyncio.Queue[list[Token] | Exception] = asyncio.Queue()

    async def submit(self, requests: Sequence[Request]) -> None:
        self.calls.append(len(requests))
        for request in requests:
            self.submitted.put_nowait(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.aborted.put_nowait(request_id)

    async def steps(self) -> AsyncIterator[list[Token]]:
        while True:
            step = await self._steps.get()
            if isinstance(step, Exception):
                raise step
            yield step

    async def load(self) -> Load:
        return Load(0, self.submitted.qsize(), 0, 0, 0)

    def say(self, request: Request, *token_ids: int, end: FinishReason | None = None) -> None:
        """A token a step; the last one with the reason to `end`, if there is one."""
        for i, token_id in enumerate(token_ids, 1):
            self._steps.put_nowait([Token(request.id, token_id, end if i == len(token_ids) else None)])

    def die(self, error: Exception) -> None:
        self._steps.put_nowait(error)


class ProcessGang:
    """A gang of plain processes on this host: cluster.gang.Gang without Ray, ready in a tenth of the time."""

    def __init__(
        self, worker_class: type, count: int, *, threads: int = 1, gpus: Sequence[int] | None = None
    ) -> None:
        """`gpus` are the members' devices, of those that this process sees; None: the members see none."""
        self._logs = Path(tempfile.mkdtemp(prefix="shardwise-gang-"))
        self._fate = Fate()
        self._lock = threading.Lock()  # of what follows, and of the pipes' sending side
        self._calls: dict[int, Call] = {}
        self._next_call = 0
        self._reaping = threading.Lock()  # one thread at a time may wait for the processes
        spawn = multiprocessing.get_context("spawn")
        pipes = [spawn.Pipe() for _ in range(count)]
        environment = {"OMP_NUM_THREADS": str(threads)}
        if gpus is None:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._processes = [
            spawn.Process(target=_host, args=(theirs, str(self._log(i)), environment), daemon=True)
            for i, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()
        self._pipes = [ours for ours, _ in pipes]
        self._members = tuple(
            Member(
                i,
                "127.0.0.1",
                "local",
                process.pid or 0,
                gpus[i] if gpus else 0,
                str(self._log(i)),
                machine(),
            )
            for i, process in enumerate(self._processes)
        )
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            for started in [self._ask(i, worker_class) for i in range(count)]:
                started.result(START_TIMEOUT_S)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> ProcessGang:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def members(self) -> tuple[Member, ...]:
        return self._members

    def call(self, index: int, method: str, *args: object) -> Call:
        return self._ask(index, method, *args)

    def call_all(self, method: str, per_member_args: Sequence[Sequence[object]] | None = None) -> list[Call]:
        given = per_member_args or [()] * len(self._members)
        return [self.call(i, method, *args) for i, args in enumerate(given)]

    async def died(self) -> GangDied:
        return await self._fate.died()

    def watch(self, on_death: Callable[[GangDied], None]) -> None:
        self._fate.watch(on_death)

    def kill(self) -> None:
        first = self._fate.claim()
        self._reap()
        if first:
            self._fate.end(GangDied(f"the gang of {len(self._members)} was stopped"))
        shutil.rmtree(self._logs, ignore_errors=True)

    def _reap(self) -> None:
        with self._reaping:
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.join()

    def _log(self, index: int) -> Path:
        return self._logs / f"{index}.err"

    def _ask(self, index: int, what: str | type, *args: object) -> Call:
        """Send a method's name, or first of all the class to host."""
        call = Call(self._members[index], what if isinstance(what, str) else what.__name__)
        if not self._fate.begin(call):
            return call
        with self._lock:
            number, self._next_call = self._next_call, self._next_call + 1
            self._calls[number] = call
            with contextlib.suppress(OSError):  # it is dead: the listener finds out how
                self._pipes[index].send((number, what, args))
        return call

    def _listen(self) -> None:
        """Hand answers to their calls, until a process ends."""
        sentinels = {process.sentinel: i for i, process in enumerate(self._processes)}
        while True:
            ready = wait([*self._pipes, *sentinels])
            dead = next((sentinels[item] for item in ready if isinstance(item, int)), None)
            if dead is not None:
                self._bury(dead)
                return self._close()
            for pipe in ready:
                assert isinstance(pipe, Connection)
                self._take_answer(pipe)

    def _take_answer(self, pipe: Connection) -> None:
        try:
            number, answer = pipe.recv()
        except (EOFError, OSError):  # its process is ending: the sentinel follows
            return
        with self._lock:
            call = self._calls.pop(number)
        self._fate.answer(call, answer)

    def _bury(self, index: int) -> None:
        if not self._fate.claim():
            return
        process, member = self._processes[index], self._members[index]
        with self._reaping:
            process.join()
        words = read_last_words(member.log) or ""
        self._reap()
        self._fate.end(obituary(member, _how(process.exitcode or 0), words))

    def _close(self) -> None:
        """Give the descriptors of ended processes back, however long somebody remembers the gang."""
        self._reap()
        with self._reaping, self._lock:
            for process in self._processes:
                process.close()
            for pipe in self._pipes:
                pipe.close()
            self._processes = []


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _host(pipe: Connection, log: str, environment: dict[str, str]) -> None:
    """A process of the gang: a thread for each call, answers in the order in which they come."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    lock = threading.Lock()
    number, worker_class, _ = pipe.recv()  # imports the class's module, after the environment is set
    made = attempt(worker_class)
    pipe.send((number, Answer(None, made.failure)))

    def work(number: int, method: str, args: Sequence[object]) -> None:
        answer = attempt(lambda: getattr(made.value, method)(*args))
        with lock:
            try:
                pipe.send((number, answer))
            except (TypeError, AttributeError, ValueError) as error:  # a value that cannot be sent
                pipe.send((number, failed(error)))

    while True:
        try:
            threading.Thread(target=work, args=pipe.recv(), daemon=True).start()
        except EOFError:  # the owner is gone, however it went
            os._exit(0)


class TalkingReplica:
    """orchestrator.replica.Replica that answers by itself: a step gives each of its requests the next token."""

    def __init__(
        self, reply: Callable[[Request], Sequence[int]], *, step_s: float = 0.0, max_num_seqs: int = 256
    ) -> None:
        """`reply` are an answer's tokens; it ends before, where max_tokens says so."""
        self._reply, self._step_s, self._max_num_seqs = reply, step_s, max_num_seqs
        self._requests: dict[str, tuple[Request, list[int]]] = {}  # and what is left to say, backwards
        self._work = asyncio.Event()
        self.aborted: list[str] = []

    async def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            said = list(self._reply(request))[: request.sampling.max_tokens]
            self._requests[request.id] = request, said[::-1]
        self._work.set()

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)
            self.aborted.append(request_id)

    async def steps(self) -> AsyncIterator[list[Token]]:
        while True:
            await self._work.wait()
            await asyncio.sleep(self._step_s)
            running = list(self._requests.values())[: self._max_num_seqs]
            yield [self._next(*one) for one in running]
            if not self._requests:
                self._work.clear()

    def _next(self, request: Request, left: list[int]) -> Token:
        token_id, reason = left.pop(), None
        if not left:
            del self._requests[request.id]
            reason = FinishReason.STOP if token_id in request.stop_ids else FinishReason.LENGTH
        return Token(request.id, token_id, reason)

    async def load(self) -> Load:
        running = min(len(self._requests), self._max_num_seqs)
        return Load(len(self._requests) - running, running, 8, 0, 0, 96, 48, 5, 3)
