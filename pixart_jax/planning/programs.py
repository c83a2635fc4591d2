"""The programs of a job, traced from shapes alone in a process that has the topology's devices: the
train step, and the sampler's parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from pixart_jax.config import Config, MeshConfig
from pixart_jax.models.t5 import T5Config
from pixart_jax.models.vae import VAEConfig
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import AXES, make_mesh
from pixart_jax.pipeline import Pipeline
from pixart_jax.pipeline.scheduler import SchedulerConfig
from pixart_jax.planning import topology
from pixart_jax.planning.jobs import PlanTarget
from pixart_jax.training import stages
from pixart_jax.training.ema import averaged
from pixart_jax.training.frozen import FrozenSpec
from pixart_jax.training.memory import bytes_per_device
from pixart_jax.training.step import compiled_step
from pixart_jax.training.tasks.denoising import with_stage_positions
from pixart_jax.weights import t5, vae
from pixart_jax.weights.component import VAE, TextEncoder, Transformer


@dataclasses.dataclass(frozen=True)
class Program:
    """traced: ready to be lowered. counted: bytes a device by kind. whole_share, remat: see
    jobs.Facts."""

    traced: jax.stages.Traced
    mesh: jax.sharding.Mesh
    counted: dict[str, float]
    whole_share: float
    assumptions: tuple[str, ...]
    remat: str = ""


def program(job: PlanTarget) -> Program:
    """The job's program on its topology's devices."""
    mesh = make_mesh(
        MeshConfig(**dict(zip(AXES, job.mesh, strict=True))), topology.devices(job.topology)
    )
    return _step(job, mesh) if job.drawing is None else _drawing(job, mesh)


def state_bytes(state) -> dict[str, float]:
    """Bytes on one device of an abstract TrainState, by kind; the step's counters and guard lie
    with the optimizer."""
    ema = averaged(state.opt_state)
    counted = {
        "parameters": bytes_per_device(state.params),
        "EMA": bytes_per_device(ema) if ema is not None else 0.0,
    }
    return counted | {"optimizer": bytes_per_device(state) - sum(counted.values())}


def _step(job: PlanTarget, mesh) -> Program:
    stage = job.stage_config
    frozen = FrozenSpec(job.config)
    made = stages.build_stage(job.config, stage, frozen, mesh)
    batch = stages.abstract_batch(job.config, stage, job.bucket, mesh)
    traced = compiled_step(job.config, stage, made, mesh).trace(
        made.abstract, batch, stages.abstract_key(mesh)
    )
    state = made.abstract
    counted = state_bytes(state)
    counted["batch"] = bytes_per_device(batch)
    sizes = {True: 0, False: 0}
    for leaf in jax.tree.leaves(state.params):
        sizes[leaf.sharding.is_fully_replicated] += leaf.size
    chosen = [f"auto: {made.remat}"] if made.remat else []
    remat = made.remat.name if made.remat else job.config.remat
    return Program(
        traced,
        mesh,
        counted,
        sizes[True] / sum(sizes.values()),
        (*chosen, *frozen.assumptions),
        remat,
    )


def _drawing(job: PlanTarget, mesh) -> Program:
    """Pipeline.denoise or the VAE's decode, of parameters as they would be opened on the mesh."""
    drawing, assumptions = job.drawing, []
    model = with_stage_positions(job.config.model, job.stage_config)
    transformer = Transformer.abstract(model, drawing.dtype, mesh)
    autoencoder = VAE.abstract(vae_config(job.config, assumptions), drawing.dtype, mesh)
    encoder = TextEncoder.abstract(text_config(job.config, assumptions), drawing.dtype, mesh)
    opened = {"transformer": transformer, "VAE": autoencoder, "text encoder": encoder}
    counted = {name: bytes_per_device(part.params) for name, part in opened.items()}
    rows = rules.row_sharding(mesh, drawing.batch)
    b, h, w = (
        drawing.batch,
        drawing.height // autoencoder.config.factor,
        drawing.width // autoencoder.config.factor,
    )

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((b, *sizes), dtype, sharding=rows)

    noise = shape(h, w, model.in_channels)
    if job.part == "decode":
        module = autoencoder.module

        def run(params, latents):
            return module.apply(
                {"params": params}, latents / autoencoder.config.scaling_factor, method="decode"
            )

        arguments = (autoencoder.params, noise)
    else:
        objective = job.stage_config.objective
        scheduler = SchedulerConfig(
            objective.prediction, objective.timesteps, objective.beta_start, objective.beta_end
        )
        # its mesh is set here, around the trace
        bare = Pipeline(transformer.replace(mesh=None), None, autoencoder, None, scheduler)
        states, lengths = shape(model.text_tokens, model.caption_width), shape(dtype=jnp.int32)

        def run(params, noise, states, lengths, negative, negative_lengths):
            pipeline = bare.replace(transformer=bare.transformer.replace(params=params))
            how = {"steps": drawing.steps, "guidance": drawing.guidance, "solver": drawing.solver}
            return pipeline.denoise(states, lengths, noise, negative, negative_lengths, **how)

        arguments = (transformer.params, noise, states, lengths, states, lengths)
    counted["batch"] = bytes_per_device(arguments[1:])
    with rules.on_mesh(mesh):
        jitted = jax.jit(
            run,
            in_shardings=jax.tree.map(lambda leaf: leaf.sharding, arguments),
            out_shardings=rows,
        )
        traced = jitted.trace(*arguments)
    return Program(traced, mesh, counted, 0.0, tuple(assumptions))


def vae_config(config: Config, assumptions: list[str]) -> VAEConfig:
    """Of the config's VAE folder where it is here, else of the VAE it trains, else Stable
    Diffusion's."""
    found = _read(config.vae, "vae")
    if found is not None:
        return vae.config_from_json(found)
    if config.vae_model is None:
        assumptions.append("the VAE is Stable Diffusion's (its folder is not here)")
    return config.vae_model or VAEConfig()


def text_config(config: Config, assumptions: list[str]) -> T5Config:
    """Likewise of the text encoder; else T5-XXL's."""
    found = _read(config.text_encoder, "text_encoder")
    if found is not None:
        return t5.config_from_json(found)
    if config.text_model is None:
        assumptions.append("the text encoder is T5 v1.1 XXL (its folder is not here)")
    return config.text_model or T5Config()


def _read(folder: str | None, part: str) -> dict | None:
    paths = [Path(folder) / part / "config.json", Path(folder) / "config.json"] if folder else []
    return next((json.loads(path.read_text()) for path in paths if path.is_file()), None)
