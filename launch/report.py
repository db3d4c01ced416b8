"""A comparison as data: what `--json` prints and results.json holds, its verdicts, and the same as rows of CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

from cluster.topology import Topology
from launch.compare_journal import Trials
from launch.compare_quality import Qualities
from launch.plan_json import candidate_to_json, plan_to_json
from launch.trial import Measured, Trial
from strategies.cost import score
from strategies.intervals import FIRST_TOKEN
from strategies.kept import Kept
from strategies.plan import Candidate, Estimate, Plan
from strategies.spec import Objective, Workload

METRICS = ("ttft_ms", "tpot_ms", "output_tokens_per_s")


@dataclass(frozen=True, slots=True)
class Comparison:
    """`workload` is the first load's; `against`: endpoints' trials by their address."""

    plans: Mapping[int, Plan]  # by concurrency
    trials: Trials
    workload: Workload
    topology: Topology
    dtype: str
    against: Trials = field(default_factory=dict)
    quality: Qualities = field(default_factory=dict)
    quality_unknown: str | None = None  # why nothing can be told of it
    named: bool = (
        False  # the layouts were, or stand for what fits nowhere: those refused are shown one by one
    )

    @property
    def plan(self) -> Plan:
        return self.plans[self.workload.concurrency]

    def load(self, concurrency: int) -> Workload:
        return replace(self.workload, concurrency=concurrency)

    def candidate(self, name: str, concurrency: int) -> Candidate | None:
        every = self.plans[concurrency].candidates
        return next((c for c in every if c.layout.name == name), None)

    def trial(self, name: str, concurrency: int) -> Trial | None:
        return self.trials.get(name, {}).get(concurrency)


def error_percent(predicted: float, measured: float) -> float | None:
    """Signed; None where nothing was measured to divide by, as the TPOT of one-token answers."""
    return 100 * (predicted - measured) / measured if measured else None


def _kept(name: str) -> str:
    """The format that a layout's name tells; where its layers lie changes nothing."""
    return name.removesuffix("+offload").partition("+")[2]


def outputs(made: Comparison, name: str) -> str | None:
    """equal or different, within one format; None where nothing could be compared.

    In half precision by logits, if they were looked at; else by tokens, beside the first layout measured at a load.
    """
    own = {n: trial for n, trial in made.trials.get(name, {}).items() if trial.measured is not None}
    if not own:
        return None
    scored = next((t for t in own.values() if t.forced_error is not None), None)
    if scored is not None and scored.forced_error is not None and scored.allowed_error is not None:
        return "equal" if scored.forced_error <= scored.allowed_error else "different"
    if made.dtype != "float32":
        return None  # sums in another order may flip an argmax, and nothing else was looked at
    if not all(trial.tokens_digest for trial in own.values()):
        return None  # of weights of its own
    kept = _kept(name)
    same_format = [
        other
        for other, trials in made.trials.items()
        if _kept(other) == kept and any(t.measured is not None and t.tokens_digest for t in trials.values())
    ]
    if kept and len(same_format) == 1:
        return None
    for n, trial in own.items():
        digests = [
            t.tokens_digest for o in same_format if (t := made.trial(o, n)) and t.measured and t.tokens_digest
        ]
        if trial.tokens_digest != digests[0]:
            return "different"
    return "equal"


# --- as one object ------------------------------------------------------------------------------------------


def comparison_to_json(made: Comparison) -> dict[str, object]:
    """The plan's object of the first load, and in each candidate what was predicted and measured at each load."""
    found = plan_to_json(made.plan, made.workload)
    found["concurrencies"] = list(made.plans)
    found["dtype"] = made.dtype
    found["candidates"] = [_candidate(made, candidate) for candidate in made.plan.candidates]
    found["verdicts"] = verdicts(made)
    found["against"] = [
        {
            "endpoint": url,
            "results": [{"concurrency": n, **_measured_part(trial)} for n, trial in sorted(trials.items())],
        }
        for url, trials in made.against.items()
    ]
    found["quality_unknown"] = made.quality_unknown
    found["devices"] = [
        {
            "name": d.name,
            "memory_gb": round(d.memory_bytes / 1e9, 3),
            "bandwidth_gb_per_s": round(d.bandwidth_bytes_per_s / 1e9, 2),
            "provenance": str(d.provenance),
        }
        for d in made.topology.devices
    ]
    found["links"] = [
        {
            "between": [a, b],
            "kind": str(link.kind),
            "gb_per_s": round(link.bytes_per_s / 1e9, 2),
            "latency_us": round(link.latency_s * 1e6, 2),
            "provenance": str(link.provenance),
        }
        for (a, b), link in sorted(made.topology.links.items())
    ]
    return found


