"""Grammars, and the leader's part in holding answers to them."""

from __future__ import annotations

import queue
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from cluster.errors import BadRequest
from orchestrator.constraints import NO_TOKEN, Constraints
from orchestrator.grammar import ALL, Compiler, check
from orchestrator.request import FinishReason, Grammar, GrammarKind, Request, SamplingParams, Token
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.step import Row, Step, StepResult
from tests.byte_text import BYTES

EOS = 256
VOCAB = 300  # some beyond the tokenizer's, as models have
PATIENCE_S = 60.0  # the first import of xgrammar brings transformers

NUMBER = Grammar(GrammarKind.REGEX, "[0-9]{2}")


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler(BYTES, VOCAB, [EOS])


def allowed(mask: bytes) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist())


def ids(text: str) -> set[int]:
    return set(BYTES.encode(text))


def test_a_matcher_allows_what_may_come_next(compiler: Compiler) -> None:
    matcher = compiler.matcher(NUMBER)
    for _ in range(2):
        assert allowed(matcher.mask()) == ids("0123456789")
        assert matcher.accept(BYTES.encode("7")[0])
    assert allowed(matcher.mask()) == {EOS}
    assert not matcher.accept(BYTES.encode("7")[0])


def test_schemas_and_grammars(compiler: Compiler) -> None:
    schema = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "boolean"}')
    assert allowed(compiler.matcher(schema).mask()) == ids("tf")
    choice = Grammar(GrammarKind.EBNF, 'root ::= "yes" | "no"')
    assert allowed(compiler.matcher(choice).mask()) == ids("yn")
    anything = compiler.matcher(Grammar(GrammarKind.REGEX, "(.|\n)*"))
    first = anything.mask()
    assert first == ALL or ids("a{") <= allowed(first)


@pytest.mark.parametrize(
    ("kind", "source", "says"),
    [
        ("regex", "(", "parenthesis is not closed"),
        ("regex", r"\1", "Backreference is not supported"),
        ("regex", "\ud800", "surrogates not allowed"),
        ("json_schema", "{", "Failed to parse JSON"),
        ("json_schema", '{"type": "frob"}', "Unsupported type"),
        ("ebnf", "root ::= x", 'Rule "x" is not defined'),
    ],
)
def test_what_is_no_grammar_is_refused_with_a_reason(kind: str, source: str, says: str) -> None:
    with pytest.raises(BadRequest, match=f"the {kind} is refused: .*{says}"):
        check(Grammar(GrammarKind(kind), source))


def request(number: int, grammar: Grammar | None = NUMBER) -> Request:
    return Request(id=str(number), prompt_token_ids=[1], sampling=SamplingParams(), grammar=grammar)


@dataclass
class Leader:
    """What a worker does with constraints, without its threads and its model."""

    compiler: Compiler
    inbox: queue.SimpleQueue[Request | Token] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.constraints = Constraints(lambda: self.compiler, self.inbox.put)

    def compiled(self, asked: Request) -> Request | Token:
        self.constraints.submit(asked)
        return self.inbox.get(timeout=PATIENCE_S)


def test_masks_are_put_into_the_rows_of_their_requests(compiler: Compiler) -> None:
    leader = Leader(compiler)
    assert leader.compiled(request(7)) == request(7)
    rows = [Row(0, 0, 1, True, -1, -1), Row(1, 0, 1, False, -1, -1), Row(2, 0, 1, True, -1, -1)]
    step = leader.constraints.mask(Step(1, [], rows), ["6", "7"])
    assert [bool(row.mask) for row in step.rows] == [False, False, True]
    assert allowed(step.rows[2].mask) == ids("0123456789")
    digit, letter = BYTES.encode("1x")
    tokens = [Token("6", letter), Token("7", digit)]
    assert leader.constraints.take(tokens) == tokens
    assert leader.constraints.take([Token("7", letter)]) == [Token("7", NO_TOKEN, FinishReason.ABORT)]


def test_an_answer_that_another_replica_began_is_followed_from_there(compiler: Compiler) -> None:
    leader = Leader(compiler)
    both = msgspec.structs.replace(request(7), output_token_ids=BYTES.encode("12"))
    assert leader.compiled(both) == both
    step = leader.constraints.mask(Step(1, [], [Row(0, 0, 1, True, -1, -1)]), ["7"])
    assert allowed(step.rows[0].mask) == {EOS}
    astray = msgspec.structs.replace(request(8), output_token_ids=BYTES.encode("x"))
    assert leader.compiled(astray) == Token("8", NO_TOKEN, FinishReason.ABORT)


def test_what_ends_is_forgotten(compiler: Compiler) -> None:
    leader = Leader(compiler)
    leader.compiled(request(1))
    leader.compiled(request(2))
    leader.constraints.take([Token("1", EOS, FinishReason.STOP)])
    leader.constraints.drop("2")
    step = Step(1, [], [Row(0, 0, 1, True, -1, -1)])
    assert leader.constraints.mask(step, ["1"]) is step


def test_one_dropped_while_it_compiles_never_starts(compiler: Compiler) -> None:
    leader = Leader(compiler)
    started = queue.SimpleQueue[None]()
    go_on = queue.SimpleQueue[None]()

    class Slow:
        def matcher(self, grammar: Grammar) -> object:
            started.put(None)
            go_on.get(timeout=PATIENCE_S)
            return compiler.matcher(grammar)

    leader.compiler = Slow()  # type: ignore[assignment]
    leader.constraints.submit(request(1))
    started.get(timeout=PATIENCE_S)
    leader.constraints.drop("1")
    go_on.put(None)
    go_on.put(None)
    assert leader.compiled(request(2)) == request(2)  # the first, compiled before it, did not come


def test_a_grammar_that_cannot_be_compiled_is_told(compiler: Compiler) -> None:
    leader = Leader(compiler)
    bad = request(1, Grammar(GrammarKind.REGEX, "("))
    assert leader.compiled(bad) == Token("1", NO_TOKEN, FinishReason.ABORT)


def test_the_scheduler_never_runs_ahead_of_a_grammar() -> None:
    config = SchedulerConfig(num_blocks=8, block_size=4, max_model_len=16, run_ahead=True)
    scheduler = Scheduler(config)
    scheduler.add(request(1))
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.sampling_ids(step) == ["1"]
    assert scheduler.schedule() is None  # its mask needs the token that is on its way
    scheduler.update(StepResult(step.id, [5]))
    assert scheduler.schedule() is not None
