"""What docs/offload.md tells of, each layout beside transformers in one process: offloaded layers, with one or two
resident, KV in host memory, and the compatibility runtime, split by DeepSpeed's AutoTP or gathered by its ZeRO-3. One
gang serves all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.errors import BadLayout
from orchestrator.request import SamplingParams
from strategies.plan import Layout
from tests.cpu.test_layouts import prompts
from tests.oracle import greedy
from tests.serving import Pool, answers, assert_logits_agree, options, served
from tests.tiny import make_model

OUTPUT_TOKENS, FEW_TOKENS = 10, 8
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
@pytest.mark.parametrize(
    ("kept", "dtype"),
    [
        ("int4", "float32"),
        ("int4", "bfloat16"),
        ("int8", "bfloat16"),
        ("int8w8a8", "float32"),
    ],
)
def test_offloaded_layers_in_fewer_bits_answer_as_resident_ones_do(
    kept: str, dtype: str, pool: Pool, tmp_path: Path
) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 256}
    model = make_model(tmp_path, "llama", std=0.1, num_hidden_layers=5, **sizes)
    given = prompts(model.config.vocab_size)[:3]
    found = []
    away = {"offload": True, "resident_layers": 1}
    for changes in ({}, away, {**away, "offload_dir": tmp_path / "disk"}):
        asked = options(tmp_path, num_blocks=18, format=kept, dtype=dtype, **changes)
        with served("tp2", asked, pool) as deployed:
            sampling = SamplingParams(max_tokens=OUTPUT_TOKENS)
            found.append([c.token_ids for c in answers(deployed, asked, [(p, sampling) for p in given])])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("layout", "kept"),
    [
        ("tp2", ""),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("pp2", ""), ("dp2", ""), ("tp2", "kvfp8")]
        ),
    ],
)
@pytest.mark.parametrize("host_kv_gb", [5e-5, pytest.param(1e-3, marks=pytest.mark.slow)])
def test_kv_in_host_memory_changes_no_answer(
    layout: str, kept: str, host_kv_gb: float, pool: Pool, tmp_path: Path
) -> None:
    """Of few blocks, and of more than are wanted. Prompts are asked, and asked again with their answer and more."""
    model = make_model(tmp_path, "qwen2", num_key_value_heads=2)
    given = prompts(model.config.vocab_size)
    longer = [p + greedy(model, p, FEW_TOKENS) + [5, 6, 7] for p in given]
    rounds = [[(p, SamplingParams(max_tokens=FEW_TOKENS)) for p in which] for which in (given, longer)]
    if kept:  # transformers has no such cache: as with one that is large enough
        whole = options(tmp_path, format=kept)
        with served(layout, whole, pool) as found:
            expected = [c.token_ids for c in answers(found, whole, *rounds)]
    else:
        expected = [greedy(model, p, FEW_TOKENS) for p in given + longer]
    asked = options(tmp_path, num_blocks=17, host_kv_gb=host_kv_gb, format=kept)
    with served(layout, asked, pool) as found:
        done = [c.token_ids for c in answers(found, asked, *rounds)]
        loads = [part.call(0, "current_load").result(10) for part in pool.given]
    assert done == expected
    assert sum(load.host_saved_blocks for load in loads) > 0
    assert sum(load.host_hit_tokens for load in loads) > 0


SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def made(directory: Path, kind: str, **changes: object) -> transformers.PreTrainedModel:
    """A tiny model of transformers' class `kind`, saved, random enough that greedy tokens vary."""
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    config.dtype = torch.float32
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    ("kind", "layout", "changes"),
    [
        ("Mixtral", "tp2", {"num_local_experts": 4}),
        pytest.param("Llama", "tp2", {"hidden_act": "gelu"}, marks=pytest.mark.slow),
        pytest.param("Gemma2", "tp2", {"head_dim": 16, "sliding_window": 8}, marks=pytest.mark.slow),
        pytest.param("Olmo", "dp2", {}, marks=pytest.mark.slow),
        pytest.param("Llama", "zero3tp2+offload", {}, marks=pytest.mark.slow),
    ],
)
def test_what_the_engine_does_not_know_answers_as_transformers_does(
    kind: str, layout: str, changes: dict[str, object], pool: Pool, tmp_path: Path
) -> None:
    model = made(tmp_path, kind, **changes)
    named = Layout.parse(layout)
    runs = {"compatible": True, "zero3": named.zero3, "offload": named.offload}
    asked = options(tmp_path, num_blocks=18, prefix_caching=False, **runs)
    given = prompts(model.config.vocab_size)
    with served(named.dims.name, asked, pool) as found:
        done = answers(found, asked, [(p, SamplingParams(max_tokens=FEW_TOKENS)) for p in given])
        seen = pool.seen_logits()
    assert [c.token_ids for c in done] == [greedy(model, p, FEW_TOKENS) for p in given]
    for prompt, completion in zip(given, done, strict=True):
        assert_logits_agree(model, prompt, completion.token_ids, seen)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes"), [("Phi3", {}), ("Olmo2", {})])
def test_an_architecture_that_autotp_splits_wrongly_is_refused(
    kind: str, changes: dict[str, object], pool: Pool, tmp_path: Path
) -> None:
    made(tmp_path, kind, **changes)
    asked = options(tmp_path, num_blocks=18, compatible=True, prefix_caching=False)
    with pytest.raises(BadLayout, match="AutoTP"), served("tp2", asked, pool):
        pass
