"""Tool calls in an answer's text, in the forms that chat templates teach."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError


@dataclass(frozen=True, slots=True)
class Form:
    """`start` opens a call, `end` closes it (None: the end of the answer)."""

    start: str
    end: str | None


FORMS = {
    "hermes": Form("<tool_call>", "</tool_call>"),  # Qwen, Hermes and many others
    "mistral": Form("[TOOL_CALLS]", None),
    "llama3_json": Form("{", None),  # a call is the whole answer
}
_SIGNS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3_json": "<|python_tag|>"}


@dataclass(frozen=True, slots=True)
class Call:
    id: str
    name: str
    arguments: str  # JSON

    def told(self, index: int | None = None) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        whole: dict[str, Any] = {"id": self.id, "type": "function", "function": function}
        return whole if index is None else {"index": index, **whole}


def form_of(template: str, asked: str | None) -> Form | None:
    """The form that a chat template teaches; None where it knows of no tools. `asked`: by name."""
    if asked is not None:
        if asked not in FORMS:
            raise UserError(f"--tool-call-parser is {asked!r}; it must be one of {', '.join(FORMS)}")
        return FORMS[asked]
    if "tools" not in template:
        return None
    return next((FORMS[name] for name, sign in _SIGNS.items() if sign in template), FORMS["hermes"])


def new_call(name: str, arguments: str) -> Call:
    return Call(f"call_{uuid.uuid4().hex[:24]}", name, arguments)


def calls_in(payload: str) -> list[Call]:
    """None where it is no call: then it is text."""
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError):
        return []
    entries = found if isinstance(found, list) else [found]
    calls = [_call(entry) for entry in entries]
    whole = [call for call in calls if call is not None]
    return whole if len(whole) == len(calls) else []


def _call(entry: Any) -> Call | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return new_call(entry["name"], arguments)


class CallFinder:
    """Separates text from calls as it comes; a call is given when it is whole."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._held = ""
        self._inside = False
        self._begun = False  # text was given, so that what follows cannot be a call that is the whole answer
        self.found = 0  # calls so far

    def push(self, text: str) -> tuple[str, Sequence[Call]]:
        """What is certain: text, and calls."""
        self._held += text
        shown, calls = "", []
        while True:
            if not self._inside:
                shown += self._before_start()
                if not self._inside:
                    break
            end = self._form.end
            at = self._held.find(end) if end is not None else -1
            if end is None or at < 0:
                break
            calls += self._take(self._held[:at])
            self._held, self._inside = self._held[at + len(end) :].lstrip("\n"), False
        self.found += len(calls)
        return shown, calls

    def finish(self) -> tuple[str, Sequence[Call]]:
        """What was held back, once no more comes. An unclosed call counts where it is whole JSON."""
        held, self._held = self._held, ""
        if not self._inside:
            return held, []
        start = "" if self._form.start == "{" else self._form.start
        calls = calls_in(held)
        self.found += len(calls)
        return ("", calls) if calls else (start + held, [])

    def _take(self, payload: str) -> list[Call]:
        return calls_in(payload)

    def _before_start(self) -> str:
        """The text before a call, which is certain; then we are inside."""
        start = self._form.start
        if start == "{":
            return self._before_whole()
        at = self._held.find(start)
        if at >= 0:
            shown, self._held, self._inside = self._held[:at], self._held[at + len(start) :], True
            return shown
        keep = next((n for n in range(len(start) - 1, 0, -1) if self._held.endswith(start[:n])), 0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def _before_whole(self) -> str:
        if not self._begun and not self._held.strip():
            return ""
        if not self._begun and self._held.lstrip().startswith("{"):
            self._inside = True
            return ""
        self._begun = True
        shown, self._held = self._held, ""
        return shown
