"""Any tensorflow-datasets set with images, without TensorFlow."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.machinery
import importlib.util
import io
import os
import pathlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from pixart_jax.data.sources import texts
from pixart_jax.data.sources.indexed import Choice, Facts, IndexedSource, filter_identity
from pixart_jax.data.sources.sample import Captions, Sample
from pixart_jax.errors import UserError, nearest, one_line
from pixart_jax.files import cache_folder, locked

# texts of a set that do not describe its images
_NAMES = ("file_name", "filename", "image_id", "url")
_DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()


class TfdsSource(IndexedSource):
    """Any tensorflow-datasets set with an image, read from ArrayRecord; prepared if it is absent.

    The first Image feature is the image, the first ClassLabel (or an integer 'label') the label;
    every text is a caption kind under its path ('captions/text'); class names are 'class'.
    """

    same_fields = True

    def __init__(
        self,
        name: str,
        choice: Choice,
        split: str = "train",
        data_dir: str | os.PathLike | None = None,
    ):
        import tensorflow_datasets as tfds

        builder = _builder(name, pathlib.Path(data_dir) if data_dir else _tfds_folder(name))
        self._roles = _Roles(builder.info.features, name)
        try:
            decoders = {self._roles.image: tfds.decode.SkipDecoding()}
            self._records = builder.as_data_source(split, decoders=decoders)
        except (ValueError, KeyError, NotImplementedError) as error:
            splits = ", ".join(builder.info.splits) or "none"
            raise UserError(
                f"tfds:{name} has no split {split!r} (of {splits}): {one_line(error, 200)}"
            ) from error
        self.faults = choice.faults
        self.name, self.split = f"tfds:{name}", split
        self.caption_kinds = (*self._roles.texts, *(["class"] if self._roles.classes else []))
        self._prefix = f"{builder.info.full_name}/{split}"
        self._choose(len(self._records), [builder.info.full_name, split], choice)
        # that of earlier versions: the shards which they encoded are found by it
        chosen = filter_identity(choice.where), choice.limit
        state = (builder.info.full_name, split, len(self._records), *chosen)
        self.fingerprint = hashlib.sha256(repr(state).encode()).hexdigest()
        self._folder = pathlib.Path(builder.data_dir)

    def _sizes_identity(self) -> str:
        """The fingerprint and the files: a set may be prepared again under its name."""
        files = sorted(self._folder.glob("*")) if self._folder.is_dir() else []
        stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(f"{self.fingerprint} {stamp}".encode()).hexdigest()

    def _key(self, place: int, record: Mapping[str, Any] | None = None) -> str:
        if self._roles.key is None:
            return f"{self._prefix}/{place:08d}"
        return _strings(record or self._records[place], self._roles.key)[0]

    def _facts(self, place: int, record: Mapping[str, Any] | None = None) -> Facts:
        record = record or self._records[place]
        label = int(record[self._roles.label]) if self._roles.label else -1

        def captions() -> Captions:
            key, found = self._key(place, record), {}
            for kind, path in self._roles.texts.items():
                some = _strings(record, path)
                cleaned = (texts.clean_text(text, key, kind, self.faults) for text in some)
                found[kind] = tuple(text for text in cleaned if text)
            if self._roles.classes and label >= 0:
                found["class"] = (self._roles.classes[label],)
            return found

        return Facts(label, record, captions)

    def _sample(self, place: int) -> Sample:
        record = self._records[place]
        facts = self._facts(place, record)
        image = record[self._roles.image]
        return Sample(self._key(place, record), image, facts.captions(), facts.label)

    def _open(self, place: int) -> BinaryIO:
        return io.BytesIO(self._records[place][self._roles.image])


class _Roles:
    """Of a set's features: image, label, class names, caption kind → path, path of a text 'key'."""

    def __init__(self, features, name: str):
        from tensorflow_datasets import features as tf

        def first(kind: type) -> str | None:
            return next((key for key, f in features.items() if isinstance(f, kind)), None)

        image, self.label = first(tf.Image), first(tf.ClassLabel)
        if image is None:
            raise UserError(f"tfds:{name} has no image feature (features: {', '.join(features)})")
        self.image = image
        self.classes: list[str] | None = features[self.label].names if self.label else None
        if self.label is None and "label" in features:
            self.label = "label" if not isinstance(features["label"], tf.Text) else None
        self.texts: dict[str, tuple[str, ...]] = {}

        def walk(node, path: tuple[str, ...]) -> None:
            scalar = isinstance(node, tf.Tensor) and node.shape == ()
            if isinstance(node, tf.Text) or (scalar and np.dtype(node.np_dtype).kind == "O"):
                if path[-1].rsplit("/", 1)[-1] not in _NAMES:
                    self.texts["/".join(path)] = path
            elif isinstance(node, tf.FeaturesDict):
                for key, child in node.items():
                    walk(child, (*path, key))
            elif isinstance(node, tf.Sequence):
                walk(node.feature, path)

        walk(features, ())
        self.key = self.texts.pop("key", None)


