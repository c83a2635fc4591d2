"""Train a recipe's stages: python train.py configs/NAME.py --workdir DIR [--FIELD VALUE …].

The run itself is pixart_jax/commands/train.py.
"""

import sys

from pixart_jax import cli
from pixart_jax.commands.train import main
from pixart_jax.parallel.processes import run_with_peers

if __name__ == "__main__":
    sys.exit(run_with_peers(lambda: cli.run(main)))
