"""Captioning on Ray Data: numbers of samples go to workers, rows come back into one log."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pixart_jax.captioning.log import CaptionLog, open_log
from pixart_jax.captioning.model import VisionLanguageModel, check_engines, identity
from pixart_jax.captioning.worker import CaptionOptions, CaptionWorker
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import Source
from pixart_jax.encoding.options import SourceSpec
from pixart_jax.errors import UserError

WAVE = 2048
"""Batches per worker in one Ray Data pipeline: it holds its plan in memory, so a large set takes
several pipelines, one after the other."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where workers run."""

    batch_size: int = 32
    """Pictures that a worker captions at once."""
    workers: int = 0
    """Copies of the model; 0 is one per GPU, or one where there is none."""
    gpus_per_worker: float | None = None
    """0 runs on the CPU; 0.5 puts two workers on a GPU. By default 1 where Ray sees a GPU, else
    0."""
    ray_address: str | None = None
    """'auto' or HOST:PORT of a Ray cluster that runs already; by default Ray is started on this
    machine, and stopped at the end."""

    def __post_init__(self):
        if self.workers < 0:
            raise UserError(f"workers {self.workers}: 0 (one a GPU) or more")
        if self.batch_size < 1:
            raise UserError(f"batch size {self.batch_size}: at least 1")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise UserError(f"GPUs per worker {self.gpus_per_worker}: 0 or more")


def run(
    source: Source,
    spec: SourceSpec,
    file: Path,
    options: CaptionOptions,
    cluster: Cluster,
    *,
    kind: str = "dense",
    faults: BadRecords | None = None,
) -> dict:
    """Caption every sample of ``source`` that ``file`` does not hold yet; return the manifest.

    spec: how a worker opens the same source. faults: collects what is skipped; where it is strict,
    the first one stops the run, and what was captioned before it stays. The same call resumes.
    """
    faults = BadRecords() if faults is None else faults  # an empty one is false
    given = dataclasses.asdict(options)
    if options.variant is None:
        del given["variant"]  # files without this option go on
    made = {name: str(value) for name, value in given.items()}
    made |= {"source": spec.source, "split": spec.split, "where": str(spec.where), "kind": kind}
    made["model files"] = identity(options.model, options.variant)
    with open_log(file, made, source) as log:
        if log.manifest is not None:
            return log.manifest
        began = time.monotonic()
        if not log.done.all():
            worker = {
                "spec": spec,
                "options": options,
                "folder": os.getcwd(),
                "fingerprint": source.fingerprint,
                "open_model": VisionLanguageModel,
            }
            _caption(log, worker, cluster, faults)
        facts = _facts(log, faults)
        faults.write(faults_file(file))
        facts["seconds of the last run"] = round(time.monotonic() - began, 1)
        return log.finalize(lambda row: _public(row, options.model, kind), facts)


def faults_file(captions: Path) -> Path:
    """NAME.faults.jsonl beside NAME.jsonl: what was left out or mended, by name."""
    return captions.with_name(f"{captions.stem}.faults.jsonl")


def _caption(log: CaptionLog, worker: dict, cluster: Cluster, faults: BadRecords) -> None:
    """Write the rows of all samples that the log does not have yet."""
    failed = collections.Counter[str]()
    start = int(log.done.sum())
    with tqdm(total=len(log.done), initial=start, unit=" captions", desc="captioning") as bar:
        for batch in ray_batches(np.flatnonzero(~log.done), worker, cluster):
            rows = [json.loads(row) for row in batch["row"]]
            if "error" in rows[0]:
                raise UserError(rows[0]["error"])
            log.append([row for row in rows if not faults.strict or "left_out" not in row])
            for row in rows if faults.strict else ():
                for noticed in row.get("noticed", ()):
                    faults.add(*noticed)
                if "left_out" in row:
                    name = row["key"] or f"sample {row['index']}"
                    faults.add(f"{worker['spec'].source}, {name}", *row["left_out"])
            failed.update(name for row in rows for name in row.get("guards", ()))
            bar.set_postfix(dict(failed.most_common()), refresh=False)
            bar.update(len(rows))
    if left := int((~log.done).sum()):
        raise UserError(
            f"{left} samples came back from no worker; the same command goes on with them"
        )


