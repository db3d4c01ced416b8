"""One device's share of a model, made ready to run steps. No Ray in here, and no loops: those are worker.py's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from cluster import catalog, stacks
from cluster.collectives.torch_dist import TorchCollectives, join
from cluster.discover import cpu_topology, read_cpu
from cluster.loopback import free_port
from orchestrator.engine.checkpoint import Checkpoint, DummyCheckpoint, open_checkpoint
from orchestrator.engine.host_cache import HostCache, buffer_bytes
from orchestrator.engine.host_memory import rate_to
from orchestrator.engine.kv_cache import KVCache, block_bytes, kept_dtype
from orchestrator.engine.memory import Cap, available_host_bytes, free_for_kv, free_for_weights, peak_of
from orchestrator.engine.offload import resident_bytes
from orchestrator.engine.residence import DiskRoom, Residence, disk_room, loaded
from orchestrator.engine.runner import Pending, Runner, StepRunner
from orchestrator.engine.slots import Slots
from orchestrator.engine_config import EngineConfig
from orchestrator.scheduler import SchedulerConfig
from orchestrator.step import Step, whole_prompts
from strategies import tensor
from strategies.formats import FORMATS
from strategies.host_kv import HostRoom, block_flops
from strategies.overlap import Overlap
from strategies.plan import Shard

if TYPE_CHECKING:  # the module brings Triton, which not every machine has
    from orchestrator.engine.paged_attention import PromptAttention

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Rank")


def loops_on_its_device(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A thread of its own has CUDA's first device as the current one, and calls come on several threads."""

    @wraps(method)
    def call(rank: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if rank.device.type == "cuda":
            torch.cuda.set_device(rank.device)
        return method(rank, *args, **kwargs)

    return call


def on_its_device(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """The same, and on a CPU by a thread that ends with the call.

    OpenMP's threads stay with whoever wanted them first. While there are more than cores, libgomp lets them sleep as
    soon as a product is done, and each of the loop's products waits for one to wake: a step of four sequences of
    SmolLM2 took 60 ms where it takes 43 (two cores, AMD EPYC, 2026-11-23).
    """
    on_this_thread = loops_on_its_device(method)

    @wraps(method)
    def call(rank: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if rank.device.type == "cuda":
            return on_this_thread(rank, *args, **kwargs)
        with ThreadPoolExecutor(1) as brief:
            return brief.submit(method, rank, *args, **kwargs).result()

    return call


class Rank:
    """Its methods are called in this order: `join`, `load`, `choose_attention` and `choose_products` (on a GPU),
    `fit_blocks`, `allocate`, `capture`."""

    config: EngineConfig
    shard: Shard
    device: torch.device
    collectives: TorchCollectives
    limits: SchedulerConfig
    runner: StepRunner

    def __init__(self) -> None:
        self._loaded = (0, 0)
        self._prompt_attention: PromptAttention | None = None  # Triton's
        self._cap: Cap | None = None
        self._compatible: nn.Module | None = None  # in place of `model`
        self._host_cache: HostCache | None = None

    def stacks(self) -> str:
        """Of all threads of this process: whatever else it does, unless all of it is stuck."""
        return stacks.own()

    def free_port(self, host: str) -> int:
        return free_port(host)

    def join(self, config: EngineConfig, shard: Shard, init_method: str, device_index: int) -> str:
        """Meet the other ranks of the replica. → how the small sums of this rank's stage go."""
        self.config, self.shard = config, shard
        stacks.arm()
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
        self.collectives = join(
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

    def its_shard(self) -> Shard:
        return self.shard

    @on_its_device
    def load(self) -> int:
        """Read this rank's weights and apply the parallelism. → bytes of weights on this device."""
        spec, shard = self.config.spec, self.shard
        if self.config.compatible:
            from orchestrator.engine.compatible import compatible  # brings transformers' models

            self._compatible, self._residence = compatible(self.config, shard, self.device)
            return self.weight_bytes()
        free = free_for_weights(self.device, self.config.memory_utilization, self._cap)
        self.model, self._residence = loaded(
            self.config, shard, self._checkpoint(), self.device, free, self._note_loaded
        )
        if self._cap is not None:
            self._cap.hold()
        self._overlap = Overlap(self.collectives.stage)
        tensor.apply(self.model, spec, shard, self._overlap)
        return self.weight_bytes()

    @on_its_device
    def disk_room(self, timed: bool) -> DiskRoom:
        """Before `load`: what this rank will keep in the folder for offloaded layers, and what is there."""
        free = free_for_weights(self.device, self.config.memory_utilization, self._cap)
        return disk_room(self.config, self.shard, self.device, free, timed=timed)

    def open_reads(self) -> str:
        """Before `load`: makes DeepSpeed's asynchronous I/O ready. → why it cannot be, or nothing."""
        from orchestrator.engine.deepspeed_io import opened

        return opened()[1]

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

    @on_its_device
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

    @on_its_device
    def choose_products(self) -> tuple[str, str]:
        """Time what there is for the linear layers on this GPU, and take the fastest. → what it is, and why."""
        if self._compatible is not None:
            return "transformers' own", "the compatibility runtime"
        from orchestrator.engine.product_choice import choose  # brings Triton

        config, alone = self.config, self.shard.tp == 1
        dtype = getattr(torch, config.dtype)
        choice = choose(self.model, config.max_num_batched_tokens, dtype, self.device, alone=alone)
        return choice.path, choice.reason

    @on_its_device
    def fit_blocks(self) -> int:
        """KV blocks that fit beside the weights and a full batch. All ranks call it at once: the batch is run."""
        needed = self._rehearse() if self.config.device == "cuda" else 0
        block = self._block_bytes()
        if self.config.host_kv_bytes:
            needed += buffer_bytes(block)
        if self._compatible is not None:
            block *= 3  # a cache is copied to become longer, and ended ones stay for a while
        free = free_for_kv(self.device, self.config.memory_utilization, self._cap) - needed
        return max(0, free // block - 1)  # one is scratch

    def _block_bytes(self) -> int:
        dtype = kept_dtype(getattr(torch, self.config.dtype), FORMATS[self.config.format].has_float8_kv)
        whole = self.config.spec
        local = whole if self.config.zero3 else tensor.local_spec(whole, self.shard)
        return block_bytes(local, self.config.block_size, dtype)

    def host_bytes(self) -> int:
        """That may be locked on this rank's host."""
        return self.config.host_memory_bytes or min(available_host_bytes(), read_cpu().memory_bytes)

    @on_its_device
    def host_room(self) -> HostRoom:
        """What this rank's host memory for KV is good for. All ranks call it at once: some share a link."""
        config, block = self.config, self._block_bytes()
        if self.device.type == "cuda":
            sheet = catalog.find(torch.cuda.get_device_name(self.device))
            rates = {} if sheet is None else sheet.flops_per_s
        else:
            rates = cpu_topology(1).devices[0].flops_per_s
        return HostRoom(
            config.host_kv_bytes // block,
            block,
            rate_to(self.device),
            max(rates.values(), default=None),
            block_flops(config.spec, self.shard, config.block_size),
        )

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

    @on_its_device
    def allocate(self, limits: SchedulerConfig) -> None:
        """Make the KV cache; every rank of the replica gets the same `limits`."""
        self.limits = limits
        self._host_cache = None  # its memory goes before other is taken
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
        if limits.host_blocks:
            self._host_cache = HostCache(cache, limits.host_blocks)

    @on_its_device
    def capture(self) -> None:
        """Capture the decode steps as CUDA graphs. All ranks of a replica call it at once."""
        self.runner.capture()
        if self._cap is not None:
            self._cap.hold()

    def run(self, step: Step) -> Pending | None:
        """Starts a step, after the copies that come with it."""
        if self._host_cache is not None:
            self._host_cache.move(step)
        return self.runner.run(step)

    @on_its_device
    def score(self, token_ids: list[int]) -> bytes | None:
        """float32 logits after each of the tokens, [T, vocabulary], from the last stage's first rank.

        All ranks of the replica call it at once, before `lead` and `follow`.
        """
        logits = self.runner.score(token_ids)
        if logits is None or self.shard.tp_rank:
            return None
        values: bytes = logits.float().cpu().numpy().tobytes()
        return values
