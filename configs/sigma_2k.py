"""The 2048 px stage of PixArt-Σ, from its 1024 px model, without compression as the released one.

Released: 8 A100, 200K images, 4,000 steps, less than an epoch; its authors call it under-trained
(PixArt-sigma, issue 77). Batch 4 a device, lr 2e-5, warm-up 100, scale 4 of the positions and no
compression are the official config's (img2K_internalms_kvcompress, 1ce521a; a comment there says
48). 32 devices are from memory of the paper; a reader's notes of it say 16 A100.
Expected: the 1024 px model's pictures with four times the pixels and some grain. With --model and
--stages.0.model of 4096 px and compression 2 it is the paper's 4K stage, whose weights were never
released.

Data: encoded shards in the buckets of the 2048 table.
"""

from __future__ import annotations

from configs import sigma
from pixart_jax.config import Config


def get_config() -> Config:
    stage = sigma.stage("2048", 2048, 4_000, 4 * 32, warmup=100, start="runs/sigma_1024/model")
    return sigma.run("sigma_2k", stage)
