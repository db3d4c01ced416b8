"""What fewer bits cost: the arithmetic, the windows, what is refused, and the command on a model of its own."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.errors import BadLayout, BadRequest
from launch.__main__ import main
from launch.quality import config_of, options_of, precision, with_float8
from launch.texts import bundled
from orchestrator.engine.quality import compared, scored, windows_of
from tests.tiny import make_model


def test_figures_are_those_of_the_definitions() -> None:
    """Two windows of 3 tokens over a vocabulary of 4, by hand."""
    torch.manual_seed(0)
    windows = [[0, 3, 1], [2, 2, 0]]
    expected = [torch.randn(3, 4) for _ in windows]
    actual = [torch.randn(3, 4) for _ in windows]
    found = compared(expected, iter(actual), windows)
    nll, own_nll, divergence, agreed = [], [], [], []
    for window, ref, own in zip(windows, expected, actual, strict=True):
        for t in range(2):
            p, q = ref[t].double().softmax(0).tolist(), own[t].double().softmax(0).tolist()
            nll.append(-math.log(p[window[t + 1]]))
            own_nll.append(-math.log(q[window[t + 1]]))
            divergence.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            agreed.append(p.index(max(p)) == q.index(max(q)))
    assert found.tokens == 4
    assert found.reference_perplexity == pytest.approx(math.exp(sum(nll) / 4), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(sum(own_nll) / 4), rel=1e-6)
    assert found.kl_divergence == pytest.approx(sum(divergence) / 4, rel=1e-5)
    assert found.top1_agreement == sum(agreed) / 4


def test_windows() -> None:
    assert windows_of(range(10), 4, 9) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows_of(range(3), 4, 9) == [[0, 1, 2]]
    with pytest.raises(BadRequest, match="1 tokens; quality needs 2"):
        windows_of([5], 4, 9)


def test_no_text_serves_both() -> None:
    to_measure, to_calibrate = bundled(), bundled(to_calibrate=True)
    assert min(len(to_measure), len(to_calibrate)) > 100_000
    assert to_measure[:2000] not in to_calibrate


def test_wants_a_tokenizer_and_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path, "llama")
    assert main(["quality", str(tmp_path), "--device", "cpu"]) == 2
    assert "has no tokenizer, which a text needs" in capsys.readouterr().err
    assert main(["quality", str(tmp_path), "--device", "cpu", "--layout", "tp2"]) == 2
    assert "quality runs on one device" in capsys.readouterr().err
    assert main(["quality", str(tmp_path), "--text", str(tmp_path / "none.txt")]) == 2
    assert "cannot be read (No such file" in capsys.readouterr().err


def test_a_cpu_emulates_float8(tmp_path: Path) -> None:
    """Of a format that is asked for, and of a checkpoint that has it; here alone."""
    make_model(tmp_path / "plain", "llama")
    made = str(tmp_path / "made")
    assert main(["quantize", str(tmp_path / "plain"), "--to", "fp8", "-o", made, "--device", "cpu"]) == 0
    for model, layout in ((str(tmp_path / "plain"), "tp1+fp8"), (made, "tp1"), (made, "tp1+kvfp8")):
        asked = with_float8(options_of(model, "cpu", "auto", layout), "auto")
        assert (asked.format, asked.dtype) == ("fp8" + layout[3:].replace("+fp8", ""), "bfloat16")
        assert precision(asked).startswith("bfloat16 with fp8 weights, emulated")
        assert config_of(asked).emulates_float8
        (logits,) = scored(config_of(asked), [list(range(20))], lambda done, total: None)
        assert logits.shape == (20, 131) and logits.isfinite().all()
    assert with_float8(options_of(made, "cpu", "float32", "tp1"), "float32").dtype == "float32"
    with pytest.raises(BadLayout, match=r"wants GPUs of compute capability 8\.9 on"):
        list(scored(replace(config_of(asked), emulates_float8=False), [[1, 2]], lambda done, total: None))


def test_a_model_is_like_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2 on 32 tokens: in float32 nothing is lost."""
    assert main(["quality", "smollm2", "--device", "cpu", "--tokens", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 31
    assert found["perplexity"] == found["reference_perplexity"]
    assert abs(found["kl_divergence"]) < 1e-6
    assert found["top1_agreement"] == 1
