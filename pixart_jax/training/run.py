"""What all stages of a run share, and what its loop does besides stepping: metrics, checkpoints,
sample grids, the ledger."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pixart_jax.config import Config, StageConfig
from pixart_jax.data.loader import Loader
from pixart_jax.data.samples import write_bucket_chart
from pixart_jax.errors import Notice
from pixart_jax.files import write_json
from pixart_jax.finite import NotFinite
from pixart_jax.images import image_grid, write_png
from pixart_jax.models.configs import DiTConfig, TransformerConfig
from pixart_jax.models.flops import PIXELS, train_flops
from pixart_jax.parallel.chips import chip_of
from pixart_jax.training import metrics
from pixart_jax.training.batches import Encode
from pixart_jax.training.checkpoint import Checkpointer, RunPosition
from pixart_jax.training.evaluation import Evaluator, OpenMetric
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.initialization import Trained
from pixart_jax.training.interruption import PreemptionHandler
from pixart_jax.training.ledger import EnergyMeter, ledger
from pixart_jax.training.metrics import Metrics, MetricWindow, RestartLog, StepTimer
from pixart_jax.training.stages import StageParts
from pixart_jax.training.state import TrainState
from pixart_jax.training.workdir import Workdir


@dataclasses.dataclass
class Run:
    """A run that resumes at ``position``. encode: see training.batches.Encode; open_metric: see
    training.evaluation."""

    config: Config
    folder: Workdir
    mesh: Mesh
    checkpoints: Checkpointer
    metrics: Metrics
    meter: EnergyMeter
    interruption: PreemptionHandler
    position: RunPosition
    encode: Encode | None
    open_metric: OpenMetric | None = None

    def __post_init__(self):
        self.frozen = self._frozen(self.config)
        self.cost, self.productive = dict(self.position.cost), self.position.productive
        self.device_kind = self.mesh.devices.flat[0].device_kind
        chip = chip_of(self.device_kind)
        # FLOP/s of all devices
        self.peak_flops = chip.peak_bf16_flops * self.mesh.size if chip else None
        # a finished run trains nothing, and its log stays as it is
        if self.position.total < sum(stage.steps for stage in self.config.stages):
            total, devices = self.position.total, self.mesh.size
            self.restarts = RestartLog(self.folder.path, total, devices, self.device_kind)
            self.folder.copy()

    def _frozen(self, config: Config) -> Frozen:
        bucket = self.folder.bucket
        return Frozen(config, self.folder.path, *([bucket.share] if bucket else []))

    def of(self, stage: StageConfig) -> tuple[Config, Frozen]:
        """The run as a stage sees it, and its frozen parts."""
        config = self.config.of(stage)
        same = (config.model, config.vae) == (self.config.model, self.config.vae)
        return config, self.frozen if same else self._frozen(config)

    def describe(self, index: int, loader: Loader, parts: StageParts) -> None:
        """Draw how many samples each bucket holds, and print the remat policy where it was chosen.
        Warn where the data is not that of the stage's first start."""
        name, samples = self.config.stages[index].name, loader.samples
        if jax.process_index():
            return
        file = self.folder.path / "data.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        if before.get(name, samples.fingerprint) != samples.fingerprint:
            warnings.warn(
                f"stage {name}: the files of its data have changed since it began: the remaining "
                "steps use them as they are now",
                Notice,
                stacklevel=2,
            )
        write_json(file, before | {name: samples.fingerprint}, indent=1)
        if len(samples.buckets) > 1:
            held = samples.bucket_of[samples.bucket_of >= 0]
            counts = np.bincount(held, minlength=len(samples.buckets)).tolist()
            file = self.folder.path / f"buckets-{name}.png"
            write_bucket_chart(file, dict(zip(samples.buckets, counts)), title=f"stage {name}")
        if parts.remat:
            print(f"stage {name}: {parts.remat}")

    def report(self, name: str, figures: dict[str, float]) -> None:
        """Figures of a conversion → NAME.json and a printed line."""
        if jax.process_index() == 0:
            write_json(self.folder.path / f"{name}.json", figures, indent=1)
            print(f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in figures.items())}")

    def finish(self, trained: Trained) -> None:
        """After the last stage: write the ledger, the loss curve and the model."""
        self.checkpoints.wait()
        folder, first = self.folder.path, jax.process_index() == 0
        if first:
            hardware, source = self.config.hardware, self.meter.source
            account = ledger(self.cost, self.mesh.size, self.device_kind, hardware, source)
            write_json(folder / "ledger.json", account, indent=1)
            metrics.write_loss_curve(folder / "loss.png", metrics.read(folder / "metrics.jsonl"))
        adapter = self.config.stages[-1].is_adapter
        made = self.folder.adapter if adapter else self.folder.model
        trained.task.export(trained.params, made, trained.loader.global_batch)
        where = self.folder.bucket.publish(made) if self.folder.bucket else made
        if first:
            print(metrics.summary(folder))
            print(f"done: {where}")


