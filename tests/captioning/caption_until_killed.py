"""Caption a folder with a slow captioner, in a process that a test kills: python -m
tests.captioning.caption_until_killed FOLDER FILE."""

import sys
from pathlib import Path

from pixart_jax.captioning import caption_run
from pixart_jax.captioning.caption import CaptionOptions, SourceSpec
from pixart_jax.data.sources import open_source
from tests.captioning.written_captions import Slow

if __name__ == "__main__":
    folder, file = sys.argv[1:]
    source = open_source(f"folder:{folder}")
    opening = SourceSpec(f"folder:{folder}", fingerprint=source.fingerprint)
    cluster = caption_run.Cluster(workers=1, batch_size=4, gpus_per_worker=0)
    caption_run.run(source, opening, Path(file), CaptionOptions("slow"), cluster, open_model=Slow)
