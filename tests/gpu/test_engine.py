"""The CUDA engine on random models of every family: transformers' tokens in float32, its closeness to float64 in bf16.

Every run mixes prefill in chunks with decodes of up to 32 rows, finds prefixes, preempts, and replays CUDA graphs.
"""

from __future__ import annotations

import asyncio
import gc
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.options import EngineOptions
from orchestrator.engine.cuda_runner import OVERLAP_TOKENS
from orchestrator.request import Request, SamplingParams
from orchestrator.step import NOT_FINITE
from strategies.plan import ParallelDims
from tests.engine import (
    Answer,
    LocalWorker,
    assert_greedy,
    greedy_requests,
    limits,
    prompts,
    reference,
    relative_l2,
    row_errors,
    sampled_requests,
)
from tests.oracle import greedy, next_logits
from tests.serving import answers, options, served
from tests.tiny import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
DEVICE = "cuda"
HALF_PRECISION_SLACK = 1.25  # how much farther than transformers' own bf16 logits ours may be from float64's
WORST_ROW_SLACK = 2.0  # the same of the farthest row: an error in a few rows would drown among hundreds
FLOAT32_ERROR = 1e-4
SIZES: dict[str, Any] = {
    "device": DEVICE,
    "max_model_len": 400,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 96,
    "block_size": 16,
    "num_blocks": 64,  # the prompts at once need more
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
SHAPE = {"vocab_size": 1003, "num_hidden_layers": 4, "max_position_embeddings": 512}
FAMILIES: dict[str, dict[str, Any]] = {
    # 3 query heads a KV head, a width that is not heads × head_dim, and one that no tile nor vector divides
    "llama": {"hidden_size": 360, "num_attention_heads": 6, "intermediate_size": 1001, "head_dim": 64},
    "mistral": {"hidden_size": 256, "intermediate_size": 768, "head_dim": 128, "sliding_window": 50},
    "qwen2": {"hidden_size": 256, "intermediate_size": 640, "rope_parameters": YARN},  # head_dim 64
    "qwen3": {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "tie_word_embeddings": True},
}


@dataclass(frozen=True, slots=True)
class Model:
    family: str
    directory: Path
    oracle: Any  # transformers', in float32 on the CPU

    def options(self, dtype: str, **changes: Any) -> EngineOptions:
        return options(self.directory, **(SIZES | {"dtype": dtype} | changes))

    def float32(self) -> Any:
        return reference(self.oracle, DEVICE)

    def bfloat16(self) -> Any:
        return reference(self.oracle, DEVICE, torch.bfloat16)

    def truth(self) -> Any:
        """float64 over the weights that bf16 has."""
        return reference(self.oracle, DEVICE, torch.bfloat16, torch.float64)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    torch.backends.cuda.matmul.allow_tf32 = False
    made = {}
    for family, shape in FAMILIES.items():
        directory = tmp_path_factory.mktemp(family)
        made[family] = Model(family, directory, make_model(directory, family, std=0.05, **(SHAPE | shape)))
    return made


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]


@pytest.fixture
def llama(models: dict[str, Model]) -> Model:
    return models["llama"]


def asked_of(
    asked: EngineOptions, requests: list[Request], *, run_ahead: bool, host_blocks: int = 0
) -> list[Answer]:
    """What the engine answers, with graphs, in a run that had to preempt and to share."""
    worker = LocalWorker(asked)
    worker.allocate(replace(limits(asked, run_ahead=run_ahead), host_blocks=host_blocks))
    worker.capture()
    done = worker.answers(requests)
    load = worker.current_load()
    assert load.preemptions > 0, load
    assert load.prefix_hit_tokens > 0, load
    assert bool(load.host_saved_blocks) == bool(load.host_loaded_blocks) == bool(host_blocks), load
    return done


@pytest.mark.parametrize("run_ahead", [True, False], ids=["ahead", "in_turn"])
def test_float32_gives_transformers_tokens(model: Model, run_ahead: bool) -> None:
    asked, judge = model.options("float32"), model.float32()
    for answer in asked_of(asked, greedy_requests(asked.spec.vocab), run_ahead=run_ahead):
        assert_greedy(judge, answer.prompt, answer.token_ids, f"{model.family}, run_ahead {run_ahead}")
        error = relative_l2(answer.logits_NV, next_logits(judge, answer.prompt, answer.token_ids))
        assert error < FLOAT32_ERROR, f"prompt of {len(answer.prompt)} tokens: logits off by {error:.2e}"


