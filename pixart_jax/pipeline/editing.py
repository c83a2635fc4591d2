"""Image editing on the host: what an image becomes before it is encoded (canvas and mask), and how
the pixels that were to stay come back.

img2img starts from the image with noise (SDEdit, arXiv 2108.01073); inpainting keeps the latents
outside a mask at every step (diffusion.sampling.Known); outpainting is inpainting on a larger
canvas; a style reference is inpainting of the right half of a canvas whose left half is the
reference. All end in the same program (pipeline/sampler.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from pixart_jax.data import buckets
from pixart_jax.data.images import to_bucket
from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig, VAEConfig
from pixart_jax.pipeline.image_size import ImageSize, check_options
from pixart_jax.pipeline.sampler import Edit
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.pipeline.scheduler import SchedulerConfig

ASPECT = 1.03  # a condition may be off its image's aspect ratio by this: sides are rounded
SEAM = 6  # px inside the mask, over which generated pixels blend into known ones
OVERLAP = 16  # px of an outpainted image's border that are generated too


@dataclasses.dataclass(frozen=True, eq=False)
class Canvas:
    """An image as the model edits it.

    image: uint8 [h, w, 3], of the size that is generated. mask: bool [h, w], True where it is
    generated anew; None: everywhere. source, source_mask, box (top, left, bottom, right): the whole
    image where the canvas is a part of it, resized.
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    source: np.ndarray | None = None
    source_mask: np.ndarray | None = None
    box: tuple[int, int, int, int] | None = None

    def latent_mask(self, factor: int) -> np.ndarray:
        """bool [h / factor, w / factor, 1]: the latents with any pixel of the mask."""
        assert self.mask is not None
        h, w = (side // factor for side in self.mask.shape)
        return self.mask.reshape(h, factor, w, factor).any((1, 3))[..., None]

    def finish(self, generated: np.ndarray) -> np.ndarray:
        """The result, uint8 [h, w, 3]: the canvas as generated, or put back into its source."""
        if self.source is None or self.source_mask is None or self.box is None:
            return generated
        top, left, bottom, right = self.box
        patch = Image.fromarray(generated).resize((right - left, bottom - top), _LANCZOS)
        inside = slice(top, bottom), slice(left, right)
        weight = blend_weight(self.source_mask)[inside][..., None]
        result = self.source.copy()
        mixed = weight * np.asarray(patch, np.float32) + (1 - weight) * self.source[inside]
        result[inside] = np.rint(mixed).astype(np.uint8)
        return result


_LANCZOS = Image.Resampling.LANCZOS


def blend_weight(mask: np.ndarray) -> np.ndarray:
    """float32 [h, w]: the weight of generated pixels, 0 outside the mask, rising to 1 over SEAM
    pixels."""
    if mask.all():
        return np.ones(mask.shape, np.float32)
    return np.minimum(ndimage.distance_transform_edt(mask) / SEAM, 1).astype(np.float32)


def first_step(steps: int, strength: float) -> int:
    """The step that an edit starts at: min(int(steps · strength), steps) are left, truncated as in
    diffusers. Raises UserError where none is."""
    valid = isinstance(strength, float | int) and not isinstance(strength, bool)
    if not valid or not 0 < strength <= 1:
        raise UserError(f"strength {strength!r}: a number above 0 and up to 1 is needed")
    left = min(int(steps * strength), steps)
    if left < 1:
        raise UserError(
            f"strength {strength:g} leaves no step of {steps}: at least {1 / steps:g} is needed"
        )
    return steps - left


def check_image(value: Any, what: str = "image") -> np.ndarray:
    """uint8 [h, w, 3]; UserError for anything else."""
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UserError(f"{what}: want uint8 [h, w, 3], got {array.dtype} {list(array.shape)}")
    return array


def check_mask(value: Any, image: np.ndarray) -> np.ndarray:
    """bool [h, w] from uint8 (divided by 255), bool or float, True from a half on. Raises UserError
    for another size than the image's, and for a mask that selects nothing."""
    array = np.asarray(value)
    if array.shape != image.shape[:2] or array.dtype.kind not in "buif":
        height, width = image.shape[:2]
        raise UserError(
            f"mask {array.dtype} {list(array.shape)} for an image of {height} × {width}"
        )
    mask = (array / 255 if array.dtype == np.uint8 else array) >= 0.5
    if not mask.any():
        raise UserError("the mask selects nothing: white is what is generated anew")
    return mask


def images_of(value: Any, count: int, what: str = "image") -> list[np.ndarray]:
    """One array for each of ``count`` prompts, from one for all or a sequence of one each; none
    from None."""
    if value is None:
        return []
    grey = what == "mask" or (what == "control" and np.shape(value)[-1:] != (3,))
    if hasattr(value, "ndim") and value.ndim <= (2 if grey else 3):
        return [np.asarray(value)] * count
    if len(value) != count:
        raise UserError(f"{len(value)} {what}s for {count} prompts: give one for all, or one each")
    return [np.asarray(one) for one in value]


def latent_edit(latents: Any, mask: Any, control: Any, shape: tuple[int, ...]) -> Edit | None:
    """The sampler's edit of latents [b, h, w, c] under a mask [b, h, w, 1], of half or more where
    it is generated, and of a condition's latents [b, h, w, c]; None without any. Raises UserError
    where they do not fit noise of ``shape``."""
    if mask is not None and latents is None:
        raise UserError("a mask needs the latents that stay outside it: give latents")
    for what, value in (("latents", latents), ("control's latents", control)):
        if value is not None and jnp.shape(value) != shape:
            raise UserError(f"{what} {list(jnp.shape(value))} do not fit noise {list(shape)}")
    if mask is not None and jnp.shape(mask) != (*shape[:3], 1):
        wanted = [*shape[:3], 1]
        raise UserError(f"mask {list(jnp.shape(mask))} does not fit: want {wanted}")
    if latents is None and control is None:
        return None
    latents, control = (
        None if a is None else jnp.asarray(a, jnp.float32) for a in (latents, control)
    )
    return Edit(latents, None if mask is None else jnp.asarray(mask) >= 0.5, control)


def default_size(
    shape: tuple[int, ...], transformer: TransformerConfig, factor: int, config: SamplingConfig
) -> tuple[int, int]:
    """(height, width) that an image is edited at: its bucket; where the model has no buckets its
    own size in whole patches, at most 1.5 times the model's side, but in windows."""
    side = transformer.sample_size * factor
    if config.binning and not config.windowed and side in buckets.INFERENCE_TABLES:
        return buckets.nearest(shape[0], shape[1], side, inference=True)
    unit = factor * transformer.patch_size
    ratio = 1.0 if config.windowed else min(1.0, 1.5 * side / max(shape[:2]))
    height, width = (max(unit, round(s * ratio / unit) * unit) for s in shape[:2])
    return height, width


def canvas(
    image: np.ndarray, mask: np.ndarray | None, size: tuple[int, int], padding: int | None = None
) -> Canvas:
    """An image [h, w, 3] and its mask [h, w], resized and cropped to ``size``. padding: take only
    the box of the mask and so many pixels around it, grown to the aspect ratio of ``size``, so that
    it is generated at full resolution and put back into the image."""
    if mask is None or padding is None:
        inside = mask if mask is None else to_bucket(mask.astype(np.uint8) * 255, size)[0] >= 128
        return Canvas(to_bucket(image, size)[0], inside)
    box = _box_around(mask, size, padding)
    part = slice(box[0], box[2]), slice(box[1], box[3])
    fitted = np.asarray(Image.fromarray(image[part]).resize(size[::-1], _LANCZOS))
    inner = Image.fromarray(mask[part]).convert("L").resize(size[::-1], Image.Resampling.BOX)
    return Canvas(fitted, np.asarray(inner) >= 128, image, mask, box)


def _box_around(mask: np.ndarray, size: tuple[int, int], padding: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right), inside the image."""
    spans = []
    for axis, limit in enumerate(mask.shape):
        inside = np.flatnonzero(mask.any(1 - axis))
        spans.append((max(0, inside[0] - padding), min(limit, inside[-1] + 1 + padding)))
    sides = [end - start for start, end in spans]
    ratio = size[0] / size[1]
    wanted = max(sides[0], round(sides[1] * ratio)), max(sides[1], round(sides[0] / ratio))
    box = []
    for (start, end), side, limit in zip(spans, wanted, mask.shape):
        side = min(side, limit)
        start = min(max(0, (start + end - side) // 2), limit - side)
        box.append((int(start), int(start + side)))
    (top, bottom), (left, right) = box
    return top, left, bottom, right


def outpaint(
    image: np.ndarray, left: int, top: int, right: int, bottom: int
) -> tuple[np.ndarray, np.ndarray]:
    """(canvas uint8 [top + h + bottom, left + w + right, 3], mask bool of its size): the image with
    so many pixels more on each side. They repeat its border, blurred, as a start for strengths
    under 1; the mask covers them and OVERLAP pixels of the image."""
    if min(left, top, right, bottom) < 0 or not any((left, top, right, bottom)):
        raise UserError("outpaint: pixels for left, top, right and bottom are needed, not all 0")
    around = (top, bottom), (left, right)
    wide = np.pad(image, (*around, (0, 0)), mode="edge")
    radius = max(left, top, right, bottom) / 8
    blurred = np.array(Image.fromarray(wide).filter(ImageFilter.GaussianBlur(radius)))
    mask = np.pad(np.zeros(image.shape[:2], bool), around, constant_values=True)
    blurred[~mask] = image.reshape(-1, 3)
    for axis, (before, after) in enumerate(around):
        rows = np.moveaxis(mask, axis, 0)
        rows[: (before + OVERLAP) * (before > 0)] = True
        rows[len(rows) - (after + OVERLAP) * (after > 0) :] = True
    return blurred, mask


def reference_canvas(image: np.ndarray, height: int, width: int) -> Canvas:
    """A canvas [height, 2 · width, 3]: the reference on the left, resized and cropped, and on the
    right what is generated in its style."""
    left, _ = to_bucket(image, (height, width))
    mask = np.repeat([False, True], width)[None].repeat(height, 0)
    return Canvas(np.concatenate([left, np.full_like(left, 255)], axis=1), mask)


def check_control(value: Any) -> np.ndarray:
    """uint8 [h, w, 3] of a condition, RGB or grey [h, w]; UserError for anything else."""
    array = np.asarray(value)
    return check_image(np.stack([array] * 3, -1) if array.ndim == 2 else array, "control")


@dataclasses.dataclass(frozen=True, eq=False)
class Edits:
    """What a call edits: an image and perhaps a mask for each prompt; empty for text to image.
    controls: the condition of each prompt; empty without a ControlNet."""

    images: list[np.ndarray]
    masks: list[np.ndarray]
    strength: float
    padding: int | None
    is_reference: bool
    variation: tuple[int | str, float] | None  # of the noise: (seed, share)
    controls: list[np.ndarray]

    @classmethod
    def read(
        cls,
        count: int,
        image: Any = None,
        mask: Any = None,
        strength: float = 0.6,
        mask_padding: int | None = None,
        reference: Any = None,
        variation: tuple[int | str, float] | None = None,
        control: Any = None,
    ) -> Edits:
        """Of ``Pipeline.generate``'s options. Raises UserError for contradictions."""
        if control is not None and not (reference is None and mask_padding is None):
            raise UserError("control excludes reference and mask padding: give one of them")
        if variation is not None and not 0 <= variation[1] <= 1:
            raise UserError(f"variation {variation[1]}: a share from 0 to 1 is needed")
        if reference is not None and not (image is None and mask is None):
            raise UserError("reference and image exclude each other: give one of them")
        if mask is not None and image is None:
            raise UserError("a mask needs the image that stays outside it: give image")
        what, given = ("image", image) if reference is None else ("reference", reference)
        images = [check_image(one, what) for one in images_of(given, count, what)]
        if mask is None and image is not None and mask_padding is not None:
            raise UserError("mask padding needs a mask")
        masks = images_of(mask, count, "mask")
        masks = [check_mask(one, own) for one, own in zip(masks, images)]
        if masks and mask_padding is not None and len({own.shape for own in images}) > 1:
            raise UserError("mask padding: images of one size are needed, which the results have")
        return cls(
            images,
            masks,
            1.0 if image is None else strength,
            mask_padding,
            reference is not None,
            variation,
            [check_control(one) for one in images_of(control, count, "control")],
        )

    def start(self, steps: int) -> int:
        """The first step of ``steps``."""
        return first_step(steps, self.strength) if self.images else 0

    def size(
        self,
        config: SamplingConfig,
        transformer: TransformerConfig,
        vae: VAEConfig,
        scheduler: SchedulerConfig,
        height: int | None,
        width: int | None,
        batch_size: int | None,
    ) -> ImageSize:
        """What ``check_options`` finds for a size; by default it is the first image's, and beside a
        reference of twice the width."""
        side = transformer.sample_size * vae.factor
        if self.controls:
            whole = (height or side, width or side) if height or width else self.controls[0].shape
            for n, one in enumerate(self.controls):
                check_aspect("control", one, self.images[n].shape if self.images else whole)
        given = [*self.images, *self.controls]
        if self.is_reference:
            height, width = height or side, 2 * (width or side)
        elif given and height is None and width is None:
            height, width = default_size(given[0].shape, transformer, vae.factor, config)
        start, models = self.start(int(config.steps or 0)), (transformer, vae, scheduler)
        return check_options(config, *models, height, width, batch_size=batch_size, start=start)

    def result_size(self, height: int, width: int) -> dict[str, int]:
        """{"height", "width"} of what ``generate`` is asked for, from the canvas's."""
        return {"height": height, "width": width // 2 if self.is_reference else width}

    def canvases(self, count: int, size: tuple[int, int]) -> list:
        """A Canvas for each of ``count`` prompts, of that size; None without images."""
        if not self.images:
            return [None] * count
        if self.is_reference:
            return [reference_canvas(image, size[0], size[1] // 2) for image in self.images]
        masks = self.masks or [None] * len(self.images)
        return [canvas(*pair, size, self.padding) for pair in zip(self.images, masks)]

    def conditions(self, count: int, size: tuple[int, int]) -> list:
        """The controls, resized and cropped as images are; None without."""
        return [to_bucket(one, size)[0] for one in self.controls] or [None] * count

    def finish(self, images: np.ndarray, canvases: Sequence[Canvas | None]) -> np.ndarray:
        """The results, from what was generated on the canvases; uint8 [b, h, w, 3]."""
        if self.is_reference:
            return images[:, :, images.shape[2] // 2 :]
        pairs = zip(images, canvases)
        return np.stack([one if own is None else own.finish(one) for one, own in pairs])


def check_aspect(what: str, control: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise UserError where a condition [h, w, …] has another aspect ratio than ``shape``."""
    off = control.shape[0] / control.shape[1] * shape[1] / shape[0]
    if not 1 / ASPECT <= off <= ASPECT:
        sizes = "{} × {} for a picture of {} × {}".format(*control.shape[:2], *shape[:2])
        raise UserError(f"{what}: {sizes} pixels, another aspect ratio; crop it")
