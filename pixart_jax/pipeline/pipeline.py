"""The Pipeline: the parts of a model bound together, and the one path from prompts to images."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pixart_jax import finite
from pixart_jax.errors import UserError
from pixart_jax.parallel.mesh import check_divides
from pixart_jax.parallel.rules import on_mesh
from pixart_jax.pipeline import decoder, editing, sampler
from pixart_jax.pipeline.adapters import Adapters, LoraMethods
from pixart_jax.pipeline.denoising import Callback, DenoisingMethods, NegativePrompts
from pixart_jax.pipeline.folder import PARTS, ModelFolder, write_model
from pixart_jax.pipeline.image_size import ImageSize
from pixart_jax.pipeline.prompt_encoder import PromptEncoder, one_ahead
from pixart_jax.pipeline.rows import Row, Run, Seed, Toward, between, in_batches, one_each, slerp
from pixart_jax.pipeline.sampling_config import (
    SamplingConfig,
    check_count,
    check_guidance,
    check_seed,
)
from pixart_jax.pipeline.scheduler import SchedulerConfig
from pixart_jax.pipeline.text_states import TextStates, texts_to_encode
from pixart_jax.pipeline.windows import plan_windows
from pixart_jax.text import caption_cleaner, clean_caption, notice_loss, padded_length
from pixart_jax.weights.component import controlnet_of, load_component


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline(DenoisingMethods, LoraMethods):
    """The parts of a text-to-image model, bound together.

    transformer, text_encoder, vae: as ``load_component`` returns them; without a text encoder
    (None) it samples from text states only. scheduler: what the transformer predicts, and its
    betas. sampling: the model's own options. mesh: of the parameters and batches; None: one device.
    text_identity: ModelFolder.text_identity's; empty where the files are not known.
    context_attention: 'all_gather' or 'ring', where the mesh splits image tokens. adapters: the
    LoRAs in the transformer, changed by the methods of LoraMethods alone. controlnet: as
    ``load_component`` returns it; read where a call gives control.
    """

    transformer: Any
    text_encoder: Any
    vae: Any
    tokenizer: Any
    scheduler: SchedulerConfig = SchedulerConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: jax.sharding.Mesh | None = None
    text_identity: Mapping[str, str] = dataclasses.field(default_factory=dict)
    context_attention: str = "all_gather"
    adapters: Adapters = Adapters()
    controlnet: Any = None
    # of these parts: replace() begins an empty one
    _negatives: NegativePrompts = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.mesh is not None:
            _check_mesh(self.mesh, self.transformer.config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike | ModelFolder,
        dtype=None,
        mesh: jax.sharding.Mesh | None = None,
        text_encoder: bool = True,
        *,
        quantization: str | None = None,
        cache: str | os.PathLike | None = None,
        revision: str | None = None,
        variant: str | None = None,
        controlnet: str | os.PathLike | None = None,
    ) -> Pipeline:
        """Open a diffusers folder, one that ``save_pretrained`` or a training run wrote, or a hub
        id such as "PixArt-alpha/PixArt-XL-2-1024-MS", at ``revision`` (weights/hub.py).

        dtype: of the computation (jnp.bfloat16 on accelerators), fp32 by default. text_encoder:
        False leaves out the largest part, for sampling from text states. quantization: 'int8' holds
        the text encoder's matrices as int8. cache: a folder of converted weights, by which the next
        start is quick. variant: such as "fp16", of the weights' files; by default the plain or only
        ones. controlnet: the folder, hub id or file of one. Raises UserError where a part is
        missing, damaged or of another model.
        """
        names = [name for name in PARTS if text_encoder or name != "text_encoder"]
        if isinstance(folder, ModelFolder):
            model = folder
        else:
            model = ModelFolder.open(folder, names, revision, variant)
        if mesh is not None:
            _check_mesh(mesh, model.transformer)
        control = controlnet and controlnet_of(controlnet, model.transformer)
        parts = model.load(dtype, mesh, names, quantization, cache)
        return cls(
            **{"text_encoder": None, **parts},
            tokenizer=model.tokenizer(),
            scheduler=model.scheduler,
            sampling=model.sampling,
            mesh=mesh,
            text_identity=model.text_identity(dtype, quantization=quantization),
            controlnet=control and load_component(control, dtype, mesh),
        )

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write a folder that diffusers' PixArtAlphaPipeline opens; parts that it holds already are
        replaced. Active LoRAs are in the transformer that is written, as after diffusers'
        fuse_lora and unload_lora_weights; without them: unload_lora_weights first."""
        if self.text_encoder is None:
            missing = "this pipeline has no text encoder, so it is not a whole model to save"
            raise UserError(f"{missing}: open the folder again with it")
        names = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler", "sampling")
        write_model(path, **{name: getattr(self, name) for name in names})

    def replace(self, **parts) -> Pipeline:
        """The same pipeline with other parts, such as other parameters; equal shapes do not
        recompile."""
        if {"text_encoder", "tokenizer"} & set(parts):
            parts.setdefault("text_identity", {})
        if "transformer" in parts:
            parts.setdefault("adapters", Adapters())
        return dataclasses.replace(self, **parts)

    def encode_prompts(self, texts: Sequence[str], *, clean_caption: bool = True) -> TextStates:
        """States of texts (prompts, negative prompts and "" alike) on the host, in the dtype of the
        computation, for :meth:`generate`."""
        dtype = self.text_encoder.dtype.name if self.text_encoder is not None else "float32"
        clean = caption_cleaner(clean_caption)
        notice_loss("prompt", texts, clean)
        return self.prompt_encoder.states(texts, dtype, clean)

    def encode_text(
        self,
        texts: Sequence[str],
        length: int | None = None,
        clean: Callable[[str], str] = clean_caption,
    ) -> tuple[jax.Array, jax.Array]:
        """Texts → (states [n, l, c], lengths int32 [n]); l: ``length``, by default a multiple of
        8."""
        notice_loss("prompt", texts, clean)
        return self.prompt_encoder.batch(texts, length, clean)

    def without_text_encoder(self) -> Pipeline:
        """This pipeline for text states; the text encoder's parameters are deleted."""
        self.prompt_encoder.free()
        return dataclasses.replace(self, text_encoder=None)

    def __call__(self, prompts: str | Sequence[str], **options) -> np.ndarray:
        """Sample an image a prompt; uint8 [n, height, width, 3]. options: height, width, seed,
        guidance and the other keywords of :meth:`generate`; steps, solver and the other fields of
        SamplingConfig."""
        fields = {field.name for field in dataclasses.fields(SamplingConfig)} - {"guidance"}
        config = SamplingConfig(**{name: options.pop(name) for name in fields & set(options)})
        images: dict[int, np.ndarray] = {}
        for positions, batch in self.generate(prompts, config, **options):
            images.update(zip(positions, batch, strict=True))
        return np.stack([images[n] for n in range(len(images))])

    def generate(
        self,
        prompts: str | Sequence[str],
        config: SamplingConfig | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        seed: Seed | Sequence[Seed] = 0,
        guidance: float | Sequence[float] | None = None,
        batch_size: int | None = None,
        num_images_per_prompt: int = 1,
        indices: Sequence[int] | None = None,
        text_states: TextStates | None = None,
        callback: Callback | None = None,
        callback_every: int = 1,
        image: Any = None,
        mask: Any = None,
        strength: float = 0.6,
        mask_padding: int | None = None,
        reference: Any = None,
        variation: tuple[Seed, float] | None = None,
        toward: Sequence[Toward] | None = None,
        control: Any = None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Sample prompts in batches of one compiled shape; yields (positions in prompts, uint8 [b,
        height, width, 3]) as batches are done.

        config: what it leaves out is the model's own.
        negative_prompt, seed, guidance: one for all or one a prompt; guidance None: the config's.
            Prompts with guidance 1 form batches of their own.
        height, width: pixels, by default the side the model was trained at.
        num_images_per_prompt: consecutive images of each prompt, from its seed, seed + 1, …; the
            positions count images. The k-th equals the image of a call with seed + k.
        indices: the noise of image i comes from fold_in(key(seed), indices[i]), by default i. So an
            image does not depend on its batch: at one batch size, text_length and place it is equal
            to the bit whatever is beside it, in another batch to 1 of 255.
        text_states: of all prompts and negative prompts (:meth:`encode_prompts` or
            ``TextStates.open``), instead of encoding them. The image is equal to the bit from
            states in fp32, or in the dtype that the transformer computes in.
        callback(step, latents [b, h, w, c]): called during the scan with the denoised latents of
            every callback_every-th step. It must not call JAX, which is busy.
        image: edit these instead of starting from noise, uint8 [h, w, 3] for all or one a prompt;
            min(int(steps · strength), steps) steps are left. The size is by default the image's own
            bucket, to which it is resized and cropped.
        mask: generate anew only where it is at least a half (uint8 of 255), [h, w] as the image.
            Other pixels stay as they are, and blend over SEAM pixels inside the mask. At strength 1
            the mask's inside starts from pure noise. mask_padding: generate the mask's box and so
            many pixels around it at full resolution, and put it back; the result has the image's
            size.
        reference: generate in the style of these images, each beside its reference on a canvas
            twice as wide.
        variation: (seed, share): noise that far on the way (slerp) to that of another seed.
        toward: (prompt, seed, index, share) a prompt: text states and noise that far on the way to
            another image's. Share 0 is the prompt's own image, to the bit.
        control: what the ControlNet follows, as an edge map: uint8 [h, w, 3] or [h, w], for all or
            one a prompt, of the picture's aspect ratio. The size is by default its own bucket.
        Raises UserError, before anything is computed, for options that cannot be used. Images that
        are not finite are left out, and after the last batch ``finite.NotFinite`` (a UserError)
        names their positions.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("no prompts: give at least one")
        check_count("num_images_per_prompt", num_images_per_prompt)
        count, parts = len(prompts), self.transformer.config
        config = (config or SamplingConfig()).with_defaults(self.sampling)
        given = image, mask, strength, mask_padding, reference, variation, control
        edits = editing.Edits.read(count, *given)
        self._denoiser(bool(edits.controls))  # raises without a ControlNet
        models = parts, self.vae.config, self.scheduler
        size = edits.size(config, *models, height, width, batch_size)
        start = edits.start(int(config.steps or 0))
        canvas = tuple(side // self.factor for side in size.generated)
        windows = plan_windows(config, parts, canvas, edits.is_reference)
        columns: tuple[list[Any], ...] = (
            prompts,
            one_each("negative prompt", negative_prompt, count),
            [check_seed(value) for value in one_each("seed", seed, count)],
            list(range(count) if indices is None else indices),
            one_each("guidance", config.guidance if guidance is None else guidance, count),
            edits.canvases(count, size.generated),
            list(toward) if toward else [None] * count,
            edits.conditions(count, size.generated),
        )
        rows = [
            dataclasses.replace(row, seed=(row.seed + k) % 2**64)
            for row in (Row(*values) for values in zip(*columns, strict=True))
            for k in range(num_images_per_prompt)
        ]
        for row in rows:
            check_guidance(row.guidance)
        if edits.variation is not None:
            other, share = edits.variation
            rows = [
                dataclasses.replace(row, toward=(row.prompt, other, row.index, share))
                for row in rows
            ]
        if self.mesh is not None:
            sides = [side // self.factor // parts.patch_size for side in size.generated]
            sides = sides if windows is None else [windows.side // parts.patch_size] * 2
            tokens = {"{}×{}".format(*size.generated): sides[0] * sides[1]}
            check_divides(self.mesh, "this size", tokens=tokens)
        guided = [n for n, row in enumerate(rows) if row.guidance != 1]
        if guided and config.null == "embedding":
            self._null_caption()  # raises where there is none

        clean = caption_cleaner(config.clean_caption)
        encoder: Any = self.prompt_encoder if text_states is None else text_states
        if text_states is not None:
            identity = {"width": str(parts.caption_width), **self.text_identity}
            text_states.check({k: v for k, v in identity.items() if k != "computed_in"})
        negatives = [rows[n].negative for n in guided]
        notice_loss("prompt", prompts, clean)
        notice_loss("negative prompt", negatives, clean)
        others = [other for other, *_ in toward or ()]
        texts = texts_to_encode([*prompts, *others], negatives, str(config.null), clean)
        longest = int(encoder.lengths(texts, clean).max())
        if config.text_length is not None and longest > config.text_length:
            raise UserError(f"text length {config.text_length}: a prompt has {longest} tokens")
        # one for all batches, so that they share one executable
        length = config.text_length or padded_length(longest, parts.text_tokens)

        run = Run(config, start, edits.is_reference, windows)

        def batches() -> Iterator[tuple[list[int], tuple[jax.Array, jax.Array]]]:
            for positions, batch in in_batches(rows, batch_size, self._padded):
                tell = callback and functools.partial(_without_fillers, callback, len(positions))
                given = size, length, encoder, tell, callback_every
                yield positions, self._images(batch, run, *given)

        bad: list[int] = []
        # the device works on a batch while the host takes the one before
        for positions, made in one_ahead(batches()):
            images, good = (np.asarray(array)[: len(positions)] for array in made)
            if not good.all():
                bad += [n for n, one in zip(positions, good) if not one]
                positions, images = [n for n, one in zip(positions, good) if one], images[good]
            if positions:
                canvases = [rows[n].canvas for n in positions]
                yield positions, edits.finish(images, canvases)
        if bad:
            raise finite.NotFinite(bad)

    def _images(
        self,
        rows: list[Row],
        run: Run,
        size: ImageSize,
        length: int,
        encoder: PromptEncoder | TextStates,
        callback: Callback | None,
        callback_every: int,
    ) -> tuple[jax.Array, jax.Array]:
        """One batch: (uint8 [b, height, width, 3], bool [b]: whether finite); all or none are
        guided."""
        config, guided = run.config, rows[0].guidance != 1
        clean = caption_cleaner(config.clean_caption)
        indices = [row.index for row in rows]
        noise, keys = self.noise([row.seed for row in rows], indices, *size.generated)
        prompts = [row.prompt for row in rows]
        text = self._on_devices(encoder.batch(prompts, length, clean))
        if rows[0].toward is not None:
            others, seeds, places, shares = zip(*(row.toward for row in rows if row.toward))
            share = self._place(np.array(shares, np.float32))
            other = self.noise(seeds, places, *size.generated)[0]
            noise = slerp(noise, other, share[:, None, None, None])
            if list(others) != prompts:
                text = between(text, self._on_devices(encoder.batch(others, length, clean)), share)
        negative, model = None, self._denoiser(rows[0].control is not None)
        if guided:
            given = [row.negative for row in rows], length, text[1], str(config.null), clean
            negative = self._negative(*given, encoder, model)
        scale = self._place(np.array([row.guidance for row in rows], np.float32))
        canvases = [row.canvas for row in rows if row.canvas is not None]
        with on_mesh(self.mesh):
            controls = [row.control for row in rows if row.control is not None]
            edit = self._edit(canvases, controls, config.seamless)
            spec, table, noisy = self._spec(run, guided, keys is not None, edit)
            sizes = self._size_conditions(noise, None, None, run.windows)
            keys = keys if noisy else None
            arguments = (table, noise, keys, text, negative, *sizes, scale, edit)
            params = model.params
            if config.vae_tile is None and callback is None:
                decode, vae = self._decode_spec(len(rows), config.seamless), self.vae.params
                _, images, good = sampler.generate_jit(spec, decode, vae, params, *arguments)
            else:
                table["previewed"] = np.arange(1, len(table["t"]) + 1) % callback_every == 0
                latents, good = self._sample(spec, params, arguments, callback)
                images, pixels_good = self._decoded(latents, config.vae_tile, config.seamless)
                good = good & pixels_good
            if canvases and canvases[0].mask is not None:
                known = self._place(np.stack([canvas.image for canvas in canvases]))
                weight = np.stack([editing.blend_weight(canvas.mask) for canvas in canvases])
                images = decoder.paste(images, known, self._place(weight))
            whole = canvases and canvases[0].box is not None
            return decoder.fit(images, None if whole else size.asked), good


def _check_mesh(mesh: jax.sharding.Mesh, transformer) -> None:
    check_divides(
        mesh, "this transformer", heads=transformer.heads, mlp_width=transformer.mlp_width
    )


def _without_fillers(callback: Callback, count: int, step: int, latents: np.ndarray) -> None:
    callback(step, latents[:count])
