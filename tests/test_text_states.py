"""Text states: the same whatever is encoded beside them, kept to the bit, drawn from as from the
text encoder itself."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from pixart_jax import Pipeline
from pixart_jax.errors import UserError
from pixart_jax.pipeline import PromptEncoder, SamplingConfig, TextStates, sampling_config
from pixart_jax.pipeline.text_states import write
from pixart_jax.text import clean_caption

PROMPTS = [
    "a large red circle",
    "A small blue star left of a large green square and above the yellow circle, and so on",
    "zebra",
]
HOW = {"steps": 3, "guidance": 3.0, "seed": 2}


@pytest.fixture(scope="module")
def pipe(tiny_model) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model)


def test_states_of_a_text_are_the_same_to_the_bit_whatever_is_encoded_beside_it(pipe):
    many = pipe.encode_prompts([*PROMPTS, *(f"a red star {n}" for n in range(20)), ""])
    for prompt in (*PROMPTS, ""):
        alone = pipe.encode_prompts([prompt])
        np.testing.assert_array_equal(alone[clean_caption(prompt)], many[clean_caption(prompt)])
        batch, lengths = pipe.encode_text([prompt, "a star"], 48)
        np.testing.assert_array_equal(batch[0, : lengths[0]], many[clean_caption(prompt)])


@pytest.mark.parametrize("negative", ["", "a star"])
def test_kept_states_draw_the_image_of_the_text_encoder_to_the_bit(pipe, negative, tmp_path):
    states = pipe.encode_prompts([*PROMPTS, negative])
    write(tmp_path / "s.safetensors", list(states), states, states.identity)
    opened = TextStates.open(tmp_path / "s.safetensors")
    want = pipe(PROMPTS, negative_prompt=negative, batch_size=2, **HOW)
    for kept in (states, opened):
        np.testing.assert_array_equal(
            pipe(PROMPTS, negative_prompt=negative, batch_size=2, text_states=kept, **HOW), want
        )


def test_states_in_bfloat16_are_exact_for_a_model_that_computes_in_it_and_close_for_another(
    pipe, tiny_model
):
    half = Pipeline.from_pretrained(tiny_model, dtype=jnp.bfloat16)
    states = half.encode_prompts([*PROMPTS, ""])
    assert states["zebra"].dtype == jnp.bfloat16 and states.precision("bfloat16") is None
    np.testing.assert_array_equal(half(PROMPTS, text_states=states, **HOW), half(PROMPTS, **HOW))
    rounded = pipe.prompt_encoder.states([*PROMPTS, ""], "bfloat16")
    assert rounded.precision("float32") == "float32 kept as bfloat16"
    drawn = pipe(PROMPTS, text_states=rounded, **HOW).astype(float)
    # levels of 255; the weights are random, and a trained model moves less
    assert np.abs(drawn - pipe(PROMPTS, **HOW)).mean() < 2


def test_a_pipeline_without_its_text_encoder_holds_none_of_it_and_draws_from_states(tiny_model):
    pipe = Pipeline.from_pretrained(tiny_model)
    want, states = pipe(PROMPTS[0], **HOW), pipe.encode_prompts([PROMPTS[0], ""])
    leaves = jax.tree.leaves(pipe.text_encoder.params)
    left = pipe.without_text_encoder()
    assert left.text_encoder is None and all(leaf.is_deleted() for leaf in leaves)
    np.testing.assert_array_equal(left(PROMPTS[0], text_states=states, **HOW), want)
    with pytest.raises(UserError, match="no text encoder: give text_states"):
        left(PROMPTS[0], **HOW)
    with pytest.raises(UserError, match="no text encoder"):
        left.save_pretrained(tiny_model.parent / "never")
    closed = Pipeline.from_pretrained(tiny_model, text_encoder=False)
    np.testing.assert_array_equal(closed(PROMPTS[0], text_states=states, **HOW), want)


def test_the_encoder_opened_alone_makes_the_pipelines_states_and_says_the_same_of_itself(
    pipe, tiny_model
):
    alone = PromptEncoder.from_pretrained(tiny_model)
    mine, theirs = alone.states(PROMPTS), pipe.encode_prompts(PROMPTS)
    assert mine.identity == theirs.identity
    np.testing.assert_array_equal(mine["zebra"], theirs["zebra"])


def test_states_that_do_not_fit_are_refused_before_anything_is_drawn(pipe, tiny_model, tmp_path):
    states = pipe.encode_prompts([*PROMPTS, ""])
    other = TextStates({"zebra": np.zeros((3, 8), np.float32)}, states.identity | {"width": "8"})
    lacks = "2 of the prompts are not in the text states: the first is 'a hat'"
    cleaned = r"another cleaning of prompts \(deepfloyd\) than this model's \(lower case\)"
    for prompts, given, more, says in (
        (["a hat", "a shoe", PROMPTS[0]], states, {}, lacks),
        (PROMPTS, states, {"clean_caption": False}, cleaned),
        ("zebra", other, {}, r"another width \(8\) than this model's \(16\)"),
    ):
        with pytest.raises(UserError, match=says):
            pipe(prompts, text_states=given, **more, **HOW)
    shutil.copytree(tiny_model, tmp_path / "other")
    weights = tmp_path / "other" / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(UserError, match="made with another text encoder"):
        Pipeline.from_pretrained(tmp_path / "other")("zebra", text_states=states, **HOW)


def test_the_file_is_safetensors_that_others_open(pipe, tmp_path):
    states = pipe.prompt_encoder.states(PROMPTS, "bfloat16")
    write(tmp_path / "s.safetensors", list(states), states, states.identity)
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        texts = json.loads(file.get_tensor("texts").numpy().tobytes())
        assert texts == [clean_caption(prompt) for prompt in PROMPTS]
        offsets = file.get_tensor("offsets").tolist()
        zebra = file.get_tensor("states")[offsets[2] : offsets[3]].float().numpy()
    np.testing.assert_array_equal(zebra, states["zebra"].astype(np.float32))


# What "no prompt" means.


def with_null_caption(folder, tiny_model):
    shutil.copytree(tiny_model, folder)
    pipe = Pipeline.from_pretrained(folder)
    null = jax.random.normal(jax.random.key(0), (120, 16))
    params = {**pipe.transformer.params, "null_caption": null}
    pipe.replace(transformer=pipe.transformer.replace(params=params)).save_pretrained(folder)


def test_no_prompt_means_what_the_model_says_and_text_where_it_says_nothing(tiny_model, tmp_path):
    folder = tmp_path / "model"
    with_null_caption(folder, tiny_model)
    (folder / sampling_config.FILE).unlink()
    silent = Pipeline.from_pretrained(folder)
    assert silent.sampling.null == "text"
    text, embedding = (silent(PROMPTS[0], null=null, **HOW) for null in ("text", "embedding"))
    assert (text != embedding).any()
    np.testing.assert_array_equal(silent(PROMPTS[0], **HOW), text)
    # A converted official checkpoint says it beside its weights.
    (folder / "transformer" / sampling_config.FILE).write_text('{"null": "embedding"}')
    np.testing.assert_array_equal(Pipeline.from_pretrained(folder)(PROMPTS[0], **HOW), embedding)
    # A folder that says other things keeps that; the model's own word comes before the part's.
    (folder / sampling_config.FILE).write_text('{"guidance": 2.0}')
    own = SamplingConfig(guidance=2.0, null="embedding").with_defaults()
    assert Pipeline.from_pretrained(folder).sampling == own
    (folder / sampling_config.FILE).write_text('{"null": "text"}')
    np.testing.assert_array_equal(Pipeline.from_pretrained(folder)(PROMPTS[0], **HOW), text)
    (folder / sampling_config.FILE).write_text('{"null": "txt"}')
    with pytest.raises(UserError, match="null 'txt' is unknown .did you mean 'text'"):
        Pipeline.from_pretrained(folder)


def test_the_null_caption_needs_no_states_of_the_empty_prompt(tiny_model, tmp_path):
    with_null_caption(tmp_path / "model", tiny_model)
    pipe = Pipeline.from_pretrained(tmp_path / "model")
    states = pipe.encode_prompts(PROMPTS)
    want = pipe(PROMPTS, null="embedding", **HOW)
    np.testing.assert_array_equal(pipe(PROMPTS, null="embedding", text_states=states, **HOW), want)
    with pytest.raises(UserError, match="a prompt is not in"):
        pipe(PROMPTS, null="text", text_states=states, **HOW)
