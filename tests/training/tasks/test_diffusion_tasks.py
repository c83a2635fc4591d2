"""The two diffusion tasks: what is drawn for a sample, and what a dropped condition becomes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import diffusion
from pixart_jax.config import ObjectiveConfig, StageConfig
from pixart_jax.models.configs import DiTConfig, TransformerConfig
from pixart_jax.models.dit import DiT
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.training.tasks.class_conditional import ClassConditional
from pixart_jax.training.tasks.denoising import DiffusionObjective
from pixart_jax.training.tasks.text_to_image import TextToImage
from tests.parameters import normal_params

SIZES = {"depth": 1, "width": 24, "heads": 2, "sample_size": 4}
TEXT = PixArtTransformer(TransformerConfig(**SIZES, caption_width=16, text_tokens=10))
CLASS = DiT(DiTConfig(**SIZES, num_classes=3))


def batch(rows: int = 6) -> dict:
    rng = np.random.default_rng(0)
    return {
        "mean": jnp.asarray(rng.normal(size=(rows, 4, 4, 4)), jnp.float32),
        "std": jnp.asarray(rng.uniform(0.1, 1, (rows, 4, 4, 4)), jnp.float32),
        "text_states": jnp.asarray(rng.normal(size=(rows, 8, 16)), jnp.bfloat16),
        "text_lengths": jnp.asarray(rng.integers(2, 9, rows), jnp.int32),
        "size": jnp.full((rows, 2), 32.0),
        "aspect_ratio": jnp.ones((rows,)),
        "label": jnp.asarray([0, 1, 2, -1, 1, 0], jnp.int32)[:rows],
    }


def objective(dropout: float = 0.1, **options) -> DiffusionObjective:
    return DiffusionObjective(ObjectiveConfig(condition_dropout=dropout, **options), 0.5)


KEYS = jax.random.split(jax.random.key(5), 6)


def test_the_posterior_is_sampled_and_scaled():
    shape = (2000, 1, 1, 4)
    posterior = {"mean": jnp.full(shape, 3.0), "std": jnp.full(shape, 2.0)}
    made = objective().prepare(posterior, jax.random.split(KEYS[0], 2000))
    assert float(made.x0.mean()) == pytest.approx(1.5, abs=0.05)
    assert float(made.x0.std()) == pytest.approx(1.0, abs=0.05)
    assert int(made.t.min()) < 20 and int(made.t.max()) > 979
    assert float(made.t.mean()) == pytest.approx(499.5, abs=25)
    assert float(made.dropped.mean()) == pytest.approx(0.1, abs=0.03)
    noised = diffusion.add_noise(made.x0, made.noise, made.t)
    np.testing.assert_allclose(made.x_t, noised, rtol=1e-5)


def test_a_samples_draws_are_its_own_keys_alone():
    denoising, b = objective(), batch()
    b |= {"control_mean": b["mean"] + 1, "control_std": b["std"]}
    whole = denoising.prepare(b, KEYS)
    part = denoising.prepare({k: v[2:4] for k, v in b.items()}, KEYS[2:4])
    for a, c in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        np.testing.assert_array_equal(a[2:4], c)


@pytest.mark.parametrize(("dropout", "null_length"), [(0.0, 0), (1.0, 0), (1.0, 3)])
def test_a_dropped_caption_is_the_null_caption_under_its_own_length_or_the_empty_texts(
    dropout, null_length
):
    task = TextToImage(TEXT, objective(dropout), None, null_length, StageConfig("stage"))
    params, b = normal_params(task.init), batch()
    made = jax.jit(task.denoising.prepare)(b, KEYS)
    states, lengths = b["text_states"].astype(jnp.float32), b["text_lengths"]
    if dropout:
        states = jnp.broadcast_to(params["null_caption"][:8], states.shape)
        lengths = jnp.full_like(lengths, null_length) if null_length else lengths
    t = made.t.astype(jnp.float32)
    output = jax.jit(TEXT.apply)({"params": params}, made.x_t, t, states, lengths)
    expected = diffusion.training_loss(output, made.x0, made.noise, made.t)
    found = jax.jit(task.losses)(params, b, KEYS)
    np.testing.assert_allclose(found["loss"], expected["mse"] + expected["vb"], rtol=1e-4)


def test_no_gradient_reaches_the_null_caption():
    task = TextToImage(TEXT, objective(1.0), None, 0, StageConfig("stage"))
    params = normal_params(task.init)
    grads = jax.jit(jax.grad(lambda p: task.losses(p, batch(), KEYS)["loss"].mean()))(params)
    assert (grads.pop("null_caption") == 0).all()
    assert all((g != 0).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_a_dropped_or_missing_label_is_no_class(dropout):
    task = ClassConditional(CLASS, objective(dropout, prediction="v"), None)
    params, b = normal_params(task.init), batch()
    made = jax.jit(task.denoising.prepare)(b, KEYS)
    labels = jnp.full((6,), 3) if dropout else jnp.array([0, 1, 2, 3, 1, 0])
    t = made.t.astype(jnp.float32)
    output = jax.jit(CLASS.apply)({"params": params}, made.x_t, t, labels)
    expected = diffusion.training_loss(output, made.x0, made.noise, made.t, prediction="v")
    found = jax.jit(task.losses)(params, b, KEYS)
    np.testing.assert_allclose(found["loss"], expected["mse"] + expected["vb"], rtol=1e-4)
