"""What a stage starts from: nothing, the stage before, or a folder."""

from __future__ import annotations

import jax

from pixart_jax.config import Config
from pixart_jax.errors import UserError


def first_params(config: Config, stage, previous, key: jax.Array):
    """Parameters (plain tree) of the stage's first step, or None for fresh ones.

    stage: what stages.Run prepared. previous: (its Stage, its averaged parameters) of the stage before, or None. A stage that
    follows takes the EMA of the one before, the weights that its samples were drawn with.
    """
    start = config.stages[stage.index].start
    if start == "fresh" or (start == "previous" and stage.index == 0):
        return None
    if start == "previous":
        before, params = previous
        task, task_before = config.stages[stage.index].task, config.stages[before.index].task
        if task == task_before:
            return params
        raise UserError(f"stage {config.stages[stage.index].name}: task {task} cannot start from a stage of task {task_before}")
    raise UserError(f"start {start!r}: not there yet")
