"""Our side of a contest: the Pipeline, Transformer.apply and train step that users run.

A kind of work is a function of (case, options, folder of weights, arrays) that returns Work.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import inputs, machine
from benchmarks.speed.cases import WORDS, Arrays, Case, Work
from pixart_jax import load_component
from pixart_jax.config import Config, DataConfig, MeshConfig, StageConfig
from pixart_jax.images import write_png
from pixart_jax.models.configs import T5Config, VAEConfig
from pixart_jax.models.controlnet import config_of
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.pipeline import Pipeline, SchedulerConfig
from pixart_jax.text import word_tokenizer
from pixart_jax.training import stages
from pixart_jax.training.batches import put
from pixart_jax.training.frozen import FrozenSpec
from pixart_jax.training.state import state_from
from pixart_jax.training.step import compiled_step
from pixart_jax.weights.component import VAE, ControlNet, TextEncoder, Transformer

limits = machine.jax_limits
forget = jax.clear_caches
wait = jax.block_until_ready


def forward(case: Case, options: dict, folder: str, arrays: Arrays) -> Work:
    """One evaluation of the transformer."""
    part = load_component(folder, dtype=case.dtype)
    names = ["noise", "timesteps", "text_states", "text_lengths"]
    names += ["size", "aspect_ratio"] if case.multi_scale else []
    given = [jax.device_put(arrays[name]) for name in names]
    return Work(lambda: part.apply(*given), lambda output: {"output": np.asarray(output)})


def control(case: Case, options: dict, folder: str, arrays: Arrays) -> Work:
    """:func:`forward` under a ControlNet, of copies of the first blocks."""
    part: Any = load_component(folder, dtype=case.dtype)
    config, kernels = config_of(case.config), jnp.asarray(arrays["projections"], case.dtype)
    bias = jnp.zeros(kernels.shape[:2])
    copies = jax.tree.map(lambda stack: stack[: config.depth], part.params["blocks"])
    after = {"kernel": kernels[:-1], "bias": bias[:-1]}
    tree = {
        "units": {"block": copies, "after": after},
        "before": {"kernel": kernels[-1], "bias": bias[-1]},
    }
    names = ["noise", "timesteps", "text_states", "text_lengths"]
    names += ["size", "aspect_ratio"] if case.multi_scale else []
    given = [jax.device_put(arrays[name]) for name in names]
    more = {"controlnet": ControlNet(config, tree, case.dtype)}
    more["control"] = jax.device_put(arrays["control"])
    return Work(lambda: part.apply(*given, **more), lambda output: {"output": np.asarray(output)})


def sample(case: Case, options: dict, folder: str, arrays: Arrays) -> Work:
    """All steps of sampling with guidance, from text states to latents; the negative prompt is one
    row for all images. options["sampling"]: fields of SamplingConfig."""
    pipeline = Pipeline(
        load_component(folder, dtype=case.dtype),
        None,
        VAE(VAEConfig(), {}),
        None,
        SchedulerConfig(),
    )
    names = ("text_states", "text_lengths", "noise", "negative_states", "negative_lengths")
    given = [jax.device_put(arrays[n][: 1 if n.startswith("negative") else None]) for n in names]
    how: dict[str, Any] = {"steps": case.steps, "guidance": case.guidance, "times": "integer"}
    how |= options.get("sampling", {})
    return Work(
        lambda: pipeline.denoise(*given, **how), lambda latents: {"latents": np.asarray(latents)}
    )


def draw(case: Case, options: dict, folder: str, arrays: Arrays) -> Work:
    """From prompts to PNG files. Text encoder and VAE have random parameters."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    pipeline = Pipeline(
        load_component(folder, dtype=case.dtype),
        _random(TextEncoder.abstract(T5Config(**case.t5), case.dtype, mesh)),
        _random(VAE.abstract(VAEConfig(**case.vae), case.dtype, mesh)),
        word_tokenizer(WORDS),
        SchedulerConfig(),
    )
    out, prompts = Path(tempfile.mkdtemp(prefix="images.")), case.prompts
    how: dict[str, Any] = {"steps": case.steps, "guidance": case.guidance, "times": "integer"}
    how |= options.get("sampling", {})
    how |= {"height": case.px, "width": case.px, "binning": False, "batch_size": case.batch}

    def run() -> None:
        for number, image in enumerate(pipeline(prompts, **how)):
            write_png(out / f"{number}.png", image, {})

    return Work(run, lambda _: {})


