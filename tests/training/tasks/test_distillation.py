"""Distillation: steps of both tasks are those of PyTorch with the same weights and random numbers,
runs resume to the bit, and students open as models of few steps."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, PixArtAlphaPipeline

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_run
from tasks.test_lora import SIZES, check_kills, check_two_devices, error_of, final_state, over_base
from tiny_run import Killed, figures, kill_before

from pixart_jax import Pipeline
from pixart_jax.commands import train
from pixart_jax.config import (
    Config,
    EvaluateConfig,
    LcmConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    StageConfig,
    TdmConfig,
)
from pixart_jax.diffusion import schedule
from pixart_jax.errors import UserError
from pixart_jax.evaluation import inception
from pixart_jax.models.flops import forward_flops, train_flops
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.pipeline.text_states import write
from pixart_jax.training import optimizer as optimizers
from pixart_jax.training.bad_steps import StepGuard
from pixart_jax.training.state import TrainState
from pixart_jax.training.step import train_step
from pixart_jax.training.tasks import ConsistencyDistillation, TrajectoryDistillation
from pixart_jax.training.tasks.denoising import DiffusionObjective
from pixart_jax.weights.table import flatten
from pixart_jax.weights.transformer import DIFFUSERS
from tests import tiny_diffusers
from tests.models.reference import diffusers_pair, read_state_dict, relative_error

BARS = torch.tensor(schedule.linear().alphas_cumprod)
# eps: a first step of Adam with a small one is the gradient's sign
ADAM = OptimizerConfig(
    learning_rate=0.02, warmup_steps=0, b2=0.95, weight_decay=0.1, eps=0.01, clip=0.5, ema=0.9
)


# ---- steps beside PyTorch ----


def roots(bars):
    """(α, σ) of each sample."""
    return tuple(root.float()[:, None, None, None] for root in (bars.sqrt(), (1 - bars).sqrt()))


class Theirs:
    """The student's, teacher's and other copies of a model in PyTorch, channels last."""

    def __init__(self, prediction: str, fields: dict):
        self.prediction = prediction
        self.teacher, self.config, params = diffusers_pair(**fields)
        rng = np.random.default_rng(1)
        self.null = rng.normal(size=(self.config.text_tokens, 20)).astype(np.float32)
        self.base = {**params, "null_caption": jnp.asarray(self.null)}
        self.fields = fields

    def copy(self, frozen: bool = False) -> torch.nn.Module:
        model, _, _ = diffusers_pair(**self.fields)
        return model.requires_grad_(not frozen)

    def clean(self, model, x, t, text):
        """(x̂_0, ε) and the prediction."""
        states, lengths = text
        mask = (torch.arange(states.shape[1])[None] < lengths[:, None]).float()
        given = {"timestep": t.float(), "encoder_attention_mask": mask}
        more = {"resolution": None, "aspect_ratio": None}
        out = model(x.permute(0, 3, 1, 2), states, added_cond_kwargs=more, **given).sample
        out = out.permute(0, 2, 3, 1)[..., :4]
        return (*self.implied(out, x, t), out)

    def implied(self, out, x, t):
        a, s = (
            root.float()[:, None, None, None] for root in (BARS[t].sqrt(), (1 - BARS[t]).sqrt())
        )
        if self.prediction == "epsilon":
            return (x - s * out) / a, out
        return a * x - s * out, a * out + s * x

    def tree(self, model) -> dict:
        state = {name: p.detach() for name, p in model.named_parameters()}
        shapes = jax.tree.map(np.shape, {n: v for n, v in self.base.items() if n != "null_caption"})
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a, jnp.float32),
            shapes,
            is_leaf=lambda a: isinstance(a, tuple),
        )
        return read_state_dict(DIFFUSERS, shapes, state)


def mixed(bars, x0, noise):
    a, s = roots(bars)
    return a * x0 + s * noise


def huber(a, b):
    return (((a - b) ** 2 + 1e-6).sqrt() - 1e-3).mean((1, 2, 3))


def adam(model, factor: float = 1.0):
    options = {"lr": ADAM.learning_rate * factor, "betas": (0.9, 0.95), "eps": 0.01}
    return torch.optim.AdamW(model.parameters(), weight_decay=0.1, **options)


def take(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.clip)
    optimizer.step()
    optimizer.zero_grad()


def a_batch(rng) -> dict:
    size, lengths = (4, 8, 8, 4), np.array([5, 1, 3, 4], np.int32)
    return {
        "mean": rng.normal(size=size).astype(np.float32),
        "std": rng.uniform(0.1, 0.5, size).astype(np.float32),
        "text_states": rng.normal(size=(4, 5, 20)).astype(np.float32),
        "text_lengths": lengths,
        "size": None,
        "aspect_ratio": None,
    }


def texts(theirs: Theirs, batch: dict):
    states, lengths = torch.tensor(batch["text_states"]), torch.tensor(batch["text_lengths"])
    return (states, lengths), (torch.tensor(theirs.null[:5]).expand_as(states), lengths)


def two_steps(task, params, base, fake_rate=None):
    """(losses, state) after two steps of ours on two batches, and the batches."""
    names = jax.tree.map(lambda a: (None,) * np.ndim(a), params)
    optimizer = optimizers.make_optimizer(ADAM, 2, 4, names, fake_rate)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, optimizer.init(params), StepGuard.fresh())
    step = jax.jit(
        lambda state, batch, key: train_step(
            state, batch, key, base, task=task, optimizer=optimizer, rate=lambda _: 0.0
        )
    )
    rng, losses, batches = np.random.default_rng(5), [], []
    for number in range(2):
        batches.append(a_batch(rng))
        state, metrics = step(state, batches[-1], jax.random.key(number))
        losses.append(metrics)
    return losses, state, batches


def compare(name: str, ours: dict, theirs: dict) -> None:
    ours, theirs = flatten(ours), flatten(theirs)
    ours.pop("null_caption", None)
    error = max(relative_error(ours[path], theirs[path]) for path in theirs)
    print(f"{name}: largest relative difference of a parameter {error:.1e}")
    assert set(ours) == set(theirs) and error <= 1e-4


def test_two_lcm_steps_are_pytorchs():
    theirs = Theirs("epsilon", SIZES)
    process = DiffusionObjective(ObjectiveConfig(condition_dropout=0.0), 0.5)
    module, stage = PixArtTransformer(theirs.config), StageConfig("stage", "lcm", start="base")
    task = ConsistencyDistillation(module, process, None, 0, stage)
    losses, state, batches = two_steps(task, jax.tree.map(jnp.copy, theirs.base), theirs.base)

    student, target, teacher = theirs.copy(), theirs.copy(frozen=True), theirs.teacher
    optimizer = adam(student)
    for number, batch in enumerate(batches):
        keys = jax.random.split(jax.random.key(number), 4)
        noised = process.prepare(batch, keys)
        x0, noise = (torch.tensor(np.asarray(part)) for part in (noised.x0, noised.noise))
        index = [int(jax.random.randint(jax.random.fold_in(k, 7), (), 0, 50)) for k in keys]
        t = torch.tensor(index) * 20 + 19
        before = (t - 20).clamp(min=0)
        text, null = texts(theirs, batch)
        x_t = mixed(BARS[t], x0, noise)

        def consistent(model, x, t, text=text):
            scaled = (10 * t.float())[:, None, None, None]
            made, _, _ = theirs.clean(model, x, t, text)
            norm = scaled**2 + 0.25
            return 0.25 / norm * x + scaled / norm.sqrt() * made

        with torch.no_grad():
            with_text, without = (theirs.clean(teacher, x_t, t, which) for which in (text, null))
            made, noise = (a + 4.5 * (a - b) for a, b, _ in zip(with_text, without, range(2)))
            x_before = mixed(BARS[before], made, noise)
            wanted = consistent(target, x_before, before)
        loss = huber(consistent(student, x_t, t), wanted).mean()
        loss.backward()
        take(student, optimizer)
        with torch.no_grad():
            for average, parameter in zip(target.parameters(), student.parameters()):
                average.lerp_(parameter, 1 - ADAM.ema)
        error = abs(float(losses[number]["loss"]) / loss.item() - 1)
        print(f"lcm step {number}: loss {loss.item():.4f}, relative difference {error:.1e}")
        assert error <= 1e-4
    compare("lcm student", state.params, theirs.tree(student))
    compare("lcm target", state.average, theirs.tree(target))


@pytest.mark.slow
def test_two_tdm_steps_are_pytorchs():
    theirs = Theirs("v", SIZES)
    process = DiffusionObjective(ObjectiveConfig(prediction="v"), 0.5)
    module, stage = PixArtTransformer(theirs.config), StageConfig("stage", "tdm", start="base")
    sampling = SamplingConfig(4, guidance=1.0, solver="tdm")
    task = TrajectoryDistillation(module, process, None, 0, stage, sampling)
    params = {part: jax.tree.map(jnp.copy, theirs.base) for part in ("student", "fake")}
    losses, state, batches = two_steps(task, params, theirs.base, fake_rate=5.0)

    student, fake, teacher = theirs.copy(), theirs.copy(), theirs.teacher
    of_student, of_fake = adam(student), adam(fake, 5.0)
    times = [899, 674, 449, 224]
    for number, batch in enumerate(batches):
        keys = jax.random.split(jax.random.key(number), 4)
        begin, rest = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        draws = jax.vmap(lambda key: jax.random.split(key, 3))(rest)
        text, null = texts(theirs, batch)

        def normal(keys):
            return torch.tensor(np.stack([jax.random.normal(k, (8, 8, 4)) for k in keys]))

        path = [normal(begin)]
        for now, then in zip(times, times[1:]):
            with torch.no_grad():
                made, e, _ = theirs.clean(student, path[-1], torch.full((4,), now), text)
                path.append(mixed(BARS[torch.full((4,), then)], made, e))
        chosen = [int(jax.random.randint(k, (), 0, 4)) for k in draws[:, 0]]
        at = torch.tensor([times[n] for n in chosen])
        m = at - 224
        low, high = m.clamp(min=20).tolist(), (at - 10).tolist()
        drawn = zip(draws[:, 1], low, high)
        t = torch.tensor([int(jax.random.randint(k, (), a, b)) for k, a, b in drawn])
        z, x = normal(draws[:, 2]), torch.stack([path[n][row] for row, n in enumerate(chosen)])
        made, e, _ = theirs.clean(student, x, at, text)
        fixed, e = made.detach(), e.detach()
        (a_m, s_m), (a_t, s_t) = roots(BARS[m]), roots(BARS[t])
        ratio = a_t / a_m
        added = (s_t**2 - (ratio * s_m) ** 2).clamp(min=0).sqrt()
        x_t = ratio * (a_m * fixed + s_m * e) + added * z
        guess, _, _ = theirs.clean(fake, x_t, t, text)
        whole = (ratio * s_m * e + added * z) / s_t
        weight = (BARS[t] / (1 - BARS[t])).clamp(max=5).float()
        weight = weight * torch.exp(-0.5 * (whole**2).mean((1, 2, 3)))
        weight = weight / torch.exp(-0.5 * (z**2).mean((1, 2, 3)))
        fake_loss = (((guess - fixed) ** 2).mean((1, 2, 3)) * weight).mean()
        with torch.no_grad():
            (real, _, _), (free, _, _) = (
                theirs.clean(teacher, x_t, t, which) for which in (text, null)
            )
            guided = real + 3.5 * (real - free)
            wanted = fixed + guided - guess
        scale = (fixed - guided).abs().mean((1, 2, 3)) + 1e-5
        loss = (huber(made, wanted) / scale).mean()
        (loss + fake_loss).backward()
        take(student, of_student)
        take(fake, of_fake)
        for name, value in (("student", loss), ("fake", fake_loss)):
            error = abs(float(losses[number][name]) / value.item() - 1)
            print(f"tdm step {number}: {name} {value.item():.4f}, difference {error:.1e}")
            assert error <= 1e-4
    compare("tdm student", state.params["student"], theirs.tree(student))
    compare("tdm fake score", state.params["fake"], theirs.tree(fake))
    moved = flatten(state.average["student"])["blocks/mlp/fc1/kernel"]
    assert np.abs(moved - flatten(state.params["student"])["blocks/mlp/fc1/kernel"]).max() > 1e-4


# ---- runs ----


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """What tiny_run's curriculum reads, a model of diffusers in ``base`` and texts in
    ``texts.safetensors``."""
    folder = tmp_path_factory.mktemp("world")
    tiny_run.curriculum(folder)
    tiny_diffusers.build(folder / "base")
    pipe = Pipeline.from_pretrained(folder / "base")
    states = pipe.encode_prompts(["a red circle", "a blue square", "the large star", ""])
    write(folder / "texts.safetensors", list(states), states, states.identity)
    return folder


def a_run(world: Path, task: str = "lcm", **changes) -> Config:
    """:func:`over_base` of a task. changes: of the stage."""
    config = tiny_run.curriculum(world)
    data = config.stages[1].data
    if task == "tdm":
        source = f"states:{world / 'texts.safetensors'}"
        data = dataclasses.replace(data, source=source, buckets=((32, 32), (32, 48)))
    # small, with a wide eps: else rounding grows, in the roll-out and by Adam
    rate = 1e-3 if task == "tdm" else 1e-2
    plain = {
        "data": data,
        "optimizer": dataclasses.replace(config.stages[0].optimizer, learning_rate=rate, eps=1e-3),
        "objective": ObjectiveConfig(null_condition="empty", condition_dropout=0.0),
    }
    return over_base(world, task=task, **{**plain, **changes})


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "tdm"
    train.train(a_run(world, "tdm"), workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("task", ["lcm", "tdm"])
def test_killed_by_the_system_it_ends_the_same_to_the_bit(world, tmp_path, task):
    train.train(a_run(world, task), tmp_path / "whole")
    check_kills(a_run(world, task), tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow  # 15 s
def test_fid_of_the_student_changes_no_parameter(finished, world, tmp_path, monkeypatch):
    """A stage that learns from texts alone, measured against records, and killed between."""
    measured = EvaluateConfig(
        3, ("fid",), 8, inception="random:0", source=str(world / "square"), split="train"
    )
    seen = []

    class Means:  # instead of Inception's features, which take seconds an image
        def features(self, images):
            seen.append(images.shape)
            return images.astype("f4").reshape(len(images), 16, -1).mean(-1)

    monkeypatch.setattr(inception, "random", lambda seed: Means())
    config = a_run(world, "tdm", evaluate=measured)
    kill_before(monkeypatch, 6)
    with contextlib.suppress(Killed):
        train.train(config, tmp_path, None, train.open_metric)
    train.train(config, tmp_path, None, train.open_metric)
    lines = [line for line in figures(tmp_path) if "evaluate/fid" in line]
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert all(0 < line["evaluate/fid"] < np.inf for line in lines) and "loss" not in lines[0]
    assert len({line["evaluate/fid"] for line in lines}) == 3
    assert set(seen) == {(8, 32, 32, 3)}
    jax.tree.map(np.testing.assert_array_equal, final_state(finished), final_state(tmp_path))


def test_the_student_samples_in_four_steps_untold(finished, world):
    state = final_state(finished)
    assert set(state["params"]) == {"student", "fake"}
    student = Pipeline.from_pretrained(finished / "model")
    settings = student.sampling.with_defaults()
    assert (settings.solver, settings.steps, settings.guidance) == ("tdm", 4, 1.0)
    average = flatten(state["opt_state"][1]["inner_state"]["ema"]["student"])
    for path, value in flatten(student.transformer.params).items():
        np.testing.assert_array_equal(value, average[path])
    theirs = PixArtAlphaPipeline.from_pretrained(finished / "model")
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    latents = theirs(
        "a red circle",
        negative_prompt="",
        guidance_scale=1.0,
        timesteps=[899, 674, 449, 224],
        latents=torch.tensor(noise).permute(0, 3, 1, 2),
        height=32,
        width=32,
        output_type="latent",
        use_resolution_binning=False,
    ).images
    text = student.encode_text(["a red circle"])
    ours = student.denoise(*text, noise, **dataclasses.asdict(student.sampling))
    assert relative_error(ours, latents.permute(0, 2, 3, 1).numpy()) <= 1e-4
    lines = [line for line in figures(finished) if "fake" in line]
    assert lines and {"loss", "student", "grad_norm"} <= set(lines[0])


@pytest.mark.slow
def test_an_lcm_lora_exports_an_adapter_and_a_model_of_lcm(world, tmp_path):
    lora = LoraConfig(rank=2, merged=True)
    optimizer = dataclasses.replace(a_run(world).stages[0].optimizer, ema=0.0)
    train.train(a_run(world, lora=lora, steps=2, optimizer=optimizer), tmp_path)
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    ours = Pipeline.from_pretrained(tmp_path / "model")
    settings = ours.sampling.with_defaults()
    assert (settings.solver, settings.steps, settings.guidance) == ("lcm", 4, 1.0)
    theirs = PixArtAlphaPipeline.from_pretrained(tmp_path / "model")
    assert type(theirs.scheduler) is LCMScheduler
    c = theirs.scheduler.config
    assert (c.beta_start, c.beta_end, c.beta_schedule) == (1e-4, 0.02, "linear")
    assert c.original_inference_steps == 50 and c.prediction_type == "epsilon"
    base = Pipeline.from_pretrained(world / "base")
    merged = base.transformer.with_lora(tmp_path / "adapter")
    for path, value in flatten(ours.transformer.params).items():
        if path != "null_caption":
            found = flatten(merged.params)[path]
            np.testing.assert_allclose(value, found, atol=1e-6, err_msg=path)


def test_mistakes_are_one_line(world, finished, tmp_path):
    good = a_run(world, "tdm")
    (stage,) = good.stages

    def config(**changes) -> Config:
        return dataclasses.replace(good, stages=(dataclasses.replace(stage, **changes),))

    def data(source: str):
        return dataclasses.replace(stage.data, source=source)

    wide = dataclasses.replace(good, model=dataclasses.replace(good.model, width=48))
    plain = tmp_path / "prompts.safetensors"
    plain.write_bytes((world / "base" / "transformer" / "config.json").read_bytes())
    texts = f"states:{world / 'texts.safetensors'}"
    lines = tmp_path / "prompts.txt"
    lines.write_text("a red circle\na blue square\n")
    wide_vae = tmp_path / "vae"
    wide_vae.mkdir()
    values = json.loads((world / "base" / "vae" / "config.json").read_text())
    (wide_vae / "config.json").write_text(json.dumps({**values, "latent_channels": 16}))
    for number, (wrong, message) in enumerate(
        (
            (wide, "is another model: width is 24 there and 48 in the config"),
            (config(start=str(finished / "model")), "is a distilled model (solver tdm)"),
            (config(objective=ObjectiveConfig(prediction="v")), "predicts epsilon, and so must"),
            (config(data=data(f"states:{tmp_path / 'none'}")), "no text states"),
            (config(data=data(f"states:{plain}")), "prompts.safetensors"),
            (config(data=data(f"states:{lines}")), "prompts.txt holds no text states"),
            (config(vae=str(wide_vae)), "have 16 channels, and the model reads 4"),
            (config(task="lcm", data=data(texts)), "task lcm needs pictures"),
        )
    ):
        assert message in error_of(wrong, tmp_path / str(number)), message
    fid = EvaluateConfig(3, ("fid",), inception="random:0")
    for changes, message in (
        ({"evaluate": fid}, "texts have no images: name a set for fid"),
        ({"start": "previous"}, "task tdm needs the folder or hub id of its teacher"),
        ({"task": "lcm", "lcm": LcmConfig(solver_steps=30)}, "must divide objective.timesteps"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(stage, **changes)
    with pytest.raises(UserError, match="TdmConfig.steps = 7: must be 1 or divide 900"):
        TdmConfig(steps=7)


def test_every_evaluation_of_a_step_is_counted():
    one = forward_flops(tiny_run.MODEL, 32, 32, 8)
    for task, count in (("lcm", 6), ("tdm", 11), ("text_to_image", 3)):
        stage = StageConfig("s", task, start="base")
        others = stage.unlearned_evaluations
        assert train_flops(tiny_run.MODEL, 32, 32, 8, others=others) == count * one, task


@pytest.mark.slow
@pytest.mark.parametrize("task", ["lcm", "tdm"])
def test_two_devices_compute_what_one_does(world, task):
    limit = 1e-4 if task == "tdm" else 1e-5
    check_two_devices("test_distillation", world, task, limit=limit)
