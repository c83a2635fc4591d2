"""Task 'controlnet': a ControlNet is learned over a text-to-image model that stays as it is.

Parameters are {"controlnet": tree}, in the form of models/controlnet.py, fp32. At first the copies
are the base's blocks and the projections zero, so that the first step trains the projections into
the base alone. A stage may instead start from a trained ControlNet.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pixart_jax.config import Config, PreviewConfig, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.configs import ControlNetConfig
from pixart_jax.models.controlnet import ControlledTransformer, config_of
from pixart_jax.pipeline import Pipeline
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.tasks.text_to_image import TextToImageOverBase
from pixart_jax.weights.component import ControlNet, load_component

KEY = "controlnet"
OFFICIAL = "official.safetensors"  # beside the folder's own weights, under the official names


@dataclasses.dataclass(frozen=True)
class TextToImageControl(TextToImageOverBase):
    """Batches also hold control_mean and control_std, of the conditions' posterior."""

    @classmethod
    def from_config(
        cls, config: Config, stage: StageConfig, dtype: jnp.dtype, frozen: Frozen
    ) -> Self:
        """As of the plain task, with as many copies as the released ones have."""
        plain = super().from_config(config, stage, dtype, frozen)
        model, context = plain.module.config, config.mesh.context_attention
        copies = config_of(model).depth
        module = ControlledTransformer(model, dtype, config.remat, context, units=copies)
        return dataclasses.replace(plain, module=module)

    @property
    def control_config(self) -> ControlNetConfig:
        return config_of(self.module.config)

    def init(self, key: jax.Array):
        """Fresh boxed parameters; also for jax.eval_shape."""
        module = ControlNet(self.control_config, {}, self.module.dtype).module
        return {KEY: module.init(key, *ControlNet._example(self.control_config))["params"]}

    def on_stage_start(self, params, base=None):
        """The copies are the base's blocks, in fp32; or all is that of the trained ControlNet."""
        count = self.control_config.depth
        if (trained := self.stage.controlnet) is not None:
            part = load_component(trained, jnp.float32)
            if (found := part.config.depth) != count:
                what = f"{trained} has {found} copies, and {count} are trained"
                raise UserError(f"stage {self.stage.name}: {what}")
            return {KEY: dict(part.params)}
        first = jax.jit(lambda tree: jax.tree.map(lambda a: a[:count], tree))
        copies = first(self.masters(base)["blocks"])
        units = {**params[KEY]["units"], "block": copies}
        return {KEY: {**params[KEY], "units": units}}

    def losses(self, params, batch, keys, base=None) -> dict[str, jax.Array]:
        """loss = mse + vb, one value a sample, of the base under control."""
        return self.losses_of({"params": {**base, "control": params[KEY]}}, batch, keys)

    def evaluate(self, variables, rngs, condition, *arguments) -> jax.Array:
        given = condition, 1.0, *arguments
        return self.module.apply(variables, *given, method="controlled", rngs=rngs)

    def preview(
        self, params, batch, settings: PreviewConfig, base=None
    ) -> tuple[list[np.ndarray], list[str]]:
        """As of the plain task, each image under the condition of a row of the batch."""
        return super().preview({**base, "control": params[KEY]}, batch, settings)

    def pipeline(self, params, mesh: Mesh | None) -> Pipeline:
        part = ControlNet(self.control_config, params["control"], self.module.dtype)
        base = {name: tree for name, tree in params.items() if name != "control"}
        return super().pipeline(base, mesh).replace(controlnet=part)

    def condition(self, batch, count: int) -> jax.Array:
        mean = np.asarray(batch["control_mean"], np.float32)
        return jnp.asarray(self.frozen.vae_config.scaled(mean[np.arange(count) % len(mean)]))

    def export(self, params, folder: Path, batches) -> None:
        """The ControlNet's folder, as diffusers' research code opens it, with a second file in it
        under the official names."""
        part = ControlNet(self.control_config, params[KEY])
        part.save(folder)
        part.save_official(folder / OFFICIAL)
