"""``python -m pixart_jax encode``: images and captions → shards that training reads.

With --prompts FILE: prompts → a file of text states that sample.py generates from (``encode
--prompts FILE --help`` lists its flags).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from pixart_jax import cli
from pixart_jax.config import MeshConfig
from pixart_jax.data import records
from pixart_jax.data.faults import BadRecords
from pixart_jax.encoding.check import check, reencode_and_compare, summary
from pixart_jax.encoding.encode import encode_dataset, identity
from pixart_jax.encoding.options import EncodeOptions, SourceSpec
from pixart_jax.encoding.prompts import encode_prompt_file
from pixart_jax.encoding.shards import ShardEncoder
from pixart_jax.errors import UserError
from pixart_jax.parallel import processes
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.text import load_tokenizer
from pixart_jax.weights.hub import model_folder

PROG = "python -m pixart_jax encode"
DTYPES = ("float32", "bfloat16")
CacheDefault = tyro.conf.arg(help_behavior_hint="(default: a folder of the cache)")


@dataclasses.dataclass(frozen=True)
class Arguments:
    source: tyro.conf.OmitArgPrefixes[SourceSpec] = SourceSpec("tfds:shapes/plain")
    model: Path = Path("assets/shapes")
    """A model folder with vae/, text_encoder/ and tokenizer/."""
    out: Annotated[Path | None, CacheDefault] = None
    """Where the shards go; interrupted work there is finished."""
    options: tyro.conf.OmitArgPrefixes[EncodeOptions] = EncodeOptions(((64, 64),), ("dense",))
    dtype: str = "float32"
    """Of the text encoder's computation: float32 or bfloat16. The VAE computes in float32."""
    mesh: str = "data=-1"
    """How a process's devices share the work: data=-1, each its pictures; fsdp=8, the encoders'
    parameters are sharded over them too."""
    check: bool = False
    """Encode nothing: compare every byte of the shards in --out with their checksums, and count the
    keys that occur twice."""
    again: int = 0
    """With --check: encode so many records again, by --model from --source, and compare. 4 is a
    good number."""


@dataclasses.dataclass(frozen=True)
class PromptArguments:
    """Prompts → a file of text states: sample.py --text-states generates from it without opening
    the text encoder."""

    prompts: Path
    """One a line, or .csv or .jsonl with 'prompt' and 'negative_prompt', as sample.py reads them;
    "" is encoded too."""
    out: Path
    """The file, NAME.safetensors. Where it exists, only what is missing is encoded; so it is after
    a stop of any kind."""
    model: Path = Path("assets/shapes")
    """A model folder, as sample.py takes it."""
    negative_prompt: str = ""
    """The one that sample.py will be given, if any."""
    stored: str = "bfloat16"
    """Of the file: bfloat16, as a model reads them that computes in it, or float32, twice as
    large."""
    dtype: str = "auto"
    """Of the computation: float32 or bfloat16; auto: bfloat16 on accelerators."""
    mesh: str = "data=-1"
    """As sample.py's: fsdp=4,tensor=2 shards the parameters over the devices."""
    text_encoder_int8: bool = False
    """Hold the text encoder's matrices as int8 values: half of bfloat16's memory, and states that
    differ by 1 to 2 %."""
    weights_cache: str = "auto"
    """As sample.py's: a folder, auto or none."""
    clean_caption: bool = True
    """Clean prompts as sample.py does."""


def main(argv: Sequence[str]) -> int:
    """Encode, or check what was encoded; return exit status 0. Raises UserError for user errors.

    Several processes (docs/pods.md) encode the shards of one set together, into a folder that all
    of them share.
    """
    joined, argv = processes.pop_distributed_flags(argv)
    if any(word == "--prompts" or word.startswith("--prompts=") for word in argv):
        about = PromptArguments.__doc__
        return encode_prompts(cli.parse(PromptArguments, argv, prog=PROG, description=about))
    about = f"{__doc__}\n{processes.usage()}"
    arguments = cli.parse(Arguments, argv, prog=PROG, description=about)
    if arguments.check:
        if arguments.out is None:
            raise UserError("--check needs --out FOLDER, the shards to check")
        check(arguments.out)
        if not arguments.again:
            return 0
    return encode(arguments, joined)


