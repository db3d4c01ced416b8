"""The text of one answer as its tokens come, cut off at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.text import Detokenizer, StopFinder, Text


class AnswerText:
    def __init__(self, text: Text, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(text)
        self._finder = StopFinder(stops)
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._finder.stopped

    def push(self, token_id: int) -> str:
        """The text that is now certain to be part of the answer."""
        return self._keep(self._finder.push(self._detokenizer.push(token_id)))

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        return self._keep(self._finder.push(self._detokenizer.flush()) + self._finder.flush())

    def _keep(self, new: str) -> str:
        if new:
            self._parts.append(new)
        return new
