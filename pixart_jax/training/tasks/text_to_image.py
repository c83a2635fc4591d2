"""Task 'text_to_image': the PixArt transformer learns to denoise latents under captions (stages 2
and 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pixart_jax.config import Config, PreviewConfig, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.parallel.gather import gather_to_host
from pixart_jax.parallel.mesh import batch_shards
from pixart_jax.pipeline import Pipeline
from pixart_jax.pipeline.folder import write_model
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.training.dreambooth import CLASS, prompts
from pixart_jax.training.frozen import Frozen, start_folder
from pixart_jax.training.tasks.denoising import DiffusionObjective, stage_model
from pixart_jax.weights.component import Transformer, load_component

Text = tuple[jax.Array, jax.Array]  # states [b, l, c] fp32, lengths [b] int32
# fields of a model's config that its parameters do not depend on, and which a stage may change
_FREE = ("sample_size", "position_base", "position_scale", "attention_backend")
_PREVIEWS = 8  # images of a sheet where the config names no prompts


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """Batches as data.encoded makes them: mean, std, text_states, text_lengths, size, aspect_ratio;
    with DreamBooth's prior preservation those of class images beside them (training/dreambooth.py).

    null_length: 0 where a dropped caption keeps its own length under the null caption (official);
    else the length of the states of "", which are then the null caption. sampling: the defaults of
    the exported folder.
    """

    module: PixArtTransformer
    denoising: DiffusionObjective
    frozen: Frozen
    null_length: int
    stage: StageConfig
    sampling: SamplingConfig = SamplingConfig()

    @classmethod
    def from_config(
        cls, config: Config, stage: StageConfig, dtype: jnp.dtype, frozen: Frozen
    ) -> Self:
        """The transformer of config.model at the stage's positions."""
        tokens = config.model.text_tokens
        if stage.data.max_text_tokens > tokens:
            raise UserError(
                f"stage {stage.name}: max_text_tokens = {stage.data.max_text_tokens}: the model "
                f"reads at most {tokens}"
            )
        module = PixArtTransformer(
            stage_model(config.model, stage),
            dtype=dtype,
            remat=config.remat,
            context_attention=config.mesh.context_attention,
        )
        empty = stage.objective.null_condition == "empty"
        null_length = len(frozen.text_states([""], tokens)[0]) if empty else 0
        denoising = DiffusionObjective(stage.objective, *frozen.scaling)
        sampling = SamplingConfig(guidance=config.preview.guidance)
        return cls(module, denoising, frozen, null_length, stage, sampling)

    def init(self, key: jax.Array):
        """Fresh boxed parameters; also for jax.eval_shape."""
        c = self.module.config
        latents = jnp.zeros((1, c.patch_size, c.patch_size, c.in_channels))
        text = jnp.zeros((1, 1, c.caption_width)), jnp.ones((1,), jnp.int32)
        return self.module.init(
            key, latents, jnp.zeros((1,)), *text, jnp.ones((1, 2)), jnp.ones((1,))
        )["params"]

    def on_stage_start(self, params, base=None):
        """The null caption is the states of "" where the config says so."""
        if not self.null_length:
            return params
        tokens = self.module.config.text_tokens
        (states,) = self.frozen.text_states([""], tokens)
        null = np.zeros((tokens, states.shape[-1]), np.float32)
        null[: len(states)] = states
        return {**params, "null_caption": jnp.asarray(null)}

    def losses(self, params, batch, keys, base=None) -> dict[str, jax.Array]:
        """loss = mse + vb, one value a sample; of pairs that of the subject's picture, and the loss
        of the class image, "prior", added with its weight."""
        return self.losses_of({"params": params}, batch, keys)

    def losses_of(self, variables, batch, keys, rngs=None) -> dict[str, jax.Array]:
        """:meth:`losses` of the module's variable collections, with random numbers for it."""
        others = {
            name.removeprefix(CLASS): x for name, x in batch.items() if name.startswith(CLASS)
        }
        subject = self.stage.dreambooth
        if not others or subject is None:
            return self._losses(variables, batch, keys, rngs)
        # neighbours in one batch; prepare() splits a key in four
        own = {name: batch[name] for name in others}
        second = jax.vmap(lambda key: jax.random.fold_in(key, 5))(keys)
        both, keys = jax.tree.map(_interleaved, (own, keys), (others, second))
        terms = self._losses(variables, both, keys, rngs)
        own, others = ({name: x[i::2] for name, x in terms.items()} for i in (0, 1))
        loss = own["loss"] + subject.prior_weight * others["loss"]
        return {**own, "loss": loss, "prior": others["loss"]}

    def _losses(self, variables, batch, keys, rngs) -> dict[str, jax.Array]:
        params = variables["params"]
        noised = self.denoising.prepare(batch, keys)
        text = where_dropped(noised.dropped, *self.texts(params, batch))
        params = Transformer.cast_for_compute(params, self.module.dtype)
        size = batch["size"], batch["aspect_ratio"]
        arguments = noised.x_t, noised.t.astype(jnp.float32), *text, *size
        output = self.evaluate({**variables, "params": params}, rngs, noised.condition, *arguments)
        return self.denoising.losses(output, noised)

    def texts(self, params, batch) -> tuple[Text, Text]:
        """A batch's captions, and as many null captions of these parameters, without gradient."""
        states, lengths = batch["text_states"].astype(jnp.float32), batch["text_lengths"]
        null = jax.lax.stop_gradient(params["null_caption"])[: states.shape[1]]
        own = jnp.full_like(lengths, self.null_length) if self.null_length else lengths
        return (states, lengths), (jnp.broadcast_to(null, states.shape), own)

    def evaluate(self, variables, rngs, condition: jax.Array | None, *arguments) -> jax.Array:
        """The module's output; arguments: of its call."""
        return self.module.apply(variables, *arguments, rngs=rngs)

    def preview(
        self, params, batch, settings: PreviewConfig, base=None
    ) -> tuple[list[np.ndarray], list[str]]:
        """An image a prompt of the settings, at the batch's size; without prompts, of the batch's
        own captions."""
        tokens = self.module.config.text_tokens
        if captions := [*prompts(self.stage.dreambooth), *settings.prompts]:
            texts = self.frozen.text_states(captions, tokens)
        else:
            captions = [str(key) for key in batch["key"][:_PREVIEWS]]
            rows = zip(batch["text_states"], batch["text_lengths"], strict=True)
            texts = [np.asarray(states[:n], np.float32) for states, n in rows][:_PREVIEWS]
        (empty,) = self.frozen.text_states([""], tokens)
        length = -(-max(len(text) for text in [*texts, empty]) // 8) * 8
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        mesh, parts = (None, 1) if mesh.size == 1 else (mesh, batch_shards(mesh))
        count = -(-len(texts) // parts) * parts
        texts += [texts[-1]] * (count - len(texts))
        pipeline = self.pipeline(params, mesh)
        height, width = (n * pipeline.factor for n in np.shape(batch["mean"])[1:3])
        noise, keys = pipeline.noise(settings.seed, range(count), height, width)
        latents = pipeline.denoise(
            *_padded(texts, length),
            noise,
            *_padded([empty] * count, length),
            steps=settings.steps,
            guidance=settings.guidance,
            solver=self.sampling.solver,
            keys=keys,
            control=self.condition(batch, count),
        )
        return list(gather_to_host(pipeline.decode(latents)))[: len(captions)], captions

    def pipeline(self, params, mesh: Mesh | None) -> Pipeline:
        """From text states to images, for previews."""
        parts = self.component(params), None, self.frozen.vae, None
        return Pipeline(*parts, self.denoising.scheduler, mesh=mesh)

    def condition(self, batch, count: int) -> jax.Array | None:
        """What previews are controlled by."""
        return None

    def component(self, params):
        """The transformer bound to parameters, as load_component gives one."""
        return Transformer(self.module.config, params, self.module.dtype)

    def export(self, params, folder: Path, batches) -> None:
        """The whole model, as diffusers' PixArtAlphaPipeline and Pipeline.from_pretrained open
        it."""
        write_model(
            folder,
            transformer=self.component(params),
            text_encoder=self.frozen.copied("text_encoder"),
            vae=self.frozen.copied("vae"),
            tokenizer=self.frozen.tokenizer,
            scheduler=self.denoising.scheduler,
            sampling=self.sampling,
        )


@dataclasses.dataclass(frozen=True)
class TextToImageOverBase(TextToImage):
    """Training on top of a frozen model, as a LoRA or a ControlNet: the base, a separate argument
    of the step, is the model that the stage starts from, kernels in the compute dtype and the rest
    fp32."""

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
        folder, stage = start_folder(self.stage), f"stage {self.stage.name}"
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

    def masters(self, base: Mapping) -> Mapping:
        """The base in fp32, read once more where it is held in another dtype."""
        if self.module.dtype == jnp.float32:
            return base
        mesh = jax.tree.leaves(base)[0].sharding.mesh
        wide = load_component(start_folder(self.stage), jnp.float32, mesh).params
        return {**wide, "null_caption": base["null_caption"]}

    def _check(self, found: Any, where: str) -> None:
        ours = self.module.config
        if not isinstance(found, TransformerConfig):
            raise UserError(f"{where} holds no text-to-image transformer")
        names = (f.name for f in dataclasses.fields(ours) if f.name not in _FREE)
        pairs = ((name, getattr(found, name), getattr(ours, name)) for name in names)
        differing = [f"{n} is {a} there and {b} in the config" for n, a, b in pairs if a != b]
        if differing:
            raise UserError(f"{where} is another model: {'; '.join(differing[:3])}")


def where_dropped(dropped: jax.Array, text: Text, null: Text) -> Text:
    """The null caption in the rows that are dropped, bool [b]."""
    states = jnp.where(dropped[:, None, None], null[0], text[0])
    return states, jnp.where(dropped, null[1], text[1])


def _interleaved(a: jax.Array, b: jax.Array) -> jax.Array:
    """Two arrays [n, …] → [2n, …], their rows in turn."""
    return jnp.stack([a, b], 1).reshape(2 * len(a), *a.shape[1:])


def _padded(texts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ragged states → (fp32 [b, length, c], lengths int32 [b])."""
    states = np.zeros((len(texts), length, texts[0].shape[-1]), np.float32)
    for row, text in zip(states, texts, strict=True):
        row[: len(text)] = text
    return states, np.array([len(text) for text in texts], np.int32)
