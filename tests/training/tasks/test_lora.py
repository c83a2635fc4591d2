"""Training an adapter: its gradients are peft's, it begins as the base, and a run trains and stores
nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_run
from tiny_run import figures

from pixart_jax import cli, load_component
from pixart_jax.commands import train
from pixart_jax.config import Config, EvaluateConfig, LoraConfig, ObjectiveConfig, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.layers import DROPOUT, LORA, Dense
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.training.tasks.denoising import DiffusionObjective
from pixart_jax.training.tasks.lora import TextToImageLora
from pixart_jax.weights.table import flatten, unflatten
from tests import tiny_diffusers
from tests.models.reference import diffusers_pair, inputs, relative_error, run_diffusers

SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
SIZES |= {"caption_channels": 20, "sample_size": 8}
PARTS = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}
LORA_2 = LoraConfig(rank=2, alpha=4)
MERGED = dataclasses.replace(LORA_2, merged=True)


def task_of(config: TransformerConfig, lora: LoraConfig, **options) -> TextToImageLora:
    objective = DiffusionObjective(ObjectiveConfig(null_condition="empty"), 0.5)
    module = PixArtTransformer(config, **options)
    stage = StageConfig("stage", start="base", lora=lora)
    return TextToImageLora(module, objective, None, 0, stage)


def with_peft(theirs: torch.nn.Module, task: TextToImageLora):
    """(their model with the task's adapter, b drawn at random; the same as our tree)."""
    c = task.lora
    config = peft.LoraConfig(
        r=c.rank,
        lora_alpha=c.alpha or c.rank,
        use_rslora=c.rslora,
        use_dora=c.dora,
        target_modules=list(c.targets),
        init_lora_weights="gaussian",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
    return model, tree_of(model, task, lambda parameter: parameter.detach())


def tree_of(model, task: TextToImageLora, get) -> dict:
    """peft's parameters, or what ``get`` takes from each, in the form of our tree."""
    found = {n.replace(".default", ""): get(p) for n, p in model.named_parameters() if "lora" in n}
    flat = {}
    for path, name in task.targets.items():
        depth = task.module.config.depth if "{i}" in name else 1
        for part, key in PARTS.items():
            if part == "magnitude" and not task.lora.dora:
                continue
            rows = []
            for i in range(depth):
                value = found[f"base_model.model.{name.format(i=i)}.{key}.weight"].numpy()
                if value.ndim == 4 and part == "magnitude":
                    value = value.reshape(-1)
                elif value.ndim == 4:
                    value = value.transpose(2, 3, 1, 0)
                    value = value[0, 0] if part == "b" else value
                rows.append(value if value.ndim != 2 or path == "patch_embedder" else value.T)
            flat[f"{path}/{part}"] = np.stack(rows) if "{i}" in name else rows[0]
    assert len(found) == sum(
        (task.module.config.depth if "{i}" in name else 1) * (3 if task.lora.dora else 2)
        for name in task.targets.values()
    )
    return {LORA: unflatten(flat)}


CASES = {
    "plain": ({}, LoraConfig(rank=3, alpha=8)),
    "multi-scale, rank-stabilised": (
        {"use_additional_conditions": True},
        LoraConfig(rank=4, alpha=3, rslora=True),
    ),
    "DoRA": ({}, LoraConfig(rank=2, dora=True)),
    "attention alone": ({}, LoraConfig(targets=("to_q", "to_k", "to_v", "attn2.to_out.0"))),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_pefts(case):
    fields, lora = CASES[case]
    theirs, config, params = diffusers_pair(**SIZES, **fields)
    task = task_of(config, lora, remat="full")
    model, tree = with_peft(theirs, task)
    shapes = jax.tree.map(np.shape, tree)
    assert shapes == jax.tree.map(jnp.shape, nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
    args = inputs(config, 8, 6, [1, 7, 4])
    target = np.random.default_rng(3).normal(size=(3, 8, 6, 8)).astype(np.float32)

    def loss(tree):
        variables = {"params": params, LORA: task.applied(tree[LORA])}
        output = task.module.apply(variables, **args)
        return jnp.square(output - target).mean(), output

    gradients, output = jax.jit(jax.grad(loss, has_aux=True))(tree)
    with torch.enable_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "no_grad", contextlib.nullcontext)
        patch.setattr(torch.Tensor, "numpy", lambda self: self)
        found = run_diffusers(model, **args)
    (found - torch.tensor(target)).square().mean().backward()
    assert relative_error(output, found.detach().numpy()) <= 1e-4
    wanted = flatten(tree_of(model, task, lambda parameter: parameter.grad))
    worst = max(relative_error(g, wanted[path]) for path, g in flatten(gradients).items())
    print(f"{case}: largest relative difference of a gradient {worst:.1e}")
    assert worst <= 1e-4


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_the_first_factors_are_drawn_as_pefts_and_change_nothing(init):
    _, config, params = diffusers_pair(**SIZES)
    task = task_of(config, LoraConfig(rank=8, init=init))
    tree = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
    for path in ("blocks/mlp/fc2", "t_block"):
        a = flatten(tree[LORA])[f"{path}/a"]
        want = 1 / 8 if init == "gaussian" else (3 * a.shape[-2]) ** -0.5
        assert float(a.std()) == pytest.approx(want, rel=0.15), path
    args = inputs(config, 8, 8, [3, 5])
    apply = jax.jit(lambda variables: task.module.apply(variables, **args))
    np.testing.assert_array_equal(
        apply({"params": params, LORA: task.applied(tree[LORA])}), apply({"params": params})
    )


def test_dora_begins_with_the_lengths_of_the_bases_columns():
    theirs, config, params = diffusers_pair(**SIZES)
    task = task_of(config, LoraConfig(rank=2, dora=True))
    tree = task.on_stage_start(nn.unbox(jax.jit(task.init)(jax.random.key(0))), params)
    model = peft.get_peft_model(
        theirs, peft.LoraConfig(r=2, use_dora=True, target_modules=list(task.lora.targets))
    )
    wanted = flatten(tree_of(model, task, lambda parameter: parameter.detach()))
    for path, value in flatten(tree).items():
        if path.endswith("magnitude"):
            np.testing.assert_allclose(value, wanted[path], rtol=1e-6, err_msg=path)
    args = inputs(config, 8, 8, [3, 5])
    apply = jax.jit(lambda variables: task.module.apply(variables, **args))
    ours = apply({"params": params, LORA: task.applied(tree[LORA])})
    assert relative_error(ours, apply({"params": params})) <= 1e-6


def test_dropout_acts_on_the_adapters_input_where_random_numbers_are_given():
    dense, x = Dense(64, (None, None)), jax.random.normal(jax.random.key(0), (500, 64))
    params = nn.unbox(dense.init(jax.random.key(1), x))
    one = {"a": jnp.eye(64), "b": jnp.eye(64), "keep": jnp.float32(0.75)}
    base = dense.apply(params, x)
    whole = dense.apply({**params, LORA: one}, x) - base
    np.testing.assert_allclose(whole, x, atol=1e-5)
    rngs = {DROPOUT: jax.random.key(2)}
    added = np.asarray(dense.apply({**params, LORA: one}, x, rngs=rngs) - base)
    kept = added != 0
    assert kept.mean() == pytest.approx(0.75, abs=0.01)
    np.testing.assert_allclose(added[kept], np.asarray(x)[kept] / 0.75, atol=1e-5)


# ---- runs ----


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """What tiny_run's curriculum reads, and a model of diffusers in ``base``."""
    folder = tmp_path_factory.mktemp("world")
    tiny_run.curriculum(folder)
    tiny_diffusers.build(folder / "base")
    return folder


def a_run(world: Path, lora: LoraConfig = LORA_2, **changes) -> Config:
    """:func:`over_base` with an adapter."""
    return over_base(world, lora=lora, **changes)


def over_base(world: Path, **changes) -> Config:
    """Seven steps over the model in ``base``, saved at 3, 6 and 7. changes: of the stage."""
    config, base = tiny_run.curriculum(world), str(world / "base")
    plain = {
        "steps": 7,
        "start": base,
        "optimizer": dataclasses.replace(config.stages[0].optimizer, learning_rate=1e-2),
        "objective": ObjectiveConfig(null_condition="empty"),
    }
    stages = (dataclasses.replace(config.stages[1], **{**plain, **changes}),)
    model = load_component(world / "base" / "transformer").config
    return dataclasses.replace(config, stages=stages, model=model, vae=base, text_encoder=base)


def digests(folder: Path) -> dict[Path, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def final_state(workdir: Path):
    return tiny_run.final_state(workdir, 7)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    before = digests(world / "base")
    train.train(a_run(world, MERGED), workdir)
    assert digests(world / "base") == before
    return workdir


def test_a_checkpoint_holds_the_factors_their_optimizer_and_average_alone(finished):
    state = final_state(finished)
    assert list(state["params"]) == [LORA]
    names = {path.rpartition("/")[2] for path in flatten(state["params"])}
    assert names == {"a", "b"}
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(state["params"]))
    held = sum(np.size(leaf) for leaf in jax.tree.leaves(state))
    assert held < 4 * size + 10  # the factors, two moments, the average, counters
    assert np.abs(state["params"][LORA]["blocks"]["attn"]["q"]["b"]).max() > 1e-3


def outputs(finished: Path, world: Path):
    """(arguments, our output of the base with the averaged adapter, not merged)."""
    component = load_component(world / "base" / "transformer")
    task = task_of(component.config, LORA_2)
    tree = final_state(finished)["opt_state"][1]["ema"][LORA]
    args = inputs(component.config, 8, 8, [3, 6])
    variables = {"params": component.params, LORA: task.applied(tree)}
    return args, jax.jit(task.module.apply)(variables, **args)


def test_the_adapter_opens_in_peft(finished, world):
    args, ours = outputs(finished, world)
    base = PixArtTransformer2DModel.from_pretrained(world / "base" / "transformer")
    model = peft.PeftModel.from_pretrained(base, finished / "adapter").eval()
    assert relative_error(ours, run_diffusers(model, **args)) <= 1e-5
    stated = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert (stated["r"], stated["lora_alpha"]) == (2, 4)
    assert stated["target_modules"] == sorted(stated["target_modules"])


def test_the_merged_model_opens_in_diffusers(finished, world):
    args, ours = outputs(finished, world)
    model = PixArtAlphaPipeline.from_pretrained(finished / "model").transformer.eval()
    assert relative_error(ours, run_diffusers(model, **args)) <= 1e-5
    base = PixArtTransformer2DModel.from_pretrained(world / "base" / "transformer").eval()
    assert relative_error(ours, run_diffusers(base, **args)) > 1e-3


def check_cut_off(config: Config, finished: Path, workdir: Path, patch) -> None:
    """A run that is cut off at two of its steps ends with the bits of the uninterrupted one."""
    assert tiny_run.train_cut_off(config, workdir, patch, 3, 8) == 3
    assert figures(workdir) == figures(finished)
    jax.tree.map(np.testing.assert_array_equal, final_state(finished), final_state(workdir))


def check_kills(config: Config, finished: Path, workdir: Path) -> None:
    """The same of a program that the system kills."""
    recipe = workdir.with_suffix(".py")
    held = repr(pickle.dumps(config))
    recipe.write_text(f"import pickle\n\ndef get_config():\n    return pickle.loads({held})\n")
    script = Path(tiny_run.__file__).with_name("train_until_killed.py")
    for kill in (5, 2, 0):
        command = [sys.executable, script, str(kill), recipe, "--workdir", workdir]
        environment = {**os.environ, "XLA_FLAGS": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == (-9 if kill else 0), done.stderr[-2000:]
    assert figures(workdir) == figures(finished)
    jax.tree.map(np.testing.assert_array_equal, final_state(finished), final_state(workdir))


def test_a_run_cut_off_at_two_of_its_steps_resumes_to_the_same_bits(
    finished, world, tmp_path, monkeypatch
):
    check_cut_off(a_run(world, MERGED), finished, tmp_path / "run", monkeypatch)
    for file in (finished / "adapter").iterdir():
        assert (tmp_path / "run/adapter" / file.name).read_bytes() == file.read_bytes(), file.name


def test_all_options_at_once_over_int8_kernels(world, tmp_path):
    lora = LoraConfig(
        2, 8, dropout=0.2, rslora=True, dora=True, init="kaiming", quantization="int8", merged=True
    )
    evaluate = EvaluateConfig(every=7, count=16, source=str(world / "square"), split="train")
    optimizer = dataclasses.replace(tiny_run.curriculum(world).stages[2].optimizer, clip=1.0)
    config = a_run(world, lora, evaluate=evaluate, optimizer=optimizer)
    train.train(dataclasses.replace(config, compute_dtype="bfloat16"), tmp_path / "run")
    assert set(final_state(tmp_path / "run")["params"][LORA]["final"]) == {"a", "b", "magnitude"}
    assert "evaluate/loss" in {key for line in figures(tmp_path / "run") for key in line}
    merged = flatten(load_component(tmp_path / "run" / "model" / "transformer").params)
    base = flatten(load_component(world / "base" / "transformer").params)
    # the model was merged into the folder's own kernels, not into their int8 form
    for path in ("blocks/attn/q/kernel", "patch_embedder/kernel"):
        assert relative_error(merged[path], base[path]) < 0.2, path
        assert np.abs(np.asarray(merged[path]) - np.asarray(base[path])).max() > 0


def check_two_devices(module: str, world: Path, *more: str, limit: float = 1e-5) -> None:
    """Four steps of a test module's a_run(world, *more) on two devices give what one gives."""
    program = Path(__file__).parents[1] / "adapter_on_two_devices.py"
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, str(program), module, str(world), *more]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    np.testing.assert_allclose(result["losses"][1], result["losses"][0], rtol=limit)
    assert result["difference"] <= 1e-4
    # the base is split over fsdp
    assert result["base"][1] < 0.6 * result["base"][0]


def test_two_devices_compute_what_one_does(world):
    check_two_devices("test_lora", world)


def error_of(config: Config, tmp_path: Path) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        assert cli.run(lambda _: train.train(config, tmp_path / "run"), []) == 2
    (line,) = [line for line in printed.getvalue().splitlines() if line.startswith("error: ")]
    return line


def test_mistakes_are_one_line(world, tmp_path):
    for number, (changes, message) in enumerate(
        (
            (
                {"lora": LoraConfig(targets=("to_q", "to_qq"))},
                "'to_qq' is the end of no layer's name",
            ),
            ({"start": str(tmp_path / "no")}, "no"),
            (
                {"objective": ObjectiveConfig()},
                "holds no null caption to train dropped captions with",
            ),
        )
    ):
        assert message in error_of(a_run(world, **changes), tmp_path / str(number)), message
    assert not (tmp_path / "0" / "run" / "config.json").exists()
    wider = dataclasses.replace(a_run(world), model=dataclasses.replace(tiny_run.MODEL, depth=3))
    assert "is another model: depth is 2 there and 3 in the config; width is 24" in error_of(
        wider, tmp_path
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(rank=0), "LoraConfig.rank = 0: must be at least 1"),
        (lambda: LoraConfig(alpha=0), "LoraConfig.alpha = 0: must be positive"),
        (lambda: LoraConfig(dropout=1.0), r"LoraConfig.dropout = 1.0: must lie in \[0, 1\)"),
        (lambda: LoraConfig(init="gausian"), "LoraConfig.init = 'gausian': unknown"),
        (lambda: LoraConfig(quantization="int4"), "LoraConfig.quantization = 'int4': unknown"),
        (lambda: LoraConfig(targets=()), "name at least one layer"),
        (
            lambda: dataclasses.replace(tiny_run_stage(), lora=LoraConfig()),
            "StageConfig.start = 'previous': lora needs the folder or hub id",
        ),
        (
            lambda: dataclasses.replace(
                tiny_run_stage(), task="autoencoder", start="x", lora=LoraConfig()
            ),
            "StageConfig.task = 'autoencoder': lora adapts a text_to_image model",
        ),
        (
            lambda: Config(
                "c",
                (
                    dataclasses.replace(tiny_run_stage(), start="x", lora=LoraConfig()),
                    dataclasses.replace(tiny_run_stage(), name="next"),
                ),
            ),
            r"stage next: start 'previous' is an adapter \(stage words\): name the folder",
        ),
    ],
)
def test_a_wrong_config_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def tiny_run_stage():
    return StageConfig("words")
