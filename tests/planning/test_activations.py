"""What a train step is counted to hold, by policy; tests/planning/test_programs_for_hardware.py
compares it with what compilers make."""

from __future__ import annotations

import pytest
from planning import program_for_hardware

from pixart_jax.errors import UserError
from pixart_jax.models import remat
from pixart_jax.training import memory

STATE = 2.4e9  # bytes of parameters; any number does


def counted(name: str, policy: str) -> dict[str, float]:
    what = ("xl2_512_aesthetic", "step", "1,1,1,1", "4", "512", policy)
    return program_for_hardware.counted(program_for_hardware.target_of(name, *what), STATE)


# A CPU has no flash kernel: what a policy keeps is the table in models/remat.py, in streams of the
# compute dtype, here bfloat16.
@pytest.mark.parametrize(
    "policy, streams",
    [("full", 1), ("attention_out", 3), ("dots", 12), ("dots_attention", 14), ("offload", 0)],
)
def test_what_a_policy_keeps_is_its_row_of_the_table(policy, streams):
    text = 2 * 4 * 120 * 1152 * 2 if policy.startswith("dots") else 0
    assert counted("cpu:1", policy)["kept"] == 28 * (streams * 4 * 1024 * 1152 * 2 + text)


@pytest.mark.parametrize("name", ["cpu:1", "h200:1", "v5e:1x1"])
def test_what_is_not_kept_is_there_whatever_the_policy(name):
    found = [counted(name, policy) for policy in remat.NAMES if policy != "none"]
    for term in (*memory.ANY_POLICY, "block"):
        assert len({one[term] for one in found}) == 1, term


def test_what_none_keeps_is_not_counted():
    with pytest.raises(
        UserError, match="remat 'none': activations are counted for full, attention_out, dots"
    ):
        counted("h200:1", "none")
