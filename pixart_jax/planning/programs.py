"""The program of a target, traced from shapes alone on the topology's devices."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pixart_jax.config import Config, MeshConfig
from pixart_jax.models.configs import T5Config, VAEConfig
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.pipeline import Pipeline
from pixart_jax.pipeline.scheduler import SchedulerConfig
from pixart_jax.planning import topology
from pixart_jax.planning.target import PlanTarget, SamplingWorkload
from pixart_jax.training import stages
from pixart_jax.training.frozen import FrozenSpec
from pixart_jax.training.memory import bytes_per_device
from pixart_jax.training.optimizer import averaged
from pixart_jax.training.step import compiled_step
from pixart_jax.training.tasks.denoising import with_stage_positions
from pixart_jax.weights import t5, vae
from pixart_jax.weights.component import VAE, TextEncoder, Transformer


@dataclasses.dataclass(frozen=True)
class Program:
    """traced: ready to lower. counted: bytes on a device. parts: of a train step."""

    traced: Any  # jax.stages.Traced
    mesh: jax.sharding.Mesh
    counted: dict[str, float]
    assumptions: tuple[str, ...] = ()
    remat: str = ""
    parts: stages.StageParts | None = None


def program(target: PlanTarget) -> Program:
    data, fsdp, context, tensor = target.mesh
    sizes = MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor)
    mesh = make_mesh(sizes, topology.devices(target.topology))
    if target.sampling is None:
        return train_step(target, mesh)
    return sampler(target, target.sampling, mesh)


def train_step(target: PlanTarget, mesh: jax.sharding.Mesh) -> Program:
    """The step that train.py runs, on a mesh."""
    config, stage = target.config, target.stage_config
    frozen = FrozenSpec(config)
    parts = stages.build_stage(config, stage, frozen, mesh)
    batch = stages.abstract_batch(config, stage, target.bucket, mesh)
    step = compiled_step(config, stage, parts, mesh)
    traced = step.trace(parts.abstract, batch, stages.abstract_key(mesh))
    state, ema = parts.abstract, averaged(parts.abstract.opt_state)
    counted = {
        "parameters": bytes_per_device(state.params),
        "EMA": bytes_per_device(ema) if ema is not None else 0.0,
    }
    # the step's counters and guard count with the optimizer
    counted["optimizer"] = bytes_per_device(state) - sum(counted.values())
    if parts.base is not None:
        counted["frozen base"] = bytes_per_device(parts.base)
    counted["batch"] = bytes_per_device(batch)
    chosen = [f"auto: {parts.remat}"] if parts.remat else []
    remat = parts.remat.name if parts.remat else config.remat
    return Program(traced, mesh, counted, (*chosen, *frozen.assumptions), remat, parts)


def sampler(target: PlanTarget, work: SamplingWorkload, mesh: jax.sharding.Mesh) -> Program:
    """Pipeline.denoise or the VAE's decode, of parameters as they would be opened on the mesh."""
    assumptions: list[str] = []
    model = with_stage_positions(target.config.model, target.stage_config)
    transformer: Any = Transformer.abstract(model, work.dtype, mesh)
    decoder: Any = VAE.abstract(vae_config(target.config, assumptions), work.dtype, mesh)
    encoder = TextEncoder.abstract(text_config(target.config, assumptions), work.dtype, mesh)
    parts = {"transformer": transformer, "VAE": decoder, "text encoder": encoder}
    counted = {name: bytes_per_device(part.params) for name, part in parts.items()}
    rows, factor = rules.row_sharding(mesh, work.batch), decoder.config.factor

    def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((work.batch, *sizes), dtype, sharding=rows)

    arguments: tuple
    noise = shape(work.height // factor, work.width // factor, model.in_channels)
    if target.part == "decode":

        def run(params, *arrays):
            latents = decoder.config.unscaled(arrays[0])
            return decoder.module.apply({"params": params}, latents, method="decode")

        arguments = (decoder.params, noise)
    else:
        o = target.stage_config.objective
        scheduler = SchedulerConfig(o.prediction, o.timesteps, o.beta_start, o.beta_end)
        # without its mesh, which is set around the trace
        bare: Any = Pipeline(transformer.replace(mesh=None), None, decoder, None, scheduler)
        states, lengths = shape(model.text_tokens, model.caption_width), shape(dtype=jnp.int32)

        def run(params, *arrays):
            pipeline = bare.replace(transformer=transformer.replace(params=params, mesh=None))
            return pipeline.denoise(*arrays, **dataclasses.asdict(work.sampling))

        arguments = (transformer.params, states, lengths, noise, states, lengths)
    counted["batch"] = bytes_per_device(arguments[1:])
    with rules.on_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments)
        traced = jax.jit(run, in_shardings=shardings, out_shardings=rows).trace(*arguments)
    return Program(traced, mesh, counted, assumptions=tuple(assumptions))


def vae_config(config: Config, assumptions: list[str]) -> VAEConfig:
    """Of the config's VAE folder, else of the VAE that it trains, else Stable Diffusion's."""
    if (found := _read(config.vae, "vae")) is not None:
        return vae.config_from_json(found)
    if config.vae_model is None:
        assumptions.append("the VAE is Stable Diffusion's (its folder is not here)")
    return config.vae_model or VAEConfig()


def text_config(config: Config, assumptions: list[str]) -> T5Config:
    """Likewise of the text encoder, else T5-XXL's."""
    if (found := _read(config.text_encoder, "text_encoder")) is not None:
        return t5.config_from_json(found)
    if config.text_model is None:
        assumptions.append("the text encoder is T5 v1.1 XXL (its folder is not here)")
    return config.text_model or T5Config()


def _read(folder: str | None, part: str) -> dict | None:
    paths = [Path(folder) / part / "config.json", Path(folder) / "config.json"] if folder else []
    return next((json.loads(path.read_text()) for path in paths if path.is_file()), None)
