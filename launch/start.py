"""From a layout to a deployment that answers: acquire, rank, load, fit, connect, serve. Reads top to bottom."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from cluster.channel import Via
from cluster.errors import GangDied
from cluster.gang import Call, Gang, Member, results
from launch.configured import JOIN_TIMEOUT_S, engine_config, layout_name, limits_for
from launch.disk_limit import check_disks, open_reads
from launch.head import adopt, check_head
from launch.links import only_proved, prove_first_layer
from launch.options import EngineOptions
from launch.placed import CALL_TIMEOUT_S, Placed, Ready, everywhere, kill_all, ranks_of, rested, terms_of
from launch.progress import Progress
from orchestrator.admission import QueueLimits
from orchestrator.coordinator import Coordinator
from orchestrator.replica import GangReplica, Watchdog
from orchestrator.scheduler import SchedulerConfig
from orchestrator.supervisor import RestartPolicy, Supervisor
from orchestrator.text import Text
from orchestrator.worker import Worker
from strategies.formats import FORMATS
from strategies.host_kv import check_block, check_room, told, useful_blocks
from strategies.offload import DEEPSPEED
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims, Shard
from strategies.published import Stored
from strategies.runnable import compatibility
from strategies.spec import Workload

ACQUIRE_TIMEOUT_S = (
    600.0  # each imports torch: seconds, but minutes from a cold network disk or on busy cores
)
LOAD_TIMEOUT_S = 3600.0  # a big model from a slow disk; a dead worker is seen long before
LOOK_S = 0.25  # between two looks at a load
STEP_TIMEOUT_S = {"cpu": 600.0, "cuda": 120.0}  # far over any step: what is slow must not be taken for stuck
LOOPBACK = "127.0.0.1"
_NO_LIMITS = QueueLimits()


@dataclass(frozen=True, slots=True)
class Deployment:
    """Replicas that serve, and what they agreed on."""

    dims: ParallelDims
    replicas: tuple[GangReplica, ...]
    limits: SchedulerConfig
    weight_bytes: tuple[int, ...]  # of each rank, replica by replica
    scored: bytes  # float32 logits after each token of `score`, [T, vocabulary], of the first replica
    restart: Callable[[int], Awaitable[GangReplica]]  # the replica of that number, whole

    def coordinator(
        self,
        options: EngineOptions,
        text: Text | None,
        queue: QueueLimits = _NO_LIMITS,
        *,
        restarts: RestartPolicy | None = None,
    ) -> Coordinator:
        """The one that these replicas will ever have: their tokens come to it, and they end when it leaves.

        `restarts`: how those that die are started again; None: they are not.
        """
        spec = options.spec
        return Coordinator(
            self.replicas,
            self.limits,
            vocab=spec.vocab,
            eos_ids=spec.eos_ids,
            text=text,
            seed=options.seed,
            queue=queue,
            supervisor=Supervisor(self.restart, restarts) if restarts is not None else None,
        )


class Devices(Protocol):
    """Where gangs come from: cluster.actors.Cluster, or a stand-in without Ray."""

    def acquire(
        self, worker_class: type, sizes: Sequence[int], device: str, *, timeout_s: float
    ) -> Sequence[Gang]:
        """Gangs of these sizes, all or none, each process with a device of its own. Raises PlacementFailed."""


@runtime_checkable
class Keeping(Devices, Protocol):
    """Devices whose gangs outlive a coordinator that is killed."""

    def left(self, terms: str) -> Sequence[Gang]:
        """Gangs that the last coordinator left, on these terms."""


@contextmanager
def cluster(options: EngineOptions, devices: int, progress: Progress) -> Iterator[Devices]:
    """The Ray cluster at the address given, or a private one that is gone at exit."""
    if options.address is not None and not options.address.startswith(
        "ray://"
    ):  # refused by who would join it
        adopt(check_head(options.address))
    from cluster.actors import Cluster, Kept

    if options.address is not None:
        progress.say(f"connecting to the Ray cluster at {options.address}")
        keeping = None if options.kept_as is None else Kept(options.kept_as)
        with Cluster.connect(options.address, keeping) as found:
            yield found
        return
    with only_proved(options, devices, progress):
        progress.say("starting a private Ray")
        slots, gpus = (devices, 0) if options.device == "cpu" else (0, None)  # None: those that are here
        with Cluster.embedded(num_cpu_devices=slots, num_gpus=gpus) as started:
            yield started


@contextmanager
def deployment(
    found: Devices,
    dims: ParallelDims,
    options: EngineOptions,
    progress: Progress,
    *,
    shards: Sequence[Shard] = (),
    score: Sequence[int] = (),
) -> Iterator[Deployment]:
    """A gang of workers for each replica, one worker a device, loaded and serving; all gone at the end.

    `shards` are a plan's, which knows how fast each device is; without them all count as equal. `score` are forced
    tokens whose logits are wanted, to compare layouts by.
    """
    # Where no plan knows better: as many at once as may be.
    most = Workload(concurrency=options.max_num_seqs)
    kept = FORMATS[options.format]
    shards = shards or shard_replica(options.spec, dims, workload=most, kept=kept)
    if options.host_kv_gb is not None:
        check_block(options.host_kv_gb, options.spec, shards, kept, options.dtype, options.block_size)
    with ExitStack() as owned:
        gangs: list[Gang] = []
        owned.callback(kill_all, gangs)
        if isinstance(found, Keeping):
            gangs += found.left(terms_of(options, dims))
        name = layout_name(options, dims)
        known = rested(gangs, dims, name, progress)
        if known is None:
            gangs.clear()
            prove_first_layer(options, dims, engine_config(options, dims), progress)
            progress.say(f"{name}: placing {dims.world_size} worker{'s' * (dims.world_size > 1)}")
            sizes = [dims.replica_size] * dims.dp
            with progress.waiting(f"{name}: starting workers"):
                gangs += found.acquire(Worker, sizes, options.device, timeout_s=ACQUIRE_TIMEOUT_S)
        placed = [Placed(gang, ranks_of(gang)) for gang in gangs]
        limits, weight_bytes, shards = known or _made_ready(placed, shards, dims, options, progress)
        scored = _score(placed[0], score) if score else b""
        restarting = Restarting(found, dims, options, shards, limits, gangs)
        yield Deployment(
            dims,
            tuple(_serve(p, shards, options) for p in placed),
            limits,
            tuple(weight_bytes),
            scored,
            restarting.restart,
        )


def _made_ready(
    placed: Sequence[Placed],
    shards: Sequence[Shard],
    dims: ParallelDims,
    options: EngineOptions,
    progress: Progress,
) -> Ready:
    name = layout_name(options, dims)
    progress.say(f"{name}: connecting its ranks")
    _join(placed, shards, dims, options, progress)
    if options.compatible:
        progress.say(f"{name}: {compatibility(options.spec)}")
    stored = options.spec.published
    if stored is not None and not FORMATS[options.format].weights:
        form = "fp8" if stored.stored is Stored.CHANNELS else stored.stored
        progress.say(f"{name}: weights are stored in {form}, and widened to {options.dtype} for good")
    elif stored is not None and options.device == "cpu" and not stored.symmetric:
        progress.say(f"{name}: 4 bits with zero points are slow on a CPU: they are widened at every step")
    if options.host_kv_gb is not None:
        _check_host_room(placed, options.host_kv_gb)
    if options.offload_dir is not None and options.offload:
        check_disks(placed, name, options, progress)
        if options.offload_io == DEEPSPEED:
            open_reads(placed, name, progress)
    weight_bytes = _load(placed, name, progress)
    if options.offload:
        _tell_residence(placed, name, progress)
    if options.device == "cuda":
        _choose_kernels(placed, name, progress)
    return Ready(_fit(placed, dims, options, progress), weight_bytes, shards)


class Restarting:
    """Replicas of a deployment once more: placed, joined, loaded and fitted as the first time."""

    def __init__(
        self,
        found: Devices,
        dims: ParallelDims,
        options: EngineOptions,
        shards: Sequence[Shard],
        limits: SchedulerConfig,
        gangs: list[Gang],
    ) -> None:
        """`gangs` are the deployment's, by replica: new ones take their places."""
        self._found, self._dims, self._options, self._shards = found, dims, options, shards
        self._limits, self._gangs = limits, gangs
        self._placing = threading.Lock()  # one at a time: each looks for what is free

    async def restart(self, number: int) -> GangReplica:
        """Cancelled, it returns once nothing is under way any more: Ray must not be left while a thread calls it."""
        unwanted = threading.Event()
        work = asyncio.ensure_future(asyncio.to_thread(self._start, number, unwanted))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            unwanted.set()
            self._gangs[number].kill()
            await asyncio.wait({work})
            if not work.cancelled():
                work.exception()
            raise

    def _start(self, number: int, unwanted: threading.Event) -> GangReplica:
        """In a thread of its own. Raises ShardwiseError."""
        self._gangs[number].kill()
        dims, options, quiet = self._dims, self._options, Progress(quiet=True)
        with self._placing:
            if unwanted.is_set():
                raise GangDied("nobody wants it any more")
            (gang,) = self._found.acquire(
                Worker, [dims.replica_size], options.device, timeout_s=ACQUIRE_TIMEOUT_S
            )
        self._gangs[number] = gang
        if unwanted.is_set():  # else whoever sets it kills the gang, which ends what follows
            gang.kill()
        placed, name = [Placed(gang, ranks_of(gang))], layout_name(options, dims)
        try:
            _join(placed, self._shards, dims, options, quiet)
            _load(placed, name, quiet)
            if options.device == "cuda":
                _choose_kernels(placed, name, quiet)
            _fit(placed, dims, options, quiet, as_before=self._limits)
            return _serve(placed[0], self._shards, options)
        except BaseException:
            gang.kill()
            raise


