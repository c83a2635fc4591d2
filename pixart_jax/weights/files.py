"""Tensor files, read and written one tensor at a time: safetensors (one file, or shards with an
index) and PyTorch's .pth, .pt, .bin.

PyTorch files are opened by torch's weights-only loader; others than plain data are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from pixart_jax.errors import Notice, UserError, one_line
from pixart_jax.files import SAFETENSORS_DTYPES, atomic_write, safetensors_header
from pixart_jax.remote_path import Location

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
# weights files of a component folder, in order of preference
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_WEIGHTS = re.compile(
    rf"(?:{'|'.join(STEMS)})(\.[a-z]\w*)?(?:-\d{{5}}-of-\d{{5}})?(\.[a-z]\w*)?"
    r"\.(?P<kind>safetensors|bin)(?:\.index(\.[a-z]\w*)?\.json)?"
)


class Entry(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    advise: Callable[[str], None]  # madvise on its pages, by the name of the advice


class Tensors(Mapping[str, np.ndarray]):
    """{key: array} of one or several files, read on access. ``source`` names them in messages."""

    def __init__(self, source: str, entries: Mapping[str, Entry]):
        self.source, self.entries = source, entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.entries[key].read()

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self.entries[key].shape

    def prefetch(self, key: str) -> None:
        """Ask the system to read the tensor's pages in the background."""
        self.entries[key].advise("MADV_WILLNEED")

    def release(self, key: str) -> None:
        """Free the memory of the tensor's pages in a mapped file."""
        self.entries[key].advise("MADV_DONTNEED")

    def renamed(self, key_of: Mapping[str, str]) -> Tensors:
        """The tensors under other names, or some of them: {new key: current key}."""
        return Tensors(self.source, {new: self.entries[key] for new, key in key_of.items()})


class SafetensorsFile(Tensors):
    """One .safetensors file, memory mapped: arrays are views of the file."""

    def __init__(self, path: Path):
        try:
            # checks the header, and that the tensors cover the file exactly
            with safetensors.safe_open(path, "np"):
                pass
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read as safetensors, it is damaged or cut short "
                f"({_first_line(error)}): copy it again"
            ) from None
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._bytes = np.frombuffer(self._map, np.uint8)
        super().__init__(str(path), {key: self._entry(8 + length, header[key]) for key in header})

    def _entry(self, base: int, fields: Mapping) -> Entry:
        dtype, shape = fields["dtype"], tuple(fields["shape"])
        start, stop = (base + offset for offset in fields["data_offsets"])

        def read() -> np.ndarray:
            if dtype not in SAFETENSORS_DTYPES:
                raise UserError(f"{self.source}: the dtype {dtype} of a tensor is not known")
            return self._bytes[start:stop].view(SAFETENSORS_DTYPES[dtype]).reshape(shape)

        def advise(advice: str) -> None:
            first = start - start % mmap.PAGESIZE
            if stop > first and hasattr(mmap, advice):
                self._map.madvise(getattr(mmap, advice), first, stop - first)

        return Entry(shape, read, advise)


class TorchFile(Tensors):
    """One PyTorch file of tensors, memory mapped where its format allows. A tensor in a mapping in
    it has the key 'state_dict/name'. empty: the keys of what holds no tensors there."""

    def __init__(self, path: Path):
        content = _torch_load(path)
        tensors = dict(_nested(content))
        if not tensors:
            raise UserError(
                f"{path} holds no tensors by name (it holds: "
                f"{', '.join(map(str, list(content)[:8])) or 'nothing'})"
            )
        self.empty = [
            str(key)
            for key, value in content.items()
            if value is None or (isinstance(value, Mapping) and not value)
        ]
        mapped = _mapped(path)
        super().__init__(str(path), {key: _torch_entry(t, mapped) for key, t in tensors.items()})


