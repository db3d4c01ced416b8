"""Rows priced as arrays, as a fit prices them, against the model of every command."""

import pytest

from tests.bench import fit_engines
from tests.bench.fit_engines import Constants, Measured, sample

ROWS = [
    # backend, version, model, system, precision, prompt, output, at once, tp, attention's dp, ep
    ("vllm", "0.12.0", "Qwen/Qwen3-32B", "h100_sxm", "bf16", 4096, 256, 64, 4, 1, 1),
    ("trtllm", "1.0.0", "meta-llama/Llama-3.1-8B-Instruct", "h100_sxm", "bf16", 1024, 128, 128, 8, 1, 1),
    ("trtllm", "1.3.0", "Qwen/Qwen3-32B", "gb200", "bf16", 2000, 500, 16, 2, 1, 1),
    ("sglang", "0.5.6", "meta-llama/Llama-3.1-8B-Instruct", "h200_sxm", "fp8", 1000, 2000, 512, 2, 1, 1),
    ("vllm", "0.12.0", "openai/gpt-oss-120b", "b200_sxm", "fp4", 8192, 1024, 256, 2, 1, 2),
    ("trtllm", "1.2.0", "deepseek-ai/DeepSeek-R1", "b200_sxm", "fp4", 1024, 1024, 512, 8, 8, 8),
    ("sglang", "0.5.9", "deepseek-ai/DeepSeek-V3", "h200_sxm", "fp8", 4000, 1, 8, 8, 1, 8),
]


def rows() -> list[dict[str, str]]:
    names = [
        "backend",
        "backend_version",
        "model_path",
        "system",
        "precision",
        "isl",
        "osl",
        "concurrency",
        "tp_size",
    ]
    names += ["attention_dp_size", "moe_ep_size"]
    made = [dict(zip(names, map(str, row), strict=True)) for row in ROWS]
    more = {"pp_size": "1", "moe_tp_size": "1", "ttft_ms": "100", "tpot_ms": "10"}
    return [{**row, **more, "id": str(i)} for i, row in enumerate(made)]


@pytest.fixture(scope="module")
def measured() -> Measured:
    return Measured.of([sample(row) for row in rows()])


def test_arrays_say_what_the_model_says(measured: Measured) -> None:
    constants = Constants(fit_engines.FITTED)
    measured.check(constants.engines(constants.prior, fit_engines._file()))
    measured.check(constants.engines(constants.prior + constants.spread / 2, fit_engines._file()))


def test_arrays_that_differ_are_told(measured: Measured) -> None:
    constants = Constants(fit_engines.FITTED)
    made = constants.engines(constants.prior, fit_engines._file())
    measured.rows.facts["bandwidth"] *= 1.001
    with pytest.raises(ValueError, match="arrays say"):
        measured.check(made)
    measured.rows.facts["bandwidth"] /= 1.001


def test_what_was_set_by_hand_from_rows_left_out_is_not_used() -> None:
    def waits(known: object) -> object:
        return known["engines"]["trtllm"].get("ungraphed_ms")

    assert waits(fit_engines._file()) == {"NVIDIA GB200": 27}
    assert waits(fit_engines.without("system", "gb200")) == {}
    assert waits(fit_engines.without("backend", "trtllm")) is None
    assert waits(fit_engines.without("system", "h100_sxm")) == {"NVIDIA GB200": 27}


def test_an_engine_without_rows_is_priced_as_its_kin() -> None:
    constants = Constants(fit_engines.FITTED)
    x = constants.prior.copy()
    x[constants.index["trtllm.launches"]] += 0.5
    made = constants.engines(x, fit_engines._file())
    assert made["trtllm-1.0"].launches == made["trtllm"].launches > made["vllm"].launches


def test_a_left_out_engine_has_the_middle_and_its_own_settings() -> None:
    constants = Constants(["vllm"])
    made = constants.engines(constants.prior, fit_engines._file())
    assert made["sglang"].launches == made["vllm"].launches
    assert not made["sglang"].eight_bit_kv


def test_a_fit_finds_the_constants_that_made_the_rows(measured: Measured) -> None:
    constants = Constants(fit_engines.FITTED)
    x = constants.prior.copy()
    x[constants.index["attention_gap_us"]] += 0.3
    x[constants.index["sglang.launches"]] += 0.3
    logs = measured.errors(constants.engines(x, fit_engines._file())) + measured.logs
    made = Measured(measured.samples, measured.rows, logs, measured.weight)
    before = abs(made.errors(constants.engines(constants.prior, fit_engines._file()))).max()
    found = fit_engines.fit(made, constants, fit_engines._file(), "made rows")
    after = abs(made.errors(constants.engines(found, fit_engines._file()))).max()
    assert after < 0.2 * before