def ray_batches(
    pending: np.ndarray, worker: dict[str, Any], cluster: Cluster
) -> Iterator[dict[str, np.ndarray]]:
    """Yield what a CaptionWorker returns for each batch of ``pending``, in any order.

    worker: arguments of CaptionWorker.
    """
    with _ray(cluster) as (workers, gpus):
        import ray

        # Ray would give a worker on a CPU one thread
        threads = None if gpus else max(1, (os.cpu_count() or 1) // workers)
        wave = WAVE * workers * cluster.batch_size
        for first in range(0, len(pending), wave):
            part = pending[first : first + wave]
            blocks = np.split(part, range(cluster.batch_size, len(part), cluster.batch_size))
            rows = ray.data.from_numpy(blocks).map_batches(
                CaptionWorker,
                fn_constructor_kwargs={**worker, "threads": threads},
                batch_size=cluster.batch_size,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks))),
                num_gpus=gpus or None,
                num_cpus=1,
            )
            yield from rows.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy")


@contextlib.contextmanager
def _ray(cluster: Cluster) -> Iterator[tuple[int, float]]:
    """Start or join Ray for the block; yield (workers, GPUs per worker). A Ray that this process
    has started before is used and left running."""
    check_engines()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # the C++ side warns of normal operation of Ray Data
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    ours, address = not ray.is_initialized(), cluster.ray_address
    if ours:
        where = address or "this machine"
        print("starting Ray on", where, file=sys.stderr, flush=True)
        start: dict[str, Any] = {"address": address or "local"}
        if address is None:
            start["num_cpus"] = max(cluster.workers, os.cpu_count() or 1)
            start |= {"include_dashboard": False, "object_store_memory": 128 * 2**20}
        try:
            ray.init(**start, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"Ray does not start on {where}: {reason}") from None
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        need = cluster.gpus_per_worker
        need = float(gpus >= 1) if need is None else need
        if need > gpus:
            raise UserError(
                f"--gpus-per-worker {need:g}: Ray sees {gpus:g} GPUs; 0 runs on the CPU"
            )
        workers = cluster.workers or (max(1, int(gpus / need)) if need else 1)
        if workers * need > gpus:
            raise UserError(f"--workers {workers} with {need:g} GPUs each: Ray sees {gpus:g} GPUs")
        yield workers, need
    finally:
        if ours:
            ray.shutdown()


def _public(row: dict, model: str, kind: str) -> dict:
    """A row of the caption file."""
    shown = {"key": row["key"], "caption": row["caption"], "kind": kind, "model": model}
    shown |= {name: row[name] for name in ("prompt", "tokens", "finish")}
    if row.get("attempts", 1) > 1:  # a row of an earlier file may lack both
        shown["attempts"] = row["attempts"]
    return shown | ({"guards": row["guards"]} if row.get("guards") else {})


def _facts(log: CaptionLog, faults: BadRecords) -> dict:
    """The counts of the manifest, over all runs of this file."""
    failed, skipped = collections.Counter[str](), collections.Counter[str]()
    captions = tokens = mended = 0
    for row in log.rows():
        failed.update(row.get("guards", ()))
        # what a worker found in the source: a raw caption with control characters
        for noticed in row.get("noticed", ()):
            faults.add(*noticed)
        if "left_out" in row:
            skipped[row["left_out"][0]] += 1
            faults.add(row["key"] or f"sample {row['index']}", *row["left_out"])
        else:
            captions += 1
            tokens += row["tokens"]
            mended += bool(row.get("guards")) and row.get("attempts", 1) > 1
    return {
        "pictures": len(log.done),
        "captions": captions,
        "tokens": tokens,
        "guards": dict(failed.most_common()),
        "mended by another draw": mended,
        "left out": dict(skipped.most_common()),
    }
