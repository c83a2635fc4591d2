"""The generated images that a command scores: its options, how they were made, their prompts."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from pixart_jax.errors import UserError
from pixart_jax.evaluation.features import ImageSet
from pixart_jax.files import hash64, write_text
from pixart_jax.images import write_png
from pixart_jax.pipeline.output import PromptShard, parse_share
from pixart_jax.text import read_prompts

_PER_IMAGE = {"prompt", "index", "seed", "height", "width"}


@dataclasses.dataclass(frozen=True)
class GeneratedOptions:
    """What all commands take that score generated images."""

    generated: Annotated[Path | None, tyro.conf.arg(aliases=["--images"])] = None
    """folder of images (all below it), or an .npz with arr_0, as ADM's samples; may come first
    without the flag"""
    batch_size: int = 32
    """images a device computes at once"""
    out: Path | None = None
    """folder for score.json and what belongs to it"""
    share: str | None = None
    """K/N: compute share K (from 0) of N, into one cache; process 0 prints the score. By default
    all, or what `python -m pixart_jax launch` says"""

    def __post_init__(self):
        if self.generated is None:
            raise UserError("which images? give --generated FOLDER")
        if self.batch_size < 1:
            raise UserError("batch-size: at least 1")

    def open(
        self, flags: Sequence[str] | None, size: int | None = None, sizes: bool = False
    ) -> tuple[ImageSet, PromptShard]:
        """The images, generated first where ``flags`` of sample.py are given."""
        path, share = Path(str(self.generated)), parse_share(self.share)
        if flags is not None:
            generate(path, flags, share)
        return ImageSet.open(path, size, sizes), share


def split_sampling(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """(flags of the command, flags of sample.py after '--' or None). A first
    argument without dashes is the folder of images."""
    argv, flags = list(argv), None
    if "--" in argv:
        place = argv.index("--")
        argv, flags = argv[:place], argv[place + 1 :]
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--generated")
    return argv, flags


def generate(folder: Path, flags: Sequence[str], share: PromptShard) -> None:
    """Run sample.py's command into the folder, in a process of its own, which gives all memory of
    the devices back; wait for the other shares. Exits with its status where that is not 0."""
    command = [sys.executable, "-m", "pixart_jax", "sample", "--out", str(folder), *flags]
    if share.count > 1:
        command += ["--share", f"{share.index}/{share.count}"]
    if status := subprocess.run(command).returncode:
        raise SystemExit(status)
    key = f"{hash64(repr([*flags, share.count])):016x}"
    notes = [folder / f".sampled-{key}-{k}" for k in range(share.count)]
    if share.count > 1:
        notes[share.index].touch()
        while not all(note.exists() for note in notes):
            time.sleep(0.5)


def generate_at(
    options: GeneratedOptions,
    flags: Sequence[str],
    prompts: Sequence[str],
    each: int,
    place: Callable[[int, int], str],
) -> None:
    """Generate ``each`` images of each prompt in OUT/generated. Process 0 copies them to
    place(prompt, number) of the folder of images, to one 2×2 grid where four have one place, with
    the times of the originals; the others wait for it."""
    if options.generated is None or options.out is None or not prompts:
        raise UserError("to generate, give --images DIR, --out DIR and the benchmark's prompts")
    made, listed = options.out / "generated", options.out / "rows.jsonl"
    made.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts for _ in range(each))
    write_text(listed, "".join(rows))
    share = parse_share(options.share)
    generate(made, ["--prompts", str(listed), *flags], share)
    images = ImageSet.open(made, sizes=True)
    number = {settings["index"]: n for n, settings in enumerate(images.settings)}
    targets: dict[str, list[int]] = {}
    for i in range(len(prompts) * each):
        targets.setdefault(place(*divmod(i, each)), []).append(number[i])
    for target, some in targets.items():
        path, source = options.generated / target, made / images.names[some[0]]
        stamp = source.stat().st_mtime_ns
        while not (path.exists() and path.stat().st_mtime_ns == stamp):
            if share.index:
                time.sleep(0.5)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if len(some) == 1:
                shutil.copy(source, path)
            else:
                a, b, c, d = (images.pixels(n)[0] for n in some)
                write_png(path, np.block([[[a], [b]], [[c], [d]]]), images.settings[some[0]])
            os.utime(path, ns=(stamp, stamp))


def check_list(found: Iterable[str], wanted: Sequence[str], where: Path) -> None:
    """Raise UserError where the images found are not those of the list."""
    held = set(found)
    if missing := [name for name in wanted if name not in held]:
        count = f"{len(missing)} of {len(wanted)} images of the list are missing"
        raise UserError(f"{where}: {count}, the first is {missing[0]}")
    if extra := held - set(wanted):
        raise UserError(f"{where}: {min(extra)} is not in the list of images")


def sampled_with(images: ImageSet | None) -> dict[str, Any]:
    """Of images that sample.py generated, by what their files record: the options (a list of values
    where they differ), the range of seeds, the SHA-256 of the prompts."""
    if images is None or not images.settings:
        return {}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for image in images.settings for name in image):
        if name not in _PER_IMAGE:
            values = list({repr(v): v for v in (i.get(name) for i in images.settings)}.values())
            found[name] = values[0] if len(values) == 1 else values
    seeds = [image["seed"] for image in images.settings]
    prompts = "\n".join(image["prompt"] for image in images.settings)
    digest = sha256(prompts.encode()).hexdigest()
    return found | {"seeds": [min(seeds), max(seeds)], "prompts": digest}


def prompts_of(images: ImageSet, file: Path | None) -> list[str]:
    """The prompt of each image: as it records it, or that of its place in ``file``. Raises
    UserError where there is none, and where the file does not fit the images."""
    recorded = [image["prompt"] for image in images.settings]
    rows = [row.prompt for row in read_prompts(file)] if file else recorded
    if not rows:
        fix = "give --prompts FILE, with a prompt an image in the order of their names"
        raise UserError(f"not all images in {images.source} record their prompts: {fix}")
    if not recorded:
        if len(rows) != len(images.names):
            counts = f"{len(rows)} prompts for the {len(images.names)} images in {images.source}"
            raise UserError(f"{file} does not fit: it holds {counts}")
        return rows
    for some, others, what in (
        (recorded, set(rows), f"an image of {images.source} has a prompt that it lacks"),
        (rows, set(recorded), f"no image of {images.source} has its prompt"),
    ):
        for prompt in some:
            if prompt not in others:
                raise UserError(f"{file} does not fit: {what}, {prompt[:60]!r}")
    return recorded
