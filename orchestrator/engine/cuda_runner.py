"""Runs steps on a GPU. What is captured as CUDA graphs: a decode step of every size, and steps with prompts of some.

Other steps go through the same kernels one by one: they keep the GPU busy for longer than it takes to launch them.
Nothing here waits for the device. Sampled tokens stay on it, so that the next step may start before the host has seen
them: a row whose token the host does not know takes its slot's newest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from cluster.collectives import Collectives, Incoming
from orchestrator.engine import ops
from orchestrator.engine.captured import (
    chunk_sizes,
    decode_sizes,
    fitting,
    numbers_of_parts,
    shapes_of,
    told_of_parts,
)
from orchestrator.engine.kernels.attention import query_rows
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import Transformer
from orchestrator.engine.paged_attention import (
    DeviceSlots,
    PagedBatch,
    PagedContext,
    PromptAttention,
    batch_in_graph,
    batch_of,
    pinned,
    to_device,
)
from orchestrator.engine.runner import Pending
from orchestrator.engine.sampler import sample
from orchestrator.engine.slots import Slots, sampling_ends
from orchestrator.engine.told import (
    FIELDS,
    Block,
    Ints32,
    Shape,
    told_of_decodes,
)
from orchestrator.engine.warm_up import compile_kernels
from orchestrator.step import Row, Step, halves, whole_prompts
from strategies.overlap import Overlap
from strategies.plan import Shard
from strategies.tensor import Vocabulary

OVERLAP_TOKENS = 8192
"""Steps of so many tokens run in two parts where ranks sum up, so that one's sums travel while the other computes.

Twice the launches: at 2048 tokens the host took 97 ms for what two H100s compute in 27 (Llama-3.1-8B, 2026-11-22)."""

MOST_ON_THEIR_WAY = 16  # steps whose tokens the first stage has not looked at: no step needed them


class _Pool(NamedTuple):
    """What use_mem_pool reads of a MemPool. One of torch's own must outlive all graphs that were captured into it."""

    id: tuple[int, int]


