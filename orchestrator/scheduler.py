"""Continuous batching as a pure state machine: no torch, no clock, no I/O.

`schedule` may be called again before the last batch's tokens are known: it then takes sequences that wait for no
token (another pipeline group, or the next chunk of a long prompt). Where the ranks keep their newest tokens on the
device (`run_ahead`), it also takes a sequence whose last token is still in flight; should that token end it, the step
is computed in vain and its token dropped. Ranks run steps in order, so a block freed while a step is still in flight
may be handed out at once: the old writes land before the new ones.

A block that is taken for something else is copied to host memory first where there is a pool of it (`host_blocks`), by
its prefix: what was preempted, or asked before, comes back from there and is not computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from cluster.errors import BadRequest
from orchestrator.blocks import BlockPool, block_hashes
from orchestrator.host_blocks import HostPool
from orchestrator.request import FinishReason, Request, Token, check_context
from orchestrator.step import NOT_FINITE, Admit, Move, Row, Step, StepResult

SAVED_AHEAD = 16
"""Blocks that a step copies out before they are taken: a long prompt takes many at once, and then waits for few."""
LOOKED_AHEAD = 64  # free blocks, of which those are


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    groups: int = 1  # batches in flight at once: the pipeline's stages
    prefix_caching: bool = True
    run_ahead: bool = False  # a row's token may be one that the ranks sampled and have not told yet
    host_blocks: int = 0  # of host memory, for KV that the device has no room for

    @property
    def depth(self) -> int:
        """Steps in flight that keep every stage busy while the host looks at the oldest."""
        return self.groups + self.run_ahead


@dataclass(slots=True, eq=False)
class Sequence:
    request: Request
    arrival: int
    tokens: list[int]
    end: int  # tokens at which it is surely finished
    needs_past: bool  # what it samples depends on which tokens it has, not only on how many
    scheduled: int = 0  # tokens whose KV is computed or in flight
    slot: int = -1  # -1 while waiting
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    named: int = 0  # blocks that the pool knows by their hash
    awaited: int = 0  # sampled tokens still in flight
    last_step: int = 0  # the newest that it is in

    @property
    def unscheduled(self) -> int:
        """Tokens, known or in flight, whose KV is still to be computed."""
        return len(self.tokens) + self.awaited - self.scheduled

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class Load:
    """What a router and an operator want to know of a replica."""

    waiting: int
    running: int
    free_blocks: int
    preemptions: int
    prefix_hit_tokens: int  # found on the device
    host_queried_tokens: int = 0  # not found there
    host_hit_tokens: int = 0  # of them, brought back from host memory
    host_saved_blocks: int = 0
    host_loaded_blocks: int = 0


class Scheduler:
    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.host = HostPool(config.host_blocks)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by arrival
        self._sequences: dict[str, Sequence] = {}
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._in_flight: dict[int, list[Sequence]] = {}  # step id -> the sequences that sample in it, by row
        self._arrivals = self._steps = 0
        self._preemptions = self._prefix_hit_tokens = self._host_queried_tokens = 0

    # -- what comes in --

    def add(self, request: Request) -> None:
        """Queue a request. Raises BadRequest if it can never run, naming the limit."""
        prompt = len(request.prompt_token_ids)
        if request.id in self._sequences:
            raise BadRequest(f"request id {request.id!r} is already in use")
        check_length(prompt, request.sampling.max_tokens, self.config)
        self._arrivals += 1
        end = min(prompt + request.sampling.max_tokens, self.config.max_model_len)
        tokens = request.prompt_token_ids + request.output_token_ids
        needs_past = request.sampling.needs_past or request.grammar is not None
        sequence = Sequence(request, self._arrivals, tokens, end, needs_past)
        self._sequences[request.id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Drop a request, wherever it is; unknown ids (already finished) are fine."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._forget(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def load(self) -> Load:
        return Load(
            len(self.waiting),
            len(self.running),
            self.pool.free_blocks,
            self._preemptions,
            self._prefix_hit_tokens,
            self._host_queried_tokens,
            self.host.loaded * self.config.block_size,
            self.host.saved,
            self.host.loaded,
        )

    # -- a step --

    def schedule(self) -> Step | None:
        """The next batch under the token budget: decodes, prompts under way, new ones. None: nothing can run."""
        rows: list[Row] = []
        sampling: list[Sequence] = []
        self._steps += 1
        budget = self.config.max_num_batched_tokens
        preemptions = self._preemptions
        for sequence in self._ready_to_decode():
            if budget and sequence.slot >= 0 and self._grow(sequence):
                rows.append(self._advance(sequence, 1, sampling))
                budget -= 1
        for sequence in self._prompts_under_way():
            if budget:
                count = min(budget, sequence.unscheduled)
                rows.append(self._advance(sequence, count, sampling))
                budget -= count
        admits: list[Admit] = []
        coming: list[
            Sequence
        ] = []  # their blocks are on the way while this step computes: they begin with the next
        while budget and self._preemptions == preemptions and self._can_admit():
            sequence, loads = self._admit()
            admits.append(_describe(sequence, loads))
            if loads:
                coming.append(sequence)
                continue
            count = min(budget, sequence.unscheduled)
            rows.append(self._advance(sequence, count, sampling))
            budget -= count
        if coming and not rows:  # nothing else to do meanwhile
            rows.append(self._advance(coming[0], min(budget, coming[0].unscheduled), sampling))
        if not rows:
            self._steps -= 1
            return None
        self._save_ahead()
        self._in_flight[self._steps] = sampling
        return Step(self._steps, admits, rows, self.host.end_step())

    def sampling_ids(self, step: Step) -> list[str]:
        """Whose the rows of a step under way are that sample, in their order."""
        return [sequence.request.id for sequence in self._in_flight[step.id]]

    def update(self, result: StepResult) -> list[Token]:
        """Take in a step's sampled tokens; what they finish is freed. Tokens of aborted requests are dropped."""
        sequences = self._in_flight.pop(result.id)
        logprobs = result.logprobs or [None] * len(sequences)
        out = []
        for sequence, token_id, logprob in zip(sequences, result.token_ids, logprobs, strict=True):
            sequence.awaited -= 1
            if self._sequences.get(sequence.request.id) is not sequence:
                continue
            if token_id == NOT_FINITE:
                self.pool.forget(sequence.blocks)  # their numbers may be as bad, whoever asks for that prefix
                self.host.forget(sequence.hashes)
                reason: FinishReason | None = FinishReason.ABORT
            else:
                sequence.tokens.append(token_id)
                reason = self._finish_reason(sequence, token_id)
            out.append(Token(sequence.request.id, token_id, reason, logprob))
            if reason is not None:
                self._forget(sequence)
        return out

    # -- inside --

    def _ready_to_decode(self) -> list[Sequence]:
        """Sequences with one token to compute, oldest first: a pipeline group's fair share of them."""
        ready = [s for s in self.running if s.unscheduled == 1 and (not s.awaited or self._may_run_ahead(s))]
        if self.config.groups == 1:
            return ready
        # A token that is still in the pipeline would keep the whole step waiting for it: better others, if there are.
        through = [s for s in ready if not s.awaited or self._steps - s.last_step >= self.config.groups]
        if through or self._has_prompts():
            ready = through
        ready.sort(key=lambda s: s.last_step)
        # By arrival again: making room for one takes blocks from those that come after it.
        return sorted(ready[: -(-len(self.running) // self.config.groups)], key=lambda s: s.arrival)

    def _has_prompts(self) -> bool:
        return self._can_admit() or any(True for _ in self._prompts_under_way())

    def _may_run_ahead(self, sequence: Sequence) -> bool:
        """One step beyond the unknown token, and never where penalties must see that token first."""
        return (
            self.config.run_ahead
            and sequence.awaited == 1
            and len(sequence.tokens) + 1 < sequence.end
            and not sequence.needs_past
        )

    def _prompts_under_way(self) -> Iterator[Sequence]:
        return (s for s in self.running if s.unscheduled > 1)

    def _advance(self, sequence: Sequence, count: int, sampling: list[Sequence]) -> Row:
        """Count the row's tokens as scheduled. Full blocks get their names here: a later step finds them computed."""
        start, table = sequence.scheduled, sequence.blocks
        sequence.scheduled += count
        sequence.last_step = self._steps
        samples = not sequence.unscheduled
        if samples:
            sequence.awaited += 1
            sampling.append(sequence)
        self._name_full_blocks(sequence)
        is_decode = count == 1 and samples and start >= len(sequence.request.prompt_token_ids)
        newest = sequence.tokens[start] if is_decode and start < len(sequence.tokens) else -1
        grown = table[-1] if is_decode and start % self.config.block_size == 0 else -1
        return Row(sequence.slot, start, count, samples, newest, grown)

    def _name_full_blocks(self, sequence: Sequence) -> None:
        if not self.config.prefix_caching:
            return
        full = min(sequence.scheduled, len(sequence.tokens)) // self.config.block_size
        if full > sequence.named:
            sequence.hashes = block_hashes(sequence.tokens, self.config.block_size, sequence.hashes)
            for i in range(sequence.named, full):
                self.pool.name(sequence.blocks[i], sequence.hashes[i])
            sequence.named = full

    def _can_admit(self) -> bool:
        if not self.waiting or not self._free_slots:
            return False
        sequence = self.waiting[0]
        if sequence.awaited:  # preempted in flight: its newest token is not known yet
            return False
        found = [block for block in self._prefix_hits(sequence) if block is not None]
        needed = self._blocks_for(len(sequence.tokens)) - len(found)
        return needed + self.pool.count_free(found) <= self.pool.free_blocks

    def _admit(self) -> tuple[Sequence, list[Move]]:
        """Move the first waiting sequence to a slot, with blocks for all its tokens: known prefixes are shared.

        Also what of them comes from host memory.
        """
        sequence = self.waiting.popleft()
        hits = self._prefix_hits(sequence)
        absent = [key for block, key in zip(hits, sequence.hashes, strict=False) if block is None]
        self.host.hold(absent)  # before blocks are taken, whose prefixes want room there
        found = [block for block in hits if block is not None]
        self.pool.hold(found)
        blocks = [self._take() if block is None else block for block in hits]
        blocks += [self._take() for _ in range(self._blocks_for(len(sequence.tokens)) - len(hits))]
        loads = []
        for block, known, key in zip(blocks, hits, sequence.hashes, strict=False):
            if known is None:
                loads.append(self.host.load(key, block))
                self.pool.name(block, key)
        sequence.blocks = blocks
        sequence.scheduled = len(hits) * self.config.block_size
        sequence.named = len(hits)
        sequence.slot = self._free_slots.pop()
        on_device = len(found) * self.config.block_size
        self._prefix_hit_tokens += on_device
        self._host_queried_tokens += len(sequence.tokens) - on_device
        position = next(
            (i for i, s in enumerate(self.running) if s.arrival > sequence.arrival), len(self.running)
        )
        self.running.insert(position, sequence)
        return sequence, loads

    def _prefix_hits(self, sequence: Sequence) -> list[int | None]:
        """Blocks already computed, None for one that host memory has; never all of the tokens, since the last one's
        logits are wanted."""
        if not self.config.prefix_caching:
            return []
        size = self.config.block_size
        sequence.hashes = block_hashes(sequence.tokens, size, sequence.hashes)
        return self.pool.match(sequence.hashes[: (len(sequence.tokens) - 1) // size], self.host)

    def _take(self) -> int:
        """A free block of the device; what it held goes to host memory."""
        block, key = self.pool.take()
        if key is not None:
            self.host.save(block, key)
        return block

    def _save_ahead(self) -> None:
        """Of the free blocks that are taken next: they are in host memory by then."""
        left = SAVED_AHEAD
        # Of a small pool no more than half: else these would push each other out, step after step.
        for block, key in self.pool.next_taken(min(LOOKED_AHEAD, self.host.num_blocks // 2)):
            if left and key not in self.host:
                left -= self.host.save(block, key)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for one more token; the youngest sequences give up their blocks for it, itself at the last."""
        if self._blocks_for(sequence.scheduled + 1) <= len(sequence.blocks):
            return True
        while not self.pool.free_blocks:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks.append(self._take())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue: its KV will be found by its prefix, on the device or in host memory, or be
        computed again."""
        self._preemptions += 1
        self._leave_slot(sequence)
        self.waiting.appendleft(sequence)

    def _leave_slot(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        self._free_slots.append(sequence.slot)
        sequence.blocks, sequence.scheduled, sequence.named, sequence.slot = [], 0, 0, -1

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.id]
        if sequence.slot >= 0:
            self._leave_slot(sequence)
        else:
            self.waiting.remove(sequence)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        request = sequence.request
        if token_id in request.stop_ids and sequence.output_tokens >= request.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(sequence.tokens) >= sequence.end else None


def check_length(prompt_tokens: int, max_tokens: int, config: SchedulerConfig) -> None:
    """Raises BadRequest where a request can never run, with the limit that it breaks."""
    check_context(prompt_tokens, config.max_model_len)
    longest = min(prompt_tokens + max_tokens, config.max_model_len)
    capacity = config.num_blocks * config.block_size
    if longest > capacity:
        raise BadRequest(
            f"{prompt_tokens} prompt tokens and max_tokens {max_tokens} need {longest} KV tokens; {capacity} fit. "
            "Lower max_tokens or give the KV cache more memory"
        )


def _describe(sequence: Sequence, loads: list[Move]) -> Admit:
    request = sequence.request
    return Admit(
        sequence.slot,
        list(sequence.tokens),
        len(request.prompt_token_ids),
        list(sequence.blocks),
        request.sampling,
        sorted(request.stop_ids),
        loads,
    )
