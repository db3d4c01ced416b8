"""`shardwise validate`: what it reads, what it writes back, and how it counts errors and ranked pairs."""

import csv
import json
from pathlib import Path

import pytest

from launch import __main__
from launch.accuracy import pairs_ranked
from launch.measured import Prediction, serving_dims, spec_at

SERVING = (
    "id,backend,backend_version,model_path,system,precision,isl,osl,concurrency,tp_size,pp_size,"
    "attention_dp_size,moe_tp_size,moe_ep_size,ttft_ms,tpot_ms\n"
)
ROW = "a,vllm,0.12.0,Qwen/Qwen3-32B,h100_sxm,bf16,1024,512,8,4,1,1,1,1,126,10.73\n"


def shardwise(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = __main__.main(["validate", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_every_row_comes_back_with_its_prediction_or_a_reason(capsys, tmp_path: Path):
    given, written = tmp_path / "rows.csv", tmp_path / "predictions.csv"
    unknown = ROW.replace("Qwen/Qwen3-32B", "nobody/Nothing-1B")
    given.write_text(SERVING + ROW + unknown)
    code, out, err = shardwise(capsys, str(given), "--out", str(written), "--json")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert (summary["rows"], summary["refused"]) == (2, 1)
    known, refused = list(csv.DictReader(written.open()))
    assert known["id"] == "a" and known["tpot_ms"] == "10.73" and known["reason"] == ""
    assert 5 < float(known["predicted_tpot_ms"]) < 20
    assert (refused["predicted_ttft_ms"], refused["predicted_tpot_ms"]) == ("", "")
    assert "nobody/Nothing-1B" in refused["reason"]


def test_rows_without_measured_figures_are_predicted_too(capsys, tmp_path: Path):
    given, written = tmp_path / "rows.csv", tmp_path / "predictions.csv"
    given.write_text(SERVING + ROW.replace("126,10.73", ","))
    code, out, _ = shardwise(capsys, str(given), "--out", str(written), "--json")
    assert code == 0
    assert json.loads(out)["errors"]["tpot_dense"]["rows"] == 0
    (row,) = csv.DictReader(written.open())
    assert float(row["predicted_tpot_ms"]) > 0
    given.write_text((SERVING + ROW).replace(",ttft_ms,tpot_ms", "").replace(",126,10.73", ""))
    assert shardwise(capsys, str(given), "--out", str(written))[0] == 0
    (blind,) = csv.DictReader(written.open())
    assert blind["predicted_tpot_ms"] == row["predicted_tpot_ms"]


def test_pairs_are_ranked_within_a_group_and_refusals_count_as_wrong():
    def row(group: str, value: float) -> dict[str, str]:
        return {"group": group, "value": str(value)}

    pairs = [
        (row("a", 10), Prediction(value=1.0)),
        (row("a", 20), Prediction(value=2.0)),
        (row("a", 15), Prediction(reason="unknown")),
        (row("b", 10), Prediction(value=5.0)),
        (row("b", 20), Prediction(value=4.0)),
        (row("", 1), Prediction(value=9.0)),
    ]
    assert pairs_ranked(pairs) == (1, 4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no rows"),
        ("a,b\n1,2\n", "has no column"),
        (SERVING.replace(",system", "") + "x\n", "has no column system; a serving file needs it"),
    ],
)
def test_a_file_of_another_kind_is_one_line_and_exit_2(capsys, tmp_path: Path, content: str, said: str):
    given = tmp_path / "rows.csv"
    given.write_text(content)
    code, out, err = shardwise(capsys, str(given))
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1
    assert shardwise(capsys, str(tmp_path / "nowhere.csv"))[0] == 2


def test_the_report_replaces_its_own_section_and_leaves_the_other(capsys, tmp_path: Path):
    given, page = tmp_path / "rows.csv", tmp_path / "accuracy.md"
    given.write_text(SERVING + ROW)
    page.write_text("# Kept\n\n<!-- layouts -->\nof another file\n<!-- end of layouts -->\n")
    for _ in range(2):
        assert shardwise(capsys, str(given), "--report", str(page), "--json")[0] == 0
    text = page.read_text()
    assert text.startswith("# Kept") and text.count("of another file") == 1
    assert text.count("<!-- serving -->") == text.count("| tpot_dense |") == 1
    assert "shardwise validate rows.csv --report" in text


def test_rows_that_claim_more_than_the_cards_can_do_are_told_apart(capsys, tmp_path: Path):
    given = tmp_path / "rows.csv"
    impossible = ROW.replace("126,10.73", "1,0.5")  # 65 GB of weights over four H100s take 4.9 ms to read
    given.write_text(SERVING + ROW + impossible)
    _, out, _ = shardwise(capsys, str(given), "--json")
    summary = json.loads(out)
    assert summary["beyond_limit"] == 1
    assert summary["errors"]["tpot_dense"]["rows"] == 2
    assert summary["errors"]["tpot_dense_within_limits"]["rows"] == 1


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "Llama-3.1-8B-Instruct"),
        ("Qwen/Qwen3-235B-A22B-FP8", "Qwen3-235B-A22B"),
        ("nvidia/DeepSeek-R1-0528-NVFP4-v2", "DeepSeek-R1"),
        ("nvidia/DeepSeek-R1-0528-FP4", "DeepSeek-R1"),
        ("moonshotai/Kimi-K2.5", "Kimi-K2.5"),
        ("nobody/Nothing-1B", None),
    ],
)
def test_models_are_found_by_the_names_of_their_checkpoints(told: str, name: str | None):
    found = spec_at(told)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("cells", "layout"),
    [
        ({"tp_size": "8", "moe_tp_size": "1", "moe_ep_size": "8"}, "tp8ep8"),
        ({"tp_size": "8", "moe_tp_size": "8", "moe_ep_size": "8"}, "tp8ep8"),  # one set of GPUs, named twice
        ({"tp_size": "4", "attention_dp_size": "4", "moe_tp_size": "1", "moe_ep_size": "16"}, "dp4ep4"),
        ({"tp_size": "1", "moe_tp_size": "2", "moe_ep_size": "1"}, "tp2"),
        ({"tp_size": "1", "attention_dp_size": "8", "moe_tp_size": "1", "moe_ep_size": "8"}, "dp8ep8"),
    ],
)
def test_layouts_of_serving_rows(cells: dict[str, str], layout: str):
    row = {"pp_size": "1", "attention_dp_size": "1", **cells}
    assert serving_dims(row, spec_at("Qwen/Qwen3-235B-A22B")).name == layout


def test_a_broken_cell_is_a_reason_not_an_error(capsys, tmp_path: Path):
    given, written = tmp_path / "rows.csv", tmp_path / "predictions.csv"
    rows = [ROW.replace(",1024,512,", ",x,512,"), ROW.replace("h100_sxm", "h999"), ROW.replace("bf16", "fp3")]
    rows += [ROW.replace(",8,4,1,", ",8,999,1,")]
    given.write_text(SERVING + "".join(rows))
    assert shardwise(capsys, str(given), "--out", str(written))[0] == 0
    reasons = [row["reason"] for row in csv.DictReader(written.open())]
    assert "isl is 'x'; it must be a whole number" in reasons[0]
    assert "unknown device 'h999'" in reasons[1]
    assert "unknown format 'fp3'" in reasons[2]
    assert "tp999 takes 999 devices; at most 512" in reasons[3]
