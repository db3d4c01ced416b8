"""Workers that tests host. The module imports no more than a worker needs: each process of a gang imports it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch

from orchestrator.engine.runner import Pending
from orchestrator.scheduler import SchedulerConfig
from orchestrator.step import Step
from orchestrator.worker import Worker
from strategies.host_kv import HostRoom


class ReusedWorker(Worker):
    """A worker that can serve one deployment after another, and remembers its logits: importing torch takes seconds."""

    def allocate(self, limits: SchedulerConfig) -> None:
        super().allocate(limits)
        self.seen: dict[tuple[int, ...], bytes] = {}
        forward = self.runner.forward

        def remembering(step: Step) -> torch.Tensor | None:
            logits = forward(step)
            sampling = [row for row in step.rows if row.samples]
            if logits is not None and self.shard.tp_rank == 0:
                for row, values in zip(sampling, logits, strict=True):
                    told = tuple(self.runner.slots.history(row.slot).token_ids)
                    self.seen[told] = values.float().numpy().tobytes()
            return logits

        self.runner.forward = remembering  # type: ignore[method-assign]

    def host_room(self) -> HostRoom:
        """What tests keep in host memory comes back, however little there is to compute again."""
        return replace(super().host_room(), flops_per_s=None)

    def seen_logits(self) -> dict[tuple[int, ...], bytes]:
        """float32: of SmolLM2 they are millions, and lists of them take seconds to send."""
        return self.seen

    def start_afresh(self) -> None:
        self.collectives.leave()
        self.__init__()  # type: ignore[misc]


class FrailWorker(Worker):
    """Writes where it is to its standard error; rank 1 raises at a prompt that holds FATAL_TOKEN."""

    FATAL_TOKEN = 130

    def allocate(self, limits: SchedulerConfig) -> None:
        super().allocate(limits)
        print(f"rank {self.shard.rank} is ready", file=sys.stderr, flush=True)
        run = self.runner.run

        def fragile(step: Step) -> Pending | None:
            if self.shard.rank == 1 and any(self.FATAL_TOKEN in a.token_ids for a in step.admits):
                raise IndexError(f"no row {self.FATAL_TOKEN}")
            return run(step)

        self.runner.run = fragile  # type: ignore[method-assign]


class PoisonedWorker(Worker):
    """Dies, each in its way, of prompts that hold one of these."""

    EXIT, MEMORY = 127, 128

    def allocate(self, limits: SchedulerConfig) -> None:
        super().allocate(limits)
        run = self.runner.run

        def fragile(step: Step) -> Pending | None:
            seen = {token for admit in step.admits for token in admit.token_ids[: admit.prompt_tokens]}
            if self.EXIT in seen:
                os._exit(9)
            if self.MEMORY in seen:
                raise torch.OutOfMemoryError("tried to allocate 80 GiB")
            return run(step)

        self.runner.run = fragile  # type: ignore[method-assign]


class OverflowingWorker(Worker):
    """Its numbers are NaN from one token on."""

    NAN = 126

    def load(self) -> int:
        loaded = super().load()
        if self.shard.is_first and self.NAN in self.shard.vocab:
            self.model.embed.weight.data[self.NAN - self.shard.vocab.start] = torch.nan
        return loaded
