"""Numbers that are not finite never become a picture, a file of weights or a record: one line names
them."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pixart_jax import Pipeline, cli, finite, load_component
from pixart_jax.commands import convert, sample
from pixart_jax.errors import Notice, UserError, nearest
from pixart_jax.pipeline import SamplingConfig
from pixart_jax.pipeline.text_states import TextStates, write

PROMPTS = ["a red circle", "a blue star", "a green square"]
NAN, INF = float("nan"), float("inf")
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("value", "good"), [(NAN, False), (INF, False), (-INF, False), (-0.0, True), (6e4, True)]
)
def test_whole_arrays(dtype, value, good):
    array = np.full((5, 7), -1, dtype)
    array[3, 2] = value
    assert finite.whole(array) == finite.whole(array.T) == finite.whole(array[1:, ::2]) == good
    assert finite.whole(array[:0]) and finite.whole(np.int32([1, -(2**31)]))
    assert finite.rows(jnp.asarray(array)).tolist() == [True, True, True, good, True]


@pytest.mark.parametrize("known", [[], (), {}])
def test_nothing_is_listed_where_nothing_is_known(known):
    assert nearest("dense", known) == ""


# ---- weights ----


def break_tensor(folder: Path, key: str, value: float = NAN, dtype=None) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[key] = np.array(tensors[key], dtype or tensors[key].dtype)
    tensors[key].flat[-1] = value
    save_file(tensors, file)


def broken(part, times: float = NAN):
    """The component with its parameters multiplied."""
    return part.replace(params=jax.tree.map(lambda leaf: leaf * times, part.params))


WEIGHTS = [
    ("transformer", "transformer_blocks.1.ff.net.0.proj.weight", NAN, None),
    ("transformer", "pos_embed.proj.bias", INF, None),
    ("transformer", "scale_shift_table", NAN, np.float16),
    ("vae", "decoder.conv_in.weight", -INF, None),
    ("vae", "decoder.conv_norm_out.weight", NAN, None),
    ("text_encoder", "shared.weight", NAN, None),
    ("text_encoder", "encoder.block.0.layer.0.SelfAttention.q.weight", INF, None),
]


@pytest.mark.parametrize(("part", "key", "value", "dtype"), WEIGHTS)
def test_loading_names_a_tensor_that_is_not_finite(
    tiny_model, tmp_path, part, key, value, dtype, monkeypatch
):
    folder = shutil.copytree(tiny_model / part, tmp_path / part)
    break_tensor(folder, key, value, dtype)
    monkeypatch.setattr("pixart_jax.weights.cache.SMALLEST", 0)
    kinds = [{}, {"dtype": jnp.bfloat16}]
    kinds += [{"quantization": "int8"}] if part == "text_encoder" else []
    for how in kinds:
        for _ in range(2):  # no load leaves a cache that the next would believe
            with pytest.raises(UserError, match=f"{key} holds numbers that are not finite"):
                load_component(folder, cache=tmp_path / "cache", **how)


def test_a_number_beyond_the_dtype_of_the_computation_is_named(tiny_model, tmp_path):
    folder, key = shutil.copytree(tiny_model / "vae", tmp_path / "vae"), "decoder.conv_in.weight"
    break_tensor(folder, key, 3.4e38)
    load_component(folder)
    with pytest.raises(UserError, match=key):
        load_component(folder, jnp.bfloat16)


def test_neither_convert_nor_save_writes_a_tensor_that_is_not_finite(tiny_model, tmp_path, capsys):
    folder = shutil.copytree(tiny_model / "transformer", tmp_path / "transformer")
    part, key = load_component(folder), "transformer_blocks.1.attn1.to_q.weight"
    with pytest.raises(UserError, match="not finite"):
        broken(part).save(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    break_tensor(folder, key)
    for form in ("folder", "official"):
        argv = [str(folder), str(tmp_path / "x.safetensors"), "--format", form]
        assert cli.run(convert.main, argv) == 2
        assert key in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()


# ---- sampling ----


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return Pipeline.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def states(pipe) -> TextStates:
    """Of the prompts and "", the second one's not finite."""
    found = pipe.encode_prompts([*PROMPTS, ""])
    found[PROMPTS[1]] = np.full_like(found[PROMPTS[1]], NAN)
    return found


