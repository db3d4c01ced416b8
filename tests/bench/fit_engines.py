"""Fits strategies/engines.yaml's constants to measured serving rows, and says how well they hold on rows left out.

    python -m tests.bench.fit_engines ROWS.csv [--write] [--leave-out] [--dense]

Two thirds of the rows (by a hash of their ids) are fitted, the other third is only looked at. Gauss-Newton on
logarithms of ratios from the priors until nothing is gained, with a loss that lets outliers go (Student's t), and a
prior for each constant: what microbenchmarks of kernels gave, or the middle of the engines. --leave-out fits again,
from the priors as well, without each GPU type and without each engine, and predicts the rows left out; a left-out
engine is priced as `default`, and what engines.yaml says of hosts on a left-out GPU or of a left-out engine is not
used.
All rows: some ten minutes on one core, --dense: two. The model is serving_arrays.py's, held to that of every command.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cluster import catalog
from launch.measured import Case, is_held_out, serving_case
from strategies import engines
from strategies.cost_memory import Memory, memories
from strategies.engines import Engine
from strategies.steady import steady
from tests.bench import serving_arrays
from tests.bench.serving_arrays import Rows

FITTED = ("vllm", "trtllm", "trtllm-1.0", "sglang")
KIN = {"trtllm-1.0": "trtllm"}  # priced as its kin where it has no rows, and beside it where it has
LOSS_SCALE = 0.06  # of a logarithm, for a weight of one
LOSS_DEGREES = 10.0  # of freedom: a row this many scales squared away pulls less the farther it is
DENSE_WEIGHT, TTFT_WEIGHTS = 2.5, (2.5, 0.3)  # of dense rows; of their TTFT and of mixtures'
LOW_CONCURRENCY = 8
MOST_ROUNDS = 200  # a guard: fits end by themselves after 15 to 80
LEAST_GAIN, GAINLESS_ROUNDS = 1e-5, 3  # of the loss, in a round; so many in a row end a fit
AGREEMENT = 1e-9  # of logarithms, between arrays and the model
BEYOND = ("nvidia/Llama-3.1-8B-Instruct-FP8", "nvidia/Qwen3-32B-NVFP4")  # docs/accuracy.md says why
BLACKWELL = ("NVIDIA B200", "NVIDIA B300 SXM6 AC", "NVIDIA GB200")

# kernel constant: (prior, its spread as a logarithm, least, most). Priors: utilisation of kernels in aiconfigurator's
# tables (H100: 0.78 of bandwidth at one row, 0.75 to 0.80 of FLOP/s beyond 1024), all-reduce as measured alone.
KERNELS: Mapping[str, tuple[float, float, float, float]] = {
    "weights.16": (0.80, 0.06, 0.55, 0.92),
    "weights.8": (0.75, 0.12, 0.5, 0.92),
    "weights.4": (0.65, 0.12, 0.4, 0.9),
    "gaps_on.blackwell": (1.0, 0.05, 0.4, 2.0),
    "compute.16": (0.70, 0.06, 0.4, 0.85),
    "compute.8": (0.55, 0.12, 0.3, 0.8),
    "compute.4": (0.45, 0.12, 0.2, 0.7),
    "expert_weights.8": (0.7, 0.12, 0.2, 0.92),
    "expert_weights.4": (0.6, 0.12, 0.15, 0.92),
    "expert_compute.8": (0.3, 0.3, 0.15, 0.8),
    "expert_compute.4": (0.25, 0.3, 0.1, 0.7),
    "kv": (0.75, 0.12, 0.5, 0.92),
    "latent": (1.0, 0.3, 0.3, 6.0),
    "prompt_attention": (0.45, 0.12, 0.2, 0.75),
    "expert_tile": (16.0, 0.5, 4.0, 64.0),
    "residual_passes": (6.0, 0.4, 1.0, 12.0),
    "sampling_passes": (3.0, 0.3, 0.5, 10.0),
    "product_gap_us": (2.5, 0.4, 0.5, 8.0),
    "attention_gap_us": (8.0, 0.4, 1.0, 25.0),
    "latent_gap_us": (5.0, 0.4, 2.0, 40.0),
    "experts_gap_us": (10.0, 0.5, 1.0, 80.0),
    "all_reduce": (1.0, 0.12, 0.7, 2.0),
    "exchange": (1.0, 0.4, 0.3, 10.0),
}
# constant of every engine: (the middle's prior, its spread, spread of an engine around the middle).
ENGINES: Mapping[str, tuple[float, float, float]] = {
    "launches": (1.3, 0.2, 0.35),
    "prompts": (1.0, 0.05, 0.14),
    "experts": (1.0, 0.1, 0.21),
    "step_us": (200.0, 0.7, 0.7),
    "sequence_us": (8.0, 0.7, 0.7),
    "prompt_ms": (2.0, 0.5, 0.49),
    "first_ms": (60.0, 0.7, 0.7),
    "eager_layer_us": (300.0, 0.7, 0.7),
}


# constant that all engines share: (prior, its spread).
SHARED: Mapping[str, tuple[float, float]] = {"token_out_us": (40.0, 0.5), "burst": (1.0, 0.3)}


@dataclass(frozen=True)
class Sample:
    """A measured row, understood once: all that a fit changes of it is the engine."""

    row: Mapping[str, str]
    case: Case
    needs: Sequence[Memory]
    ttft_s: float
    tpot_s: float

    @property
    def dense(self) -> bool:
        return self.case.placement.spec.experts is None

    @property
    def engine(self) -> str:
        return self.case.placement.engine.name

    @property
    def low(self) -> bool:
        return self.case.workload.concurrency <= LOW_CONCURRENCY

    @property
    def held_out(self) -> bool:
        return is_held_out(self.row)


def read(path: str) -> list[Sample]:
    with open(path, newline="") as file:
        return [sample(row) for row in csv.DictReader(file)]


def sample(row: Mapping[str, str]) -> Sample:
    case = serving_case(row)
    needs = memories(case.placement, case.workload)
    return Sample(row, case, needs, float(row["ttft_ms"]) / 1e3, float(row["tpot_ms"]) / 1e3)


class Constants:
    """The constants by name, as a vector of logarithms: kernels', the middle engine's, and each engine's beside it."""

    def __init__(self, fitted: Sequence[str]) -> None:
        self.fitted = fitted
        rows = [
            (name, math.log(p), spread, math.log(a), math.log(b))
            for name, (p, spread, a, b) in KERNELS.items()
        ]
        middle = {**{k: v[:2] for k, v in ENGINES.items()}, **SHARED}
        rows += [(f"default.{k}", math.log(p), spread, -99.0, 99.0) for k, (p, spread) in middle.items()]
        rows += [(f"{e}.{k}", 0.0, v[2], -2.0, 2.0) for e in fitted for k, v in ENGINES.items()]
        self.names = [row[0] for row in rows]
        self.prior, self.spread, self.low, self.high = np.array([row[1:] for row in rows]).T
        self.index = {name: i for i, name in enumerate(self.names)}

    def rows(self, x: np.ndarray, known: Mapping[str, Any]) -> dict[str, Any]:
        """As engines.yaml has them, on top of what it has of other kinds."""
        rows: dict[str, Any] = copy.deepcopy(dict(known))
        value = dict(zip(self.names, map(float, np.exp(x)), strict=True))
        for name in KERNELS:
            key, _, width = name.partition(".")
            if width == "blackwell":
                rows["kernels"][key] = dict.fromkeys(BLACKWELL, value[name])
            elif width:
                rows["kernels"][key][int(width)] = value[name]
            else:
                rows["kernels"][key] = value[name]
        for key in (*ENGINES, *SHARED):
            rows["engines"]["default"][key] = value[f"default.{key}"]
        for engine in self.fitted:
            own = rows["engines"][engine]
            for key in ENGINES:
                beside = value[f"default.{key}"] * value[f"{engine}.{key}"]
                own[key] = beside * value.get(f"{KIN.get(engine)}.{key}", 1.0)
        return rows

    def engines(self, x: np.ndarray, known: Mapping[str, Any]) -> dict[str, Engine]:
        """By name; one that is not fitted has the middle's constants and its own settings."""
        rows = self.rows(x, known)
        default = rows["engines"]["default"]
        made = {}
        for name in FITTED:
            own = rows["engines"][name]
            if name not in self.fitted:
                own = {key: value for key, value in own.items() if key not in ENGINES}
            made[name] = engines.engine_from({**default, **own}, rows["kernels"], name)
        return made