def _join(
    placed: Sequence[Placed],
    shards: Sequence[Shard],
    dims: ParallelDims,
    options: EngineOptions,
    progress: Progress,
) -> None:
    """Each replica's ranks meet; how a stage's small sums go is told where it has several ranks."""
    config = engine_config(options, dims)
    calls: list[Call] = []
    for replica in placed:
        host = _host(replica)
        port = replica.call(0, "free_port", host).result(CALL_TIMEOUT_S)
        for rank, shard in enumerate(shards):
            device = replica.member(rank).device
            calls.append(replica.call(rank, "join", config, shard, f"tcp://{host}:{port}", device))
    paths = results(calls, JOIN_TIMEOUT_S + CALL_TIMEOUT_S)
    if dims.tp > 1:
        for path in dict.fromkeys(paths):
            progress.say(f"{layout_name(options, dims)}: small sums through {path}")


def _host(replica: Placed) -> str:
    """Where the replica's sockets listen: nowhere but on this host, unless its ranks are on several."""
    several = len({m.node_id for m in replica.gang.members}) > 1
    return replica.member(0).node if several else LOOPBACK


def _check_host_room(placed: Sequence[Placed], gb: float) -> None:
    """Every host has room for the KV of its ranks. Raises BadLayout."""
    ranks_on = Counter(m.node_id for replica in placed for m in replica.gang.members)
    asked = {m.node_id: (replica, m) for replica in placed for m in replica.gang.members}
    for node_id, (replica, member) in asked.items():
        available = replica.gang.call(member.index, "host_bytes").result(CALL_TIMEOUT_S)
        check_room(gb, ranks_on[node_id], available, member.node)