def _nested(content: Mapping, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _nested(value, f"{above}{key}/")
        elif hasattr(value, "numpy"):
            yield f"{above}{key}", value


def _torch_entry(tensor, mapped: list[tuple[int, int]]) -> Entry:
    def read() -> np.ndarray:
        import torch

        if tensor.dtype == torch.bfloat16:
            return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.detach().numpy()

    def advise(advice: str) -> None:
        import ctypes

        storage = tensor.untyped_storage()
        start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        start -= start % mmap.PAGESIZE
        # only pages of the mapped file: others would lose their values
        if any(first <= start and stop <= last for first, last in mapped):
            size = ctypes.c_size_t(stop - start)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, getattr(mmap, advice))

    return Entry(tuple(tensor.shape), read, advise)


def _open_shards(index: Path) -> Tensors:
    """The tensors of all shards of an index."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{index} is no index of shards (an object with weight_map): copy it again"
        ) from None
    missing = sorted({name for name in names.values() if not (index.parent / name).is_file()})
    if missing:
        raise UserError(
            f"{index} names {len(missing)} missing shards: "
            f"{', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}"
        )
    shards = {name: open_tensors(index.parent / name) for name in dict.fromkeys(names.values())}
    for key, name in names.items():
        if key not in shards[name]:
            raise UserError(
                f"{index.parent / name} lacks {key}, which {index} says is there: copy both again"
            )
    return Tensors(str(index), {key: shards[name].entries[key] for key, name in names.items()})


def open_tensors(path: str | os.PathLike) -> Tensors:
    """Open a .safetensors file, an …index.json of shards, or a PyTorch file.

    UserError, naming the file, when it is missing, damaged, of an unknown kind, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}")
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(path)
    raise UserError(
        f"{path}: weights are .safetensors (or .index.json), {', '.join(TORCH_SUFFIXES)}"
    )


