"""Grammars of answers, by xgrammar: whether one is one, and which tokens it allows next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import BadRequest
from orchestrator.request import Grammar, GrammarKind
from orchestrator.text import Text

if TYPE_CHECKING:
    import xgrammar  # brings torch and transformers: seconds

MOST_WHITESPACE = 32  # characters in a row between the parts of JSON: small models else go on for ever
CACHE_BYTES = 256 * 2**20  # of compiled grammars
ALL = b""  # the mask that allows every token


def check(grammar: Grammar) -> None:
    """Raises BadRequest with xgrammar's reason."""
    import xgrammar

    try:
        if grammar.kind is GrammarKind.JSON_SCHEMA:
            xgrammar.Grammar.from_json_schema(grammar.source, max_whitespace_cnt=MOST_WHITESPACE)
        elif grammar.kind is GrammarKind.REGEX:
            xgrammar.Grammar.from_regex(grammar.source)
        else:
            xgrammar.Grammar.from_ebnf(grammar.source)
    except (RuntimeError, ValueError, TypeError) as error:
        raise BadRequest(f"the {grammar.kind} is refused: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """xgrammar's messages begin with a time and a place in its source."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (line.partition(": ")[2] or line).strip()[:300]


class Compiler:
    """Grammars for one model's tokens."""

    def __init__(self, text: Text, vocab: int, eos_ids: Sequence[int]) -> None:
        import xgrammar

        # A special token is never text, whatever it reads like: no grammar allows it.
        pieces = [b"" if i in text.special_ids else text.piece(i) for i in range(vocab)]
        raw = xgrammar.VocabType.RAW
        info = xgrammar.TokenizerInfo(pieces, raw, vocab_size=vocab, stop_token_ids=list(eos_ids))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)
        self._vocab = vocab

    def matcher(self, grammar: Grammar) -> Matcher:
        """Takes from a millisecond to seconds, with Python's lock let go. Raises BadRequest."""
        import xgrammar

        try:
            if grammar.kind is GrammarKind.JSON_SCHEMA:
                made = self._compiler.compile_json_schema(grammar.source, max_whitespace_cnt=MOST_WHITESPACE)
            elif grammar.kind is GrammarKind.REGEX:
                made = self._compiler.compile_regex(grammar.source)
            else:
                made = self._compiler.compile_grammar(grammar.source)
            return Matcher(xgrammar.GrammarMatcher(made), self._vocab)
        except (RuntimeError, ValueError, TypeError) as error:
            raise BadRequest(f"the {grammar.kind} is refused: {_reason(error)}") from None


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: xgrammar.GrammarMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((1, -(-vocab // 32)), dtype=np.int32)

    def mask(self) -> bytes:
        """Of the next token: a bit for each id, the lowest first; `ALL` where all are allowed."""
        if not self._matcher.fill_next_token_bitmask(self._mask):
            return ALL
        return self._mask.tobytes()

    def accept(self, token_id: int) -> bool:
        """Whether the grammar goes on, or ends, with this token."""
        accepted: bool = self._matcher.accept_token(token_id)
        return accepted
