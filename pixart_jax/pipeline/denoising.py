"""The deterministic half of a Pipeline: text states → latents → pixels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax import finite
from pixart_jax.diffusion.guidance import control_scales, pag_scales
from pixart_jax.diffusion.sampling import step_table
from pixart_jax.errors import UserError
from pixart_jax.models.transformer import TextKV
from pixart_jax.parallel.gather import gather_to_host, put_global
from pixart_jax.parallel.mesh import batch_shards
from pixart_jax.parallel.rules import on_mesh, row_sharding
from pixart_jax.pipeline import decoder, editing, sampler
from pixart_jax.pipeline.adapters import Adapters
from pixart_jax.pipeline.block_cache import make_plan
from pixart_jax.pipeline.prompt_encoder import PromptEncoder
from pixart_jax.pipeline.rows import Run, Seed, one_each, starting_noise
from pixart_jax.pipeline.sampling_config import SamplingConfig, check_seed
from pixart_jax.pipeline.scheduler import SchedulerConfig
from pixart_jax.pipeline.text_states import TextStates
from pixart_jax.pipeline.windows import Windows, plan_windows
from pixart_jax.text import clean_caption

Callback = Callable[[int, np.ndarray], None]


# Keys and values of negative prompts, cached a text: "" is encoded once, and an image does not
# depend on the negative prompts beside it. (text, what else they depend on) → (TextKV, its source)
NegativePrompts = dict[Hashable, tuple[TextKV, object]]
_CACHED = 4  # negative prompts that stay: 31 MB each for XL/2 in bfloat16


class DenoisingMethods:
    """Pipeline's methods from text states to pixels, on its fields."""

    transformer: Any
    text_encoder: Any
    vae: Any
    tokenizer: Any
    scheduler: SchedulerConfig
    mesh: jax.sharding.Mesh | None
    text_identity: Mapping[str, str]
    context_attention: str
    adapters: Adapters
    controlnet: Any
    _negatives: NegativePrompts

    @property
    def factor(self) -> int:
        """Pixels a latent, along a side."""
        return self.vae.config.factor

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The text half. Raises UserError without a text encoder."""
        if self.text_encoder is None:
            missing = "this pipeline has no text encoder"
            raise UserError(f"{missing}: give text_states, or open the folder with it")
        tokens = self.transformer.config.text_tokens
        identity = dict(self.text_identity)
        return PromptEncoder(self.text_encoder, self.tokenizer, tokens, self.mesh, identity)

    def noise(
        self, seed: Seed | Sequence[Seed], indices: Sequence[int], height: int, width: int
    ) -> tuple[jax.Array, jax.Array]:
        """(noise [n, h, w, c] fp32, keys [n] for solvers that add noise): image i's come from
        fold_in(key(seed), indices[i]) alone. seed: one, or one an image; the high word of one
        beyond 32 bits is folded in first."""
        seeds = [check_seed(value) for value in one_each("seed", seed, len(indices))]
        shape = (height // self.factor, width // self.factor, self.transformer.config.in_channels)
        noise, keys = starting_noise(seeds, indices, shape)
        return self._place(noise), self._place(keys)

    def denoise(
        self,
        text_states: jax.Array,
        text_lengths: jax.Array,
        noise: jax.Array,
        negative_states: jax.Array | None = None,
        negative_lengths: jax.Array | None = None,
        *,
        guidance: float | Sequence[float] | None = None,
        keys: jax.Array | None = None,
        size: jax.Array | None = None,
        aspect_ratio: jax.Array | None = None,
        callback: Callback | None = None,
        latents: jax.Array | None = None,
        mask: jax.Array | None = None,
        strength: float = 1.0,
        reference: bool = False,
        control: jax.Array | None = None,
        **options,
    ) -> jax.Array:
        """The deterministic core, one compiled scan: text states [b, l, c], lengths [b], noise [b,
        h, w, 4] → latents [b, h, w, 4].

        negative_states, negative_lengths: of the negative prompt, padded to any length; None: the
        states of "". Not read with guidance 1, which does no second pass. guidance: one number, or
        [b] without a 1. keys: [b], or one to fold with each row's number, for solvers that add
        noise; None adds none. size [b, 2] (height, width in pixels), aspect_ratio [b]: for models
        with size conditions; by default the image's own. latents: start from these [b, h, w, 4],
        scaled, min(int(steps · strength), steps) steps before the end (img2img). mask [b, h, w, 1]:
        generate anew where it is at least a half, from pure noise at strength 1; elsewhere the
        result is ``latents``, to the bit. reference: the unconditional half sees x before the known
        part is put into it, as the official reference pipeline does. control: the condition's
        latents [b, h, w, 4], scaled, for the ControlNet. options: steps, solver, times
        and the other fields of SamplingConfig; by default PixArt's values, not the model's own.
        Raises ``finite.NotFinite``, a UserError, which names the rows that are not finite; a call
        that is traced into another program does not ask.
        """
        config = SamplingConfig(**options).with_defaults()
        noise = jnp.asarray(noise, jnp.float32)
        text = (jnp.asarray(text_states), jnp.asarray(text_lengths))
        scale = np.float32(config.guidance if guidance is None else guidance)
        guided = bool((scale != 1).any())
        negative: Any = None
        model = self._denoiser(control is not None)
        if guided and negative_states is None:
            arguments = text[0].shape[1], text[1], "text", clean_caption, self.prompt_encoder, model
            negative = self._negative([""] * len(noise), *arguments)
        elif guided:
            lengths = text[1] if negative_lengths is None else negative_lengths
            negative = (jnp.asarray(negative_states), jnp.asarray(lengths))
        scale = jnp.broadcast_to(scale, (len(noise),))
        windows = plan_windows(config, self.transformer.config, noise.shape[1:3])
        sizes = self._size_conditions(noise, size, aspect_ratio, windows)
        start, edit = 0, editing.latent_edit(latents, mask, control, noise.shape)
        if latents is not None:
            start = editing.first_step(int(config.steps or 0), strength)
        with on_mesh(self.mesh):
            run = Run(config, start, reference, windows=windows)
            spec, table, noisy = self._spec(run, guided, keys is not None, edit)
            arguments = (table, noise, keys if noisy else None, text, negative, *sizes, scale, edit)
            return _checked(*self._sample(spec, model.params, arguments, callback))

    def decode(
        self, latents: jax.Array, tile: int | None = None, size: tuple[int, int] | None = None
    ) -> jax.Array:
        """The transformer's latents [b, h, w, c] → images uint8 [b, height, width, 3], on devices.

        tile: side in latents of blended tiles, for images too large to decode at once. size:
        (height, width) that images are resized and cropped to. Raises as :meth:`denoise`.
        """
        with on_mesh(self.mesh):
            return decoder.fit(_checked(*self._decoded(latents, tile)), size)

    def _edit(
        self,
        canvases: list[editing.Canvas],
        controls: Sequence[np.ndarray] = (),
        seamless: bool = False,
    ) -> sampler.Edit | None:
        """What the canvases and conditions of a batch are to the sampler."""

        def encoded(images: Sequence[np.ndarray]) -> jax.Array | None:
            if not images:
                return None
            spec = self._decode_spec(len(images), seamless)
            return decoder.encode_jit(spec, self.vae.params, self._place(np.stack(images)))

        if not canvases and not controls:
            return None
        masks = [canvas.latent_mask(self.factor) for canvas in canvases if canvas.mask is not None]
        mask = self._place(np.stack(masks)) if masks else None
        return sampler.Edit(encoded([one.image for one in canvases]), mask, encoded(controls))

    def _denoiser(self, control: bool) -> Any:
        """The transformer; under control the one that is joined with the ControlNet."""
        if not control:
            return self.transformer
        if self.controlnet is None:
            raise UserError("control needs a ControlNet: open the model with controlnet=PATH")
        return self.transformer.with_controlnet(self.controlnet)

    def _spec(
        self, run: Run, guided: bool, stochastic: bool, edit: sampler.Edit | None
    ) -> tuple[sampler.SamplerSpec, dict[str, Any], bool]:
        """(the compiled program's static arguments, its table, whether steps add noise)."""
        config, solver = run.config, self.scheduler.solver(run.config)
        steps, schedule = int(config.steps or 0), self.scheduler.schedule()
        table, noisy = step_table(
            solver, steps, schedule, config.times, start=run.start, stochastic=stochastic
        )
        table["pag"] = pag_scales(table["t"], config.pag_scale, config.pag_adaptive_scale)
        if under_control := edit is not None and edit.control is not None:
            how = config.control_scale, config.control_start, config.control_end
            table["control"] = control_scales(table["step"], *how)
        pure = edit is not None and edit.mask is not None and run.start == 0
        table["start"] = np.float32((0, 1) if pure else (table["alpha"][0], table["sigma"][0]))
        spec = sampler.SamplerSpec(
            self._denoiser(under_control).module.clone(context_attention=self.context_attention),
            self.scheduler.prediction,
            solver,
            guided,
            make_plan(config, self.transformer.config, self.scheduler, guided, run.start),
            config.perturbed_layers(self.transformer.config.depth),
            run.reference,
            run.windows,
        )
        return spec, table, noisy

    def _sample(
        self, spec: sampler.SamplerSpec, params, arguments: tuple, callback: Callback | None
    ) -> tuple[jax.Array, jax.Array]:
        if callback is None:
            return sampler.sample_latents_jit(spec, params, *arguments)
        spec = dataclasses.replace(spec, preview=sampler.tell)
        with sampler.watched_by(callback):
            return jax.block_until_ready(sampler.sample_latents_jit(spec, params, *arguments))

    def _decoded(
        self, latents: jax.Array, tile: int | None, seamless: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        spec = self._decode_spec(len(latents), seamless)
        if tile is None:
            return decoder.decode_jit(spec, self.vae.params, latents)
        decode = functools.partial(self.vae.decode, tile=tile)
        decode = decoder.wrapped(decode, spec.wrap, spec.wrap * self.factor)
        images = decode(self.vae.config.unscaled(latents))
        return images, finite.rows_jit(images)

    def _decode_spec(self, batch: int, seamless: bool = False) -> decoder.DecodeSpec:
        wrap = decoder.WRAP if seamless else 0
        return decoder.DecodeSpec(self.vae.module, self.mesh, self._padded(batch), wrap)

    def _size_conditions(self, noise, size, ratio, windows: Windows | None = None) -> tuple:
        """(size [b, 2], aspect ratio [b]), by default the image's or a window's; None without."""
        if not self.transformer.config.size_conditions:
            return None, None
        sides = noise.shape[1:3] if windows is None else [windows.side] * 2
        height, width = (float(side * self.factor) for side in sides)
        size = (height, width) if size is None else size
        ratio = height / width if ratio is None else ratio
        size, ratio = jnp.asarray(size, jnp.float32), jnp.asarray(ratio, jnp.float32)
        return jnp.broadcast_to(size, (len(noise), 2)), jnp.broadcast_to(ratio, (len(noise),))

    def _negative(
        self,
        texts: Sequence[str],
        length: int,
        lengths: jax.Array,  # [b] of the prompts, which the null caption is read under
        null: str,
        clean: Callable[[str], str],
        encoder: PromptEncoder | TextStates,
        model: Any,
    ) -> TextKV:
        """Keys and values of the rows' negative prompts in the blocks of ``model``; null
        'embedding': of "" those of the model's null caption, under ``lengths``."""
        cache, stored = self._negatives, null == "embedding"
        source = encoder if isinstance(encoder, TextStates) else self.text_encoder
        key = null, length, self.adapters.identity, model is self.transformer, id(source)
        names = [(clean(text), *key) for text in texts]
        found = {name: cache[name] for name in names if name in cache}
        missing = list(dict.fromkeys(name for name in names if name not in found))
        with on_mesh(self.mesh):
            states: dict[str, tuple[jax.Array, jax.Array]] = {}
            if read := [text for text, *_ in missing if text or not stored]:
                rows, own = self._on_devices(encoder.batch(read, length, str))
                states = {text: (rows[n : n + 1], own[n : n + 1]) for n, text in enumerate(read)}
            if stored:
                caption = jnp.asarray(self._null_caption(), jnp.float32)[None, :length]
                states[""] = caption, jnp.int32([length])
            for name in missing:
                made = sampler.encode_text_jit(model.module, model.params, *states[name[0]])
                # the source is held, so that no other object takes its id
                found[name] = cache[name] = made, source
            while len(cache) > _CACHED:
                cache.pop(next(iter(cache)))
            columns = zip(*(found[name][0] for name in names))
            keys, values, own = (jnp.concatenate(a, n) for a, n in zip(columns, (1, 1, 0)))
            is_null = np.array([stored and not text for text, *_ in names])
            return TextKV(keys, values, jnp.where(is_null, lengths, own))

    def _null_caption(self) -> jax.Array:
        if "null_caption" not in self.transformer.params:
            raise UserError("this transformer has no stored null caption: use null='text'")
        return self.transformer.params["null_caption"]

    def _on_devices(self, text) -> tuple[jax.Array, jax.Array]:
        """(states in fp32, lengths), from wherever they are."""
        states, lengths = text
        if isinstance(states, np.ndarray):
            states, lengths = self._place(states), self._place(lengths)
        return jnp.asarray(states, jnp.float32), lengths

    def _padded(self, batch: int, guided: bool = False) -> int:
        """The images of a batch, at least so many, with which every device has rows of its own.

        Guidance makes two rows of an image. Where that fills the devices, the two lie on different
        ones: one prompt on data = 2 takes the time of a pass without guidance.
        """
        shards = batch_shards(self.mesh)
        if guided and shards % 2 == 0 and 2 * batch <= shards:
            return shards // 2
        return math.ceil(batch / shards) * shards

    def _place(self, array):
        if self.mesh is None:
            return jnp.asarray(array)
        return put_global(array, row_sharding(self.mesh, len(array)))


def _checked(array: jax.Array, good: jax.Array) -> jax.Array:
    if not isinstance(good, jax.core.Tracer):
        finite.check_rows(gather_to_host(good))
    return array
