"""The peer's side of a contest: diffusers' PixArt in PyTorch, eager or through torch.compile.

how["compile"]: 'none' (eager), 'whole' (the transformer as one graph), 'blocks' (each block,
compiled once for all of them: far less compile time, and the same kernels within a block).
how["backend"]: of torch.compile; rehearsals take one that compiles nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)

from benchmarks.speed import limits
from benchmarks.speed.cases import PROMPTS, TINY, WORDS, Case
from benchmarks.speed.peer_training import Train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# TF32 where a GPU has it, as jax multiplies fp32 there by default
torch.set_float32_matmul_precision("high")
BETAS = {
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
}


def settle() -> None:
    """All that was begun is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def given(arrays: dict[str, np.ndarray], name: str, dtype=None) -> torch.Tensor:
    """An array of the case on the device; latents with channels first."""
    tensor = torch.from_numpy(arrays[name]).to(DEVICE)
    tensor = tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor
    return tensor if dtype is None else tensor.to(dtype)


def mask(arrays: dict[str, np.ndarray], lengths: str, width: int) -> torch.Tensor:
    """[b, l] of ones and zeros."""
    return (torch.arange(width) < torch.from_numpy(arrays[lengths])[:, None]).float().to(DEVICE)


def opened(folder: str, dtype) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=dtype).to(DEVICE)


def compiled(model, how: dict):
    """The model as how["compile"] says; shapes are static, as in the jitted program beside it."""
    options = {"backend": how.get("backend", "inductor"), "dynamic": False}
    if how["compile"] == "whole":
        return torch.compile(model, **options)
    if how["compile"] == "blocks":
        for block in model.transformer_blocks:
            block.compile(**options)
    return model


class Forward:
    """One evaluation of the transformer."""

    def __init__(self, case: Case, how: dict, folder: str, arrays: dict[str, np.ndarray]):
        dtype = getattr(torch, case.dtype)
        self._model = compiled(opened(folder, dtype).eval().requires_grad_(False), how)
        told = {"resolution": None, "aspect_ratio": None}
        if case.multi_scale:
            told = {
                "resolution": given(arrays, "size", dtype),
                "aspect_ratio": given(arrays, "aspect_ratio", dtype)[:, None],
            }
        self._latents, self._states = (
            given(arrays, "noise", dtype),
            given(arrays, "text_states", dtype),
        )
        self._rest = {
            "timestep": given(arrays, "timesteps"),
            "added_cond_kwargs": told,
            "encoder_attention_mask": mask(arrays, "text_lengths", case.text_tokens),
            "return_dict": False,
        }

    def run(self) -> None:
        with torch.no_grad():
            (self._output,) = self._model(self._latents, self._states, **self._rest)
        settle()

    def result(self) -> dict[str, np.ndarray]:
        return {"output": self._output.permute(0, 2, 3, 1).float().cpu().numpy()}

    def facts(self) -> dict:
        return {}


class Sample:
    """PixArtAlphaPipeline from given text states and noise to latents, with its own
    DPM-Solver++."""

    def __init__(self, case: Case, how: dict, folder: str, arrays: dict[str, np.ndarray]):
        dtype = getattr(torch, case.dtype)
        model = compiled(opened(folder, dtype).eval().requires_grad_(False), how)
        self._pipeline = PixArtAlphaPipeline(
            None, None, None, model, DPMSolverMultistepScheduler(**BETAS)
        ).to(DEVICE)
        self._pipeline.set_progress_bar_config(disable=True)
        width = case.text_tokens
        self._how = {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": given(arrays, "text_states", dtype),
            "prompt_attention_mask": mask(arrays, "text_lengths", width),
            "negative_prompt_embeds": given(arrays, "negative_states", dtype),
            "negative_prompt_attention_mask": mask(arrays, "negative_lengths", width),
            "num_inference_steps": case.steps,
            "guidance_scale": case.guidance,
            "height": case.px,
            "width": case.px,
            "use_resolution_binning": False,
            "output_type": "latent",
            "return_dict": False,
        }
        self._noise = given(arrays, "noise", dtype)

    def run(self) -> None:
        (self._latents,) = self._pipeline(latents=self._noise, **self._how)
        settle()

    def result(self) -> dict[str, np.ndarray]:
        return {"latents": self._latents.permute(0, 2, 3, 1).float().cpu().numpy()}

    def facts(self) -> dict:
        return {}


class Draw:
    """From prompts to PNG files. Text encoder and VAE, of random numbers, are compiled where the
    transformer is."""

    def __init__(self, case: Case, how: dict, folder: str, arrays: dict[str, np.ndarray]):
        from pixart_jax.text import word_tokenizer

        dtype = getattr(torch, case.dtype)
        encoder, vae = _text_encoder(case, dtype), _vae(case, dtype)
        model = compiled(opened(folder, dtype).eval().requires_grad_(False), how)
        if how["compile"] != "none":
            options = {"backend": how.get("backend", "inductor"), "dynamic": False}
            encoder.forward = torch.compile(encoder.forward, **options)
            vae.decode = torch.compile(vae.decode, **options)
        self._pipeline = PixArtAlphaPipeline(
            word_tokenizer(WORDS), encoder, vae, model, DPMSolverMultistepScheduler(**BETAS)
        ).to(DEVICE)
        self._pipeline.set_progress_bar_config(disable=True)
        self._case, self._out = case, Path(tempfile.mkdtemp(prefix="drawn."))
        self._prompts = [PROMPTS[n % len(PROMPTS)] for n in range(case.batch)]

    def run(self) -> None:
        case = self._case
        images = self._pipeline(
            self._prompts,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            height=case.px,
            width=case.px,
            use_resolution_binning=False,
            clean_caption=False,
            max_sequence_length=case.text_tokens,
        ).images
        for number, image in enumerate(images):
            image.save(self._out / f"{number}.png")

    def result(self) -> dict[str, np.ndarray]:
        return {}

    def facts(self) -> dict:
        return {}


def _random(build, dtype):
    """build()'s model with normal numbers, made on the device in the dtype."""
    with torch.device("meta"):
        model = build()
    model = model.to(dtype).to_empty(device=DEVICE).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def _text_encoder(case: Case, dtype):
    from transformers import T5Config, T5EncoderModel

    sizes = {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
    }
    if case.model == TINY:
        sizes = {
            "vocab_size": 96,
            "d_model": case.config.caption_width,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
        }
    return _random(
        lambda: T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0)),
        dtype,
    )


def _vae(case: Case, dtype):
    channels, layers, groups = (
        ((8, 8, 8, 8), 1, 4) if case.model == TINY else ((128, 256, 512, 512), 2, 32)
    )
    return _random(
        lambda: AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=channels,
            layers_per_block=layers,
            norm_num_groups=groups,
            latent_channels=4,
        ),
        dtype,
    )


def open_case(case: Case, how: dict, folder: str, arrays: dict[str, np.ndarray]):
    if case.kind == "train":
        return Train(opened(folder, torch.float32), case, how, arrays, DEVICE)
    return {"forward": Forward, "sample": Sample, "draw": Draw}[case.kind](
        case, how, folder, arrays
    )


def limit(dtype: str) -> dict[str, float]:
    return limits.of_torch(dtype)


def described() -> dict:
    if DEVICE == "cuda":
        return {"platform": "gpu", "device": torch.cuda.get_device_name()}
    return {"platform": "cpu", "device": "cpu"}


def peak_device_bytes() -> int | None:
    """The highest use of the GPU's memory in this case; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def forget() -> None:
    """Between two cases: compiled graphs are let go, and peaks are counted anew."""
    torch._dynamo.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
