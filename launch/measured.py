"""A measured row → what the cost model says of it: models, systems, engines and formats as tables spell them."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster import catalog
from cluster.errors import BadRequest, UserError
from cluster.topology import LinkKind, Topology
from launch.config import MAX_DEVICES
from strategies.cost import estimate, limit_tokens_per_s
from strategies.cost_memory import memories
from strategies.engines import Engine, engine
from strategies.formats import FORMATS, PLAIN, Format, Width
from strategies.place import gb, place
from strategies.plan import Estimate, Layout, ParallelDims, Placement
from strategies.read_spec import builtin
from strategies.spec import ModelSpec, Workload

# What a prediction needs. What was measured (ttft_ms and tpot_ms, or value) may be missing, cell by cell or all of it.
SERVING_COLUMNS = (
    "backend", "model_path", "system", "precision", "isl", "osl", "concurrency", "tp_size", "pp_size",
    "attention_dp_size", "moe_tp_size", "moe_ep_size",
)  # fmt: skip
LAYOUT_COLUMNS = (
    "group", "gpu", "gpus", "link", "model_path", "weights", "engine", "tp", "pp", "dp", "isl", "osl",
    "concurrency", "load", "metric",
)  # fmt: skip

Row = Mapping[str, str]

# What a published checkpoint's name may end in, beyond the model's own: its format, its tuning, its date.
_ENDINGS = re.compile(
    r"[-_](nvfp4-v\d|nvfp4|mxfp4|fp4|fp8|fp8-dynamic|int8|int4|w4a16|w4a8|w8a8|w8a16|awq|gptq|gguf|bf16|fp16|dynamic|quantized"
    r"|instruct|chat|base|it|hf|2507|0528|0324|\d{4})$",
    re.IGNORECASE,
)
_PLAIN = frozenset({"", "bf16", "bfloat16", "fp16", "float16", "f16", "none"})
_KEPT: Mapping[str, Format] = {  # in order: the first that a name starts with, or holds
    "q4_k_m": replace(FORMATS["int4"], weight_bytes=4.85 / 8, scales=0.0),  # a mixture of 4 and 6 bits
    "int4-g32": replace(FORMATS["int4"], weight_bytes=0.5 + 2.5 / 32, scales=0.0),
    "int4": FORMATS["int4"],
    "awq": FORMATS["int4"],
    "gptq": FORMATS["int4"],
    "w4a16": FORMATS["int4"],
    "q4": FORMATS["int4"],
    "fp4": FORMATS["fp4"],
    "int8": FORMATS["int8w8a8"],
    "w8a8": FORMATS["int8w8a8"],
    "fp8": FORMATS["fp8"],
}


# Who serves what barely fits takes more of the memory and fewer tokens a step than engines do unasked.
TIGHT_TOKENS = 8192  # of cache, below which that is taken to have been done
TIGHT_SHARE = 0.97
TIGHT_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one row, in the row's own units; what is not predicted is None, and the reason says why."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    value: float | None = None
    reason: str = ""
    limit_tokens_per_s: float | None = None  # of output, that the data sheets allow at the row's load

    def cells(self, columns: Sequence[str]) -> dict[str, str]:
        made = {
            "predicted_ttft_ms": self.ttft_ms,
            "predicted_tpot_ms": self.tpot_ms,
            "predicted_value": self.value,
        }
        told = {key: "" if figure is None else f"{figure:.6g}" for key, figure in made.items()}
        return {key: ({**told, "reason": self.reason})[key] for key in columns}

    def figures(self, row: Row) -> Iterator[tuple[str, str, float | None]]:
        """(metric, column of the measured figure, predicted)."""
        if "system" in row:
            yield "ttft", "ttft_ms", self.ttft_ms
            yield "tpot", "tpot_ms", self.tpot_ms
        else:
            yield row["metric"], "value", self.value


@dataclass(frozen=True, slots=True)
class Case:
    """A row, understood."""

    placement: Placement
    workload: Workload
    metric: str = ""


def predict_serving(row: Row) -> Prediction:
    try:
        case = serving_case(row)
        made = predict(case)
    except UserError as error:
        return Prediction(reason=str(error))
    limit = limit_tokens_per_s(case.placement, case.workload)
    return Prediction(made.ttft_s * 1e3, made.tpot_s * 1e3, limit_tokens_per_s=limit)


def is_held_out(row: Row) -> bool:
    """Whether a row is of the third that constants are not fitted to: by a hash of its id."""
    return int(hashlib.sha256(row.get("id", "").encode()).hexdigest(), 16) % 3 == 0


def beats_limit(row: Row, made: Prediction) -> bool:
    """Whether a serving row claims more tokens a second than bandwidth and FLOP/s allow at the load that it states."""
    first_ms, token_ms = number(row.get("ttft_ms", "")), number(row.get("tpot_ms", ""))
    if first_ms is None or token_ms is None or made.limit_tokens_per_s is None:
        return False
    output, at_once = _whole(row, "osl"), _whole(row, "concurrency")
    life_s = (first_ms + (output - 1) * token_ms) / 1e3
    return life_s > 0 and at_once * output / life_s > made.limit_tokens_per_s


def number(text: str) -> float | None:
    """Of a cell; None where it is empty or no finite number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def predict_layout(row: Row) -> Prediction:
    try:
        case = layout_case(row)
        made = predict(case)
    except UserError as error:
        return Prediction(reason=str(error))
    value = {
        "output_throughput": made.output_tokens_per_s,
        "tpot": made.tpot_s * 1e3,
        "ttft": made.ttft_s * 1e3,
        "decode_speed": 1 / made.tpot_s,
    }.get(case.metric)
    return Prediction(value=value, reason="" if value else f"unknown metric {case.metric!r}")


