"""What is read of a compiled program's collectives is what it was built to send."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pixart_jax.planning.collectives import Collective, collectives, replica_groups


@pytest.fixture(scope="module")
def found():
    program = Path(__file__).parent / "collectives_on_eight_devices.py"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    how = {"capture_output": True, "text": True, "timeout": 300, "env": os.environ | flags}
    done = subprocess.run([sys.executable, program], **how)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "program, kind, axes, group, count, size, moved",
    [
        ("gathered", "all-gather", ["fsdp"], 2, 1, 512, 256),
        ("summed_in_a_loop", "all-reduce", ["data", "fsdp"], 4, 5, 5 * 512, 2 * 5 * 512 * 3 / 4),
        ("nested", "collective-permute", ["tensor"], 2, 12, 12 * 256, 12 * 256),
        ("scattered", "reduce-scatter", ["data"], 2, 1, 512, 256),
        ("exchanged", "all-to-all", ["fsdp"], 2, 1, 256, 128),
    ],
)
def test_kind_axes_count_and_bytes(found, program, kind, axes, group, count, size, moved):
    (one,) = found[program]
    assert (one["kind"], one["axes"], one["group"]) == (kind, axes, group)
    assert (one["count"], one["bytes"], one["moved"]) == (count, size, moved)


def test_a_program_that_sends_nothing_has_none(found):
    assert found["alone"] == []


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups={}, to_apply=%add", [list(range(8))]),
        ("replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={1}", [list(range(8))]),
        (
            "replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={1}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        (
            "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        ("replica_groups=mesh['a'=8] {'a':(1)2}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(4)2}, x", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
)
def test_groups_in_every_form_that_xla_writes(text, groups):
    assert sorted(np.asarray(replica_groups(text, 8)).tolist()) == groups


# The shape of a TPU program: one gather as a chain of pieces, some of them in an inner loop, and a
# reduce-scatter as a fusion.
_TPU = """HloModule jit_step, is_scheduled=true

%piece.1 (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a'}, \
frontend_attributes={chain_id="3"}
}

%async_collective_fusion.1 (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a'}, \
frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.1 (p: f32[8,8]) -> f32[4,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %all-reduce.1 = f32[8,8]{1,0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[4,8]{1,0} slice(%all-reduce.1), slice={[0:4], [0:8]}
}

%inner_body (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %t = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %x = bf16[8,8]{1,0} fusion(%t), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %r = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%t, %x)
}

%cond (t: (s32[], bf16[4,8])) -> pred[] {
  %t = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[]{:T(512)} compare(%t, %n), direction=LT
}

%body (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %t = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %a = bf16[8,8]{1,0} fusion(%t), kind=kOutput, calls=%piece.1
  %g = f32[4,8]{1,0} fusion(%t), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %w = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%t), condition=%cond, body=%inner_body
}

ENTRY %main (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %t = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%t), condition=%cond, body=%body
}
"""  # noqa: E501


def test_the_pieces_of_an_asynchronous_chain_are_one_collective_of_the_outer_loop():
    gather, scatter = sorted(collectives(_TPU, ("data", "fsdp"), (2, 4)), key=lambda c: c.kind)
    gathered = Collective("all-gather", ("data",), 2, 6, 6 * 128, 6 * 64, True)
    scattered = Collective("reduce-scatter", ("fsdp",), 4, 6, 6 * 256, 6 * 256 * 3 / 4, False)
    assert (gather, scatter) == (gathered, scattered)
