"""What sampling skips and reuses: the plan of it, and that the image is what the plan says."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import Pipeline, cli, diffusion
from pixart_jax.commands import sample
from pixart_jax.diffusion.guidance import combine_guidance
from pixart_jax.errors import UserError
from pixart_jax.images import png_settings
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.transformer import PARTS, BlockCache, Conditioning
from pixart_jax.pipeline import SamplingConfig, SchedulerConfig, sampler
from pixart_jax.pipeline.block_cache import make_plan
from pixart_jax.pipeline.pipeline import Run

PROMPTS = ["a large red circle", "a small blue star left of a large green square"]
T = diffusion.timesteps("dpm++", 6)
DEPTH = 2
EVERY_THIRD = dict.fromkeys(PARTS, [1, 0, 0, 1, 0, 0])


@pytest.fixture(scope="module")
def pipe(tiny_model) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model)


def plan(guided: bool = True, **options):
    config = SamplingConfig(steps=6, **options).with_defaults()
    return make_plan(config, TransformerConfig(depth=DEPTH), SchedulerConfig(), guided)


def computed(plan) -> dict[str, list[int]]:
    """By part, 1 for the steps at which all blocks compute it."""
    return {part: rows.all(1).astype(int).tolist() for part, rows in plan.recompute.items()}


def test_nothing_is_skipped_unless_asked_for():
    assert all(plan().guides) and not plan().recompute and plan().share == 1
    assert not any(plan(guided=False).guides)
    gate_after_the_last_step = plan(cross_attention_steps=6)
    assert gate_after_the_last_step == plan()


def test_an_interval_guides_the_steps_within_it():
    found = plan(guidance_interval=(300, 900))
    assert list(found.guides) == [300 <= t <= 900 for t in T] and 0 < sum(found.guides) < len(T)
    assert found.share == pytest.approx((sum(found.guides) + 6) / 12)


@pytest.mark.parametrize(
    "options, guided_steps, tables",
    [
        ({"blocks_every": 3}, 6, EVERY_THIRD),
        ({"cross_attention_steps": 2}, 2, {"cross_attention": [1, 1, 0, 0, 0, 0]}),
        # where guidance ends all is computed but what the gate keeps
        (
            {"cross_attention_steps": 3, "blocks_every": 6},
            3,
            {**EVERY_THIRD, "cross_attention": [1, 0, 0, 0, 0, 0]},
        ),
        ({"guidance_interval": (500, 999), "blocks_every": 6}, 3, EVERY_THIRD),
    ],
)
def test_which_steps_compute_which_part(options, guided_steps, tables):
    found = plan(**options)
    assert computed(found) == tables
    assert list(found.guides) == [step < guided_steps for step in range(6)]
    if options == {"blocks_every": 3}:
        assert found.share == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"guidance_interval": (900, 100)}, "the lower one first"),
        ({"guidance_interval": (float("nan"), 1)}, "two times"),
        ({"cross_attention_steps": 0}, "at least 1"),
        ({"blocks_every": 0}, "at least 1"),
        ({"blocks_every": 2, "block_schedule": "x.json"}, "one of them"),
    ],
)
def test_a_wrong_value_is_named(wrong, says):
    with pytest.raises(UserError, match=says):
        SamplingConfig(**wrong)


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "No such file"),
        ("{", "no JSON list"),
        ("[[1, 1, 1]]", "want"),
        ('[["a"]]', "no JSON list"),
        (json.dumps(np.full((6, 2, 3), 0.5).tolist()), "1 .computed. or 0"),
        (json.dumps(np.zeros((6, 2, 3)).tolist()), "first step"),
    ],
)
def test_a_schedule_that_does_not_fit_is_one_line(tmp_path, content, says):
    path = tmp_path / "schedule.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says) as error:
        plan(block_schedule=str(path))
    assert "\n" not in str(error.value) and "schedule.json" in str(error.value)


# ---- what a block reuses ----


def evaluated(pipe, noise, t, kept=None, states=None):
    states = states or pipe.encode_text(PROMPTS)
    apply = jax.jit(pipe.transformer.module.apply, static_argnames="method")
    params = {"params": pipe.transformer.params}
    times = apply(params, np.float32([t]), method="encode_times")
    conditioning = Conditioning(*(a[0] for a in times))
    text = apply(params, *states, method="encode_text")
    return apply(params, noise, conditioning, text, kept, method="denoise")


def test_a_part_is_taken_over_block_by_block(pipe):
    noise, _ = pipe.noise(0, range(2), 64, 64)
    whole, nothing = evaluated(pipe, noise, 500.0)
    assert nothing == {}
    zeros = dict.fromkeys(PARTS, jnp.zeros((DEPTH, 2, 16, pipe.transformer.config.width)))

    def cached(t, blocks, outputs):
        recompute = dict.fromkeys(PARTS, np.array(blocks))
        return evaluated(pipe, noise, t, BlockCache(recompute, outputs))

    fresh, made = cached(500.0, [True, True], zeros)
    np.testing.assert_allclose(fresh, whole, rtol=1e-5, atol=1e-6)
    again, kept = cached(500.0, [False, False], made)
    np.testing.assert_allclose(again, whole, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept, made)
    # The second block alone is taken over, from what another time's evaluation gave.
    _, other = cached(100.0, [True, True], zeros)
    mixed, kept = cached(500.0, [True, False], other)
    assert not np.allclose(mixed, whole, rtol=1e-3)
    for part in PARTS:
        np.testing.assert_array_equal(kept[part][1], other[part][1])
        np.testing.assert_allclose(kept[part][0], made[part][0], rtol=1e-4, atol=1e-5)


def definition(pipe, noise, steps: int, gate: int, every: int, scale: float = 4.5):
    """T-GATE and FORA written out, step by step on the host."""
    run = jax.jit(pipe.transformer.module.apply, static_argnames="method")
    apply = functools.partial(run, {"params": pipe.transformer.params})
    text = pipe.encode_text(PROMPTS)
    empty = pipe.encode_text([""] * 2, text[0].shape[1])
    halves = apply(*(jnp.concatenate(pair) for pair in zip(empty, text)), method="encode_text")
    alone = apply(*text, method="encode_text")
    memory, calls = {}, []

    def denoiser(x, t):
        step = len(calls)
        calls.append(step)
        guided = step < gate
        x = jnp.concatenate([x, x]) if guided else x
        conditioning = Conditioning(*(a[0] for a in apply(t[:1], method="encode_times")))
        if step == gate:
            for part, kept in memory.items():
                memory[part] = kept.reshape(DEPTH, 2, 2, *kept.shape[2:]).mean(1)
        computed = {part: step % every == 0 or step == gate for part in PARTS}
        computed["cross_attention"] = step < gate and step % every == 0
        zeros = jnp.zeros((DEPTH, len(x), 16, pipe.transformer.config.width))
        recompute = {part: np.full(DEPTH, flag) for part, flag in computed.items()}
        kept = BlockCache(recompute, {part: memory.get(part, zeros) for part in PARTS})
        both = halves if guided else alone
        output, made = apply(x, conditioning, both, kept, method="denoise")
        memory.update(made)
        return combine_guidance(output, scale, 4) if guided else output

    solver = diffusion.solvers.by_name("dpm++")
    how = {"times": "fractional", "start": 0, "stochastic": False}
    plan = solver.plan(diffusion.schedule.linear(), steps, **how)
    state = solver.init(noise)
    for n in range(steps):
        x = state[0]
        output = denoiser(x, jnp.full((len(x),), plan.t[n], jnp.float32))[..., :4]
        x0 = (x - plan.sigma[n] * output) / plan.alpha[n]
        row = {name: jnp.asarray(c[n], jnp.float32) for name, c in plan.coefficients.items()}
        state = solver.update(state, x0, None, row, None)
    return state[0]


@pytest.mark.parametrize("gate, every", [(3, 1), (6, 2), (3, 2)])
def test_the_image_is_what_the_plan_written_out_step_by_step_draws(pipe, gate, every):
    noise, _ = pipe.noise(0, range(2), 64, 64)
    states, lengths = pipe.encode_text(PROMPTS)
    how = {"cross_attention_steps": gate, "blocks_every": every}
    found = pipe.denoise(states, lengths, noise, steps=6, **how)
    want = definition(pipe, noise, 6, gate, every)
    assert np.abs(found - want).max() <= 2e-5 * np.abs(want).max()
    whole = pipe.denoise(states, lengths, noise, steps=6)
    # ten times what the definition is held to
    assert np.abs(found - whole).max() > 2e-4 * np.abs(whole).max()


def test_a_schedule_of_all_parts_is_the_named_one(pipe, tmp_path):
    noise, _ = pipe.noise(0, range(2), 64, 64)
    states, lengths = pipe.encode_text(PROMPTS)
    schedule = np.ones((6, DEPTH, 3))
    schedule[1::2] = 0
    path = tmp_path / "every_second.json"
    path.write_text(json.dumps(schedule.tolist()))
    found, named = (
        np.asarray(pipe.denoise(states, lengths, noise, steps=6, **how))
        for how in ({"block_schedule": str(path)}, {"blocks_every": 2})
    )
    np.testing.assert_array_equal(found, named)


def test_outside_the_interval_the_program_evaluates_half_the_rows(pipe):
    """Two scans, one over 2b rows and one over b; the image is that of guidance of 1 there."""
    noise, _ = pipe.noise(0, range(2), 64, 64)
    states, lengths = pipe.encode_text(PROMPTS)
    config = SamplingConfig(steps=6, guidance_interval=(400, 999)).with_defaults()
    text, scale = (states, lengths), np.full(2, 4.5, "f")
    spec, table, _ = pipe._spec(Run(config), True, False, None)
    arguments = (pipe.transformer.params, table, noise, None, text, text, None, None, scale)
    made = jax.make_jaxpr(sampler.sample_latents, static_argnums=0)(spec, *arguments)
    loops = [e for e in made.eqns if e.primitive.name == "scan" and e.params["length"] in (3, 4, 2)]
    rows = sorted(
        "f32[4,16,24]" in str(e.params["jaxpr"])
        for e in loops
        if "f32[2,8,8,4]" in str(e.params["jaxpr"])
    )
    assert rows == [False, True]
    none = pipe.denoise(states, lengths, noise, steps=6, guidance_interval=(2000, 3000))
    unguided = pipe.denoise(states, lengths, noise, steps=6, guidance=1.0)
    np.testing.assert_allclose(none, unguided, rtol=1e-5, atol=1e-6)


def test_sample_py_takes_them_and_records_them_in_the_image(tiny_model, tmp_path, capsys):
    argv = f"--model {tiny_model} --prompt circle --out {tmp_path} --steps 4".split()
    options = "--guidance-interval 200 900 --cross-attention-steps 2 --blocks-every 2"
    fast = [*argv, *options.split()]
    assert cli.run(sample.main, argv) == 0 and cli.run(sample.main, fast) == 0
    paths = sorted(tmp_path.glob("*.png"), key=lambda path: path.stat().st_mtime)
    plain, short = map(png_settings, paths)
    said = {"guidance_interval": [200.0, 900.0], "cross_attention_steps": 2, "blocks_every": 2}
    assert {**plain, **said} == short
    capsys.readouterr()
    assert cli.run(sample.main, fast) == 0
    assert "already there" in capsys.readouterr().out
    assert cli.run(sample.main, [*argv, "--blocks-every", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
