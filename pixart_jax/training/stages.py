"""A run: the stages of a config one after the other, each from where the last one ended, with all that is kept of it."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax

from pixart_jax import png
from pixart_jax.config import Config
from pixart_jax.errors import UserError
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import batch_shards, make_mesh
from pixart_jax.training import metrics as figures
from pixart_jax.training.abstract import Parts, compiled_step, parts
from pixart_jax.training.batches import Encode, open_loader
from pixart_jax.training.checkpoint import Checkpoints, Place
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.ledger import PowerMeter, ledger
from pixart_jax.training.loop import Watch, Window, train
from pixart_jax.training.mesh_fit import check_models
from pixart_jax.training.starts import first_params
from pixart_jax.training.state import TrainState, fresh_params, state_from
from pixart_jax.training.tasks import Task
from pixart_jax.training.workdir import Workdir, write_atomic


@dataclasses.dataclass
class Stage:
    """A stage made ready: what it learns, from what, and how its state lies."""

    index: int
    task: Task
    loader: object
    optimizer: object
    abstract: TrainState


def run(config: Config, workdir: str | Path, encode: Encode | None = None) -> None:
    """Train what is not trained yet and export workdir/model. The same call goes on where a stopped one was.

    encode: what turns a tfds source into encoded shards (see batches.Encode); only diffusion tasks on such sources need it.
    Raises UserError for what a person can put right, loop.Diverged when the loss is no longer finite.
    """
    with Workdir(workdir, config) as folder:
        mesh = make_mesh(config.mesh)
        _check_batches(config, mesh)
        check_models(config, mesh)
        _check_folders(config)
        with (
            Checkpoints(folder.checkpoints, config.keep_checkpoints) as saves,
            PowerMeter(mesh.devices.flat[0].platform) as meter,
        ):
            latest = saves.latest()
            place = Place() if latest is None else saves.place(latest)
            with figures.Metrics(folder.path, place.total) as metrics:
                Run(config, folder, mesh, saves, metrics, meter, encode).stages(place)


class Run:
    """The parts that all stages of one run share."""

    def __init__(
        self, config: Config, folder: Workdir, mesh, saves: Checkpoints, metrics: figures.Metrics, meter: PowerMeter, encode: Encode | None
    ):
        self.config, self.folder, self.mesh = config, folder, mesh
        self.saves, self.metrics, self.meter, self.encode = saves, metrics, meter, encode
        self.frozen = Frozen(config, folder.path)

    def stages(self, place: Place) -> None:
        """From a place in the run to its end."""
        self.cost = dict(place.cost)
        previous = None
        for index in range(place.stage, len(self.config.stages)):
            stage = self.prepare(index)
            if index == place.stage and place.total:
                state, start, window = self.saves.restore(place.total, stage.abstract), place.step, Window(**place.window)
                print(f"going on at stage {self.config.stages[index].name}, step {start} of {self.config.stages[index].steps}")
            else:
                state, start, window = self.begin(stage, previous), 0, Window()
            state = self.train(stage, state, start, window, done=sum(s.steps for s in self.config.stages[:index]))
            previous, state = (stage, state.average), None  # the optimizer's memory is free before the next stage takes its own
        self.finish(*previous)

    def prepare(self, index: int) -> Stage:
        """Open data and model of a stage."""
        config = self.config.stages[index]
        loader = open_loader(self.config, index, self.frozen, self.encode)
        made = parts(self.config, config, self.frozen, self.mesh)
        return Stage(index, made.task, loader, made.optimizer, made.abstract)

    def begin(self, stage: Stage, previous) -> TrainState:
        """The state before a stage's first step."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), stage.index)

        def fresh():
            return fresh_params(stage.task.init, key, stage.abstract)

        before = (previous[0].task, previous[1]) if previous else None
        params = first_params(self.config, stage.index, stage.task, before, fresh, key, self.report)
        return state_from(stage.task.adjust(params), stage.optimizer, stage.abstract)

    def report(self, name: str, figures: dict[str, float]) -> None:
        """A conversion's figures → NAME.json and a line."""
        if jax.process_index() == 0:
            write_atomic(self.folder.path / f"{name}.json", json.dumps(figures, indent=1) + "\n")
            print(f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in figures.items())}")

    def train(self, stage: Stage, state: TrainState, start: int, window: Window, done: int) -> TrainState:
        config, task = self.config.stages[stage.index], stage.task
        clock = time.perf_counter()
        joules = self.meter.joules or 0.0

        def cost_until(number: int) -> None:
            nonlocal clock, joules
            now, energy = time.perf_counter(), self.meter.joules or 0.0
            old = self.cost.get(config.name, {"seconds": 0.0, "joules": 0.0})
            self.cost[config.name] = {
                "seconds": old["seconds"] + now - clock,
                "joules": old["joules"] + energy - joules,
                "steps": number,
                "images": number * config.batch_size,
            }
            clock, joules = now, energy

        def log(number, values):
            self.metrics.write(stage=config.name, step=number, total=done + number, values=values)

        def save(number, state, window):
            cost_until(number)
            place = Place(stage.index, number, done + number, dict(self.cost), dataclasses.asdict(window), stage.loader.state_at(number))
            self.saves.save(place, state)

        def preview(number, state):
            self.draw(stage, state, number, done + number)

        step = compiled_step(config, Parts(task, stage.optimizer, stage.abstract), self.mesh)
        watch = Watch(self.config.log_every, self.config.checkpoint_every, self.config.preview.every, log, save, preview)
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1_000 + stage.index)
        sharding = rules.batch_sharding(self.mesh)
        place = {"name": config.name, "start": start, "steps": config.steps, "key": key, "window": window}
        state = train(state, step, stage.loader, sharding=sharding, watch=watch, **place)
        if start == config.steps and not self.sample(config.name, start).exists():  # killed between the last save and its look
            preview(start, state)
        return state

    def sample(self, stage: str, number: int) -> Path:
        """The file of a sample grid."""
        return self.folder.samples / f"{stage}-{number:07d}.png"

    def draw(self, stage: Stage, state: TrainState, number: int, total: int) -> None:
        """Sample grid → samples/STAGE-STEP.png and TensorBoard."""
        pictures, captions = stage.task.preview(state.average, stage.loader.batch(0), self.config.preview)
        if len(pictures) and jax.process_index() == 0:
            sheet = png.grid(pictures, captions)
            name = self.config.stages[stage.index].name
            png.write(self.sample(name, number), sheet, {"stage": name, "step": number})
            self.metrics.image(f"{name}/samples", sheet, total)

    def finish(self, stage: Stage, params) -> None:
        """The last save is down; write the ledger, the loss curve and the model."""
        self.saves.wait()
        if jax.process_index() == 0:
            device = self.mesh.devices.flat[0]
            account = ledger(self.cost, self.mesh.size, device.device_kind, self.config.hardware, self.meter.source)
            write_atomic(self.folder.path / "ledger.json", json.dumps(account, indent=1) + "\n")
            png.write(self.folder.path / "loss.png", figures.loss_curve(figures.read(self.folder.path / "metrics.jsonl")))
        stage.task.export(params, self.folder.model, stage.loader.batch)
        print(f"done: {self.folder.model}")


def _check_batches(config: Config, mesh) -> None:
    """Each micro-batch must cut into equal parts, one a batch shard of the mesh."""
    for stage in config.stages:
        unit = batch_shards(mesh) * stage.optimizer.accumulate
        if stage.batch_size % unit:
            parts = f"mesh data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']} × accumulate {stage.optimizer.accumulate}"
            raise UserError(f"stage {stage.name}: batch_size {stage.batch_size} is not a multiple of {unit} ({parts})")


def _check_folders(config: Config) -> None:
    """What a later stage lacks is said now, not when its turn comes."""
    for stage in config.stages:
        if stage.start not in ("fresh", "previous") and not Path(stage.start).is_dir():
            raise UserError(f"stage {stage.name}: start {stage.start!r}: no such folder (or fresh, or previous)")
        if not stage.data.source.startswith("tfds:") and not Path(stage.data.source).is_dir():
            raise UserError(
                f"stage {stage.name}: data source {stage.data.source!r} is neither a folder of encoded shards nor tfds:NAME/CONFIG"
            )
    for field in ("vae", "text_encoder"):
        folder = getattr(config, field)
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"{field} {folder!r}: no such folder; give a model folder, or one with config.json and weights")
