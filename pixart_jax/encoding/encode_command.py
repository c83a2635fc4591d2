"""``python -m pixart_jax encode``: pictures and captions → shards that training reads.

With --prompts FILE: prompts → a file of text states that sample.py draws from (``encode --prompts
FILE --help`` lists its flags).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import jax
import tyro

import pixart_jax.encoding.prompt_states
from pixart_jax import cli
from pixart_jax.config import MeshConfig
from pixart_jax.data import buckets as bucket_tables
from pixart_jax.data import records
from pixart_jax.data.sources import open_source
from pixart_jax.encoding.encode import EncodeOptions, encode_dataset, identity
from pixart_jax.encoding.encode_check import check, reencode_and_compare, summary
from pixart_jax.encoding.shard_encoder import ShardEncoder
from pixart_jax.errors import UserError
from pixart_jax.parallel import processes
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.text import load_tokenizer

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Arguments:
    source: str = "tfds:shapes/plain"
    """The set: 'tfds:NAME', a folder of pictures, 'webdataset:FILE.tar' …, as training takes it
    (docs/data_sources.md)."""
    split: str = "train"
    """The set's split."""
    where: str | None = None
    """Only samples that pass this filter: a name ('single') or 'package.module:function'."""
    limit: int | None = None
    """Only the first so many samples."""
    model: pathlib.Path = pathlib.Path("assets/shapes")
    """A model folder with vae/, text_encoder/ and tokenizer/."""
    out: Annotated[
        pathlib.Path | None, tyro.conf.arg(help_behavior_hint="(default: a folder of the cache)")
    ] = None
    """Where the shards go; interrupted work there is finished."""
    captions: str = "dense"
    """Kinds of caption to encode, with commas between; 'none' for no text."""
    buckets: str = "64x64"
    """HEIGHTxWIDTH in px, with commas between; or 256, 512, 1024 or 2048 for that base's whole
    table."""
    max_text_tokens: int = 120
    """Longer captions are cut."""
    batch_size: int = 32
    """Pictures that a device encodes at once."""
    shard_size: int = 1024
    """Records a shard, which is also what a kill can cost."""
    flip: bool = False
    """Encode each picture mirrored too, as a second posterior of its record; training takes one or
    the other."""
    dtype: str = "float32"
    """Of the text encoder's computation: float32 or bfloat16. The VAE computes in float32."""
    mesh: str = "data=-1"
    """How a process's devices share the work: data=-1, each its pictures; fsdp=8, the encoders'
    parameters cut over them too."""
    strict: bool = False
    """Stop at the first sample that cannot be encoded; otherwise it is named, counted and left
    out."""
    check: bool = False
    """Encode nothing: compare every byte of the shards in --out with their checksums, and count the
    keys that stand twice."""
    again: int = 0
    """With --check: so many records encoded anew, by --model from --source, and compared. 4 is a
    good number."""


@dataclasses.dataclass(frozen=True)
class PromptArguments:
    """Prompts → a file of text states: sample.py --text-states draws from it without opening the
    text encoder."""

    prompts: pathlib.Path
    """One a line, or .csv or .jsonl with 'prompt' and 'negative_prompt', as sample.py reads them;
    "" is encoded too."""
    out: pathlib.Path
    """The file, NAME.safetensors. Where it is there, only what is missing is encoded; so it is
    after a stop of any kind."""
    model: pathlib.Path = pathlib.Path("assets/shapes")
    """A model folder, as sample.py takes it."""
    negative_prompt: str = ""
    """That sample.py will be told, if any."""
    stored: str = "bfloat16"
    """Of the file: bfloat16, as a model reads them that computes in it, or float32, twice as
    large."""
    dtype: str = "auto"
    """Of the computation: float32 or bfloat16; auto: bfloat16 on accelerators."""
    mesh: str = "data=-1"
    """As sample.py's: fsdp=4,tensor=2 cuts the parameters over the devices."""
    text_encoder_int8: bool = False
    """Hold the text encoder's matrices as int8 values: half of bfloat16's memory, and states that
    differ by 1 to 2 %."""
    weights_cache: str = "auto"
    """As sample.py's: a folder, auto or none."""
    clean_caption: bool = True
    """Clean prompts as sample.py does."""


