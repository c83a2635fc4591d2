"""The compiled core of sampling: noise and text → latents → pixels, one program.

What does not change from step to step is computed once, before the scan: every block's keys and
values of the text, and the embedding and modulation of all times. Both halves of guidance are one
batch; guided and unguided steps lie in scans of their own (block_cache.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax import diffusion, finite
from pixart_jax.diffusion.guidance import combine_guidance
from pixart_jax.diffusion.sampling import Known, Preview, integrate
from pixart_jax.models.controlnet import Control
from pixart_jax.models.transformer import Conditioning, TextKV
from pixart_jax.pipeline import block_cache
from pixart_jax.pipeline.decoder import DecodeSpec, decode_latents
from pixart_jax.pipeline.windows import Windows, cut, over_windows

States = tuple[jax.Array, jax.Array]  # (text states [b, l, c], lengths [b])


class Edit(NamedTuple):
    """The images that a run starts from. latents: [b, h, w, c], scaled; None: noise alone. mask:
    bool [b, h, w, 1], True where it is generated anew; None: everywhere (img2img). control: scaled
    latents [b, h, w, c] of the condition that a ControlNet reads."""

    latents: jax.Array | None
    mask: jax.Array | None = None
    control: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """All that the compiled program depends on beside the shapes of its arrays. pag_layers: blocks
    of perturbed-attention guidance; () without it. reference: the unconditional half sees the
    latents before the known part replaces its own. windows: of a canvas that is not denoised whole.
    preview: as diffusion.sample's; None without one."""

    module: nn.Module
    prediction: str
    solver: diffusion.solvers.Solver
    guided: bool
    plan: block_cache.CachePlan
    pag_layers: tuple[int, ...] = ()
    reference: bool = False
    windows: Windows | None = None
    preview: Preview | None = None


def sample_latents(
    spec: SamplerSpec,
    params: Mapping,
    table: dict[str, Any],  # diffusion.sampling.step_table's, "start" [2], "pag" and "control" [n]
    noise: jax.Array,  # [b, h, w, c]
    keys: jax.Array | None,  # [b], or one key; None where no step adds noise
    text: States,
    negative: States | TextKV | None,  # may be one row for all images; None where not guided
    size: jax.Array | None,  # [b, 2]
    aspect_ratio: jax.Array | None,  # [b]
    scale: jax.Array,  # [b] of guidance
    edit: Edit | None = None,
) -> jax.Array:  # [b, h, w, c] fp32
    """From noise to latents, to be traced in a jit. table["start"]: what an edit's latents and the
    noise are weighted with at first. Both halves of guidance are under the same control."""
    apply = functools.partial(spec.module.apply, {"params": params})
    config, batch = spec.module.config, noise.shape[0]
    conditionings = apply(table["t"], size, aspect_ratio, method="encode_times")
    positive = apply(*text, method="encode_text")
    lists = {False: [positive]}
    if spec.guided:
        assert negative is not None, "guided, so there is a negative prompt"
        if not isinstance(negative, TextKV):
            negative = TextKV(*apply(*negative, method="encode_text"))
        lists[True] = [negative, positive]
    perturbed = [positive] * bool(spec.pag_layers)
    texts = {guided: _joined(parts + perturbed, batch) for guided, parts in lists.items()}
    condition = None  # [b, n, d], or of each window
    if edit is not None and edit.control is not None:
        encode = functools.partial(apply, method="encode_control")
        latents, windows = edit.control, spec.windows
        condition = (
            encode(latents) if windows is None else jax.lax.map(encode, cut(latents, windows))
        )

    def denoise(guided, x, conditioning, cache, pag, control_scale, condition=condition):
        parts = guided + 1 + len(perturbed)
        x = jnp.concatenate([x[:batch]] * guided + [x[-batch:]] * (parts - guided))
        conditioning = Conditioning(
            *(a if len(a) == 1 else jnp.concatenate([a] * parts) for a in conditioning)
        )
        identity = None
        if perturbed:
            layers = np.isin(np.arange(config.depth), spec.pag_layers)
            identity = jnp.asarray(
                np.outer(layers, np.arange(parts * batch) >= batch * (parts - 1))
            )
        control = None
        if condition is not None:
            control = Control(jnp.concatenate([condition] * parts), control_scale)
        given = x, conditioning, texts[guided], cache, identity, control
        output, outputs = apply(*given, method="denoise")
        output = combine_guidance(
            output, scale, config.in_channels, guided=guided, perturbed=pag if perturbed else None
        )
        return output, outputs

    def denoise_windows(windows: Windows, guided, x, conditioning, cache, pag, control_scale):
        def one(window, own):
            return denoise(guided, window, conditioning, None, pag, control_scale, own)[0]

        return over_windows(one, x, windows, condition), {}

    x, known = noise, None
    if edit is not None and edit.latents is not None:
        alpha, sigma = table["start"]
        x = alpha * edit.latents + sigma * noise
        if edit.mask is not None:
            known = Known(edit.latents, noise, edit.mask)
    tokens = int(np.prod(config.grid(noise.shape)))
    shape = (config.depth, batch, tokens, config.width)
    step: Any = denoise
    if spec.windows is not None:
        step = functools.partial(denoise_windows, spec.windows)
    rows = {guided: guided + 1 + len(perturbed) for guided in (False, True)}
    return integrate(
        block_cache.segments(spec.plan, step, shape, spec.module.dtype, rows),
        spec.solver,
        spec.prediction,
        spec.preview,
        x,
        keys,
        {name: table[name] for name in table.keys() - {"start", "pag", "control"}},
        (conditionings, spec.plan.recompute, table["pag"], table.get("control")),
        known,
        both=spec.reference and spec.guided,
    )


