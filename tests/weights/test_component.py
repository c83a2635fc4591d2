"""Component folders: ours open in diffusers and transformers, theirs open here, and nothing changes
on the way."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, PixArtTransformer2DModel
from transformers import T5Config as TorchT5Config
from transformers import T5EncoderModel, T5ForConditionalGeneration

from pixart_jax import load_component
from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.models.configs import VAEConfig
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.weights.component import NULL_CAPTION, VAE, DiT, TextEncoder, Transformer
from pixart_jax.weights.streaming import leaves
from tests import tiny_diffusers
from tests.models.reference import quantized, randomise, relative_error, run_diffusers

T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
T5["feed_forward_proj"] = "gated-gelu"


@functools.cache
def reference(kind: str):
    """A small model of diffusers or transformers, every weight random; not to be written to."""
    if kind in ("transformer", "vae"):
        return tiny_diffusers.build().components[kind]
    if kind == "text_encoder":  # weights of T5's own size, by which int8 values are near
        return randomise(T5EncoderModel(TorchT5Config(**T5)), spread=0.2, centre=0.5)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "sample_size": 8}
    model = DiTTransformer2DModel(**sizes, num_embeds_ada_norm=6, out_channels=8)
    randomise(model, spread=0.2, centre=0.5)
    first, second = (block.norm1.emb for block in model.transformer_blocks)
    # as in every converted file: one embedder, copied into each block
    second.load_state_dict(first.state_dict())
    for embedder in (first, second):
        # the official frequencies, which the weights are trained for; diffusers has 1 here
        embedder.time_proj.downscale_freq_shift = 0
    return model


KINDS = {"transformer": Transformer, "dit": DiT, "text_encoder": TextEncoder, "vae": VAE}


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """{kind: a folder as the references write it}; tests copy what they change."""
    own = {kind: tmp_path_factory.mktemp(kind) for kind in ("dit", "text_encoder")}
    for kind, folder in own.items():
        reference(kind).save_pretrained(folder)
    return {kind: tiny_model / kind for kind in KINDS} | own


def evaluate(part):
    """(arguments as numpy, our output) of any component on small random input."""
    rng = np.random.default_rng(3)
    latents = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    times = np.array([3.0, 700.0], np.float32)
    if isinstance(part, VAE):
        arguments = (latents[:1, :4, :6],)
        return arguments, part.decode(*arguments)
    if isinstance(part, TextEncoder):
        arguments = (rng.integers(0, 32, (2, 9)), np.array([9, 4]))
    elif isinstance(part, DiT):
        arguments = (latents, times, np.array([2, 6]))
    else:
        states = rng.normal(size=(2, 5, 16)).astype(np.float32)
        arguments = (latents, times, states, np.array([5, 2]))
    return arguments, part.apply(*arguments)


def their_output(model, arguments) -> np.ndarray:
    first, *more = (torch.tensor(np.array(array)) for array in arguments)
    if isinstance(model, PixArtTransformer2DModel):
        return run_diffusers(model, *arguments)
    with torch.no_grad():
        if isinstance(model, T5EncoderModel):
            mask = torch.arange(first.shape[1]) < more[0][:, None]
            return model(first, attention_mask=mask.int()).last_hidden_state.numpy()
        first = first.permute(0, 3, 1, 2)
        if isinstance(model, AutoencoderKL):
            out = model.decode(first)
        else:
            out = model(first, timestep=more[0], class_labels=more[1])
        return out.sample.permute(0, 2, 3, 1).numpy()


def error(kind: str, arguments, ours, theirs) -> float:
    """Relative error where the output is defined: for a text, on its tokens."""
    if kind == "text_encoder":
        ids, lengths = arguments
        counted = np.arange(ids.shape[1]) < lengths[:, None]
        ours, theirs = np.asarray(ours)[counted], np.asarray(theirs)[counted]
    return relative_error(ours, theirs)


def assert_equal_to_the_bit(ours: dict, theirs: dict):
    ours, theirs = leaves(ours), leaves(theirs)
    assert set(ours) == set(theirs)
    for path, value in ours.items():
        assert np.asarray(value).dtype == np.asarray(theirs[path]).dtype, path
        np.testing.assert_array_equal(np.asarray(value), np.asarray(theirs[path]), err_msg=path)


# ---- both ways ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_the_reference_opens_and_computes_the_same(folders, kind):
    part = load_component(folders[kind])
    assert isinstance(part, KINDS[kind])
    arguments, ours = evaluate(part)
    assert error(kind, arguments, ours, their_output(reference(kind), arguments)) <= 1e-4


@pytest.mark.parametrize("kind", ["transformer", "text_encoder", "vae"])
def test_what_we_save_opens_in_the_reference_without_a_stray_key_and_computes_the_same(
    folders, tmp_path, kind
):
    part = load_component(folders[kind])
    if kind == "transformer":  # as one that was trained here
        part = part.replace(params={**part.params, "null_caption": jnp.ones((120, 16))})
    part.save(tmp_path)
    model, info = type(reference(kind)).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    arguments, ours = evaluate(part)
    assert error(kind, arguments, ours, their_output(model.eval(), arguments)) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_is_bit_exact(folders, tmp_path, kind):
    part = load_component(folders[kind])
    if kind == "transformer":
        null = np.random.default_rng(0).normal(size=(120, 16)).astype(np.float32)
        part = part.replace(params={**part.params, "null_caption": null})
    part.save(tmp_path)
    part.save(tmp_path)  # over what is there
    back = load_component(tmp_path)
    assert back.config == part.config
    assert back.module == part.module and hash(back.module) == hash(part.module)
    assert_equal_to_the_bit(back.params, part.params)


def test_the_configs_field_by_field_survive(tmp_path, folders):
    off = {"use_quant_conv": False, "mid_block_attention": False}
    config = VAEConfig(3, 4, (8, 8, 16), 2, 2, 0.13025, sample_size=64, **off)
    module = VAE(config, {}).module
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    VAE(config, params).save(tmp_path)  # boxed parameters, as a module's init gives them
    assert load_component(tmp_path).config == config


# ---- released files' peculiarities ----


def rewrite(folder: Path, tmp_path: Path, change) -> Path:
    """A copy of a folder with its tensors and config changed by change(tensors, config) in
    place."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = next(copy.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(weights)
    config = json.loads((copy / "config.json").read_text())
    change(tensors, config)
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("own, other", [(True, False), (False, True), (True, True)])
def test_t5_under_either_name_of_its_embedding_or_both(folders, tmp_path, own, other):
    def change(tensors, config):
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        for name, wanted in (("shared.weight", own), ("encoder.embed_tokens.weight", other)):
            if not wanted:
                del tensors[name]

    part = load_component(rewrite(folders["text_encoder"], tmp_path, change))
    assert_equal_to_the_bit(part.params, load_component(folders["text_encoder"]).params)


