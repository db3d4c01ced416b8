"""`shardwise claims --measure`: what it says of figures that are handed in; and a run of it on this CPU."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch import __main__, claim_measure, claims
from launch.claim_measure import Measurement, parts_of
from launch.claim_measured import (
    CONTINUOUS,
    NOT_MEASURED,
    PARTS,
    RULE,
    Alone,
    Found,
    Loss,
    Product,
    adaptive,
    promised,
    rows_of,
)
from launch.claim_runs import RUNS, Load, drained, lengths, rules, shape
from orchestrator.request import Completion, FinishReason
from strategies.read_spec import builtin

GPU = Found(
    shape="16 layers of Llama-3.1-8B's shape",
    device="cuda",
    with_graphs=Alone(0.010, 0.004),
    eager=Alone(0.012, 0.008),
    pinned_bytes_per_s=55e9,
    pageable_bytes_per_s=11e9,
    products=[
        Product(1, 40e-6, 40e-6, 25e-6, is_halved=True),
        Product(512, 90e-6, 89e-6, 80e-6, is_halved=True),
    ],
    weight="a weight",
    loss=Loss("smollm2", "a text", 2040, {"int8": 0.001, "sparse24": 200.0}),
    drained={RULE: 1000.0, "batches of 4": 400.0, "batches of 16": 900.0, CONTINUOUS: 1500.0},
    load="72 requests",
)


def test_the_rule_is_as_the_guides_write_it():
    assert [adaptive(n) for n in (72, 40, 32, 17)] == [32, 32, 32, 17]
    assert [adaptive(n) for n in (16, 12, 9)] == [16, 12, 9]  # half + 8, of those that there are
    assert [adaptive(n) for n in (8, 5, 4, 1)] == [4, 4, 4, 1]


@pytest.mark.parametrize(
    ("got", "verdict"),
    [
        (0.40, "holds"),
        (0.33, "holds"),
        (0.9, "holds"),
        (0.2, "off by 2.0×"),
        (0.01, "wrong"),
        (-0.3, "wrong"),
    ],
)
def test_a_gain_holds_where_it_is_as_promised_or_more(got: float, verdict: str):
    assert promised(0.40, got) == verdict


def test_each_promise_is_put_beside_what_was_measured():
    graphs, pinned, pruning, int8, batches = rows_of(GPU, list(PARTS))
    assert graphs.verdict == "holds" and "12.00 ms without, 10.00 ms with (-17%)" in graphs.measured
    assert "8.00 ms and 4.00 ms (-50%)" in graphs.measured
    assert pinned.verdict == "depends" and "55.0 GB/s pinned, 11.0 pageable (+400%)" in pinned.measured
    assert pruning.verdict == "depends"  # 2:4 gives it, zeros do not
    assert "one row 40 µs dense, +0% with 30 % zeros, +60% at 2:4" in pruning.measured
    assert "costs smollm2 +20,000% perplexity" in pruning.why
    assert int8.verdict == "holds" and "+0.10% on 2,040 tokens of a text" in int8.measured
    assert batches.verdict == "depends" and batches.id == "C5"
    assert "batches of 4 400 (+150%); batches of 16 900 (+11%); continuous batching 1,500" in batches.measured
    assert "+50% beside the rule" in batches.why


def test_what_measuring_refutes_is_called_wrong():
    slow = replace(
        GPU,
        eager=Alone(0.010, 0.004),
        pinned_bytes_per_s=11e9,
        products=[replace(p, is_halved=False) for p in GPU.products],  # by noise alone
        loss=replace(GPU.loss, rise={"int8": 0.08}),
        drained={RULE: 400.0, "batches of 4": 400.0, "batches of 16": 900.0},
    )
    graphs, pinned, pruning, int8, batches = rows_of(slow, list(PARTS))
    assert {row.verdict for row in (graphs, pinned, pruning, batches)} == {"wrong"}
    assert int8.verdict == "off by 4.0×"
    assert "its zeros are kept" in pruning.why and "perplexity" not in pruning.why


def test_what_was_not_measured_says_why():
    cpu = Found("a shape", "cpu", absent={"adaptive": "the gang died", "int8": "no such package"})
    rows = {part: rows_of(cpu, [part])[0] for part in PARTS}
    assert {row.verdict for row in rows.values()} == {NOT_MEASURED}
    assert "a CPU has no CUDA graphs" in rows["graphs"].why
    assert "run this where there is a GPU" in rows["pinned"].why
    assert (rows["adaptive"].why, rows["int8"].why) == ("the gang died", "no such package")
    refused = replace(GPU, products=[Product(1, 1.0, 1.0, None, refused="torch's kernels refuse")])
    assert "2:4 does not run here: torch's kernels refuse" in rows_of(refused, ["pruning"])[0].why


def test_a_shape_is_as_much_of_a_model_as_fits():
    spec = builtin("llama-3.1-8b")
    assert shape(spec, "cuda", 80 * 10**9)[0].layers == 16
    small, name = shape(spec, "cuda", 8 * 10**9)
    assert 1 <= small.layers < 16 and f"{small.layers} layers of" in name
    assert small.total_params * 2 < 0.61 * 8e9
    for kind, runs in RUNS.items():
        asked = lengths(runs.crowd)
        assert len(asked) == runs.crowd.requests, kind
        assert max(asked) <= runs.crowd.output_tokens[1] and len(set(asked)) > 2
        assert asked == lengths(runs.crowd)


class Counting:
    """A coordinator that answers at once, and remembers how many were asked together."""

    def __init__(self) -> None:
        self.together, self._open = [], 0

    async def complete(self, prompt, sampling):
        self._open += 1
        await asyncio.sleep(0)  # the others of the batch come
        self.together.append(self._open)
        await asyncio.sleep(0)
        self._open -= 1
        ids = list(range(sampling.max_tokens))
        made = Completion(
            request_id="", prompt_tokens=len(prompt), token_ids=ids, finish_reason=FinishReason.LENGTH
        )
        return [made]


def test_a_batch_is_waited_for_before_the_next_is_made():
    load = Load(40, 4, (2, 6))
    sizes = {}
    for how, rule in rules().items():
        coordinator = Counting()
        rate = asyncio.run(drained(coordinator, 100, load, how, rule))
        assert rate > 0 and len(coordinator.together) == 40
        sizes[how] = max(coordinator.together)
    assert sizes == {RULE: 32, "batches of 4": 4, "batches of 16": 16, CONTINUOUS: 40}


def test_only_measurable_claims_are_measured(capsys):
    assert parts_of(["c5"]) == ["adaptive"]
    assert parts_of([]) == list(PARTS)
    assert __main__.main(["claims", "A1", "--measure"]) == 2
    said = capsys.readouterr().err
    assert "--measure is of A6 and C5, not of A1" in said and said.count("\n") == 1
    assert __main__.main(["claims", "A6", "--device", "cpu"]) == 2
    assert "--device is of --measure; add that, or leave --device away" in capsys.readouterr().err


def test_it_is_told_in_all_three_ways(capsys, monkeypatch, tmp_path: Path):
    found = Measurement("H100", "2026-11-22", {"torch": "2.13"}, 1.0, rows_of(GPU, list(PARTS)))
    monkeypatch.setattr(claim_measure, "measure", lambda *_: found)
    page = tmp_path / "claims.md"
    assert __main__.main(["claims", "--measure", "--json", "--report", str(page)]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["measured"]["machine"] == "H100" and made["measured"]["versions"] == {"torch": "2.13"}
    assert [row["id"] for row in made["measured"]["rows"]] == ["A6"] * 4 + ["C5"]
    assert set(made["measured"]["rows"][0]) == {"id", "claim", "measured", "verdict", "why"}
    assert len(made["claims"]) > 20
    measured = page.read_text().partition(claims.MEASURED_TITLE)[2]
    assert "H100, 2026-11-22, torch 2.13" in measured and measured.count("\n| A6") == 4
    assert __main__.main(["claims", "--measure"]) == 0
    assert "measured here: host to device 55.0 GB/s pinned" in " ".join(capsys.readouterr().out.split())
    busy = replace(found, cores_left=0.5)
    assert "other programs left 50% of the cores' time" in busy.told
