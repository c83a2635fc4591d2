"""Which options of a drawing can be used with a model; checked from its configs alone, so before
any weight is read."""

from __future__ import annotations

from pathlib import Path

from pixart_jax import diffusion
from pixart_jax.diffusion.sampling import TIMES
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import cache_folder
from pixart_jax.models.transformer import TransformerConfig
from pixart_jax.models.vae import VAEConfig
from pixart_jax.pipeline import binning as bins
from pixart_jax.pipeline import sampling
from pixart_jax.pipeline.shortcuts import NONE, CacheConfig

NULLS = ("auto", *sampling.NULLS)
DTYPES = ("auto", "float32", "bfloat16")


def weights_cache(name: str) -> Path | None:
    """The folder of converted weights that a flag names: 'auto' (one in $PIXART_JAX_CACHE), 'none',
    or a path."""
    if name == "none":
        return None
    return cache_folder() / "weights" if name == "auto" else Path(name)


def validate_options(
    transformer: TransformerConfig,
    vae: VAEConfig,
    *,
    steps: int = 20,
    guidance: float = 4.5,
    height: int | None = None,
    width: int | None = None,
    solver: str = "dpm++",
    times: str = "fractional",
    null: str = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    tile: int | None = None,
    binning: bool = True,
    shortcuts: CacheConfig = NONE,
) -> tuple[int, int]:
    """(height, width) in pixels that the options ask for, by default the side that the model was
    trained at.

    Raises UserError, naming what would do, for any that cannot be used.
    """
    default = transformer.sample_size * vae.factor
    height, width = default if height is None else height, default if width is None else width
    # drawn at a size of the table, so any of whole latents will do
    binned = binning and bins.base(transformer, vae) is not None
    unit = vae.factor * (1 if binned else transformer.patch_size)
    for name, value in (("height", height), ("width", width)):
        if value < unit or value % unit:
            fits = max(unit, (value + unit // 2) // unit * unit)
            unit_is = (
                f"{unit}"
                if binned
                else f"{unit} ({vae.factor} × patch size {transformer.patch_size})"
            )
            raise UserError(
                f"{name} {value}: a side must be a multiple of {unit_is}; {fits} would do"
            )
    if steps < 1:
        raise UserError(f"steps {steps}: at least 1 is needed")
    if not abs(guidance) < float("inf"):
        raise UserError(f"guidance {guidance}: a finite number is needed; 1 does no second pass")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch size {batch_size}: at least 1 is needed")
    if tile is not None and tile < 32:
        raise UserError(
            f"vae tile {tile}: at least 32 latents a side are needed, so that tiles blend over 16"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed}: a whole number from 0 to {2**32 - 1} is needed")
    for name, value, known in (
        ("solver", solver, diffusion.solvers.NAMES),
        ("times", times, TIMES),
        ("null", null, NULLS),
    ):
        check_choice(name, value, known)
    t = diffusion.timesteps(solver, steps, times=times)  # a solver's own demands on the steps
    shortcuts.plan(t, transformer.depth, float(guidance) != 1.0)  # that a schedule fits them
    return height, width


def check_choice(what: str, value: str, known: tuple[str, ...]) -> str:
    """The value, or UserError with the known one that is nearest."""
    if value not in known:
        raise UserError(f"{what} {value!r} is unknown{nearest(value, known)}")
    return value
