"""What clients may send: OpenAI's fields and vLLM's. Ranges are SamplingParams' business; sizes are limited here.

A field that we do not know is let through, as vLLM does, and named in the response's `x-ignored-fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from cluster.errors import BadRequest
from orchestrator.request import SamplingParams

MOST_MESSAGES = 4096
MOST_TOOLS = 128
MOST_PROMPTS = 256  # of one completions request
MOST_STOPS = 64
LONGEST_STOP = 1024  # characters
MOST_BIASES = 4096
LONGEST_NAME = 256
MOST_IDS = 1_000_000

Name: TypeAlias = Annotated[str, Field(max_length=LONGEST_NAME)]
Stop: TypeAlias = Annotated[str, Field(max_length=LONGEST_STOP)]
TokenIds: TypeAlias = Annotated[list[int], Field(max_length=MOST_IDS)]
Json: TypeAlias = dict[str, JsonValue]


class Open(BaseModel):
    """Whatever else comes is kept in `model_extra`."""

    model_config = ConfigDict(extra="allow")


class StreamOptions(Open):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Open):
    name: Name | None = None
    description: str | None = None
    schema_: Json | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Open):
    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: str | None = None  # with type regex: ours
    pattern: str | None = None  # the same


class StructuredOutputs(Open):
    """vLLM's."""

    json_: Json | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(max_length=4096)] | None = None
    grammar: str | None = None


class Function(Open):
    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Open):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Open):
    name: Name


class NamedTool(Open):
    type: Literal["function"] = "function"
    function: NamedFunction


class TextPart(Open):
    type: Name
    text: str | None = None


class CalledFunction(Open):
    name: Name
    arguments: str | Json | None = None


class ToolCall(Open):
    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Open):
    role: Name
    content: str | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Name | None = None


class Sampling(Open):
    """How to pick tokens, in both kinds of request."""

    model: Name | None = None
    n: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MOST_BIASES)] | None = None
    allowed_token_ids: Annotated[list[int], Field(max_length=MOST_IDS)] | None = None
    bad_words: Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    truncate_prompt_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json | str | None = None  # vLLM's older names
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(max_length=4096)] | None = None
    guided_grammar: str | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    user: str | None = None
    priority: int | None = None
    request_id: Name | None = None
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None  # ours: the request's deadline
    use_beam_search: bool | None = None
    best_of: int | None = None
    length_penalty: float | None = None
    prompt_logprobs: int | None = None
    logits_processors: Any = None


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Json | None = None
    documents: list[Json] | None = None
    # OpenAI's, without meaning here
    store: bool | None = None
    metadata: Json | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None


class CompletionRequest(Sampling):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(max_length=MOST_PROMPTS)]
    )
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class TokenizeRequest(Open):
    """Either a prompt or messages."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(max_length=MOST_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool | None = None
    chat_template_kwargs: Json | None = None


class DetokenizeRequest(Open):
    model: Name | None = None
    tokens: TokenIds


def sampling_params(
    asked: Sampling, max_tokens: int, logprobs: int | None, defaults: Mapping[str, Any]
) -> SamplingParams:
    """Where nothing is said the model's defaults, then OpenAI's. Raises BadRequest."""
    _refuse_what_we_lack(asked)
    stop = asked.stop if asked.stop is not None else ()
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_or(asked.min_tokens, 0),
        temperature=_or(asked.temperature, defaults.get("temperature", 1.0)),
        top_k=_or(asked.top_k, defaults.get("top_k", 0)),
        top_p=_or(asked.top_p, defaults.get("top_p", 1.0)),
        min_p=_or(asked.min_p, defaults.get("min_p", 0.0)),
        repetition_penalty=_or(asked.repetition_penalty, defaults.get("repetition_penalty", 1.0)),
        presence_penalty=_or(asked.presence_penalty, 0.0),
        frequency_penalty=_or(asked.frequency_penalty, 0.0),
        seed=asked.seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(asked.stop_token_ids or ()),
        include_stop_str_in_output=bool(asked.include_stop_str_in_output),
        skip_special_tokens=asked.skip_special_tokens is not False,
        ignore_eos=bool(asked.ignore_eos),
        logit_bias=_bias(asked.logit_bias),
        allowed_token_ids=None if asked.allowed_token_ids is None else tuple(asked.allowed_token_ids),
        logprobs=logprobs,
        n=_or(asked.n, 1),
    )


def _bias(asked: dict[str, float] | None) -> dict[int, float] | None:
    """JSON's keys are strings."""
    try:
        return None if asked is None else {int(token_id): bias for token_id, bias in asked.items()}
    except ValueError:
        raise BadRequest("logit_bias has a key that is no token id; give whole numbers, as strings") from None


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _refuse_what_we_lack(asked: Sampling) -> None:
    n = _or(asked.n, 1)
    lacking = (
        ("use_beam_search", asked.use_beam_search, "sample, or be greedy with temperature 0"),
        ("best_of", asked.best_of not in (None, n), "ask for n answers and pick one yourself"),
        (
            "length_penalty",
            asked.length_penalty not in (None, 1.0),
            "it is for beam search, which is not here",
        ),
        ("prompt_logprobs", asked.prompt_logprobs, "logprobs are told of generated tokens only"),
        ("logits_processors", asked.logits_processors, "no code is taken from requests"),
        ("priority", asked.priority, "turns are fair between keys; drop it"),
    )
    for name, is_asked, way_out in lacking:
        if is_asked:
            raise BadRequest(f"{name} is not supported: {way_out}")
