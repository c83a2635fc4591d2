"""The features of the official PixArt repositories as training samples.

  {name}.npz in caption_feature…   caption_feature float [1, l, c], attention_mask [1, l] (optional)
  {name}.npy in img_vae_feature…   float [2·c, height/8, width/8]: mean and std, unscaled
  {path}.npz in hed_feature_…      arr_0: the same of the image's HED map

The official tools disagree about names, so each is tried: FOLDER_STEM (what the loaders look for),
without the folders above, and STEM (what the extractor writes). A file belongs to one image: of
several with one bare stem, the first has it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import posixpath
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.data.buckets import key_of
from pixart_jax.data.encoded import collate
from pixart_jax.data.faults import BadRecord, BadRecords
from pixart_jax.data.samples import CaptionMix, Samples, check_buckets, encoded_length
from pixart_jax.data.sources.indexed import cached_json, in_threads
from pixart_jax.data.sources.official import Entry, Layout
from pixart_jax.errors import UserError, one_line

_TEXTS = ("caption_feature_wmask", "caption_features", "caption_features_new", "caption_feature")
_MORE_TEXTS = {"sharegpt4v": ("sharegpt4v_caption_features_new", "sharegpt4v_caption_features")}
_LATENTS = (
    "img_vae_features_*resolution/noflip",
    "img_vae_features/*resolution/noflip",
    "img_vae_fatures_*_multiscale/ms",
    "img_vae_features_*_multiscale/ms",
    "img_vae_features/ms",
    "img_vae_feature/train_vae_*/noflip",
    "img_sdxl_vae_features_*resolution_new",
    "img_sdxl_vae_features_*resolution_ms_new",
)
_FACTOR = 8  # pixels a latent
_MISSING, _UNREADABLE = "missing features", "unreadable features"
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


# Of an image: (file of latents, its bucket, (file, tokens) of each kind's text, None without).
_Found = tuple[str, tuple[int, int], Sequence[tuple[str, int] | None]]


class FeatureSamples(Samples):
    """The images of a layout whose features are complete; the others are named and left out.

    captions: kinds and weights: 'prompt' for the features of a data_info.json ('caption' for
    SAM's), 'sharegpt4v' for PixArt-Σ's second ones. latents: the folder of latents where there are
    several. control: batches also hold the posteriors of hed_feature_…. Batches are those of
    data/encoded.py; label is −1. The files do not say which encoders made them.
    """

    def __init__(
        self,
        root: str,
        captions: Sequence[tuple[str, float]],
        max_text_tokens: int,
        *,
        latents: str | None = None,
        buckets: Sequence[tuple[int, int]] | None = None,
        faults: BadRecords | None = None,
        control: bool = False,
    ):
        self.faults = BadRecords() if faults is None else faults
        self.name = f"pixart-features:{root}"
        layout = Layout.of(root)
        folder, texts = _latents_folder(layout.root, latents), _text_folders(layout)
        self._mix = CaptionMix(captions, tuple(texts), self.name) if captions else None
        self._kinds = self._mix.kinds if self._mix else ()
        self._entries = list(layout.entries(self.faults))
        folders = [folder, *(texts[kind] for kind in self._kinds)]
        self._control = _control_folder(layout.root, folder) if control else None
        stamped = [*layout.lists, *folders, *filter(None, [self._control])]
        stamps = [(str(f.resolve()), f.stat().st_mtime_ns) for f in stamped]
        self.fingerprint = hashlib.sha256(repr((stamps, self._kinds)).encode()).hexdigest()
        look = functools.partial(self._look, folders)
        self._found: list[_Found | None]
        self._found, bad = cached_json("features", self.fingerprint, len(self._entries), look)
        self.faults.extend(BadRecord(*record) for record in bad)
        found = [one for one in self._found if one]
        self.buckets = tuple(sorted({(height, width) for _, (height, width), _ in found}))
        if not self.buckets:
            reason = self.faults.summary() or "the lists are empty"
            raise UserError(f"{self.name}: no picture has all its features ({reason})")
        check_buckets(self.name, self.buckets, buckets)
        self._ratios = [key_of(bucket) for bucket in self.buckets]
        numbers = {bucket: number for number, bucket in enumerate(self.buckets)}
        places = [numbers[one[1][0], one[1][1]] if one else -1 for one in self._found]
        self.bucket_of = np.array(places, np.int16)
        if self._mix:
            longest = max(text[1] for _, _, held in found for text in held if text)
            self.length = encoded_length(self.name, longest, max_text_tokens)

    def _look(self, folders: list[Path]) -> tuple[list[_Found | None], list[BadRecord]]:
        """(files of each entry, what is wrong), from the headers of all files."""
        found: list[_Found | None] = []
        faults, taken = BadRecords(), set[str]()
        look = functools.partial(
            _features_of, folder=folders[0], texts=folders[1:], control=self._control
        )
        looks = in_threads(look, self._entries, f"headers of {self.name}")
        for entry, (one, bad) in zip(self._entries, looks, strict=True):
            faults.extend(bad)
            if one and one[0] in taken:
                detail = f"{one[0]} is of an earlier picture"
                faults.add(f"{entry.place}, {entry.path}", "key twice", detail)
                one = None
            if one:
                taken.add(one[0])
            found.append(one)
        return found, list(faults)

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket, each with the text that its draw chooses. Raises UserError for
        damage."""
        rows = (self._row(int(i), bucket, float(draw)) for i, draw in zip(indices, draws))
        return collate(rows, len(indices), self.length)

    def _row(
        self, index: int, bucket: int, draw: float
    ) -> tuple[str, dict[str, Any], np.ndarray | None]:
        found, entry = self._found[index], self._entries[index]
        height, width = self.buckets[bucket]
        assert found is not None, "the plan draws no sample without features"
        mean, std = _posterior(found[0], None, (height, width))
        size = entry.fields.get("height"), entry.fields.get("width")
        if not all(isinstance(side, int | float) and side > 0 for side in size):
            size = height, width
        values = {"mean": mean, "std": std, "label": -1, "size": size}
        values["aspect_ratio"] = self._ratios[bucket]
        if self._control is not None:
            file = str(_control_file(self._control, entry))
            pair = _posterior(file, "arr_0", (height, width))
            values |= dict(zip(("control_mean", "control_std"), pair))
        states = None
        if self._mix:
            held = {kind: text for kind, text in zip(self._kinds, found[2]) if text}
            file, tokens = held[self._mix.choose(draw, held)[0]]
            states = _load(file, "caption_feature")
            states = states.reshape(-1, states.shape[-1])[:tokens]
        key = posixpath.splitext(entry.path)[0] if entry.fields else entry.path
        return key, values, states


def _latents_folder(root: Path, given: str | None) -> Path:
    if given:
        for folder in (root / given, Path(given)):
            if folder.is_dir():
                return folder
        raise UserError(f"pixart-features:{root}: no folder of latents {given!r}")
    found = sorted({f for pattern in _LATENTS for f in root.glob(pattern) if f.is_dir()})
    if len(found) == 1:
        return found[0]
    several = ", ".join(str(folder.relative_to(root)) for folder in found)
    held = f"several folders of latents: {several}" if found else "no folder of latents"
    raise UserError(f"pixart-features:{root} holds {held}; name one by ?latents=DIR")


def _control_folder(root: Path, latents: Path) -> Path:
    """Of several the one of the latents' resolution."""
    found = sorted(folder for folder in root.glob("hed_feature_*") if folder.is_dir())
    sides = re.findall(r"\d+", "/".join(latents.parts[-2:]))
    fitting = [folder for folder in found if folder.name.rpartition("_")[2] in sides]
    if len(found) != 1 and len(fitting) != 1:
        raise UserError(f"pixart-features:{root}: no hed_feature_… for the latents in {latents}")
    return found[0] if len(found) == 1 else fitting[0]


def _control_file(folder: Path, entry: Entry) -> Path:
    return folder / f"{posixpath.splitext(entry.path)[0]}.npz"


def _text_folders(layout: Layout) -> dict[str, Path]:
    """Kind of text → folder of its features."""
    found = {}
    for kind, names in {layout.text_kind: _TEXTS, **_MORE_TEXTS}.items():
        if folders := [layout.root / name for name in names if (layout.root / name).is_dir()]:
            found[kind] = folders[0]
    return found


def _names(path: str) -> list[str]:
    """What the feature files of an image may be called, without suffix."""
    stem = posixpath.splitext(path)[0] if "." in posixpath.basename(path) else path
    joined, base = "_".join(stem.rsplit("/", 1)), posixpath.basename(stem)
    names = [joined, posixpath.basename(joined), base, posixpath.basename(joined).split(".")[0]]
    if "/" not in path:  # the extractor takes the folder above for it
        names += [f"InternImgs_{base}", f"InternImgs_{base}".split(".")[0]]
    return list(dict.fromkeys(names))


def _repeated(read: Callable) -> Callable:
    """Headers are read with ast, which fails now and then in threads of Python 3.11 and 3.12
    (python/cpython#106905)."""

    @functools.wraps(read)
    def repeated(*arguments, **named):
        for _ in range(3):
            with contextlib.suppress(SystemError):
                return read(*arguments, **named)
        return read(*arguments, **named)

    return repeated


@_repeated
def _features_of(
    entry: Entry, folder: Path, texts: Sequence[Path], control: Path | None
) -> tuple[_Found | None, list[BadRecord]]:
    """(files, what is wrong); None if the latents or all texts are missing or damaged."""
    place, names = f"{entry.place}, {entry.path}", _names(entry.path)
    latents = _first(folder, names, ".npy")
    if latents is None:
        return None, [BadRecord(place, _MISSING, f"no {names[0]}.npy in {folder.name}")]
    try:
        bucket = _bucket(latents)
    except _DAMAGE as error:
        return None, [BadRecord(str(latents), _UNREADABLE, str(error))]
    if control is not None:
        edges = _control_file(control, entry)
        try:
            if "arr_0" not in getattr(np.load(edges), "files", ()):  # refuses a file that is cut
                raise ValueError("holds no arr_0")
        except FileNotFoundError:
            return None, [BadRecord(place, _MISSING, f"no {edges.name} in {edges.parent}")]
        except _DAMAGE as error:
            return None, [BadRecord(str(edges), _UNREADABLE, str(error))]
    held: list[tuple[str, int] | None] = []
    bad = []
    for kind in texts:
        file = _first(kind, names, ".npz")
        try:
            held.append((str(file), _tokens(file)) if file else None)
        except _DAMAGE as error:
            bad.append(BadRecord(str(file), _UNREADABLE, str(error)))
            held.append(None)
    if texts and not any(held):
        missing = f"no {names[0]}.npz in {', '.join(kind.name for kind in texts)}"
        return None, bad or [BadRecord(place, _MISSING, missing)]
    return (str(latents), bucket, held), bad


def _first(folder: Path, names: Sequence[str], suffix: str) -> Path | None:
    return next((file for name in names if (file := folder / f"{name}{suffix}").is_file()), None)


def _bucket(file: Path) -> tuple[int, int]:
    """(height, width) in px, from the header. Raises ValueError for a cut file or no posterior."""
    held = np.load(file, mmap_mode="r")  # refuses a file that is cut
    shape = held.shape[1:] if held.ndim == 4 and held.shape[0] == 1 else held.shape
    if len(shape) != 3 or shape[0] % 2 or not held.flags.c_contiguous or held.dtype.kind != "f":
        raise ValueError(f"{held.dtype} {shape}: expected a float array [2·channels, h/8, w/8]")
    return shape[1] * _FACTOR, shape[2] * _FACTOR


def _tokens(file: Path) -> int:
    """Tokens of a text's states, at least 1. Raises ValueError if its mask has holes."""
    with np.load(file) as held:
        if "caption_feature" not in held:
            raise ValueError("holds no caption_feature")
        if "attention_mask" not in held:
            return held["caption_feature"].size // held["caption_feature"].shape[-1]
        mask = held["attention_mask"].reshape(-1) != 0
    length = int(mask.sum())
    if not mask[:length].all():
        raise ValueError("attention_mask has holes: the tokens of a text are its first ones")
    return max(length, 1)


def _posterior(file: str, name: str | None, size: tuple[int, int]) -> list[np.ndarray]:
    """[mean, std], each [height/8, width/8, c]. Raises UserError for latents of another size."""
    latents, (h, w) = _load(file, name), (side // _FACTOR for side in size)
    if latents.shape[-2:] != (h, w):
        raise UserError(f"{file} is of {list(latents.shape)}, its picture's latents of {[h, w]}")
    return np.split(latents.reshape(-1, h, w).transpose(1, 2, 0), 2, axis=-1)


@_repeated
def _load(file: str, name: str | None = None) -> Any:
    try:
        held = np.load(file)
        if name is None:
            return held
        with held:
            return held[name]
    except _DAMAGE as error:
        raise UserError(f"{file} is damaged: {one_line(error)}") from None
