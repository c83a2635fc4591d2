"""What a run leaves behind: a folder in the diffusers form, whole where every part is known."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from pixart_jax.pipeline import folder as model_folder
from pixart_jax.pipeline import scheduler as schedulers
from pixart_jax.pipeline.sampling import SamplingConfig
from pixart_jax.training.frozen import Frozen


@dataclasses.dataclass(frozen=True)
class Copied:
    """A part that was not trained: its files as they are."""

    source: Path

    def save(self, folder: Path) -> None:
        shutil.copytree(self.source, folder)


def write_model(folder: Path, transformer, scheduler: schedulers.SchedulerConfig, sampling: SamplingConfig, frozen: Frozen) -> None:
    """The whole model: diffusers' PixArtAlphaPipeline and Pipeline.from_pretrained open it."""
    model_folder.write(
        folder,
        transformer=transformer,
        text_encoder=Copied(frozen.folder("text_encoder")),
        vae=Copied(frozen.folder("vae")),
        tokenizer=frozen.tokenizer,
        scheduler=scheduler,
        sampling=sampling,
    )


def write_parts(folder: Path, transformer, scheduler: schedulers.SchedulerConfig, frozen: Frozen) -> None:
    """The class-conditional model with its VAE and scheduler; there is no diffusers pipeline of text for it."""
    for part in ("transformer", "vae", "scheduler"):
        shutil.rmtree(folder / part, ignore_errors=True)
    transformer.save(folder / "transformer")
    Copied(frozen.folder("vae")).save(folder / "vae")
    schedulers.write(scheduler, folder / "scheduler")