def _random(part):
    """The component with random parameters in place of its shapes, made on the device."""
    leaves, tree = jax.tree.flatten(part.params)

    def fill(key):
        keys = jax.random.split(key, len(leaves))
        return [
            (0.02 * jax.random.normal(k, leaf.shape)).astype(leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ]

    params = jax.tree.unflatten(tree, jax.jit(fill)(jax.random.key(0)))
    return part.replace(params=params, mesh=None)


# ---- training ----


def traced_step(case: Case, remat: str):
    """(the stage's parts, its step traced from shapes, the mesh of one device): the step of the
    recipe configs/xl2_256_sam.py at one batch shape, without frozen parts."""
    data = DataConfig(buckets=((case.px, case.px),), max_text_tokens=case.text_tokens)
    stage = StageConfig("measured", batch_size=case.batch, data=data, start="fresh")
    parts: dict[str, Any] = {"vae": None, "text_encoder": None}
    config = Config("speed", (stage,), case.config, **parts, compute_dtype=case.dtype, remat=remat)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    made = stages.build_stage(config, stage, FrozenSpec(config), mesh)
    batch = stages.abstract_batch(config, stage, (case.px, case.px), mesh)
    step = compiled_step(config, stage, made, mesh)
    return made, step.trace(made.abstract, batch, stages.abstract_key(mesh)), mesh


def train(case: Case, options: dict, folder: str, arrays: Arrays) -> Work:
    """Train steps: forward, backward, clip, AdamW, EMA. options["remat"]: a policy."""
    begun = time.perf_counter()
    made, traced, mesh = traced_step(case, options["remat"])
    step = traced.lower().compile()
    facts = {"compile_seconds": time.perf_counter() - begun, "memory": memory_of(step)}
    params = {**load_component(folder).params, "null_caption": jnp.asarray(arrays["null_caption"])}
    # copies: the step donates its state, and loaded parameters are mapped from the file
    state = state_from(jax.tree.map(jnp.array, params), made.optimizer, made.abstract)
    del params
    names = ("mean", "std", "text_states", "text_lengths", "size", "aspect_ratio")
    rows: dict[str, Any] = {name: arrays[name] for name in names}
    rows["text_states"] = rows["text_states"].astype(jnp.bfloat16)
    rows["label"] = np.zeros((case.batch,), np.int32)
    batch = put(rows, rules.batch_sharding(mesh))
    keys = map(jax.random.key, itertools.count(inputs.STEP_KEY))

    def run():
        nonlocal state
        key = jax.device_put(next(keys), rules.replicated(mesh))
        state, metrics = step(state, batch, key)
        return metrics

    names = ("loss", "grad_norm")
    return Work(run, lambda metrics: {name: np.asarray(metrics[name]) for name in names}, facts)


def memory_of(compiled) -> dict[str, int]:
    """Bytes a device by the compiler's account: arguments (state and batch, donated), temporaries
    and all."""
    found = compiled.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    whole = arguments + temporaries + new
    return {"arguments": arguments, "temporaries": temporaries, "all": whole}


def step_bytes(case: Case, remat: str) -> int:
    """Bytes a device of the compiled train step; on a GPU without autotuning its kernels."""
    quick = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
    compiled = traced_step(case, remat)[1].lower().compile(compiler_options=quick)
    return memory_of(compiled)["all"]


def device_bytes() -> int:
    """The memory of the device; 0 where it does not report it."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def traced_sampler(case: Case):
    """Pipeline.denoise, traced from shapes alone, as one device would hold them."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    shapes = Transformer.abstract(case.config, case.dtype, mesh).params
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    pipeline = Pipeline(Transformer(case.config, {}, case.dtype), None, VAE(VAEConfig(), {}), None)
    b, side = case.batch, case.px // pipeline.factor
    states = jax.ShapeDtypeStruct((b, case.text_tokens, case.config.caption_width), jnp.float32)
    lengths = jax.ShapeDtypeStruct((b,), jnp.int32)
    noise = jax.ShapeDtypeStruct((b, side, side, case.config.in_channels), jnp.float32)

    def run(params, *arrays):
        filled = pipeline.replace(transformer=pipeline.transformer.replace(params=params))
        return filled.denoise(*arrays, steps=case.steps, guidance=case.guidance)

    return jax.jit(run).trace(params, states, lengths, noise, states, lengths)


def compile_seconds(case: Case, options: dict) -> tuple[float, float]:
    """Seconds to compile the train step or the sampler, and the same with tracing and lowering."""
    jax.devices()
    begun, train = time.perf_counter(), case.kind == "train"
    traced = traced_step(case, options["remat"])[1] if train else traced_sampler(case)
    lowered = traced.lower()
    compiling = time.perf_counter()
    lowered.compile()
    done = time.perf_counter()
    return done - compiling, done - begun


KINDS = {"forward": forward, "control": control, "sample": sample, "draw": draw, "train": train}


def described() -> dict[str, str]:
    device = jax.devices()[0]
    where = "gpu" if device.platform == "cuda" else device.platform
    return {"platform": where, "device": device.device_kind}


def peak_device_bytes() -> int | None:
    """The peak of the device's memory since this process began; None where it is not counted."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