def test_the_encoder_of_a_whole_t5_is_read_from_it(tmp_path):
    whole = T5ForConditionalGeneration(TorchT5Config(**T5, tie_word_embeddings=False))
    whole.save_pretrained(tmp_path)
    params = load_component(tmp_path).params
    np.testing.assert_array_equal(params["embedding"], whole.shared.weight.detach().numpy())


def test_sharded_weights_are_read(folders, tmp_path):
    reference("text_encoder").save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    whole = load_component(folders["text_encoder"]).params
    assert_equal_to_the_bit(load_component(tmp_path).params, whole)


def test_old_attention_names_of_a_vae_are_read(folders, tmp_path):
    def change(tensors, config):
        old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, old in old_names.items():
            for name in [name for name in tensors if f".{new}." in name]:
                tensors[name.replace(f".{new}.", f".{old}.")] = tensors.pop(name)

    copy = rewrite(folders["vae"], tmp_path, change)
    assert_equal_to_the_bit(load_component(copy).params, load_component(folders["vae"]).params)


def test_old_transformer_files_name_another_class_and_hold_the_null_caption(folders, tmp_path):
    def change(tensors, config):
        config["_class_name"] = "Transformer2DModel"
        tensors["caption_projection.y_embedding"] = torch.full((120, 16), 0.5)

    part = load_component(rewrite(folders["transformer"], tmp_path, change))
    assert isinstance(part, Transformer)
    np.testing.assert_array_equal(part.params["null_caption"], np.full((120, 16), 0.5, np.float32))


