"""Our side of a contest: the very Pipeline.denoise, Transformer.apply and train step that users
run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import inputs, limits
from benchmarks.speed.cases import PROMPTS, TINY, WORDS, Case
from pixart_jax import load_component
from pixart_jax.config import Config, DataConfig, MeshConfig, StageConfig
from pixart_jax.models.t5 import T5Config
from pixart_jax.models.vae import VAEConfig
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.pipeline import CacheConfig, Pipeline, SchedulerConfig
from pixart_jax.text import word_tokenizer
from pixart_jax.training import abstract
from pixart_jax.training.batches import put
from pixart_jax.training.state import state_from
from pixart_jax.weights.component import VAE, TextEncoder

TINY_VAE = VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)


def text_config(case: Case) -> T5Config:
    """T5-XXL, or one of a few thousand parameters."""
    sizes = {
        "vocab_size": 96,
        "d_model": case.config.caption_width,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    return T5Config(**sizes) if case.model == TINY else T5Config()


class Forward:
    """One evaluation of the transformer."""

    def __init__(self, case: Case, how: dict, folder: str, arrays: dict[str, np.ndarray]):
        self._part = load_component(folder, dtype=case.dtype)
        names = (
            "noise",
            "timesteps",
            "text_states",
            "text_lengths",
            *(("size", "aspect_ratio") if case.multi_scale else ()),
        )
        self._arguments = [jax.device_put(arrays[name]) for name in names]

    def run(self) -> None:
        self._output = self._part.apply(*self._arguments).block_until_ready()

    def result(self) -> dict[str, np.ndarray]:
        return {"output": np.asarray(self._output)}

    def facts(self) -> dict:
        return {}


class Sample:
    """All steps of sampling with guidance, from text states to latents. how["shortcuts"]: fields of
    pipeline/shortcuts.py.

    The negative prompt is one row for all images, as Pipeline.draw has it.
    """

    def __init__(self, case: Case, how: dict, folder: str, arrays: dict[str, np.ndarray]):
        vae = VAE(VAEConfig(), {})  # for its factor; nothing is decoded
        self._pipeline = Pipeline(
            load_component(folder, dtype=case.dtype), None, vae, None, SchedulerConfig()
        )
        names = ("text_states", "text_lengths", "noise", "negative_states", "negative_lengths")
        given = {
            **arrays,
            **{name: arrays[name][:1] for name in names if name.startswith("negative")},
        }
        self._arguments = [jax.device_put(given[name]) for name in names]
        shortcuts = CacheConfig(**how.get("shortcuts", {}))
        self._how = {
            "steps": case.steps,
            "guidance": case.guidance,
            "times": "integer",
            "shortcuts": shortcuts,
        }

    def run(self) -> None:
        self._latents = self._pipeline.denoise(*self._arguments, **self._how).block_until_ready()

    def result(self) -> dict[str, np.ndarray]:
        return {"latents": np.asarray(self._latents)}

    def facts(self) -> dict:
        return {}


class Draw:
    """From prompts to PNG files: text encoder, sampling, VAE, encoding of the files. Text encoder
    and VAE are of random numbers."""

    def __init__(self, case: Case, how: dict, folder: str, arrays: dict[str, np.ndarray]):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        encoder = _random(TextEncoder.abstract(text_config(case), case.dtype, mesh))
        vae = _random(
            VAE.abstract(TINY_VAE if case.model == TINY else VAEConfig(), case.dtype, mesh)
        )
        words = word_tokenizer(WORDS)
        self._pipeline = Pipeline(
            load_component(folder, dtype=case.dtype), encoder, vae, words, SchedulerConfig()
        )
        self._case, self._out = case, Path(tempfile.mkdtemp(prefix="drawn."))
        self._prompts = [PROMPTS[n % len(PROMPTS)] for n in range(case.batch)]
        self._shortcuts = CacheConfig(**how.get("shortcuts", {}))

    def run(self) -> None:
        case = self._case
        images = self._pipeline(
            self._prompts,
            steps=case.steps,
            guidance=case.guidance,
            height=case.px,
            width=case.px,
            times="integer",
            binning=False,
            batch_size=case.batch,
            shortcuts=self._shortcuts,
        )
        for number, image in enumerate(images):
            images.write(self._out / f"{number}.png", image, {})

    def result(self) -> dict[str, np.ndarray]:
        return {}

    def facts(self) -> dict:
        return {}


def _random(part):
    """The component with random parameters in place of its shapes, made on the device."""
    leaves, tree = jax.tree.flatten(part.params)

    def fill(key):
        keys = jax.random.split(key, len(leaves))
        return [
            (0.02 * jax.random.normal(k, leaf.shape)).astype(leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ]

    return part.replace(
        params=jax.tree.unflatten(tree, jax.jit(fill)(jax.random.key(0))), mesh=None
    )


def config_of(case: Case, remat: str) -> tuple[Config, StageConfig]:
    """The run whose step is measured: stage 2's recipe (configs/xl2_256_sam.py), one batch shape,
    no frozen parts at hand."""
    data = DataConfig(buckets=((case.px, case.px),), max_text_tokens=case.text_tokens)
    stage = StageConfig("measured", batch_size=case.batch, data=data, start="fresh")
    return Config(
        "speed",
        (stage,),
        case.config,
        vae=None,
        text_encoder=None,
        compute_dtype=case.dtype,
        remat=remat,
    ), stage


def traced_step(case: Case, remat: str):
    """(the stage's parts, its step traced from shapes, the mesh of one device)."""
    config, stage = config_of(case, remat)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    made = abstract.build_stage(config, stage, abstract.FrozenSpec(config), mesh)
    batch = abstract.abstract_batch(config, stage, (case.px, case.px), mesh)
    return (
        made,
        abstract.compiled_step(config, stage, made, mesh).trace(
            made.abstract, batch, abstract.abstract_key(mesh)
        ),
        mesh,
    )


class Train:
    """Train steps: forward, backward, clip, AdamW, EMA. how["remat"]: a policy of
    models/remat.py."""

    def __init__(self, case: Case, how: dict, folder: str, arrays: dict[str, np.ndarray]):
        begun = time.perf_counter()
        self._made, traced, mesh = traced_step(case, how["remat"])
        self._step = traced.lower().compile()
        self._compiled_in = time.perf_counter() - begun
        params = {
            **load_component(folder).params,
            "null_caption": jnp.asarray(arrays["null_caption"]),
        }
        # the step donates them; those of a file are mapped from it
        params = jax.tree.map(jnp.array, params)
        self._state = state_from(params, self._made.optimizer, self._made.abstract)
        del params
        names = ("mean", "std", "text_states", "text_lengths", "size", "aspect_ratio")
        batch = {name: arrays[name] for name in names} | {
            "label": np.zeros((case.batch,), np.int32)
        }
        self._batch = put(
            {**batch, "text_states": batch["text_states"].astype(jnp.bfloat16)},
            rules.batch_sharding(mesh),
        )
        self._keys = (
            jax.device_put(jax.random.key(inputs.STEP_KEY + n), rules.replicated(mesh))
            for n in range(1 << 30)
        )
        self._first = None

    def run(self) -> None:
        self._state, metrics = self._step(self._state, self._batch, next(self._keys))
        metrics = jax.block_until_ready(metrics)
        self._first = self._first or metrics

    def result(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(self._first[name]) for name in ("loss", "grad_norm")}

    def facts(self) -> dict:
        """Seconds of tracing and compiling, and what the compiler says of the step's memory, in
        bytes."""
        return {"compile_seconds": self._compiled_in, "memory": memory_of(self._step)}


def memory_of(compiled) -> dict[str, int]:
    """arguments (state and batch, donated), temporaries and all of a compiled program, bytes a
    device, by the compiler's word."""
    found = compiled.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "all": arguments + temporaries + new,
    }


KINDS = {"forward": Forward, "sample": Sample, "draw": Draw, "train": Train}


def open_case(case: Case, how: dict, folder: str, arrays: dict[str, np.ndarray]):
    return KINDS[case.kind](case, how, folder, arrays)


def limit(dtype: str) -> dict[str, float]:
    return limits.of_jax(dtype)


def described() -> dict:
    device = jax.devices()[0]
    return {
        "platform": device.platform if device.platform != "cuda" else "gpu",
        "device": device.device_kind,
    }


def peak_device_bytes() -> int | None:
    """The highest use of the device's memory since this process began; None where the device does
    not count it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def forget() -> None:
    """Between two cases: what was compiled is let go."""
    jax.clear_caches()
