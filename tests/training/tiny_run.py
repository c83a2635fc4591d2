"""A run of a few thousand parameters on a few dozen samples, whole: frozen parts, encoded shards,
three stages, two buckets."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from pixart_jax.commands import train
from pixart_jax.config import (
    Config,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreviewConfig,
    StageConfig,
)
from pixart_jax.models.configs import T5Config, TransformerConfig, VAEConfig
from pixart_jax.parallel.rules import batch_sharding
from pixart_jax.text import word_tokenizer
from pixart_jax.training import loop, metrics
from pixart_jax.training.batches import open_loader, put
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.initialization import initial_state
from pixart_jax.training.stages import build_stage
from pixart_jax.training.step import compiled_step
from pixart_jax.weights.component import VAE, TextEncoder
from tests.data import tiny_sets
from tests.parameters import normal_like

WORDS = "a red green blue circle square left of right".split()
CLASSES = 5
VAE_SIZES = VAEConfig(
    block_out_channels=(4, 4, 4, 4),
    layers_per_block=1,
    norm_num_groups=2,
    mid_block_attention=False,
    scaling_factor=0.5,
)
TEXT_SIZES = T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
MODEL = TransformerConfig(
    depth=2, width=32, heads=4, caption_width=16, text_tokens=16, sample_size=4
)


def parts(folder: Path) -> Path:
    """vae/, text_encoder/ and tokenizer/ of random weights."""
    for kind, config, name in ((VAE, VAE_SIZES, "vae"), (TextEncoder, TEXT_SIZES, "text_encoder")):
        component = kind(config, {})
        params = normal_like(kind.param_shapes(config))
        component.replace(params=params).save(folder / name)
    word_tokenizer(WORDS).save_pretrained(str(folder / "tokenizer"))
    return folder


def shards(
    folder: Path, buckets=((32, 32),), count: int = 24, condition: str | None = None
) -> Path:
    """Encoded shards of random latents and states, ``count`` records a bucket. condition: the kind
    of those that they hold, random too."""
    made: dict[tuple[int, int], list[tuple[dict, dict]]] = {}
    for number, (height, width) in enumerate(buckets):
        rng = np.random.default_rng(number)
        made[height, width] = []
        for index in range(count):
            length = int(rng.integers(2, 9))
            arrays = {
                "mean": rng.normal(size=(height // 8, width // 8, 4)).astype(np.float32),
                "std": rng.uniform(0.1, 0.5, (height // 8, width // 8, 4)).astype(np.float32),
                "label": np.int64(index % CLASSES),
                "size": np.array([height, width], np.int32),
                "text.dense.0": rng.normal(size=(length, 16)).astype(ml_dtypes.bfloat16),
            }
            if condition is not None:
                shape = arrays["mean"].shape
                arrays["control_mean"] = rng.normal(size=shape).astype(np.float32)
                arrays["control_std"] = rng.uniform(0.1, 0.5, shape).astype(np.float32)
            metadata = {"key": f"r{number}-{index}", "captions.dense": '["a red circle"]'}
            made[height, width].append((arrays, metadata))
    made_with = {"source": "random"} | ({"condition": condition} if condition else {})
    return tiny_sets.shards(folder, made, made_with, {"dense": 8})


def recipe(folder: Path, steps: int | None = None, every: int = 3) -> Path:
    """The curriculum as a file that train.py takes; with ``steps`` its first stage alone, so long.
    every: steps between checkpoints."""
    here = Path(__file__).resolve().parent
    file = folder / f"tiny_{steps}_{every}.py"
    file.write_text(
        "import dataclasses, sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(here)!r})\n"
        "from tiny_run import curriculum\n\n\n"
        "def get_config():\n"
        f"    config = curriculum(Path({str(folder)!r}), checkpoint_every={every})\n"
        f"    if {steps is None}:\n"
        "        return config\n"
        f"    stage = dataclasses.replace(config.stages[0], steps={steps})\n"
        "    return dataclasses.replace(config, stages=(stage,))\n"
    )
    return file


def steps_on(config: Config, mesh: jax.sharding.Mesh, count: int):
    """(losses, last state, parts) of the first steps of a config's first stage on a mesh."""
    frozen, stage = Frozen(config, Path(".")), config.stages[0]
    loader = open_loader(config, 0, frozen, None, mesh)
    parts = build_stage(config, stage, frozen, mesh).load_base(mesh)
    state = initial_state(config, 0, parts, None, print)
    step, losses = compiled_step(config, stage, parts, mesh), []
    for number in range(count):
        batch = put(loader.batch(number), batch_sharding(mesh))
        state, found = step(state, batch, jax.random.key(number))
        losses.append(float(found["loss"]))
    return losses, state, parts


def final_state(workdir: Path, total: int):
    """The checkpoint after ``total`` steps, read by Orbax alone."""
    return ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(total) / "state")


def figures(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in metrics.TIMING} for line in lines]


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL would."""


def kill_before(patch, *numbers: int) -> None:
    """Runs are Killed before these of their steps, counted over all of them from here on.
    patch: pytest's."""
    put, count = loop.put, itertools.count(1)

    def put_or_die(*batch):
        if next(count) in numbers:
            raise Killed
        return put(*batch)

    patch.setattr(loop, "put", put_or_die)


def train_cut_off(config: Config, workdir: Path, patch, *numbers: int) -> int:
    """Train, :func:`kill_before` these steps, until the run is done; how many starts it took."""
    starts = 0
    kill_before(patch, *numbers)
    while not (workdir / "ledger.json").exists():
        starts += 1
        with contextlib.suppress(Killed):
            train.train(config, workdir)
    return starts


def curriculum(folder: Path, **changes) -> Config:
    """Three stages: class-conditional, text, text at two aspect ratios. Makes what it reads under
    ``folder`` where absent."""
    if not (folder / "parts").exists():
        parts(folder / "parts")
        shards(folder / "square")
        shards(folder / "aspects", ((32, 32), (32, 48)))
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, clip=1.0, ema=0.9, eps=1e-8)
    came = dataclasses.replace(optimizer, name="came", learning_rate=1e-5)
    square = DataConfig(source=str(folder / "square"), buckets=((32, 32),), max_text_tokens=16)
    aspects = dataclasses.replace(
        square, source=str(folder / "aspects"), buckets=((32, 32), (32, 48))
    )
    halves = dataclasses.replace(optimizer, accumulate=2)
    empty = ObjectiveConfig(null_condition="empty", prediction="v")
    first = StageConfig("pixels", "class_conditional", 7, 8, square, optimizer, start="fresh")
    second = StageConfig("words", "text_to_image", 8, 8, square, came)
    third = StageConfig(
        "beauty", "text_to_image", 9, 16, aspects, halves, empty, position_scale=2.0
    )
    settings = {
        "name": "tiny",
        "stages": (first, second, third),
        "model": MODEL,
        "num_classes": CLASSES,
        "vae": str(folder / "parts"),
        "text_encoder": str(folder / "parts"),
        "compute_dtype": "float32",
        "log_every": 1,
        "checkpoint_every": 3,
        "preview": PreviewConfig(steps=2, guidance=2.0),
    }
    return Config(**{**settings, **changes})