class CudaRunner:
    """Feeds one rank's transformer, the same on every rank (satisfies StepRunner)."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        slots: Slots,
        shard: Shard,
        collectives: Collectives,
        vocabulary: Vocabulary,
        overlap: Overlap,
        step_tokens: int,
        prompt_attention: PromptAttention | None = None,
    ) -> None:
        """`overlap` is what the model's sums go through; a step has at most `step_tokens`.

        `prompt_attention` serves steps that are not captured; without one Triton's does.
        """
        self.model, self.cache, self.slots, self.shard = model, cache, slots, shard
        self.collectives, self._vocabulary = collectives, vocabulary
        self._overlap, self._prompt_attention = overlap, prompt_attention
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._max_num_seqs, blocks = slots.tables.shape
        self._on_device = DeviceSlots(self._max_num_seqs, blocks * slots.block_size, cache)
        self._sizes = decode_sizes(self._max_num_seqs)
        self._chunks = {size: self._parts_of(size) for size in chunk_sizes(step_tokens, shard.tp)}
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._stream: torch.cuda.Stream | None = None  # that graphs are captured on
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._make_buffers()
        # Tokens from the last stage, and their slots.
        self._on_their_way: deque[tuple[list[int], Incoming]] = deque()

    def _make_buffers(self) -> None:
        """What captured steps read and write: always at the same places, since graphs hold them."""
        rows, spec, shard = self._max_num_seqs, self.model.spec, self.shard
        tokens = max(rows, *self._chunks)
        numbers = [sum(sum(part.sizes) for part in parts) + 2 * rows for parts in self._chunks.values()]
        with torch.device(self._device):
            self._told = torch.zeros(FIELDS * tokens, dtype=torch.int32)
            self._numbers = torch.zeros(max(numbers), dtype=torch.int32)
            self._hidden_TE = torch.zeros((tokens if shard.pp > 1 else 0, spec.hidden), dtype=self._dtype)
            self._sampled_R = torch.zeros(rows, dtype=torch.int64)
            self._logits_RV = torch.zeros((rows if shard.is_last else 0, spec.vocab), dtype=self._dtype)

    def _parts_of(self, tokens: int) -> list[Shape]:
        """How a captured step of so many tokens runs: in two parts where one's sums are to travel beside the other."""
        spec, several = self.model.spec, self.shard.tp > 1 and tokens >= OVERLAP_TOKENS
        block = Block(query_rows(spec.head_dim, self._dtype, self._device), spec.heads // spec.kv_heads)
        sizes = [tokens // 2, tokens - tokens // 2] if several else [tokens]
        return shapes_of(sizes, self._max_num_seqs, block)

    def capture(self) -> None:
        """Every step that is replayed; all ranks of a stage call it at once, after `graph_bytes`."""
        self._capture_some(self._sizes, list(self._chunks))

    def graph_bytes(self) -> int:
        """What all graphs will take: the largest, whose memory the others share, and what each takes for itself."""
        compile_kernels(self.model, self.cache, self._on_device)
        others = self._sizes[-5:-1]
        before = self._free_bytes()
        self._capture_some(self._sizes[-1:], list(self._chunks)[-1:])
        between = self._free_bytes()
        self._capture_some(others, ())
        after = self._free_bytes()
        rest = len(self._sizes) + len(self._chunks) - 2
        each = (between - after) / len(others) if others else 0.0
        return max(0, before - between) + max(0, int(each * rest))

    def _free_bytes(self) -> int:
        """Without what torch keeps of the runs before captures: that serves other steps."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    @torch.inference_mode()
    def _capture_some(self, sizes: Sequence[int], chunks: Sequence[int]) -> None:
        for size in reversed(sizes):  # the largest first: its memory serves the others
            self._tell(told_of_decodes([], self.slots, size, self._on_device.scratch))
            self._capture(("decode", size), partial(self._decode, size))
        for tokens in reversed(chunks):
            self._tell_chunk(tokens, [[] for _ in self._chunks[tokens]])
            self._capture(("chunk", tokens), partial(self._chunk, tokens))

    def _capture(self, key: tuple[str, int], run: Callable[[], None]) -> None:
        run()  # cuBLAS and NCCL set themselves up at the first call of a size
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # Other threads (NCCL's watchdog) may ask the driver things meanwhile.
        with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
            run()
        self._graphs[key] = graph

    @torch.inference_mode()
    def run(self, step: Step) -> Pending | None:
        """Starts a step. Its tokens on the last stage's first rank, None on all others."""
        self.slots.remember(step)
        self._on_device.admit(step.admits)
        self._await_tokens(step.rows)
        found = self._compute(step.rows)
        if found is None:
            self._expect_tokens(step.rows)
            return None
        logits_RV, tokens_R = found
        draws = [] if self.slots.all_plain(step.rows) else self.slots.draws(step.rows)
        if draws:
            logits_RV = self._vocabulary.whole(logits_RV)
            tokens_R = sample(logits_RV, draws)
            self._keep(tokens_R, self._sampling_slots(step.rows))
        if self.shard.pp > 1 and len(tokens_R):
            self.collectives.send_to_first(tokens_R.clone())  # the next step writes over them
        if self.shard.tp_rank:
            return None
        return Pending.on_its_way(step, tokens_R, logits_RV, draws)

    @torch.inference_mode()
    def score(self, token_ids: list[int]) -> Tensor | None:
        """Logits after each of the tokens, [T, V], on every rank of the last stage. Uses slot 0: not while serving."""
        step = whole_prompts([token_ids], self.slots.block_size)
        self.slots.remember(step)
        self._on_device.admit(step.admits)
        hidden_TE = self._layers(self._batch_of(step.rows), self._received(len(token_ids)))
        if self.shard.is_last:
            return self._vocabulary.whole(self.model.logits(hidden_TE))
        self._send(hidden_TE)
        return None

    def _compute(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor] | None:
        """Logits (this rank's columns) and greedy tokens of the rows that sample; None before the last stage."""
        tokens = sum(row.count for row in rows)
        if tokens == len(rows) and all(row.samples for row in rows):
            return self._run_decodes(rows)
        captured = fitting(self._chunks, rows, tokens)
        return self._run_any(rows) if captured is None else self._run_chunk(*captured)

    # -- steps that only decode --

    def _run_decodes(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor] | None:
        size = self._captured_size(len(rows))
        self._tell(told_of_decodes(rows, self.slots, size, self._on_device.scratch))
        return self._replay(("decode", size), partial(self._decode, size), len(rows), len(rows))

    def _captured_size(self, rows: int) -> int:
        """The least of those that decode steps are captured at, with at least one row."""
        return next(size for size in self._sizes if size >= rows)

    def _decode(self, size: int) -> None:
        """What a graph holds; a batch without graphs is padded all the same, so that it gives the same tokens."""
        told = self._told[: FIELDS * size].view(FIELDS, size)
        hidden_TE = self._layers(PagedBatch(told, size, None), self._hidden_TE[:size])
        self._finish(hidden_TE, told[0])

    # -- steps with prompts, of a captured size --

    def _run_chunk(self, size: int, parts: Sequence[Sequence[Row]]) -> tuple[Tensor, Tensor] | None:
        self._tell_chunk(size, parts)
        tokens = sum(row.count for part in parts for row in part)
        sampling = sum(row.samples for part in parts for row in part)
        return self._replay(("chunk", size), partial(self._chunk, size), tokens, sampling)

    def _tell_chunk(self, size: int, parts: Sequence[Sequence[Row]]) -> None:
        shapes, scratch = self._chunks[size], self._on_device.scratch
        self._tell(told_of_parts(parts, shapes, self.slots, scratch))
        numbers = numbers_of_parts(parts, shapes, min(size, self._max_num_seqs), scratch)
        self._numbers[: numbers.size].copy_(pinned(numbers, self._device), non_blocking=True)

    def _chunk(self, size: int) -> None:
        """What a graph holds."""
        shapes, seats = self._chunks[size], min(size, self._max_num_seqs)
        sizes = [seats, seats, *(sum(shape.sizes) for shape in shapes)]
        keep_S, pick_S, *numbers = torch.split(self._numbers[: sum(sizes)], sizes)
        tokens = [shape.tokens for shape in shapes]
        told = torch.split(self._told[: FIELDS * size], [FIELDS * count for count in tokens])
        received = torch.split(self._hidden_TE[:size], tokens) if self.shard.pp > 1 else [None] * len(shapes)
        found = self._overlap.run(
            [partial(self._chunk_part, *of) for of in zip(shapes, told, numbers, received, strict=True)]
        )
        hidden_XE = found[0] if len(found) == 1 else torch.cat(found)
        if self.shard.is_last and len(found) > 1:
            hidden_XE = hidden_XE[pick_S]
        self._finish(hidden_XE, keep_S)

    def _chunk_part(self, shape: Shape, told: Tensor, numbers: Tensor, received_TE: Tensor | None) -> Tensor:
        """Hidden states of all tokens; on the last stage, of those that are sampled after, and some more."""
        batch, ends_S = batch_in_graph(told.view(FIELDS, shape.tokens), numbers, shape)
        return self._layers(batch, received_TE, ends_S if self.shard.is_last else None)

    # -- both of these --

    def _tell(self, told: Ints32) -> None:
        self._told[: told.size].copy_(pinned(told.reshape(-1), self._device), non_blocking=True)

    def _replay(
        self, key: tuple[str, int], run: Callable[[], None], tokens: int, sampling: int
    ) -> tuple[Tensor, Tensor] | None:
        received_TE = self._received(tokens)
        if received_TE is not None:
            self._hidden_TE[:tokens] = received_TE
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
        else:
            run()
        if self.shard.is_last:
            return self._logits_RV[:sampling], self._sampled_R[:sampling]
        self._send(self._hidden_TE[:tokens].clone())  # the next step writes over them
        return None

    def _finish(self, hidden_XE: Tensor, slots_R: Tensor) -> None:
        """Leaves the results where captured steps do: of all tokens, or on the last stage of those sampled after."""
        if not self.shard.is_last:
            self._hidden_TE[: len(hidden_XE)] = hidden_XE
            return
        rows = len(slots_R)
        logits_RV = self.model.logits(hidden_XE)
        self._logits_RV[:rows] = logits_RV
        self._sampled_R[:rows] = self._vocabulary.likeliest(logits_RV, ops.argmax)
        self._keep(self._sampled_R[:rows], slots_R)

    # -- any step --

    def _run_any(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor] | None:
        tokens = sum(row.count for row in rows)
        parts = halves(rows) if self.shard.tp > 1 and tokens >= OVERLAP_TOKENS else (rows,)
        sizes = [sum(row.count for row in part) for part in parts]
        received_TE = self._received(tokens)
        received = [None] * len(parts) if received_TE is None else torch.split(received_TE, sizes)
        with self._memory_of_graphs():
            found = self._overlap.run([partial(self._part, *of) for of in zip(parts, received, strict=True)])
            hidden_XE = found[0] if len(found) == 1 else torch.cat(found)
        if not self.shard.is_last:
            self._send(hidden_XE.clone())  # the next step may write over them
            return None
        count = len(hidden_XE)
        if not count:
            return self._logits_RV[:0], self._sampled_R[:0]
        padded_XE = torch.nn.functional.pad(hidden_XE, (0, 0, 0, self._captured_size(count) - count))
        logits_RV = self.model.logits(padded_XE)[:count]
        tokens_R = self._vocabulary.likeliest(logits_RV, ops.argmax)
        self._keep(tokens_R, self._sampling_slots(rows))
        return logits_RV, tokens_R

    @contextmanager
    def _memory_of_graphs(self) -> Iterator[None]:
        """Where a step's intermediate results go, too: graphs leave nothing there from one step to the next.

        torch gives memory to the stream that had it before, so this is graphs' own.
        """
        if self._stream is None or not self._graphs:
            yield
            return
        pool = _Pool(next(iter(self._graphs.values())).pool())
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.use_mem_pool(cast(torch.cuda.MemPool, pool), self._device),
        ):
            yield
        current.wait_stream(self._stream)

    def _part(self, rows: Sequence[Row], received_TE: Tensor | None) -> Tensor:
        """Hidden states of all tokens; on the last stage, of those that are sampled after."""
        batch = self._batch_of(rows)
        if not self.shard.is_last:
            return self._layers(batch, received_TE)
        ends = sampling_ends(rows)
        # The first token stands in for what is missing. cuBLAS has a kernel for every few rows, and CUDA takes 4 ms to
        # load one at its first use: those of captured sizes are there.
        wanted_R = np.pad(ends, (0, self._captured_size(len(ends)) - len(ends)))
        return self._layers(batch, received_TE, to_device(wanted_R, self._device))[: len(ends)]

    def _batch_of(self, rows: Sequence[Row]) -> PagedBatch:
        return batch_of(rows, self.slots, self._device, self._prompt_attention)

    def _layers(
        self, batch: PagedBatch, received_TE: Tensor | None, wanted_R: Tensor | None = None
    ) -> Tensor:
        context = PagedContext(self.cache, self._on_device, batch, self.model.spec, self.model.rope)
        x = context.token_ids_T if self.shard.is_first else received_TE
        hidden_TE: Tensor = self.model(x, context, wanted_R)
        return hidden_TE

    def _sampling_slots(self, rows: Sequence[Row]) -> Tensor:
        slots = np.array([row.slot for row in rows if row.samples], dtype=np.int32)
        return to_device(slots, self._device)

    def _keep(self, tokens_R: Tensor, slots_R: Tensor) -> None:
        self._on_device.newest.index_put_((slots_R,), tokens_R)

    # -- between stages --

    def _received(self, tokens: int) -> Tensor | None:
        """The previous stage's hidden states; None on the first stage."""
        if self.shard.is_first:
            return None
        assert self.collectives.previous_rank is not None
        shape = (tokens, self.model.spec.hidden)
        return self.collectives.recv(shape, self._dtype, self.collectives.previous_rank)

    def _expect_tokens(self, rows: Sequence[Row]) -> None:
        """On the first stage: what the step samples comes back from the last."""
        slots = [row.slot for row in rows if row.samples]
        if self.shard.is_first and slots:
            self._on_their_way.append((slots, self.collectives.recv_from_last((len(slots),), torch.int64)))

    def _await_tokens(self, rows: Sequence[Row]) -> None:
        """Puts down what has come of tokens that these rows need, and what came before it."""
        if not self._on_their_way:
            return
        unknown = {row.slot for row in rows if self.slots.is_ahead(row)}
        needed = [i for i, (slots, _) in enumerate(self._on_their_way) if not unknown.isdisjoint(slots)]
        late = len(self._on_their_way) - MOST_ON_THEIR_WAY
        for _ in range(max(late, needed[-1] + 1 if needed else 0)):
            slots, incoming = self._on_their_way.popleft()
            index = to_device(np.array(slots, dtype=np.int32), self._device)
            self._keep(incoming.landed(), index)

    def _send(self, hidden_TE: Tensor) -> None:
        assert self.collectives.next_rank is not None
        self.collectives.send(hidden_TE, self.collectives.next_rank)
