"""Tensors in files, one at a time: safetensors (one file, or shards behind an index) and PyTorch's
.pth, .pt, .bin.

Nothing is unpickled: a PyTorch file is opened by torch's weights-only loader, and one that holds
more than plain data is refused.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from pixart_jax.errors import UserError

# safetensors' names of dtypes.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
# Weights of a component folder, in the order in which they are looked for.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


class Tensors(Mapping[str, np.ndarray]):
    """{key: array} of one file, read when asked for. ``source`` names the file in messages."""

    def __init__(self, source: str):
        self.source = source

    @abc.abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""

    def prefetch(self, key: str) -> None:
        """Tell the system that the tensor's pages are wanted soon, so that it reads them
        meanwhile."""

    def release(self, key: str) -> None:
        """Give the memory of the tensor's pages back; they are read again when they are asked for.
        Nothing, where no file is mapped."""


class SafetensorsFile(Tensors):
    """One .safetensors file, memory mapped: an array is a view of the file until somebody copies
    it."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        try:
            # checks the header, and that the tensors cover the file exactly
            with safetensors.safe_open(path, "np"):
                pass
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._header = json.loads(file.read(length))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata: dict[str, str] = self._header.pop("__metadata__", {})
            self._start = 8 + length
            self._bytes = np.frombuffer(self._map, np.uint8)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read as safetensors, it is damaged or cut short "
                f"({_first_line(error)}): copy it again"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._header[key]["shape"])

    def __getitem__(self, key: str) -> np.ndarray:
        entry = self._header[key]
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                f"{self.source}: {key} is of dtype {entry['dtype']}, which is not known"
            )
        start, stop = (self._start + offset for offset in entry["data_offsets"])
        return self._bytes[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def prefetch(self, key: str) -> None:
        self._advise(key, "MADV_WILLNEED")

    def release(self, key: str) -> None:
        self._advise(key, "MADV_DONTNEED")

    def _advise(self, key: str, advice: str) -> None:
        start, stop = (self._start + offset for offset in self._header[key]["data_offsets"])
        start -= start % mmap.PAGESIZE
        if stop > start and hasattr(mmap, advice):
            self._map.madvise(getattr(mmap, advice), start, stop - start)


class TorchFile(Tensors):
    """One PyTorch file of tensors, memory mapped where its format allows. branch: which of several
    state dicts in it was taken."""

    def __init__(self, path: Path, branches: tuple[str, ...] = ()):
        super().__init__(str(path))
        self.branch: str | None = None
        content = _torch_load(path)
        for name in branches:
            if isinstance(content.get(name), Mapping):
                self.branch, content = name, content[name]
                break
        self._tensors = {
            str(key): value for key, value in content.items() if hasattr(value, "numpy")
        }
        self._mapped = _mapped(path)
        if not self._tensors:
            raise UserError(
                f"{path} holds no tensors by name (it holds: "
                f"{', '.join(map(str, list(content)[:8])) or 'nothing'})"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def __getitem__(self, key: str) -> np.ndarray:
        import torch

        tensor = self._tensors[key].detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def release(self, key: str) -> None:
        import ctypes

        storage = self._tensors[key].untyped_storage()
        start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        start -= start % mmap.PAGESIZE
        # never memory that is not a mapped file's
        if any(first <= start and stop <= last for first, last in self._mapped):
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED
            )


class Shards(Tensors):
    """Several files behind one index.json; a shard is opened when a tensor of it is asked for."""

    def __init__(self, index: Path):
        super().__init__(str(index))
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._shard_of = {str(key): index.parent / name for key, name in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{index} is no index of shards (a JSON object with weight_map): it is damaged, "
                "copy it again"
            ) from None
        missing = sorted({shard.name for shard in self._shard_of.values() if not shard.is_file()})
        if missing:
            raise UserError(
                f"{index} names {len(missing)} missing shards: "
                f"{', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}"
            )
        self._open: dict[Path, Tensors] = {}

    def _shard(self, key: str) -> Tensors:
        path = self._shard_of[key]
        if path not in self._open:
            self._open[path] = open_tensors(path)
        if key not in self._open[path]:
            raise UserError(
                f"{path} lacks {key}, which {self.source} says is there: copy both again"
            )
        return self._open[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shard(key).shape(key)

    def __getitem__(self, key: str) -> np.ndarray:
        return self._shard(key)[key]

    def prefetch(self, key: str) -> None:
        self._shard(key).prefetch(key)

    def release(self, key: str) -> None:
        self._shard(key).release(key)


class Renamed(Tensors):
    """Tensors of a file under other names, or some of them."""

    def __init__(self, tensors: Tensors, key_of: Mapping[str, str]):
        super().__init__(tensors.source)
        self._tensors, self._key_of = tensors, key_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._key_of)

    def __len__(self) -> int:
        return len(self._key_of)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors.shape(self._key_of[key])

    def __getitem__(self, key: str) -> np.ndarray:
        return self._tensors[self._key_of[key]]

    def prefetch(self, key: str) -> None:
        self._tensors.prefetch(self._key_of[key])

    def release(self, key: str) -> None:
        self._tensors.release(self._key_of[key])


def open_tensors(path: str | os.PathLike, branches: tuple[str, ...] = ()) -> Tensors:
    """Open a .safetensors file, an …index.json of shards, or a PyTorch file.

    branches: names under which a PyTorch file may keep the state dict, the first that is there wins
    (('state_dict_ema', 'state_dict') for an official checkpoint's average); the file itself where
    none is. Raises UserError, naming the file, when it is missing, damaged, not of a known kind, or
    holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}")
    if path.name.endswith(".index.json"):
        return Shards(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(path, branches)
    raise UserError(
        f"{path}: weights are read from .safetensors, .safetensors.index.json, "
        f"{', '.join(TORCH_SUFFIXES)}"
    )


def find_weights(folder: str | os.PathLike) -> Path:
    """The file or index that holds a component folder's weights; UserError where there is none.
    safetensors before PyTorch's."""
    folder = Path(folder)
    for suffix in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"):
        for stem in STEMS:
            if (path := folder / f"{stem}{suffix}").is_file():
                return path
    raise UserError(
        f"{folder} holds no weights: {STEMS[0]}.safetensors or {STEMS[1]}.safetensors (or shards "
        "with their index.json) would do"
    )


@dataclasses.dataclass(frozen=True)
class ChunkedTensor:
    """A tensor to be written whose values come in parts, in their order, each made when it is its
    turn."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Iterable[np.ndarray]


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping, metadata: Mapping[str, str] | None = None
) -> None:
    """Write {key: anything with shape and dtype that numpy reads, or InParts}, one tensor, or one
    part, in memory at a time.

    Written beside ``path`` and then renamed, so that ``path`` is always a whole file. The file
    names its format "pt", without which diffusers and transformers refuse it. Tensors of a multiple
    of 64 bytes come first and begin at one, so that arrays can be used where they lie. Raises
    UserError when it cannot be written.
    """
    dtypes = {key: np.dtype(tensor.dtype) for key, tensor in tensors.items()}
    sizes = {key: math.prod(tensor.shape) * dtypes[key].itemsize for key, tensor in tensors.items()}
    order = write_order(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for key in order:
        dtype, size = dtypes[key], sizes[key]
        header[key] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensors[key].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)

    def save(staged: Path) -> None:
        with open(staged, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in order:
                tensor, written = tensors[key], 0
                for part in tensor.parts if isinstance(tensor, ChunkedTensor) else (tensor,):
                    written += file.write(
                        np.ascontiguousarray(part, dtypes[key]).reshape(-1).view(np.uint8).data
                    )
                if written != sizes[key]:
                    raise ValueError(f"{key}: {written} bytes were given for {sizes[key]}")

    write_atomically(path, save)


def write_order(tensors: Mapping) -> list[str]:
    """The keys as ``write_safetensors`` writes them, and asks for their values."""

    def place(key: str) -> tuple:
        itemsize = np.dtype(tensors[key].dtype).itemsize
        return math.prod(tensors[key].shape) * itemsize % 64 != 0, -itemsize, key

    return sorted(tensors, key=place)


def write_json(path: str | os.PathLike, values: Mapping) -> None:
    """Write a JSON object as ``write_safetensors`` writes."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda staged: staged.write_text(text, encoding="utf-8"))


def write_atomically(path: str | os.PathLike, write) -> None:
    """write(staged path), then rename to ``path``; on a failure nothing of it is left. Raises
    UserError for the system's refusals."""
    path = Path(path)
    staged = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        staged = Path(name)
        write(staged)
        os.chmod(staged, 0o666 & ~_umask())  # mkstemp's files are for their owner alone
        with open(staged, "rb") as file:
            os.fsync(file.fileno())
        os.replace(staged, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {path}: {_first_line(error)}") from None
    finally:
        if staged is not None:
            staged.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _torch_load(path: Path) -> Mapping:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a PyTorch file, which needs PyTorch to be read: pip install torch, or "
            "give a .safetensors file"
        ) from None
    import argparse
    import pickle

    def load(**options):
        # a bag of values, which DiT's trainer puts beside the weights
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
                f"{path} holds more than tensors, and opening it could run code: only plain "
                "weights are read"
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
    """Addresses (first, last) at which this process has a file mapped, by Linux's account; none
    where that cannot be had."""
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
