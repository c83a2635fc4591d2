"""The Pipeline: parts bound together, and the one compiled scan in which they draw."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.models.transformer import TextKV
from pixart_jax.parallel.gather import put_global
from pixart_jax.parallel.mesh import batch_shards, check_divides
from pixart_jax.parallel.rules import on_mesh, row_sharding
from pixart_jax.pipeline import binning as bins
from pixart_jax.pipeline import decoding, denoising, options
from pixart_jax.pipeline import folder as model_folder
from pixart_jax.pipeline.preview import previewer
from pixart_jax.pipeline.prompt_encoder import PromptEncoder, identity
from pixart_jax.pipeline.sampling import SamplingConfig
from pixart_jax.pipeline.scheduler import SchedulerConfig
from pixart_jax.pipeline.shortcuts import NONE, CacheConfig
from pixart_jax.pipeline.text_states import TextStates, texts_to_encode
from pixart_jax.text import caption_cleaner, clean_caption, padded_length

DEFAULT_BATCH = 16
_KEPT_NEGATIVES = 4  # keys and values of so many negative prompts: 31 MB each for XL/2 in bfloat16

Callback = Callable[[int, np.ndarray], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """The parts of a text-to-image model, bound together.

    transformer, text_encoder, vae: components as ``load_component`` gives them; without a text
    encoder (None) it draws from text states alone. scheduler: what the transformer predicts, and
    its betas. sampling: what stands in for options that are not given. mesh: where the parameters
    lie, and over which batches are cut; None for one device. text_identity: what text states of
    this text encoder say that they were made with; empty where its files are not known.
    context_attention: 'all_gather' or 'ring', where the mesh splits image tokens.
    """

    transformer: object
    text_encoder: object
    vae: object
    tokenizer: object
    scheduler: SchedulerConfig = SchedulerConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: jax.sharding.Mesh | None = None
    text_identity: Mapping[str, str] = dataclasses.field(default_factory=dict)
    context_attention: str = "all_gather"
    # Keys and values of negative prompts that whole batches share; its own for each set of parts,
    # so replace() begins an empty one.
    _negatives: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.mesh is not None:
            _check_mesh(self.mesh, self.transformer.config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        dtype=None,
        mesh: jax.sharding.Mesh | None = None,
        text_encoder: bool = True,
        *,
        quantization: str | None = None,
        cache: str | os.PathLike | None = None,
    ) -> Pipeline:
        """Open a diffusers folder, or one that ``save_pretrained`` or a training run wrote.

        dtype: of the computation (jnp.bfloat16 on accelerators), fp32 by default. text_encoder:
        False leaves the largest part closed, for a pipeline that draws from text states.
        quantization: 'int8' holds the text encoder's matrices as int8 values.
        cache: a folder where large weights are kept as they lie in memory, so that the next opening
        changes no axes and no dtype. Raises UserError where a part is missing, damaged or of
        another model.
        """
        if mesh is not None:
            _check_mesh(mesh, model_folder.configs(folder)[0])
        parts = [part for part in model_folder.PARTS if text_encoder or part != "text_encoder"]
        found = {
            "text_encoder": None,
            **model_folder.read(folder, dtype, mesh, parts, quantization, cache),
        }
        return cls(
            **found, mesh=mesh, text_identity=identity(folder, dtype, quantization=quantization)
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write a diffusers folder, which diffusers' PixArtAlphaPipeline opens as it is. Parts that
        lie there are replaced."""
        if self.text_encoder is None:
            raise UserError(
                "this pipeline has no text encoder, so it is no whole model to be saved: open the "
                "folder again with it"
            )
        model_folder.write(
            folder,
            transformer=self.transformer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            tokenizer=self.tokenizer,
            scheduler=self.scheduler,
            sampling=self.sampling,
        )

    def replace(self, **parts) -> Pipeline:
        """The same pipeline with other parts (a transformer with other parameters, say); nothing
        recompiles for equal shapes."""
        if {"text_encoder", "tokenizer"} & set(parts):
            parts.setdefault("text_identity", {})
        return dataclasses.replace(self, **parts)

    @property
    def default_size(self) -> int:
        """The side in pixels that the transformer was trained at."""
        return self.transformer.config.sample_size * self.factor

    @property
    def factor(self) -> int:
        """Pixels a latent, along a side."""
        return self.vae.config.factor

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The text half. UserError where the text encoder is not here."""
        if self.text_encoder is None:
            raise UserError(
                "this pipeline has no text encoder: give text_states, or open the folder with it"
            )
        return PromptEncoder(
            self.text_encoder,
            self.tokenizer,
            self.transformer.config.text_tokens,
            self.mesh,
            dict(self.text_identity),
        )

    def encode_prompts(self, texts: Sequence[str], *, clean_caption: bool = True) -> TextStates:
        """States of texts (prompts, negative prompts and "" alike) on the host, in the dtype of the
        computation, for :meth:`draw`."""
        return self.prompt_encoder.states(
            texts, self.text_encoder.dtype.name, caption_cleaner(clean_caption)
        )

    def without_text_encoder(self) -> Pipeline:
        """This pipeline without its text encoder, whose parameters are deleted from the devices: it
        draws from text states."""
        self.prompt_encoder.free()
        return dataclasses.replace(self, text_encoder=None)

    def __call__(self, prompts: str | Sequence[str], **how) -> np.ndarray:
        """Draw prompts; uint8 [n, height, width, 3]. The options are those of :meth:`draw`."""
        images: dict[int, np.ndarray] = {}
        for positions, batch in self.generate(prompts, **how):
            images.update(zip(positions, batch, strict=True))
        return np.stack([images[n] for n in range(len(images))])

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        solver: str | None = None,
        times: str = "fractional",
        order: int | None = None,
        null: str = "auto",
        clean_caption: bool = True,
        binning: bool = True,
        batch_size: int | None = None,
        indices: Sequence[int] | None = None,
        tile: int | None = None,
        text_states: TextStates | None = None,
        shortcuts: CacheConfig = NONE,
        callback: Callback | None = None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Draw prompts in batches of one compiled shape; yields (positions in prompts, uint8 [b,
        height, width, 3]) as they are done.

        steps, guidance, solver: the model's own where None (sampling.py; 20, 4.5 and dpm++ where
            its folder says nothing). Guidance 1 does no second pass.
        negative_prompt: one for all, or one each; read with guidance other than 1. null: what
            stands for "no prompt" where the negative prompt is "": 'text', the text encoder's
            states of "" with their own length (diffusers), or 'embedding', the transformer's null
            caption under the prompt's length (the official code). 'auto': as the model says.
        clean_caption: texts are cleaned as PixArt's training captions were (clean_caption); else
        lower-cased alone.
        height, width: pixels, by default the side the model was trained at. binning: a model of
            256, 512, 1024 or 2048 px draws at the nearest size of its bucket table, and the image
            is resized and cut to what was asked for; else at that very size.
        seed, indices: the noise of image i comes from fold_in(key(seed), indices[i]), i itself by
            default, so an image does not depend on the batch it is drawn in.
        solver, times, order, steps: as ``diffusion.sample``; order: the scheduler's where None.
        tile: as :meth:`decode`.
        text_states: of all prompts and negative prompts (:meth:`encode_prompts`, or
        ``TextStates.open``), instead of encoding them here.
            The image is the same: to the bit from states in fp32, or in the dtype that the
            transformer computes in.
        shortcuts: what is left out to be faster, at a price (shortcuts.py); nothing by default.
        callback(step, latents [b, h, w, c]): called during the scan with the denoised latents as
        the step sees them. It must not call JAX, which is busy with the scan; what
        :meth:`previewer` gives makes small images of them.
        Raises UserError, before anything is computed, for options that cannot be used.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("no prompts: give at least one")
        negatives = (
            [negative_prompt] * len(prompts)
            if isinstance(negative_prompt, str)
            else list(negative_prompt)
        )
        if len(negatives) != len(prompts):
            raise UserError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for all, "
                "or one each"
            )
        indices = list(range(len(prompts))) if indices is None else list(indices)
        steps, guidance, solver = self.sampling.with_defaults(steps, guidance, solver)
        height, width = options.validate_options(
            self.transformer.config,
            self.vae.config,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            solver=solver,
            times=times,
            null=null,
            batch_size=batch_size,
            seed=seed,
            tile=tile,
            binning=binning,
            shortcuts=shortcuts,
        )
        canvas = (
            bins.generation_size(self.transformer.config, self.vae.config, height, width)
            if binning
            else (height, width)
        )
        guided = float(guidance) != 1.0
        wanted = batch_size or min(len(prompts), DEFAULT_BATCH)
        size = self._padded(min(wanted, len(prompts)) if batch_size is None else wanted, guided)
        if self.mesh is not None:
            rows, columns = (
                side // self.factor // self.transformer.config.patch_size for side in canvas
            )
            check_divides(
                self.mesh, "this size", tokens={f"{canvas[0]}×{canvas[1]}": rows * columns}
            )

        clean = caption_cleaner(clean_caption)
        null = self.sampling.resolve_null(null)
        if guided and null == "embedding":
            self._null_caption()  # that it is there
        if text_states is not None:
            text_states.check(
                {
                    "width": str(self.transformer.config.caption_width),
                    **_without(self.text_identity, "computed_in"),
                }
            )
        encoder = self.prompt_encoder if text_states is None else text_states

        # One text length for all batches, so that they share one executable.
        lengths = encoder.lengths(texts_to_encode(prompts, negatives, guidance, null, clean), clean)
        length = padded_length(int(lengths.max()), self.transformer.config.text_tokens)

        pending = None
        for start in range(0, len(prompts), size):
            positions = list(range(start, min(start + size, len(prompts))))
            # the last batch repeats its last image
            rows = positions + [positions[-1]] * (size - len(positions))
            noise, keys = self.noise(seed, [indices[n] for n in rows], *canvas)
            states, lengths = self._on_devices(
                encoder.batch([prompts[n] for n in rows], length, clean)
            )
            negative = (
                self._negative([negatives[n] for n in rows], states, lengths, null, clean, encoder)
                if guided
                else None
            )
            arguments = self._arguments(
                (states, lengths), noise, negative, keys, guidance, None, None
            )
            run = self._run(solver, order, steps, times, guided, shortcuts)
            if tile is None and callback is None:
                images = self._drawn(run, arguments, (height, width))
            else:
                images = self.decode(
                    self._denoised(run, arguments, _cropped(callback, len(positions))),
                    tile,
                    (height, width),
                )
            # the device works on this batch while the host takes the one before
            if pending is not None:
                yield pending[0], np.asarray(pending[1])[: len(pending[0])]
            pending = positions, images
        yield pending[0], np.asarray(pending[1])[: len(pending[0])]

    def encode_text(
        self,
        texts: Sequence[str],
        length: int | None = None,
        clean: Callable[[str], str] = clean_caption,
    ) -> tuple[jax.Array, jax.Array]:
        """Texts → (states [n, l, c], lengths int32 [n]); l: ``length``, by default a multiple of 8
        over the longest text."""
        return self.prompt_encoder.batch(texts, length, clean)

    def noise(
        self, seed: int, indices: Sequence[int], height: int, width: int
    ) -> tuple[jax.Array, jax.Array]:
        """(noise [n, h, w, c] fp32, keys [n] for the solvers that add noise): image i's come from
        fold_in(key(seed), i) alone."""
        shape = (height // self.factor, width // self.factor, self.transformer.config.in_channels)
        noise, keys = _noise(jax.random.key(seed), np.asarray(indices, np.uint32), shape)
        return self._place(noise), self._place(keys)

    def denoise(
        self,
        text_states: jax.Array,
        text_lengths: jax.Array,
        noise: jax.Array,
        negative_states: jax.Array | None = None,
        negative_lengths: jax.Array | None = None,
        *,
        steps: int = 20,
        guidance: float = 4.5,
        solver: str = "dpm++",
        times: str = "fractional",
        order: int | None = None,
        keys: jax.Array | None = None,
        size: jax.Array | None = None,
        aspect_ratio: jax.Array | None = None,
        shortcuts: CacheConfig = NONE,
        callback: Callback | None = None,
    ) -> jax.Array:
        """The deterministic core, one compiled scan: text states [b, l, c], lengths [b], noise [b,
        h, w, 4] → latents [b, h, w, 4].

        negative_states, negative_lengths: of the negative prompt, padded to any length; the states
            of "" where None. Not read with guidance 1, which does no second pass. times:
            'fractional' (official) or 'integer' (diffusers).
        keys: [b], or one to be folded with each row's number, for solvers that add noise; None adds
        none. size [b, 2] (height, width in pixels), aspect_ratio [b]: for models that are told
        them; by default the image's own.
        shortcuts: as :meth:`draw`.
        """
        noise = jnp.asarray(noise, jnp.float32)
        text = (jnp.asarray(text_states), jnp.asarray(text_lengths))
        guided, negative = float(guidance) != 1.0, None
        if guided and negative_states is None:
            negative = self._negative([""] * len(noise), *text, "text")
        elif guided:
            negative = (
                jnp.asarray(negative_states),
                text[1] if negative_lengths is None else jnp.asarray(negative_lengths),
            )
        arguments = self._arguments(text, noise, negative, keys, guidance, size, aspect_ratio)
        return self._denoised(
            self._run(solver, order, steps, times, guided, shortcuts), arguments, callback
        )

    def decode(
        self, latents: jax.Array, tile: int | None = None, size: tuple[int, int] | None = None
    ) -> jax.Array:
        """Latents [b, h, w, c] as the transformer knows them → images uint8 [b, height, width, 3],
        on the device.

        tile: side in latents of blended tiles, for images too large to be decoded at once; None
        decodes them whole. size: (height, width) in pixels that the images are fitted to
        (binning.py).
        """
        with on_mesh(self.mesh):
            if tile is None:
                return decoding.decoded(
                    self._decoding(len(latents), size), self.vae.params, latents
                )
            return _fitted(self.vae.decode(latents / self.vae.config.scaling_factor, tile), size)

    def _run(
        self,
        solver: str,
        order: int | None,
        steps: int,
        times: str,
        guided: bool,
        shortcuts: CacheConfig,
    ) -> denoising.SamplerSpec:
        """What a drawing's program depends on, beside shapes."""
        module = self.transformer.module.clone(context_attention=self.context_attention)
        chosen = self.scheduler.solver(solver, order)
        return denoising.SamplerSpec(
            module,
            self.scheduler.schedule(),
            self.scheduler.prediction,
            chosen,
            steps,
            times,
            guided,
            shortcuts,
        )

    def _arguments(self, text, noise, negative, keys, guidance, size, aspect_ratio) -> tuple:
        """The arrays of a drawing, in the order of ``denoising.latents``."""
        batch, rows, columns, _ = noise.shape
        if self.transformer.config.size_conditions:
            pixels = (float(rows * self.factor), float(columns * self.factor))
            size = (
                jnp.tile(jnp.asarray([pixels]), (batch, 1))
                if size is None
                else jnp.asarray(size, jnp.float32)
            )
            aspect_ratio = (
                jnp.full((batch,), pixels[0] / pixels[1])
                if aspect_ratio is None
                else jnp.asarray(aspect_ratio, jnp.float32)
            )
        else:
            size = aspect_ratio = None
        return (
            self.transformer.params,
            noise,
            keys,
            text,
            negative,
            size,
            aspect_ratio,
            jnp.float32(guidance),
        )

    def _denoised(
        self, run: denoising.SamplerSpec, arguments: tuple, callback: Callback | None
    ) -> jax.Array:
        with on_mesh(self.mesh):
            if callback is None:
                return denoising.sample_latents_jit(run, *arguments)
            run = dataclasses.replace(run, preview=_tell)
            return _watch(callback, lambda: denoising.sample_latents_jit(run, *arguments))

    def _drawn(
        self, run: denoising.SamplerSpec, arguments: tuple, size: tuple[int, int]
    ) -> jax.Array:
        """Images; the noise among the arguments is given up."""
        with on_mesh(self.mesh):
            return denoising.generate_jit(
                run, self._decoding(len(arguments[1]), size), *arguments, self.vae.params
            )[1]

    def _decoding(self, batch: int, size: tuple[int, int] | None) -> decoding.DecodeSpec:
        config = self.vae.config
        return decoding.DecodeSpec(
            self.vae.module,
            config.scaling_factor,
            config.factor,
            size,
            self.mesh,
            self._padded(batch),
        )

    def previewer(self) -> Callable[[np.ndarray], np.ndarray]:
        """A function for callbacks: latents [b, h, w, c] → rough images uint8 [b, h, w, 3], a pixel
        a latent."""
        return previewer(
            lambda latents: np.asarray(self.decode(jnp.asarray(latents))),
            self.transformer.config.in_channels,
            scale=1.0,
        )

    def _negative(
        self,
        texts: Sequence[str],
        states,
        lengths,
        null: str,
        clean: Callable[[str], str] = clean_caption,
        encoder=None,
    ) -> denoising.States | TextKV:
        """States and lengths of the negative prompts, for rows whose prompts have these states and
        lengths; where all rows have the same, as they mostly do, its keys and values, which are
        kept: "" is read once, not once a batch."""
        encoder = encoder or self.prompt_encoder
        if len({clean(text) for text in texts}) == 1:
            return self._shared_negative(texts[0], states.shape[1], lengths, null, clean, encoder)
        if null == "text":
            return self._on_devices(encoder.batch(texts, states.shape[1], clean))
        caption = jnp.asarray(self._null_caption(), states.dtype)[: states.shape[1]]
        empty = np.array([not clean(text) for text in texts])
        # stands in where nothing is read of what is encoded
        says = next(text for text in texts if clean(text))
        said = [says if nothing else text for text, nothing in zip(texts, empty, strict=True)]
        negative, negative_lengths = self._on_devices(encoder.batch(said, states.shape[1], clean))
        return jnp.where(empty[:, None, None], caption, negative), jnp.where(
            empty, lengths, negative_lengths
        )

    def _shared_negative(
        self, text: str, length: int, lengths, null: str, clean, encoder
    ) -> TextKV:
        """Keys and values of one negative prompt, one row; lengths: of the prompts, which the null
        caption is read under."""
        embedding = null == "embedding" and not clean(text)
        source = (
            None if embedding else encoder if isinstance(encoder, TextStates) else self.text_encoder
        )
        name = (clean(text), embedding, length, id(source))
        if name not in self._negatives:
            if embedding:
                one = (
                    jnp.asarray(self._null_caption(), jnp.float32)[None, :length],
                    jnp.full((1,), length, jnp.int32),
                )
            else:
                one = self._on_devices(encoder.batch([text], length, clean))
            with on_mesh(self.mesh):
                made = denoising.encode_text_jit(
                    self.transformer.module, self.transformer.params, *one
                )
            while len(self._negatives) >= _KEPT_NEGATIVES:
                self._negatives.pop(next(iter(self._negatives)))
            self._negatives[name] = made, source  # held, so that no other object takes its id
        made = self._negatives[name][0]
        return made._replace(lengths=lengths) if embedding else made

    def _null_caption(self) -> jax.Array:
        if "null_caption" not in self.transformer.params:
            raise UserError("this transformer has no stored null caption: use null='text'")
        return self.transformer.params["null_caption"]

    def _on_devices(self, text) -> tuple[jax.Array, jax.Array]:
        """(states in fp32, lengths), from the host where they lie there."""
        states, lengths = text
        if isinstance(states, np.ndarray):
            states, lengths = self._place(states), self._place(lengths)
        return jnp.asarray(states, jnp.float32), lengths

    def _padded(self, batch: int, guided: bool = False) -> int:
        """The images of a batch, so many at least, with which every device has rows of its own.

        Guidance makes two rows of an image. Where that is what fills the devices, the two lie on
        different ones: one prompt on data = 2 takes the time of a pass without guidance, instead of
        being drawn twice over.
        """
        shards = 1 if self.mesh is None else batch_shards(self.mesh)
        if guided and shards % 2 == 0 and 2 * batch <= shards:
            return shards // 2
        return math.ceil(batch / shards) * shards

    def _place(self, array):
        return (
            jnp.asarray(array)
            if self.mesh is None
            else put_global(array, row_sharding(self.mesh, len(array)))
        )


