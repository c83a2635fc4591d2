"""The flags of sample.py: what to generate, from which model, on which devices; how to sample is
SamplingConfig's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from pixart_jax.commands.sample_edits import EditFlags
from pixart_jax.commands.sample_walk import WalkFlags
from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.files import bundled
from pixart_jax.pipeline.lora_flags import LoraFlags
from pixart_jax.pipeline.sampling_config import SamplingConfig, check_count
from pixart_jax.remote_path import Location
from pixart_jax.text import PromptRow, check_encodable, read_prompts

# images/s, however slow
BAR = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, "
    "{rate_noinv_fmt}]"
)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Generate images of prompts with a PixArt model. Images are PNGs that record their settings; a
    second call generates only what is missing."""

    prompt: str | None = None
    """The text to generate an image of."""
    prompts: Location | None = None
    """A file of prompts instead: one a line, or .csv or .jsonl with 'prompt', and height, width,
    seed, guidance, negative_prompt, image, mask, strength, control if wanted."""
    model: Location = dataclasses.field(default_factory=lambda: bundled("assets") / "shapes")
    """A diffusers folder; by default the small model that is shipped."""
    variant: str | None = None
    """Of the model's weight files, such as fp16; by default the ones without, or the only ones."""
    out: Location = Path("out")
    """The folder for the images."""
    negative_prompt: str = ""
    """What to steer away from."""
    height: int | None = None
    """Pixels; by default the side the model was trained at."""
    width: int | None = None
    """Pixels; by default the side the model was trained at."""
    seed: int = 0
    """The same seed, up to 64 bits, gives the same images, whatever the batch."""
    num_images_per_prompt: int = 1
    """Images of each prompt, from its seed, seed + 1, …"""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = SamplingConfig()
    edits: tyro.conf.OmitArgPrefixes[EditFlags] = EditFlags()
    walks: tyro.conf.OmitArgPrefixes[WalkFlags] = WalkFlags()
    loras: tyro.conf.OmitArgPrefixes[LoraFlags] = LoraFlags()
    batch_size: int | None = None
    """Images at once; by default up to 16 a device."""
    dtype: str = "auto"
    """Of the computation: float32 or bfloat16; auto: bfloat16 on accelerators."""
    text_states: Location | None = None
    """A file of `python -m pixart_jax encode --prompts`: sample from it without opening the text
    encoder."""
    offload_text_encoder: str = "auto"
    """always: encode all texts first and delete the text encoder from the devices before the rest
    of the model is opened; never; auto: where not all would fit together. The images are the
    same."""
    text_encoder_int8: bool = False
    """Hold the text encoder's matrices as int8 values: half of bfloat16's memory, and states that
    differ by 1 to 2 %."""
    weights_cache: str = "auto"
    """A folder of converted large weights, so that the next start is quick; auto: one in
    $PIXART_JAX_CACHE (~/.cache/pixart_jax); none."""
    mesh: str = "data=-1"
    """How this process's devices split the work: data=N copies of the model, each sampling its part
    of a batch, fsdp=N and tensor=N parts that the parameters are cut into, context=N the parts that
    an image's tokens are; -1: the rest. With commas between: fsdp=4,tensor=2. Where half as many
    images as data × fsdp are sampled, each one's two halves of guidance are computed side by
    side."""
    share: str | None = None
    """K/N: this process generates share K (from 0) of N into the same folder; cluster: as JAX
    detects (Cloud TPU, GKE, SLURM). By default all, or what `python -m pixart_jax launch` says."""
    grid: bool = True
    """Also write grid.png where there is more than one prompt."""

    def prompt_rows(self) -> list[PromptRow]:
        """The prompts to generate. Raises UserError where there are none."""
        if (self.prompt is None) == (self.prompts is None):
            both = ", not both" if self.prompt is not None else ""
            raise UserError(f"give --prompt TEXT or --prompts FILE{both}")
        check_count("num-images-per-prompt", self.num_images_per_prompt)
        check_encodable("--negative-prompt", self.negative_prompt)
        if self.prompts is not None:
            return read_prompts(self.prompts)
        return [PromptRow(check_encodable("--prompt", str(self.prompt)))]

    def local_mesh(self):
        """The mesh of this process's devices; None where it has but one."""
        import jax

        from pixart_jax.parallel.mesh import make_mesh

        mesh = make_mesh(MeshConfig.parse(self.mesh), jax.local_devices())
        return mesh if mesh.size > 1 else None

    def opening(self) -> dict[str, Any]:
        """How the model is opened: arguments of ``from_pretrained``."""
        import jax.numpy as jnp

        from pixart_jax.pipeline import folder

        return {
            "dtype": jnp.dtype(folder.compute_dtype(self.dtype)).type,
            "mesh": self.local_mesh(),
            "quantization": "int8" if self.text_encoder_int8 else None,
            "cache": folder.weights_cache(self.weights_cache),
        }
