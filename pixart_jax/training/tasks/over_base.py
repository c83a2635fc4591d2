"""Training on top of a frozen text-to-image model: what the LoRA and ControlNet tasks share.

The model is the base, a separate argument of the step: kernels in the compute dtype, the rest fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.training.tasks.text_to_image import TextToImage
from pixart_jax.weights.component import Transformer, load_component
from pixart_jax.weights.hub import model_folder

# fields of a model's config that its parameters do not depend on, and which a stage may change
_FREE = ("sample_size", "position_base", "position_scale", "attention_backend")


@dataclasses.dataclass(frozen=True)
class TextToImageOverBase(TextToImage):
    """The base is the model in the folder, or of the hub id, that the stage starts from."""

    @property
    def base_folder(self) -> Path:
        """Of its transformer."""
        folder = model_folder(self.stage.start, ("transformer",))
        return folder / "transformer" if (folder / "transformer").is_dir() else folder

    @property
    def reads_null(self) -> bool:
        """Whether a step reads the null caption."""
        return self.denoising.objective.condition_dropout > 0

    def base_boxed(self) -> Mapping:
        """The model's parameters as shapes, boxed with axis names."""
        return Transformer.param_shapes(self.module.config, self.module.dtype)

    def base_shapes(self, mesh: Mesh) -> dict:
        """The base as shapes with shardings."""
        return dict(Transformer.abstract(self.module.config, self.module.dtype, mesh).params)

    def load_base(self, mesh: Mesh) -> dict:
        """The base on the mesh. UserError where the folder holds another model than the config's,
        or lacks the null caption that the stage drops captions for."""
        folder, stage = self.base_folder, f"stage {self.stage.name}"
        component = load_component(folder, self.module.dtype, mesh)
        self._check(component.config, f"{stage}: {folder}")
        params: dict = dict(component.params)
        if not self.null_length and "null_caption" not in params:
            if self.reads_null:
                raise UserError(
                    f"{stage}: {folder} holds no null caption to train dropped captions "
                    "with, or to guide by: objective.null_condition = 'empty' takes the text "
                    "encoder's states of an empty text"
                )
            shape = self.module.config.text_tokens, self.module.config.caption_width
            params["null_caption"] = np.zeros(shape, np.float32)
        params = TextToImage.on_stage_start(self, params)
        place = self.base_shapes(mesh)["null_caption"].sharding
        params["null_caption"] = jax.device_put(np.asarray(params["null_caption"]), place)
        return params

    def _check(self, found: Any, where: str) -> None:
        ours = self.module.config
        if not isinstance(found, TransformerConfig):
            raise UserError(f"{where} holds no text-to-image transformer")
        names = (f.name for f in dataclasses.fields(ours) if f.name not in _FREE)
        pairs = ((name, getattr(found, name), getattr(ours, name)) for name in names)
        differing = [f"{n} is {a} there and {b} in the config" for n, a, b in pairs if a != b]
        if differing:
            raise UserError(f"{where} is another model: {'; '.join(differing[:3])}")