def read_json(path: Location) -> dict[str, Any]:
    """The JSON object in a file of a model folder. UserError without one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: it is not complete") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise a UserError that names the file when parsing it fails on a value of a wrong type."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path}: a value is not valid ({reason})") from None


WeightSets = dict[tuple[str, str], list[str]]  # (safetensors or bin, variant) → files


def weight_sets(names: Iterable[str]) -> WeightSets:
    """The sets of weights among the files of a component folder; '' is the variant of the plain
    one. Each is one file, or shards and their index."""
    sets: WeightSets = {}
    for name in names:
        if match := _WEIGHTS.fullmatch(name):
            variant = next((match[n][1:] for n in (1, 2, 4) if match[n]), "")
            sets.setdefault((match["kind"], variant), []).append(name)
    return sets


def choose_set(sets: WeightSets, variant: str | None, where: str) -> tuple[str, str]:
    """The key of the set to read: of ``variant``; by default the plain one, or the only one.
    Safetensors before .bin. UserError where there is none, or several and none is named."""
    kinds = [kind for kind in ("safetensors", "bin") if any(kind == of for of, _ in sets)]
    if variant is not None:
        found = [(kind, variant) for kind in kinds if (kind, variant) in sets]
    else:
        found = [key for key in sets if key[0] == kinds[0]]
        found = [key for key in found if not key[1]] or found
    if len(found) == 1 or (found and variant is not None):
        return found[0]
    known = ", ".join(sorted({of or "none" for kind, of in sets if variant or kind == kinds[0]}))
    raise UserError(
        f"{where} has no weights of variant {variant or 'none'!r}: there are {known}; choose one "
        "with --variant"
    )


def part_variants(model: Path, parts: Iterable[str], variant: str | None) -> dict[str, str | None]:
    """The variant to load of each part of a model: ``variant``, or, with a Notice, the default
    where only other parts have it. UserError where no part has it."""
    sets = {
        part: weight_sets(os.listdir(model / part)) for part in parts if (model / part).is_dir()
    }
    have = [part for part, found in sets.items() if any(variant == of for _, of in found)]
    if variant is None or not any(sets.values()):
        return dict.fromkeys(parts)
    if not have:
        known = sorted({of or "none" for found in sets.values() for _, of in found})
        raise UserError(
            f"{model} has no weights of variant {variant!r}: there are {', '.join(known)}"
        )
    if lacking := [part for part, found in sets.items() if found and part not in have]:
        message = f"{model}: {', '.join(lacking)} without weights of variant {variant!r}"
        warnings.warn(f"{message}: the others are taken", Notice, stacklevel=2)
    return {part: variant if part in have else None for part in parts}


def find_weights(folder: str | os.PathLike, variant: str | None = None) -> Path:
    """The weights file or index of a component folder, as ``choose_set`` chooses."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    sets = weight_sets(names)
    if not sets:
        raise UserError(
            f"{folder} holds no weights: {STEMS[0]}.safetensors or {STEMS[1]}.safetensors would do"
        )
    found = sets[choose_set(sets, variant, str(folder))]
    heads = [name for name in found if not re.search(r"-\d{5}-of-\d{5}", name)]
    if not heads:
        raise UserError(f"{folder} holds no weights: of {found[0]} the index.json is missing")
    stems = {stem: n for n, stem in enumerate(STEMS)}
    return folder / min(heads, key=lambda name: (".index." in name, stems[name.split(".")[0]]))


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written, whose values are computed when it is written.

    parts: gives its values, as one array or as consecutive parts of it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterable[np.ndarray]]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        value = np.concatenate([np.reshape(part, -1) for part in self.parts()])
        return value.reshape(self.shape).astype(dtype or self.dtype, copy=False)


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping, metadata: Mapping[str, str] | None = None
) -> None:
    """Write {key: array or LazyTensor} atomically, with one tensor, or one part of it, in memory at
    a time.

    The metadata names the format "pt", without which diffusers and transformers refuse a file.
    Tensors of a multiple of 64 bytes come first and are aligned to it, so that arrays can be used
    in place. UserError when the file cannot be written.
    """
    order = write_order(tensors)
    pairs = ((key, tensors[key]) for key in order)
    header = safetensors_header(pairs, {"format": "pt", **(metadata or {})}, align=64)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(header)
            for key in order:
                tensor, written = tensors[key], 0
                for part in tensor.parts() if isinstance(tensor, LazyTensor) else (tensor,):
                    part = np.ascontiguousarray(part, tensor.dtype)
                    written += file.write(part.reshape(-1).view(np.uint8).data)
                if written != _size(tensor):
                    raise ValueError(f"{key}: {written} bytes were given for {_size(tensor)}")
    except OSError as error:
        raise UserError(f"cannot write {path}: {_first_line(error)}") from None


def write_order(tensors: Mapping) -> list[str]:
    """The keys in the order of ``write_safetensors``."""

    def place(key: str) -> tuple:
        return _size(tensors[key]) % 64 != 0, -np.dtype(tensors[key].dtype).itemsize, key

    return sorted(tensors, key=place)


def _size(tensor) -> int:
    """Bytes."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _torch_load(path: Path) -> Mapping:
    try:
        import torch
    except ImportError:
        raise UserError(
            f'{path} is a PyTorch file: pip install "pixart-jax[torch]", or use safetensors'
        ) from None
    import argparse
    import pickle

    def load(**options):
        # the options that DiT's trainer stores beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, **options)

    try:
        try:
            content = load(mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            content = load()  # the format before PyTorch 1.6
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
            raise UserError(
                f"{path} holds more than tensors, and opening it could run code"
            ) from None
        raise UserError(
            f"{path} cannot be read as a PyTorch file: it is damaged, or of another kind"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a PyTorch file, it is damaged or cut short "
            f"({_first_line(error)}): copy it again"
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content


def _mapped(path: Path) -> list[tuple[int, int]]:
    """Address ranges (first, last) at which this process maps a file (Linux alone)."""
    name, found = str(path.resolve()), []
    with contextlib.suppress(FileNotFoundError), open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] == name:
                first, last = fields[0].split("-")
                found.append((int(first, 16), int(last, 16)))
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
