"""What SmolLM2 must answer: transformers' greedy tokens, and how near the logits must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from launch.models import resolve
from orchestrator.text import text_of
from tests.tiny import smollm2

OUTPUT_TOKENS = 12
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three prime numbers.",
    "Why is the sky blue? Answer in detail, and mention what happens to the light of the sun in the air.",
)

# Of each model, for as long as it lives:
_GREEDY: WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], int], list[int]]] = WeakKeyDictionary()
_LOGITS: WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor]] = (
    WeakKeyDictionary()
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
    """`generated`, found once: every layout asks the same again."""
    known = _GREEDY.setdefault(model, {})
    key = (tuple(prompt), count)
    if key not in known:
        known[key] = generated(model, prompt, count)
    return list(known[key])


def generated(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' own greedy tokens."""
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
    """After the prompt and after each output token but the last: [outputs, vocabulary], on the host. Not to be written
    to: the same question has the same tensor for an answer."""
    known = _LOGITS.setdefault(model, {})
    key = (tuple(prompt), tuple(output))
    if key not in known:
        ids = torch.tensor([[*prompt, *output]], device=model.device)
        with torch.no_grad():
            known[key] = model(ids).logits[0, len(prompt) - 1 : -1].float().cpu()
    return known[key]
