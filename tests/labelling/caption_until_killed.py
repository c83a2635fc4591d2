"""Caption a folder with a slow captioner, in a process that a test kills: python -m
tests.labelling.caption_until_killed FOLDER FILE."""

import sys
from pathlib import Path

from pixart_jax.data.sources import open_source
from pixart_jax.labelling import caption_run
from pixart_jax.labelling.caption import CaptionOptions, Opening
from tests.labelling.written_captions import Slow

if __name__ == "__main__":
    folder, file = sys.argv[1:]
    source = open_source(f"folder:{folder}")
    opening = Opening(f"folder:{folder}", fingerprint=source.fingerprint)
    cluster = caption_run.Cluster(workers=1, batch_size=4, gpus_per_worker=0)
    caption_run.run(source, opening, Path(file), CaptionOptions("slow"), cluster, open_model=Slow)