def _candidate(made: Comparison, candidate: Candidate) -> dict[str, object]:
    found = candidate_to_json(candidate)
    name = candidate.layout.name
    loads = [n for n in made.plans if made.trial(name, n) is not None]
    found["results"] = [_result(made, name, n) for n in loads]
    found["outputs"] = outputs(made, name)
    quality = made.quality.get(candidate.format.name)
    found["quality"] = None if quality is None else asdict(quality)
    found["refused"] = candidate.reason or candidate.not_runnable
    return found


def _result(made: Comparison, name: str, concurrency: int) -> dict[str, object]:
    trial, candidate = made.trial(name, concurrency), made.candidate(name, concurrency)
    assert trial is not None and candidate is not None and candidate.estimate is not None, (
        "only feasible ones run"
    )
    predicted = candidate_to_json(candidate)["predicted"]
    assert isinstance(predicted, Mapping)
    estimate, measured = candidate.estimate, trial.measured
    errors = {}
    if measured is not None:
        errors = {key: error_percent(predicted[key], value) for key, value in _measured(measured).items()}
    limit = estimate.output_tokens_per_s / estimate.share_of_limit
    return {
        "concurrency": concurrency,
        "predicted": predicted,
        "error_percent": errors or None,
        "measured_share_of_limit": None if measured is None else measured.output_tokens_per_s / limit,
        "interval_percent": {
            "ttft_ms": round(100 * FIRST_TOKEN * estimate.spread, 1),
            "tpot_ms": round(100 * estimate.spread, 1),
            "output_tokens_per_s": round(100 * estimate.spread, 1),
        },
        "step_ms": {cause: round(s * 1e3, 5) for cause, s in estimate.breakdown.items()},
        "memory_gb": {part: round(b / 1e9, 4) for part, b in estimate.memory_parts.items()},
        **_measured_part(trial),
    }


def _measured_part(trial: Trial) -> dict[str, object]:
    return {
        "measured": None if trial.measured is None else _measured(trial.measured),
        "rounds": trial.rounds,
        "failure": trial.failure,
        "logits_error": trial.forced_error,
        "joules_per_token": trial.joules_per_token,
        "throttled_by": list(trial.throttled_by),
        "devices": [
            {
                "uuid": h.uuid,
                "sm_clock_mhz": h.sm_clock_mhz,
                "temperature_c": h.temperature_c,
                "watts": h.watts,
                "joules": h.joules,
                "throttled_by": h.throttled_by,
            }
            for h in trial.health
        ],
    }


def _measured(found: Measured) -> dict[str, float]:
    return {
        "ttft_ms": round(found.ttft_s * 1e3, 4),
        "tpot_ms": round(found.tpot_s * 1e3, 4),
        "output_tokens_per_s": round(found.output_tokens_per_s, 4),
    }


# --- verdicts -----------------------------------------------------------------------------------------------


def verdicts(made: Comparison) -> list[dict[str, object]]:
    """For each load and objective: what the plan would choose, what was best, and what the choice loses to it."""
    every = (_verdict(made, replace(made.load(n), objective=o)) for n in made.plans for o in Objective)
    return [verdict for verdict in every if verdict]


def _verdict(made: Comparison, workload: Workload) -> dict[str, object] | None:
    predicted: dict[str, float] = {}
    real: dict[str, float] = {}
    sizes: dict[str, int] = {}
    unmeasured = []
    for candidate in made.plans[workload.concurrency].candidates:
        if candidate.estimate is None or candidate.not_runnable is not None:
            continue
        name = candidate.layout.name
        trial = made.trial(name, workload.concurrency)
        if trial is None or trial.measured is None:
            unmeasured.append(name)
            continue
        sizes[name] = candidate.dims.world_size
        predicted[name] = score(candidate.estimate, candidate.dims, workload)
        real[name] = score(as_estimate(trial.measured, candidate.estimate), candidate.dims, workload)
    if not real:
        return None
    chosen = min(predicted, key=lambda name: (predicted[name], sizes[name]))
    winner = min(real, key=lambda name: (real[name], sizes[name]))
    return {
        "concurrency": workload.concurrency,
        "objective": workload.objective.value,
        "chosen": chosen,
        "winner": winner,
        "regret_percent": round(100 * (real[chosen] / real[winner] - 1), 3),
        "not_measured": unmeasured,
    }


