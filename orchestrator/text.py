"""Between text and token ids: the tokenizer, the chat template, and detokenisation a token at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from tokenizers import Tokenizer, decoders

from cluster.errors import BadModel, BadRequest
from orchestrator import gguf_tokenizer
from orchestrator.request import SamplingParams
from strategies.gguf_header import read_header
from strategies.source import ModelSource, SourceKind

Message: TypeAlias = Mapping[str, Any]
Render: TypeAlias = Callable[[Sequence[Message], Sequence[Message] | None, Mapping[str, Any]], str]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_INCOMPLETE = "\ufffd"  # what bytes that are no whole character decode to
_SENTENCEPIECE_SPACE = "\u2581"
_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
_LONGEST_WAIT = (
    16  # tokens. A character is 4 bytes at most: what is longer never becomes text, and must not pile up
)


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte (encoder.py of openai/gpt-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_of()


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

    def __init__(
        self, name: str, tokenizer: Tokenizer, render: Render | None, template: str | None = None
    ) -> None:
        """`render` puts messages into the chat template, whose text is `template`."""
        self._name = name
        self._tokenizer = tokenizer
        self._render = render
        self.template = template or ""
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """With bos or eos, where the tokenizer adds them. Raises BadRequest."""
        return self._encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        options: Mapping[str, Any] = _NO_OPTIONS,
    ) -> list[int]:
        """The conversation in the model's template, up to where the answer starts. Raises BadRequest.

        `options` are the template's own, such as enable_thinking, or add_generation_prompt.
        """
        if self._render is None:
            raise BadRequest(f"{self._name} has no chat template; give a prompt instead of messages")
        return self._encode(self._render(messages, tools, options), add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # what it says of a str that has no UTF-8
            raise BadRequest(
                "the text holds half a character (a lone surrogate); give whole Unicode"
            ) from None
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def save(self, directory: Path, bos_id: int | None, eos_id: int | None) -> None:
        """As a Hugging Face directory has it."""
        self._tokenizer.save(str(directory / "tokenizer.json"))
        config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name, token_id in (("bos_token", bos_id), ("eos_token", eos_id)):
            if token_id is not None:
                config[name] = self._tokenizer.id_to_token(token_id)
        if self.template:
            config["chat_template"] = self.template
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @cached_property
    def pieces(self) -> Sequence[bytes] | None:
        """Each token's own bytes, by id; None where the tokenizer's decoder does more than put them in a row."""
        if not isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            return None
        tokens = (
            self._tokenizer.id_to_token(i) for i in range(max(self._tokenizer.get_vocab().values()) + 1)
        )
        return [_bytes_of(token) if token is not None else b"" for token in tokens]

    def piece(self, token_id: int) -> bytes:
        """What one token stands for, alone."""
        if self.pieces is not None:
            return self.pieces[token_id] if token_id < len(self.pieces) else b""
        token = self._tokenizer.id_to_token(token_id) or ""
        if len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(_SENTENCEPIECE_SPACE, " ").encode()


def _bytes_of(token: str) -> bytes:
    """A byte-level token's: each of its characters stands for a byte, unless it was added as it reads."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


class Detokenizer:
    """Text from tokens, as they come. What it gives adds up to `decode` of all of them."""

    def __init__(self, text: Text, *, skip_special_tokens: bool = True) -> None:
        self._skipped = text.special_ids if skip_special_tokens else frozenset()
        pieces = text.pieces
        self._way = _Bytes(pieces) if pieces is not None else _Window(text, skip_special_tokens)

    def push(self, token_id: int) -> str:
        """The new text: none while a character is incomplete."""
        return "" if token_id in self._skipped else self._way.push(token_id)

    def flush(self) -> str:
        """What is left at the end of the answer, whole or not."""
        return self._way.flush()


class _Bytes:
    """Where a token's text is its bytes, whatever its neighbours are: six times as fast as a window."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._pieces[token_id]) if token_id < len(self._pieces) else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """A token's text depends on its neighbours (a first space is dropped, a character takes several tokens), so
    each step decodes a window: the tokens of the last text given, which is known, and those since.
    """

    def __init__(self, text: Text, skip_special_tokens: bool) -> None:
        self._text, self._skips = text, skip_special_tokens
        self._given: list[int] = []  # tokens of the last text given
        self._waiting: list[int] = []  # tokens since, which end amid a character

    def push(self, token_id: int) -> str:
        self._waiting.append(token_id)
        new = self._new()
        incomplete = not new or new.endswith(_INCOMPLETE)
        return "" if incomplete and len(self._waiting) < _LONGEST_WAIT else self._give(new)

    def flush(self) -> str:
        return self._give(self._new())

    def _new(self) -> str:
        known = self._decode(self._given)
        return self._decode(self._given + self._waiting)[len(known) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._text.decode(token_ids, skip_special_tokens=self._skips)

    def _give(self, new: str) -> str:
        self._given, self._waiting = self._waiting, []
        return new


class StopFinder:
    """Cuts an answer off before the first stop string, and holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: cut after the stop string, not before it."""
        self._stops, self._include = tuple(stops), include
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to be part of the answer. Nothing once `stopped`."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            at, stop = min(found)
            return self._release(at + len(stop) if self._include else at)
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

    def __init__(
        self,
        text: Text,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._given: list[str] = []
        self._detokenizer = Detokenizer(text, skip_special_tokens=skip_special_tokens)
        self._finder = StopFinder(stops, include=include_stop)
        self._unsearched = min_tokens  # tokens still to come in which a stop string does not count

    @classmethod
    def of(cls, text: Text, sampling: SamplingParams) -> AnswerText:
        return cls(
            text,
            sampling.stop,
            sampling.min_tokens,
            skip_special_tokens=sampling.skip_special_tokens,
            include_stop=sampling.include_stop_str_in_output,
        )

    @property
    def text(self) -> str:
        """All that was given so far."""
        return "".join(self._given)

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
        self._given.append(new)
        return new

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        new = self._finder.push(self._detokenizer.flush()) + self._finder.flush()
        self._given.append(new)
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

    return Text(name, tokenizer, lambda *asked: _rendered(wrapped(), *asked), str(template))


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
    return Text(name, tokenizer, lambda *asked: _rendered(loaded, *asked), str(loaded.chat_template))


def _rendered(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Message] | None,
    options: Mapping[str, Any],
) -> str:
    """transformers runs the template in jinja2's sandbox. Raises BadRequest."""
    import jinja2

    asked = {"add_generation_prompt": True, **options}
    try:
        rendered: str = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **asked)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadRequest(f"the chat template refuses these messages: {reason}") from None
    return rendered
