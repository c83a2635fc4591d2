"""What to encode and how: the options that the command, a training run and the shards share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from pixart_jax.data import buckets as bucket_tables
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import Source, open_source
from pixart_jax.errors import UserError

Bucket = tuple[int, int]  # (height, width) in px


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """'64x64,64x96' → ((64, 64), (64, 96)); '512' → the 40 buckets of base 512."""
    if text.isdigit() and int(text) in bucket_tables.TABLES:
        return tuple(bucket_tables.TABLES[int(text)].values())
    try:
        pairs = [part.lower().replace("×", "x").split("x") for part in text.split(",")]
        buckets = tuple((int(height), int(width)) for height, width in pairs)
    except ValueError:
        buckets = ()
    if not buckets or min(map(min, buckets)) < 1:
        raise UserError(
            f"--buckets {text!r}: HEIGHTxWIDTH with commas between, as 64x64,64x96, or one of "
            f"{', '.join(map(str, bucket_tables.BASES))}"
        )
    return buckets


def parse_names(text: str) -> tuple[str, ...]:
    """'short, dense' → ('short', 'dense'); 'none' and '' → ()."""
    names = (name.strip() for name in text.split(","))
    return () if text == "none" else tuple(name for name in names if name)


def flag(parse, show, metavar: str):
    """A tyro flag of one word: parse turns the word into the value, show the value into the word.
    Unlike tyro's own types it reports a bad word by the UserError that ``parse`` raises."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [show(value)],
    )


BucketsFlag = Annotated[
    tuple[Bucket, ...],
    flag(parse_buckets, lambda value: ",".join(f"{h}x{w}" for h, w in value), "HEIGHTxWIDTH,…"),
]
NamesFlag = Annotated[
    tuple[str, ...], flag(parse_names, lambda value: ",".join(value) or "none", "NAME,…")
]


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """Which samples: the flags of the commands that open a source."""

    source: str
    """The set: 'tfds:NAME', a folder of pictures, 'webdataset:FILE.tar' …, as training takes it
    (docs/data_sources.md)."""
    split: str = "train"
    """The set's split."""
    where: str | None = None
    """Only samples that pass this filter: a name ('single') or 'package.module:function'."""
    limit: int | None = None
    """Only the first so many samples."""
    data_dir: Path | None = None
    """Where a tensorflow-datasets set lies."""

    def open(self, faults: BadRecords | None = None) -> Source:
        """Open the source. faults: collects what is skipped."""
        chosen: dict[str, Any] = {
            name: getattr(self, name) for name in ("where", "limit", "data_dir")
        }
        return open_source(self.source, self.split, **chosen, faults=faults)


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """How a source is encoded."""

    buckets: BucketsFlag
    """HEIGHTxWIDTH in px, separated by commas; or 256, 512, 1024 or 2048 for that base's table."""
    captions: NamesFlag = ()
    """Kinds of caption to encode, separated by commas; 'none' encodes no text."""
    max_text_tokens: int = 120
    """Longer captions are cut."""
    batch_size: int = 32
    """Images that a device encodes at once."""
    shard_size: int = 1024
    """Records per shard, which is also the most that a kill can cost."""
    flip: bool = False
    """Also encode each image mirrored, as a second posterior of its record; training uses one or
    the other."""
    strict: bool = False
    """Stop at the first sample that cannot be encoded; otherwise it is named, counted and
    skipped."""
    condition: str | None = None
    """Also encode what a ControlNet is conditioned on, as a posterior of the record: hed or canny,
    the edges of the cropped image; folder:DIR, maps under the images' keys."""
    condition_weights: str | None = None
    """Of hed: ControlNetHED.pth, or a folder that convert made of it."""

    def __post_init__(self):
        for field in ("max_text_tokens", "batch_size", "shard_size"):
            if getattr(self, field) < 1:
                name = field.replace("_", " ")
                raise UserError(f"{name} {getattr(self, field)}: must be at least 1")

    def open_condition(self, mesh=None):
        """What makes the conditions (pipeline.conditions.Condition); None without them."""
        from pixart_jax.pipeline.conditions import open_condition  # not for a --help

        weights = self.condition_weights
        return None if self.condition is None else open_condition(self.condition, weights, mesh)
