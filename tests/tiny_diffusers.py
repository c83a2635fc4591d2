"""A whole PixArt model of a few thousand random numbers, built by diffusers and transformers, for
tests to open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel

from pixart_jax.text import word_tokenizer

WORDS = (
    "a large small red blue green yellow circle star square left right of above below the and"
).split()


def build(
    folder: Path | None = None,
    prediction: str = "epsilon",
    size_conditions: bool = False,
    seed: int = 0,
    sample_size: int = 8,
) -> PixArtAlphaPipeline:
    """diffusers' pipeline with every weight non-zero, saved to ``folder`` if given.

    The transformer's weights are 0.15 wide: at 0.25, 20 guided steps already amplify a change of
    1e-6 in the noise to 3e-3, and two programs that round differently draw two images.
    """
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(WORDS)
    sizes = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2}
    sizes |= {"cross_attention_dim": 24, "caption_channels": 16, "norm_num_groups": 4}
    sizes["sample_size"] = 128 if size_conditions else sample_size
    transformer = PixArtTransformer2DModel(
        **sizes, use_additional_conditions=size_conditions, interpolation_scale=1.0
    )
    text = {"vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    encoder = T5EncoderModel(T5Config(**text, feed_forward_proj="gated-gelu", dropout_rate=0.0))
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "norm_num_groups": 4}
    levels |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": (8, 8, 16, 16)}
    vae = AutoencoderKL(**levels, layers_per_block=1, latent_channels=4)
    with torch.no_grad():
        for module, scale in ((transformer, 0.15), (encoder, 0.3), (vae, 0.2)):
            for name, parameter in module.named_parameters():
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(torch.randn_like(parameter) * scale + centre)
    their = "v_prediction" if prediction == "v" else prediction
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type=their
    )
    pipe = PixArtAlphaPipeline(tokenizer, encoder.eval(), vae.eval(), transformer.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    if folder is not None:
        pipe.save_pretrained(folder)
    return pipe


def draw(pipe: PixArtAlphaPipeline, prompts, noise, **options):
    """What diffusers draws from noise [n, h, w, 4]: (latents [n, h, w, 4], images uint8 [n, H, W,
    3]) as numpy."""
    height, width = noise.shape[1] * pipe.vae_scale_factor, noise.shape[2] * pipe.vae_scale_factor
    given = torch.from_numpy(np.array(noise)).permute(0, 3, 1, 2).contiguous()
    plain = {"output_type": "latent", "use_resolution_binning": False, "clean_caption": False}
    size = {"height": height, "width": width}
    latents = pipe(list(prompts), latents=given, **size, **plain, **options).images
    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    images = ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return latents.permute(0, 2, 3, 1).numpy(), images.permute(0, 2, 3, 1).numpy()
