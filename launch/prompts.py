"""Prompts from the command line or a JSONL file, parsed strictly before anything is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.errors import BadRequest
from orchestrator.request import SamplingParams
from orchestrator.text import Text

_KINDS = ("prompt", "messages", "prompt_token_ids")


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: Sequence[int]
    sampling: SamplingParams
    label: str  # what the user wrote, for people


def from_texts(
    texts: Sequence[str], sampling: SamplingParams, text: Text | None, *, chat: bool
) -> list[Prompt]:
    """`chat`: each is a user's message in the model's chat template."""

    def fields(prompt: str) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}

    return [Prompt(_token_ids(fields(prompt), text), sampling, prompt) for prompt in texts]


def from_file(path: Path, sampling: SamplingParams, text: Text | None) -> list[Prompt]:
    """A JSON object a line: prompt, messages or prompt_token_ids, and any sampling field. Raises BadRequest by line."""
    prompts = []
    for number, line in _lines(path):
        try:
            prompts.append(_parse(line, sampling, text))
        except (BadRequest, msgspec.ValidationError, msgspec.DecodeError) as error:
            raise BadRequest(f"{path} line {number}: {error}") from None
    if not prompts:
        raise BadRequest(f"{path} holds no prompts; give one JSON object a line")
    return prompts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"--prompts {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"--prompts {path}: not UTF-8 at byte {error.start}") from None
    return ((i, line) for i, line in enumerate(content.splitlines(), 1) if line.strip())


def _parse(line: str, sampling: SamplingParams, text: Text | None) -> Prompt:
    fields = msgspec.json.decode(line)
    if not isinstance(fields, dict):
        raise BadRequest(f"a line must be a JSON object, not {type(fields).__name__}")
    given = [kind for kind in _KINDS if kind in fields]
    if len(given) != 1:
        raise BadRequest(f"give exactly one of {', '.join(_KINDS)}, not {' and '.join(given) or 'none'}")
    asked = {key: value for key, value in fields.items() if key not in _KINDS}
    if isinstance(asked.get("stop"), str):  # as OpenAI's API allows
        asked["stop"] = [asked["stop"]]
    merged = msgspec.convert(msgspec.to_builtins(sampling) | asked, SamplingParams)
    return Prompt(_token_ids(fields, text), merged, str(fields[given[0]]))


def _token_ids(fields: dict[str, object], text: Text | None) -> Sequence[int]:
    if "prompt_token_ids" in fields:
        return msgspec.convert(fields["prompt_token_ids"], list[int])
    if text is None:
        raise BadRequest("this model has no tokenizer; give prompt_token_ids in a --prompts file")
    if "messages" in fields:
        return text.encode_chat(msgspec.convert(fields["messages"], list[dict[str, object]]))
    return text.encode(msgspec.convert(fields["prompt"], str))
