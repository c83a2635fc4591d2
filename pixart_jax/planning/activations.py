"""What a job's train step must hold besides its state: training/memory.py, of the job that is
planned."""

from __future__ import annotations

from pixart_jax.planning.jobs import PlanTarget
from pixart_jax.training import memory
from pixart_jax.training.memory import ANY_POLICY

__all__ = ["ANY_POLICY", "counted"]


def counted(job: PlanTarget, parameters: float) -> dict[str, float]:
    """Bytes a device by term. parameters: the bytes of its share of them, fp32. UserError for a
    policy that is not counted."""
    platform = {"cuda": "gpu"}.get(job.topology.platform, job.topology.platform)
    return memory.activation_bytes(
        job.config, job.stage_config, job.config.remat, job.axes, job.bucket, platform, parameters
    )
