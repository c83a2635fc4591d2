"""What a drawing leaves out: the plan of it, and that the image is what the plan says."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import Pipeline, cli, diffusion
from pixart_jax.diffusion.guidance import combine_guidance
from pixart_jax.errors import UserError
from pixart_jax.models.transformer import PARTS, BlockCache, Conditioning
from pixart_jax.pipeline import CacheConfig, denoising
from tests import tiny_diffusers

PROMPTS = ["a large red circle", "a small blue star left of a large green square"]
T = diffusion.timesteps("dpm++", 6)
DEPTH = 2


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_diffusers.build(folder)
    return Pipeline.from_pretrained(folder)


def steps_fresh(plan, part: str) -> list[int]:
    return plan.fresh[part].all(1).astype(int).tolist()


def test_nothing_is_left_out_unless_asked_for():
    plan = CacheConfig().plan(T, DEPTH, True)
    assert plan.guides.all() and not plan.fresh and plan.share == 1
    assert not CacheConfig().plan(T, DEPTH, False).guides.any() and CacheConfig().settings() == {}


def test_an_interval_guides_the_steps_within_it():
    plan = CacheConfig(guidance_interval=(300, 900)).plan(T, DEPTH, True)
    assert plan.guides.tolist() == [300 <= t <= 900 for t in T] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ] or plan.guides.sum() < len(T)
    assert plan.share == pytest.approx((2 * plan.guides.sum() + (~plan.guides).sum()) / 12)


def test_blocks_are_computed_at_every_nth_step():
    plan = CacheConfig(blocks_every=3).plan(T, DEPTH, True)
    assert {part: steps_fresh(plan, part) for part in PARTS} == dict.fromkeys(
        PARTS, [1, 0, 0, 1, 0, 0]
    )
    assert plan.share == pytest.approx(1 / 3)


def test_cross_attention_is_kept_and_guidance_ends_after_the_gate():
    plan = CacheConfig(cross_attention_steps=2).plan(T, DEPTH, True)
    assert plan.guides.tolist() == [True, True, False, False, False, False]
    assert list(plan.fresh) == ["cross_attention"] and steps_fresh(plan, "cross_attention") == [
        1,
        1,
        0,
        0,
        0,
        0,
    ]
    assert not CacheConfig(cross_attention_steps=6).plan(T, DEPTH, True).fresh, (
        "a gate after the last step changes nothing"
    )


def test_where_guidance_begins_or_ends_all_is_computed_but_what_the_gate_keeps():
    plan = CacheConfig(cross_attention_steps=3, blocks_every=6).plan(T, DEPTH, True)
    assert plan.guides.tolist() == [True] * 3 + [False] * 3
    assert steps_fresh(plan, "attention") == steps_fresh(plan, "mlp") == [1, 0, 0, 1, 0, 0]
    assert steps_fresh(plan, "cross_attention") == [1, 0, 0, 0, 0, 0]
    plan = CacheConfig(guidance_interval=(500, 999), blocks_every=6).plan(T, DEPTH, True)
    (first,) = np.flatnonzero(np.diff(plan.guides.astype(int))) + 1
    assert all(np.flatnonzero(steps_fresh(plan, part)).tolist() == [0, first] for part in PARTS)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"guidance_interval": (900, 100)}, "the lower one first"),
        ({"guidance_interval": (float("nan"), 1)}, "two times"),
        ({"cross_attention_steps": 0}, "at least 1"),
        ({"blocks_every": 0}, "at least 1"),
        ({"blocks_every": 2, "schedule": "x.json"}, "one of them"),
    ],
)
def test_a_wrong_value_is_named(wrong, says):
    with pytest.raises(UserError, match=says):
        CacheConfig(**wrong)


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
    with pytest.raises(UserError, match=says) as fault:
        CacheConfig(schedule=str(path)).plan(T, DEPTH, True)
    assert "\n" not in str(fault.value) and "schedule.json" in str(fault.value)


# ---- what a block takes over ----


def evaluated(pipe, noise, t, kept=None, states=None):
    states = states or pipe.encode_text(PROMPTS)
    apply = jax.jit(pipe.transformer.module.apply, static_argnames="method")
    params = {"params": pipe.transformer.params}
    conditioning = Conditioning(
        *(a[0] for a in apply(params, np.float32([t]), method="encode_times"))
    )
    text = apply(params, *states, method="encode_text")
    return apply(params, noise, conditioning, text, kept, method="denoise")


def test_a_part_is_taken_over_block_by_block(pipe):
    noise, _ = pipe.noise(0, range(2), 64, 64)
    whole, nothing = evaluated(pipe, noise, 500.0)
    assert nothing == {}
    zeros = dict.fromkeys(PARTS, jnp.zeros((DEPTH, 2, 16, pipe.transformer.config.width)))
    fresh, made = evaluated(
        pipe, noise, 500.0, BlockCache(dict.fromkeys(PARTS, np.ones(DEPTH, bool)), zeros)
    )
    np.testing.assert_allclose(fresh, whole, rtol=1e-5, atol=1e-6)
    again, kept = evaluated(
        pipe, noise, 500.0, BlockCache(dict.fromkeys(PARTS, np.zeros(DEPTH, bool)), made)
    )
    np.testing.assert_allclose(again, whole, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept, made)
    # The second block alone is taken over, from what another time's evaluation gave.
    _, other = evaluated(
        pipe, noise, 100.0, BlockCache(dict.fromkeys(PARTS, np.ones(DEPTH, bool)), zeros)
    )
    mixed, kept = evaluated(
        pipe, noise, 500.0, BlockCache(dict.fromkeys(PARTS, np.array([True, False])), other)
    )
    assert not np.allclose(mixed, whole, rtol=1e-3)
    for part in PARTS:
        np.testing.assert_array_equal(kept[part][1], other[part][1])
        np.testing.assert_allclose(kept[part][0], made[part][0], rtol=1e-4, atol=1e-5)


def definition(pipe, noise, steps: int, gate: int, every: int, scale: float = 4.5):
    """T-GATE and FORA written out, step by step on the host."""
    module, params, depth = (
        pipe.transformer.module,
        {"params": pipe.transformer.params},
        pipe.transformer.config.depth,
    )
    states, lengths = pipe.encode_text(PROMPTS)
    empty, empty_lengths = pipe.encode_text([""] * 2, states.shape[1])
    halves = module.apply(
        params,
        jnp.concatenate([empty, states]),
        jnp.concatenate([empty_lengths, lengths]),
        method="encode_text",
    )
    alone = module.apply(params, states, lengths, method="encode_text")
    memory, calls = {}, []

    def denoiser(x, t):
        step = len(calls)
        calls.append(step)
        guided = step < gate
        x = jnp.concatenate([x, x]) if guided else x
        conditioning = Conditioning(
            *(a[0] for a in module.apply(params, t[:1], method="encode_times"))
        )
        if step == gate:
            memory.update(
                {
                    part: kept.reshape(depth, 2, 2, *kept.shape[2:]).mean(1)
                    for part, kept in memory.items()
                }
            )
        computed = {part: step % every == 0 or step == gate for part in PARTS}
        computed["cross_attention"] = step < gate and step % every == 0
        shape = (depth, len(x), 16, pipe.transformer.config.width)
        kept = BlockCache(
            {part: np.full(depth, flag) for part, flag in computed.items()},
            {p: memory.get(p, jnp.zeros(shape)) for p in PARTS},
        )
        output, made = module.apply(
            params, x, conditioning, halves if guided else alone, kept, method="denoise"
        )
        memory.update(made)
        return combine_guidance(output, scale, 4) if guided else output

    solver = diffusion.solvers.by_name("dpm++")
    plan = solver.plan(
        diffusion.schedule.linear(), steps, times="fractional", start=0, stochastic=False
    )
    state = solver.init(noise)
    for n in range(steps):
        x = state[0]
        output = denoiser(x, jnp.full((len(x),), plan.t[n], jnp.float32))[..., :4]
        x0 = (x - plan.sigma[n] * output) / plan.alpha[n]
        state = solver.update(
            state,
            x0,
            None,
            {name: jnp.asarray(c[n], jnp.float32) for name, c in plan.coefficients.items()},
            None,
        )
    return state[0]


@pytest.mark.parametrize("gate, every", [(3, 1), (6, 2), (3, 2)])
def test_the_image_is_what_the_plan_written_out_step_by_step_draws(pipe, gate, every):
    noise, _ = pipe.noise(0, range(2), 64, 64)
    states, lengths = pipe.encode_text(PROMPTS)
    shortcuts = CacheConfig(cross_attention_steps=gate, blocks_every=every)
    found = pipe.denoise(states, lengths, noise, steps=6, shortcuts=shortcuts)
    want = definition(pipe, noise, 6, gate, every)
    assert np.abs(found - want).max() <= 2e-5 * np.abs(want).max()
    whole = pipe.denoise(states, lengths, noise, steps=6)
    assert np.abs(found - whole).max() > 2e-4 * np.abs(whole).max(), (
        "ten times what the definition is held to"
    )


def test_a_schedule_of_all_parts_is_the_named_one(pipe, tmp_path):
    noise, _ = pipe.noise(0, range(2), 64, 64)
    states, lengths = pipe.encode_text(PROMPTS)
    schedule = np.ones((6, DEPTH, 3))
    schedule[1::2] = 0
    path = tmp_path / "every_second.json"
    path.write_text(json.dumps(schedule.tolist()))
    found, named = (
        np.asarray(pipe.denoise(states, lengths, noise, steps=6, shortcuts=how))
        for how in (CacheConfig(schedule=str(path)), CacheConfig(blocks_every=2))
    )
    np.testing.assert_array_equal(found, named)


def test_outside_the_interval_the_program_evaluates_half_the_rows(pipe):
    """Two scans, one over 2b rows and one over b; the image is that of guidance of 1 there."""
    noise, _ = pipe.noise(0, range(2), 64, 64)
    states, lengths = pipe.encode_text(PROMPTS)
    how = CacheConfig(guidance_interval=(400, 999))
    run = pipe._run("dpm++", None, 6, "fractional", True, how)
    arguments = pipe._arguments((states, lengths), noise, (states, lengths), None, 4.5, None, None)
    made = jax.make_jaxpr(denoising.sample_latents, static_argnums=0)(run, *arguments)
    loops = [e for e in made.eqns if e.primitive.name == "scan" and e.params["length"] in (3, 4, 2)]
    rows = sorted(
        "f32[4,16,24]" in str(e.params["jaxpr"])
        for e in loops
        if "f32[2,8,8,4]" in str(e.params["jaxpr"])
    )
    assert rows == [False, True]
    none = pipe.denoise(
        states, lengths, noise, steps=6, shortcuts=CacheConfig(guidance_interval=(2000, 3000))
    )
    unguided = pipe.denoise(states, lengths, noise, steps=6, guidance=1.0)
    np.testing.assert_allclose(none, unguided, rtol=1e-5, atol=1e-6)


def test_sample_py_takes_them_and_writes_them_into_the_image(
    sample_program, tiny_model, tmp_path, capsys
):
    from pixart_jax.images import png_settings

    argv = [
        "--model",
        str(tiny_model),
        "--prompt",
        "a red circle",
        "--out",
        str(tmp_path),
        "--steps",
        "4",
    ]
    fast = [
        *argv,
        "--guidance-interval",
        "200",
        "900",
        "--cross-attention-steps",
        "2",
        "--blocks-every",
        "2",
    ]
    assert cli.run(sample_program.main, argv) == 0 and cli.run(sample_program.main, fast) == 0
    plain, short = (
        png_settings(path)
        for path in sorted(tmp_path.glob("*.png"), key=lambda path: path.stat().st_mtime)
    )
    said = {"guidance_interval": [200.0, 900.0], "cross_attention_steps": 2, "blocks_every": 2}
    assert {**plain, **said} == short
    capsys.readouterr()
    assert cli.run(sample_program.main, fast) == 0
    assert "already there" in capsys.readouterr().out
    assert cli.run(sample_program.main, [*argv, "--blocks-every", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
