"""The leader's part in constrained answers: it knows their grammars, the ranks see a mask in the row of a step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import msgspec

from cluster.errors import BadRequest
from orchestrator.grammar import Compiler, Matcher
from orchestrator.request import FinishReason, Grammar, Request, Token
from orchestrator.step import Step

NO_TOKEN = -1  # in a Token that tells of a request which ended without one


class Constraints:
    """Compiling takes up to seconds: a thread does it, while others' requests run."""

    def __init__(
        self, make_compiler: Callable[[], Compiler], ready: Callable[[Request | Token], None]
    ) -> None:
        """`ready` gets each request once its grammar is compiled, or a token that says it was refused."""
        self._make_compiler, self._ready = make_compiler, ready
        self._compiling = ThreadPoolExecutor(1)
        self._lock = threading.Lock()
        self._matchers: dict[str, Matcher] = {}
        self._dropped: set[str] = set()  # while they compile
        self._pending: set[str] = set()

    @cached_property
    def _compiler(self) -> Compiler:
        return self._make_compiler()

    def warm_up(self) -> None:
        """Imports and tables take seconds: better before the first grammar than with it."""
        self._compiling.submit(lambda: self._compiler)

    def submit(self, request: Request) -> None:
        with self._lock:
            self._pending.add(request.id)
        self._compiling.submit(self._compile, request)

    def drop(self, request_id: str) -> None:
        with self._lock:
            self._matchers.pop(request_id, None)
            if request_id in self._pending:
                self._dropped.add(request_id)

    def mask(self, step: Step, ids: Sequence[str]) -> Step:
        """The step with masks in its rows. `ids`: whose the sampling rows are."""
        if not self._matchers:
            return step
        rows, owners = list(step.rows), iter(ids)
        for i, row in enumerate(rows):
            if row.samples and (matcher := self._matchers.get(next(owners))) is not None:
                rows[i] = msgspec.structs.replace(row, mask=matcher.mask())
        return msgspec.structs.replace(step, rows=rows)

    def take(self, tokens: Sequence[Token]) -> list[Token]:
        """Follow the sampled tokens. One that no grammar allows (there was none to allow) ends its request."""
        if not self._matchers:
            return list(tokens)
        return [self._follow(token) for token in tokens]

    def _follow(self, token: Token) -> Token:
        matcher = self._matchers.get(token.request_id)
        if matcher is None:
            return token
        if token.finish_reason is not None:
            self.drop(token.request_id)
        elif not matcher.accept(token.token_id):
            return _refusal(token.request_id)
        return token

    def _matcher(self, grammar: Grammar, output: Sequence[int]) -> Matcher | None:
        """As far on as the answer is; None where it has left the grammar."""
        made = self._compiler.matcher(grammar)
        return made if all(made.accept(token_id) for token_id in output) else None

    def _compile(self, request: Request) -> None:
        assert request.grammar is not None
        with self._lock:
            wanted = request.id not in self._dropped
        try:
            made = self._matcher(request.grammar, request.output_token_ids) if wanted else None
        except BadRequest:
            made = None
        with self._lock:
            self._pending.discard(request.id)
            wanted = request.id not in self._dropped
            self._dropped.discard(request.id)
            if wanted and made is not None:
                self._matchers[request.id] = made
        if wanted:
            self._ready(request if made is not None else _refusal(request.id))


def _refusal(request_id: str) -> Token:
    return Token(request_id, NO_TOKEN, FinishReason.ABORT)
