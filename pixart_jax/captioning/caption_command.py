"""``python -m pixart_jax caption``: images → detailed captions by a vision-language model, on this
machine or a Ray cluster.

It needs PyTorch and Ray Data (pip install torch 'ray[data]'). The same command resumes a run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from pixart_jax import cli
from pixart_jax.captioning import export, model
from pixart_jax.captioning.run import Cluster, faults_file, run
from pixart_jax.captioning.worker import CaptionOptions
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import parse_mixture, parse_source
from pixart_jax.data.sources.webdataset import tars_of
from pixart_jax.encoding.options import SourceSpec
from pixart_jax.errors import UserError
from pixart_jax.files import is_remote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    source: tyro.conf.OmitArgPrefixes[tyro.conf.PositionalRequiredArgs[SourceSpec]]
    options: tyro.conf.OmitArgPrefixes[CaptionOptions]
    cluster: tyro.conf.OmitArgPrefixes[Cluster] = Cluster()
    out: Path
    """NAME.jsonl, a line per picture; with --format txt or webdataset a folder, which gets
    captions.jsonl too."""
    format: Literal["jsonl", "txt", "webdataset"] = "jsonl"
    """txt: also a file KEY.txt per picture. webdataset: also copies of the source's tars, with a
    member KEY.KIND.txt per sample."""
    in_place: bool = False
    """txt: write KEY.KIND.txt beside a folder's pictures."""
    kind: str = "dense"
    """What this kind of caption is called, in the rows, in the tars and beside pictures ('caption'
    is a plain KEY.txt)."""
    strict: bool = False
    """Stop at the first picture that cannot be captioned; otherwise it is named, counted and
    skipped."""


def main(argv: Sequence[str]) -> int:
    """Caption; return exit status 0. Raises UserError for user errors."""
    arguments = cli.parse(Arguments, argv, prog="python -m pixart_jax caption", description=__doc__)
    file, target = _places(arguments)
    spec, options, faults = arguments.source, arguments.options, BadRecords(arguments.strict)
    model.check_engines()
    model.check(model.local(options.model, options.variant))
    source = spec.open(faults)
    raw = options.raw_caption
    if raw is not None and raw not in source.caption_kinds:
        known = ", ".join(source.caption_kinds) or "none"
        raise UserError(f"--raw-caption {raw!r}: {source.name} has the kinds of caption: {known}")
    facts = run(source, spec, file, options, arguments.cluster, kind=arguments.kind, faults=faults)
    print(summary(facts, BadRecords.read(faults_file(file))))
    if faults_file(file).exists():
        print(f"left out or mended, by name: {faults_file(file)}")
    print(f"captions: {file}")
    if target is not None:
        _export(arguments, file, target)
    return 0


def _places(arguments: Arguments) -> tuple[Path, Path | list[Path] | None]:
    """(the caption file, where it is exported to: a folder of .txt, or copies of these tars).
    Checks the flags before anything is opened."""
    out, form, text = arguments.out, arguments.format, arguments.source.source
    in_place = arguments.in_place
    if not re.fullmatch(r"[\w-]+", arguments.kind):
        raise UserError(f"--kind {arguments.kind!r}: letters, digits, _ and -, as in a file's name")
    if in_place and form != "txt":
        raise UserError("--in-place goes with --format txt")
    if form == "jsonl":
        if out.suffix != ".jsonl":
            raise UserError(f"--out {out}: NAME.jsonl is needed, or a folder and another --format")
        return out, None
    if out.suffix == ".jsonl" or out.is_file():
        raise UserError(f"--out {out}: with --format {form} it is a folder")
    kinds = [parse_source(part) for _, part in parse_mixture(text)]
    kind, place = kinds[0] if len(kinds) == 1 else ("mixture", "")
    wanted = {"webdataset": "webdataset", "txt": "folder" if in_place else kind}[form]
    if kind != wanted:
        how = "--format webdataset adds to tars" if form == "webdataset" else "--in-place writes"
        raise UserError(f"{how} of a source {wanted}:…, and {text} is a {kind}")
    if is_remote(place):
        raise UserError(f"{text} is in a bucket: only --format jsonl can export its captions")
    if form == "webdataset":
        return out / "captions.jsonl", [Path(tar) for tar in tars_of(place, BadRecords())]
    return out / "captions.jsonl", Path(place.partition("?")[0]) if in_place else out


def _export(arguments: Arguments, file: Path, target: Path | list[Path]) -> None:
    faults, kind = BadRecords(arguments.strict), arguments.kind
    if isinstance(target, Path):
        beside = arguments.in_place
        suffix = f".{kind}.txt" if beside and kind != "caption" else ".txt"
        held = export.to_texts(file, target, suffix, faults, replace=not beside)
        print(f"{held} files *{suffix}: {target}")
    else:
        held, captions = export.to_tars(file, target, file.parent, kind, faults)
        print(f"{held} members *.{kind}.txt in {len(target)} tars: {file.parent}")
        if held < captions:
            print(f"warning: {captions - held} captions found no sample in the tars")
    for fault in faults:
        print(fault)
    if faults.summary():
        print(faults.summary())


def summary(facts: dict, faults: BadRecords) -> str:
    """'97 captions, 41.3 tokens each; guards: 3 repeating (1 mended by another draw); 100 read: 97
    used, 3 left out: …'. faults: of all runs of this file."""
    each = facts["tokens"] / max(1, facts["captions"])
    parts = [f"{facts['captions']:,} captions, {each:.1f} tokens each"]
    if facts["guards"]:
        failed = ", ".join(f"{n} {name}" for name, n in facts["guards"].items())
        parts.append(f"guards: {failed} ({facts['mended by another draw']} mended by another draw)")
    return "; ".join([*parts, faults.report(facts["captions"])])