def as_estimate(found: Measured, predicted: Estimate) -> Estimate:
    """The estimate with what was measured in place of what was predicted."""
    rate = found.output_tokens_per_s
    usd = predicted.usd_per_million_tokens
    if usd is not None:
        usd *= predicted.output_tokens_per_s / rate
    return replace(
        predicted,
        ttft_s=found.ttft_s,
        tpot_s=found.tpot_s,
        output_tokens_per_s=rate,
        usd_per_million_tokens=usd,
    )


def kept_of(made: Comparison) -> Iterator[Kept]:
    """What later plans may go by: each layout's figures under each load, with what was predicted."""
    today = datetime.now(UTC).date().isoformat()
    for name, trials in made.trials.items():
        for n, trial in trials.items():
            candidate = made.candidate(name, n) if n in made.plans else None
            if trial.measured is None or candidate is None or candidate.estimate is None:
                continue
            found, predicted = trial.measured, candidate.estimate
            yield Kept(
                layout=name,
                prompt_tokens=made.workload.prompt_tokens,
                output_tokens=made.workload.output_tokens,
                concurrency=n,
                ttft_s=found.ttft_s,
                tpot_s=found.tpot_s,
                output_tokens_per_s=found.output_tokens_per_s,
                predicted_ttft_s=predicted.ttft_s,
                predicted_tpot_s=predicted.tpot_s,
                predicted_tokens_per_s=predicted.output_tokens_per_s,
                measured_on=today,
            )


# --- as rows ------------------------------------------------------------------------------------------------

COLUMNS = (
    "layout",
    "concurrency",
    *(f"{metric}_{what}" for metric in METRICS for what in ("predicted", "measured", "error_percent")),
    "share_of_limit_predicted",
    "share_of_limit_measured",
    "memory_gb_per_gpu",
    "joules_per_token",
    "sm_clock_mhz",
    "temperature_c",
    "watts",
    "throttled_by",
    "outputs",
    "perplexity_rise_percent",
    "kl_divergence",
    "failure",
)


def to_csv(results: Mapping[str, object]) -> str:
    """Of the object above: a row for each layout and load, and for each endpoint beside them."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows(results):
        writer.writerow({key: "" if value is None else value for key, value in row.items()})
    return out.getvalue()


def rows(results: Mapping[str, object]) -> Iterator[dict[str, object]]:
    for candidate in _list(results["candidates"]):
        for result in _list(candidate["results"]):
            quality = _mapping(candidate["quality"])
            told = {key: quality.get(key) for key in ("perplexity_rise_percent", "kl_divergence")}
            yield {**_row(candidate["layout"], result), "outputs": candidate["outputs"], **told}
    for endpoint in _list(results["against"]):
        for result in _list(endpoint["results"]):
            yield _row(endpoint["endpoint"], result)


def _row(name: object, result: Mapping[str, object]) -> dict[str, object]:
    predicted, measured, errors = (
        _mapping(result.get(key)) for key in ("predicted", "measured", "error_percent")
    )
    devices = _list(result["devices"])

    def mean(key: str) -> float | None:
        known = [float(v) for d in devices if isinstance(v := d[key], int | float)]
        return round(sum(known) / len(known), 1) if known else None

    row: dict[str, object] = {"layout": name, "concurrency": result["concurrency"]}
    for metric in METRICS:
        row[f"{metric}_predicted"] = predicted.get(metric)
        row[f"{metric}_measured"] = measured.get(metric)
        row[f"{metric}_error_percent"] = _rounded(errors.get(metric), 2)
    return row | {
        "share_of_limit_predicted": predicted.get("share_of_limit"),
        "share_of_limit_measured": _rounded(result.get("measured_share_of_limit"), 4),
        "memory_gb_per_gpu": predicted.get("memory_gb_per_gpu"),
        "joules_per_token": _rounded(result["joules_per_token"], 4),
        "sm_clock_mhz": mean("sm_clock_mhz"),
        "temperature_c": mean("temperature_c"),
        "watts": mean("watts"),
        "throttled_by": "; ".join(map(str, _sequence(result["throttled_by"]))),
        "failure": result["failure"],
    }


def _rounded(value: object, digits: int) -> float | None:
    return round(value, digits) if isinstance(value, int | float) else None


def _sequence(value: object) -> Sequence[object]:
    assert isinstance(value, list)
    return value


def _list(value: object) -> list[Mapping[str, object]]:
    assert isinstance(value, list)
    return value


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
