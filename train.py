"""Train a recipe's stages: python train.py configs/NAME.py --workdir DIR [--FIELD VALUE …].

The run itself is pixart_jax/commands/train.py.
"""

import sys

from pixart_jax import cli
from pixart_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
