"""Grammars of answers, by xgrammar: whether one is one, and which tokens it allows next."""

from __future__ import annotations

from cluster.errors import BadRequest
from orchestrator.request import Grammar, GrammarKind

MOST_WHITESPACE = 32  # characters in a row between the parts of JSON: small models else go on for ever


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
    """xgrammar's messages begin with a place in its source."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
