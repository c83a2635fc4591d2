"""``python -m pixart_jax caption``: pictures → detailed captions by a vision-language model, on
this machine or a Ray cluster.

It needs PyTorch and Ray Data: pip install torch 'ray[data]'. Killed at any moment, the same command
goes on.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from pixart_jax import cli
from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Arguments:
    source: tyro.conf.Positional[str]
    """The pictures: whatever encode takes, as 'folder:DIR', 'webdataset:DIR' or 'tfds:NAME'."""
    model: str
    """A folder, or a name on the hub, of a model that AutoModelForImageTextToText opens: LLaVA,
    SmolVLM, Qwen-VL, …"""
    out: Annotated[pathlib.Path | None, tyro.conf.arg(help_behavior_hint="(required)")] = None
    """NAME.jsonl, a line a picture; with --format txt or webdataset a folder, which gets
    captions.jsonl besides."""
    format: Literal["jsonl", "txt", "webdataset"] = "jsonl"
    """txt: also a file KEY.txt a picture. webdataset: also the source's tars, copied, with a member
    KEY.KIND.txt a sample."""
    in_place: bool = False
    """txt: write KEY.KIND.txt beside a folder's pictures. webdataset: replace the tars, each whole
    or not at all."""
    kind: str = "dense"
    """What this kind of caption is called, in the rows, in the tars and beside pictures ('caption'
    is a plain KEY.txt)."""
    prompt: str = "paper"
    """'paper', 'script' (the words of the official captioning script), or a text of your own;
    {caption} in it is the raw caption."""
    raw_caption: str | None = None
    """The kind of caption that the source has and that goes into the prompt: 'caption', …"""
    temperature: float = 0.2
    """Of the draw; 0 takes the likeliest token each time."""
    max_new_tokens: int = 1024
    """A caption that has not ended by then is cut (and truncated, to the guards, where no sentence
    ends there)."""
    seed: int = 0
    """A picture's draw depends on this and its key, not on its batch or worker."""
    batch_size: int = 32
    """Pictures that a worker captions at once."""
    guard_action: Literal["retry", "drop", "keep"] = "retry"
    """For a caption that is empty, truncated, unfinished, repeating or a refusal. retry: draw
    again, 0.3 warmer, then drop."""
    retries: int = 1
    """Further draws of such a caption."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the computation; auto is the model file's own on a GPU, float32 on a CPU."""
    workers: int = 0
    """Copies of the model; 0 is one a GPU, or one where there is none."""
    gpus_per_worker: float | None = None
    """0 runs on the CPU; 0.5 puts two workers on a GPU. By itself 1 where Ray sees a GPU, else
    0."""
    ray_address: str | None = None
    """'auto' or HOST:PORT of a Ray cluster that runs already; by itself Ray is started on this
    machine, and ended."""
    split: str = "train"
    """The set's split."""
    where: str | None = None
    """Only samples that pass this filter: a name or 'package.module:function'."""
    limit: int | None = None
    """Only the first so many samples."""
    data_dir: pathlib.Path | None = None
    """Where a tensorflow-datasets set lies."""
    strict: bool = False
    """Stop at the first picture that cannot be captioned; otherwise it is named, counted and left
    out."""


def main(argv: Sequence[str]) -> int:
    """Caption. Exit status 0; UserError for whatever the user can put right."""
    arguments = cli.parse(Arguments, argv, prog="python -m pixart_jax caption", description=__doc__)
    file, pictures, tar_files = _places(arguments)
    from pixart_jax.captioning import caption_run, vision_language
    from pixart_jax.captioning.caption import CaptionOptions, SourceSpec
    from pixart_jax.data.sources import open_source

    options = CaptionOptions(
        **{
            field.name: getattr(arguments, field.name)
            for field in dataclasses.fields(CaptionOptions)
        }
    )
    cluster = caption_run.Cluster(
        arguments.ray_address, arguments.workers, arguments.gpus_per_worker, arguments.batch_size
    )
    vision_language.check_engines()
    vision_language.check(options.model)
    faults = BadRecords(arguments.strict)
    how = {
        "where": arguments.where,
        "limit": arguments.limit,
        "data_dir": arguments.data_dir and str(arguments.data_dir),
    }
    source = open_source(arguments.source, arguments.split, **how, faults=faults)
    if options.raw_caption is not None and options.raw_caption not in source.caption_kinds:
        known = ", ".join(source.caption_kinds) or "none"
        raise UserError(
            f"--raw-caption {options.raw_caption!r}: {source.name} has the kinds of caption: "
            f"{known}"
        )
    opening = SourceSpec(
        arguments.source, arguments.split, **how, folder=os.getcwd(), fingerprint=source.fingerprint
    )
    facts = caption_run.run(
        source, opening, file, options, cluster, kind=arguments.kind, faults=faults
    )
    print(summary(facts, faults))
    if facts["left out"]:
        print(f"left out, by name: {file.with_name(f'{file.stem}.faults.jsonl')}")
    print(f"captions: {file}")
    if arguments.format != "jsonl":
        _export(arguments, file, pictures, tar_files)
    return 0


