"""What adapters and edits cost: seconds of Pipeline.denoise beside the plain run of 20 guided
steps, random weights, rows in turn.

    python benchmarks/edits.py --preset B/2 --px 256 --repeat 5

*ratio*: median seconds of the row over those of the plain run.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed.table import flag_parser, table, tell  # noqa: E402
from pixart_jax import Pipeline  # noqa: E402
from pixart_jax.models import lora  # noqa: E402
from pixart_jax.models.configs import TransformerConfig, VAEConfig  # noqa: E402
from pixart_jax.weights.component import VAE, Transformer  # noqa: E402

ROWS: dict[str, dict] = {
    "20 steps, guidance 4.5": {},
    "a merged LoRA of rank 16": {},
    "image to image, strength 0.75": {"latents": True, "strength": 0.75},
    "image to image, strength 0.5": {"latents": True, "strength": 0.5},
    "image to image, strength 0.25": {"latents": True, "strength": 0.25},
    "inpainting, strength 1": {"latents": True, "mask": True, "strength": 1.0},
    "perturbed-attention guidance": {"pag_scale": 3.0},
    "the same without guidance": {"pag_scale": 3.0, "guidance": 1.0},
    "4 steps of a student, no guidance": {"steps": 4, "guidance": 1.0, "solver": "lcm"},
}


def lora_of(params, rank: int = 16) -> dict:
    """A random adapter of the blocks' attention."""
    draw = np.random.default_rng(0).normal
    tree: dict = {"blocks": {}}
    for part in ("attn", "cross_attn"):
        tree["blocks"][part] = {}
        for name in ("q", "k", "v", "out"):
            depth, inputs, outputs = params["blocks"][part][name]["kernel"].shape
            a = draw(size=(depth, inputs, rank)).astype(np.float32) / rank
            b = draw(size=(depth, rank, outputs)).astype(np.float32) / 1000
            tree["blocks"][part][name] = {"a": a, "b": b}
    return tree


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--preset", default="B/2")
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    side, dtype = options.px // 8, jnp.dtype(options.dtype)
    config = TransformerConfig.preset(options.preset, sample_size=side)
    params = jax.jit(lambda key: filled(config, key))(jax.random.key(0))
    plain = Pipeline(Transformer(config, params, dtype), None, VAE(VAEConfig(), {}), None)
    merged = lora.merge(params, lora_of(params))
    adapted = plain.replace(transformer=plain.transformer.replace(params=merged))
    rng = np.random.default_rng(0)
    shape = (options.batch, side, side, config.in_channels)
    states = rng.normal(size=(options.batch, config.text_tokens, config.caption_width))
    lengths = np.full(options.batch, config.text_tokens, np.int32)
    text, noise = (states.astype(np.float32), lengths), rng.normal(size=shape).astype(np.float32)
    known = rng.normal(size=shape).astype(np.float32)
    mask = np.zeros((*shape[:3], 1), bool)
    mask[:, side // 4 : side // 2, side // 4 : side // 2] = True

    def run(name: str) -> float:
        how = {"steps": 20, "guidance": 4.5, **ROWS[name]}
        how |= {k: v for k, v in (("latents", known), ("mask", mask)) if how.get(k)}
        pipe = adapted if "LoRA" in name else plain
        begun = time.perf_counter()
        jax.block_until_ready(pipe.denoise(*text, noise, *text, **how))
        return time.perf_counter() - begun

    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    for turn in range(options.repeat + 1):  # the first one compiles
        for name in ROWS:
            taken = run(name)
            if turn:
                seconds[name].append(taken)
        tell(f"turn {turn} of {options.repeat}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    rows = [[name, f"{value:.3f}", f"{value / first:.2f}"] for name, value in medians.items()]
    title = f"{options.preset}, {options.px} px, batch {options.batch}, {dtype.name}"
    device = jax.devices()[0].device_kind
    print(f"**{title}, {device}**\n\n{table(['run', 'seconds', 'ratio'], rows)}")


def filled(config: TransformerConfig, key):
    """Random parameters of a transformer."""
    leaves, tree = jax.tree.flatten(nn.unbox(Transformer.param_shapes(config)))
    keys = jax.random.split(key, len(leaves))
    made = [0.02 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(tree, made)


if __name__ == "__main__":
    main()