@functools.cache
def _file() -> Mapping[str, Any]:
    """engines.yaml without what is fitted of engines."""
    rows: dict[str, Any] = yaml.safe_load(Path(engines._FILE).read_text(encoding="utf-8"))
    for name in FITTED:
        rows["engines"][name] = {
            k: v for k, v in rows["engines"][name].items() if k not in {*ENGINES, *SHARED}
        }
    return rows


def without(column: str, value: str) -> Mapping[str, Any]:
    """What the file would say had nobody seen a GPU type or an engine: host times that were set by hand are gone."""
    known = copy.deepcopy(dict(_file()))
    names = catalog.sheet(value).names if column == "system" else ()
    for name in FITTED:
        own = known["engines"][name]
        if column == "backend" and name.split("-")[0] == value:
            own.pop("ungraphed_ms", None)
        if "ungraphed_ms" in own:
            own["ungraphed_ms"] = {k: v for k, v in own["ungraphed_ms"].items() if k not in names}
    return known


@dataclass(frozen=True)
class Measured:
    """Samples as arrays."""

    samples: Sequence[Sample]
    rows: Rows
    logs: np.ndarray  # [R, 2]: of measured TPOT and TTFT
    weight: np.ndarray  # [R, 2]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Measured:
        rows = Rows([s.case for s in samples], [s.needs for s in samples])
        logs = np.log([(s.tpot_s, s.ttft_s) for s in samples])
        each = [(DENSE_WEIGHT, TTFT_WEIGHTS[0]) if s.dense else (1.0, TTFT_WEIGHTS[1]) for s in samples]
        low = np.array([(1.0, float(s.low)) for s in samples])
        return cls(samples, rows, logs, np.array(each) * low)

    def some(self, mask: np.ndarray) -> Measured:
        kept = [s for s, one in zip(self.samples, mask, strict=True) if one]
        return Measured(kept, self.rows.some(mask), self.logs[mask], self.weight[mask])

    def errors(self, made: Mapping[str, Engine]) -> np.ndarray:
        """[R, 2]: logarithms of predicted over measured TPOT and TTFT."""
        return np.log(serving_arrays.predict(self.rows, made)) - self.logs

    def check(self, made: Mapping[str, Engine]) -> None:
        """Raises where arrays and the model do not say the same."""
        said = self.errors(made) + self.logs
        for s, row in zip(self.samples, said, strict=True):
            with_engine = made[s.engine]
            own = replace(with_engine, chunk_tokens=s.case.placement.engine.chunk_tokens)
            served = steady(replace(s.case.placement, engine=own), 0, s.needs, s.case.workload)
            model = np.log([served.token_s, with_engine.first_s + served.first_s])
            if np.abs(model - row).max() > AGREEMENT:
                raise ValueError(
                    f"{s.row['id']}: arrays say {np.exp(row)}, the model {np.exp(model)} seconds"
                )


