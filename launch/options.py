"""Flags that `generate` and `compare` share, and what they come to. Spelled as vLLM spells them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import BadLayout, UserError
from launch.machine import peers_allowed
from launch.memory import add_memory_arguments, check_device_memory
from launch.models import resolve
from launch.option_checks import check_address, check_compatible, check_offload, check_sizes
from launch.progress import tell_torch
from strategies.formats import FORMATS, PLAIN
from strategies.host_kv import check_asked
from strategies.offload import DEEPSPEED, THREADS
from strategies.plan import Layout, ParallelDims
from strategies.quantize import as_kept, can_remake, kept_on, native, or_native
from strategies.runnable import check_layout, is_known
from strategies.source import ModelSource, spec_of
from strategies.spec import BYTES_PER_ELEMENT, ModelSpec

LEAST_CONTEXT = 512  # tokens: where nobody asked for a context, less is no use


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the user asked of the engine, checked; None where they left it to us."""

    source: ModelSource
    spec: ModelSpec
    device: str  # cpu or cuda
    dtype: str
    dummy_weights: bool
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int | None  # of the KV cache; None: what fits
    prefix_caching: bool
    seed: int
    address: str | None  # of a Ray cluster; None: a private one
    peer_access: bool  # False: NCCL_P2P_DISABLE is set
    gpu_memory_utilization: float = 0.9  # of each GPU's memory: weights, KV and everything else
    enforce_eager: bool = False  # no CUDA graphs
    grammars: bool = False  # answers will be asked to have a form
    compatible: bool = False  # transformers' own model, under the compatibility runtime
    zero3: bool = False  # under which DeepSpeed keeps all weights in host memory
    format: str = ""  # that linear layers' weights are kept in, by its name; none: the dtype
    offload: bool = False  # layers that do not fit stay in host memory
    offload_dir: Path | None = None  # a disk's, on which they lie instead
    offload_io: str = THREADS  # who reads them there
    disk_bytes_per_s: float | None = None  # that it reads, where somebody looked
    resident_layers: int | None = None  # of each rank's, offloaded; None: as many as fit
    device_memory_gb: float | None = None  # of each GPU, for all that a process takes; None: the share above
    host_memory_gb: float | None = None  # of each host, for offloaded weights and KV; None: what is available
    offload_kv_tokens: int | None = None  # of cache, that offloading leaves room for; None: see configured.py
    host_kv_gb: float | None = None  # of host memory, of each rank, for KV that its device has no room for
    kept_as: str | None = (
        None  # the name by which the next coordinator finds the replicas of one that was killed
    )
    step_timeout_s: float | None = None  # a replica that needs longer for one is stuck; None: by device

    @property
    def captures(self) -> bool:
        """Whether decode steps are CUDA graphs, where there are any: a graph cannot wait for a disk."""
        return not self.enforce_eager and not self.compatible and self.offload_dir is None

    @property
    def most_context(self) -> int:
        """Tokens that a sequence may have at most, whatever the memory turns out to hold."""
        most = self.max_model_len or self.spec.max_positions
        return most if self.num_blocks is None else min(most, self.num_blocks * self.block_size)

    @property
    def least_context(self) -> int:
        """Tokens that a replica must have room for: the context asked for, or what is of some use."""
        return self.max_model_len or min(LEAST_CONTEXT, self.spec.max_positions)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a directory, a .gguf file, a built-in name, or smollm2"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one"
    )
    engine.add_argument(
        "--dtype",
        choices=("auto", *BYTES_PER_ELEMENT),
        default="auto",
        help="default: float32 on cpu (bfloat16 with weights in fewer bits), half precision on cuda",
    )
    engine.add_argument(
        "--weights",
        choices=("checkpoint", "dummy"),
        default="checkpoint",
        help="dummy: random, from the config alone",
    )
    engine.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="context length in tokens; default: the model's, or what fits",
    )
    engine.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="sequences at once (256)")
    engine.add_argument(
        "--max-num-batched-tokens", type=int, default=2048, metavar="N", help="tokens a step (2048)"
    )
    engine.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens a KV block (16)")
    engine.add_argument(
        "--num-gpu-blocks-override", type=int, metavar="N", help="KV blocks; default: what fits"
    )
    engine.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of each GPU's memory, that weights, KV and the rest may take (0.9)",
    )
    add_memory_arguments(engine)
    engine.add_argument(
        "--offload-dir",
        type=_folder,
        metavar="FOLDER",
        help="where what +offload does not keep on the device lies on a disk, in place of host memory",
    )
    engine.add_argument(
        "--offload-io",
        choices=(THREADS, DEEPSPEED),
        help="who reads from there: threads (default), or DeepSpeed's asynchronous I/O, which wants libaio's headers "
        "to be compiled at its first use",
    )
    engine.add_argument(
        "--resident-layers",
        type=int,
        metavar="N",
        help="of each rank's layers, that stay on the device with +offload; default: as many as fit",
    )
    engine.add_argument(
        "--host-kv-gb",
        type=float,
        metavar="GB",
        help="of host memory, of each rank, for KV blocks that its device has no room for: they come back from there",
    )
    engine.add_argument(
        "--step-timeout",
        type=float,
        metavar="S",
        help="a replica that has work and makes no step for so long is stuck: its stacks are saved, and it is killed; "
        "default: 120 on GPUs, 600 on CPUs",
    )
    engine.add_argument(
        "--enforce-eager", action="store_true", help="launch every kernel by itself: no CUDA graphs"
    )
    engine.add_argument(
        "--no-enable-prefix-caching", action="store_true", help="compute every prompt from its start"
    )
    engine.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of dummy weights, and of requests that give none"
    )
    engine.add_argument(
        "--address", metavar="HOST:PORT", help="an existing Ray cluster; default: a private one, gone at exit"
    )


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    layouts = parser.add_argument_group("layout")
    layouts.add_argument(
        "--layout",
        metavar="NAME",
        help="tp2, pp2, tp2pp2dp2, …; tp2+int8, +int4, +fp8, +int8w8a8, +sparse24, +gguf: weights in fewer bits; "
        "tp2+kvfp8, tp2+int4+kvfp8: the KV cache; tp2+offload: what does not fit stays in host memory; auto: the "
        "planner's choice (default)",
    )
    layouts.add_argument(
        "--tensor-parallel-size", "-tp", type=int, metavar="N", help="devices that split each layer"
    )
    layouts.add_argument(
        "--pipeline-parallel-size", "-pp", type=int, metavar="N", help="stages, each with some of the layers"
    )
    layouts.add_argument(
        "--data-parallel-size", "-dp", type=int, metavar="N", help="replicas, each with the whole model"
    )