def encode(arguments: Arguments, joined) -> int:
    """Encode a source, or with --again some of its records to compare them. joined: the flags of
    distributed processes."""
    options, model = arguments.options, arguments.model
    if arguments.dtype not in DTYPES:
        raise UserError(f"--dtype {arguments.dtype!r}: {' or '.join(DTYPES)}")
    sizes = MeshConfig.parse(arguments.mesh)
    parts = ("vae", *(("text_encoder", "tokenizer") if options.captions else ()))
    model = model_folder(model, ("vae", "text_encoder") if options.captions else ("vae",))
    for part in parts:
        if not (model / part).is_dir():
            raise UserError(
                f"no {part} in {model}: give --model a folder with vae/, text_encoder/ and "
                "tokenizer/"
            )
    processes.initialize(joined)
    from pixart_jax.weights.component import load_component  # --check and --help need no model code

    mesh = make_mesh(sizes, jax.local_devices())
    mesh = mesh if mesh.size > 1 else None
    source = arguments.source.open(BadRecords(options.strict))
    encoders: dict[str, Any] = {"vae": load_component(model / "vae", mesh=mesh)}
    if options.captions:
        encoders["text_encoder"] = load_component(model / "text_encoder", arguments.dtype, mesh)
        encoders["tokenizer"] = load_tokenizer(model / "tokenizer")
    folder = arguments.out
    if arguments.check and folder is not None:
        made = identity(source, options, **encoders)
        records.check_identity(folder, records.Manifest.read(folder).identity, made)
        encoder = ShardEncoder(
            source, dataclasses.replace(options, strict=True), **encoders, mesh=mesh
        )
        print(reencode_and_compare(folder, source, options, encoder, arguments.again))
        return 0
    folders = {part: model / part for part in parts}
    folder = encode_dataset(source, options, **encoders, folder=folder, folders=folders, mesh=mesh)
    if jax.process_index() == 0:
        print(summary(folder))
    return 0


def encode_prompts(arguments: PromptArguments) -> int:
    """Encode the texts of a prompt file; return exit status 0."""
    from pixart_jax.pipeline import PromptEncoder
    from pixart_jax.pipeline.folder import ModelFolder, compute_dtype, weights_cache
    from pixart_jax.pipeline.sampling_config import check_choice
    from pixart_jax.pipeline.text_states import DTYPES as STORED
    from pixart_jax.text import caption_cleaner, read_prompts

    out = arguments.out
    check_choice("stored", arguments.stored, tuple(STORED))
    dtype = compute_dtype(arguments.dtype)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: a file NAME.safetensors is needed")
    rows = read_prompts(arguments.prompts)
    model = ModelFolder.open(arguments.model, ("text_encoder",))
    model.check_weights(("text_encoder",))
    clean = caption_cleaner(arguments.clean_caption)
    int8 = "int8" if arguments.text_encoder_int8 else None
    cache = weights_cache(arguments.weights_cache)
    made = model.text_identity(dtype, clean, int8) | {"stored_in": arguments.stored}
    mesh = make_mesh(MeshConfig.parse(arguments.mesh), jax.local_devices())
    mesh = mesh if mesh.size > 1 else None

    def encoder() -> PromptEncoder:
        return PromptEncoder.from_pretrained(model, dtype, mesh, quantization=int8, cache=cache)

    texts = [row.prompt for row in rows] + [row.negative_prompt or "" for row in rows]
    texts += [arguments.negative_prompt, ""]
    count = encode_prompt_file(texts, out, made, encoder, clean=clean)
    new = f"{count} of them new" if count else "all of them already there"
    size = out.stat().st_size / 2**20
    print(f"{len(set(map(clean, texts)))} texts, {new}, {size:.1f} MiB: {out}")
    return 0
