"""Rows of a batch have seeds, guidance and negative prompts of their own, and programs are shared:
each image is the one that the same request gives alone."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from pixart_jax import Pipeline, cli
from pixart_jax.commands import sample
from pixart_jax.errors import UserError
from pixart_jax.images import png_settings
from pixart_jax.pipeline import SamplingConfig, sampler
from pixart_jax.pipeline.sampling_config import DEFAULTS
from pixart_jax.text import read_prompts
from tests import tiny_diffusers

PROMPTS = ["a large red circle", "a small blue star left of a large green square", "zebra"]
LARGE = 2**63 + 11  # beyond what a float or 32 bits hold


@pytest.fixture(scope="module")
def pipe(tiny_model) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model)


def test_a_seed_of_64_bits_is_its_low_word_with_the_high_one_folded_in(pipe):
    noise, keys = pipe.noise([7, 7 + 2**32 * 5, str(LARGE)], [0, 3, 1], 64, 48)
    for n, (seed, index) in enumerate([(7, 0), (7 + 2**32 * 5, 3), (LARGE, 1)]):
        key = jax.random.key(seed % 2**32)
        key = jax.random.fold_in(key, seed >> 32) if seed >> 32 else key
        key = jax.random.fold_in(key, index)
        np.testing.assert_array_equal(noise[n], jax.random.normal(key, (8, 6, 4)))
        assert keys[n] == jax.random.fold_in(key, 1)
    alone, _ = pipe.noise(7, [0], 64, 48)
    np.testing.assert_array_equal(alone[0], noise[0])


@pytest.mark.parametrize("solver", ["dpm++", "sa"])
def test_each_row_is_equal_to_the_bit_to_the_same_request_alone_at_its_place(pipe, solver):
    seeds, scales = [1, str(LARGE), 3], [4.5, 2.0, 7.5]
    negatives = ["", "a star", "a red circle"]
    how = {"steps": 3, "solver": solver, "batch_size": 3, "text_length": 64}
    mixed = pipe(PROMPTS, negative_prompt=negatives, seed=seeds, guidance=scales, **how)
    for n, prompt in enumerate(PROMPTS):
        row = {"negative_prompt": negatives[n], "seed": seeds[n], "guidance": scales[n]}
        alone = pipe([prompt] * 3, indices=[n] * 3, **row, **how)
        np.testing.assert_array_equal(mixed[n], alone[n])


def test_rows_with_guidance_one_form_batches_of_their_own(pipe, monkeypatch):
    guided, images = [], Pipeline._images

    def watched(self, rows, *rest):
        guided.append([row.guidance for row in rows])
        return images(self, rows, *rest)

    monkeypatch.setattr(Pipeline, "_images", watched)
    found = pipe(PROMPTS, guidance=[1.0, 3.0, 1.0], steps=2, batch_size=2)
    assert sorted(guided) == [[1.0, 1.0], [3.0, 3.0]]
    plain = pipe(PROMPTS, guidance=1.0, steps=2).astype(int)
    assert max(np.abs(found[n] - plain[n]).max() for n in (0, 2)) <= 1
    assert np.abs(found[1] - plain[1]).max() > 1


def test_a_fixed_text_length_runs_prompts_of_any_length_in_one_program(pipe):
    how = {"steps": 2, "text_length": 64, "batch_size": 2}
    first = pipe(PROMPTS[:1], **how)
    before = sampler.generate_jit._cache_size()
    pipe([PROMPTS[1] * 3, "zebra"], **how)
    assert sampler.generate_jit._cache_size() == before
    assert np.abs(first.astype(int) - pipe(PROMPTS[:1], steps=2, batch_size=2)).max() <= 1
    for length, says in ((8, "a prompt has"), (121, "this model reads at most 120")):
        with pytest.raises(UserError, match=f"text length {length}: {says}"):
            pipe(PROMPTS[1], steps=2, text_length=length)


def test_sizes_within_a_generation_size_share_the_large_program(tmp_path):
    tiny_diffusers.build(tmp_path, sample_size=32)
    pipe = Pipeline.from_pretrained(tmp_path)
    programs = []
    for height, width in [(256, 256), (200, 200), (392, 400), (64, 64)]:
        assert pipe("zebra", height=height, width=width, steps=2).shape == (1, height, width, 3)
        programs.append(sampler.generate_jit._cache_size())
    assert set(programs) == {programs[0]}


def test_rows_of_a_prompt_file_carry_guidance_and_64_bit_seeds(tiny_model, tmp_path, capsys):
    rows = [{"seed": LARGE}, {"guidance": 1}, {"guidance": 2.5, "seed": str(LARGE + 1)}, {}]
    lines = [json.dumps({"prompt": "zebra", **row}) for row in rows]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    seeds = [row.seed for row in read_prompts(tmp_path / "p.jsonl")]
    assert seeds == [LARGE, None, LARGE + 1, None]
    argv = f"--model {tiny_model} --prompts {tmp_path}/p.jsonl --out {tmp_path}/out --steps 2"
    for _ in range(2):
        assert cli.run(sample.main, argv.split()) == 0
    assert "4 of them already there" in capsys.readouterr().out
    found = [png_settings(path) for path in sorted((tmp_path / "out").glob("0*.png"))]
    assert [image["seed"] for image in found] == [LARGE, 0, LARGE + 1, 0]
    assert [image["guidance"] for image in found] == [4.5, 1.0, 2.5, 4.5]


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"seed": [1, 2]}, "2 seeds for 1 prompts: give one for all, or one each"),
        ({"seed": 2**64}, f"seed {2**64}: a whole number from 0 to {2**64 - 1}"),
        ({"seed": "1.5"}, "seed 1.5: a whole number"),
        ({"seed": True}, "seed True: a whole number"),
        ({"guidance": [float("nan")]}, "guidance nan: a finite number"),
        ({"text_length": 0}, "text length 0: at least 1"),
        ({"vae_tile": 8}, "vae tile 8: at least 32"),
    ],
)
def test_rows_that_cannot_be_used_are_one_line(pipe, wrong, says):
    with pytest.raises(UserError, match=says) as error:
        pipe(["zebra"], **wrong)
    assert "\n" not in str(error.value)


def test_defaults_come_from_the_call_then_the_model_then_pixart():
    assert SamplingConfig().with_defaults().given() == DEFAULTS
    model = SamplingConfig(steps=4, guidance=1.0, solver="lcm")
    assert SamplingConfig().with_defaults(model).given() == {**DEFAULTS, **model.given()}
    # a solver other than the model's comes with its own number of steps
    for solver, steps in (("dmd", 1), ("dpm++", 20), ("lcm", 4)):
        assert SamplingConfig(solver=solver).with_defaults(model).steps == steps
    assert SamplingConfig(steps=7, solver="dmd").with_defaults(model).steps == 7
