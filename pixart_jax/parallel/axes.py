"""Logical names of array axes: models attach them to arrays, parallel.rules maps them to a mesh."""

from __future__ import annotations

# Parameters.
LAYERS = "layers"  # the stacked leading axis of scanned blocks
EMBED = "embed"  # width d as a layer's input, or as the output of a block's last projection
HEADS = "heads"  # fused heads · head_dim, the output of q, k and v
MLP = "mlp"  # the MLP's inner width
TEXT = "text"  # caption width (the text encoder's states)
MODULATION = "modulation"  # 6·d or 2·d of adaptive layer norm; replicated
CONV_IN = "conv_in"
CONV_OUT = "conv_out"
VOCAB = "vocab"
NORM = "norm"  # norm scales and other vectors; small

# Activations.
BATCH = "batch"
TOKENS = "tokens"  # of the image
TEXT_TOKENS = "text_tokens"  # of a caption: few, so never split
ACT_EMBED = "act_embed"
ACT_HEADS = "act_heads"  # attention heads
ACT_MLP = "act_mlp"  # the MLP's inner width

ACTIVATION = (BATCH, TOKENS, ACT_EMBED)  # [b, n, d], the residual stream
CONDITION = (BATCH, ACT_EMBED)  # [b, d], the same for every token of a sample
TEXT_ACTIVATION = (BATCH, TEXT_TOKENS, ACT_EMBED)  # [b, l, d], a text model's
OF_ACTIVATIONS = (BATCH, TOKENS, TEXT_TOKENS, ACT_EMBED, ACT_HEADS, ACT_MLP)
