"""A program for tests: encode a set slowly into argv[1], so that it can be killed on the way."""

import sys

from pixart_jax.encoding.encode import encode_dataset
from pixart_jax.encoding.options import EncodeOptions
from tests.encoding import tiny_encoders as tiny

buckets = ((32, 32), (32, 64), (64, 32))
options = EncodeOptions(buckets, ("short", "dense"), 24, batch_size=4, shard_size=8)
delay = float(sys.argv[2])
encode_dataset(
    tiny.Noise(90, broken=(7, 50)),
    options,
    vae=tiny.vae(delay=delay),
    text_encoder=tiny.text_encoder(),
    tokenizer=tiny.words(),
    folder=sys.argv[1],
    progress=False,
)
