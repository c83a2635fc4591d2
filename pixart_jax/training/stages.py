"""A run: the stages of a config one after the other, each from where the last one ended, with all
that is kept of it."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np

from pixart_jax.config import Config
from pixart_jax.data import bucket_chart
from pixart_jax.data.sources import parse_mixture, parse_source
from pixart_jax.errors import Interrupted, UserError
from pixart_jax.images import image_grid, write_png
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.flops import PIXELS, train_flops
from pixart_jax.models.transformer import TransformerConfig
from pixart_jax.parallel import liveness, rules
from pixart_jax.parallel.chips import chip_of
from pixart_jax.parallel.mesh import batch_shards, make_mesh
from pixart_jax.training import metrics as figures
from pixart_jax.training.abstract import StageParts, build_stage, compiled_step
from pixart_jax.training.attempts import RestartLog
from pixart_jax.training.batches import Encode, open_loader
from pixart_jax.training.checkpoint import Checkpointer, RunPosition
from pixart_jax.training.clock import StepTimer
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.initialization import initial_params
from pixart_jax.training.interruption import PreemptionHandler
from pixart_jax.training.ledger import PowerMeter, ledger
from pixart_jax.training.loop import LoopHooks, MetricWindow, train
from pixart_jax.training.mesh_fit import check_models
from pixart_jax.training.state import TrainState, fresh_params, state_from
from pixart_jax.training.summary import summary
from pixart_jax.training.tasks import Task
from pixart_jax.training.trace import StepProfiler
from pixart_jax.training.workdir import Workdir, enable_compilation_cache, write_atomic


@dataclasses.dataclass
class Stage:
    """A stage made ready: what it learns, from what, and how its state lies."""

    index: int
    task: Task
    loader: object
    optimizer: object
    abstract: TrainState


def run(config: Config, workdir: str | Path, encode: Encode | None = None) -> None:
    """Train what is not trained yet and export workdir/model. The same call goes on where a stopped
    one was.

    encode: what turns a tfds source into encoded shards (see batches.Encode); only diffusion tasks
    on such sources need it. Raises UserError for what a person can put right, loop.Diverged after
    too many bad steps in a row, Interrupted when a signal stopped the run and its state is saved.
    """
    with Workdir(workdir, config) as folder, PreemptionHandler() as interruption:
        enable_compilation_cache(folder.programs)
        mesh = make_mesh(config.mesh)
        _check_batches(config, mesh)
        check_models(config, mesh)
        _check_folders(config)
        folder.save_config()
        with (
            Checkpointer(folder.checkpoints, config.keep_checkpoints, config.keep_every) as saves,
            PowerMeter(mesh.devices.flat[0].platform) as meter,
        ):
            latest = saves.latest()
            place = RunPosition() if latest is None else saves.place(latest)
            try:
                with (
                    figures.Metrics(folder.path, place.total) as metrics,
                    liveness.report_failures(),
                ):
                    Run(config, folder, mesh, saves, metrics, meter, encode, interruption).stages(
                        place
                    )
            except Interrupted as stop:
                raise Interrupted(f"stopped by {stop}: {_stands(config, saves)}") from None


def _stands(config: Config, saves: Checkpointer) -> str:
    """Where the last committed save stands, in words."""
    saves.wait()
    latest = saves.latest()
    if latest is None:
        return "nothing was trained yet; the same command begins"
    place = saves.place(latest)
    stage = config.stages[place.stage]
    return (
        f"stage {stage.name}, step {place.step} of {stage.steps} is saved; the same command "
        "goes on from there"
    )


class Run:
    """The parts that all stages of one run share."""

    def __init__(
        self,
        config: Config,
        folder: Workdir,
        mesh,
        saves: Checkpointer,
        metrics: figures.Metrics,
        meter: PowerMeter,
        encode: Encode | None,
        interruption: PreemptionHandler | None = None,
    ):
        self.config, self.folder, self.mesh = config, folder, mesh
        self.saves, self.metrics, self.meter, self.encode = saves, metrics, meter, encode
        self.interruption = interruption or PreemptionHandler()
        self.frozen = Frozen(config, folder.path)

    def stages(self, place: RunPosition) -> None:
        """From a place in the run to its end."""
        self.cost, self.productive = dict(place.cost), place.productive
        kind = self.mesh.devices.flat[0].device_kind
        # else nothing is trained, and the account is closed
        if place.total < sum(stage.steps for stage in self.config.stages):
            self.attempts = RestartLog(self.folder.path, place.total, self.mesh.size, kind)
        chip = chip_of(kind)
        self.peak = chip.peak_bf16_flops * self.mesh.size if chip else None  # FLOP/s of all devices
        previous = None
        for index in range(place.stage, len(self.config.stages)):
            stage = self.prepare(index)
            if index == place.stage and place.total:
                state, start, window = (
                    self.saves.restore(place.total, stage.abstract),
                    place.step,
                    MetricWindow(**place.window),
                )
                print(
                    f"going on at stage {self.config.stages[index].name}, step {start} of "
                    f"{self.config.stages[index].steps}"
                )
            else:
                state, start, window = self.begin(stage, previous), 0, MetricWindow()
            state = self.train(
                stage, state, start, window, done=sum(s.steps for s in self.config.stages[:index])
            )
            # the optimizer's memory is free before the next stage takes its own
            previous, state = (stage, state.average), None
        self.finish(*previous)

    def prepare(self, index: int) -> Stage:
        """Open data and model of a stage."""
        config = self.config.stages[index]
        loader = open_loader(self.config, index, self.frozen, self.encode, self.mesh)
        if len(loader.samples.buckets) > 1 and jax.process_index() == 0:
            held = np.bincount(
                loader.samples.bucket_of[loader.samples.bucket_of >= 0],
                minlength=len(loader.samples.buckets),
            )
            counts = {
                bucket: int(count)
                for bucket, count in zip(loader.samples.buckets, held, strict=True)
            }
            bucket_chart.write(
                self.folder.path / f"buckets-{config.name}.png",
                counts,
                title=f"stage {config.name}",
            )
        made = build_stage(self.config, config, self.frozen, self.mesh)
        if made.remat and jax.process_index() == 0:
            print(f"stage {config.name}: {made.remat}")
        return Stage(index, made.task, loader, made.optimizer, made.abstract)

    def begin(self, stage: Stage, previous) -> TrainState:
        """The state before a stage's first step."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), stage.index)

        def fresh():
            return fresh_params(stage.task.init, key, stage.abstract)

        before = (previous[0].task, previous[1]) if previous else None
        params = initial_params(
            self.config, stage.index, stage.task, before, fresh, key, self.report
        )
        return state_from(stage.task.adjust(params), stage.optimizer, stage.abstract)

    def report(self, name: str, figures: dict[str, float]) -> None:
        """A conversion's figures → NAME.json and a line."""
        if jax.process_index() == 0:
            write_atomic(self.folder.path / f"{name}.json", json.dumps(figures, indent=1) + "\n")
            print(f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in figures.items())}")

    def train(
        self, stage: Stage, state: TrainState, start: int, window: MetricWindow, done: int
    ) -> TrainState:
        config, task = self.config.stages[stage.index], stage.task
        since = time.perf_counter()
        joules = self.meter.joules or 0.0

        def cost_until(number: int) -> None:
            nonlocal since, joules
            now, energy = time.perf_counter(), self.meter.joules or 0.0
            old = self.cost.get(config.name, {"seconds": 0.0, "joules": 0.0})
            self.cost[config.name] = {
                "seconds": old["seconds"] + now - since,
                "joules": old["joules"] + energy - joules,
                "steps": number,
                "images": number * config.batch_size,
            }
            since, joules = now, energy

        def log(number, values):
            more = {
                "goodput": self.attempts.goodput(clock.productive),
                "restarts": self.attempts.restarts,
            }
            more |= figures.device_memory(self.mesh.devices.flat)
            self.metrics.write(
                stage=config.name, step=number, total=done + number, values={**values, **more}
            )

        def save(number, state, window):
            cost_until(number)
            loader, self.productive = stage.loader.state_at(number), clock.productive
            place = RunPosition(
                stage.index,
                number,
                done + number,
                dict(self.cost),
                dataclasses.asdict(window),
                loader,
                {},
                clock.productive,
            )
            self.saves.save(place, state)

        def saves(number):
            # a save that fails in the background is no news for the next save's time
            self.saves.check()
            return number % self.config.checkpoint_every == 0 or bool(
                every and (done + number) % every == 0
            )

        def preview(number, state):
            self.draw(stage, state, number, done + number)

        def bad(number, values):
            keys = record_keys(stage.loader, number - 1)
            self.metrics.bad_step(
                stage=config.name, step=number, total=done + number, values=values, keys=keys
            )
            return keys

        guard, every = self.config.guard, self.config.keep_every
        step = compiled_step(
            self.config, config, StageParts(task, stage.optimizer, stage.abstract), self.mesh
        )
        clock = StepTimer(config.batch_size, self.productive, self.peak)
        watch = LoopHooks(
            self.config.log_every,
            self.config.preview.every,
            guard.bad_steps_in_row,
            done,
            saves,
            log,
            save,
            preview,
            bad,
            batch_flops(task, config.batch_size),
            clock,
            self.interruption,
            StepProfiler(self.folder.profile, self.config.profile.steps),
        )
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1_000 + stage.index)
        sharding = rules.batch_sharding(self.mesh)
        place = {
            "name": config.name,
            "start": start,
            "steps": config.steps,
            "key": key,
            "window": window,
        }
        state = train(state, step, stage.loader, sharding=sharding, watch=watch, **place)
        # killed between the last save and its look
        if start == config.steps and not self.sample(config.name, start).exists():
            preview(start, state)
        return state

    def sample(self, stage: str, number: int) -> Path:
        """The file of a sample grid."""
        return self.folder.samples / f"{stage}-{number:07d}.png"

    def draw(self, stage: Stage, state: TrainState, number: int, total: int) -> None:
        """Sample grid → samples/STAGE-STEP.png and TensorBoard."""
        pictures, captions = stage.task.preview(
            state.average, stage.loader.global_batch(0, rows=8), self.config.preview
        )
        if len(pictures) and jax.process_index() == 0:
            sheet = image_grid(pictures, captions)
            name = self.config.stages[stage.index].name
            write_png(self.sample(name, number), sheet, {"stage": name, "step": number})
            self.metrics.image(f"{name}/samples", sheet, total)

    def finish(self, stage: Stage, params) -> None:
        """The last save is down; write the ledger, the loss curve and the model."""
        self.saves.wait()
        if jax.process_index() == 0:
            device = self.mesh.devices.flat[0]
            account = ledger(
                self.cost,
                self.mesh.size,
                device.device_kind,
                self.config.hardware,
                self.meter.source,
            )
            write_atomic(self.folder.path / "ledger.json", json.dumps(account, indent=1) + "\n")
            write_png(
                self.folder.path / "loss.png",
                figures.loss_curve(figures.read(self.folder.path / "metrics.jsonl")),
            )
        stage.task.export(params, self.folder.model, stage.loader.global_batch)
        if jax.process_index() == 0:
            print(summary(self.folder.path))
            print(f"done: {self.folder.model}")