@pytest.mark.parametrize("host_blocks", [12, 600], ids=["few", "enough"])
def test_blocks_that_wait_in_host_memory_change_no_token(llama: Model, host_blocks: int) -> None:
    asked, judge = llama.options("float32"), llama.float32()
    requests = greedy_requests(asked.spec.vocab)
    for answer in asked_of(asked, requests, run_ahead=True, host_blocks=host_blocks):
        assert_greedy(judge, answer.prompt, answer.token_ids, f"{host_blocks} blocks of host memory")


def test_bfloat16_is_as_near_to_float64_as_transformers(model: Model) -> None:
    asked = model.options("bfloat16")
    done = asked_of(asked, greedy_requests(asked.spec.vocab), run_ahead=True)
    for answer in done:  # these are the logits that the tokens came from
        best_N, token_ids = answer.logits_NV.amax(dim=1), torch.tensor(answer.token_ids)
        assert torch.equal(answer.logits_NV.gather(1, token_ids[:, None])[:, 0], best_N), answer.token_ids
    ours_NV = torch.cat([answer.logits_NV for answer in done])
    theirs_NV, truth_NV = (
        torch.cat([next_logits(judge, answer.prompt, answer.token_ids) for answer in done])
        for judge in (model.bfloat16(), model.truth())
    )
    assert_as_near(ours_NV, theirs_NV, truth_NV)


