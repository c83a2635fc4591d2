"""From flags to an engine: what the commands serve and mcp and the Ray Serve app open."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import tyro

from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.files import bundled, find
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.pipeline import Pipeline, folder
from pixart_jax.pipeline.lora_flags import LoraFlags
from pixart_jax.remote_path import Location, located
from pixart_jax.serving.engine import Engine, Limits
from pixart_jax.serving.offer import MAX_COUNT, Offer
from pixart_jax.serving.renderer import PipelineRenderer
from pixart_jax.weights.component import controlnet_of


@dataclasses.dataclass(frozen=True)
class EngineFlags:
    """The model, and what may be asked of it."""

    model: Location = dataclasses.field(default_factory=lambda: bundled("assets") / "shapes")
    """A diffusers folder or hub id; by default the small model that is shipped."""
    variant: str | None = None
    """Of the weights' files, such as fp16."""
    loras: tyro.conf.OmitArgPrefixes[LoraFlags] = LoraFlags()
    controlnet: str = "auto"
    """A ControlNet's folder, hub id or file, of this model; auto: the shipped model's; none."""
    dtype: str = "auto"
    """Of the computation: float32 or bfloat16; auto: bfloat16 on accelerators."""
    text_encoder_int8: bool = False
    """Hold the text encoder's matrices as int8."""
    weights_cache: str = "auto"
    """A folder of converted large weights; auto: one in $PIXART_JAX_CACHE; none."""
    mesh: str = "data=-1"
    """How the devices split the work, as sample.py's."""
    sizes: tuple[str, ...] = ()
    """WIDTHxHEIGHT that may be asked for, the default first; by default the model's buckets."""
    steps_allowed: tuple[int, ...] = ()
    """Numbers of steps that may be asked for."""
    solvers: tuple[str, ...] = ()
    """Solvers that may be asked for, the default first."""
    max_prompt_chars: int = 4000
    """Characters of a prompt at most."""
    limits: tyro.conf.OmitArgPrefixes[Limits] = Limits()

    def __post_init__(self):
        values = {"max_prompt_chars": self.max_prompt_chars, **dataclasses.asdict(self.limits)}
        for name in ("batch_size", "max_queue", "max_prompt_chars", "max_programs", "timeout"):
            if not values[name] >= 1:
                raise UserError(f"{name} {values[name]}: at least 1 is needed")
        queue, batch = self.limits.max_queue, self.limits.batch_size
        if queue < batch:
            raise UserError(f"max queue {queue}: at least a batch of {batch} is needed")

    def build(self, on_failure: Callable[[Exception], None] = lambda error: None):
        """(Engine, Offer), not started; no weight is read. Raises UserError for a model, adapter or
        option that cannot be used."""
        model = folder.ModelFolder.open(self.model, variant=self.variant)
        model.check_weights()
        adapters = self.loras.read(model.transformer)
        names = [adapter.name for adapter, _ in adapters]
        if len(set(names)) < len(names):
            raise UserError(f"two adapters of one name ({', '.join(names)}): rename a file")
        control = self._controlnet()
        if control is not None:
            controlnet_of(control, model.transformer)
        dtype = folder.compute_dtype(self.dtype)
        config = MeshConfig.parse(self.mesh)
        mesh = make_mesh(config, jax.local_devices())
        offer = Offer.of(
            model,
            sizes=[_parse_size(text) for text in self.sizes],
            steps=self.steps_allowed,
            solvers=self.solvers,
            max_count=min(MAX_COUNT, 2 * self.limits.batch_size),
            max_prompt_chars=self.max_prompt_chars,
            adapters=names,
            controlnets=() if control is None else (control.name,),
            recorded={
                "dtype": dtype,
                "model": model.name,
                "model_hash": model.fingerprint("transformer"),
                **({"text_encoder": "int8"} if self.text_encoder_int8 else {}),
            },
        )

        def open_renderer():
            pipe = Pipeline.from_pretrained(
                model,
                jnp.dtype(dtype).type,
                mesh if mesh.size > 1 else None,
                quantization="int8" if self.text_encoder_int8 else None,
                cache=folder.weights_cache(self.weights_cache),
                controlnet=control,
            )
            pipe = pipe.replace(context_attention=config.context_attention)
            for adapter, _ in adapters:
                pipe.load_lora_weights(adapter, adapter.name)
            return PipelineRenderer(pipe, offer, self.limits.batch_size)

        warm_up = [offer.generation("a picture", seed=0)]
        return Engine(open_renderer, warm_up, self.limits, on_failure), offer

    def _controlnet(self) -> Location | None:
        if self.controlnet != "auto":
            return None if self.controlnet == "none" else located(self.controlnet)
        shipped = bundled("assets").resolve()
        own = find(self.model).resolve() == shipped / "shapes"
        return shipped / "shapes_control" if own else None


def _parse_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if found is None:
        raise UserError(f"size {text!r}: WIDTHxHEIGHT is needed, such as 1024x768")
    return int(found[2]), int(found[1])
