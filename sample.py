"""Prompts → PNGs: ``python sample.py --prompt TEXT`` (pixart_jax/commands/sample.py)."""

import sys

from pixart_jax.__main__ import run

if __name__ == "__main__":
    sys.exit(run("sample"))
