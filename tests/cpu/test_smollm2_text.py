"""SmolLM2's tokenizer, as built from its GGUF file, against transformers' own reading of that file."""

from __future__ import annotations

import random
import re

import transformers

from launch.models import resolve
from orchestrator.text import text_of

WORDS = ["def f(x):", "it's", "I'LL", "été", "日本", "🤗", "<|im_end|>", "\n\n", "  ", "\tx", "a1b2", "3.1"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]


def _text(seed: int) -> str:
    """Without runs of spaces before digits: transformers does not cut those apart as in training."""
    rng = random.Random(seed)
    return re.sub(r"\s+(?=\d)", " ", " ".join(rng.choice(WORDS) for _ in range(30)))


def test_ids_equal_transformers() -> None:
    source = resolve("smollm2")
    assert source.path is not None
    oracle = transformers.AutoTokenizer.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
    text = text_of(source)
    assert text is not None
    for seed in range(50):
        assert text.encode(_text(seed)) == oracle.encode(_text(seed)), _text(seed)
    expected = oracle.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert text.encode_chat(CHAT) == expected
