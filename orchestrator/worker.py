"""One device's part of a replica. Rank 0 leads: it schedules and tells; the others follow. No Ray in here.

A gang hosts this class in processes of its own and calls its methods by name, in this order: `free_port` (rank 0),
`join`, `load`, `choose_attention` and `choose_products` (on a GPU), `fit_blocks`, `allocate`; then the channels are
opened and `lead` or `follow` runs until `stop`.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import msgspec
import torch
from torch import nn

from cluster import stacks
from cluster.channel import Address, Reader, Via, Writer
from cluster.collectives.torch_dist import TorchCollectives, join
from cluster.errors import BadRequest, GangDied
from cluster.loopback import free_port
from orchestrator.constraints import NO_TOKEN, Constraints
from orchestrator.engine.checkpoint import Checkpoint, DummyCheckpoint, open_checkpoint
from orchestrator.engine.kv_cache import KVCache, block_bytes, kept_dtype
from orchestrator.engine.memory import Cap, free_for_kv, peak_of
from orchestrator.engine.offload import resident_bytes
from orchestrator.engine.residence import Residence, loaded
from orchestrator.engine.runner import Pending, Runner, StepRunner
from orchestrator.engine.slots import Slots
from orchestrator.engine_config import EngineConfig
from orchestrator.grammar import Compiler
from orchestrator.request import Request, Token
from orchestrator.scheduler import Load, Scheduler, SchedulerConfig
from orchestrator.step import Step, StepResult, whole_prompts
from orchestrator.text import text_of
from strategies import tensor
from strategies.formats import FORMATS
from strategies.overlap import Overlap
from strategies.plan import Shard

if TYPE_CHECKING:  # the module brings Triton, which not every machine has
    from orchestrator.engine.paged_attention import PromptAttention

IDLE_WAIT_S = 0.5  # how long an idle loop blocks before it looks whether it should stop
REST_S = 40.0  # to end a step, or to see that nobody reads its tokens
_STOP = b""
P = ParamSpec("P")
R = TypeVar("R")


def _on_its_device(method: Callable[Concatenate[Worker, P], R]) -> Callable[Concatenate[Worker, P], R]:
    """A thread of its own has CUDA's first device as the current one, and calls come on several threads."""

    @wraps(method)
    def call(worker: Worker, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if worker.device.type == "cuda":
            torch.cuda.set_device(worker.device)
        return method(worker, *args, **kwargs)

    return call


class Worker:
    def __init__(self) -> None:
        self._stopping = False
        self._at_work = threading.Lock()  # held by `lead` and `follow`
        self._loaded = (0, 0)
        # Requests to add, ids to abort, and tokens of what ended by itself.
        self._inbox: queue.SimpleQueue[Request | str | Token] = queue.SimpleQueue()
        self._constraints = Constraints(self._compiler, self._inbox.put)
        self._steps: Writer | None = None
        self._tokens: Writer | None = None
        self._results_out: Writer | None = None  # on the last stage, where there are several
        self._results_in: Reader | None = None  # its other end, on the leader
        self._prompt_attention: PromptAttention | None = None  # Triton's
        self._cap: Cap | None = None
        self._compatible: nn.Module | None = None  # in place of `model`
        self.runner: StepRunner

    def stacks(self) -> str:
        """Of all threads of this process: whatever else it does, unless all of it is stuck."""
        return stacks.own()

    # -- getting ready --

    def free_port(self, host: str) -> int:
        return free_port(host)

    def join(self, config: EngineConfig, shard: Shard, init_method: str, device_index: int) -> str:
        """Meet the other ranks of the replica. → how the small sums of this rank's stage go."""
        self.config, self.shard = config, shard
        stacks.arm()
        if config.grammars and shard.rank == 0:
            self._constraints.warm_up()
        on_gpu = config.device == "cuda"
        self.device = torch.device("cuda", device_index) if on_gpu else torch.device("cpu")
        if on_gpu:
            # cuDNN plans anew for every shape, and a decode's context grows at every step: 88 ms a step against 26
            # (16 sequences of Llama-3.1-8B's shape on an H100, 2026-11-22).
            torch.backends.cuda.enable_cudnn_sdp(False)
            if config.memory_cap_bytes is not None:
                self._cap = Cap(self.device, config.memory_cap_bytes)
        else:
            torch.set_num_threads(config.threads)
        backend = "nccl" if on_gpu else "gloo"
        size = shard.tp * shard.pp
        self.collectives: TorchCollectives = join(
            shard.rank,
            size,
            shard.tp,
            shard.pp,
            init_method,
            backend,
            self.device,
            config.join_timeout_s,
            ways=config.ways,
            hop_bytes=config.max_num_batched_tokens
            * config.spec.hidden
            * getattr(torch, config.dtype).itemsize,
            tokens_bytes=config.max_num_seqs * torch.int64.itemsize,
        )
        return self.collectives.stage.path

    @_on_its_device
    def load(self) -> int:
        """Read this rank's weights and apply the parallelism. → bytes of weights on this device."""
        spec, shard = self.config.spec, self.shard
        if self.config.compatible:
            from orchestrator.engine.compatible import compatible  # brings transformers' models

            self._compatible, self._residence = compatible(self.config, shard, self.device)
            return self.weight_bytes()
        free = free_for_kv(self.device, self.config.memory_utilization, self._cap)
        self.model, self._residence = loaded(
            self.config, shard, self._checkpoint(), self.device, free, self._note_loaded
        )
        if self._cap is not None:
            self._cap.hold()
        self._overlap = Overlap(self.collectives.stage)
        tensor.apply(self.model, spec, shard, self._overlap)
        return self.weight_bytes()

    def weight_bytes(self) -> int:
        return resident_bytes(self.model if self._compatible is None else self._compatible)

    def residence(self) -> Residence:
        """Of this rank's layers: all, those on the device; and bytes that come from the host at every step."""
        return self._residence

    def _note_loaded(self, done: int, total: int) -> None:
        self._loaded = done, total

    def loaded_bytes(self) -> tuple[int, int]:
        """Bytes loaded so far and in all; may be called while `load` is at work."""
        return self._loaded

    def _checkpoint(self) -> Checkpoint:
        if self.config.dummy_weights:
            return DummyCheckpoint(self.config.spec, self.device, self.config.seed)
        return open_checkpoint(self.config.source, self.config.spec)

    @_on_its_device
    def choose_attention(self) -> tuple[str, str]:
        """Time what there is for prompts on this GPU, and take the fastest. → what it is, and why."""
        config = self.config
        dtype = getattr(torch, config.dtype)
        if dtype == torch.float64:
            return "torch's SDPA", "float64 has no kernels"
        if self._compatible is not None:
            return "transformers' own", "the compatibility runtime"
        if FORMATS[config.format].has_float8_kv:
            return "Triton", "FlashInfer's kernels are not asked for a cache in float8"
        from orchestrator.engine.prefill_choice import choose  # brings Triton

        choice = choose(self.model, config.max_num_batched_tokens, config.block_size, dtype, self.device)
        self._prompt_attention = choice.prefill
        return choice.path, choice.reason

    @_on_its_device
    def choose_products(self) -> tuple[str, str]:
        """Time what there is for the linear layers on this GPU, and take the fastest. → what it is, and why."""
        if self._compatible is not None:
            return "transformers' own", "the compatibility runtime"
        from orchestrator.engine.product_choice import choose  # brings Triton

        config, alone = self.config, self.shard.tp == 1
        dtype = getattr(torch, config.dtype)
        choice = choose(self.model, config.max_num_batched_tokens, dtype, self.device, alone=alone)
        return choice.path, choice.reason

    @_on_its_device
    def fit_blocks(self) -> int:
        """KV blocks that fit beside the weights and a full batch. All ranks call it at once: the batch is run."""
        needed = self._rehearse() if self.config.device == "cuda" else 0
        dtype = kept_dtype(getattr(torch, self.config.dtype), FORMATS[self.config.format].has_float8_kv)
        whole = self.config.spec
        local = whole if self.config.zero3 else tensor.local_spec(whole, self.shard)
        block = block_bytes(local, self.config.block_size, dtype)
        if self._compatible is not None:
            block *= 3  # a cache is copied to become longer, and ended ones stay for a while
        free = free_for_kv(self.device, self.config.memory_utilization, self._cap) - needed
        return max(0, free // block - 1)  # one is scratch

    def _rehearse(self) -> int:
        """Prompts that fill the token budget, and the largest graph, with a cache of their own. → bytes they took."""
        config = self.config
        length = max(1, config.max_num_batched_tokens // config.max_num_seqs)
        prompts = [[0] * length] * min(config.max_num_seqs, config.max_num_batched_tokens)
        blocks = len(prompts) * -(-length // config.block_size)
        self.allocate(SchedulerConfig(blocks, config.block_size, config.max_num_seqs, max_model_len=length))
        graphs = self.runner.graph_bytes() if config.graphs else 0
        with peak_of(self.device) as peak:
            self.runner.run(whole_prompts(prompts, config.block_size))
        del self.runner
        return peak[0] + graphs

    @_on_its_device
    def allocate(self, limits: SchedulerConfig) -> None:
        """Make the KV cache; every rank of the replica gets the same `limits`."""
        self.limits = limits
        dtype = getattr(torch, self.config.dtype)
        slots = Slots(limits.max_num_seqs, limits.max_model_len, limits.block_size)
        if self._compatible is not None:
            from orchestrator.engine.compatible_runner import CompatibleRunner

            self.runner = CompatibleRunner(self._compatible, slots, self.shard, self.device)
            return
        cache = KVCache(
            self.model.spec,
            limits.num_blocks,
            limits.block_size,
            dtype,
            self.device,
            float8=FORMATS[self.config.format].has_float8_kv,
        )
        vocabulary = tensor.Vocabulary(self.config.spec, self.shard, self.collectives.stage)
        parts = self.model, cache, slots, self.shard, self.collectives, vocabulary
        if self.device.type == "cuda" and dtype != torch.float64:  # which is the truth, and has no kernels
            from orchestrator.engine.cuda_runner import CudaRunner

            step_tokens = self.config.max_num_batched_tokens
            self.runner = CudaRunner(*parts, self._overlap, step_tokens, self._prompt_attention)
        else:
            self.runner = Runner(*parts)

    @_on_its_device
    def capture(self) -> None:
        """Capture the decode steps as CUDA graphs. All ranks of a replica call it at once."""
        self.runner.capture()
        if self._cap is not None:
            self._cap.hold()

    @_on_its_device
    def score(self, token_ids: list[int]) -> bytes | None:
        """float32 logits after each of the tokens, [T, vocabulary], from the last stage's first rank.

        All ranks of the replica call it at once, before `lead` and `follow`.
        """
        logits = self.runner.score(token_ids)
        if logits is None or self.shard.tp_rank:
            return None
        values: bytes = logits.float().cpu().numpy().tobytes()
        return values

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

    @_on_its_device
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
        return self.runner.run(step)

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

    @_on_its_device
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
                pending = self.runner.run(msgspec.msgpack.decode(message, type=Step))
                if pending is not None and self._results_out is not None:
                    told = telling.submit(self._tell, self._results_out, pending)

    def _tell(self, leader: Writer, pending: Pending) -> None:
        result = pending.result()
        self.collectives.stage.check()
        leader.send(msgspec.msgpack.encode(result))
