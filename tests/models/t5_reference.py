"""Weights of T5 models that a comparison can stand on, and measures of how far two are apart."""

from __future__ import annotations

import numpy as np
import torch

from pixart_jax.models.quantization import quantize
from pixart_jax.weights.quantization import applies
from pixart_jax.weights.table import flatten, unflatten


def drawn_anew(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with every weight drawn anew, so that none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 1
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator)
                * (0.3 if parameter.ndim == 1 else fan_in**-0.5)
            )
            if parameter.ndim == 1:
                parameter.add_(1.0)
    return model.eval()


def relative_error(ours, theirs) -> float:
    """Largest difference over the largest magnitude."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def rms_error(ours, theirs) -> float:
    """Root mean square of the difference over that of theirs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def quantized(params: dict) -> dict:
    """An encoder's float parameters → those of the encoder with quantization="int8", as a loader
    makes them one by one."""
    return unflatten(
        {
            path: quantize(leaf) if applies(path) else np.asarray(leaf)
            for path, leaf in flatten(params).items()
        }
    )
