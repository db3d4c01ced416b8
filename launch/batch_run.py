"""A batch in this process, without a server: `shardwise batch run`. Killed and run again, it goes on."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.files import read_back
from launch.batch import check_output, errors_path, told_of
from launch.batch_input import Source, endpoint_of, is_batch_file, write_lines

if TYPE_CHECKING:
    from launch.options import EngineOptions
    from launch.progress import Progress
    from launch.start import Deployment
    from orchestrator.jobs import Examined
    from orchestrator.text import Text

LOOK_S = 0.25  # between two looks at how far it is


def run_here(args: argparse.Namespace, source: Source) -> int:
    from launch.options import check_blocks, engine_options, layout

    check_output(args.output)
    endpoint = endpoint_of(source)
    dims, options = layout(args), engine_options(args)
    check_blocks(options)
    from launch.generation_config import read as read_generation
    from launch.predict import planned  # torch: after what can be refused without
    from launch.progress import Progress
    from launch.serve import conditions_of
    from launch.start import cluster, deployment
    from orchestrator.jobs import check_same, examine
    from orchestrator.journal import ERRORS, MANIFEST, OUTPUT, write_durably
    from orchestrator.text import text_of
    from strategies.spec import Objective, Workload

    generation = read_generation(options.source)
    options = replace(options, spec=generation.applied(options.spec), grammars=True)
    directory: Path = args.job_dir or args.output.with_suffix(".job")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--job-dir {directory}: {error.strerror}; give a directory that can be written"
        ) from None
    path = source.path
    if not is_batch_file(source):
        path = directory / "input.jsonl"
        write_lines(source, path)
    progress = Progress()
    examined = examine(path)
    conditions = {**conditions_of(options), "input": examined.sha256}
    if (directory / MANIFEST).is_file():
        check_same(_begun_with(directory / MANIFEST), conditions)
    write_durably(directory / MANIFEST, conditions)
    text = text_of(options.source)
    workload = Workload(
        min(512, options.most_context // 2), min(256, options.most_context // 2), 256, Objective.THROUGHPUT
    )
    candidate = planned(options, workload, dims, progress).candidate
    with (
        cluster(options, candidate.dims.world_size, progress) as found,
        deployment(found, candidate.dims, options, progress, shards=candidate.shards) as served,
    ):
        answering = _answer(
            path, endpoint, examined, directory, served, options, generation.sampling, text, progress
        )
        counts = asyncio.run(answering)
    for name, to in ((OUTPUT, args.output), (ERRORS, errors_path(args.output))):
        if name == OUTPUT or counts["failed"]:
            shutil.copyfile(directory / name, to)
    progress.say(told_of(counts, args.output))
    return 0


def _begun_with(manifest: Path) -> dict[str, Any]:
    """Raises UserError where that cannot be told any more: its answers may be of another model."""
    found = read_back(manifest, dict[str, Any])
    if found is None:
        raise UserError(
            f"{manifest} cannot be read, and what the answers beside it are of is not known without it; "
            "remove that directory, or give another --job-dir"
        )
    return found


async def _answer(
    path: Path,
    endpoint: str,
    examined: Examined,
    directory: Path,
    served: Deployment,
    options: EngineOptions,
    defaults: Mapping[str, Any],
    text: Text | None,
    progress: Progress,
) -> dict[str, int]:
    from launch.api.batches import answerer
    from launch.api.metrics import Facts
    from launch.api.service import Service
    from launch.configured import layout_name
    from orchestrator.jobs import Job
    from orchestrator.journal import Journal
    from orchestrator.supervisor import DEFAULT_POLICY

    journal, name = Journal(directory), layout_name(options, served.dims)
    begun_s, before = time.perf_counter(), journal.completed + journal.failed
    if before:
        progress.say(f"{before} of {examined.lines} requests were answered before")
    async with served.coordinator(options, text, restarts=DEFAULT_POLICY) as coordinator:
        facts = Facts(options.source.name, name, served.dims.world_size, {})
        service = Service(coordinator, [options.source.name], {}, facts, defaults=defaults)
        window = 2 * served.limits.max_num_seqs * served.dims.dp
        job = Job(path, examined, journal, answerer(service, endpoint, ""), window=window)
        running = asyncio.create_task(job.run())
        try:
            with progress.bar(f"{name}: answering", unit_is_bytes=False) as bar:
                while not (await asyncio.wait({running}, timeout=LOOK_S))[0]:
                    bar.update(journal.completed + journal.failed, examined.lines)
            running.result()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await journal.close()
    seconds = time.perf_counter() - begun_s
    tokens = coordinator.meter.generated_tokens
    progress.say(f"{name}: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s")
    return {"completed": journal.completed, "failed": journal.failed}
