"""Prompts from the command line or a JSONL file, parsed strictly before anything is started."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cluster.errors import BadRequest
from orchestrator.request import SamplingParams, check_context, check_tokens
from orchestrator.text import Text

_KINDS: Mapping[str, Any] = {
    "prompt": str,
    "messages": list[dict[str, object]],
    "prompt_token_ids": list[int],
}
_SAMPLING: Mapping[str, Any] = {field.name: field.type for field in msgspec.structs.fields(SamplingParams)}
_RULES: Mapping[Any, str] = {  # what a value of each type must be, in words
    str: "a string",
    int: "a whole number",
    int | None: "a whole number or null",
    float: "a number",
    bool: "true or false",
    list[int]: "a list of token ids",
    tuple[int, ...]: "a list of token ids",
    tuple[str, ...]: "a string or a list of them",
    dict[int, float] | None: "an object of token ids and numbers, or null",
    tuple[int, ...] | None: "a list of token ids, or null",
    tuple[tuple[int, ...], ...]: "a list of lists of token ids",
    list[dict[str, object]]: 'a list such as [{"role": "user", "content": "Hello"}]',
}
_LONGEST_QUOTE = 60  # characters of a bad value that an error repeats


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: Sequence[int]
    sampling: SamplingParams
    label: str  # what the user wrote, for people
    where: str  # such as `prompt 2` or `asks.jsonl line 7`, for errors


def from_texts(
    texts: Sequence[str], sampling: SamplingParams, text: Text | None, *, chat: bool
) -> list[Prompt]:
    """`chat`: each is a user's message in the model's chat template. Raises BadRequest."""

    def fields(prompt: str) -> Mapping[str, Any]:
        return {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}

    prompts = []
    for number, prompt in enumerate(texts, 1):
        where = f"prompt {number}"
        with _blaming(where):
            prompts.append(Prompt(_token_ids(fields(prompt), text), sampling, prompt, where))
    return prompts


def from_file(path: Path, sampling: SamplingParams, text: Text | None) -> list[Prompt]:
    """A JSON object a line: prompt, messages or prompt_token_ids, and any sampling field. Raises BadRequest by line."""
    prompts = []
    for number, line in _lines(path):
        where = f"{path} line {number}"
        with _blaming(where):
            prompts.append(_parse(line, sampling, text, where))
    if not prompts:
        raise BadRequest(f"{path} holds no prompts; give one JSON object a line")
    return prompts


def check(prompts: Sequence[Prompt], *, vocab: int, context: int, has_tokenizer: bool) -> None:
    """Raises BadRequest, naming the prompt, where one can never run: then none shall."""
    for prompt in prompts:
        with _blaming(prompt.where):
            check_tokens(prompt.token_ids, prompt.sampling, vocab=vocab, has_tokenizer=has_tokenizer)
            check_context(len(prompt.token_ids), context)


@contextmanager
def _blaming(where: str) -> Iterator[None]:
    try:
        yield
    except BadRequest as error:
        raise BadRequest(f"{where}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        content = path.read_text(encoding="utf-8-sig")  # Windows' editors begin files with a mark
    except OSError as error:
        raise BadRequest(f"--prompts {path}: {error.strerror}; give a JSONL file") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"--prompts {path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    # Not splitlines: that cuts at U+2028 too, which JSON allows in a string.
    return ((i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip())


def _parse(line: str, sampling: SamplingParams, text: Text | None, where: str) -> Prompt:
    fields = _object(line)
    for key in fields:
        if key not in _KINDS and key not in _SAMPLING:
            near = difflib.get_close_matches(key, (*_KINDS, *_SAMPLING), n=1, cutoff=0.0)[0]
            raise BadRequest(f"unknown field {key!r}; the nearest known is {near}")
    given = [kind for kind in _KINDS if kind in fields]
    if len(given) != 1:
        raise BadRequest(f"give exactly one of {', '.join(_KINDS)}, not {' and '.join(given) or 'none'}")
    asked = {key: _typed(key, value, _SAMPLING[key]) for key, value in fields.items() if key in _SAMPLING}
    token_ids = _token_ids(fields, text)
    return Prompt(token_ids, msgspec.structs.replace(sampling, **asked), _label(fields), where)


def _object(line: str) -> Mapping[str, Any]:
    try:
        # Python's parser lets NaN through, so that it is refused by its field's own rule.
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"not JSON at column {error.colno}: {error.msg}; give one JSON object a line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise BadRequest(f"JSON that cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise BadRequest(f'{_quoted(found)} is no JSON object; give one, such as {{"prompt": "Hello"}}')
    return found


def _token_ids(fields: Mapping[str, Any], text: Text | None) -> Sequence[int]:
    (key,) = (kind for kind in _KINDS if kind in fields)
    value = _typed(key, fields[key], _KINDS[key])
    if key == "prompt_token_ids":
        return list(value)
    if text is None:
        raise BadRequest("this model has no tokenizer; give prompt_token_ids, in a --prompts file")
    return text.encode_chat(value) if key == "messages" else text.encode(value)


def _typed(key: str, value: Any, kind: Any) -> Any:
    if key == "stop" and isinstance(value, str):  # as OpenAI's API allows
        value = [value]
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError:
        raise BadRequest(f"{key} is {_quoted(value)}; it must be {_RULES[kind]}") from None


def _quoted(value: object) -> str:
    quoted = json.dumps(value, ensure_ascii=False)
    return quoted if len(quoted) <= _LONGEST_QUOTE else quoted[: _LONGEST_QUOTE - 1] + "…"


def _label(fields: Mapping[str, Any]) -> str:
    if "messages" in fields:
        return str(fields["messages"][-1].get("content", ""))
    return str(fields.get("prompt", fields.get("prompt_token_ids")))