def encode_prompts(arguments: PromptArguments) -> int:
    """The text states of a file of prompts. Exit status 0."""
    import jax

    from pixart_jax.pipeline import PromptEncoder, folder, options
    from pixart_jax.pipeline.prompt_encoder import identity as made_with
    from pixart_jax.pipeline.text_states import DTYPES
    from pixart_jax.text import clean_caption, lower_caption, read_prompts

    options.check_choice("stored", arguments.stored, tuple(DTYPES))
    dtype = options.check_choice("dtype", arguments.dtype, options.DTYPES)
    if arguments.out.suffix != ".safetensors":
        raise UserError(f"--out {arguments.out}: a file NAME.safetensors is needed")
    rows = read_prompts(arguments.prompts)
    folder.configs(arguments.model)  # that it is a model
    folder.check_weights(arguments.model, ("text_encoder",))
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    clean = clean_caption if arguments.clean_caption else lower_caption
    how = {
        "quantization": "int8" if arguments.text_encoder_int8 else None,
        "cache": options.weights_cache(arguments.weights_cache),
    }
    made = {
        **made_with(arguments.model, dtype, clean, how["quantization"]),
        "stored_in": arguments.stored,
    }
    devices = jax.local_devices()
    mesh = make_mesh(MeshConfig.parse(arguments.mesh), devices)
    mesh = mesh if mesh.size > 1 else None
    texts = [
        *(row.prompt for row in rows),
        *(row.negative_prompt or "" for row in rows),
        arguments.negative_prompt,
        "",
    ]
    count = pixart_jax.encoding.prompt_states.encode_prompt_file(
        texts,
        arguments.out,
        made,
        lambda: PromptEncoder.from_pretrained(arguments.model, dtype, mesh, **how),
        clean=clean,
    )
    known = f", {count} of them new" if count else ", all of them already there"
    size = arguments.out.stat().st_size / 2**20
    print(f"{len({clean(text) for text in texts})} texts{known}, {size:.1f} MiB: {arguments.out}")
    return 0


def main(argv: Sequence[str]) -> int:
    """Encode, or check what was encoded. Exit status 0; UserError for whatever the user can put
    right.

    Several processes (docs/pods.md) encode the shards of one set together, into a folder that all
    of them see.
    """
    joined, argv = processes.pop_distributed_flags(argv)
    if any(word == "--prompts" or word.startswith("--prompts=") for word in argv):
        return encode_prompts(
            cli.parse(
                PromptArguments,
                argv,
                prog="python -m pixart_jax encode",
                description=PromptArguments.__doc__,
            )
        )
    arguments = cli.parse(
        Arguments,
        argv,
        prog="python -m pixart_jax encode",
        description=f"{__doc__}\n{processes.usage()}",
    )
    if arguments.check:
        check(arguments.out)
        if not arguments.again:
            return 0
    kinds = (
        ()
        if arguments.captions in ("", "none")
        else tuple(kind.strip() for kind in arguments.captions.split(","))
    )
    options = EncodeOptions(
        buckets=parse_buckets(arguments.buckets),
        captions=kinds,
        max_text_tokens=arguments.max_text_tokens,
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        flip=arguments.flip,
        strict=arguments.strict,
    )
    if arguments.dtype not in DTYPES:
        raise UserError(f"--dtype {arguments.dtype!r}: {' or '.join(DTYPES)}")
    sizes = MeshConfig.parse(arguments.mesh)
    parts = ("vae", *(("text_encoder", "tokenizer") if kinds else ()))
    for part in parts:
        if not (arguments.model / part).is_dir():
            raise UserError(
                f"no {part} in {arguments.model}: give --model a folder with vae/, text_encoder/ "
                "and tokenizer/"
            )
    processes.initialize(joined)
    from pixart_jax.weights.component import load_component  # --check and --help need no model code

    mesh = make_mesh(sizes, jax.local_devices())
    mesh = mesh if mesh.size > 1 else None
    source = open_source(
        arguments.source,
        arguments.split,
        where=arguments.where,
        limit=arguments.limit,
        strict=arguments.strict,
    )
    encoders = {"vae": load_component(arguments.model / "vae", mesh=mesh)}
    if kinds:
        encoders["text_encoder"] = load_component(
            arguments.model / "text_encoder", arguments.dtype, mesh
        )
        encoders["tokenizer"] = load_tokenizer(arguments.model / "tokenizer")
    if arguments.check:
        return _again(arguments, source, options, encoders, mesh)
    folder = encode_dataset(
        source,
        options,
        **encoders,
        folder=arguments.out,
        folders={part: arguments.model / part for part in parts},
        mesh=mesh,
    )
    if jax.process_index() == 0:
        print(summary(folder))
    return 0


def _again(arguments: Arguments, source, options: EncodeOptions, encoders: dict, mesh) -> int:
    """The second half of --check. Exit status 0."""
    made = identity(source, options, **encoders)
    records.check_identity(arguments.out, records.Manifest.read(arguments.out).identity, made)
    encoder = ShardEncoder(
        source,
        options.captions,
        options.max_text_tokens,
        options.batch_size,
        **encoders,
        flip=options.flip,
        mesh=mesh,
        strict=True,
    )
    print(reencode_and_compare(arguments.out, source, options, encoder, arguments.again))
    return 0


def parse_buckets(text: str) -> tuple[tuple[int, int], ...]:
    """'64x64,64x96' → ((64, 64), (64, 96)); '512' → the 40 buckets of base 512."""
    if text.isdigit() and int(text) in bucket_tables.TABLES:
        return tuple(bucket_tables.TABLES[int(text)].values())
    try:
        buckets = tuple(
            tuple(int(side) for side in part.lower().replace("×", "x").split("x"))
            for part in text.split(",")
        )
    except ValueError:
        buckets = ()
    if not buckets or any(len(b) != 2 or min(b) < 1 for b in buckets):
        bases = ", ".join(map(str, bucket_tables.BASES))
        raise UserError(
            f"--buckets {text!r}: HEIGHTxWIDTH with commas between, as 64x64,64x96, or one of "
            f"{bases}"
        )
    return buckets
