"""The projections that share an input, q, k and v of self-attention and k and v of the text, as one
product or as several: which is faster.

    python benchmarks/fused_projections.py                                  XL/2 at 256 px in fp32:
    forward, sampling, train step
    python benchmarks/fused_projections.py --work train --depth 8           one kind of work, of a
    model of fewer blocks PYTHONPATH=.venv/compilers python benchmarks/fused_projections.py
    --compile-for h200:1 --work train --batch 32 --dtype bfloat16
    python benchmarks/fused_projections.py --model tiny --px 32 --repeat 2  to see it work

The model is ours with its parameters as they are; a way computes the projections inside its blocks
instead of their own layers. All ways of one work live in this process and run by turns, every
second round backwards. *ratio*: the median, over the rounds, of a way's seconds over those of three
products in the same round; below 1 the way is faster. *processor*: likewise of the processor's
seconds, which other programs on the machine disturb less. *error*: relative, of the output.
Sampling has guidance, so its batch is doubled; its seconds are those of a step. A train step goes
on from the state that the last one left. Exit status 1 where outputs differ by more than 1e-5 in
fp32.

--compile-for compiles the train step or the sampler for hardware that is not here, over --mesh, and
tells what the compiler made: how many products run, the cycles that a TPU's compiler estimates for
all but collectives, copies of 1 MiB and more, temporaries.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.speed import inputs, ours  # noqa: E402
from benchmarks.speed.cases import LATENT, MODELS, Case, numbers, sizes  # noqa: E402
from benchmarks.speed.command import tell  # noqa: E402
from benchmarks.speed.record import Record  # noqa: E402
from benchmarks.speed.table import render  # noqa: E402
from pixart_jax import cli  # noqa: E402
from pixart_jax.config import MeshConfig  # noqa: E402
from pixart_jax.errors import UserError  # noqa: E402
from pixart_jax.models import remat  # noqa: E402
from pixart_jax.models.layers import CrossAttention, Dense, SelfAttention  # noqa: E402
from pixart_jax.parallel import rules  # noqa: E402
from pixart_jax.parallel.mesh import make_mesh  # noqa: E402
from pixart_jax.pipeline import Pipeline, SchedulerConfig  # noqa: E402
from pixart_jax.planning import hlo, topology  # noqa: E402
from pixart_jax.training import abstract  # noqa: E402
from pixart_jax.training.batches import put  # noqa: E402
from pixart_jax.training.state import state_from  # noqa: E402
from pixart_jax.weights.component import VAE, Transformer  # noqa: E402

# a block's layer → its projections of one input
SHARED = {"attn": ("q", "k", "v"), "cross_attn": ("k", "v")}
BOUND = 1e-5  # relative, of an output in fp32


@dataclasses.dataclass(frozen=True)
class Way:
    """layers: of SHARED, whose projections are one product. stacked: kernels as [d, 3, d], else
    side by side as [d, 3·d]. ahead: made so before the loop over the blocks (and over the steps),
    else in each block."""

    name: str
    layers: tuple[str, ...] = ()
    stacked: bool = False
    ahead: bool = False


WAYS = (
    Way("three products"),
    Way("q, k, v side by side, in the block", ("attn",)),
    Way("q, k, v side by side, ahead", ("attn",), ahead=True),
    Way("q, k, v stacked, ahead", ("attn",), stacked=True, ahead=True),
    Way("the text's k, v side by side, ahead", ("cross_attn",), ahead=True),
    Way("both side by side, ahead", ("attn", "cross_attn"), ahead=True),
)


def joined(layer: Mapping, names: tuple[str, ...], stacked: bool) -> dict[str, jax.Array]:
    """The kernel [d, 3·d] and bias [3·d] of all, or [d, 3, d] and [3, d]; with leading axes or
    without."""
    parts = {part: [layer[name][part] for name in names] for part in ("kernel", "bias")}
    return {
        part: jnp.stack(a, -2) if stacked else jnp.concatenate(a, -1) for part, a in parts.items()
    }


def prepared(way: Way, params: Mapping) -> Mapping:
    """The parameters as the way's program reads them, to be traced; gradients come back through
    it."""
    if not way.ahead:
        return params
    blocks = dict(params["blocks"])
    for name in way.layers:
        one = {key: value for key, value in blocks[name].items() if key not in SHARED[name]}
        blocks[name] = one | {"joined": joined(blocks[name], SHARED[name], way.stacked)}
    return {**params, "blocks": blocks}


def computing(way: Way):
    """A context in which the model is traced the way's way: its first projection makes all, the
    next ones take theirs."""
    waiting: dict[str, dict[str, jax.Array]] = {}

    def intercept(call, arguments, keywords, context):
        module = context.module
        layer = module.parent
        if not (
            isinstance(module, Dense)
            and isinstance(layer, SelfAttention | CrossAttention)
            and layer.name in way.layers
        ):
            return call(*arguments, **keywords)
        names = SHARED[layer.name]
        if module.name not in names or module.is_initializing():
            return call(*arguments, **keywords)
        if module.name == names[0]:
            held = layer.variables["params"]
            held = held["joined"] if way.ahead else joined(held, names, way.stacked)
            x, kernel, bias = (
                jnp.asarray(a, module.dtype) for a in (arguments[0], held["kernel"], held["bias"])
            )
            made = jnp.tensordot(x, kernel, 1) + bias
            parts = jnp.moveaxis(made, -2, 0) if way.stacked else jnp.split(made, len(names), -1)
            waiting[layer.name] = dict(zip(names, parts, strict=True))
        return waiting[layer.name].pop(module.name)

    return nn.intercept_methods(intercept)


@dataclasses.dataclass(frozen=True)
class Cut(Case):
    """A case of a model that has fewer blocks. depth: 0: all."""

    depth: int = 0

    @property
    def config(self):
        found = super().config
        return dataclasses.replace(found, depth=self.depth) if self.depth else found


# ---- the works, each a call without arguments that waits for its result ----


def random_params(case: Case, mesh) -> dict:
    return ours._random(Transformer.abstract(case.config, case.dtype, mesh)).params


def forward(case: Case, ways: tuple[Way, ...]) -> dict[str, Callable[[], np.ndarray]]:
    arrays, params = (
        inputs.make(case),
        random_params(case, make_mesh(MeshConfig(), jax.devices()[:1])),
    )
    module = Transformer(case.config, params, case.dtype).module
    names = ("noise", "timesteps", "text_states", "text_lengths", "size", "aspect_ratio")
    given = [jax.device_put(arrays[name]) for name in names]
    # as weights/component.py runs it
    narrow = case.dtype == "bfloat16" and jax.default_backend() == "cpu"
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if narrow else None

    def of(way):
        def evaluate(params, *given):
            with computing(way):
                return module.apply({"params": prepared(way, params)}, *given)

        jitted = jax.jit(evaluate, compiler_options=options)
        return lambda: np.asarray(jitted(params, *given))

    return {way.name: of(way) for way in ways}


def drawing_of(case: Case, way: Way, mesh) -> jax.stages.Traced:
    """The sampler of Pipeline.denoise on the mesh, traced the way's way from shapes alone."""
    whole = Transformer.abstract(case.config, case.dtype, mesh)
    bare = Pipeline(
        whole.replace(mesh=None), None, VAE(ours.VAEConfig(), {}), None, SchedulerConfig()
    )
    split = rules.row_sharding(mesh, case.batch)

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((case.batch, *sizes), dtype, sharding=split)

    states, lengths = shape(case.text_tokens, case.config.caption_width), shape(dtype=jnp.int32)
    noise = shape(*[case.px // LATENT] * 2, case.config.in_channels)
    arguments = (whole.params, states, lengths, noise, states, lengths)

    def draw(params, *given):
        pipeline = bare.replace(transformer=whole.replace(mesh=None, params=prepared(way, params)))
        return pipeline.denoise(*given, steps=case.steps, guidance=case.guidance, times="integer")

    jax.clear_caches()  # the pipeline's own jit would give what another way has traced
    with computing(way), jax.set_mesh(mesh), nn.logical_axis_rules(rules.RULES):
        return jax.jit(
            draw,
            in_shardings=jax.tree.map(lambda leaf: leaf.sharding, arguments),
            out_shardings=split,
        ).trace(*arguments)


def sample(case: Case, ways: tuple[Way, ...]) -> dict[str, Callable[[], np.ndarray]]:
    arrays, mesh = inputs.make(case), make_mesh(MeshConfig(), jax.devices()[:1])
    compiled = {way.name: drawing_of(case, way, mesh).lower().compile() for way in ways}
    params = jax.device_put(random_params(case, mesh), rules.replicated(mesh))
    names = ("text_states", "text_lengths", "noise", "negative_states", "negative_lengths")
    given = [jax.device_put(arrays[name], rules.row_sharding(mesh, case.batch)) for name in names]
    return {
        name: lambda made=made: np.asarray(made(params, *given)) for name, made in compiled.items()
    }


def step_of(case: Case, policy: str, way: Way, mesh):
    """(the stage's parts, its step on the mesh traced the way's way)."""
    config, stage = ours.config_of(case, policy)
    made = abstract.build_stage(config, stage, abstract.FrozenSpec(config), mesh)

    def losses(params, batch, keys):
        with computing(way):
            return made.task.losses(prepared(way, params), batch, keys)

    one = dataclasses.replace(made, task=SimpleNamespace(losses=losses))
    batch = abstract.abstract_batch(config, stage, (case.px, case.px), mesh)
    return made, abstract.compiled_step(config, stage, one, mesh).trace(
        made.abstract, batch, abstract.abstract_key(mesh)
    )


def train(case: Case, ways: tuple[Way, ...], policy: str) -> dict[str, Callable[[], None]]:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    steps = {way.name: step_of(case, policy, way, mesh) for way in ways}
    made = next(iter(steps.values()))[0]
    compiled = {name: traced.lower().compile() for name, (_, traced) in steps.items()}
    arrays = inputs.make(case)
    leaves, tree = jax.tree.flatten(made.abstract.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = jax.tree.unflatten(
        tree,
        [0.02 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)],
    )
    state = {"now": state_from(params, made.optimizer, made.abstract)}
    del params
    names = ("mean", "std", "text_states", "text_lengths", "size", "aspect_ratio")
    batch = {name: arrays[name] for name in names} | {"label": np.zeros((case.batch,), np.int32)}
    batch = put(
        {**batch, "text_states": batch["text_states"].astype(jnp.bfloat16)},
        rules.batch_sharding(mesh),
    )
    key = jax.device_put(jax.random.key(inputs.STEP_KEY), rules.replicated(mesh))

    def of(name):
        def run():
            state["now"], metrics = compiled[name](state["now"], batch, key)
            jax.block_until_ready(metrics)

        return run

    return {name: of(name) for name in compiled}


def timed(calls: Mapping[str, Callable], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, the processor's seconds) of each, by turns; every second round backwards."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for n in range(rounds):
        for name in list(calls)[:: 1 if n % 2 == 0 else -1]:
            begun = time.perf_counter(), time.process_time()
            calls[name]()
            found[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    return found


# ---- what a compiler makes of them ----

COMPILED = (
    "hardware",
    "mesh",
    "work",
    "px",
    "batch",
    "projections",
    "products",
    "cycles, millions",
    "copies GiB",
    "temporaries GiB",
    "seconds",
)
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


def compiled(case: Case, way: Way, policy: str, where: topology.Topology, axes: str) -> list[str]:
    """Cells of COMPILED, in a process with planning.topology.environment."""
    mesh = make_mesh(MeshConfig.parse(axes), topology.devices(where))
    traced = (
        step_of(case, policy, way, mesh)[1] if case.kind == "train" else drawing_of(case, way, mesh)
    )
    begun = time.perf_counter()
    made = traced.lower().compile()
    seconds, products, cycles, copied = time.perf_counter() - begun, 0.0, 0.0, 0.0
    for run in hlo.executed(made.as_text()):
        for i in run.instructions:
            target = i.rest.partition('custom_call_target="')[2].partition('"')[0]
            products += run.times * (
                i.opcode in ("dot", "convolution") or "matmul" in target or "gemm" in target
            )
            cycles += run.times * int(found[1] if (found := _CYCLES.search(i.rest)) else 0)
            copied += run.times * (
                sum(i.arrays)
                if i.opcode in ("copy", "transpose") and sum(i.arrays) >= 1 << 20
                else 0
            )
    temporaries = made.memory_analysis().temp_size_in_bytes
    return [
        where.name,
        axes,
        case.kind,
        str(case.px),
        str(case.batch),
        way.name,
        f"{products:.0f}",
        f"{cycles / 1e6:.1f}" if cycles else "",
        f"{copied / 2**30:.2f}",
        f"{temporaries / 2**30:.2f}",
        f"{seconds:.0f}",
    ]


# ---- figures ----

COLUMNS = (
    "work",
    "model",
    "blocks",
    "px",
    "batch",
    "dtype",
    "projections",
    "median s",
    "best s",
    "ratio",
    "of the best",
    "processor",
    "error",
)


def rows(case: Case, calls: Mapping[str, Callable], rounds: int) -> tuple[list[list[str]], float]:
    """(cells of each way, the largest error)."""
    first = {name: call() for name, call in calls.items()}
    found = timed(calls, rounds)
    whole = next(iter(found))
    turns = case.steps if case.kind == "sample" else 1
    made, worst = [], 0.0
    for name, both in found.items():
        ours, theirs = np.array(both), np.array(found[whole])
        error = (
            None
            if first[name] is None
            else float(np.linalg.norm(first[name] - first[whole]) / np.linalg.norm(first[whole]))
        )
        worst = max(worst, error or 0.0)
        ratios = [
            np.median(ours[:, 0] / theirs[:, 0]),
            ours[:, 0].min() / theirs[:, 0].min(),
            np.median(ours[:, 1] / theirs[:, 1]),
        ]
        made.append(
            [
                case.kind,
                case.model,
                str(case.config.depth),
                str(case.px),
                str(case.batch),
                case.dtype,
                name,
                f"{np.median(ours[:, 0]) / turns:.4g}",
                f"{ours[:, 0].min() / turns:.4g}",
                *("" if name == whole else f"{ratio:.3f}" for ratio in ratios),
                "" if error is None or name == whole else f"{error:.1e}",
            ]
        )
    return made, worst


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", default="forward,sample,train", metavar="NAMES", help="of forward, sample, train")
    add("--model", choices=MODELS, default="XL/2")
    add("--depth", type=int, default=0, help="the first so many blocks alone")
    add("--px", type=sizes, default=sizes("256"), metavar="SIZES")
    add("--batch", type=numbers, default=[1], metavar="NUMBERS")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--remat", choices=remat.NAMES, default="dots_attention", help="of train steps")
    add(
        "--ways",
        type=numbers,
        metavar="NUMBERS",
        help=f"all, or some: {'; '.join(f'{n} {w.name}' for n, w in enumerate(WAYS, 1))}",
    )
    add("--repeat", type=int, default=7, help="rounds (7)")
    add("--steps", type=int, default=4, help="of sampling (4)")
    add("--json", type=Path, metavar="FILE", help="append the run to this file")
    add(
        "--compile-for",
        type=topology.parse,
        metavar="TOPOLOGY",
        help="as h200:1 or v5e:4x4; nothing is run",
    )
    add("--mesh", default="fsdp=1,data=1", help="of --compile-for, as fsdp=16,data=1")
    add("--here", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.compile_for and not flags.here:  # the compiler's settings are those of a process
        topology.require_compiler(flags.compile_for)
        return subprocess.run(
            [sys.executable, __file__, *argv, "--here"], env=topology.environment(flags.compile_for)
        ).returncode
    ways = tuple(
        way for n, way in enumerate(WAYS, 1) if n == 1 or not flags.ways or n in flags.ways
    )
    works = {"forward": forward, "sample": sample, "train": partial(train, policy=flags.remat)}
    asked = flags.work.split(",")
    if unknown := set(asked) - set(works):
        raise UserError(
            f"--work {flags.work}: {sorted(unknown)[0]!r} is none of {', '.join(works)}"
        )
    title = "Projections that share an input"
    columns = COMPILED if flags.compile_for else COLUMNS
    record = Record(
        flags.json,
        " ".join(["python fused_projections.py", *argv]),
        columns=list(columns),
        title=title,
        cells=[],
    )
    record.run["machine"] |= {} if flags.compile_for else ours.described()
    faults = 0
    for kind in asked:
        for batch in flags.batch:
            for px, told in flags.px:
                case = Cut(
                    kind,
                    flags.model,
                    px,
                    batch,
                    flags.dtype,
                    told,
                    steps=flags.steps,
                    depth=flags.depth,
                )
                tell(str(case))
                if flags.compile_for:
                    made = [
                        compiled(case, way, flags.remat, flags.compile_for, flags.mesh)
                        for way in ways
                    ]
                else:
                    made, worst = rows(case, works[kind](case, ways), flags.repeat)
                    faults += flags.dtype == "float32" and not worst <= BOUND
                    jax.clear_caches()
                record.run["cells"] += made
                record.write()
    print(render(columns, record.run["cells"], title))
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(cli.run(main))
