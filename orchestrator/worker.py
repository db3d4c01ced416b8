"""One device's part of a replica. Rank 0 leads: it schedules and tells; the others follow. No Ray in here.

A gang hosts this class in processes of its own and calls its methods by name, in this order: `free_port` (rank 0),
`join`, `load`, `choose_attention` and `choose_products` (on a GPU), `fit_blocks`, `allocate`; then the channels are
opened and `lead` or `follow` runs until `stop`.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from cluster.channel import Address, Reader, Via, Writer
from cluster.errors import BadRequest, GangDied
from orchestrator.constraints import NO_TOKEN, Constraints
from orchestrator.engine.runner import Pending
from orchestrator.engine_config import EngineConfig
from orchestrator.grammar import Compiler
from orchestrator.rank import Rank, loops_on_its_device
from orchestrator.request import Request, Token
from orchestrator.scheduler import Load, Scheduler, SchedulerConfig
from orchestrator.step import Step, StepResult
from orchestrator.text import text_of
from strategies.plan import Shard

IDLE_WAIT_S = 0.5  # how long an idle loop blocks before it looks whether it should stop
REST_S = 40.0  # to end a step, or to see that nobody reads its tokens
_STOP = b""


class Worker(Rank):
    def __init__(self) -> None:
        super().__init__()
        self._stopping = False
        self._at_work = threading.Lock()  # held by `lead` and `follow`
        # Requests to add, ids to abort, and tokens of what ended by itself.
        self._inbox: queue.SimpleQueue[Request | str | Token] = queue.SimpleQueue()
        self._constraints = Constraints(self._compiler, self._inbox.put)
        self._steps: Writer | None = None
        self._tokens: Writer | None = None
        self._results_out: Writer | None = None  # on the last stage, where there are several
        self._results_in: Reader | None = None  # its other end, on the leader

    def join(self, config: EngineConfig, shard: Shard, init_method: str, device_index: int) -> str:
        self.config = config
        if config.grammars and shard.rank == 0:
            self._constraints.warm_up()
        return super().join(config, shard, init_method, device_index)

    # -- channels: steps go out from the leader, results come back from the last stage, tokens go to the coordinator --

    def open_steps(self, followers: Sequence[Via], interface: str) -> list[Address]:
        self._steps = Writer.create(followers, interface=interface) if followers else None
        return [self._steps.address(i) for i in range(len(followers))] if self._steps else []

    def open_results(self, via: Via, interface: str) -> Address:
        self._results_out = Writer.create([via], interface=interface)
        return self._results_out.address(0)

    def open_tokens(self, interface: str) -> Address:
        self._tokens = Writer.create([Via.SOCKET], interface=interface)
        return self._tokens.address(0)

    # -- the leader --

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.grammar is None:
                self._inbox.put(request)
            else:  # it comes to the inbox once its grammar is compiled
                self._constraints.submit(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._inbox.put(request_id)

    def _compiler(self) -> Compiler:
        spec, text = self.config.spec, text_of(self.config.source)
        if text is None:
            raise BadRequest("a grammar needs a tokenizer, and this model has none")
        return Compiler(text, spec.vocab, spec.eos_ids)

    def current_load(self) -> Load:
        return self.scheduler.load

    def stop(self) -> None:
        """End `lead`, which ends the followers."""
        self._stopping = True
        self._inbox.put("")  # wakes an idle loop; there is no such request to abort

    def rest(self) -> SchedulerConfig:
        """End `lead` or `follow` of a coordinator that is gone, and be as before. The leader first. → its limits."""
        self.stop()
        if not self._at_work.acquire(timeout=REST_S):
            raise GangDied(f"rank {self.shard.rank} did not end its step in {REST_S:g} s")
        try:
            for end in (self._steps, self._tokens, self._results_out, self._results_in):
                if end is not None:
                    end.close()
            self._steps = self._tokens = self._results_out = self._results_in = None
            self._inbox = queue.SimpleQueue()
            self._constraints = Constraints(self._compiler, self._inbox.put)
            if self.config.grammars and self.shard.rank == 0:
                self._constraints.warm_up()
            self._stopping = False
        finally:
            self._at_work.release()
        return self.limits

    @loops_on_its_device
    def lead(self, results: Address | None) -> None:
        """The main loop. `results` is the last stage's channel where there are several stages."""
        with self._at_work:
            self._lead(results)

    def _lead(self, results: Address | None) -> None:
        self.scheduler = Scheduler(self.limits)
        self._results_in = Reader.open(results) if results else None
        in_flight: deque[Pending | None] = deque()  # None: the last stage will tell
        while not self._stopping:
            self._admit(wait=not (in_flight or self.scheduler.has_work))
            step = self.scheduler.schedule() if len(in_flight) < self.limits.depth else None
            if step is not None:
                in_flight.append(self._launch(step))
            if in_flight and (step is None or len(in_flight) == self.limits.depth):
                pending = in_flight.popleft()
                result = pending.result() if pending is not None else self._collect()
                self.collectives.stage.check()
                if result is not None:
                    self._publish(result)
        self._broadcast(_STOP)

    def _admit(self, wait: bool) -> None:
        """Take what was submitted or aborted; with nothing to do, wait for it."""
        try:
            item = self._inbox.get(timeout=IDLE_WAIT_S) if wait else self._inbox.get_nowait()
            while True:
                if isinstance(item, str):
                    self._constraints.drop(item)
                    self.scheduler.abort(item)
                elif isinstance(item, Token):
                    self._tell_tokens([item])
                else:
                    self.scheduler.add(item)
                item = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _launch(self, step: Step) -> Pending | None:
        step = self._constraints.mask(step, self.scheduler.sampling_ids(step))
        if self._steps is not None:
            self._broadcast(msgspec.msgpack.encode(step))
        return self.run(step)

    def _broadcast(self, message: bytes) -> None:
        if self._steps is not None:
            self._steps.send(message)

    def _collect(self) -> StepResult | None:
        """The oldest step's tokens, from the last stage. None only when stopping."""
        assert self._results_in is not None
        while not self._stopping:
            message = self._results_in.recv(IDLE_WAIT_S)
            if message is not None:
                return msgspec.msgpack.decode(message, type=StepResult)
        return None

    def _publish(self, result: StepResult) -> None:
        tokens = self._constraints.take(self.scheduler.update(result))
        for token in tokens:
            if token.token_id == NO_TOKEN:
                self.scheduler.abort(token.request_id)
        self._tell_tokens(tokens)

    def _tell_tokens(self, tokens: Sequence[Token]) -> None:
        """Also that there are none yet: whoever waits for a long prompt sees that it goes on."""
        if self._tokens is not None:
            self._tokens.send(msgspec.msgpack.encode(tokens))

    # -- the followers --

    @loops_on_its_device
    def follow(self, steps: Address) -> None:
        """Run the leader's steps until it stops; told to stop itself, it still runs those that it was sent."""
        with self._at_work:
            self._follow(Reader.open(steps))

    def _follow(self, reader: Reader) -> None:
        with ThreadPoolExecutor(
            1
        ) as telling:  # so that the next step starts before this one's tokens are here
            told: Future[None] | None = None
            while True:
                if told is not None and told.done():
                    told.result()  # raises what telling raised
                message = reader.recv(IDLE_WAIT_S)
                if message is None:
                    if self._stopping:
                        return
                    continue
                if message == _STOP:
                    return
                pending = self.run(msgspec.msgpack.decode(message, type=Step))
                if pending is not None and self._results_out is not None:
                    told = telling.submit(self._tell, self._results_out, pending)

    def _tell(self, leader: Writer, pending: Pending) -> None:
        result = pending.result()
        self.collectives.stage.check()
        leader.send(msgspec.msgpack.encode(result))
