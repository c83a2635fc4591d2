"""The peer's side of a contest: diffusers' PixArt in PyTorch, eager or through torch.compile.

options["compile"]: 'none' (eager), 'whole' (the transformer as one graph), 'blocks' (each block,
compiled once for all of them: the same kernels in far less compile time). options["backend"]: of
torch.compile; rehearsals take one that compiles nothing. Training is diffusers' model with its own
gradient checkpointing (options["checkpointing"]: each block, as our remat 'full'), torch's fused
AdamW and, in bfloat16, autocast over fp32 parameters.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)

from benchmarks.parity_rows.controlnet import research_code
from benchmarks.speed import machine
from benchmarks.speed.cases import WORDS, Arrays, Case, Work
from benchmarks.speed.inputs import SCALING_FACTOR
from benchmarks.speed.peer_loss import OBJECTIVE, DiffusionLoss
from pixart_jax.config import OptimizerConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# TF32 where a GPU has it, as jax multiplies fp32 there by default
torch.set_float32_matmul_precision("high")
BETAS: dict[str, Any] = dict(
    beta_start=1e-4, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000
)
limits = machine.torch_limits


def tensor(arrays: Arrays, name: str, dtype=None) -> torch.Tensor:
    """An array of the case on the device; latents with channels first."""
    found = torch.from_numpy(np.array(arrays[name])).to(DEVICE, dtype)
    return found.permute(0, 3, 1, 2).contiguous() if found.ndim == 4 else found


def latents_of(output: torch.Tensor) -> np.ndarray:
    return output.permute(0, 2, 3, 1).float().cpu().numpy()


def mask(arrays: Arrays, lengths: str, width: int) -> torch.Tensor:
    """[b, l] of ones and zeros."""
    return (torch.arange(width) < torch.from_numpy(arrays[lengths])[:, None]).float().to(DEVICE)


def conditions(case: Case, arrays: Arrays, dtype=None) -> dict[str, Any]:
    """The arguments of the transformer beside latents, states and timestep."""
    size = ratio = None
    if case.multi_scale:
        size, ratio = (tensor(arrays, name, dtype) for name in ("size", "aspect_ratio"))
        ratio = ratio[:, None]
    return {
        "added_cond_kwargs": {"resolution": size, "aspect_ratio": ratio},
        "encoder_attention_mask": mask(arrays, "text_lengths", case.text_tokens),
        "return_dict": False,
    }


def opened(folder: str, dtype) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=dtype).to(DEVICE)


def how_compiled(options: dict) -> dict[str, Any]:
    """torch.compile's arguments; shapes are static, as in the jitted program beside it."""
    return {"backend": options.get("backend", "inductor"), "dynamic": False}


def frozen(folder: str, dtype, options: dict):
    """The transformer to evaluate, compiled as options["compile"] says."""
    model = opened(folder, dtype).eval().requires_grad_(False)
    if options["compile"] == "whole":
        return torch.compile(model, **how_compiled(options))
    if options["compile"] == "blocks":
        for block in model.transformer_blocks:
            block.compile(**how_compiled(options))
    return model


def forward(case: Case, options: dict, folder: str, arrays: Arrays) -> Work:
    """One evaluation of the transformer."""
    dtype = getattr(torch, case.dtype)
    model, more = frozen(folder, dtype, options), conditions(case, arrays, dtype)
    latents, states = (tensor(arrays, name, dtype) for name in ("noise", "text_states"))
    timestep = tensor(arrays, "timesteps")

    def run():
        with torch.no_grad():
            return model(latents, states, timestep=timestep, **more)[0]

    return Work(run, lambda output: {"output": latents_of(output)})


def control(case: Case, options: dict, folder: str, arrays: Arrays) -> Work:
    """:func:`forward` under a ControlNet, by diffusers' research code in options["checkout"]."""
    research, dtype = research_code(Path(options["checkout"])), getattr(torch, case.dtype)
    base, kernels = opened(folder, dtype).eval(), torch.from_numpy(arrays["projections"])
    adapter = research.PixArtControlNetAdapterModel(num_layers=0)
    sizes = ("num_attention_heads", "attention_head_dim", "cross_attention_dim")
    fields = {name: getattr(base.config, name) for name in sizes}
    for n, kernel in enumerate(kernels[:-1]):
        unit = research.PixArtControlNetAdapterBlock(n, **fields)
        unit.transformer_block.load_state_dict(base.transformer_blocks[n].state_dict())
        unit.after_proj.weight.data = kernel.T
        adapter.controlnet_blocks.append(unit)
    adapter.controlnet_blocks[0].before_proj.weight.data = kernels[-1].T
    adapter = adapter.to(DEVICE, dtype)
    units = len(adapter.controlnet_blocks)
    both = research.PixArtControlNetTransformerModel(base, adapter, blocks_num=units)
    model = both.requires_grad_(False)
    if options["compile"] != "none":
        model = torch.compile(model, **how_compiled(options))
    names = ("noise", "text_states", "control")
    latents, states, condition = (tensor(arrays, name, dtype) for name in names)
    more = conditions(case, arrays, dtype) | {"controlnet_cond": condition}
    timestep = tensor(arrays, "timesteps")

    def run():
        with torch.no_grad():
            return model(latents, states, timestep=timestep, **more)[0]

    return Work(run, lambda output: {"output": latents_of(output)})


