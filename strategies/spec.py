"""What a model is, and what is asked of it: facts that a plan is made from.

A ModelSpec is read from a Hugging Face config.json, from a GGUF header, or from the built-in table (models.yaml).
Families differ by its fields, never by a model's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding. `kind` is default, linear, llama3 or yarn; the fields below are read only by their kind."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0  # linear, llama3, yarn
    original_max_positions: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scales cos and sin; None: 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn, with mscale_all_dim: another way to give attention_factor
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer: Llama, Mistral, Qwen2 (QKV bias), Qwen3 (QK norm)."""

    name: str
    family: str  # llama, mistral, qwen2, qwen3: for messages only
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    rms_eps: float
    rope: RopeSpec
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of q and k, before RoPE
    windows: tuple[
        int | None, ...
    ] = ()  # sliding window of each layer, in tokens that a query sees; () is none anywhere
    dtype: str = "bfloat16"  # as stored
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def is_dense(self) -> bool:
        return True

    @property
    def layer_params(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        if self.qkv_bias:
            attention += self.head_dim * (self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        return attention + mlp + 2 * self.hidden

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def total_params(self) -> int:
        tables = self.embedding_params * (1 if self.tied else 2)
        return self.layers * self.layer_params + tables + self.hidden

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Of the whole model: K and V of every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES_PER_ELEMENT[dtype]


class Objective(StrEnum):
    LATENCY = "latency"
    THROUGHPUT = "throughput"
    COST = "cost"


@dataclass(frozen=True, slots=True)
class Workload:
    prompt_tokens: int = 1024
    output_tokens: int = 256
    concurrency: int = 1
    objective: Objective = Objective.LATENCY
