"""Every layout gives what transformers gives in one process: greedy tokens, and float32 logits to 1e-4.

In mixed batches, with chunked prefill, prefix hits and preemption, on real processes over gloo.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.request import SamplingParams
from tests.oracle import SmolLM2Oracle, greedy
from tests.serving import Pool, answers, assert_logits_agree, options, served
from tests.tiny import make_model

LAYOUTS = ["tp1", "tp2", "tp3", "pp2", "pp3", "dp2", "tp2pp2", "tp2dp2"]
REAL = (
    "tp1",
    "tp3",
    "tp2pp2",
)  # SmolLM2's in CI, of 9 heads in 3 groups, as one of the tiny models has
EIGHT_RANKS = ["tp4", "tp8", "tp2pp2", "tp4dp2", "tp4pp2", "tp2pp4", "pp4", "pp8", "tp2pp2dp2", "tp3", "pp3"]
UNEVEN = ["tp3", "tp4", "tp8", "tp3pp2", "tp2pp3", "tp2pp4", "pp3", "pp4", "pp8", "tp3dp2"]
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, 9 heads in 3 groups, tied": (
        "llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "tie_word_embeddings": True},
    ),
    "llama, 5 KV groups, odd vocabulary": (
        "llama",
        {"num_attention_heads": 10, "num_key_value_heads": 5, "hidden_size": 80, "vocab_size": 127},
    ),
    "llama, all biases, llama3 rope": (
        "llama",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": ROPE
            | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    ),
    "mistral, sliding window, linear rope": (
        "mistral",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "sliding_window": 20}
        | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
    ),
    "qwen2, QKV bias, tied, YaRN": (
        "qwen2",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
            "tie_word_embeddings": True,
            "rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0},
        },
    ),
    "qwen3, QK norm": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}),
}
OUTPUT_TOKENS = 24


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(8)
    yield made
    made.gang.kill()


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "_"))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    family, overrides = MODELS[request.param]
    directory = tmp_path_factory.mktemp("model")
    return directory, make_model(directory, family, **overrides)


def prompts(vocab: int) -> list[list[int]]:
    """Long ones that share a beginning, short ones, and one token."""
    rnd = random.Random(1)
    shared = [rnd.randrange(vocab) for _ in range(40)]
    lengths = [(0, 7), (40, 3), (40, 9), (0, 33), (24, 1), (0, 1), (40, 3)]
    return [shared[:k] + [rnd.randrange(vocab) for _ in range(n)] for k, n in lengths]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_transformers(layout: str, tiny: tuple[Path, Any], pool: Pool) -> None:
    directory, model = tiny
    asked = options(directory, num_blocks=18)  # of 8 tokens: the prompts at once need more
    given = prompts(model.config.vocab_size)
    with served(layout, asked, pool) as found:
        sampling = SamplingParams(max_tokens=OUTPUT_TOKENS)
        done = answers(found, asked, [(prompt, sampling) for prompt in given])
        seen = pool.seen_logits()
        loads = [part.call(0, "current_load").result(10) for part in pool.given]
    assert [c.token_ids for c in done] == [greedy(model, p, OUTPUT_TOKENS) for p in given]
    if "dp" not in layout:  # one replica alone takes all prompts
        assert sum(load.preemptions for load in loads) > 0
        assert sum(load.prefix_hit_tokens for load in loads) > 0
    for prompt, completion in zip(given, done, strict=True):
        assert_logits_agree(model, prompt, completion.token_ids, seen)


@pytest.mark.slow
@pytest.mark.parametrize("layout", EIGHT_RANKS)
def test_a_layout_of_up_to_eight_ranks(layout: str, tmp_path: Path, pool: Pool) -> None:
    """Enough layers for eight stages, and heads for eight ranks; three stages split them unevenly."""
    wide = {"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 64, "num_hidden_layers": 9}
    exactly_as_transformers(layout, tmp_path, make_model(tmp_path, "llama", **wide), pool)


@pytest.mark.slow
@pytest.mark.parametrize("layout", UNEVEN)
def test_heads_and_layers_that_do_not_divide(layout: str, tmp_path: Path, pool: Pool) -> None:
    odd = {"num_attention_heads": 10, "num_key_value_heads": 5, "hidden_size": 80, "vocab_size": 127}
    exactly_as_transformers(
        layout, tmp_path, make_model(tmp_path, "llama", num_hidden_layers=10, **odd), pool
    )


def test_eight_ranks_at_once(tmp_path: Path, pool: Pool) -> None:
    exactly_as_transformers("tp2pp2dp2", tmp_path, make_model(tmp_path, "llama"), pool)


def exactly_as_transformers(layout: str, directory: Path, model: Any, pool: Pool) -> None:
    asked = options(directory)
    given = prompts(model.config.vocab_size)
    with served(layout, asked, pool) as found:
        done = answers(found, asked, [(p, SamplingParams(max_tokens=OUTPUT_TOKENS)) for p in given])
        seen = pool.seen_logits()
    assert [c.token_ids for c in done] == [greedy(model, p, OUTPUT_TOKENS) for p in given]
    for prompt, completion in zip(given, done, strict=True):
        assert_logits_agree(model, prompt, completion.token_ids, seen)


@pytest.fixture(scope="module")
def oracle() -> SmolLM2Oracle:
    return SmolLM2Oracle("cpu")


@pytest.mark.parametrize(
    "layout", [n if n in REAL else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS]
)
def test_smollm2_itself(layout: str, oracle: SmolLM2Oracle, pool: Pool) -> None:
    asked = options("smollm2", max_model_len=256, max_num_batched_tokens=64, block_size=16)
    with served(layout, asked, pool) as found:
        sampling = SamplingParams(max_tokens=len(oracle.tokens[0]), ignore_eos=True)
        done = answers(found, asked, [(prompt, sampling) for prompt in oracle.prompts])
        seen = pool.seen_logits()
    assert [c.token_ids for c in done] == oracle.tokens
    for prompt, completion in zip(oracle.prompts, done, strict=True):
        assert_logits_agree(oracle.model, prompt, completion.token_ids, seen)


def test_more_ranks_than_kv_heads(tmp_path: Path, pool: Pool) -> None:
    model = make_model(tmp_path, "llama", num_attention_heads=6, num_key_value_heads=2, hidden_size=96)
    asked = options(tmp_path)
    given = prompts(model.config.vocab_size)
    with served("tp5", asked, pool) as found:
        done = answers(found, asked, [(p, SamplingParams(max_tokens=OUTPUT_TOKENS)) for p in given])
    assert [c.token_ids for c in done] == [greedy(model, p, OUTPUT_TOKENS) for p in given]


def test_seeded_draws_are_the_same_in_every_layout_and_batch(tmp_path: Path, pool: Pool) -> None:
    model = make_model(tmp_path, "llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    asked = options(tmp_path)
    seeded = [
        (
            prompt,
            SamplingParams(
                max_tokens=20, temperature=1.0, seed=i, top_k=40 * (i % 2), top_p=0.95, repetition_penalty=1.1
            ),
        )
        for i, prompt in enumerate(prompts(model.config.vocab_size))
    ]
    found: dict[str, list[list[int]]] = {}
    for layout in ("tp1", "tp3", "pp2", "dp2"):
        with served(layout, asked, pool) as deployment:
            done = answers(deployment, asked, seeded, *([one] for one in seeded))
        found[layout] = [c.token_ids for c in done[: len(seeded)]]
        found[f"{layout}, one by one"] = [c.token_ids for c in done[len(seeded) :]]
    assert all(tokens == found["tp1"] for tokens in found.values())
    assert len({tuple(tokens) for tokens in found["tp1"]}) == len(seeded)