def record_keys(loader, step: int, rows: int = 64) -> list[str]:
    """Names of the records in the global batch of a step (counted from 0), whichever process reads
    them; a few rows at a time."""
    batch = loader.plan.batch(step)
    keys: list[str] = []
    for at in range(0, len(batch.indices), rows):
        part = loader.samples.read(
            batch.indices[at : at + rows], batch.bucket, batch.draws[at : at + rows]
        )
        keys += [str(key) for key in part["key"]]
    return keys


def batch_flops(task: Task, batch_size: int):
    """batch (its rows in this process) → FLOPs of a train step on the whole of it; 0 for a task
    whose model is not counted."""
    model = getattr(task.module, "config", None)
    if not isinstance(model, TransformerConfig | DiTConfig):
        return lambda batch: 0.0

    def flops(batch) -> float:
        height, width = (side * PIXELS for side in batch["mean"].shape[1:3])
        return batch_size * train_flops(
            model, height, width, batch["text_states"].shape[1] if "text_states" in batch else 0
        )

    return flops


def _check_batches(config: Config, mesh) -> None:
    """Each micro-batch must cut into equal parts, one a batch shard of the mesh."""
    for stage in config.stages:
        unit = batch_shards(mesh) * stage.optimizer.accumulate
        if stage.batch_size % unit:
            parts = (
                f"mesh data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']} × accumulate "
                f"{stage.optimizer.accumulate}"
            )
            raise UserError(
                f"stage {stage.name}: batch_size {stage.batch_size} is not a multiple of {unit} "
                f"({parts})"
            )


def _check_folders(config: Config) -> None:
    """What a later stage lacks is said now, not when its turn comes."""
    for stage in config.stages:
        if stage.start not in ("fresh", "previous") and not Path(stage.start).is_dir():
            raise UserError(
                f"stage {stage.name}: start {stage.start!r}: no such folder (or fresh, or previous)"
            )
        for _, source in parse_mixture(stage.data.source):
            try:
                parse_source(source)
            except UserError as fault:
                raise UserError(f"stage {stage.name}: {fault}") from None
    for field in ("vae", "text_encoder"):
        folder = getattr(config, field)
        if folder is not None and not Path(folder).is_dir():
            raise UserError(
                f"{field} {folder!r}: no such folder; give a model folder, or one with "
                "config.json and weights"
            )
