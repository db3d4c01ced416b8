"""Fits strategies/engines.yaml's constants to measured serving rows, and says how well they hold on rows left out.

    python -m tests.bench.fit_engines ROWS.csv [--write] [--leave-out] [--dense]

Two thirds of the rows (by a hash of their ids) are fitted, the other third is only looked at. Gauss-Newton on
logarithms of ratios, with a loss that lets outliers go, and a prior for each constant: what microbenchmarks of kernels
gave, or the middle of the engines. --leave-out fits again without each GPU type and without each engine, and predicts
the rows left out; a left-out engine is priced as `default`. It takes minutes. The model is the one of every command.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from launch.measured import Case, is_held_out, serving_case
from strategies import engines
from strategies.cost_memory import Memory, memories
from strategies.steady import steady

FITTED = ("vllm", "trtllm", "trtllm-1.0", "sglang")
LOSS_SCALE = 0.06  # of a logarithm, beyond which a row's pull no longer grows
DENSE_WEIGHT, TTFT_WEIGHTS = 2.5, (1.0, 0.3)  # of dense rows; of their TTFT and of mixtures'
LOW_CONCURRENCY = 8
LEFT_OUT_ROUNDS = 3  # from where the fit to all rows ended
BLACKWELL = ("NVIDIA B200", "NVIDIA B300 SXM6 AC", "NVIDIA GB200")

# kernel constant: (prior, its spread as a logarithm, least, most). Priors: utilisation of kernels in aiconfigurator's
# tables (H100: 0.78 of bandwidth at one row, 0.75 to 0.80 of FLOP/s beyond 1024), all-reduce as measured alone.
KERNELS: Mapping[str, tuple[float, float, float, float]] = {
    "weights.16": (0.80, 0.06, 0.55, 0.92),
    "weights.8": (0.75, 0.12, 0.5, 0.92),
    "weights.4": (0.65, 0.12, 0.4, 0.9),
    "reads_on.blackwell": (1.0, 0.08, 0.8, 1.3),
    "gaps_on.blackwell": (1.0, 0.15, 0.4, 2.0),
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
    "launches": (1.3, 0.2, 0.25),
    "prompts": (1.0, 0.05, 0.1),
    "experts": (1.0, 0.1, 0.15),
    "step_us": (200.0, 0.7, 0.5),
    "sequence_us": (8.0, 0.7, 0.5),
    "prompt_ms": (2.0, 0.5, 0.35),
    "first_ms": (60.0, 0.7, 0.5),
    "token_out_us": (40.0, 0.5, 0.5),
    "burst": (0.3, 0.5, 0.5),
    "eager_layer_us": (300.0, 0.7, 0.5),
}


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
    found = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            case = serving_case(row)
            needs = memories(case.placement, case.workload)
            found.append(Sample(row, case, needs, float(row["ttft_ms"]) / 1e3, float(row["tpot_ms"]) / 1e3))
    return found


class Constants:
    """The constants by name, as a vector of logarithms: kernels', the middle engine's, and each engine's beside it."""

    def __init__(self, fitted: Sequence[str]) -> None:
        self.fitted = fitted
        self.names = [*KERNELS, *(f"default.{k}" for k in ENGINES)]
        self.names += [f"{engine}.{k}" for engine in fitted for k in ENGINES]
        priors, spreads, low, high = [], [], [], []
        for prior, spread, least, most in KERNELS.values():
            (
                priors.append(math.log(prior)),
                spreads.append(spread),
                low.append(math.log(least)),
                high.append(math.log(most)),
            )
        for prior, spread, _ in ENGINES.values():
            priors.append(math.log(prior)), spreads.append(spread), low.append(-99.0), high.append(99.0)
        for _ in fitted:
            for _, _, around in ENGINES.values():
                priors.append(0.0), spreads.append(around), low.append(-2.0), high.append(2.0)
        self.prior, self.spread = np.array(priors), np.array(spreads)
        self.low, self.high = np.array(low), np.array(high)

    def rows(self, x: np.ndarray) -> dict[str, Any]:
        """As engines.yaml has them, on top of what it has of other kinds."""
        rows = yaml.safe_load(Path(engines._FILE).read_text(encoding="utf-8"))
        value = dict(zip(self.names, np.exp(x), strict=True))
        for name in KERNELS:
            key, _, width = name.partition(".")
            if width == "blackwell":
                rows["kernels"][key] = dict.fromkeys(BLACKWELL, float(value[name]))
            elif width:
                rows["kernels"][key][int(width)] = float(value[name])
            else:
                rows["kernels"][key] = float(value[name])
        for key in ENGINES:
            rows["engines"]["default"][key] = float(value[f"default.{key}"])
            for engine in self.fitted:
                rows["engines"][engine][key] = float(value[f"default.{key}"] * value[f"{engine}.{key}"])
        return rows

    def touches(self, name: str) -> Callable[[Sample], bool]:
        """Which rows a constant can change."""
        engine, _, _ = name.rpartition(".")
        if engine in self.fitted:
            return lambda s: s.engine == engine
        if name.startswith(("expert_", "experts_", "exchange", "default.experts")):
            return lambda s: not s.dense
        if name.startswith("latent"):
            return lambda s: s.case.placement.spec.latent is not None
        if name.endswith(".blackwell"):
            return lambda s: s.case.placement.device(0, 0).name in BLACKWELL
        if name in ("weights.8", "weights.4", "compute.8", "compute.4"):
            width = int(name[-1])
            return lambda s: s.case.placement.format.width == width
        return lambda s: True


