"""What the ranks of a deployment agree on before they meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.collectives.protocols import ANY_WAY
from strategies.offload import THREADS
from strategies.source import ModelSource
from strategies.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What every rank of every replica agrees on."""

    source: ModelSource
    spec: ModelSpec
    dtype: str
    device: str  # "cpu" or "cuda"
    format: str = ""  # of the linear layers' weights, by its name; none: the dtype
    compatible: bool = False  # transformers' own model in place of the engine's
    zero3: bool = False  # whose weights DeepSpeed's ZeRO-3 keeps in host memory
    dummy_weights: bool = False
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    threads: int = 1  # of a CPU rank
    offload: bool = False  # layers that do not fit stay in host memory
    resident_layers: int | None = None  # of each rank's, where they are offloaded; None: as many as fit
    offload_dir: Path | None = None  # on whose disk streamed layers lie; None: in host memory
    offload_io: str = THREADS  # who reads them there
    offload_kv_tokens: int = 8192  # of cache, that offloading leaves room for
    least_kv_tokens: int = 0  # of them, that it cannot do without
    host_memory_bytes: int | None = None  # of this host, for offloaded layers and KV; None: what is available
    host_kv_bytes: int = 0  # of host memory, of each rank, for KV that the device has no room for
    emulates_float8: bool = False  # where the device does not multiply it: slowly, to tell its quality
    graphs: bool = True  # decode steps as CUDA graphs, where there are any
    memory_utilization: float = 0.9  # of the device's memory, for weights, KV and everything else
    memory_cap_bytes: int | None = None  # of a GPU, for all that the process takes; in place of the share
    seed: int = 0  # of dummy weights
    join_timeout_s: float = 60.0
    grammars: bool = False  # make ready for them before the first comes
    ways: Mapping[str, int | None] = field(default_factory=lambda: dict(ANY_WAY))  # beside NCCL, see join
