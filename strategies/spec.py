"""What a model is, and what is asked of it: facts that a plan is made from.

A ModelSpec is read from a Hugging Face config.json, from a GGUF header, or from the built-in table (models.yaml).
Families differ by its fields, never by a model's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from strategies.published import Published

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
class Experts:
    """A mixture of experts in place of the MLP, in every layer after the first `dense_layers`."""

    count: int
    per_token: int
    intermediate: int  # of one expert
    shared: int = 0  # experts' worth of MLP that every token goes through
    dense_layers: int = 0


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek): the cache holds one compressed row for all heads."""

    q_rank: int  # 0: queries are not compressed
    kv_rank: int
    nope_dim: int  # of a head's query and key, without rotation
    rope_dim: int  # rotated, shared by all heads in the key
    v_dim: int

    @property
    def cached(self) -> int:
        """Elements a token and layer keep in the cache."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer: Llama, Mistral, Qwen2 (QKV bias), Qwen3 (QK norm); to plan for, mixtures too."""

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
    experts: Experts | None = None
    latent: Latent | None = None
    published: Published | None = None  # weights in fewer bits, as a checkpoint stores them
    sizes_only: bool = False  # what computes it is transformers' to know; these are sizes to plan by

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def is_dense(self) -> bool:
        return self.experts is None

    @property
    def dense_layers(self) -> int:
        return self.layers if self.experts is None else self.experts.dense_layers

    @property
    def attention_params(self) -> int:
        """Of one layer."""
        if self.latent is not None:
            a = self.latent
            query = self.heads * (a.nope_dim + a.rope_dim)
            down = a.q_rank * (self.hidden + query) if a.q_rank else self.hidden * query
            up = self.heads * a.kv_rank * (a.nope_dim + a.v_dim)
            return down + self.hidden * a.cached + up + self.heads * a.v_dim * self.hidden
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        if self.qkv_bias:
            attention += self.head_dim * (self.heads + 2 * self.kv_heads)
        return attention

    @property
    def layer_params(self) -> int:
        """Of one layer; of a mixture of experts, of the mean layer, all experts counted."""
        return self._all_layers(None) // self.layers

    @property
    def active_params(self) -> int:
        """That one token goes through, in all layers together."""
        return self._all_layers(self.experts.per_token if self.experts else None)

    def _all_layers(self, experts: int | None) -> int:
        """Parameters of all layers, with so many experts in each that has some; None: with all."""
        norms = 2 * self.hidden
        total = self.layers * (self.attention_params + norms)
        total += self.dense_layers * 3 * self.hidden * self.intermediate
        if self.experts is not None:
            one = 3 * self.hidden * self.experts.intermediate
            used = self.experts.count if experts is None else experts
            mixture = (used + self.experts.shared) * one + self.experts.count * self.hidden
            total += (self.layers - self.dense_layers) * mixture
        return total

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def total_params(self) -> int:
        tables = self.embedding_params * (1 if self.tied else 2)
        return self._all_layers(None) + tables + self.hidden

    @property
    def cached_elements(self) -> int:
        """That one token keeps in the cache in one layer: K and V of every KV head, or the latent row."""
        return 2 * self.kv_heads * self.head_dim if self.latent is None else self.latent.cached

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Of the whole model: K and V of every layer."""
        return self.layers * self.cached_elements * BYTES_PER_ELEMENT[dtype]


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
    steady: bool = False  # so many in flight all the time, each that ends replaced; else they arrive together
    ragged: bool = (
        False  # answers of many lengths about the mean: a batch that arrived together drains slowly
    )
    most_ttft_s: float | None = None  # a layout whose requests wait longer is not chosen
    most_tpot_s: float | None = None
