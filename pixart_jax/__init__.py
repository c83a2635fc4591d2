"""PixArt-α in JAX/Flax: text-to-image diffusion with a Transformer, trained in three stages at low
cost.

``Pipeline`` draws, ``load_component`` opens one part of a model folder, ``diffusion`` holds the
mathematics. Nothing heavy is imported until one of these names is used.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
__all__ = ["Pipeline", "diffusion", "load_component"]

_HOMES = {"Pipeline": "pixart_jax.pipeline", "load_component": "pixart_jax.weights.component"}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "diffusion":
        return importlib.import_module("pixart_jax.diffusion")
    raise AttributeError(f"module 'pixart_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
