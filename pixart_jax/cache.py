"""Where what can be made again is kept: prepared sets, encoded shards, converted weights."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$PIXART_JAX_CACHE, else ~/.cache/pixart_jax."""
    given = os.environ.get("PIXART_JAX_CACHE")
    return (
        Path(given)
        if given
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pixart_jax"
    )