def fit(data: Measured, constants: Constants, known: Mapping[str, Any], what: str) -> np.ndarray:
    """The constants from the priors by Gauss-Newton until nothing is gained."""
    began, scaled = time.monotonic(), data.weight / LOSS_SCALE

    def errors(x: np.ndarray) -> np.ndarray:
        return data.errors(constants.engines(x, known))

    def loss(r: np.ndarray, x: np.ndarray) -> float:
        rows = LOSS_DEGREES * np.log1p((r * scaled) ** 2 / LOSS_DEGREES)
        return float(rows.sum() + (((x - constants.prior) / constants.spread) ** 2).sum())

    x, damping, gainless = constants.prior.copy(), 1e-2, 0
    r = errors(x)
    best = loss(r, x)
    for n in range(1, MOST_ROUNDS + 1):
        flat = slopes(data, constants, known, x, r).reshape(-1, len(x))
        pull = scaled**2 / (1 + (r * scaled) ** 2 / LOSS_DEGREES)
        normal = (flat * pull.reshape(-1, 1)).T @ flat + np.diag(1 / constants.spread**2)
        gradient = flat.T @ (pull * r).reshape(-1) + (x - constants.prior) / constants.spread**2
        before = best
        while damping < 1e4:
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            moved = np.clip(x - step, constants.low, constants.high)
            near = errors(moved)
            found = loss(near, moved)
            if found < best:
                x, r, best, damping = moved, near, found, max(damping / 5, 1e-6)
                break
            damping *= 4
        else:
            gainless = GAINLESS_ROUNDS
        gainless = gainless + 1 if before - best < LEAST_GAIN * best else 0
        said = f"{what}: round {n}, loss {best:.1f}, {time.monotonic() - began:.0f} s"
        print(f"\r{said:<70}", end="", file=sys.stderr, flush=True)
        if gainless >= GAINLESS_ROUNDS:
            print(file=sys.stderr, flush=True)
            return x
    raise ValueError(f"{what}: still gaining after {MOST_ROUNDS} rounds; raise MOST_ROUNDS")


