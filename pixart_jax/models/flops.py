"""Model FLOPs of the diffusion models, the numerator of MFU, from their matrix products.

XLA's count takes the body of a loop over layers once and includes recomputation. A product
[m, k] · [k, n] is 2·m·n·k. Norms, activations and softmax, under 1 % of an XL/2 and no work for
matrix units, are not counted.
"""

from __future__ import annotations

from pixart_jax.models.configs import BackboneConfig, DiTConfig, TransformerConfig
from pixart_jax.models.embedders import SINUSOID_CHANNELS

PIXELS = 8  # image pixels a side of a latent pixel


def forward_flops(
    config: TransformerConfig | DiTConfig,
    height: int,
    width: int,
    text_tokens: int = 0,
    copies: int = 0,
) -> float:
    """One evaluation for one image of height × width px and text_tokens tokens, with padding (a DiT
    reads none). copies: blocks of a ControlNet.

    XL/2 with 120 tokens: 0.298e12 at 256 px, 1.236e12 at 512 px, 6.51e12 at 1024 px.
    """
    d, p = config.width, config.patch_size
    rows, columns = height // (PIXELS * p), width // (PIXELS * p)
    n = rows * columns
    blocks = config.depth * (8 * n * d * d + 4 * n * d * config.mlp_width) + _self_attention(
        config, rows, columns
    )
    ends = 2 * n * p * p * d * (config.in_channels + config.out_channels)
    vectors = _scalar(d)
    if isinstance(config, DiTConfig):
        vectors += 2 * d * 6 * d * config.depth + 2 * d * 2 * d
    else:
        blocks += config.depth * (4 * n * d * d + 4 * text_tokens * d * d + 4 * n * text_tokens * d)
        if copies:  # and the projections before and after them; the condition is embedded too
            blocks += blocks * copies // config.depth + 2 * n * d * d * (copies + 1)
            ends += 2 * n * p * p * d * config.in_channels
        ends += 2 * text_tokens * (config.caption_width * d + d * d)
        vectors += 2 * d * 6 * d + (3 * _scalar(d // 3) if config.size_conditions else 0)
    return float(blocks + ends + vectors)


def train_flops(
    config: TransformerConfig | DiTConfig,
    height: int,
    width: int,
    text_tokens: int = 0,
    *,
    frozen: bool = False,
    copies: int = 0,
    others: int = 0,
) -> float:
    """One image of a train step: the backward pass costs two forward passes, one where the weights
    are frozen, as below a LoRA or a ControlNet's ``copies``. others: evaluations beside those of
    what is trained. Recomputation is not counted."""
    base = forward_flops(config, height, width, text_tokens)
    control = forward_flops(config, height, width, text_tokens, copies) - base
    return ((2.0 if frozen else 3.0) + others) * base + 3.0 * control


def _self_attention(config: BackboneConfig, rows: int, columns: int) -> int:
    """Scores and weighted values of all layers; compressed layers (PixArt-Σ) have 1 / R² of the
    keys."""
    n, r = rows * columns, getattr(config, "kv_compression", 1)
    fewer = len(getattr(config, "kv_compression_layers", ())) if r > 1 else 0
    keys = (config.depth - fewer) * n + fewer * (rows // r) * (columns // r)
    return 4 * n * keys * config.width


def _scalar(width: int) -> int:
    """The embedder of one scalar: two dense layers."""
    return 2 * (SINUSOID_CHANNELS * width + width * width)
