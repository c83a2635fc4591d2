"""From PixArt-α to PixArt-Σ: what a stage's start keeps of the model, and the five stages as one
run."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from pixart_jax import Pipeline, load_component
from pixart_jax.commands import train
from pixart_jax.config import StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig, VAEConfig
from pixart_jax.models.layers import KVCompression
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.pipeline import decoder
from pixart_jax.training import recipes
from pixart_jax.training.initialization import convert_params
from pixart_jax.weights.component import VAE
from tests.parameters import normal_like, normal_params

sys.path.insert(0, str(Path(__file__).parent))
import tiny_run

ALPHA = TransformerConfig(
    depth=2, width=24, heads=2, caption_width=16, text_tokens=6, sample_size=8, size_conditions=True
)
SIGMA = dataclasses.replace(ALPHA, text_tokens=10, size_conditions=False)
KV = {"kv_compression": 2, "kv_compression_layers": (1,)}
RNG = np.random.default_rng(0)
LATENTS, STATES = RNG.normal(size=(2, 8, 8, 4)), RNG.normal(size=(2, 6, 16))


def init(config: TransformerConfig):
    arguments = jnp.zeros((1, 2, 2, config.in_channels)), jnp.zeros((1,)), jnp.zeros((1, 1, 16))
    sizes = jnp.ones((1,), int), jnp.ones((1, 2)), jnp.ones((1,))
    return lambda key: PixArtTransformer(config).init(key, *arguments, *sizes)["params"]


def run(config: TransformerConfig, params, side: int = 64) -> np.ndarray:
    size = jnp.full((2, 2), float(side)), jnp.ones((2,))
    text, times = (jnp.asarray(STATES), jnp.array([4, 6])), jnp.array([700.0, 20.0])
    given = jnp.asarray(LATENTS), times, *text, *(size if config.size_conditions else ())
    return np.asarray(PixArtTransformer(config).apply({"params": params}, *given))


@pytest.fixture(scope="module")
def alpha():
    """Parameters of a multi-scale α model, and what it gives at 64 px."""
    params = normal_params(init(ALPHA))
    return params, run(ALPHA, params)


def started(params, config: TransformerConfig, buckets=((64, 64),)):
    """The parameters that a stage of this model starts with."""
    stage = StageConfig("next")
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, buckets=buckets))
    task = types.SimpleNamespace(module=PixArtTransformer(config))
    key, new = jax.random.key(0), normal_params(init(config), seed=1)
    if config.kv_compression > 1:
        new["kv_compression"] = nn.unbox(KVCompression(2, (1,), 2, 24).init(key))["params"]
    if config.qk_norm:
        norms = {"scale": np.ones((2, 24), np.float32), "bias": np.zeros((2, 24), np.float32)}
        new["blocks"]["attn"] |= {"q_norm": norms, "k_norm": norms}
    nothing = lambda *_: None  # noqa: E731
    return convert_params(stage, "text_to_image", ALPHA, params, task, lambda: new, key, nothing)


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_more_tokens_and_no_size_conditions_are_the_same_model(alpha, capsys):
    params, want = alpha
    new = started(params, SIGMA)
    error = distance(run(SIGMA, new), want)
    assert error < 1e-6
    assert new["null_caption"].shape == (10, 16)
    np.testing.assert_array_equal(new["null_caption"][:6], params["null_caption"])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "stage next: size embedders dropped: their mean over the buckets is the timestep's bias",
        "stage next: null caption 6 → 10 tokens, the first 6 kept",
    ]
    # the mean over several buckets is no picture's own
    several = distance(run(SIGMA, started(params, SIGMA, ((64, 64), (32, 96)))), want)
    with capsys.disabled():
        print(f"\nmore tokens, no sizes: {error:.1e}; over two buckets {several:.2f}")
    assert 1e-3 < several


@pytest.mark.parametrize("added", ["kv_compression", "qk_norm"])
def test_what_an_added_norm_changes(alpha, added, capsys):
    params, want = alpha
    change = KV if added == "kv_compression" else {"qk_norm": True}
    config = dataclasses.replace(SIGMA, **change)
    new = started(params, config)
    found = distance(run(config, new), want)
    lines = capsys.readouterr().out.splitlines()
    if added == "kv_compression":
        part = new["kv_compression"]
        assert (part["kernel"] == 0.25).all() and (part["norm_scale"] == 1).all()
        assert lines[1] == "stage next: kv_compression added"
    else:
        assert (new["blocks"]["attn"]["q_norm"]["scale"] == 1).all()
        assert lines[1:3] == [f"stage next: blocks/attn/{name}_norm added" for name in ("q", "k")]
    with capsys.disabled():
        print(f"\n{added}: {found:.2f}")
    assert 1e-3 < found < 2
    # every other parameter is α's own, but for the sizes' bias
    for name in ("patch_embedder", "t_block", "caption_projection", "final"):
        jax.tree.map(np.testing.assert_array_equal, new[name], params[name])


def test_other_latents_take_a_new_first_and_last_layer(alpha, capsys):
    params, _ = alpha
    config = dataclasses.replace(SIGMA, in_channels=16, out_channels=32)
    new = started(params, config)
    assert new["patch_embedder"]["kernel"].shape == (2, 2, 16, 24)
    assert new["final"]["kernel"].shape == (24, 4 * 32)
    np.testing.assert_array_equal(new["patch_embedder"]["bias"], params["patch_embedder"]["bias"])
    said = "latents 4 → 16 channels: first and last layer are new"
    assert said in capsys.readouterr().out
    with pytest.raises(UserError, match=r"2 of another shape: final/bias \(32,\) for \(16,\)"):
        started(params, dataclasses.replace(SIGMA, out_channels=4))


def test_a_vae_with_a_shift_decodes_as_diffusers_does(tmp_path):
    """Stable Diffusion 3's: 16 channels, no quantisation layers."""
    values = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    values |= {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    values |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "sample_size": 16}
    values |= {"up_block_types": ["UpDecoderBlock2D"] * 2}
    values |= {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    torch.manual_seed(0)
    theirs = AutoencoderKL(**values).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    vae = load_component(tmp_path / "theirs")
    vae.save(tmp_path / "ours")
    config = load_component(tmp_path / "ours").config
    assert config == vae.config and config.shift_factor == 0.0609
    latents = RNG.normal(size=(1, 4, 4, 16)).astype(np.float32)
    with torch.no_grad():
        given = torch.from_numpy(latents).permute(0, 3, 1, 2) / 1.5305 + 0.0609
        want = theirs.decode(given).sample.permute(0, 2, 3, 1).numpy()
    got = decoder.decode_latents(decoder.DecodeSpec(vae.module), vae.params, latents)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(config.scaled(config.unscaled(latents)), latents, atol=1e-6)


@pytest.mark.slow
def test_the_five_stages_run_at_the_depth_of_the_900m_model(tmp_path, capsys):
    """42 blocks of width 24, from an α model with size conditions and another VAE."""
    folder = tmp_path
    base = tiny_run.curriculum(folder)
    other = VAE(dataclasses.replace(tiny_run.VAE_SIZES, scaling_factor=0.7, shift_factor=0.1), {})
    other = other.replace(params=normal_like(VAE.param_shapes(other.config), seed=2))
    other.save(folder / "other" / "vae")
    tiny_run.shards(folder / "large", ((64, 64), (64, 96)))
    model = dataclasses.replace(ALPHA, depth=42, text_tokens=8, sample_size=4)
    sigma = dataclasses.replace(model, size_conditions=False)
    longer = dataclasses.replace(sigma, text_tokens=16)
    compressed = {"kv_compression": 2, "kv_compression_layers": tuple(range(21, 42))}
    text = dataclasses.replace(base.stages[1], steps=2)
    large = dataclasses.replace(
        text.data, source=str(folder / "large"), buckets=((64, 64), (64, 96)), workers=0
    )
    short = dataclasses.replace(text.data, max_text_tokens=8)

    def stage(name, model, **fields):
        return dataclasses.replace(text, name=name, model=model, **fields)

    own = {"vae": str(folder / "other")}
    at_64 = {"position_base": 4, "position_scale": 2.0, "data": large}
    stages = (
        stage("alpha", model, start="fresh", data=short, vae=str(folder / "parts")),
        stage("vae", sigma, data=short, **own),
        stage("text", longer, **own),
        stage("512", longer, **own, **at_64),
        stage("1024", longer, **own, **at_64),
        stage("kv", dataclasses.replace(longer, **compressed), **own, **at_64),
    )
    config = dataclasses.replace(base, stages=stages, model=stages[-1].model, **own)
    train.train(config, folder / "run")
    printed = capsys.readouterr().out
    for line in (
        "stage vae: another VAE (scaling_factor 0.5 → 0.7, shift_factor 0.0 → 0.1), for which",
        "stage vae: size embedders dropped",
        "stage text: null caption 8 → 16 tokens, the first 8 kept",
        "stage kv: kv_compression added",
    ):
        assert line in printed, printed
    pipe = Pipeline.from_pretrained(folder / "run" / "model")
    assert pipe.transformer.config.depth == 42
    assert pipe.vae.config.shift_factor == 0.1
    assert pipe(["a red circle"], steps=2, height=64, width=64).shape == (1, 64, 64, 3)
    values = json.loads((folder / "run" / "model" / "transformer" / "config.json").read_text())
    assert values["kv_compression"] == 2 and len(values["kv_compression_layers"]) == 21
    again = load_component(folder / "run" / "model" / "transformer")
    jax.tree.map(np.testing.assert_array_equal, again.params, pipe.transformer.params)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    assert {line["stage"] for line in lines} == {stage.name for stage in stages}
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_a_stages_model_and_vae_stand_for_the_runs():
    config = recipes.load(recipes.find("sigma"))
    one, *_, last = (config.of(stage) for stage in config.stages)
    assert one.model.text_tokens == 120 and one.model.sample_size == 32
    assert last.model == config.model and last.model.kv_compression_layers == tuple(range(14, 28))
    assert one.vae == config.vae
    assert VAEConfig().shift_factor == 0
