"""The LoRAs that a command is given: which, how strong, and what is recorded of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import tyro

from pixart_jax.errors import UserError

if TYPE_CHECKING:
    from pixart_jax.models.configs import TransformerConfig
    from pixart_jax.pipeline import Pipeline
    from pixart_jax.weights.lora import Adapter


@dataclasses.dataclass(frozen=True)
class LoraFlags:
    """Adapters of the transformer."""

    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA's file, folder or hub id, as PATH or PATH:WEIGHT; give it again for each of several,
    which add up. Layouts of peft, diffusers, OneTrainer and ComfyUI are read."""
    lora_alpha: float | None = None
    """The alpha of LoRA files that do not say theirs, by default their rank; 8 in those of PixArt's
    own training scripts."""

    def read(self, config: TransformerConfig) -> list[tuple[Adapter, float]]:
        """(adapter, weight) of each. Raises UserError for one that cannot be read, is of another
        model, or cannot be added to the others."""
        if not self.lora:
            return []
        from flax import linen as nn

        from pixart_jax.models.lora import combine
        from pixart_jax.weights import lora
        from pixart_jax.weights.component import Transformer

        shapes, found = nn.unbox(Transformer.param_shapes(config)), []
        for text in self.lora:
            path, weight = _path_and_weight(text)
            found.append((lora.read(path, shapes, alpha=self.lora_alpha), weight))
        combine([adapter.tree for adapter, _ in found], [weight for _, weight in found])
        return found


def settings(adapters: list[tuple[Adapter, float]]) -> dict[str, Any]:
    """What an image records of its adapters."""
    each = [{"name": a.name, "hash": a.digest, "weight": weight} for a, weight in adapters]
    return {"lora": each} if each else {}


def load(pipe: Pipeline, adapters: list[tuple[Adapter, float]]) -> None:
    """Make them the pipeline's active adapters."""
    for n, (adapter, _) in enumerate(adapters):
        pipe.load_lora_weights(adapter, str(n))
    pipe.set_adapters([*pipe.adapters.loaded], [weight for _, weight in adapters])


def _path_and_weight(text: str) -> tuple[str, float]:
    path, colon, last = text.rpartition(":")
    try:
        weight = float(last) if colon else 1.0
    except ValueError:  # a colon in the path
        return text, 1.0
    if not path and colon or not abs(weight) < 3e38:
        raise UserError(f"--lora {text}: PATH or PATH:WEIGHT is needed, the weight a finite number")
    return (path if colon else text), weight
