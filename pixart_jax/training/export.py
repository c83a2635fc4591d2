"""What a run leaves behind: a folder in the diffusers form, whole where every part is known.

All processes of a run call these; the first one writes, the others give it their parts of the
parameters.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax

from pixart_jax.pipeline import folder as model_folder
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.pipeline.scheduler import SchedulerConfig
from pixart_jax.training.frozen import Frozen


@dataclasses.dataclass(frozen=True)
class CopiedComponent:
    """A part that was not trained: its files as they are."""

    source: Path

    def save(self, folder: Path) -> None:
        if jax.process_index() == 0:
            shutil.copytree(self.source, folder)


def write_model(
    folder: Path, transformer, scheduler: SchedulerConfig, sampling: SamplingConfig, frozen: Frozen
) -> None:
    """The whole model: diffusers' PixArtAlphaPipeline and Pipeline.from_pretrained open it."""
    model_folder.write_model(
        folder,
        transformer=transformer,
        text_encoder=CopiedComponent(frozen.folder("text_encoder")),
        vae=CopiedComponent(frozen.folder("vae")),
        tokenizer=frozen.tokenizer,
        scheduler=scheduler,
        sampling=sampling,
    )


def write_parts(folder: Path, transformer, scheduler: SchedulerConfig, frozen: Frozen) -> None:
    """The class-conditional model with its VAE and scheduler; there is no diffusers pipeline of
    text for it."""
    first = jax.process_index() == 0
    for part in ("transformer", "vae", "scheduler") if first else ():
        shutil.rmtree(folder / part, ignore_errors=True)
    transformer.save(folder / "transformer")
    CopiedComponent(frozen.folder("vae")).save(folder / "vae")
    if first:
        scheduler.write(folder / "scheduler")
