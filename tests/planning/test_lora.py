"""The plan of a LoRA, ControlNet or distillation stage: the base counts once, in its own dtype, and
has no gradient; every state and evaluation of a distillation counts."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from planning import small_run

from pixart_jax.config import LoraConfig, MeshConfig
from pixart_jax.models.controlnet import config_of
from pixart_jax.models.flops import forward_flops
from pixart_jax.parallel.rules import unboxed
from pixart_jax.planning import plan, programs, topology
from pixart_jax.planning.matmul_cost import matmul_cost
from pixart_jax.planning.target import PlanTarget
from pixart_jax.weights.component import ControlNet, Transformer
from pixart_jax.weights.table import flatten


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_frozen_base_counts_once_and_takes_no_gradient(quantization):
    config = small_run.get_config(4, compute_dtype="bfloat16", mesh=MeshConfig())
    lora = LoraConfig(rank=4, quantization=quantization)
    stage = dataclasses.replace(config.stages[0], lora=lora, start="models/none")
    config = dataclasses.replace(config, stages=(stage,), remat="none")
    target = PlanTarget(topology.parse("cpu:1"), config, 0, (1, 1, 1, 1), small_run.BUCKET)
    made = programs.program(target)
    shapes = flatten(unboxed(Transformer.param_shapes(config.model)))
    kernels = sum(leaf.size for path, leaf in shapes.items() if path.endswith("kernel"))
    base, adapter = made.counted["frozen base"], made.counted["parameters"]
    narrow = 1 if quantization else 2
    assert narrow * kernels < base < 1.15 * narrow * kernels + 4 * 2e6
    assert adapter < 0.1 * base and made.counted["EMA"] == adapter
    assert 2 * adapter <= made.counted["optimizer"] < 2 * adapter + 1000
    image, _ = plan.model_flops(target)
    assert image == 2 * forward_flops(config.model, *small_run.BUCKET, 32)
    traced = matmul_cost(made.traced.jaxpr.jaxpr).flops
    # forward, backward without the weights' gradients, and the adapter's few products
    assert 0.9 < traced / (4 * image) < 1.2


def test_of_a_controlnet_the_copies_alone_have_an_optimizer():
    config = small_run.get_config(4, compute_dtype="bfloat16", mesh=MeshConfig())
    stage = config.stages[0]
    data = dataclasses.replace(stage.data, condition="canny")
    stage = dataclasses.replace(stage, task="controlnet", start="models/none", data=data)
    config = dataclasses.replace(config, stages=(stage,), remat="none")
    target = PlanTarget(topology.parse("cpu:1"), config, 0, (1, 1, 1, 1), small_run.BUCKET)
    made = programs.program(target)
    copies = config_of(config.model)
    shapes = unboxed(ControlNet.param_shapes(copies))
    control = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert made.counted["parameters"] == made.counted["EMA"] == control
    assert 2 * control <= made.counted["optimizer"] < 2 * control + 1000
    assert made.counted["frozen base"] > 0
    image, _ = plan.model_flops(target)
    traced = matmul_cost(made.traced.jaxpr.jaxpr).flops
    assert 0.9 < traced / (4 * image) < 1.1


@pytest.mark.parametrize(
    ("task", "lora", "states"),
    [("lcm", None, 1), ("tdm", None, 2), pytest.param("tdm", 4, 1, marks=pytest.mark.slow)],
)
def test_every_network_of_a_distillation_counts(task, lora, states):
    """lcm: student, its average as the target, teacher; tdm: student, fake score, teacher."""
    config = small_run.get_config(4, compute_dtype="bfloat16", mesh=MeshConfig())
    model = dataclasses.replace(config.model, depth=2, width=192)
    adapter = None if lora is None else LoraConfig(rank=lora)
    stage = dataclasses.replace(config.stages[0], task=task, lora=adapter, start="models/none")
    config = dataclasses.replace(config, stages=(stage,), model=model, remat="none")
    target = PlanTarget(topology.parse("cpu:1"), config, 0, (1, 1, 1, 1), small_run.BUCKET)
    made = programs.program(target)
    one = 4 * sum(leaf.size for leaf in jax.tree.leaves(unboxed(Transformer.param_shapes(model))))
    held = made.counted["parameters"]
    assert states * one <= held < (states + (lora is not None) * 0.1) * one + 1
    # of the student alone
    assert made.counted["EMA"] == held - (task == "tdm") * one
    # the null caption has no moments
    assert 1.99 * held < made.counted["optimizer"] < 2 * held + 1000
    assert one / 2 < made.counted["frozen base"] < 0.65 * one  # kernels in bfloat16
    image, _ = plan.model_flops(target)
    evaluations = {"lcm": 6, "tdm": 11}[task]
    if lora is None:
        assert image == evaluations * forward_flops(model, *small_run.BUCKET, 32)
        traced = matmul_cost(made.traced.jaxpr.jaxpr).flops
        assert 0.9 < traced / (4 * image) < 1.1