def predict(case: Case) -> Estimate:
    """Raises BadRequest for what cannot have run: weights that exceed the memory."""
    need = max(memories(case.placement, case.workload), key=lambda n: n.weights - n.free)
    if need.weights > need.free:
        raise BadRequest(
            f"{gb(need.weights)} of weights a GPU exceed the {gb(need.free)} that its engine takes"
        )
    return estimate(case.placement, case.workload)


# --- serving rows -------------------------------------------------------------------------------------------


def serving_case(row: Row) -> Case:
    """Raises UserError for what is not known or makes no sense."""
    name = serving_engine(row["backend"], row.get("backend_version", ""))
    spec, kept, with_engine = _known(row["model_path"], row["precision"], name)
    if with_engine.eight_bit_kv and kept is not PLAIN:
        kept = replace(kept, kv_bytes=1.0)
    if kept.width is Width.FOUR:  # published mixtures in 4 bits keep attention in 16
        kept = replace(kept, experts_only=True)
    dims = serving_dims(row, spec)
    return Case(_placement(spec, dims, kept, with_engine, row["system"], None), _workload(row, steady=True))


def serving_engine(backend: str, version: str) -> str:
    """The generation that engines.yaml knows: TensorRT-LLM's loop and server were rewritten after 1.0."""
    name = backend.strip().lower()
    return "trtllm-1.0" if name == "trtllm" and re.match(r"(0\.|1\.0)", version.strip()) else name


def serving_dims(row: Row, spec: ModelSpec) -> ParallelDims:
    """The layout of a row: some name one set of GPUs twice, as tp and as dp, or experts' tp in place of attention's."""
    tp, pp, dp = (_whole(row, key) for key in ("tp_size", "pp_size", "attention_dp_size"))
    if spec.experts is None:
        return ParallelDims(tp, pp, dp)
    expert_tp, ep = _whole(row, "moe_tp_size"), _whole(row, "moe_ep_size")
    if tp == dp:
        tp = 1
    if ep == 1 and dp == 1:
        tp = max(tp, expert_tp)
    return ParallelDims(tp, pp, dp, min(ep, tp * dp))


# --- published layouts --------------------------------------------------------------------------------------


def layout_case(row: Row) -> Case:
    """Raises UserError."""
    spec, kept, with_engine = _known(row["model_path"], row["weights"], _engine_name(row["engine"]))
    if kept.name == "fp4":  # as its published checkpoints are served
        kept = replace(kept, kv_bytes=1.0)
    dims = ParallelDims(*(_whole(row, key) for key in ("tp", "pp", "dp")))
    put = _placement(spec, dims, kept, with_engine, row["gpu"].split("(")[0], _link_kind(row["link"]))
    at_once = row["concurrency"].strip()
    load = row["load"].strip().lower()
    steady = not at_once or re.match(r"c\d", load) is not None
    if at_once:
        workload = replace(_workload(row, steady=steady), ragged="offline" in load)
        return Case(put, workload, row["metric"])
    # As many as fit: those of the fullest device's cache.
    workload = _workload({**row, "concurrency": "1"}, steady=True)
    length = workload.prompt_tokens + workload.output_tokens / 2
    room = min(need.kv_tokens for need in memories(put, workload)) / length
    at_most = min(max(1, math.floor(room)), with_engine.max_sequences) * dims.dp
    return Case(put, replace(workload, concurrency=at_most), row["metric"])