def test_the_null_caption_lies_beside_the_weights_and_is_absent_where_it_was(folders, tmp_path):
    part = load_component(folders["transformer"])
    assert "null_caption" not in part.params
    part.replace(params={**part.params, "null_caption": jnp.ones((120, 16))}).save(tmp_path)
    assert (tmp_path / NULL_CAPTION).is_file()
    part.save(tmp_path)
    assert "null_caption" not in load_component(tmp_path).params


# ---- dtype, mesh, compilation ----


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_held_in_bfloat16_change_nothing_of_a_bfloat16_computation(folders, kind):
    part = load_component(folders[kind], dtype=jnp.bfloat16)
    params = load_component(folders[kind]).params
    if kind == "text_encoder":  # its table is held in bfloat16 too, which rounds the first states
        params = {**params, "embedding": part.params["embedding"].astype(jnp.float32)}
    wide = part.replace(params=params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(part.params)} == {"bfloat16", "float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide.params)} == {"float32"}
    np.testing.assert_array_equal(evaluate(part)[1], evaluate(wide)[1])


def test_bfloat16_halves_the_text_encoder_and_survives_a_save(folders, tmp_path):
    part = load_component(folders["text_encoder"], dtype=jnp.bfloat16)
    dtypes = {path: leaf.dtype for path, leaf in leaves(part.params).items()}
    assert dtypes["blocks/q/kernel"] == dtypes["embedding"] == jnp.bfloat16
    assert dtypes["final_norm/scale"] == jnp.float32
    part.save(tmp_path)
    assert_equal_to_the_bit(load_component(tmp_path, dtype=jnp.bfloat16).params, part.params)
    arguments, ours = evaluate(part)
    exact = evaluate(load_component(folders["text_encoder"]))[1]
    assert error("text_encoder", arguments, ours, exact) < 0.05


@pytest.mark.usefixtures("optimized")
def test_narrow_parameters_are_widened_a_layer_at_a_time(folders):
    """Not all at once before the first: T5-XXL in bfloat16 would take three times its size on a
    CPU."""
    part = load_component(folders["text_encoder"], dtype=jnp.bfloat16)
    config = dataclasses.replace(part.config, d_model=256, d_ff=512, num_layers=8)
    part = part.abstract(config, jnp.bfloat16, make_mesh(MeshConfig())).replace(mesh=None)
    example = (jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32))
    lowered = part._executable.lower(part.module, "__call__", part.params, *example)
    held = sum(leaf.size * 2 for leaf in jax.tree.leaves(part.params["blocks"]))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 0.5 * held


