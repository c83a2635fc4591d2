"""Rows of the official DPM-Solver++, whose times are fractional: our pipeline beside latents that
the official code once gave.

The latents lie frozen in official_dpm.npz. They are made from a checkout of the official repository
(PixArt-alpha/PixArt-alpha at cac2fd3):

    python benchmarks/parity_rows/official_solver.py path/to/PixArt-alpha

whose diffusion/model/dpm_solver.py then drives diffusers' transformer with guidance, as its demo
does. Weights and inputs come from NumPy's RandomState, whose stream never changes; the file keeps a
checksum of them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.parity_rows.row import Outputs, Row

SOLVER = Path("diffusion", "model", "dpm_solver.py")
FROZEN = Path(__file__).with_name("official_dpm.npz")
STEPS = (20, 14, 8)  # the code's default, its demos', and one where the order falls at the end
GUIDANCE = 4.5
TOKENS, LENGTHS, NULL_LENGTHS = 9, (9, 4), (1, 1)


def weights(model) -> str:
    """Fill a PyTorch model from RandomState; the checksum of what it holds then. Deviations as in
    tests/tiny_diffusers.py."""
    import torch

    random, digest = np.random.RandomState(6), hashlib.sha256()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            values = (0.15 * random.standard_normal(tuple(parameter.shape))).astype(np.float32)
            digest.update(values.tobytes())
            parameter.copy_(torch.from_numpy(values))
    return digest.hexdigest()


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(noise [2, 8, 8, 4], text states and states of no text [2, l, 16]), fp32."""
    random = np.random.RandomState(7)
    shapes = (2, 8, 8, 4), (2, TOKENS, 16), (2, TOKENS, 16)
    return tuple(random.standard_normal(shape).astype(np.float32) for shape in shapes)


def theirs(steps: int, folder: Path) -> Outputs:
    """The model's folder, and the frozen latents. ValueError where the weights are not those that
    were frozen."""
    from tests import tiny_diffusers

    pipe = tiny_diffusers.build()
    frozen = np.load(FROZEN)
    if weights(pipe.transformer) != str(frozen["weights"]):
        raise ValueError("the frozen latents were made with other weights: freeze them again")
    pipe.save_pretrained(folder / "model")
    return {"latents": frozen[f"latents_{steps}"]}


def ours(steps: int, folder: Path) -> Outputs:
    from pixart_jax import Pipeline

    pipe = Pipeline.from_pretrained(folder / "model")
    noise, text, null = inputs()
    given = (text, np.array(LENGTHS), noise, null, np.array(NULL_LENGTHS))
    how = {"steps": steps, "guidance": GUIDANCE, "times": "fractional"}
    return {"latents": np.asarray(pipe.denoise(*given, **how))}


def freeze(checkout: Path) -> None:
    """Run the official solver and write FROZEN."""

    import torch

    from tests import tiny_diffusers

    spec = importlib.util.spec_from_file_location("official_dpm_solver", checkout / SOLVER)
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    model = tiny_diffusers.build().transformer
    found = {"weights": weights(model)}
    noise, text, null = (torch.from_numpy(values) for values in inputs())
    mask = (torch.arange(TOKENS)[None] < torch.tensor(NULL_LENGTHS + LENGTHS)[:, None]).float()

    more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    more["encoder_attention_mask"] = mask

    def epsilon(x, t, states):
        return model(x, states, timestep=t, **more).sample.chunk(2, dim=1)[0]

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    schedule = official.NoiseScheduleVP("discrete", betas=betas)
    guided = {"guidance_type": "classifier-free", "guidance_scale": GUIDANCE}
    guided |= {"condition": text, "unconditional_condition": null}
    wrapped = official.model_wrapper(epsilon, schedule, **guided)
    solver = official.DPM_Solver(wrapped, schedule, algorithm_type="dpmsolver++")
    how = {"order": 2, "skip_type": "time_uniform", "method": "multistep"}
    for steps in STEPS:
        with torch.no_grad():
            latents = solver.sample(noise.permute(0, 3, 1, 2), steps, **how)
        found[f"latents_{steps}"] = latents.permute(0, 2, 3, 1).numpy()
    np.savez(FROZEN, **found)


ROWS = tuple(
    Row(
        name=f"pipeline official dpm++ {steps}",
        model="pipeline, final latents",
        format=f"official DPM-Solver++, frozen, {steps} steps, guidance {GUIDANCE}",
        size="tiny, 64 × 64 px",
        bound=1e-3,
        theirs=functools.partial(theirs, steps),
        ours=functools.partial(ours, steps),
    )
    for steps in STEPS
)

if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / SOLVER).is_file():
        sys.exit(f"error: give a checkout of PixArt-alpha/PixArt-alpha, with {SOLVER} in it")
    freeze(Path(sys.argv[1]))
