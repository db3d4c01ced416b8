"""What the endpoints share: the coordinator, the tokenizer, the model's names."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import BadRequest
from launch.api.errors import ApiError
from launch.api.metrics import Facts
from orchestrator.coordinator import Coordinator
from orchestrator.text import Text

LONG_TEXT = 16_384  # characters: from here on a thread encodes it, while others are served (1 ms or so)


@dataclass(frozen=True, slots=True)
class Service:
    coordinator: Coordinator
    names: Sequence[str]  # of the model, the first is told
    plan: Mapping[str, object]  # the layout, what `shardwise plan --json` tells, the reasons
    facts: Facts
    timeout_s: float | None = None  # a request's deadline where it brings none
    tool_parser: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of sampling fields
    created_s: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0]

    def check_model(self, asked: str | None) -> None:
        """Raises ApiError where it is another model."""
        if asked is not None and asked not in self.names:
            served = " or ".join(self.names)
            raise ApiError(
                404,
                f"the model {asked[:100]!r} does not exist here; this server has {served}",
                param="model",
                code="model_not_found",
            )

    def text(self) -> Text:
        """Raises BadRequest where the model has no tokenizer."""
        if self.coordinator.text is None:
            raise BadRequest(f"{self.name} has no tokenizer; give prompts as token ids, to /v1/completions")
        return self.coordinator.text

    async def encode(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        text = self.text()
        if len(prompt) < LONG_TEXT:
            return text.encode(prompt, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(text.encode, prompt, add_special_tokens=add_special_tokens)