def slopes(
    data: Measured, constants: Constants, known: Mapping[str, Any], x: np.ndarray, r: np.ndarray
) -> np.ndarray:
    """[R, 2, constants]: an engine's own constants move its rows, and its kin's, as the middle's do."""
    step = 1e-3
    found = np.zeros((*r.shape, len(x)))
    for j, name in enumerate(constants.names):
        engine, _, key = name.rpartition(".")
        if engine in constants.fitted:
            continue
        moved = x.copy()
        moved[j] += step
        found[:, :, j] = (data.errors(constants.engines(moved, known)) - r) / step
        if engine == "default" and key in ENGINES:
            for own in constants.fitted:
                rows = np.isin(data.rows.engines, [own, *(one for one, kin in KIN.items() if kin == own)])
                found[rows, :, constants.index[f"{own}.{key}"]] = found[rows, :, j]
    return found


def figures(samples: Sequence[Sample], r: np.ndarray) -> str:
    """MAPE of TPOT of dense models and of mixtures, median error of dense models' TTFT at low concurrency."""
    error = np.abs(np.exp(r) - 1)
    dense = np.array([s.dense for s in samples])
    low = np.array([s.low for s in samples])
    plain = np.array([s.row["model_path"] not in BEYOND for s in samples])

    def told(name: str, values: np.ndarray, how: Callable[[Any], float]) -> str:
        return (
            f"{name} {100 * how(list(values)):5.1f} % of {len(values):4d}" if len(values) else f"{name} none"
        )

    return "; ".join(
        (
            told("dense TPOT", error[dense, 0], statistics.fmean),
            told("without two checkpoints", error[dense & plain, 0], statistics.fmean),
            told("mixtures' TPOT", error[~dense, 0], statistics.fmean),
            told("dense TTFT (median, low)", error[dense & low, 1], statistics.median),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("--write", action="store_true", help="put the constants into strategies/engines.yaml")
    parser.add_argument("--leave-out", action="store_true")
    parser.add_argument("--dense", action="store_true", help="only rows of dense models")
    args = parser.parse_args()
    data = Measured.of([s for s in read(args.rows) if s.dense or not args.dense])
    constants = Constants(FITTED)
    data.check(constants.engines(constants.prior, _file()))
    held = np.array([s.held_out for s in data.samples])
    x = fit(data.some(~held), constants, _file(), "two thirds")
    made = constants.engines(x, _file())
    data.check(made)
    for name, some in (("fitted", ~held), ("held out", held), ("all", held | True)):
        part = data.some(some)
        print(f"{name}: {figures(part.samples, part.errors(made))}", flush=True)
    if args.write:
        write(constants.rows(x, _file()))
    if args.leave_out:
        for column in ("system", "backend"):
            leave_out(data, column)


def leave_out(data: Measured, column: str) -> None:
    """Each value of a column in turn: fitted to all rows of others, then predicted."""
    left: list[Sample] = []
    errors = []
    for value in sorted({s.row[column] for s in data.samples}):
        own = np.array([s.row[column] == value for s in data.samples])
        constants = Constants([e for e in FITTED if column == "system" or e.split("-")[0] != value])
        known = without(column, value)
        part = data.some(own)
        x = fit(data.some(~own), constants, known, f"without {value}")
        errors.append(part.errors(constants.engines(x, known)))
        left += part.samples
        print(f"without {column} {value}: {figures(part.samples, errors[-1])}", flush=True)
    print(f"each {column} left out in turn: {figures(left, np.concatenate(errors))}", flush=True)


def write(rows: Mapping[str, Any]) -> None:
    """The constants into engines.yaml, to three figures; comments above the first key stay."""
    path = Path(engines._FILE)
    text = path.read_text(encoding="utf-8")
    head = text[: text.index("\nkernels:") + 1]

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return float(f"{value:.3g}") if isinstance(value, float) else value

    lines = []
    for section in ("kernels", "engines"):
        lines.append(f"{section}:")
        for key, value in rows[section].items():
            told = yaml.safe_dump(short(value), default_flow_style=True, sort_keys=False, width=10**6).strip()
            lines += _wrapped(f"  {key}: {told.removesuffix('...').strip()}")
        lines.append("")
    path.write_text(head + "\n".join(lines[:-1]) + "\n", encoding="utf-8")


def _wrapped(line: str, width: int = 116) -> list[str]:
    """Broken after commas, as a flow mapping may be."""
    out = []
    while len(line) > width and ", " in line[:width]:
        at = line.rindex(", ", 0, width) + 1
        out.append(line[:at])
        line = "    " + line[at:].strip()
    return [*out, line]


if __name__ == "__main__":
    main()
