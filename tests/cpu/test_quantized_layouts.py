"""Weights in fewer bits: every layout answers as one process does that has those weights widened."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.__main__ import main
from launch.models import resolve
from orchestrator.engine.checkpoint import open_checkpoint
from orchestrator.engine.quantized import Quantized
from orchestrator.request import SamplingParams
from strategies.formats import FORMATS
from strategies.quantize import kept_on, native, scheme
from tests.oracle import greedy
from tests.serving import Pool, answers, assert_logits_agree, options, served
from tests.tiny import make_model

OUTPUT_TOKENS = 12
SIZES = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 288, "intermediate_size": 320}
OURS = {"o_proj": "attention.o", "down_proj": "mlp.down"}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(4)
    yield made
    made.gang.kill()


def widened(model: Any, spec: Any, kept: str) -> Any:
    """transformers' model with each linear layer's weights as they come back from the format."""
    for name, parameter in model.named_parameters():
        ours = next((to for part, to in OURS.items() if f".{part}." in name), "attention.qkv")
        if "_proj.weight" not in name:
            continue
        how = scheme(spec, FORMATS[kept], f"layers.0.{ours}.weight")
        assert how is not None
        n, k = parameter.shape
        layer = Quantized((n, k), how, False, torch.device("cpu"), torch.float32)
        layer.fill(0, parameter.detach(), None)
        parameter.data = layer.dequantized(slice(None))
    return model


FEW = {"int8": ("tp2pp2",), "int4": ("tp3",)}
MANY = {"int8": ("tp1", "tp2", "tp3", "pp2", "dp2"), "int4": ("tp1", "tp2", "pp2", "dp2", "tp2pp2")}


@pytest.mark.parametrize(
    ("kept", "layouts"),
    [*FEW.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in MANY.items())],
)
def test_layouts_answer_as_one_process_does(
    kept: str, layouts: tuple[str, ...], pool: Pool, tmp_path: Path
) -> None:
    """9 heads in 3 KV groups of 96 columns, an MLP of 5 groups of 64: two and three ranks get unlike parts."""
    model = make_model(tmp_path, "llama", std=0.1, **SIZES)
    asked = options(tmp_path, num_blocks=18, format=kept)
    expected = widened(model, asked.spec, kept)
    rnd = random.Random(1)
    given = [[rnd.randrange(131) for _ in range(n)] for n in (7, 33, 1)]
    for layout in layouts:
        with served(layout, asked, pool) as found:
            sampling = SamplingParams(max_tokens=OUTPUT_TOKENS)
            done = answers(found, asked, [(prompt, sampling) for prompt in given])
            seen = pool.seen_logits()
        assert [c.token_ids for c in done] == [greedy(expected, p, OUTPUT_TOKENS) for p in given], layout
        for prompt, completion in zip(given, done, strict=True):
            assert_logits_agree(expected, prompt, completion.token_ids, seen)


@pytest.mark.parametrize("kept", ["int4", "fp8"])
def test_a_published_checkpoint_answers_as_its_weights_widened_do(
    kept: str, pool: Pool, tmp_path: Path
) -> None:
    """Written by `quantize`, run as a CPU runs it (float8 widened): three ranks with unlike parts."""
    model = make_model(tmp_path / "model", "llama", std=0.1, **SIZES)
    made = tmp_path / "made"
    assert main(["quantize", str(tmp_path / "model"), "--to", kept, "-o", str(made), "--device", "cpu"]) == 0
    asked = options(made, num_blocks=18)
    spec = kept_on("cpu", asked.spec)
    asked = replace(asked, spec=spec, format=native(spec).name)
    assert asked.format == ("int4" if kept == "int4" else "")
    checkpoint = open_checkpoint(resolve(str(made)), asked.spec)
    for name, parameter in model.named_parameters():
        parameter.data = checkpoint.read(name).float().clone()  # embedding and norms in half precision
    given = [[3, 5, 7, 11, 13], [2]]
    with served("tp3", asked, pool) as found:
        done = answers(found, asked, [(p, SamplingParams(max_tokens=OUTPUT_TOKENS)) for p in given])
        seen = pool.seen_logits()
    assert [c.token_ids for c in done] == [greedy(model, p, OUTPUT_TOKENS) for p in given]
    for prompt, completion in zip(given, done, strict=True):
        assert_logits_agree(model, prompt, completion.token_ids, seen)