@functools.partial(jax.jit, static_argnames="spec")
def sample_latents_jit(spec: SamplerSpec, params, table, *arguments) -> tuple[jax.Array, jax.Array]:
    """(latents, bool [b]: whether an image's are finite)."""
    latents = sample_latents(spec, params, table, *arguments)
    return latents, finite.rows(latents)


@functools.partial(jax.jit, static_argnames=("spec", "decode"), donate_argnames="noise")
def generate_jit(
    spec: SamplerSpec, decode: DecodeSpec, vae_params, params, table, noise, *arguments
):
    """Arguments as :func:`sample_latents` → (latents [b, h, w, c] fp32, in the memory of the noise,
    images [b, height, width, 3] of about [−1, 1], bool [b]: whether both are finite)."""
    latents = sample_latents(spec, params, table, noise, *arguments)
    images = decode_latents(decode, vae_params, latents)
    return latents, images, finite.rows(latents, images)


@functools.partial(jax.jit, static_argnames="module")
def encode_text_jit(module: nn.Module, params, states: jax.Array, lengths: jax.Array) -> TextKV:
    """The keys and values of texts, [depth, n, l, k, h]."""
    return module.apply({"params": params}, states, lengths, method="encode_text")


def _joined(parts: list[TextKV], batch: int) -> TextKV:
    """The texts of the parts of a batch, in diffusers' order (unconditional, conditional,
    perturbed); the shorter text is padded, and one row becomes ``batch``."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.keys.shape[2] for part in parts)

    def padded(a):
        a = jnp.pad(a, ((0, 0), (0, 0), (0, length - a.shape[2]), (0, 0), (0, 0)))
        return jnp.broadcast_to(a, (a.shape[0], batch, *a.shape[2:]))

    keys, values = (jnp.concatenate([padded(part[n]) for part in parts], axis=1) for n in range(2))
    lengths = jnp.concatenate([jnp.broadcast_to(part.lengths, (batch,)) for part in parts])
    return TextKV(keys, values, lengths)


# A compiled scan outlives the callback of its first call, so tell is compiled in, which looks up
# here whom to call.
_watchers: list[Preview] = []
_watching = threading.Lock()


def tell(step: int, latents: np.ndarray) -> None:
    for callback in _watchers:
        callback(step, latents)


@contextlib.contextmanager
def watched_by(callback: Preview) -> Iterator[None]:
    """The scan of the block calls ``callback`` after each step. One at a time in a process."""
    with _watching:
        _watchers.append(callback)
        try:
            yield
            jax.effects_barrier()
        finally:
            _watchers.clear()
