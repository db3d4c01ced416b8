"""A tokenizer from GGUF metadata, built with the tokenizers package.

transformers can build one too, but takes seconds, and does not cut off digits as `smollm` must. The keys are
explained in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; `pre` in llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from cluster.errors import BadModel

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Pre:
    """How text is cut before merging, and what llama.cpp ties to the same name."""

    split: str | None = None  # None: GPT-2's expression
    digits: bool = False  # cut off each digit first
    whole_words: bool = False  # a word that is a token is taken whole, merges or not
    add_bos: bool = False  # unless tokenizer.ggml.add_bos_token says otherwise


_PRE = {
    "default": _Pre(),
    "gpt-2": _Pre(),
    "smollm": _Pre(digits=True),
    "llama-bpe": _Pre(_LLAMA3, whole_words=True, add_bos=True),
    "qwen2": _Pre(_QWEN2),
    "deepseek-r1-qwen": _Pre(_QWEN2),
    "tekken": _Pre(_TEKKEN, whole_words=True, add_bos=True),
}


def build(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    """The file's tokenizer, which adds bos and eos as the file says. Raises BadModel."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    if kind == "gpt2":
        pre = _pre(metadata.get("tokenizer.ggml.pre", "default"), name)
        tokenizer = _byte_level(tokens, metadata.get("tokenizer.ggml.merges", ()), pre)
        add_bos = pre.add_bos
    elif kind == "llama":
        space_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        tokenizer = _sentencepiece(tokens, metadata.get("tokenizer.ggml.scores", ()), space_prefix)
        add_bos = True
    else:
        raise BadModel(f"{name}: GGUF tokenizer {kind!r} is not supported; supported are gpt2 and llama")
    types = metadata.get("tokenizer.ggml.token_type", ())
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [token for token, type_ in zip(tokens, types, strict=False) if type_ == wanted]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in found])
    bos = special_token(metadata, "bos") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None
    eos = special_token(metadata, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos or eos:
        parts = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        ids = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
        tokenizer.post_processor = processors.TemplateProcessing(single=parts, special_tokens=ids)
    return tokenizer


def special_token(metadata: Mapping[str, Any], which: str) -> str | None:
    """The text of the `bos`, `eos`, `unknown` or `padding` token."""
    index = metadata.get(f"tokenizer.ggml.{which}_token_id")
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    return None if index is None or index >= len(tokens) else tokens[index]


def _pre(name: str, model: str) -> _Pre:
    if name not in _PRE:
        raise BadModel(
            f"{model}: GGUF pre-tokenizer {name!r} is not supported; supported are {', '.join(_PRE)}"
        )
    return _PRE[name]


def _byte_level(tokens: Sequence[str], merges: Sequence[str], pre: _Pre) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre.whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: Sequence[str], scores: Sequence[float], space_prefix: bool) -> Tokenizer:
    """Merges are not in the file: any two tokens that make a third merge, those with the best score first."""
    vocab = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=False):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-score, -len(left), -len(right), vocab[left], vocab[right], left, right))
    pairs = [(left, right) for *_, left, right in sorted(ranked)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, fuse_unk=True, byte_fallback=True))
    scheme = "first" if space_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