def assert_as_near(ours_NV: torch.Tensor, theirs_NV: torch.Tensor, truth_NV: torch.Tensor) -> None:
    ours, theirs = relative_l2(ours_NV, truth_NV), relative_l2(theirs_NV, truth_NV)
    assert ours <= HALF_PRECISION_SLACK * theirs, (
        f"relative L2 {ours:.3e}, transformers' {theirs:.3e}: {ours / theirs:.2f} times"
    )
    ours_N, theirs_N = row_errors(ours_NV, truth_NV), row_errors(theirs_NV, truth_NV)
    worst = int(ours_N.argmax())
    assert ours_N[worst] <= WORST_ROW_SLACK * theirs_N.max(), (
        f"row {worst} of {len(ours_N)} is off by {ours_N[worst]:.3e}; "
        f"transformers' worst by {theirs_N.max():.3e}, its own row by {theirs_N[worst]:.3e}"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores(model: Model, dtype: str) -> None:
    asked = model.options(dtype)
    token_ids = max(prompts(asked.spec.vocab), key=len)
    worker = LocalWorker(asked)
    worker.allocate(limits(asked, run_ahead=True))
    scored = worker.score(token_ids)
    assert scored is not None
    ours_TV = logits_of(scored, len(token_ids))

    def judged(judge: Any) -> torch.Tensor:
        return next_logits(judge, token_ids[:1], [*token_ids[1:], 0])

    if dtype == "float32":
        assert relative_l2(ours_TV, judged(model.float32())) < FLOAT32_ERROR
    else:
        assert_as_near(ours_TV, judged(model.bfloat16()), judged(model.truth()))


def logits_of(scored: bytes, tokens: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(scored, np.float32).reshape(tokens, -1).copy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_change_no_bit(llama: Model, dtype: str) -> None:
    asked = llama.options(dtype)
    worker = LocalWorker(asked)
    worker.allocate(limits(asked, run_ahead=True))
    eager = worker.answers(greedy_requests(asked.spec.vocab))
    worker.capture()
    replayed = worker.answers(greedy_requests(asked.spec.vocab))
    for one, other in zip(eager, replayed, strict=True):
        where = f"prompt of {len(one.prompt)} tokens: eager {one.token_ids}, graphs {other.token_ids}"
        assert one.token_ids == other.token_ids, where
        differs_N = (one.logits_NV != other.logits_NV).any(dim=1)
        most = (one.logits_NV - other.logits_NV).abs().max()
        assert not differs_N.any(), (
            f"prompt of {len(one.prompt)} tokens: the logits of tokens {differs_N.nonzero().flatten().tolist()} "
            f"of {len(differs_N)} differ, by {most:.3e} at most"
        )


def test_sampling_is_the_same_ahead_in_turn_and_on_a_cpu(llama: Model) -> None:
    def drawn(device: str, run_ahead: bool) -> list[Answer]:
        asked = llama.options("float32", device=device)
        return asked_of(asked, sampled_requests(asked.spec.vocab), run_ahead=run_ahead)

    in_turn = drawn(DEVICE, run_ahead=False)
    assert len({tuple(answer.token_ids) for answer in in_turn}) > len(in_turn) // 2, "draws hardly vary"
    assert len({len(answer.token_ids) for answer in in_turn}) > 5, "hardly any stop token was drawn"
    for name, others in {"ahead": drawn(DEVICE, True), "on a CPU": drawn("cpu", False)}.items():
        for i, (one, other) in enumerate(zip(in_turn, others, strict=True)):
            assert one.token_ids == other.token_ids, f"request {i}, {name}"
            for a, b in zip(one.logprobs, other.logprobs, strict=True):
                assert (a is None) == (b is None), f"request {i}, {name}: {a} and {b}"
                if a is not None and b is not None:
                    assert a.top_ids == b.top_ids, f"request {i}, {name}"
                    given = [b.logprob, *b.top_logprobs]
                    assert [a.logprob, *a.top_logprobs] == pytest.approx(given, abs=1e-3), (
                        f"request {i}, {name}"
                    )


@pytest.mark.parametrize(("layout", "family"), [("tp2", "llama"), ("pp2", "mistral"), ("dp2", "qwen2")])
def test_layouts_give_transformers_tokens(layout: str, family: str, models: dict[str, Model]) -> None:
    layout_gives_transformers_tokens(layout, models[family])


@pytest.mark.parametrize("layout", ["tp3", "tp4", "tp2pp2", "pp4", "tp4dp2", "tp8", "pp8", "tp2pp2dp2"])
def test_wide_layouts_give_transformers_tokens(layout: str, tmp_path: Path) -> None:
    """Of three to eight GPUs, as far as the machine has them: eight layers, uneven over three ranks."""
    devices = ParallelDims.parse(layout).world_size
    if torch.cuda.device_count() < devices:
        pytest.skip(f"{devices} GPUs")
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = SHAPE | FAMILIES["llama"] | {"num_hidden_layers": 8, "num_attention_heads": 16}
    shape |= {"num_key_value_heads": 8, "hidden_size": 512}
    model = make_model(tmp_path, "llama", std=0.05, **shape)
    layout_gives_transformers_tokens(layout, Model("llama", tmp_path, model))


def layout_gives_transformers_tokens(layout: str, model: Model) -> None:
    family = model.family
    asked, judge = model.options("float32"), model.float32()
    requests = greedy_requests(asked.spec.vocab)
    score = max(prompts(asked.spec.vocab), key=len)
    with served(layout, asked, score=score) as found:
        done = answers(found, asked, [(r.prompt_token_ids, r.sampling) for r in requests])
        ours_TV = logits_of(found.scored, len(score))
    for request, answer in zip(requests, done, strict=True):
        assert len(answer.token_ids) == request.sampling.max_tokens
        assert_greedy(judge, request.prompt_token_ids, answer.token_ids, f"{layout}, {family}")
    error = relative_l2(ours_TV, next_logits(judge, score[:1], [*score[1:], 0]))
    assert error < FLOAT32_ERROR, f"scores are off by {error:.2e}"


def test_sums_that_travel_while_the_other_part_computes(llama: Model) -> None:
    """Steps so long that they run in two parts, with decodes ahead of them and prompts cut in the middle."""
    asked = llama.options("float32", max_num_batched_tokens=OVERLAP_TOKENS + 100, num_blocks=1024)
    rnd, judge = random.Random(5), llama.float32()
    lots = [[rnd.randrange(asked.spec.vocab) for _ in range(391)] for _ in range(24)]
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    with served("tp2", asked) as found:
        done = answers(found, asked, [(prompt, sampling) for prompt in lots])
    for index, (prompt, answer) in enumerate(zip(lots, done, strict=True)):
        assert_greedy(judge, prompt, answer.token_ids, f"request {index}")


CONTEXT, MOST_CONTEXTS, ANSWER_TOKENS = 2048, 160, 6
SHARE_BYTES = 4 * 2**30
LEAST_USED = 0.8  # of the share: what the rehearsal kept free for peaks may lie idle


@pytest.fixture
def memory_before() -> tuple[int, int]:
    """Bytes in use on the first GPU, and in all, without what earlier tests left to torch's allocator."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(0)
    return total - free, total


def test_kv_cache_takes_its_share_and_no_more(memory_before: tuple[int, int], tmp_path: Path) -> None:
    """A deployment of its own process (tp1) whose every KV block gets filled, in a few GB of the GPU."""
    before, total = memory_before
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    positions = {"max_position_embeddings": CONTEXT}
    oracle = make_model(tmp_path, "llama", std=0.05, **(SHAPE | shape | positions))
    sizes = {
        "max_num_seqs": MOST_CONTEXTS,
        "max_num_batched_tokens": 4096,
        "max_model_len": None,
        "num_blocks": None,
    }
    share = (before + SHARE_BYTES) / total
    asked = options(tmp_path, **(SIZES | sizes | {"gpu_memory_utilization": share}))
    with served("tp1", asked) as found:
        capacity = found.limits.num_blocks * found.limits.block_size
        assert capacity < MOST_CONTEXTS * CONTEXT, "the cache was bound by what is of use, not by memory"
        token_ids, used = asyncio.run(filled(found, asked, capacity))
    judge = reference(oracle, DEVICE)
    for prompt, answer in token_ids[::8]:
        assert_greedy(judge, prompt, answer, f"{capacity} KV tokens")
    taken = used - before
    assert LEAST_USED * SHARE_BYTES <= taken <= SHARE_BYTES, (
        f"{taken / 2**20:.0f} MiB taken of a share of {SHARE_BYTES / 2**20:.0f}, {capacity} KV tokens"
    )


async def filled(
    found: Any, asked: EngineOptions, capacity: int
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Prompts with their answers, more of them at once than the cache holds, and the GPU's bytes in use after them."""
    rnd = random.Random(3)
    lots = [
        [rnd.randrange(asked.spec.vocab) for _ in range(CONTEXT - ANSWER_TOKENS)]
        for _ in range(capacity // CONTEXT + 4)
    ]
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
    async with found.coordinator(asked, None) as coordinator:
        done = await asyncio.gather(*(coordinator.complete(prompt, sampling) for prompt in lots))
        free, total = torch.cuda.mem_get_info(0)
    return [(prompt, answer[0].token_ids) for prompt, answer in zip(lots, done, strict=True)], total - free


@pytest.mark.parametrize("run_ahead", [True, False], ids=["ahead", "in_turn"])
def test_numbers_that_overflow_end_their_request_alone(llama: Model, run_ahead: bool) -> None:
    """Among decodes of all sizes, in chunks of prompts, and in the blocks that it leaves to others."""
    asked, judge = llama.options("float32"), llama.float32()
    worker = LocalWorker(asked)
    asks = greedy_requests(asked.spec.vocab)
    expected = {
        request.id: greedy(judge, request.prompt_token_ids, request.sampling.max_tokens) for request in asks
    }
    used = {token for request in asks for token in request.prompt_token_ids}
    used |= {token for token_ids in expected.values() for token in token_ids}
    poison = min(set(range(asked.spec.vocab)) - used)
    assert worker.model.embed is not None
    worker.model.embed.weight.data[poison] = torch.nan
    bad = [
        Request(id=f"bad {i}", prompt_token_ids=[*range(i), poison, 5], sampling=SamplingParams(max_tokens=9))
        for i in (1, 50, 200)
    ]
    worker.allocate(limits(asked, run_ahead=run_ahead))
    worker.capture()
    done = worker.answers([*asks[:20], *bad, *asks[20:]])
    assert [one.token_ids for one in done[20:23]] == [[NOT_FINITE]] * 3
    assert [one.token_ids for one in done[:20] + done[23:]] == [expected[request.id] for request in asks]
