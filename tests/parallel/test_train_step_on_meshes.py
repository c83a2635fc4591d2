"""The train step on meshes of 8 simulated devices: the numbers of one device, and a program that
moves parameters and not activations."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "train_step_on_meshes.py"
sys.path.insert(0, str(PROGRAM.parent))
from train_step_on_meshes import BATCH, TOKENS  # noqa: E402

pytestmark = pytest.mark.slow

# The code generator's passes come after all that is tested here, and are most of a compile's time.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

FSDP, TENSOR = "fsdp=8", "fsdp=4,tensor=2,remat=full"
CONTEXT, RING = (
    "data=2,context=2,tensor=2",
    "fsdp=2,context=4,context_attention=ring,remat=attention_out",
)
GATHERED, COMPRESSED = (
    "fsdp=2,context=4,remat=attention_out",
    "data=2,context=2,tensor=2,context_attention=ring,kv_compression=2",
)
TRANSFORMER = (FSDP, TENSOR, CONTEXT, RING, GATHERED, COMPRESSED)
DIT = (FSDP, "data=2,context=2,tensor=2,context_attention=ring")


def outcome(folder: Path, stage: int, meshes) -> tuple[dict, str]:
    """(what came of each mesh, all that was printed to stderr, XLA's own lines too). What is
    compiled is compiled here: a program out of the cache would warn of nothing.
    """
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    how = {"capture_output": True, "text": True, "timeout": 1800, "env": environment}
    done = subprocess.run([sys.executable, PROGRAM, folder, str(stage), *meshes], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def transformer(tmp_path_factory) -> tuple[dict, str]:
    return outcome(tmp_path_factory.mktemp("transformer"), 1, TRANSFORMER)


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> tuple[dict, str]:
    return outcome(tmp_path_factory.mktemp("dit"), 0, DIT)


@pytest.mark.parametrize(
    "model, mesh", [*(("transformer", m) for m in TRANSFORMER), *(("dit", m) for m in DIT)]
)
def test_loss_and_gradients_are_those_of_one_device(model, mesh, request):
    found = request.getfixturevalue(model)[0][mesh]
    assert found["loss"] < 1e-5
    assert found["gradient"][0] < 1e-5, found["gradient"]


def of_activations(shapes, parameters, batch: int, tokens: int = TOKENS) -> list:
    """Shapes that are no parameter's: a side is the batch's or the tokens', or so many elements
    belong to no parameter."""
    sizes = {math.prod(shape) for shape in parameters}
    return [
        shape for shape in shapes if {batch, tokens} & set(shape) or math.prod(shape) not in sizes
    ]


def test_an_fsdp_mesh_gathers_parameters_and_no_activations(transformer, dit):
    for found in (transformer[0][FSDP], dit[0][FSDP]):
        assert len(found["all-gather"]) > 10
        # the part of the null caption that a batch's longest text needs: a parameter, cut
        null = (8, 16)
        gathered = [tuple(shape) for shape in found["all-gather"] if tuple(shape) != null]
        assert not of_activations(gathered, found["parameters"], BATCH), gathered
        assert not found["collective-permute"]
        # the labels' vectors, where they are one
        assert max(math.prod(shape) for shape in [*found["all-to-all"], [1]]) <= BATCH * 32


def test_compiling_needs_no_involuntary_rematerialization(transformer, dit):
    """XLA says so on stderr where it finds no way from one sharding to the next but a whole copy on
    every device."""
    for _, printed in (transformer, dit):
        assert not [line for line in printed.splitlines() if "nvoluntary" in line]


def test_tensor_parallelism_sums_activations_and_gathers_no_kernel_over_tensor(transformer):
    """A block's kernels stay cut in two; what is summed is the stream: forward after each attention
    and after the MLP (3), these again under remat (at most 3), and backward at what the cut kernels
    read: q, k, v, cross-attention's q and fc1 (5, which XLA may join).
    """
    found = transformer[0][TENSOR]
    gathered = {tuple(shape) for shape in found["all-gather"]}
    # halves: fsdp's parts joined, tensor's not
    assert gathered >= {(256, 128), (128, 256), (256, 512), (512, 256)}
    assert not gathered & {(256, 1024), (1024, 256)}
    size = BATCH // 4 * TOKENS * 256
    assert 6 <= sum(math.prod(shape) == size for shape in found["all-reduce"]) <= 11
    assert not of_activations([s for s in gathered if len(s) > 2], found["parameters"], BATCH // 4)


def test_context_parallelism_gathers_keys_and_values_or_sends_them_round(transformer):
    def whole(found, share):  # results as large as all tokens of the stream, or of its heads
        return [s for s in found["all-gather"] if TOKENS in s and math.prod(s) >= share]

    stream = BATCH // 2 * TOKENS * 256
    gathered, ring = transformer[0][GATHERED], transformer[0][RING]
    # keys and values, forward and again in the backward pass
    assert len(whole(gathered, stream)) == 4
    assert len(gathered["reduce-scatter"]) == 2  # their gradients
    assert not whole(ring, stream)
    travelling = ring["collective-permute"].count([BATCH // 2, TOKENS // 4, 8, 32])
    # 3 turns forward, not again under this remat; 3 and the gradients' 4 backward
    assert travelling == 2 * 3 + 2 * 3 + 2 * 4