def layout(args: argparse.Namespace) -> ParallelDims | None:
    """The sizes of the layout that --layout or the three sizes name; None: the planner's choice."""
    sizes = (args.tensor_parallel_size, args.pipeline_parallel_size, args.data_parallel_size)
    asked = _named(args)
    named = None if asked is None else asked.dims
    if all(size is None for size in sizes):
        return named
    if args.layout is not None:
        raise BadLayout(
            f"--layout {args.layout} and -tp, -pp or -dp say the same thing twice; give one of them"
        )
    if any(size is not None and size < 1 for size in sizes):
        raise BadLayout(f"-tp, -pp and -dp must be at least 1, not {min(s for s in sizes if s is not None)}")
    tp, pp, dp = (size or 1 for size in sizes)
    return ParallelDims(tp, pp, dp)


def _named(args: argparse.Namespace) -> Layout | None:
    name = getattr(args, "layout", None)
    return None if name in (None, "auto") else check_layout(Layout.parse(name))


def engine_options(args: argparse.Namespace, *, needs_weights: bool = True) -> EngineOptions:
    """Checks every flag, reads the model's config and the headers of its weights. Raises UserError."""
    check_sizes(args)
    check_address(args.address)
    address: str | None = args.address
    source = resolve(args.model)
    spec = spec_of(source)
    named = _named(args)
    zero3 = named is not None and named.zero3
    known = is_known(spec) and not zero3
    if not known:
        check_compatible(args, named, source, spec)
    if needs_weights and source.path is None and args.weights == "checkpoint":
        raise UserError(
            f"{args.model} is a built-in spec, a config without weights; add --weights dummy, or give a directory "
            "or a .gguf file"
        )
    if args.max_model_len is not None and args.max_model_len > spec.max_positions:
        raise UserError(
            f"--max-model-len is {args.max_model_len}; {spec.name} was made for {spec.max_positions} positions at most"
        )
    check_offload(args, spec, is_here=address is None)
    tell_torch()
    if needs_weights and args.weights == "checkpoint" and known:
        from orchestrator.engine.checkpoint import open_checkpoint

        open_checkpoint(source, spec).verify()
    is_elsewhere = (
        address is not None and args.device != "auto"
    )  # who asks for it there has seen what is there
    device = args.device if is_elsewhere else choose_device(args.device)
    check_device_memory(args.device_memory_gb, device, asked=args.device)
    spec = kept_on(device, spec)
    if args.weights == "dummy" and can_remake(spec):
        spec = replace(spec, published=None)  # random weights are in no blocks
    kept = _format(named, spec)
    caching = not args.no_enable_prefix_caching
    check_asked(args.host_kv_gb, prefix_caching=caching, has_blocks=known)
    return EngineOptions(
        source=source,
        spec=spec,
        device=device,
        dtype=_dtype(args.dtype, device, spec, small=FORMATS[kept].weights in ("int8", "int4")),
        dummy_weights=args.weights == "dummy",
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        num_blocks=args.num_gpu_blocks_override,
        prefix_caching=known and caching,
        seed=args.seed,
        address=address,
        peer_access=peers_allowed(),
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.enforce_eager,
        format=kept,
        compatible=not known,
        zero3=zero3,
        offload=named is not None and named.offload,
        resident_layers=args.resident_layers,
        offload_dir=None if args.offload_dir is None else args.offload_dir.expanduser().absolute(),
        offload_io=args.offload_io or THREADS,
        device_memory_gb=args.device_memory_gb,
        host_memory_gb=args.host_memory_gb,
        host_kv_gb=args.host_kv_gb,
        step_timeout_s=args.step_timeout,
    )


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a folder")
    return Path(text)