def test_an_int8_text_encoder_is_opened_quantised_and_kept_so(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("pixart_jax.weights.cache.SMALLEST", 0)
    exact = load_component(folders["text_encoder"])
    part = load_component(folders["text_encoder"], quantization="int8")
    by_hand = quantized(exact.params)
    assert part.quantization == "int8" and exact.quantization is None
    assert_equal_to_the_bit(part.params, by_hand)
    arguments, ours = evaluate(part)
    assert error("text_encoder", arguments, ours, evaluate(exact)[1]) < 0.05
    for _ in range(2):
        kept = load_component(folders["text_encoder"], quantization="int8", cache=tmp_path)
        assert_equal_to_the_bit(kept.params, by_hand)
    np.testing.assert_array_equal(evaluate(kept)[1], ours)
    mesh = make_mesh(MeshConfig())
    on_mesh = load_component(folders["text_encoder"], mesh=mesh, quantization="int8")
    np.testing.assert_allclose(evaluate(on_mesh)[1], ours, rtol=1e-5, atol=1e-5)


def test_int8_is_for_a_text_encoder_and_is_not_saved(folders, tmp_path):
    for kind, name, says in (
        ("vae", "int8", "is a VAE: quantization 'int8' is for a T5 encoder"),
        ("text_encoder", "int9", "did you mean 'int8'"),
    ):
        with pytest.raises(UserError, match=says):
            load_component(folders[kind], quantization=name)
    with pytest.raises(UserError, match="cannot be saved: open it without"):
        load_component(folders["text_encoder"], quantization="int8").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_changes_nothing(folders, kind):
    mesh = make_mesh(MeshConfig())
    part = load_component(folders[kind], mesh=mesh)
    kinds = {type(leaf.sharding) for leaf in jax.tree.leaves(part.params)}
    assert kinds == {jax.sharding.NamedSharding}
    plain = evaluate(load_component(folders[kind]))[1]
    np.testing.assert_allclose(evaluate(part)[1], plain, rtol=1e-5, atol=1e-5)


def test_other_parameters_do_not_recompile(folders):
    from pixart_jax.weights.base import _run

    part = load_component(folders["vae"])
    evaluate(part)
    before = _run._cache_size()
    evaluate(part.replace(params=jax.tree.map(lambda leaf: leaf * 2, part.params)))
    evaluate(load_component(folders["vae"]))
    assert _run._cache_size() == before


def test_tiled_decoding_is_a_flag_of_decode(folders):
    part = load_component(folders["vae"])
    whole, tiled = (part.decode(jnp.ones((1, 12, 20, 4)), tile, 2) for tile in (None, 8))
    assert whole.shape == tiled.shape == (1, 96, 160, 3)


# ---- bad input: one line that names the folder ----


def refusal(folder, match: str):
    with pytest.raises(UserError, match=match) as error:
        load_component(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


CONFIGS = {  # of a folder without weights
    "{": "is not valid JSON",
    "[]": "no JSON object",
    '{"_class_name": "AutoencoderKLL"}': "did you mean 'AutoencoderKL'",
    '{"_class_name": "UNet2DConditionModel"}': "UNet2DConditionModel.*not known",
}


def test_folders_that_are_no_component_are_named(tmp_path, folders):
    refusal(tmp_path / "absent", "no folder")
    refusal(tmp_path, "has no config.json")
    for text, match in CONFIGS.items():
        (tmp_path / "config.json").write_text(text)
        refusal(tmp_path, match)
    shutil.copytree(folders["vae"], tmp_path / "whole" / "vae")
    (tmp_path / "whole" / "model_index.json").write_text("{}")
    refusal(tmp_path / "whole", r"is a whole model: give one of its parts \(vae\)")


def configure(**fields):
    return lambda tensors, config: config.update(fields)


CONV_IN = "encoder.conv_in.weight"


def replace(lost: str | None = None, **added):
    def change(tensors, config):
        tensors.pop(lost, None)
        tensors.update(added)

    return change


@pytest.mark.parametrize(
    "kind, change, match",
    [
        ("vae", configure(act_fn="mish"), "act_fn = 'mish'"),
        ("vae", configure(down_block_types=["Attn"] * 4), "down_block_types"),
        ("vae", configure(norm_num_groups=5), "not divisible by norm_num_groups = 5"),
        ("vae", configure(layers_per_block="two"), "wrong type"),
        ("text_encoder", configure(feed_forward_proj="relu"), "feed_forward_proj is 'relu'"),
        ("transformer", configure(norm_type="layer_norm"), "norm_type = 'layer_norm'"),
        ("text_encoder", configure(d_ff=25), "wrong shape"),
        ("vae", replace(CONV_IN, stray=torch.ones(1)), f"1 missing: {CONV_IN}; 1 left over: stray"),
        ("vae", replace(**{CONV_IN: torch.ones(8, 3, 3, 1)}), r"wrong shape: .* \(8, 3, 3, 1\)"),
    ],
)
def test_configs_and_weights_that_do_not_fit_are_named(folders, tmp_path, kind, change, match):
    refusal(rewrite(folders[kind], tmp_path, change), match)


def test_missing_and_damaged_weights_are_named(folders, tmp_path):
    copy = shutil.copytree(folders["vae"], tmp_path / "copy")
    weights = copy / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refusal(copy, "damaged or cut short")
    weights.unlink()
    refusal(copy, "holds no weights")


def test_a_folder_that_cannot_be_written_is_named(folders, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        load_component(folders["vae"]).save(tmp_path / "file" / "vae")