def predict(samples: Sequence[Sample], rows: Mapping[str, Any], known: Sequence[str]) -> np.ndarray:
    """[rows, 2]: logarithms of predicted over measured TPOT and TTFT."""
    default = rows["engines"]["default"]
    made = {
        name: engines.engine_from({**default, **rows["engines"].get(name, {})}, rows["kernels"], name)
        for name in known
    }
    middle = engines.engine_from(default, rows["kernels"], "default")
    out = np.empty((len(samples), 2))
    for i, s in enumerate(samples):
        with_engine = made.get(s.engine)
        if with_engine is None:  # left out: the middle's constants, the engine's own settings
            own = rows["engines"].get(s.engine, {})
            settings = {k: v for k, v in own.items() if k not in ENGINES}
            with_engine = (
                engines.engine_from({**default, **settings}, rows["kernels"], s.engine)
                if settings
                else middle
            )
        served = steady(replace(s.case.placement, engine=with_engine), 0, s.needs, s.case.workload)
        out[i] = (
            math.log(served.token_s / s.tpot_s),
            math.log((with_engine.first_s + served.first_s) / s.ttft_s),
        )
    return out


def fit(samples: Sequence[Sample], constants: Constants, start: np.ndarray, rounds: int) -> np.ndarray:
    """The constants after so many rounds of Gauss-Newton."""
    weight = np.array(
        [[DENSE_WEIGHT if s.dense else 1.0, TTFT_WEIGHTS[0 if s.dense else 1] * s.low] for s in samples]
    )
    masks = {
        name: [i for i, s in enumerate(samples) if constants.touches(name)(s)] for name in constants.names
    }
    x = np.clip(start, constants.low + 1e-6, constants.high - 1e-6)

    def loss(r: np.ndarray, x: np.ndarray) -> float:
        z = (r * weight / LOSS_SCALE) ** 2
        return float(
            (2 * (np.sqrt(1 + z) - 1)).sum() + (((x - constants.prior) / constants.spread) ** 2).sum()
        )

    damping, step = 1e-2, 1e-3
    r = predict(samples, constants.rows(x), constants.fitted)
    best = loss(r, x)
    for _ in range(rounds):
        jacobian = np.zeros((*r.shape, len(x)))
        for j, name in enumerate(constants.names):
            moved = x.copy()
            moved[j] += step
            own = masks[name]
            near = predict([samples[i] for i in own], constants.rows(moved), constants.fitted)
            jacobian[own, :, j] = (near - r[own]) / step
        scaled = weight / LOSS_SCALE
        pull = scaled**2 / np.sqrt(1 + (r * scaled) ** 2)  # of soft-L1, reweighted
        flat = jacobian.reshape(-1, len(x))
        normal = (flat * pull.reshape(-1, 1)).T @ flat + np.diag(1 / constants.spread**2)
        gradient = flat.T @ (pull * r).reshape(-1) + (x - constants.prior) / constants.spread**2
        while damping < 1e4:
            moved = np.clip(
                x - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient),
                constants.low,
                constants.high,
            )
            near = predict(samples, constants.rows(moved), constants.fitted)
            found = loss(near, moved)
            if found < best:
                x, r, damping = moved, near, damping / 5
                gained, best = best - found, found
                break
            damping *= 4
        else:
            break
        if gained < 2e-4 * best:
            break
    return x


