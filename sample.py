"""Prompts → PNGs: ``python sample.py --prompt TEXT`` (pixart_jax/commands/sample.py)."""

import sys

from pixart_jax import cli
from pixart_jax.commands.sample import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
