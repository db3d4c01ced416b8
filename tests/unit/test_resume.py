"""Answers that another replica began: the same tokens as without the break, whatever picks them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.engine import LocalWorker, limits, sampled_requests
from tests.serving import options
from tests.tiny import make_model

VOCAB = 131


def test_answers_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Greedy and seeded; with penalties, min_tokens, log-probabilities."""
    make_model(tmp_path, "llama")
    asked = options(tmp_path, max_model_len=512, max_num_seqs=16, max_num_batched_tokens=256, num_blocks=400)
    requests = [one for one in sampled_requests(VOCAB) if len(one.prompt_token_ids) < 100]
    worker = LocalWorker(asked)
    worker.allocate(limits(asked, run_ahead=False))
    whole = worker.answers(requests)
    broken = [
        msgspec.structs.replace(request, output_token_ids=answer.token_ids[: 1 + i % 7])
        for i, (request, answer) in enumerate(zip(requests, whole, strict=True))
        if len(answer.token_ids) > 1 + i % 7
    ]
    assert len(broken) > 20
    expected = {request.id: answer.token_ids for request, answer in zip(requests, whole, strict=True)}
    for request, answer in zip(broken, worker.answers(broken), strict=True):
        assert request.output_token_ids + answer.token_ids == expected[request.id], request
