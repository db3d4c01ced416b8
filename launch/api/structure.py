"""What an answer must look like, from the many ways in which clients ask for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from pydantic import JsonValue

from cluster.errors import BadRequest
from launch.api.schemas import ChatRequest, NamedTool, ResponseFormat, Sampling, Tool
from orchestrator.request import Grammar, GrammarKind

MOST_SCHEMA_BYTES = 64 * 2**10
MOST_REGEX_BYTES = 8 * 2**10

_ANY_OBJECT: dict[str, JsonValue] = {"type": "object"}


def grammar_of(asked: Sampling) -> Grammar | None:
    """None: any text. Raises BadRequest where two are asked for, or one that is too long."""
    found = list(_asked_for(asked))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise BadRequest(f"{names} are given; an answer has one form: give one of them")
    if not found:
        return None
    name, grammar = found[0]
    return _bounded(name, grammar)


def tool_grammar(asked: ChatRequest) -> Grammar | None:
    """Where tool_choice demands a call: of the function named, its arguments; else a list of calls."""
    tools, choice = asked.tools or [], asked.tool_choice
    if isinstance(choice, NamedTool):
        named = next((tool for tool in tools if tool.function.name == choice.function.name), None)
        if named is None:
            raise BadRequest(f"tool_choice names {choice.function.name!r}, which is none of the tools")
        return _bounded("tools", _schema(named.function.parameters or _ANY_OBJECT))
    if choice == "required":
        if not tools:
            raise BadRequest("tool_choice is required, and there are no tools; give some")
        return _bounded("tools", _schema(_calls_schema(tools)))
    return None


def _calls_schema(tools: Sequence[Tool]) -> dict[str, JsonValue]:
    calls: list[JsonValue] = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [tool.function.name]},
                "parameters": tool.function.parameters or _ANY_OBJECT,
            },
            "required": ["name", "parameters"],
        }
        for tool in tools
    ]
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}}


def _asked_for(asked: Sampling) -> Iterator[tuple[str, Grammar]]:
    if asked.response_format is not None:
        grammar = _of_response_format(asked.response_format)
        if grammar is not None:
            yield "response_format", grammar
    structured = asked.structured_outputs
    if structured is not None:
        yield from _each(
            "structured_outputs.",
            structured.json_ if not structured.json_object else _ANY_OBJECT,
            structured.regex,
            structured.choice,
            structured.grammar,
        )
    yield from _each(
        "guided_", asked.guided_json, asked.guided_regex, asked.guided_choice, asked.guided_grammar
    )


def _each(
    prefix: str,
    schema: JsonValue,
    regex: str | None,
    choice: Sequence[str] | None,
    ebnf: str | None,
) -> Iterator[tuple[str, Grammar]]:
    if schema is not None:
        yield prefix + "json", _schema(schema)
    if regex is not None:
        yield prefix + "regex", Grammar(GrammarKind.REGEX, regex)
    if choice is not None:
        if not choice:
            raise BadRequest(f"{prefix}choice is empty; give at least one")
        words = " | ".join(json.dumps(word, ensure_ascii=False) for word in choice)
        yield prefix + "choice", Grammar(GrammarKind.EBNF, f"root ::= {words}")
    if ebnf is not None:
        yield prefix + "grammar", Grammar(GrammarKind.EBNF, ebnf)


def _of_response_format(asked: ResponseFormat) -> Grammar | None:
    if asked.type == "json_object":
        return _schema(_ANY_OBJECT)
    if asked.type == "json_schema":
        if asked.json_schema is None or asked.json_schema.schema_ is None:
            raise BadRequest("response_format.json_schema.schema is missing; give the JSON schema")
        return _schema(asked.json_schema.schema_)
    if asked.type == "regex":
        source = asked.regex if asked.regex is not None else asked.pattern
        if source is None:
            raise BadRequest("response_format.regex is missing; give the regular expression")
        return Grammar(GrammarKind.REGEX, source)
    return None


def _schema(schema: JsonValue) -> Grammar:
    source = schema if isinstance(schema, str) else json.dumps(schema)
    return Grammar(GrammarKind.JSON_SCHEMA, source)


def _bounded(name: str, grammar: Grammar) -> Grammar:
    is_regex = grammar.kind is GrammarKind.REGEX
    most = MOST_REGEX_BYTES if is_regex else MOST_SCHEMA_BYTES
    size = len(grammar.source.encode(errors="replace"))
    if size > most:
        raise BadRequest(f"{name} has {size} bytes; at most {most} are taken")
    return grammar