def _tfds_folder(name: str) -> pathlib.Path:
    """$TFDS_DATA_DIR; else ~/tensorflow_datasets where it is; else in the cache folder."""
    if given := os.environ.get("TFDS_DATA_DIR"):
        return pathlib.Path(given)
    home = pathlib.Path("~/tensorflow_datasets").expanduser()
    if (home / name.split("/")[0].split(":")[0]).is_dir():
        return home
    return cache_folder() / "tensorflow_datasets"


def _builder(name: str, data_dir: pathlib.Path):
    """The builder of a set that is prepared in ``data_dir``, by this process if need be."""
    import tensorflow_datasets as tfds

    if name.split("/")[0].split(":")[0] == "shapes":
        import pixart_jax.data.shapes_builder  # noqa: F401 - registers the embedded world
    try:
        with stand_in():
            builder = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(
            f"no tensorflow-datasets set is called {name!r}{nearest(name, known)}"
        ) from None
    except (ValueError, ModuleNotFoundError) as error:  # an unknown config, or TensorFlow is needed
        hint = ""
        with contextlib.suppress(Exception):
            set_name = name.split("/")[0]
            configs = tfds.builder_cls(set_name).builder_configs
            hint = nearest(name, [f"{set_name}/{config}" for config in configs]) if configs else ""
        raise UserError(f"tfds:{name} cannot be opened{hint}: {one_line(error, 200)}") from None
    if builder.info.splits:
        return builder
    data_dir.mkdir(parents=True, exist_ok=True)
    checked = tfds.download.DownloadConfig(verify_ssl=True)
    # two processes of one machine must not prepare one set at once
    lock = data_dir / f".{name.replace('/', '-').replace(':', '-')}.lock"
    try:
        with locked(lock), stand_in():
            builder.download_and_prepare(download_config=checked)
    except ModuleNotFoundError as error:
        raise UserError(
            f"tfds:{name} cannot be built here: its builder needs {error.name}"
        ) from None
    except AssertionError as error:  # files that the user has to fetch are not there
        raise UserError(f"tfds:{name} cannot be built: {one_line(error, 400)}") from None
    return builder


def _strings(fields: Any, path: tuple[str, ...]) -> tuple[str, ...]:
    """The texts at a path of a record."""
    for step in path:
        fields = fields[step]
    values = fields if isinstance(fields, list | tuple | np.ndarray) else [fields]
    return tuple(v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values)


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Let ``import tensorflow`` give file functions and dtypes, unless TensorFlow is installed.

    Many builders, ImageNet's and COCO's among them, need no more of it to prepare a set. One that
    does gets the ModuleNotFoundError that it would get without this.
    """
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    sys.modules["tensorflow"] = _tensorflow()
    try:
        yield
    finally:
        del sys.modules["tensorflow"]


def _tensorflow() -> types.ModuleType:
    from tensorflow_datasets.core import as_path

    class GFile:
        def __new__(cls, name, mode="r"):
            return as_path(os.fspath(name)).open(mode)

    def find(patterns) -> list[str]:
        patterns = [patterns] if isinstance(patterns, str | os.PathLike) else patterns
        return [found for pattern in patterns for found in glob.glob(str(pattern))]

    def absent(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError(f"this needs TensorFlow itself (tf.{name})", name="tensorflow")

    gfile = types.SimpleNamespace(
        GFile=GFile,
        Open=GFile,
        exists=lambda path: as_path(path).exists(),
        isdir=lambda path: as_path(path).is_dir(),
        listdir=lambda path: [child.name for child in as_path(path).iterdir()],
        makedirs=lambda path: as_path(path).mkdir(parents=True, exist_ok=True),
        glob=find,
        walk=os.walk,
        join=os.path.join,
    )
    module = types.ModuleType("tensorflow")
    contents = {
        "__spec__": importlib.machinery.ModuleSpec("tensorflow", None),
        "__version__": "2.20.0",  # tensorflow-datasets asks for 2.1 or newer
        "io": types.SimpleNamespace(gfile=gfile),
        "string": object,
        "dtypes": types.SimpleNamespace(DType=type("DType", (), {}), as_dtype=np.dtype),
        **{name: np.dtype(name).type for name in _DTYPES},
        # values are only compared with these
        **{name: type(name, (), {}) for name in ("Tensor", "RaggedTensor", "SparseTensor")},
        "__getattr__": absent,
    }
    vars(module).update(contents)
    return module
