"""Many processes, one list of prompts: which images each of them draws.

No process speaks with another: the list alone says whose an image is, and the folder that they
share says what is there. So a process that dies holds up nobody, and the same command, or one with
another number of processes, draws what it left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

from pixart_jax.errors import UserError
from pixart_jax.parallel import processes

CLUSTER = "cluster"


@dataclasses.dataclass(frozen=True)
class PromptShard:
    """index: of this process, from 0. count: of all processes."""

    index: int = 0
    count: int = 1

    def of(self, groups: Sequence[Hashable]) -> list[int]:
        """Numbers of the images that are this share's; groups: of each image what its compiled
        shapes depend on (its size, say).

        Dealt out group by group, so that every process draws as many of each as any other, give or
        take one.
        """
        members: dict[Hashable, list[int]] = {}
        for n, group in enumerate(groups):
            members.setdefault(group, []).append(n)
        order = [n for group in members.values() for n in group]
        return sorted(order[self.index :: self.count])


def parse(text: str | None) -> PromptShard:
    """'K/N' → that share; 'cluster' → as JAX's multi-process runtime detects it (Cloud TPU, GKE,
    SLURM, Open MPI), which must not have been used yet; None → the whole, or this process's share
    where a launcher says so (``python -m pixart_jax launch``) or the runtime was already
    started."""
    import jax

    if text is None:
        if jax.distributed.is_initialized():
            return PromptShard(jax.process_index(), jax.process_count())
        told, _ = processes.pop_distributed_flags([])
        return PromptShard(told.process_index, told.processes) if told.processes else PromptShard()
    if text == CLUSTER:
        return _detected()
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = -1, 0
    if not 0 <= index < count:
        raise UserError(
            f"--share {text!r}: K/N is needed, the share's number from 0 and how many there are "
            "(0/4 … 3/4), or 'cluster'"
        )
    return PromptShard(index, count)


def _detected() -> PromptShard:
    """This process's place in the cluster. The runtime is left again at once: under it the death of
    one process would end all, and the first to be done would wait for the last."""
    import jax
    from jax._src import distributed  # process_index() would open the devices of the whole cluster

    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as fault:
        line = (str(fault).splitlines() or [""])[0]
        raise UserError(
            f"--share cluster: JAX finds no cluster to join ({line}); --share K/N says the share "
            "outright"
        ) from None
    share = PromptShard(distributed.global_state.process_id, distributed.global_state.num_processes)
    jax.distributed.shutdown()
    return share