@pytest.mark.parametrize(
    ("how", "vae_tile"), [({}, None), ({"batch_size": 2}, 32), ({"callback": lambda *_: 0}, None)]
)
def test_a_call_yields_the_good_images_and_then_names_the_bad(pipe, states, how, vae_tile):
    found, config = {}, SamplingConfig(steps=2, vae_tile=vae_tile)
    with pytest.raises(finite.NotFinite, match="image 1;") as raised:
        for positions, images in pipe.generate(PROMPTS, config, text_states=states, **how):
            found |= dict(zip(positions, images, strict=True))
    assert raised.value.indices == [1] and sorted(found) == [0, 2]
    for positions, images in pipe.generate(PROMPTS, config, **how):
        for n, want in zip(positions, images, strict=True):
            assert n == 1 or np.array_equal(found[n], want)


@pytest.mark.parametrize(
    ("change", "indices"),
    [
        (lambda pipe: {"vae": broken(pipe.vae)}, [0, 1, 2]),
        (lambda pipe: {"transformer": broken(pipe.transformer, INF)}, [0, 1, 2]),
        (lambda pipe: {"text_encoder": broken(pipe.text_encoder, -INF)}, [0, 1, 2]),
    ],
)
def test_parameters_given_from_python(pipe, change, indices):
    with pytest.raises(finite.NotFinite) as raised:
        pipe.replace(**change(pipe))(PROMPTS, steps=2)
    assert raised.value.indices == indices


@pytest.mark.parametrize("guidance", [1e30, -1e30, [1e30, 4.5, 4.5]])
def test_absurd_guidance(pipe, guidance):
    with pytest.raises(finite.NotFinite) as raised:
        pipe(PROMPTS, steps=2, guidance=guidance)
    assert raised.value.indices == ([0] if isinstance(guidance, list) else [0, 1, 2])


@pytest.mark.parametrize("guidance", [1e39, -INF, NAN, [1.0, 3.0, 4e38]])
def test_guidance_that_is_no_fp32_number_is_refused_before_anything_is_computed(pipe, guidance):
    with pytest.raises(UserError, match="a finite number is needed"):
        next(pipe.generate(PROMPTS, guidance=guidance))


def test_denoise_and_decode_name_the_rows(pipe, states):
    lengths = np.full(3, 4, np.int32)
    text = np.stack([np.resize(states[prompt], (4, 16)) for prompt in PROMPTS])
    noise, _ = pipe.noise(0, range(3), 64, 64)
    how = {"negative_states": text[:1].repeat(3, 0), "steps": 2}
    with pytest.raises(finite.NotFinite) as raised:
        pipe.denoise(text, lengths, noise, **how)
    assert raised.value.indices == [1]
    with pytest.raises(finite.NotFinite):
        pipe.decode(noise.at[2].set(NAN))
    traced = jax.jit(lambda *given: pipe.denoise(*given, **how))  # as the planner does
    assert np.isfinite(np.asarray(traced(text, lengths, noise))).all((1, 2, 3)).tolist() == [
        True,
        False,
        True,
    ]


def test_sample_writes_the_good_images_and_names_the_bad_prompt(
    tiny_model, states, tmp_path, capsys, monkeypatch
):
    file, out = tmp_path / "states.safetensors", tmp_path / "out"
    with pytest.raises(UserError, match=f"state of {PROMPTS[1]!r} .* not finite"):
        write(file, list(states), states, states.identity)
    assert not file.exists()
    # as an earlier version wrote it
    monkeypatch.setattr("pixart_jax.pipeline.text_states.check_tensor", lambda name, array: array)
    write(file, list(states), states, states.identity)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    argv = f"--model {tiny_model} --prompts {tmp_path}/p.txt --out {out} --steps 2 --text-states"
    for _ in range(2):  # nothing of the bad one is "already there"
        assert cli.run(sample.main, [*argv.split(), str(file)]) == 2
        err = capsys.readouterr().err
        assert "images are not finite" in err and f"prompt 2, {PROMPTS[1]!r} (index 1" in err
        assert [path.name[:4] for path in sorted(out.iterdir())] == ["0000", "0002"]


def test_a_preview_that_is_not_finite_is_a_notice(pipe):
    from types import SimpleNamespace

    from pixart_jax.training.run import StageHooks

    def preview(*_):
        raise finite.NotFinite([0])

    part = SimpleNamespace(
        task=SimpleNamespace(preview=preview),
        base=None,
        loader=SimpleNamespace(global_batch=lambda *_, rows: {}),
        stage=SimpleNamespace(name="stage"),
        run=SimpleNamespace(config=SimpleNamespace(preview=None)),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        StageHooks.preview(part, 7, SimpleNamespace(average=None))
    assert [w.category for w in caught] == [Notice] and "step 7" in str(caught[0].message)
