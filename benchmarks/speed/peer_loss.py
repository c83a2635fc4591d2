"""The training loss in PyTorch, in the published code's form (means and log-variances).

diffusers has no trainer of PixArt, so the peer's loss is written here, apart from ours.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from pixart_jax.config import ObjectiveConfig

OBJECTIVE = ObjectiveConfig()


class DiffusionLoss(torch.nn.Module):
    """The diffusion's tables, and the loss of a model's output [b, 2c, h, w]."""

    def __init__(self):
        super().__init__()
        o = OBJECTIVE
        betas = np.linspace(o.beta_start, o.beta_end, o.timesteps, dtype=np.float64)
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
        implied = (x_t - self.at("noise", t) * predicted.detach()) / self.at("signal", t)
        true_mean = self.at("of_x0", t) * x0 + self.at("of_x_t", t) * x_t
        model_mean = self.at("of_x0", t) * implied + self.at("of_x_t", t) * x_t
        fraction, true_log = (fraction + 1) / 2, self.at("smallest", t)
        model_log = fraction * self.at("largest", t) + (1 - fraction) * true_log
        square = (true_mean - model_mean).square() * (-model_log).exp()
        kl = 0.5 * (-1 + model_log - true_log + (true_log - model_log).exp() + square)
        likelihood = self._negative_log_likelihood(x0, model_mean, 0.5 * model_log)
        vb = torch.where(t == 0, likelihood, kl.mean((1, 2, 3)))
        return (mse + vb / math.log(2)).mean()

    @staticmethod
    def _negative_log_likelihood(x, mean, log_scale):
        """Of cells of 1/255 under the model's Gaussian, Φ in tanh form."""

        def below(value):
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

        narrow = (-log_scale).exp()
        upper, lower = below(narrow * (x - mean + 1 / 255)), below(narrow * (x - mean - 1 / 255))
        inside = torch.where(x > 0.999, 1 - lower, upper - lower)
        cell = torch.where(x < -0.999, upper, inside)
        return -cell.clamp(min=1e-12).log().mean((1, 2, 3))
