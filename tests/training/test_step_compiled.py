"""What a step is compiled to: casts, copies, executables. Programs for accelerators are compiled
where their compilers are installed."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import compilers
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

from pixart_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    StageConfig,
)
from pixart_jax.models.configs import DiTConfig, TransformerConfig
from pixart_jax.models.dit import DiT
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.parallel.rules import unboxed
from pixart_jax.training import stages
from pixart_jax.training.frozen import FrozenSpec
from pixart_jax.training.step import compiled_step, update_where
from pixart_jax.training.tasks.class_conditional import ClassConditional
from pixart_jax.training.tasks.denoising import DiffusionObjective
from pixart_jax.training.tasks.text_to_image import TextToImage

SIZES = {"depth": 2, "width": 64, "heads": 4, "sample_size": 8}
COMPRESSED = {"kv_compression": 2, "kv_compression_layers": (1,)}
MODEL = TransformerConfig(**SIZES, caption_width=16, text_tokens=8, **COMPRESSED)


def task(kind: str, dtype):
    denoising = DiffusionObjective(ObjectiveConfig(), 0.18215)
    if kind == "dit":
        module = DiT(DiTConfig(**SIZES, num_classes=5), dtype=dtype)
        return ClassConditional(module, denoising, None)
    module = PixArtTransformer(MODEL, dtype=dtype, remat="full")
    return TextToImage(module, denoising, None, 0, StageConfig("stage"))


def batch(rows: int = 4):
    rng = np.random.default_rng(0)
    return {
        "mean": rng.normal(size=(rows, 8, 8, 4)).astype(np.float32),
        "std": np.full((rows, 8, 8, 4), 0.1, np.float32),
        "text_states": rng.normal(size=(rows, 8, 16)).astype(jnp.bfloat16),
        "text_lengths": np.full((rows,), 5, np.int32),
        "size": np.full((rows, 2), 64, np.float32),
        "aspect_ratio": np.ones((rows,), np.float32),
        "label": np.arange(rows, dtype=np.int32),
    }


def drawn(made):
    """Parameters without a zero among them, so that every gradient is felt."""
    params = unboxed(jax.jit(made.init)(jax.random.key(0)))

    def add_noise(x):
        return x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape)

    return jax.tree.map(add_noise, params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "dit"])
def test_casting_ahead_of_the_blocks_changes_neither_losses_nor_gradients(kind):
    """The plain way: the module is given the fp32 masters and casts in each turn of its loop."""
    made = task(kind, jnp.bfloat16)
    params, given, keys = drawn(made), batch(), jax.random.split(jax.random.key(1), 4)
    plain = dataclasses.replace(made, module=Uncast(made.module))

    def run(one):
        loss = jax.value_and_grad(lambda p: one.losses(p, given, keys)["loss"].mean())
        return jax.jit(loss)(params)

    def assert_close(ours, theirs):
        assert ours.dtype == jnp.float32
        atol = 2**-8 * float(jnp.abs(theirs).max()) + 1e-12
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)

    (loss, gradient), (of_plain, gradient_of_plain) = run(made), run(plain)
    np.testing.assert_array_equal(loss, of_plain)
    jax.tree.map(assert_close, gradient, gradient_of_plain)


@dataclasses.dataclass(frozen=True)
class Uncast:
    """A module that says it computes in fp32, so that nothing is cast before it; it computes as
    ever."""

    module: object
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    @property
    def config(self):
        return self.module.config

    def apply(self, *arguments, **named):
        return self.module.apply(*arguments, **named)


@pytest.mark.parametrize("kind", ["transformer", "dit"])
def test_no_kernel_is_cast_within_the_loop_over_blocks(kind):
    """Else a rematerialised backward pass casts the kernels again, and gradients are kept in fp32
    from loop to optimizer."""
    made = task(kind, jnp.bfloat16)
    params = jax.eval_shape(lambda: unboxed(made.init(jax.random.key(0))))
    keys = jax.random.split(jax.random.key(1), 4)
    traced = jax.jit(jax.grad(lambda p: made.losses(p, batch(), keys)["loss"].mean())).trace(params)
    blocks = jax.tree_util.tree_leaves_with_path(params["blocks"])
    kernels = {leaf.shape[1:] for path, leaf in blocks if path[-1].key == "kernel"}

    def casts(jaxpr, inside):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            loop = inside or name == "scan"
            to_bfloat16 = equation.params.get("new_dtype") == jnp.bfloat16
            if inside and name == "convert_element_type" and to_bfloat16:
                yield from (v.aval.shape for v in equation.invars if v.aval.dtype == jnp.float32)
            for inner in jaxprs.within(equation):
                yield from casts(inner, loop)

    assert not kernels & set(casts(traced.jaxpr.jaxpr, False))


def numbers(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("ok", [True, False])
def test_leaving_a_step_out_is_the_same_on_every_platform(ok):
    """The loop of CPUs and the selection of accelerators; what is not taken stays to the bit,
    though the gradient is no number."""
    rng = np.random.default_rng(0)
    params, moments, grads = numbers(rng, 5, 3), numbers(rng, 5, 3), numbers(rng, 5, 3)
    grads = grads if ok else grads * jnp.nan

    def take(params, moments, grads):
        moments = 0.9 * moments + 0.1 * grads
        return params - moments, moments

    wanted = take(params, moments, grads) if ok else (params, moments)
    for on_cpu in (True, False):
        run = jax.jit(partial(update_where, update=partial(take, grads=grads), on_cpu=on_cpu))
        made = run(ok, params=params, opt_state=moments)
        for ours, value in zip(made, wanted, strict=True):
            np.testing.assert_allclose(ours, value, rtol=1e-6 if ok else 0.0)


def small(remat="full", accumulate=1, dtype="bfloat16") -> Config:
    """Two blocks of some width, so that the state outweighs all else."""
    optimizer = OptimizerConfig(accumulate=accumulate, ema=0.999)
    data = DataConfig(max_text_tokens=8)
    stage = StageConfig("s", batch_size=4, data=data, optimizer=optimizer)
    sizes = {"depth": 2, "width": 512, "heads": 4, "caption_width": 64, "text_tokens": 8}
    model = TransformerConfig(**sizes, sample_size=8)
    return Config(name="small", stages=(stage,), model=model, compute_dtype=dtype, remat=remat)


# of ``small``: bytes of state, temporaries and of what is gathered and copied
PROGRAM = Path(__file__).parent / "step_for_topology.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["cpu:1", *(pytest.param(name, marks=compilers.needs(name)) for name in ("h200:1", "v5e:1x1"))],
)
def test_the_state_is_updated_where_it_lies(name):
    """Donated, and never copied: besides it a step holds gradients, a copy in the compute dtype and
    activations, less than half of it."""
    found = compilers.compiled(name, PROGRAM)
    assert found["aliased"] >= found["state"]
    assert found["temporaries"] < 0.5 * found["state"], found
    if name != "cpu:1":  # whose kernels are copied into the layout that its products want
        assert found["copied"] < 0.1 * found["state"], found


@pytest.mark.slow
@compilers.needs("v5e:2x2")
def test_on_a_tpu_slice_bfloat16_is_gathered_and_not_the_masters():
    found = compilers.compiled("v5e:2x2", PROGRAM)
    gathered, parameters = found["gathered"], found["parameters"]
    assert gathered["bf16"] > 2 * parameters  # forward and backward pass, 2 bytes each
    # of the timestep's layers, which compute in it
    assert gathered["f32"] < 0.25 * gathered["bf16"], found


@pytest.mark.slow
def test_with_micro_batches_a_bucket_takes_one_executable_and_no_step_asks_the_device():
    """From the first state, made outside the step, to the last; a step that read a value would fail
    under the guard."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = small(accumulate=2, dtype="float32")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, width=48))
    stage = config.stages[0]
    made = stages.build_stage(config, stage, FrozenSpec(config), mesh)
    step = compiled_step(config, stage, made, mesh)
    state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), made.abstract)
    state = jax.device_put(state, jax.tree.map(lambda s: s.sharding, made.abstract))
    for number, bucket in enumerate([(64, 64), (64, 64), (48, 80), (64, 64), (48, 80)]):
        shapes = stages.abstract_batch(config, stage, bucket, mesh)
        rows = {name: np.zeros(s.shape, s.dtype) for name, s in shapes.items()}
        with jax.transfer_guard_device_to_host("disallow"):
            state, _ = step(state, jax.device_put(rows), jax.random.key(number))
        assert step.executables == (1 if number < 2 else 2)
