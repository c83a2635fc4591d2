"""Check that a run fits its mesh and that its folders exist, before anything is opened or
compiled."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from pixart_jax.config import DISTILLATIONS, Config, StageConfig
from pixart_jax.data.sources import parse_mixture, parse_source
from pixart_jax.errors import UserError
from pixart_jax.models.remat import check_platform
from pixart_jax.parallel.mesh import batch_shards, check_divides
from pixart_jax.training.dreambooth import check_identifier
from pixart_jax.training.frozen import Frozen, start_folder
from pixart_jax.training.tasks.distillation import check_teacher
from pixart_jax.training.tasks.lora import adapted_layers
from pixart_jax.weights.component import controlnet_of


def check_run(config: Config, mesh: Mesh) -> None:
    """Raise UserError for batches, models or folders of any stage with which it could not run."""
    check_platform(config.remat, mesh.devices.flat[0].platform)
    for stage in config.stages:
        _check_batch(stage, mesh)
        _check_model(config.of(stage), stage, mesh)
        _check_sources(stage)
        if stage.task in DISTILLATIONS:
            check_teacher(stage)
        frozen = Frozen(config.of(stage), Path())
        for part in ("vae", "text_encoder"):
            if frozen.is_configured(part):
                frozen.folder(part)
        if (stage.reads_text or stage.task == "class_conditional") and frozen.is_configured("vae"):
            _check_vae(config.of(stage), stage, frozen)


def _check_batch(stage: StageConfig, mesh: Mesh) -> None:
    """Each micro-batch must cut into equal parts, one a batch shard of the mesh."""
    accumulate = stage.optimizer.accumulate
    unit = batch_shards(mesh) * accumulate
    if stage.batch_size % unit:
        raise UserError(
            f"stage {stage.name}: batch_size {stage.batch_size} is not a multiple of {unit} (mesh "
            f"data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']} × accumulate {accumulate})"
        )


def _check_model(config: Config, stage: StageConfig, mesh: Mesh) -> None:
    """tensor must divide a stage's heads and MLP width, context its image tokens."""
    name = f"stage {stage.name}"
    if stage.task == "class_conditional" or stage.reads_text:
        model, side = config.model, 8 * config.model.patch_size
        check_identifier(stage)
        if stage.lora is not None:
            adapted_layers(model, stage.lora, stage.name)
        if stage.controlnet is not None:
            controlnet_of(stage.controlnet, model)
        tokens = {f"bucket {h}×{w}": (h // side) * (w // side) for h, w in stage.data.buckets}
        check_divides(mesh, name, heads=model.heads, mlp_width=model.mlp_width, tokens=tokens)
    elif stage.task == "text_to_text" and config.text_model is not None:
        text = config.text_model
        check_divides(mesh, name, heads=text.num_heads, mlp_width=text.d_ff)


def _check_vae(config: Config, stage: StageConfig, frozen: Frozen) -> None:
    """The model must read as many channels as the VAE's latents have."""
    found, ours = frozen.vae_config.latent_channels, config.model.in_channels
    if found != ours:
        raise UserError(
            f"stage {stage.name}: latents of the VAE {config.vae} have {found} channels, and the "
            f"model reads {ours}: model.in_channels {found} and model.out_channels {2 * found}, "
            "or another vae"
        )


def _check_sources(stage: StageConfig) -> None:
    if stage.start not in ("fresh", "previous") and not start_folder(stage).is_dir():
        raise UserError(
            f"stage {stage.name}: start {stage.start!r}: no such folder (or fresh, or previous)"
        )
    held_out = [stage.evaluate.source] if stage.evaluate.source else []
    for _, source in (
        pair for text in [stage.data.source, *held_out] for pair in parse_mixture(text)
    ):
        try:
            parse_source(source)
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from None
