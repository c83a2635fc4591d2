"""The peer's train step in PyTorch, as PixArt is trained: mse + vb, backward, clip, AdamW, EMA; in
bfloat16 under autocast.

diffusers has no trainer of PixArt: its model is its own, gradient checkpointing is its own (each
block, as our remat 'full'), the loss is written out here, in the form of the published code (means
and log-variances), apart from ours.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from benchmarks.speed.cases import Case
from benchmarks.speed.inputs import SCALING_FACTOR
from pixart_jax.config import ObjectiveConfig, OptimizerConfig

OBJECTIVE, OPTIMIZER = ObjectiveConfig(), OptimizerConfig()


class Process(torch.nn.Module):
    """The diffusion's tables, and the loss of a model's output [b, 2c, h, w]."""

    def __init__(self):
        super().__init__()
        betas = np.linspace(
            OBJECTIVE.beta_start, OBJECTIVE.beta_end, OBJECTIVE.timesteps, dtype=np.float64
        )
        cumprod = np.cumprod(1 - betas)
        before = np.append(1.0, cumprod[:-1])
        variance = betas * (1 - before) / (1 - cumprod)
        tables = {
            "signal": np.sqrt(cumprod),
            "noise": np.sqrt(1 - cumprod),
            "of_x0": betas * np.sqrt(before) / (1 - cumprod),
            "of_x_t": (1 - before) * np.sqrt(1 - betas) / (1 - cumprod),
            "smallest": np.log(np.append(variance[1], variance[1:])),
            "largest": np.log(betas),
        }
        for name, values in tables.items():
            self.register_buffer(name, torch.from_numpy(values).float())

    def at(self, name: str, t: torch.Tensor) -> torch.Tensor:
        return getattr(self, name)[t][:, None, None, None]

    def noised(self, x0, noise, t):
        return self.at("signal", t) * x0 + self.at("noise", t) * noise

    def loss(self, output, x0, x_t, noise, t):
        """mse + vb in bits, the mean over the batch."""
        predicted, fraction = output.float().chunk(2, dim=1)
        mse = (noise - predicted).square().mean((1, 2, 3))
        frozen = predicted.detach()  # vb teaches the variance alone
        implied = (x_t - self.at("noise", t) * frozen) / self.at("signal", t)
        true_mean = self.at("of_x0", t) * x0 + self.at("of_x_t", t) * x_t
        model_mean = self.at("of_x0", t) * implied + self.at("of_x_t", t) * x_t
        fraction = (fraction + 1) / 2
        true_log = self.at("smallest", t)
        model_log = fraction * self.at("largest", t) + (1 - fraction) * true_log
        kl = 0.5 * (
            -1
            + model_log
            - true_log
            + (true_log - model_log).exp()
            + (true_mean - model_mean).square() * (-model_log).exp()
        )
        vb = torch.where(
            t == 0, self._likelihood(x0, model_mean, 0.5 * model_log), kl.mean((1, 2, 3))
        )
        return (mse + vb / math.log(2)).mean()

    @staticmethod
    def _likelihood(x, mean, log_scale):
        """Negative log-likelihood of cells of 1/255 under the model's Gaussian, Φ in tanh form."""

        def below(value):
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

        narrow = (-log_scale).exp()
        upper, lower = below(narrow * (x - mean + 1 / 255)), below(narrow * (x - mean - 1 / 255))
        probability = torch.where(
            x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower)
        )
        return -probability.clamp(min=1e-12).log().mean((1, 2, 3))


class Train:
    """how["checkpointing"]: whether each block is computed again in the backward pass.
    how["compile"], how["backend"]: see peer.py."""

    def __init__(self, model, case: Case, how: dict, arrays: dict[str, np.ndarray], device: str):
        self._device, self._wide = device, case.dtype == "float32"
        self._model = model.train()
        if how["checkpointing"]:
            model.enable_gradient_checkpointing()
        self._process = Process().to(device)
        self._parameters = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        o = OPTIMIZER
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=o.learning_rate,
            betas=(o.b1, o.b2),
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=True,
        )
        if how["compile"] == "blocks":
            for block in model.transformer_blocks:
                block.compile(backend=how.get("backend", "inductor"), dynamic=False)
        self._loss = self._loss_of_batch
        if how["compile"] == "whole":
            self._loss = torch.compile(
                self._loss_of_batch, backend=how.get("backend", "inductor"), dynamic=False
            )

        def latents(name):
            return torch.from_numpy(arrays[name]).permute(0, 3, 1, 2).contiguous().to(device)

        self._mean, self._std = latents("mean"), latents("std")
        # as ours holds a batch
        self._states = torch.from_numpy(arrays["text_states"]).to(device, torch.bfloat16)
        self._null = torch.from_numpy(arrays["null_caption"][: case.text_tokens]).to(device)
        self._mask = (
            (torch.arange(case.text_tokens) < torch.from_numpy(arrays["text_lengths"])[:, None])
            .float()
            .to(device)
        )
        self._told = {"resolution": None, "aspect_ratio": None}
        if case.multi_scale:
            size, ratio = (
                torch.from_numpy(arrays[name]).to(device) for name in ("size", "aspect_ratio")
            )
            self._told = {"resolution": size, "aspect_ratio": ratio[:, None]}
        dropped = torch.from_numpy(np.array(arrays["first_dropped"])).to(device)
        times = torch.from_numpy(np.array(arrays["first_t"])).long().to(device)
        self._given = (latents("first_x0"), latents("first_noise"), times, dropped)
        self._first: dict[str, np.ndarray] = {}

    def _draws(self):
        """A step's x0, noise, times and dropped captions: the given ones for the first step, random
        ones later."""
        if not self._first:
            return self._given
        x0 = (self._mean + self._std * torch.randn_like(self._mean)) * SCALING_FACTOR
        t = torch.randint(OBJECTIVE.timesteps, (len(x0),), device=self._device)
        dropped = torch.rand(len(x0), device=self._device) < OBJECTIVE.condition_dropout
        return x0, torch.randn_like(x0), t, dropped

    def _loss_of_batch(self, x0, noise, t, dropped):
        states = torch.where(dropped[:, None, None], self._null, self._states.float())
        x_t = self._process.noised(x0, noise, t)
        with torch.autocast(self._device, torch.bfloat16, enabled=not self._wide):
            (output,) = self._model(
                x_t,
                states,
                timestep=t,
                added_cond_kwargs=self._told,
                encoder_attention_mask=self._mask,
                return_dict=False,
            )
        return self._process.loss(output, x0, x_t, noise, t)

    def run(self) -> None:
        loss = self._loss(*self._draws())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, OPTIMIZER.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._parameters, 1 - OPTIMIZER.ema)
        loss, norm = float(loss), float(norm)  # waits for the device, as a loop that logs them does
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._first = self._first or {"loss": np.asarray(loss), "grad_norm": np.asarray(norm)}

    def result(self) -> dict[str, np.ndarray]:
        return self._first

    def facts(self) -> dict:
        return {}
