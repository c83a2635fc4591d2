"""A student of the shipped model that samples in one step: distribution matching, as PixArt ships
it (t = 400, plain diffusion up to 950), without LPIPS, at guidance 2.

    python train.py configs/shapes_dmd.py --workdir runs/shapes_dmd
"""

from __future__ import annotations

import dataclasses

from configs import shapes_lcm
from pixart_jax.config import Config, TdmConfig


def get_config(steps: int = 1_000) -> Config:
    options = TdmConfig(
        steps=1,
        guidance=2.0,
        distance="l2",
        first_time=1,
        last_time=950,
        from_x0=True,
        fake_snr_gamma=None,
        fake_rate=1.0,
    )
    optimizer = shapes_lcm.optimizer(1e-4, b2=0.99, ema=0.95)
    config = shapes_lcm.student("tdm", steps, tdm=options, optimizer=optimizer)
    return dataclasses.replace(config, name="shapes_dmd")
