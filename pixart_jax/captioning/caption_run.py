"""Captioning as a Ray Data pipeline: numbers of samples go out to workers, rows come back into one
journal."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pixart_jax.captioning import vision_language
from pixart_jax.captioning.caption import CaptionOptions, CaptionWorker, SourceSpec
from pixart_jax.captioning.caption_files import CaptionLog, read_manifest
from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import UserError

WAVE = 2048
"""Batches a worker in one Ray Data pipeline: what a pipeline plans lies in memory, so a large set
takes several, one after the other."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where workers run. address: None is this machine alone, 'auto' or HOST:PORT a Ray cluster
    that runs already. workers: 0 is one a GPU, or one where there is none. gpus_per_worker: None is
    1 where the cluster has any, else 0."""

    address: str | None = None
    workers: int = 0
    gpus_per_worker: float | None = None
    batch_size: int = 32

    def __post_init__(self):
        if self.workers < 0:
            raise UserError(f"workers {self.workers}: 0 (one a GPU) or more")
        if self.batch_size < 1:
            raise UserError(f"batch size {self.batch_size}: at least 1")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise UserError(f"GPUs per worker {self.gpus_per_worker}: 0 or more")


def run(
    source,
    opening: SourceSpec,
    file: Path,
    options: CaptionOptions,
    cluster: Cluster,
    *,
    kind: str = "dense",
    faults: BadRecords | None = None,
    open_model: Callable = vision_language.VisionLanguageModel,
) -> dict:
    """Caption every sample of ``source`` that ``file`` does not have yet; returns the manifest's
    facts.

    opening: how a worker opens the same source. faults: collects what is left out; strict, the
    first stops the run, and what was captioned before it stays. Killed at any moment, the same call
    goes on. open_model: for tests.
    """
    faults = BadRecords() if faults is None else faults  # an empty one is false
    made = {key: str(value) for key, value in dataclasses.asdict(options).items()}
    made |= {
        "source": opening.source,
        "split": opening.split,
        "where": str(opening.where),
        "kind": kind,
    }
    if open_model is vision_language.VisionLanguageModel:
        made["model files"] = vision_language.identity(options.model)
    journal = CaptionLog(file, made, len(source), source.fingerprint, lambda: _numbers(source))
    with journal:
        if journal.finished:
            return read_manifest(journal.manifest)
        pending, began = np.flatnonzero(~journal.done), time.monotonic()
        if len(pending):
            with _ray(cluster) as workers:
                _caption(journal, pending, opening, options, cluster, workers, faults, open_model)
        facts = _facts(journal, faults)
        facts["seconds of the last run"] = round(time.monotonic() - began, 1)
        journal.finalize(lambda row: _public(row, options.model, kind), facts)
        return read_manifest(journal.manifest)


def _caption(
    journal: CaptionLog,
    pending,
    opening,
    options,
    cluster,
    workers: int,
    faults: BadRecords,
    open_model,
) -> None:
    from tqdm import tqdm

    total, started = len(journal.done), int(journal.done.sum())
    against: collections.Counter[str] = collections.Counter()
    with tqdm(
        total=total,
        initial=started,
        unit=" captions",
        desc="captioning",
        smoothing=0.1,
        dynamic_ncols=True,
    ) as bar:
        for rows in _waves(pending, opening, options, cluster, workers, open_model):
            journal.append([row for row in rows if not faults.strict or "left_out" not in row])
            for row in rows if faults.strict else ():
                for noticed in row.get("noticed", ()):
                    faults.add(*noticed)
                if "left_out" in row:
                    faults.add(_place(opening, row), *row["left_out"])
            against.update(name for row in rows for name in row.get("guards", ()))
            bar.set_postfix({name: count for name, count in against.most_common()}, refresh=False)
            bar.update(len(rows))
    left = int((~journal.done).sum())
    if left:
        raise UserError(
            f"{left} samples came back from no worker; the same command goes on with them"
        )


def _waves(
    pending: np.ndarray, opening, options, cluster: Cluster, workers: int, open_model
) -> Iterator[list[dict]]:
    """Lists of rows as they come back, in any order."""
    import json

    import ray

    most = WAVE * workers * cluster.batch_size
    for wave in (pending[start : start + most] for start in range(0, len(pending), most)):
        blocks = [
            wave[start : start + cluster.batch_size]
            for start in range(0, len(wave), cluster.batch_size)
        ]
        gpus = _gpus_per_worker(cluster)
        rows = ray.data.from_numpy(blocks).map_batches(
            CaptionWorker,
            fn_constructor_kwargs={
                "opening": opening,
                "options": options,
                "threads": _threads(workers, gpus),
                "open_model": open_model,
            },
            batch_size=cluster.batch_size,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks))),
            num_gpus=gpus or None,
            num_cpus=1,
        )
        for batch in rows.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            found = [json.loads(row) for row in batch["row"]]
            for row in found:
                if "error" in row:
                    raise UserError(row["error"])
            yield found


@contextlib.contextmanager
def _ray(cluster: Cluster) -> Iterator[int]:
    """A Ray to run on, for as long as the block; yields the number of workers. One that runs in
    this process already is used and left."""
    vision_language.check_engines()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # the C++ side warns of what Ray Data does by itself
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    ours = not ray.is_initialized()
    if ours:
        print(
            "starting Ray",
            "on this machine" if cluster.address is None else f"({cluster.address})",
            file=sys.stderr,
            flush=True,
        )
        try:
            quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
            with _no_stderr():
                if cluster.address is None:
                    cores = max(cluster.workers, os.cpu_count() or 1)
                    ray.init(
                        address="local",
                        num_cpus=cores,
                        include_dashboard=False,
                        object_store_memory=128 * 2**20,
                        **quiet,
                    )
                else:
                    ray.init(address=cluster.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as fault:
            raise UserError(
                f"Ray does not start ({cluster.address or 'here'}): "
                f"{' '.join(str(fault).split())[:200]}"
            ) from None
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        need = _gpus_per_worker(cluster)
        if need > gpus:
            raise UserError(
                f"--gpus-per-worker {need:g}: Ray sees {gpus:g} GPUs; 0 runs on the CPU"
            )
        workers = cluster.workers or (max(1, int(gpus / need)) if need else 1)
        if need and workers * need > gpus:
            raise UserError(f"--workers {workers} with {need:g} GPUs each: Ray sees {gpus:g} GPUs")
        yield workers
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def _no_stderr():
    """Ray's C++ side greets on file descriptor 2; what goes wrong while it starts comes as an
    exception."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _gpus_per_worker(cluster: Cluster) -> float:
    import ray

    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    return 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0


