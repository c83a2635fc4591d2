"""The rows of the parity table, a module a part of the model; each row's module imports PyTorch and
JAX only when the row runs."""

from __future__ import annotations

from benchmarks.parity_rows import (
    controlnet,
    dit,
    kv_compression,
    lora,
    official_solver,
    pipeline,
    text_encoder,
    transformer,
    vae,
)
from benchmarks.parity_rows.row import Row

ROWS: tuple[Row, ...] = (
    *transformer.ROWS,
    *kv_compression.ROWS,
    *lora.ROWS,
    *controlnet.ROWS,
    *dit.ROWS,
    *text_encoder.ROWS,
    *vae.ROWS,
    *pipeline.ROWS,
    *official_solver.ROWS,
)
