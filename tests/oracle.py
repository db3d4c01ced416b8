"""What SmolLM2 must answer: transformers' greedy tokens, and how near the logits must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from launch.models import resolve
from orchestrator.text import text_of
from tests.tiny import smollm2

OUTPUT_TOKENS = 20
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three prime numbers.",
    "Why is the sky blue? Answer in detail, and mention what happens to the light of the sun in the air.",
)


class SmolLM2Oracle:
    """transformers' SmolLM2 in float32 on `device`, asked once."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.model = smollm2().to(device)
        text = text_of(resolve("smollm2"))
        assert text is not None
        self.prompts = [text.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
        self.tokens = [greedy(self.model, prompt, OUTPUT_TOKENS) for prompt in self.prompts]

    def logits(self, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        """After the prompt and after each output token but the last: [outputs, vocabulary]."""
        return next_logits(self.model, prompt, output)


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(
            ids
        ),  # else transformers takes every pad token of the prompt for padding
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


def next_logits(model: Any, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    tokens = [*prompt, *output]
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens], device=model.device)).logits[
            0, len(prompt) - 1 : -1
        ]
    return logits.float().cpu()