def _threads(workers: int, gpus: float) -> int | None:
    """Of a worker on a CPU: its share of this machine's cores. (Ray would give it one.)"""
    return None if gpus else max(1, (os.cpu_count() or 1) // workers)


def _numbers(source) -> dict[str, int]:
    """Key → number, the first where a key stands twice; reads the whole source."""
    numbers: dict[str, int] = {}
    for number in range(len(source)):
        try:
            numbers.setdefault(source[number].key, number)
        except UserError:
            continue  # a record that cannot be read has no caption to keep
    return numbers


def _place(opening: SourceSpec, row: dict) -> str:
    return f"{opening.source}, {row['key'] or 'sample ' + str(row['index'])}"


def _public(row: dict, model: str, kind: str) -> dict:
    """A row of the caption file."""
    shown = {"key": row["key"], "caption": row["caption"], "kind": kind, "model": model}
    shown |= {name: row[name] for name in ("prompt", "tokens", "finish")}
    if row.get("attempts", 1) > 1:
        shown["attempts"] = row["attempts"]
    if row.get("guards"):
        shown["guards"] = row["guards"]
    return shown


def _facts(journal: CaptionLog, faults: BadRecords) -> dict:
    """What the summary counts, over all runs of this file: from the journal, so that an interrupted
    run counts once."""
    against: collections.Counter[str] = collections.Counter()
    left_out: collections.Counter[str] = collections.Counter()
    captions = tokens = mended = 0
    for row in journal.rows():
        against.update(row.get("guards", ()))
        # what a worker found in the source: a raw caption with control characters
        for noticed in row.get("noticed", ()):
            faults.add(*noticed)
        if "left_out" in row:
            left_out[row["left_out"][0]] += 1
            faults.add(row["key"] or f"sample {row['index']}", *row["left_out"])
        else:
            captions += 1
            tokens += row["tokens"]
            mended += bool(row.get("guards")) and row.get("attempts", 1) > 1
    return {
        "pictures": len(journal.done),
        "captions": captions,
        "tokens": tokens,
        "guards": dict(against.most_common()),
        "mended by another draw": mended,
        "left out": dict(left_out.most_common()),
    }