def _load(placed: Sequence[Placed], name: str, progress: Progress) -> list[int]:
    """All ranks load at once; the bar shows the bytes of all."""
    calls = everywhere(placed, "load")
    with progress.bar(f"{name}: loading weights") as bar:
        while not all(call.wait(LOOK_S) for call in calls):
            parts = results(everywhere(placed, "loaded_bytes"), CALL_TIMEOUT_S)
            bar.update(sum(done for done, _ in parts), sum(total for _, total in parts))
    return results(calls, CALL_TIMEOUT_S)


def _tell_residence(placed: Sequence[Placed], name: str, progress: Progress) -> None:
    """One line for all ranks that have the same."""
    for found in dict.fromkeys(results(everywhere(placed, "residence"), CALL_TIMEOUT_S)):
        progress.say(f"{name}: {found.told}")


def _choose_kernels(placed: Sequence[Placed], name: str, progress: Progress) -> None:
    """Every rank times its own GPU; one line each, unless they choose differently."""
    for what in ("attention", "products"):
        chosen = results(everywhere(placed, f"choose_{what}"), LOAD_TIMEOUT_S)
        for path, reason in dict(reversed(chosen)).items():  # the first rank's reason
            progress.say(f"{name}: {what} by {path}: {reason}")


def _fit(
    placed: Sequence[Placed],
    dims: ParallelDims,
    options: EngineOptions,
    progress: Progress,
    *,
    as_before: SchedulerConfig | None = None,
) -> SchedulerConfig:
    """KV blocks that every rank can hold, the context that they allow, and the cache itself.

    `as_before`: what the other replicas have; there may be some blocks fewer now, but the context must fit.
    """
    name = layout_name(options, dims)
    progress.say(f"{name}: sizing the KV cache")
    blocks = min(results(everywhere(placed, "fit_blocks"), LOAD_TIMEOUT_S))
    if as_before is None:
        limits = limits_for(blocks, dims, options)
    else:
        least = replace(options, max_model_len=as_before.max_model_len)
        limits = limits_for(min(blocks, as_before.num_blocks), dims, least)
        limits = replace(limits, host_blocks=as_before.host_blocks)
    if options.host_kv_gb is not None and as_before is None:
        rooms = results(everywhere(placed, "host_room"), CALL_TIMEOUT_S)
        limits = replace(limits, host_blocks=useful_blocks(rooms))
        progress.say(f"{name}: {told(rooms, options.block_size)}")
    results(everywhere(placed, "allocate", limits), LOAD_TIMEOUT_S)  # locking host memory: 5 GB/s and less
    if options.device == "cuda" and options.captures:
        progress.say(f"{name}: capturing decode steps as CUDA graphs")
        results(everywhere(placed, "capture"), LOAD_TIMEOUT_S)
    return limits


