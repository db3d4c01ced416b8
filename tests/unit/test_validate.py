"""`shardwise validate`: what it reads, what it writes back, and how it counts errors and ranked pairs."""

import csv
import json
from pathlib import Path

import pytest

from launch import __main__
from launch.measured import Prediction
from launch.validate import pairs_ranked

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
