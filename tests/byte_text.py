"""The simplest tokenizer there is; light to import."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from orchestrator.text import Text


def _bytes_only() -> Text:
    """A tokenizer of one token a byte: every character beyond ASCII is spread over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return Text("bytes", tokenizer, None)


BYTES = _bytes_only()