def _places(arguments: Arguments) -> tuple[pathlib.Path, pathlib.Path | None, list[pathlib.Path]]:
    """(the caption file, the folder of the pictures for --in-place txt, the source's tars); every
    misfit before anything is opened."""
    if not re.fullmatch(r"[\w-]+", arguments.kind):
        raise UserError(
            f"--kind {arguments.kind!r}: letters, digits, _ and - only, as it becomes part of "
            "file names"
        )
    out = arguments.out
    if out is None:
        raise UserError("--out is missing: NAME.jsonl, or a folder with --format txt or webdataset")
    if arguments.format == "jsonl":
        if arguments.in_place:
            raise UserError("--in-place goes with --format txt or webdataset")
        if out.suffix != ".jsonl":
            raise UserError(
                f"--out {out}: NAME.jsonl is needed, or --format txt or webdataset for a folder"
            )
        return out, None, []
    if out.suffix == ".jsonl" or out.is_file():
        raise UserError(f"--out {out}: with --format {arguments.format} it is a folder")
    from pixart_jax.data.sources import parse_mixture, parse_source
    from pixart_jax.data.sources.webdataset import tars_of

    kinds = [parse_source(text) for _, text in parse_mixture(arguments.source)]
    kind, place = kinds[0] if len(kinds) == 1 else ("mixture", "")
    if arguments.format == "webdataset":
        if kind != "webdataset":
            raise UserError(
                "--format webdataset adds to the tars of 'webdataset:TARS', and "
                f"{arguments.source} is a {kind}"
            )
        return out / "captions.jsonl", None, tars_of(place, BadRecords())
    if arguments.in_place and kind != "folder":
        raise UserError(
            "--in-place --format txt writes beside the pictures of a folder, and "
            f"{arguments.source} is a {kind}"
        )
    return (
        out / "captions.jsonl",
        pathlib.Path(place.partition("?")[0]) if arguments.in_place else None,
        [],
    )


def _export(
    arguments: Arguments,
    file: pathlib.Path,
    pictures: pathlib.Path | None,
    tar_files: list[pathlib.Path],
) -> None:
    from pixart_jax.captioning import caption_export

    captions, faults = caption_export.CaptionsByKey(file), BadRecords(arguments.strict)
    if arguments.format == "txt":
        suffix = (
            ".txt" if pictures is None or arguments.kind == "caption" else f".{arguments.kind}.txt"
        )
        folder = arguments.out if pictures is None else pictures
        held = caption_export.to_texts(captions, folder, suffix, faults, replace=pictures is None)
        print(f"{held} files *{suffix}: {folder}")
    else:
        folder = None if arguments.in_place else arguments.out
        held = caption_export.to_tars(
            captions, tar_files, folder, arguments.kind, faults, file.stat().st_mtime_ns
        )
        print(
            f"{held} members *.{arguments.kind}.txt in {len(tar_files)} tars: "
            f"{folder or tar_files[0].parent}"
        )
        if held < len(captions):
            print(f"warning: {len(captions) - held} captions found no sample in the tars")
    for fault in faults:
        print(fault)
    if faults.summary():
        print(faults.summary())


def summary(facts: dict, faults: BadRecords) -> str:
    """'97 captions of 100 pictures, 41.3 tokens each; guards: 3 repeating (1 mended by another
    draw); 3 left out: …'."""
    each = facts["tokens"] / max(1, facts["captions"])
    said = [
        f"{facts['captions']:,} captions of {facts['pictures']:,} pictures, {each:.1f} tokens each"
    ]
    if facts["guards"]:
        mended = facts["mended by another draw"]
        said.append(
            "guards: "
            + ", ".join(f"{n} {name}" for name, n in facts["guards"].items())
            + f" ({mended} mended by another draw)"
        )
    left_out = faults.summary() or ", ".join(f"{n} {name}" for name, n in facts["left out"].items())
    if left_out:
        said.append(
            left_out if "left out" in left_out or "mended" in left_out else f"left out: {left_out}"
        )
    return "; ".join(said)