def pipeline_of(model, tokenizer=None, text_encoder=None, vae=None) -> PixArtAlphaPipeline:
    scheduler = DPMSolverMultistepScheduler(**BETAS)
    pipeline = PixArtAlphaPipeline(tokenizer, text_encoder, vae, model, scheduler).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(case: Case, options: dict, folder: str, arrays: Arrays) -> Work:
    """PixArtAlphaPipeline from given text states and noise to latents, with its DPM-Solver++."""
    dtype, width = getattr(torch, case.dtype), case.text_tokens
    pipeline, noise = pipeline_of(frozen(folder, dtype, options)), tensor(arrays, "noise", dtype)
    how: dict[str, Any] = {
        "prompt_embeds": tensor(arrays, "text_states", dtype),
        "prompt_attention_mask": mask(arrays, "text_lengths", width),
        "negative_prompt_embeds": tensor(arrays, "negative_states", dtype),
        "negative_prompt_attention_mask": mask(arrays, "negative_lengths", width),
    }
    how |= {"prompt": None, "negative_prompt": None, "output_type": "latent", **sizes_of(case)}
    return Work(
        lambda: pipeline(latents=noise, return_dict=False, **how)[0],
        lambda latents: {"latents": latents_of(latents)},
    )


def sizes_of(case: Case) -> dict[str, Any]:
    how = {"num_inference_steps": case.steps, "guidance_scale": case.guidance}
    return {**how, "height": case.px, "width": case.px, "use_resolution_binning": False}


def draw(case: Case, options: dict, folder: str, arrays: Arrays) -> Work:
    """From prompts to PNG files. Text encoder and VAE, of random parameters, are compiled where the
    transformer is."""
    from transformers import T5Config, T5EncoderModel

    from pixart_jax.text import word_tokenizer

    dtype = getattr(torch, case.dtype)
    t5 = T5Config(**case.t5, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    vae_fields: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
    }
    encoder = _random(lambda: T5EncoderModel(t5), dtype)
    vae = _random(lambda: AutoencoderKL(**vae_fields, **case.vae), dtype)
    if options["compile"] != "none":
        encoder.forward = torch.compile(encoder.forward, **how_compiled(options))
        vae.decode = torch.compile(vae.decode, **how_compiled(options))
    model = frozen(folder, dtype, options)
    pipeline = pipeline_of(model, word_tokenizer(WORDS), encoder, vae)
    out = Path(tempfile.mkdtemp(prefix="images."))
    how = sizes_of(case) | {"clean_caption": False, "max_sequence_length": case.text_tokens}

    def run() -> None:
        for number, image in enumerate(pipeline(case.prompts, **how).images):
            image.save(out / f"{number}.png")

    return Work(run, lambda _: {})


def _random(build, dtype):
    """build()'s model with normal parameters, made on the device in the dtype."""
    with torch.device("meta"):
        model = build()
    model = model.to(dtype).to_empty(device=DEVICE).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def train(case: Case, options: dict, folder: str, arrays: Arrays) -> Work:
    """Train steps: forward, backward, clip, AdamW, EMA; the first on the draws of our first."""
    model, diffusion, o = opened(folder, torch.float32).train(), DiffusionLoss(), OptimizerConfig()
    diffusion.to(DEVICE)
    if options["checkpointing"]:
        model.enable_gradient_checkpointing()
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    rates: dict[str, Any] = dict(lr=o.learning_rate, eps=o.eps, weight_decay=o.weight_decay)
    optimizer = torch.optim.AdamW(parameters, betas=(o.b1, o.b2), **rates, fused=True)

    # as ours holds a batch
    text = tensor(arrays, "text_states", torch.bfloat16)
    null = tensor(arrays, "null_caption")[: case.text_tokens]
    mean, std, more = tensor(arrays, "mean"), tensor(arrays, "std"), conditions(case, arrays)
    x0, noise, t, dropped = (
        tensor(arrays, f"first_{name}") for name in ("x0", "noise", "t", "dropped")
    )
    first = (x0, noise, t.long(), dropped)

    def draws():
        x0 = (mean + std * torch.randn_like(mean)) * SCALING_FACTOR
        t = torch.randint(OBJECTIVE.timesteps, (len(x0),), device=DEVICE)
        dropped = torch.rand(len(x0), device=DEVICE) < OBJECTIVE.condition_dropout
        return x0, torch.randn_like(x0), t, dropped

    def loss_of(x0, noise, t, dropped):
        states = torch.where(dropped[:, None, None], null, text.float())
        x_t = diffusion.noised(x0, noise, t)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            (output,) = model(x_t, states, timestep=t, **more)
        return diffusion.loss(output, x0, x_t, noise, t)

    if options["compile"] == "blocks":
        for block in model.transformer_blocks:
            block.compile(**how_compiled(options))
    loss_call = loss_of
    if options["compile"] == "whole":
        loss_call = torch.compile(loss_of, **how_compiled(options))

    def run():
        nonlocal first
        loss = loss_call(*(first or draws()))
        first = None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, o.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - o.ema)
        # waits for the device, as a loop that logs them does
        return {"loss": np.asarray(loss.item()), "grad_norm": np.asarray(norm.item())}

    return Work(run, dict)


KINDS = {"forward": forward, "control": control, "sample": sample, "draw": draw, "train": train}


def described() -> dict[str, str]:
    if DEVICE == "cuda":
        return {"platform": "gpu", "device": torch.cuda.get_device_name()}
    return {"platform": "cpu", "device": "cpu"}


def wait(output):
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return output


def peak_device_bytes() -> int | None:
    """The peak of the GPU's memory in this case; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def forget() -> None:
    """Between two cases: drop compiled graphs and reset the peak."""
    torch._dynamo.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