def _format(named: Layout | None, spec: ModelSpec) -> str:
    """That weights are kept in: the layout's, or the checkpoint's own. Raises BadLayout."""
    asked = PLAIN if named is None else as_kept(spec, named.format)
    stored = native(spec)
    if asked.weights and stored.weights not in ("", asked.weights) and not can_remake(spec):
        raise BadLayout(f"{spec.name} is stored in {stored.weights} already; leave +{asked.weights} away")
    return or_native(spec, asked).name


def check_blocks(options: EngineOptions) -> None:
    """The KV blocks asked for hold one context. Raises UserError."""
    if options.num_blocks is None:
        return
    tokens = options.num_blocks * options.block_size
    if tokens < options.least_context:
        raise UserError(
            f"--num-gpu-blocks-override {options.num_blocks} blocks of {options.block_size} hold {tokens} tokens, "
            f"fewer than a context of {options.least_context}; raise it or lower --max-model-len"
        )


def choose_device(asked: str) -> str:
    """cpu or cuda, by default what is there. Raises UserError."""
    if asked == "cpu":
        return asked
    import torch

    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        built = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA device"
        raise UserError(f"--device cuda: {built}; see `shardwise doctor`, or use --device cpu")
    return ("cuda" if found else "cpu") if asked == "auto" else asked


def _dtype(asked: str, device: str, spec: ModelSpec, *, small: bool) -> str:
    if asked != "auto":
        return asked
    if device == "cpu":  # torch's products by weights in fewer bits are fast in bfloat16 alone
        return "bfloat16" if small else "float32"
    return spec.dtype if spec.dtype in ("bfloat16", "float16") else "bfloat16"
