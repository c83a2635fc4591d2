"""The features of the official PixArt repositories as training samples, with the face of encoded
records.

    {name}.npz in caption_feature…   caption_feature float [1, l, c], attention_mask [1, l] (without
    one every token counts) {name}.npy in img_vae_feature…   float [2·c, height/8, width/8]: mean
    and std of the VAE's posterior, unscaled

Where the official tools differ about a name, each is tried: FOLDER_STEM (what the loaders look
for), FOLDER_STEM without what lies above, and STEM (what the extractor writes). A file belongs to
one picture: where several would share it by its bare stem, the first has it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import posixpath
import zipfile
import zlib
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from tqdm import tqdm

from pixart_jax.data.buckets import key_of
from pixart_jax.data.faults import BadRecord, BadRecords
from pixart_jax.data.samples import CaptionMix, pad_length
from pixart_jax.data.sources.layout import Entry, Layout, layout
from pixart_jax.data.sources.listed import READERS, write_cache_file
from pixart_jax.errors import UserError
from pixart_jax.files import cache_folder

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
_KEPT_FROM = 5_000
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class _Found:
    """Where a picture's features lie. latents: the file. texts: (file, tokens) by kind, None where
    there is none."""

    latents: str
    bucket: tuple[int, int]
    texts: tuple[tuple[str, int] | None, ...]


class FeatureSamples:
    """The pictures of a layout whose features are there and whole; the others are named and left
    out, and none takes their place.

    captions: kinds and weights: 'prompt' for the features of a data_info.json ('caption' for
    SAM's), 'sharegpt4v' for PixArt-Σ's second ones. latents: the folder of latents, where the
    layout holds several. Batches are those of data/encoded.py; label is −1 throughout, and size is
    that of the picture where the list knows it, else the bucket's.
    """

    identity = None  # nothing says which encoders made them

    def __init__(
        self,
        root: str,
        captions: Sequence[tuple[str, float]],
        max_text_tokens: int,
        *,
        latents: str | None = None,
        buckets: Sequence[tuple[int, int]] | None = None,
        faults: BadRecords | None = None,
    ):
        self.faults = BadRecords() if faults is None else faults
        self.name = f"pixart-features:{root}"
        where = layout(root)
        folder = _latents_folder(where.root, latents)
        held = _text_folders(where)
        self._mix = CaptionMix(captions, tuple(held), self.name) if captions else None
        self._kinds = self._mix.kinds if self._mix else ()
        self._entries = list(where.entries(self.faults))
        self._found = self._look(where, folder, [held[kind] for kind in self._kinds])
        self.buckets = tuple(sorted({found.bucket for found in self._found if found}))
        if not self.buckets:
            raise UserError(
                f"{self.name}: no picture has all its features "
                f"({self.faults.summary() or 'the lists are empty'})"
            )
        if buckets is not None and (
            others := [
                bucket for bucket in self.buckets if bucket not in {tuple(b) for b in buckets}
            ]
        ):
            shown = ", ".join(f"{h}×{w}" for h, w in others[:4])
            raise UserError(
                f"{self.name} holds latents of {shown} px, which are none of the stage's buckets: "
                "name theirs"
            )
        self._ratios = [key_of(bucket) for bucket in self.buckets]
        numbers = {bucket: number for number, bucket in enumerate(self.buckets)}
        self.bucket_of = np.array(
            [numbers[found.bucket] if found else -1 for found in self._found], np.int16
        )
        self.length = 0
        if self._mix:
            longest = max(text[1] for found in self._found if found for text in found.texts if text)
            if longest > max_text_tokens:
                raise UserError(
                    f"{self.name} holds texts of {longest} tokens, more than max_text_tokens = "
                    f"{max_text_tokens}: raise it"
                )
            self.length = pad_length(longest, max_text_tokens)

    def __len__(self) -> int:
        return len(self.bucket_of)

    # ---- what is there ----

    def _look(
        self, where: Layout, folder: pathlib.Path, texts: list[pathlib.Path]
    ) -> list[_Found | None]:
        """Each entry's files, by one pass over their headers; of a large set it is kept in the
        cache folder."""
        files = [*where.lists, folder, *texts]
        seal = hashlib.sha256(
            repr(
                [(str(file.resolve()), file.stat().st_mtime_ns, self._kinds) for file in files]
            ).encode()
        ).hexdigest()
        kept = cache_folder() / "features" / f"{seal}.json"
        count = len(self._entries)
        if count >= _KEPT_FROM and kept.exists():
            said = json.loads(kept.read_text(encoding="utf-8"))
            self.faults.extend(BadRecord(*fault) for fault in said["faults"])
            return [
                found
                and _Found(
                    found[0], tuple(found[1]), tuple(text and tuple(text) for text in found[2])
                )
                for found in said["found"]
            ]
        seen = BadRecords()
        with (
            concurrent.futures.ThreadPoolExecutor(READERS) as readers,
            tqdm(
                total=count, desc=f"headers of {self.name}", unit=" images", delay=2, leave=False
            ) as bar,
        ):
            found: list[_Found | None] = []
            for start in range(0, count, 4096):
                some = self._entries[start : start + 4096]
                for one, faults in readers.map(
                    lambda entry: _features_of(entry, folder, texts), some
                ):
                    found.append(one)
                    seen.extend(faults)
                    bar.update()
        found = self._alone(found, seen)
        self.faults.extend(seen)
        if count >= _KEPT_FROM:
            said = {
                "faults": [dataclasses.astuple(f) for f in seen],
                "found": [f and dataclasses.astuple(f) for f in found],
            }
            write_cache_file(kept, lambda out: out.write(json.dumps(said).encode()))
        return found

    def _alone(self, found: list[_Found | None], faults: BadRecords) -> list[_Found | None]:
        """Whoever's file an earlier entry has already is left out: it is that one's picture."""
        taken: set[str] = set()
        for number, one in enumerate(found):
            if one:
                if one.latents in taken:
                    entry = self._entries[number]
                    faults.add(
                        f"{entry.place}, {entry.path}",
                        "key twice",
                        f"{one.latents} is of an earlier picture",
                    )
                    found[number] = None
                taken.add(one.latents)
        return found

    # ---- batches ----

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket, each with the text that its draw chooses; UserError names a file that
        cannot be read (any more)."""
        height, width = self.buckets[bucket]
        means, stds, sizes, keys = [], [], [], []
        states, lengths = None, np.zeros(len(indices), np.int32)
        for row, (index, draw) in enumerate(zip(indices, draws, strict=True)):
            found, entry = self._found[int(index)], self._entries[int(index)]
            both = (
                _load(found.latents)
                .astype(np.float32)
                .reshape(-1, height // _FACTOR, width // _FACTOR)
                .transpose(1, 2, 0)
            )
            half = both.shape[-1] // 2
            means.append(both[..., :half])
            stds.append(both[..., half:])
            known = entry.fields.get("height"), entry.fields.get("width")
            sizes.append(
                known
                if all(isinstance(side, int | float) and side > 0 for side in known)
                else (height, width)
            )
            keys.append(posixpath.splitext(entry.path)[0] if entry.fields else entry.path)
            if self._mix:
                present = {
                    kind for kind, text in zip(self._kinds, found.texts, strict=True) if text
                }
                kind, _ = self._mix.choose(float(draw), present)
                file, length = found.texts[self._kinds.index(kind)]
                text = _load(file, "caption_feature")
                text = text.reshape(-1, text.shape[-1])[:length]
                if states is None:
                    states = np.zeros(
                        (len(indices), self.length, text.shape[-1]), ml_dtypes.bfloat16
                    )
                states[row, :length] = text
                lengths[row] = length
        batch = {
            "mean": np.stack(means),
            "std": np.stack(stds),
            "label": np.full(len(indices), -1, np.int32),
            "size": np.array(sizes, np.float32),
            "aspect_ratio": np.full(len(indices), self._ratios[bucket], np.float32),
            "key": np.array(keys),
        }
        return batch | ({"text_states": states, "text_lengths": lengths} if self._mix else {})


def _latents_folder(root: pathlib.Path, given: str | None) -> pathlib.Path:
    if given:
        for folder in (root / given, pathlib.Path(given)):
            if folder.is_dir():
                return folder
        raise UserError(
            f"pixart-features:{root}: no folder of latents {given!r}, neither there nor here"
        )
    found = sorted(
        {folder for pattern in _LATENTS for folder in root.glob(pattern) if folder.is_dir()}
    )
    if not found:
        raise UserError(
            f"pixart-features:{root}: no folder of latents, as "
            "img_vae_features_256resolution/noflip; name one by ?latents=DIR"
        )
    if len(found) > 1:
        several = ", ".join(str(folder.relative_to(root)) for folder in found)
        raise UserError(
            f"pixart-features:{root} holds several folders of latents: {several}; name one by "
            "?latents=DIR"
        )
    return found[0]


def _text_folders(where: Layout) -> dict[str, pathlib.Path]:
    """Kind of text → folder of its features."""
    kinds = {where.text_kind: _TEXTS, **_MORE_TEXTS}
    found = {
        kind: next((where.root / name for name in names if (where.root / name).is_dir()), None)
        for kind, names in kinds.items()
    }
    return {kind: folder for kind, folder in found.items() if folder}


def _names(path: str) -> list[str]:
    """What the features of a picture may be called, without suffix."""
    stem = posixpath.splitext(path)[0] if "." in posixpath.basename(path) else path
    joined = "_".join(stem.rsplit("/", 1))
    base = posixpath.basename(stem)
    # the extractor takes the folder above for it
    above = [] if "/" in path else [f"InternImgs_{base}", f"InternImgs_{base}".split(".")[0]]
    return list(
        dict.fromkeys(
            [
                joined,
                posixpath.basename(joined),
                base,
                posixpath.basename(joined).split(".")[0],
                *above,
            ]
        )
    )


def _features_of(
    entry: Entry, folder: pathlib.Path, texts: Sequence[pathlib.Path]
) -> tuple[_Found | None, list[BadRecord]]:
    """None, and what is wrong, where latents or all texts are missing or damaged."""
    place = f"{entry.place}, {entry.path}"
    names = _names(entry.path)
    latents = _first(folder, names, ".npy")
    if latents is None:
        return None, [BadRecord(place, "missing features", f"no {names[0]}.npy in {folder.name}")]
    try:
        bucket = _bucket(latents)
    except _DAMAGE as fault:
        return None, [BadRecord(str(latents), "unreadable features", str(fault))]
    held, faults = [], []
    for kind in texts:
        file = _first(kind, names, ".npz")
        try:
            held.append((str(file), _tokens(file)) if file else None)
        except _DAMAGE as fault:
            faults.append(BadRecord(str(file), "unreadable features", str(fault)))
            held.append(None)
    if texts and not any(held):
        missing = BadRecord(
            place,
            "missing features",
            f"no {names[0]}.npz in {', '.join(kind.name for kind in texts)}",
        )
        return None, faults or [missing]
    return _Found(str(latents), bucket, tuple(held)), faults


def _first(folder: pathlib.Path, names: Sequence[str], suffix: str) -> pathlib.Path | None:
    return next((file for name in names if (file := folder / f"{name}{suffix}").is_file()), None)


def _bucket(file: pathlib.Path) -> tuple[int, int]:
    """(height, width) in px of latents, from their header; ValueError where the file is cut or no
    posterior."""
    with open(file, "rb") as data:
        version = np.lib.format.read_magic(data)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, column_major, dtype = read(data)
        expected = data.tell() + int(np.prod(shape)) * dtype.itemsize
    if file.stat().st_size != expected:
        raise ValueError(f"{file.stat().st_size} bytes, {expected} were written")
    shape = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
    if len(shape) != 3 or shape[0] % 2 or column_major or dtype.kind != "f" or 0 in shape:
        raise ValueError(
            f"{dtype} {shape} is no posterior: float [2·channels, height/8, width/8] is wanted"
        )
    return shape[1] * _FACTOR, shape[2] * _FACTOR


def _tokens(file: pathlib.Path) -> int:
    """Tokens of a text's states, at least 1; ValueError where its mask has holes."""
    with np.load(file) as held:
        if "caption_feature" not in held:
            raise ValueError("holds no caption_feature")
        if "attention_mask" in held:
            mask = held["attention_mask"].reshape(-1) != 0
            length = int(mask.sum())
            if not mask[:length].all():
                raise ValueError(
                    "attention_mask has holes: the tokens of a text are its first ones"
                )
            return max(length, 1)
        return held["caption_feature"].size // held["caption_feature"].shape[-1]


def _load(file: str, name: str | None = None) -> np.ndarray:
    try:
        held = np.load(file)
        if name is None:
            return held
        with held:
            return held[name]
    except _DAMAGE as fault:
        raise UserError(f"{file} is damaged: {' '.join(str(fault).split())[:160]}") from None
