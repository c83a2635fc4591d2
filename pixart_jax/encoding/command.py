"""``python -m pixart_jax encode``: images and captions → shards that training reads.

With --prompts FILE: prompts → a file of text states that sample.py generates from (``encode
--prompts FILE --help`` lists its flags).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from tqdm import tqdm

from pixart_jax import cli
from pixart_jax.config import MeshConfig
from pixart_jax.data import records
from pixart_jax.data.faults import BadRecords
from pixart_jax.encoding import prompts
from pixart_jax.encoding.encode import FAULTS, encode_dataset
from pixart_jax.encoding.options import EncodeOptions, SourceSpec
from pixart_jax.errors import UserError
from pixart_jax.files import hash64
from pixart_jax.parallel import processes
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.remote_path import Location
from pixart_jax.text import load_tokenizer
from pixart_jax.weights.files import part_variants
from pixart_jax.weights.hub import model_folder

PROG = "python -m pixart_jax encode"
CacheDefault = tyro.conf.arg(help_behavior_hint="(default: a folder of the cache)")


@dataclasses.dataclass(frozen=True)
class Arguments:
    source: tyro.conf.OmitArgPrefixes[SourceSpec] = SourceSpec("tfds:shapes/plain")
    model: Location = Path("assets/shapes")
    """A model folder with vae/, text_encoder/ and tokenizer/."""
    variant: str | None = None
    """Of the model's weight files, such as fp16; by default the ones without, or the only ones."""
    out: Annotated[Location | None, CacheDefault] = None
    """Where the shards go; interrupted work there is finished."""
    options: tyro.conf.OmitArgPrefixes[EncodeOptions] = EncodeOptions(((64, 64),), ("dense",))
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the text encoder's computation. The VAE computes in float32."""
    mesh: str = "data=-1"
    """How a process's devices share the work: data=-1, each its pictures; fsdp=8, the encoders'
    parameters are sharded over them too."""
    check: bool = False
    """Encode nothing: compare every byte of the shards in --out with their checksums, and count the
    keys that occur twice."""


def main(argv: Sequence[str]) -> int:
    """Encode, or check what was encoded; return exit status 0.

    Several processes (docs/pods.md) encode one set together, into a folder that they share.
    """
    joined, argv = processes.pop_distributed_flags(argv)
    if any(word == "--prompts" or word.startswith("--prompts=") for word in argv):
        about = prompts.PromptArguments.__doc__
        return prompts.main(cli.parse(prompts.PromptArguments, argv, prog=PROG, description=about))
    about = f"{__doc__}\n{processes.usage()}"
    arguments = cli.parse(Arguments, argv, prog=PROG, description=about)
    if arguments.check:
        if arguments.out is None:
            raise UserError("--check needs --out FOLDER, the shards to check")
        check(arguments.out)
        return 0
    return encode(arguments, joined)


def encode(arguments: Arguments, joined) -> int:
    """Encode a source. joined: the flags of distributed processes."""
    options, sizes = arguments.options, MeshConfig.parse(arguments.mesh)
    parts = ("vae", "text_encoder", "tokenizer") if options.captions else ("vae",)
    model = model_folder(arguments.model, parts[:2], variant=arguments.variant)
    for part in parts:
        if not (model / part).is_dir():
            wanted = "give --model a folder with vae/, text_encoder/ and tokenizer/"
            raise UserError(f"no {part} in {model}: {wanted}")
    processes.initialize(joined)
    from pixart_jax.weights.component import load_component  # --check and --help need no model code

    devices = make_mesh(sizes, jax.local_devices())
    mesh = devices if devices.size > 1 else None
    source = arguments.source.open(BadRecords(options.strict))
    variants = part_variants(model, parts[:2], arguments.variant)
    vae = load_component(model / "vae", mesh=mesh, variant=variants["vae"])
    encoders: dict[str, Any] = {"vae": vae}
    if options.captions:
        encoders["text_encoder"] = load_component(
            model / "text_encoder", arguments.dtype, mesh, variant=variants["text_encoder"]
        )
        encoders["tokenizer"] = load_tokenizer(model / "tokenizer")
    folders = {part: model / part for part in parts}
    made: dict[str, Any] = {"folder": arguments.out, "folders": folders, "mesh": mesh}
    folder = encode_dataset(source, options, **encoders, **made)
    if jax.process_index() == 0:
        print(summary(folder))
    return 0


def check(folder: Location) -> None:
    """Compare every byte with its checksum and every key with all others; print what is wrong, or a
    summary. Raises UserError where a shard is damaged or missing, or a key occurs twice."""
    samples, damaged = records.Manifest.read(folder).samples, 0
    with tqdm(total=samples, unit=" records", desc="checking", disable=None) as bar:
        for shard, trouble in records.check(folder):
            if trouble:
                damaged += 1
                bar.write(trouble, file=sys.stderr)
            bar.update(shard.count)
    if damaged:
        raise UserError(
            f"{damaged} of the shards in {folder} are damaged: delete them and encode again"
        )
    stored, seen, twice = records.Records(folder), set(), 0
    for index in range(samples):
        key = records.decode_record(stored.bytes(index), ())[1]["key"]
        if hash64(key) in seen:
            number, place = stored.shard_of(index)
            where = f"{stored.manifest.shards[number].file}, record {place}"
            print(f"{where}: key twice ({key})", file=sys.stderr)
            twice += 1
        seen.add(hash64(key))
    if twice:
        raise UserError(f"{twice} of the records in {folder} have a key that another one has")
    print(f"no damage: {summary(folder)}")


def summary(folder: Location) -> str:
    """Two lines: what a folder holds, and what of the source is in it."""
    manifest = records.Manifest.read(folder)
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    buckets = ", ".join(f"{h}×{w}: {n}" for (h, w), n in manifest.by_bucket.items())
    mirrored = ", each mirrored too" if manifest.identity.get("flip") == "yes" else ""
    report = BadRecords.read(folder / FAULTS).report(manifest.samples)
    return (
        f"{manifest.samples} records ({buckets}){mirrored} in {len(manifest.shards)} "
        f"shards, {size:.1f} MiB: {folder}\n{report}"
    )
