"""Between text and token ids: the tokenizer, the chat template, and detokenisation a token at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from cluster.errors import BadModel, BadRequest
from orchestrator import gguf_tokenizer
from orchestrator.request import SamplingParams
from strategies.gguf_header import read_header
from strategies.source import ModelSource, SourceKind

Message: TypeAlias = Mapping[str, Any]
Render: TypeAlias = Callable[[Sequence[Message], Sequence[Message] | None], str]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_INCOMPLETE = "\ufffd"  # what bytes that are no whole character decode to
_LONGEST_WAIT = (
    16  # tokens. A character is 4 bytes at most: what is longer never becomes text, and must not pile up
)


def text_of(source: ModelSource) -> Text | None:
    """The model's tokenizer; None where it has none: token-id prompts need none. Raises BadModel."""
    if source.path is None:
        return None
    if source.kind == SourceKind.GGUF:
        return _from_gguf(source.path, source.name)
    if any((source.path / file).is_file() for file in _TOKENIZER_FILES):
        return _from_directory(source.path, source.name)
    return None


class Text:
    """A tokenizer and, if the model has one, its chat template."""

    def __init__(self, name: str, tokenizer: Tokenizer, render: Render | None) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._render = render
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        """With bos or eos, where the tokenizer adds them. Raises BadRequest."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> list[int]:
        """The conversation in the model's template, up to where the answer starts. Raises BadRequest."""
        if self._render is None:
            raise BadRequest(f"{self._name} has no chat template; give a prompt instead of messages")
        return self._encode(self._render(messages, tools), add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # what it says of a str that has no UTF-8
            raise BadRequest(
                "the text holds half a character (a lone surrogate); give whole Unicode"
            ) from None
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Special tokens are left out."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


class Detokenizer:
    """Text from tokens, as they come. What it gives adds up to `decode` of all of them.

    A token's text depends on its neighbours (a first space is dropped, a character takes several tokens), so
    each step decodes a window: the tokens of the last text given, which is known, and those since.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._given: list[int] = []  # tokens of the last text given
        self._waiting: list[int] = []  # tokens since, which end amid a character

    def push(self, token_id: int) -> str:
        """The new text: none while a character is incomplete."""
        if token_id in self._text.special_ids:
            return ""
        self._waiting.append(token_id)
        new = self._new()
        incomplete = not new or new.endswith(_INCOMPLETE)
        return "" if incomplete and len(self._waiting) < _LONGEST_WAIT else self._give(new)

    def flush(self) -> str:
        """What is left at the end of the answer, whole or not."""
        return self._give(self._new())

    def _new(self) -> str:
        known = self._text.decode(self._given)
        return self._text.decode(self._given + self._waiting)[len(known) :]

    def _give(self, new: str) -> str:
        self._given, self._waiting = self._waiting, []
        return new


class StopFinder:
    """Cuts an answer off before the first stop string, and holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to be part of the answer. Nothing once `stopped`."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - max(map(self._overlap, self._stops), default=0))

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, end: int) -> str:
        released, self._held = self._held[:end], self._held[end:]
        return released

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the held text that `stop` starts with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class AnswerText:
    """The text of one answer, as its tokens come, cut off before the first stop string."""

    def __init__(self, text: Text, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.text = ""  # all that was given so far
        self._detokenizer = Detokenizer(text)
        self._finder = StopFinder(stops)
        self._unsearched = min_tokens  # tokens still to come in which a stop string does not count

    @classmethod
    def of(cls, text: Text, sampling: SamplingParams) -> AnswerText:
        return cls(text, sampling.stop, sampling.min_tokens)

    @property
    def stopped(self) -> bool:
        return self._finder.stopped

    def push(self, token_id: int) -> str:
        """The text that this token makes certain: none while it may be the start of a stop string."""
        if self.stopped:
            return ""
        new = self._detokenizer.push(token_id)
        if self._unsearched > 0:
            self._unsearched -= 1
        else:
            new = self._finder.push(new)
        self.text += new
        return new

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        new = self._finder.push(self._detokenizer.flush()) + self._finder.flush()
        self.text += new
        return new


def _from_gguf(path: Path, name: str) -> Text | None:
    metadata: Mapping[str, Any] = read_header(path).metadata
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    tokenizer = gguf_tokenizer.build(metadata, name)
    template = metadata.get("tokenizer.chat_template")
    if template is None:
        return Text(name, tokenizer, None)

    @cache  # on the first conversation: transformers takes seconds to import
    def wrapped() -> Any:
        from transformers import PreTrainedTokenizerFast

        ends = {f"{end}_token": gguf_tokenizer.special_token(metadata, end) for end in ("bos", "eos")}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **ends)

    return Text(name, tokenizer, lambda messages, tools: _rendered(wrapped(), messages, tools))


def _from_directory(path: Path, name: str) -> Text:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise BadModel(f"the tokenizer in {path} cannot be read: {reason}; fetch it again") from None
    if not loaded.is_fast:
        raise BadModel(f"the tokenizer in {path} has no fast form; add its tokenizer.json")
    tokenizer = loaded.backend_tokenizer
    tokenizer.no_truncation()  # some tokenizer.json files carry the limits of their training
    tokenizer.no_padding()
    if loaded.chat_template is None:
        return Text(name, tokenizer, None)
    return Text(name, tokenizer, lambda messages, tools: _rendered(loaded, messages, tools))


def _rendered(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Message] | None) -> str:
    """transformers runs the template in jinja2's sandbox. Raises BadRequest."""
    import jinja2

    try:
        rendered: str = tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=True, tokenize=False
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadRequest(f"the chat template refuses these messages: {reason}") from None
    return rendered
