"""Train the stages of a recipe: python train.py configs/NAME.py --workdir DIR [--seed 1 …].

The same command resumes a stopped run. DIR may be gs://… or s3://…; NAME --help lists every option.
docs/pods.md: several processes. JAX and Orbax are imported late: a mistyped command ends at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pixart_jax import cli
from pixart_jax.errors import Interrupted
from pixart_jax.training import recipes

if TYPE_CHECKING:
    from pathlib import Path

    from pixart_jax.config import Config
    from pixart_jax.files import Address
    from pixart_jax.parallel.processes import DistributedOptions
    from pixart_jax.training.batches import Encode
    from pixart_jax.training.evaluation import OpenMetric
    from pixart_jax.training.initialization import Trained
    from pixart_jax.training.run import Run


def main(argv: list[str]) -> int:
    """Read the command line, then run; returns the exit status."""
    recipe, workdir, scratch, overrides = recipes.split(argv)
    from pixart_jax.parallel import processes

    options, overrides = processes.pop_distributed_flags(overrides)
    what = (recipes.parse_config(recipe, overrides), workdir, options, scratch)
    return processes.run_with_peers(lambda: cli.run(lambda _: run(*what), argv))


def run(config: Config, workdir: Address, options: DistributedOptions, scratch: str | None) -> int:
    """Join the other processes and train; returns the exit status."""
    from pixart_jax.parallel import processes
    from pixart_jax.parallel.mesh import make_mesh
    from pixart_jax.training.loop import TrainingDiverged

    processes.initialize(options)
    processes.assert_same_config(repr(config), workdir)
    processes.warm_up_collectives(make_mesh(config.mesh))
    try:
        train(config, workdir, encode, open_metric, scratch)
    except TrainingDiverged as error:
        advice = "the last save holds, lower the learning rate or look at the data"
        print(f"error: {error}; {advice}", file=sys.stderr)
        return cli.GAVE_UP
    return 0


def train(
    config: Config,
    workdir: Address,
    encode: Encode | None = None,
    open_metric: OpenMetric | None = None,
    scratch: str | None = None,  # of a workdir in a bucket: where its files are written first
) -> None:
    """Train what is not trained yet and export WORKDIR/model, or adapter; the same call resumes.

    encode: makes encoded shards of images (training.batches.Encode). open_metric: measures
    generated images (training.evaluation). Raises UserError, TrainingDiverged after too many bad
    steps in a row, and Interrupted when a signal stopped the run and its state is saved.
    """
    from pixart_jax.parallel import liveness
    from pixart_jax.parallel.mesh import make_mesh
    from pixart_jax.training.checkpoint import Checkpointer
    from pixart_jax.training.checks import check_run
    from pixart_jax.training.interruption import PreemptionHandler
    from pixart_jax.training.ledger import EnergyMeter
    from pixart_jax.training.metrics import Metrics
    from pixart_jax.training.run import Run
    from pixart_jax.training.workdir import Workdir, as_json, enable_compilation_cache

    with Workdir(workdir, config, scratch) as folder, PreemptionHandler() as interruption:
        enable_compilation_cache(folder.programs)
        mesh = make_mesh(config.mesh)
        check_run(config, mesh)
        folder.save_config()
        saving = (folder.checkpoints, config.keep_checkpoints, config.keep_every, folder.bucket)
        with Checkpointer(*saving) as checkpoints, EnergyMeter() as meter:
            position = checkpoints.latest_position()
            try:
                log = Metrics(folder.path, position.total, config.wandb, as_json(config))
                with log as metrics, liveness.report_failures():
                    parts = (checkpoints, metrics, meter, interruption, position)
                    run = Run(config, folder, mesh, *parts, encode, open_metric)
                    trained: Trained | None = None
                    for index in range(position.stage, len(config.stages)):
                        trained = train_stage(run, index, trained)
                    assert trained is not None  # a config has at least one stage
                    run.finish(trained)
            except Interrupted as signal:
                where = checkpoints.describe_latest(config)
                raise Interrupted(f"stopped by {signal}: {where}") from None


def train_stage(run: Run, index: int, previous: Trained | None) -> Trained:
    """Train stage ``index``, or the rest of it, after the stage that this process trained last."""
    from pixart_jax.training import loop
    from pixart_jax.training.batches import open_loader
    from pixart_jax.training.evaluation import open_evaluators
    from pixart_jax.training.initialization import Trained, initial_state
    from pixart_jax.training.metrics import MetricWindow
    from pixart_jax.training.run import StageHooks
    from pixart_jax.training.stages import build_stage
    from pixart_jax.training.step import compiled_step

    mesh, position, stage = run.mesh, run.position, run.config.stages[index]
    config, frozen = run.of(stage)
    loader = open_loader(config, index, frozen, run.encode, mesh)
    # task, optimizer, shapes of the state, and the model below an adapter
    parts = build_stage(config, stage, frozen, mesh).load_base(mesh)
    run.describe(index, loader, parts)
    if index == position.stage and position.total:
        state = run.checkpoints.restore(position.total, parts.abstract)
        start, window = position.step, MetricWindow(**position.window)
        if position.ended:
            return Trained(parts.task, state.average, loader)
        print(f"going on at stage {stage.name}, step {start} of {stage.steps}")
    else:
        state = initial_state(config, index, parts, previous, run.report)
        start, window = 0, MetricWindow()

    step = compiled_step(config, stage, parts, mesh)  # loss, gradient, update and EMA
    given = (parts, frozen, run.encode, mesh, run.open_metric)
    evaluators = open_evaluators(config, index, *given)
    hooks = StageHooks(run, index, parts, loader, evaluators)  # metrics, checkpoints, previews
    state = loop.train(run, index, state, step, loader, hooks, start, window)
    if start == stage.steps and not hooks.grid(start).exists():  # killed before its preview
        hooks.preview(start, state)
    return Trained(parts.task, state.average, loader)


def encode(source, **options) -> Path:
    """The encoded shards of a source (training.batches.Encode)."""
    from pixart_jax.encoding.encode import encode_for_training

    return encode_for_training(source, **options)


def open_metric(*what):
    """What measures generated images (training.evaluation.OpenMetric)."""
    from pixart_jax.evaluation.stage_metrics import open_metric

    return open_metric(*what)
