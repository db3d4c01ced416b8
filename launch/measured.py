"""A measured row → what the cost model says of it: models, systems, engines and formats as tables spell them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster import catalog
from cluster.errors import ShardwiseError
from cluster.topology import Topology
from strategies.cost import estimate
from strategies.place import place, rejection
from strategies.plan import Estimate, ParallelDims
from strategies.read_spec import builtin
from strategies.spec import ModelSpec, Workload

SERVING_COLUMNS = (
    "backend", "model_path", "system", "precision", "isl", "osl", "concurrency", "tp_size", "pp_size",
    "attention_dp_size", "moe_tp_size", "moe_ep_size", "ttft_ms", "tpot_ms",
)  # fmt: skip
LAYOUT_COLUMNS = (
    "group", "gpu", "gpus", "link", "model_path", "weights", "engine", "tp", "pp", "dp", "isl", "osl",
    "concurrency", "metric", "value",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one row, in the row's own units; what is not predicted is None, and the reason says why."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    value: float | None = None
    reason: str = ""

    def cells(self, columns: Sequence[str]) -> dict[str, str]:
        made = {
            "predicted_ttft_ms": self.ttft_ms,
            "predicted_tpot_ms": self.tpot_ms,
            "predicted_value": self.value,
        }
        told = {key: "" if figure is None else f"{figure:.6g}" for key, figure in made.items()}
        return {key: ({**told, "reason": self.reason})[key] for key in columns}

    def figures(self, row: Mapping[str, str]) -> Iterator[tuple[str, str, float | None]]:
        """(metric, column of the measured figure, predicted)."""
        if "tpot_ms" in row:
            yield "ttft", "ttft_ms", self.ttft_ms
            yield "tpot", "tpot_ms", self.tpot_ms
        else:
            yield row["metric"], "value", self.value


def spec_at(model_path: str) -> ModelSpec | None:
    return builtin(model_path)


def predict_serving(row: Mapping[str, str]) -> Prediction:
    try:
        dims = ParallelDims(int(row["tp_size"]), int(row["pp_size"]), int(row["attention_dp_size"]))
        made = _estimate(row, row["system"].removesuffix("_sxm"), dims)
    except ShardwiseError as error:
        return Prediction(reason=str(error))
    return Prediction(ttft_ms=made.ttft_s * 1e3, tpot_ms=made.tpot_s * 1e3)


def predict_layout(row: Mapping[str, str]) -> Prediction:
    try:
        dims = ParallelDims(int(row["tp"]), int(row["pp"]), int(row["dp"]))
        made = _estimate(row, row["gpu"].split("(")[0].removesuffix(" SXM"), dims)
    except ShardwiseError as error:
        return Prediction(reason=str(error))
    value = {
        "output_throughput": made.output_tokens_per_s,
        "tpot": made.tpot_s * 1e3,
        "decode_speed": 1 / made.tpot_s,
    }[row["metric"]]
    return Prediction(value=value)


def _estimate(row: Mapping[str, str], gpu: str, dims: ParallelDims) -> Estimate:
    spec = spec_at(row["model_path"])
    if spec is None:
        raise ShardwiseError(f"no built-in spec for {row['model_path']}")
    sheet = catalog.sheet(gpu)
    n = dims.world_size
    machine = Topology(
        gpu, tuple(sheet.device(i) for i in range(n)), catalog.prior_links([(sheet, "node0")] * n)
    )
    put = place(spec, dims, "bfloat16", machine)
    workload = Workload(int(row["isl"]), int(row["osl"]), int(row["concurrency"] or 256))
    reason = rejection(put, workload, None)
    if reason is not None:
        raise ShardwiseError(reason)
    return estimate(put, workload)