class StageHooks:
    """What the loop calls in stage ``index`` of a run. Steps are the stage's, counted from 1."""

    def __init__(
        self,
        run: Run,
        index: int,
        parts: StageParts,
        loader: Loader,
        evaluators: Mapping[str, Evaluator] | None = None,
    ):
        self.run, self.index, self.loader = run, index, loader
        self.task, self.base = parts.task, parts.base
        self.evaluators = evaluators or {}
        self.stage = run.config.stages[index]
        self.done = sum(stage.steps for stage in run.config.stages[:index])
        self.timer = StepTimer(self.stage.batch_size, run.productive, run.peak_flops)
        self._since, self._joules = time.perf_counter(), run.meter.joules or 0.0

    def should_save(self, step: int) -> bool:
        """Whether a checkpoint is due."""
        # an error of the last checkpoint is raised here, at the first step after its write
        self.run.checkpoints.check()
        if self.run.folder.bucket:
            self.run.folder.bucket.check()
        config, total = self.run.config, self.done + step
        always = config.keep_every is not None and total % config.keep_every == 0
        return step % config.checkpoint_every == 0 or always

    def save(self, step: int, state: TrainState, window: MetricWindow, ended: bool = False) -> None:
        """Write a checkpoint, with the cost of the stage until here. ended: the stage, early."""
        run, total, stage = self.run, self.done + step, self.stage
        now, joules = time.perf_counter(), run.meter.joules or 0.0
        old = run.cost.get(stage.name, {"seconds": 0.0, "joules": 0.0})
        run.cost[stage.name] = {
            "seconds": old["seconds"] + now - self._since,
            "joules": old["joules"] + joules - self._joules,
            "steps": step,
            "images": step * stage.batch_size,
        }
        self._since, self._joules = now, joules
        run.productive = self.timer.productive
        position = RunPosition(
            self.index,
            step,
            total,
            cost=dict(run.cost),
            window=dataclasses.asdict(window),
            loader=self.loader.state_at(step),
            productive=run.productive,
            ended=ended,
        )
        run.checkpoints.save(position, state)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write a line of metrics."""
        run = self.run
        goodput = run.restarts.goodput(self.timer.productive)
        more = {"goodput": goodput, "restarts": run.restarts.restarts}
        values = {**values, **more, **metrics.device_memory(run.mesh.devices.flat)}
        run.metrics.write(self.stage.name, step, self.done + step, values)

    def should_evaluate(self, step: int) -> bool:
        """Whether an evaluation is due: at the config's interval and at the stage's end."""
        every = self.stage.evaluate.every
        return bool(every) and (step % every == 0 or step == self.stage.steps)

    def evaluate(self, step: int, state: TrainState) -> bool:
        """Write a line of the evaluators' metrics; whether the stage ends for the first of them."""
        values: dict[str, float] = {}
        options = self.stage.evaluate
        for name in options.metrics:
            try:
                values |= {f"evaluate/{k}": v for k, v in self.evaluators[name](state).items()}
            except NotFinite as error:
                warnings.warn(f"no {name} of step {step}: {error}", Notice, stacklevel=1)
        self.run.metrics.write(self.stage.name, step, self.done + step, values)
        first, limit = values.get(f"evaluate/{options.metrics[0]}"), options.stop_below
        ended = limit is not None and first is not None and first < limit
        if jax.process_count() > 1:
            ended = bool(multihost_utils.broadcast_one_to_all(np.int32(ended)))
        if ended and jax.process_index() == 0:
            print(f"stage {self.stage.name} ends at step {step}: {first:.4g} is below {limit:g}")
        return ended

    def on_bad_step(self, step: int, values: dict[str, float]) -> list[str]:
        """Record a skipped step; returns the keys of its batch's records."""
        keys = record_keys(self.loader, step - 1)
        self.run.metrics.bad_step(self.stage.name, step, self.done + step, values, keys)
        return keys

    def grid(self, step: int) -> Path:
        """The file of a step's sample grid."""
        return self.run.folder.samples / f"{self.stage.name}-{step:07d}.png"

    def preview(self, step: int, state: TrainState) -> None:
        """Sample grid → samples/STAGE-STEP.png and TensorBoard."""
        batch, name = self.loader.global_batch(0, rows=8), self.stage.name
        try:
            settings = self.run.config.preview
            images, captions = self.task.preview(state.average, batch, settings, self.base)
        except NotFinite as error:
            warnings.warn(f"no preview of step {step}: {error}", Notice, stacklevel=1)
            return
        if len(images) and jax.process_index() == 0:
            sheet = image_grid(images, captions)
            write_png(self.grid(step), sheet, {"stage": name, "step": step})
            self.run.metrics.image(f"{name}/samples", sheet, self.done + step)

    def flops(self, batch: dict) -> float:
        """FLOPs of a train step on the whole batch, of which this process has the rows ``batch``; 0
        for a task whose model is not counted."""
        model = self.task.module.config
        if not isinstance(model, TransformerConfig | DiTConfig):
            return 0.0
        height, width = (side * PIXELS for side in batch["mean"].shape[1:3])
        tokens = batch["text_states"].shape[1] if "text_states" in batch else 0
        images = self.stage.batch_size * (2 if "class_mean" in batch else 1)
        how: dict[str, Any] = {
            "frozen": self.stage.is_adapter,
            "others": self.stage.unlearned_evaluations,
            "copies": getattr(self.task.module, "units", 0),
        }
        return images * train_flops(model, height, width, tokens, **how)


def record_keys(loader: Loader, step: int, rows: int = 64) -> list[str]:
    """Names of the records in the global batch of a step (counted from 0), whichever process reads
    them; a few rows at a time."""
    batch, samples = loader.plan.batch(step), loader.samples
    keys: list[str] = []
    for at in range(0, len(batch.indices), rows):
        some = slice(at, at + rows)
        part = samples.read(batch.indices[some], batch.bucket, batch.draws[some])
        keys += [str(key) for key in part["key"]]
    return keys
