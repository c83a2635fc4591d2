"""Weights for transformers' T5 models that a comparison can stand on."""

from __future__ import annotations

import torch


def drawn_anew(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with every weight drawn anew, so that none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim == 1 else fan_in**-0.5))
            if parameter.ndim == 1:
                parameter.add_(1.0)
    return model.eval()
