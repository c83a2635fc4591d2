"""Train a recipe's stages: python train.py configs/NAME.py --workdir DIR
[--stages.1.optimizer.learning-rate 1e-4 …].

The same command with the same workdir goes on where a stopped run was. --help after a recipe's name
lists every option. Several processes (Cloud TPU, GKE, SLURM, or started by hand) run the same
command each: docs/pods.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pixart_jax import cli
from pixart_jax.training import huge_pages


def main(argv: list[str]) -> int:
    from pixart_jax.parallel import processes
    from pixart_jax.parallel.mesh import make_mesh
    from pixart_jax.training import recipes

    joined, argv = processes.pop_distributed_flags(argv)
    recipe, workdir, overrides = recipes.split(argv)
    config = recipes.parse_config(recipe, overrides)
    processes.initialize(joined)
    processes.assert_same_config(repr(config), workdir)
    processes.warm_up_collectives(make_mesh(config.mesh))

    from pixart_jax.training import loop, stages  # heavy: only for a command line that holds

    try:
        stages.run(config, workdir, encode)
    except loop.TrainingDiverged as fault:
        print(
            f"error: {fault}; the last save holds, lower the learning rate or look at the data",
            file=sys.stderr,
        )
        return 1
    return 0


def encode(source, *, frozen, **options) -> Path:
    """The encoded shards of a source, made with the run's frozen parts where they are absent
    (training.batches.Encode)."""
    import jax

    from pixart_jax.config import MeshConfig
    from pixart_jax.encoding.encode import encode_dataset
    from pixart_jax.encoding.options import EncodeOptions
    from pixart_jax.parallel.mesh import make_mesh

    text = (
        {"text_encoder": frozen.text_encoder(), "tokenizer": frozen.tokenizer}
        if options["captions"]
        else {}
    )
    folders = {part: frozen.folder(part) for part in ("vae", *text)}
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    return encode_dataset(
        source,
        EncodeOptions(**options),
        vae=frozen.vae,
        **text,
        folders=folders,
        mesh=mesh if mesh.size > 1 else None,
    )


if __name__ == "__main__":
    huge_pages.start_again()
    from pixart_jax.parallel.processes import run_with_peers

    sys.exit(run_with_peers(lambda: cli.run(main)))
