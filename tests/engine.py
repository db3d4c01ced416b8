"""The engine in the test's own process: the worker's own loop on one device, and the logits that it sampled from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from launch.configured import limits_for
from launch.options import EngineOptions
from orchestrator.engine.runner import Pending
from orchestrator.engine.sampler import Draw
from orchestrator.engine_config import EngineConfig
from orchestrator.request import Request, SamplingParams, Token, TokenLogprobs
from orchestrator.scheduler import SchedulerConfig
from orchestrator.step import Step, StepResult
from orchestrator.worker import Worker
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims
from tests.oracle import next_logits

Seen = dict[tuple[tuple[int, ...], int], Tensor]
"""(prompt, tokens so far) → logits [V] of the next token, on the device."""


@dataclass(frozen=True, slots=True)
class Answer:
    prompt: list[int]
    token_ids: list[int]
    logits_NV: Tensor  # that each token was sampled from, before penalties; on the host
    logprobs: list[TokenLogprobs | None]


class LocalWorker(Worker):
    """Leads alone, until every request has its answer."""

    def __init__(self, asked: EngineOptions) -> None:
        super().__init__()
        config = EngineConfig(
            source=asked.source,
            spec=asked.spec,
            dtype=asked.dtype,
            device=asked.device,
            block_size=asked.block_size,
            max_num_seqs=asked.max_num_seqs,
            max_num_batched_tokens=asked.max_num_batched_tokens,
        )
        (shard,) = shard_replica(asked.spec, ParallelDims())
        self.join(config, shard, "", 0)
        self.load()
        self._told: dict[str, list[Token]] = {}

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """In the requests' order. They all come at once, to an empty cache; their prompts must differ."""
        self._told = {request.id: [] for request in requests}
        self._stopping = False
        self.submit(requests)
        with self._recorded() as seen:
            self.lead(None)
        return [_answer(request, self._told[request.id], seen) for request in requests]

    def _publish(self, result: StepResult) -> None:
        for token in self.scheduler.update(result):
            self._told[token.request_id].append(token)
        self._stopping = not self.scheduler.has_work

    @contextmanager
    def _recorded(self) -> Iterator[Seen]:
        """Of every step, the logits that its runner hands over."""
        seen: Seen = {}
        on_its_way = Pending.on_its_way

        def recording(step: Step, tokens_R: Tensor, logits_RV: Tensor, draws: Sequence[Draw]) -> Pending:
            rows = self.runner.slots.draws(step.rows)
            for row, logits_V in zip(rows, logits_RV.clone(), strict=True):  # the next step writes over them
                prompt = tuple(row.history.token_ids[: row.history.prompt_tokens])
                seen[prompt, row.length] = logits_V
            return on_its_way(step, tokens_R, logits_RV, draws)

        with patch.object(Pending, "on_its_way", staticmethod(recording)):
            yield seen


def _answer(request: Request, told: Sequence[Token], seen: Seen) -> Answer:
    prompt = tuple(request.prompt_token_ids)
    begun = len(prompt) + len(request.output_token_ids)
    logits_NV = torch.stack([seen[prompt, begun + i] for i in range(len(told))]).cpu()
    return Answer(list(prompt), [t.token_id for t in told], logits_NV, [t.logprobs for t in told])


def limits(asked: EngineOptions, *, run_ahead: bool) -> SchedulerConfig:
    """As a deployment of one device gets them, in as many blocks as were asked for."""
    assert asked.num_blocks is not None
    return replace(limits_for(asked.num_blocks, ParallelDims(), asked), run_ahead=run_ahead)


def prompts(vocab: int) -> list[list[int]]:
    """Long ones that share a beginning, then many short ones: all at once they are more than `num_blocks` hold."""
    rnd = random.Random(1)
    shared = [rnd.randrange(vocab) for _ in range(200)]
    lengths = [(0, 7), (200, 3), (200, 39), (0, 129), (96, 1), (0, 1), (200, 4), (30, 300), (0, 65)]
    lengths += [(0, 2 + i % 17) for i in range(30)]
    return [shared[:k] + [rnd.randrange(vocab) for _ in range(n)] for k, n in lengths]


def greedy_requests(vocab: int) -> list[Request]:
    """They end one after another: decode steps of every size."""
    return [
        Request(
            id=str(i), prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=8 + i, ignore_eos=True)
        )
        for i, prompt in enumerate(prompts(vocab))
    ]


def sampled_requests(vocab: int) -> list[Request]:
    """Every parameter alone and with others; one token in seven ends an answer."""
    return [
        Request(
            id=str(i),
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                max_tokens=24,
                min_tokens=6 * (i % 2),
                temperature=0.9 if i % 5 else 0.0,
                seed=i,
                top_p=0.9 if i % 3 else 1.0,
                repetition_penalty=1.2 if i % 4 == 1 else 1.0,
                presence_penalty=0.5 if i % 8 == 2 else 0.0,
                logprobs=3 if i % 3 == 0 else None,
            ),
            stop_ids=frozenset(range(0, vocab, 7)),
        )
        for i, prompt in enumerate(prompts(vocab))
    ]


def reference(model: Any, device: str, *dtypes: torch.dtype) -> Any:
    """A copy of transformers' `model`, its weights rounded to each dtype in turn; rotary frequencies stay float32."""
    copied = deepcopy(model)
    for parameter in copied.parameters():
        for dtype in dtypes:
            parameter.data = parameter.data.to(dtype)
    return copied.to(device)


def assert_greedy(model: Any, prompt: Sequence[int], token_ids: Sequence[int], what: str) -> None:
    """Each token is the model's likeliest after those before it, so that all are what it would generate."""
    expected_NV = next_logits(model, prompt, token_ids)
    for i, (logits_V, token) in enumerate(zip(expected_NV, token_ids, strict=True)):
        best = int(logits_V.argmax())
        assert best == token, (
            f"{what}: token {i} after a prompt of {len(prompt)} is {token} (logit {logits_V[token]:.6f}), "
            f"transformers' is {best} ({logits_V[best]:.6f})"
        )


def row_errors(logits_NV: Tensor, truth_NV: Tensor) -> Tensor:
    """Each row's distance from the truth, in units of the rows' root mean square: [N], float64."""
    truth_NV = truth_NV.double()
    distances_N = (logits_NV.double() - truth_NV).norm(dim=1)
    return distances_N / (truth_NV.norm() / len(truth_NV) ** 0.5)


def relative_l2(logits_NV: Tensor, truth_NV: Tensor) -> float:
    return float(row_errors(logits_NV, truth_NV).square().mean().sqrt())