@functools.partial(jax.jit, static_argnames="shape")
def _noise(key, indices, shape):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    return noise, jax.vmap(jax.random.fold_in, (0, None))(keys, 1)


_fitted = jax.jit(decoding.to_uint8, static_argnums=1)


def _check_mesh(mesh: jax.sharding.Mesh, transformer) -> None:
    check_divides(
        mesh, "this transformer", heads=transformer.heads, mlp_width=transformer.mlp_width
    )


def _without(values: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in values.items() if key != name}


def _cropped(callback: Callback | None, count: int) -> Callback | None:
    """The callback without the rows that only fill a batch."""
    return None if callback is None else lambda step, latents: callback(step, latents[:count])


# A compiled scan outlives the callback it was first traced with, so what is compiled in is _tell,
# which asks here for whom.
_watcher: list[Callback] = []
_watching = threading.Lock()


def _tell(step: int, latents: np.ndarray) -> None:
    for callback in _watcher:
        callback(step, latents)


def _watch(callback: Callback, run: Callable[[], jax.Array]) -> jax.Array:
    """run(), done when it returns, with the callback told of each step. One watched scan at a time
    in a process."""
    with _watching:
        _watcher.append(callback)
        try:
            latents = run().block_until_ready()
            jax.effects_barrier()
            return latents
        finally:
            _watcher.clear()
