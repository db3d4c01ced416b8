"""Offloaded layers: every layout answers as transformers does in one process, with one or two layers resident."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.request import SamplingParams
from tests.cpu.test_layouts import prompts
from tests.oracle import greedy
from tests.serving import Pool, answers, assert_logits_agree, options, served
from tests.tiny import make_model

OUTPUT_TOKENS = 10
LAYERS = 7  # pp2 has stages of unlike and odd numbers


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(2)
    yield made
    made.gang.kill()


@pytest.mark.parametrize(
    ("layout", "resident"),
    [
        ("tp2", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("tp1", 1), ("tp2", 1), ("pp2", 1), ("pp2", 2)]
        ),
    ],
)
def test_offloaded_layers_answer_as_transformers_does(
    layout: str, resident: int, pool: Pool, tmp_path: Path
) -> None:
    model = make_model(tmp_path, "qwen2", num_key_value_heads=2, num_hidden_layers=LAYERS)
    asked = options(tmp_path, num_blocks=18, offload=True, resident_layers=resident)
    given = prompts(model.config.vocab_size)
    with served(layout, asked, pool) as found:
        done = answers(found, asked, [(p, SamplingParams(max_tokens=OUTPUT_TOKENS)) for p in given])
        seen = pool.seen_logits()
        told = [
            part.call(rank, "residence").result(30)
            for part in pool.given
            for rank in range(len(part.members))
        ]
    assert [c.token_ids for c in done] == [greedy(model, p, OUTPUT_TOKENS) for p in given]
    for prompt, completion in zip(given, done, strict=True):
        assert_logits_agree(model, prompt, completion.token_ids, seen)
    assert all(kept == resident and layers > kept for layers, kept, *_ in told)
    # A pipeline's stages with no more than two layers streamed keep those in the buffers.
    assert all((moved > 0) == (layers - kept > 2) for layers, kept, moved, _ in told)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_layers_on_a_disk_answer_as_resident_ones_do(layout: str, pool: Pool, tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen2", num_key_value_heads=2, num_hidden_layers=LAYERS)
    given = prompts(model.config.vocab_size)[:3]
    asked = options(tmp_path, num_blocks=18, offload=True, resident_layers=1, offload_dir=tmp_path / "disk")
    with served(layout, asked, pool) as found:
        done = answers(found, asked, [(p, SamplingParams(max_tokens=OUTPUT_TOKENS)) for p in given])
    assert [c.token_ids for c in done] == [greedy(model, p, OUTPUT_TOKENS) for p in given]


@pytest.mark.slow
def test_offloaded_layers_in_four_bits_answer_as_resident_ones_do(pool: Pool, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 256}
    model = make_model(tmp_path, "llama", std=0.1, num_hidden_layers=5, **sizes)
    given = prompts(model.config.vocab_size)[:3]
    found = []
    for changes in ({}, {"offload": True, "resident_layers": 1}):
        asked = options(tmp_path, num_blocks=18, format="int4", **changes)
        with served("tp2", asked, pool) as deployed:
            sampling = SamplingParams(max_tokens=OUTPUT_TOKENS)
            found.append([c.token_ids for c in answers(deployed, asked, [(p, sampling) for p in given])])
    assert found[0] == found[1]