def figures(samples: Sequence[Sample], r: np.ndarray) -> str:
    """MAPE of TPOT of dense models and of mixtures, median error of dense models' TTFT at low concurrency."""
    error = np.abs(np.exp(r) - 1)
    dense = np.array([s.dense for s in samples])
    low = np.array([s.low for s in samples])

    def told(name: str, values: np.ndarray, how: Callable[[Any], float]) -> str:
        return (
            f"{name} {100 * how(list(values)):5.1f} % of {len(values):4d}" if len(values) else f"{name} none"
        )

    return "; ".join(
        (
            told("dense TPOT", error[dense, 0], statistics.fmean),
            told("mixtures' TPOT", error[~dense, 0], statistics.fmean),
            told("dense TTFT (median, low)", error[dense & low, 1], statistics.median),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("--write", action="store_true", help="put the constants into strategies/engines.yaml")
    parser.add_argument("--leave-out", action="store_true")
    parser.add_argument(
        "--dense", action="store_true", help="only rows of dense models: minutes, not an hour"
    )
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    samples = [s for s in read(args.rows) if s.dense or not args.dense]
    began = time.monotonic()
    constants = Constants(FITTED)
    start = constants.prior.copy()
    start = _from_file(constants, start)
    train = [s for s in samples if not s.held_out]
    held = [s for s in samples if s.held_out]
    x = fit(train, constants, start, args.rounds)
    for name, some in (("fitted", train), ("held out", held), ("all", samples)):
        print(f"{name}: {figures(some, predict(some, constants.rows(x), FITTED))}", flush=True)
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    if args.write:
        write(constants.rows(x))
    if not args.leave_out:
        return
    for column in ("system", "backend"):
        left: list[Sample] = []
        errors = []
        for value in sorted({s.row[column] for s in samples}):
            own = [s for s in samples if s.row[column] == value]
            others = [s for s in samples if s.row[column] != value]
            names = [e for e in FITTED if column == "system" or e.split("-")[0] != value]
            few = Constants(names)
            chosen = np.array([x[constants.names.index(n)] for n in few.names])
            y = fit(others, few, chosen, LEFT_OUT_ROUNDS)
            r = predict(own, few.rows(y), names)
            print(f"without {column} {value}: {figures(own, r)}", flush=True)
            left += own
            errors.append(r)
        print(f"each {column} left out in turn: {figures(left, np.concatenate(errors))}", flush=True)
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def _from_file(constants: Constants, x: np.ndarray) -> np.ndarray:
    """Where the last fit ended: a start, not a prior."""
    rows = yaml.safe_load(Path(engines._FILE).read_text(encoding="utf-8"))
    default = rows["engines"]["default"]
    for j, name in enumerate(constants.names):
        head, _, tail = name.rpartition(".")
        if tail == "blackwell":
            x[j] = math.log(rows["kernels"][head].get(BLACKWELL[0], 1.0))
        elif name in KERNELS:
            x[j] = math.log(rows["kernels"][head][int(tail)] if head else rows["kernels"][tail])
        elif head == "default":
            x[j] = math.log(default[tail]) if default[tail] else x[j]
        elif default[tail]:
            x[j] = math.log(rows["engines"][head].get(tail, default[tail]) / default[tail])
    return x


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
