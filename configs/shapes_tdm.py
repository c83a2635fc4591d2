"""A student of the shipped model that samples in 4 steps without guidance: trajectory distribution
matching, from texts alone, at guidance 2. assets/shapes-4step is its result: five minutes on two
quiet cores.

    python train.py configs/shapes_tdm.py --workdir runs/shapes_tdm
    python sample.py --model runs/shapes_tdm/model --prompt "a large red star"
"""

from __future__ import annotations

from configs import shapes_lcm
from pixart_jax.config import Config, TdmConfig


def get_config(steps: int = 500) -> Config:
    options = TdmConfig(guidance=2.0)
    optimizer = shapes_lcm.optimizer(1e-4, b1=0.0, b2=0.95, ema=0.95)
    return shapes_lcm.student("tdm", steps, tdm=options, optimizer=optimizer)