def _score(replica: Placed, token_ids: Sequence[int]) -> bytes:
    found = results(everywhere([replica], "score", list(token_ids)), CALL_TIMEOUT_S)
    return b"".join(part for part in found if part is not None)


def _serve(replica: Placed, shards: Sequence[Shard], options: EngineOptions) -> GangReplica:
    """Open the channels and set the loops going, until the gang is killed."""
    host, leader = _host(replica), replica.member(0)
    followers = [replica.member(rank) for rank in range(1, len(shards))]
    steps = replica.call(0, "open_steps", [_via(leader, m) for m in followers], host).result(CALL_TIMEOUT_S)
    last = next(rank for rank, shard in enumerate(shards) if shard.is_last)
    sampled = None
    if last:
        member = replica.member(last)
        listening = host if host == LOOPBACK else member.node
        sampled = replica.call(last, "open_results", _via(leader, member), listening).result(CALL_TIMEOUT_S)
    tokens = replica.call(0, "open_tokens", leader.node).result(CALL_TIMEOUT_S)
    loops = [replica.call(rank, "follow", address) for rank, address in enumerate(steps, start=1)]
    loops.append(replica.call(0, "lead", sampled))
    silence_s = options.step_timeout_s or STEP_TIMEOUT_S[options.device]
    watchdog = Watchdog(silence_s, Path(tempfile.gettempdir()))
    return GangReplica(replica.gang, leader.index, tokens, loops, watchdog)


def _via(a: Member, b: Member) -> Via:
    return Via.MEMORY if a.node_id == b.node_id else Via.SOCKET