def _engine_name(told: str) -> str:
    """`vLLM 0.7.3` → vllm-v0, whose engine had another loop; `llama.cpp layer split` → llama.cpp."""
    name, *rest = told.strip().lower().split(" ")
    if name == "vllm" and rest and re.match(r"0\.[0-7](\.|$)", rest[0]):
        return "vllm-v0"
    return "trtllm" if name.startswith("tensorrt") else name


def _link_kind(told: str) -> LinkKind | None:
    """`nvlink3`, `pcie4 no P2P`, `pcie5 P2P`; None: as the cards' sheets have it."""
    link = told.lower()
    if link.startswith("nvlink"):
        return LinkKind.NVLINK
    if "no p2p" in link:
        return LinkKind.HOST
    return LinkKind.PCIE if "p2p" in link and "unrecorded" not in link else None


# --- names --------------------------------------------------------------------------------------------------


@functools.cache
def spec_at(model_path: str) -> ModelSpec | None:
    """The built-in spec of a model that a table names by owner, format or date."""
    name = model_path.strip()
    for _ in range(6):
        found = builtin(name) or builtin(name.split("/")[-1])
        shorter = _ENDINGS.sub("", name)
        if found is not None or shorter == name:
            return found
        name = shorter
    return None


def _known(model_path: str, weights: str, engine_name: str) -> tuple[ModelSpec, Format, Engine]:
    spec = spec_at(model_path)
    if spec is None:
        raise BadRequest(f"no built-in spec for {model_path}")
    return spec, _format(weights), engine(engine_name.strip().lower())


def _format(told: str) -> Format:
    name = told.strip().lower()
    if name in _PLAIN:
        return PLAIN
    for part, kept in _KEPT.items():
        if part in name:
            return kept
    raise BadRequest(f"unknown format {told!r}")


def _whole(row: Row, key: str) -> int:
    try:
        value = float(row[key] or 1)
    except ValueError:
        raise BadRequest(f"{key} is {row[key]!r}; it must be a whole number") from None
    if not math.isfinite(value) or value < 1 or value != int(value):
        raise BadRequest(f"{key} is {row[key]!r}; it must be a whole number, at least 1")
    return int(value)


def _workload(row: Row, *, steady: bool) -> Workload:
    isl, osl, at_once = (_whole(row, key) for key in ("isl", "osl", "concurrency"))
    return Workload(isl, osl, at_once, steady=steady)


def _placement(
    spec: ModelSpec, dims: ParallelDims, kept: Format, with_engine: Engine, gpu: str, kind: LinkKind | None
) -> Placement:
    if dims.world_size > MAX_DEVICES:
        raise BadRequest(
            f"{dims.name} takes {dims.world_size} devices; at most {MAX_DEVICES} are planned for"
        )
    machine = _machine(gpu.strip(), dims.world_size, kind, with_engine.memory_share)
    dtype = "bfloat16" if "bfloat16" in machine.devices[0].flops_per_s else "float16"
    put = place(spec, Layout(dims, kept), dtype, machine, with_engine)
    if min(need.kv_tokens for need in memories(put, Workload())) >= TIGHT_TOKENS:
        return put
    small = replace(with_engine, chunk_tokens=TIGHT_CHUNK)
    machine = _machine(gpu.strip(), dims.world_size, kind, TIGHT_SHARE)
    return place(spec, Layout(dims, kept), dtype, machine, small)


@functools.cache
def _machine(gpu: str, n: int, kind: LinkKind | None, memory_share: float) -> Topology:
    sheet = catalog.sheet(gpu)
    free = int(sheet.memory_bytes * memory_share)
    devices = tuple(sheet.device(i, free_bytes=free) for i in range(n))
    return Topology(gpu, devices, catalog.prior_links([(sheet, "node0")] * n, kind))
