"""Chat messages as a template wants them: text alone, tool calls' arguments as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import BadRequest
from launch.api.schemas import Json, Message, TextPart, Tool, ToolCall

_OURS = ("tools", "messages", "tokenize", "chat_template", "return_tensors", "return_dict", "padding")


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Raises BadRequest where a message holds more than text."""
    if not messages:
        raise BadRequest("messages is empty; it needs at least one")
    return [_message(message) for message in messages]


def template_options(asked: Json | None, *, generate: bool | None, proceed: bool | None) -> Mapping[str, Any]:
    """`generate`: add the opening of an answer; `proceed`: go on with the last message. Raises BadRequest."""
    options: dict[str, Any] = dict(asked or {})
    if ours := next((name for name in _OURS if name in options), None):
        raise BadRequest(f"chat_template_kwargs may not set {ours!r}, which the server sets")
    if proceed and generate:
        raise BadRequest(
            "continue_final_message goes on with the last message; set add_generation_prompt to false"
        )
    options["add_generation_prompt"] = not proceed if generate is None else generate
    if proceed:
        options["continue_final_message"] = True
    return options


def tools_for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True, by_alias=True) for tool in tools]


def _message(message: Message) -> dict[str, Any]:
    told: dict[str, Any] = {"role": message.role}
    content = message.content
    if isinstance(content, list):
        content = "\n".join(_text(part) for part in content)
    if content is not None or message.tool_calls:
        told["content"] = content if content is not None else ""
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            told[name] = value
    if message.tool_calls:
        told["tool_calls"] = [_call(call) for call in message.tool_calls]
    return {**(message.model_extra or {}), **told}


def _text(part: TextPart) -> str:
    if part.type not in ("text", "input_text") or part.text is None:
        raise BadRequest(f"a message holds a part of type {part.type[:40]!r}; this model takes text alone")
    return part.text


def _call(call: ToolCall) -> dict[str, Any]:
    """Templates write the arguments out themselves, and clients send them as a string."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise BadRequest(f"the arguments of the call of {call.function.name!r} are not JSON") from None
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments if arguments is not None else {}},
    }
