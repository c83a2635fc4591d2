"""Any tensorflow-datasets set with pictures, without TensorFlow."""

from __future__ import annotations

import hashlib
import os
import pathlib

import numpy as np

from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import filters, texts, tf_files
from pixart_jax.data.sources.listed import image_sizes
from pixart_jax.data.sources.sample import Sample
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import cache_folder


def _tfds_folder(name: str) -> pathlib.Path:
    """$TFDS_DATA_DIR; else ~/tensorflow_datasets where the set already lies there; else below the
    cache folder."""
    if given := os.environ.get("TFDS_DATA_DIR"):
        return pathlib.Path(given)
    home = pathlib.Path("~/tensorflow_datasets").expanduser()
    return (
        home
        if (home / name.split("/")[0].split(":")[0]).is_dir()
        else cache_folder() / "tensorflow_datasets"
    )


# texts of a set that say nothing of its pictures
_NAMES = ("file_name", "filename", "image_id", "url")


class TfdsSource:
    """Any tensorflow-datasets set with an image, read from ArrayRecord without TensorFlow; built
    where it is absent.

    The first Image feature is the image, the first ClassLabel (or an integer 'label') the label;
    every text is a caption kind under its path ('short', 'captions/text'), and class names are the
    kind 'class'. Images stay encoded until asked for.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        where: str | None = None,
        limit: int | None = None,
        data_dir: str | os.PathLike | None = None,
        faults: BadRecords | None = None,
    ):
        import tensorflow_datasets as tfds

        builder = _builder(name, pathlib.Path(data_dir) if data_dir else _tfds_folder(name))
        self._image, self._label, self._class_names, self._texts = _roles(
            builder.info.features, name
        )
        self._key = self._texts.pop("key", None)
        try:
            self._records = builder.as_data_source(
                split, decoders={self._image: tfds.decode.SkipDecoding()}
            )
        except (ValueError, KeyError, NotImplementedError) as fault:
            splits = ", ".join(builder.info.splits) or "none"
            reason = " ".join(str(fault).split())[:200]
            raise UserError(
                f"tfds:{name} has no split {split!r} that can be read at random (splits: "
                f"{splits}): {reason}"
            ) from fault
        self.faults = BadRecords() if faults is None else faults
        self.name = f"tfds:{name}"
        self.split = split
        self.num_classes = len(self._class_names) if self._class_names else None
        self.caption_kinds = tuple(self._texts) + (("class",) if self._class_names else ())
        self._prefix = f"{builder.info.full_name}/{split}"
        self._kept = self._select(where, limit)
        if len(self) == 0:
            raise UserError(
                f"{self.name}, split {split!r}, holds no "
                f"sample{f' that passes the filter {where!r}' if where else ''}"
            )
        state = repr(
            (builder.info.full_name, split, len(self._records), filters.identity(where), limit)
        )
        self.fingerprint = hashlib.sha256(state.encode()).hexdigest()
        self._stamp = _stamp(pathlib.Path(builder.data_dir))
        self._sizes: np.ndarray | None = None

    def _select(self, where: str | None, limit: int | None) -> np.ndarray | None:
        """Indices into the split that pass the filter, int64; None for all."""
        if where is None:
            return None if limit is None else np.arange(min(limit, len(self._records)))
        passes, kept = filters.get_filter(where), []
        for index in range(len(self._records)):
            if len(kept) == limit:
                break
            try:
                if passes(self._records[index]):
                    kept.append(index)
            except KeyError as fault:
                raise UserError(
                    f"filter {where!r} needs the field {fault.args[0]!r}, which {self.name} does "
                    "not have"
                ) from None
        return np.array(kept, np.int64)

    def __len__(self) -> int:
        return len(self._records) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        place = index if self._kept is None else int(self._kept[index])
        fields = self._records[place]
        key = _strings(_at(fields, self._key))[0] if self._key else f"{self._prefix}/{place:08d}"
        captions = {}
        for kind, path in self._texts.items():
            said = (
                texts.clean_text(text, key, kind, self.faults)
                for text in _strings(_at(fields, path))
            )
            captions[kind] = tuple(text for text in said if text)
        label = int(fields[self._label]) if self._label else -1
        if self._class_names and label >= 0:
            captions["class"] = (self._class_names[label],)
        return Sample(key, fields[self._image], captions, label)

    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: (height, width) of every sample; (0, 0) for an unreadable image. One pass
        over headers, then kept."""
        if self._sizes is None:
            # a set may be built anew under its name
            seal = hashlib.sha256(f"{self.fingerprint} {self._stamp}".encode()).hexdigest()
            self._sizes = image_sizes(len(self), lambda index: self[index].size(), seal, self.name)
        return self._sizes


def _stamp(folder: pathlib.Path) -> str:
    """Names, sizes and times of a built set's files."""
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    return repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _builder(name: str, data_dir: pathlib.Path):
    import tensorflow_datasets as tfds

    if name.split("/")[0].split(":")[0] == "shapes":
        import pixart_jax.data.shapes_builder  # noqa: F401 - registers the embedded world
    try:
        with tf_files.stand_in():
            builder = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        raise UserError(
            "no tensorflow-datasets set is called "
            f"{name!r}{nearest(name, tfds.list_builders(with_community_datasets=False))}"
        ) from None
    # an unknown config, or a set that cannot be built without TensorFlow
    except (ValueError, ModuleNotFoundError) as fault:
        known = [f"{name.split('/')[0]}/{config}" for config in _configs(name)]
        hint = nearest(name, known) if known else ""
        raise UserError(
            f"tfds:{name} cannot be opened{hint}: {' '.join(str(fault).split())[:200]}"
        ) from None
    if not builder.info.splits:
        data_dir.mkdir(parents=True, exist_ok=True)
        with _lock(data_dir / f".{name.replace('/', '-').replace(':', '-')}.lock"):
            try:
                with tf_files.stand_in():
                    builder.download_and_prepare(
                        download_config=tfds.download.DownloadConfig(verify_ssl=True)
                    )
            except ModuleNotFoundError as fault:
                raise UserError(
                    f"tfds:{name} cannot be built here: its builder needs {fault.name}"
                ) from None
            # files that a person has to fetch are not where the builder looks for them
            except AssertionError as fault:
                said = " ".join(str(fault).split())
                raise UserError(f"tfds:{name} cannot be built: {said[:400]}") from None
    return builder


def _configs(name: str) -> list[str]:
    import tensorflow_datasets as tfds

    try:
        return list(tfds.builder_cls(name.split("/")[0]).builder_configs)
    # only a hint hangs on it
    except (ImportError, KeyError, ValueError, tfds.core.registered.DatasetNotFoundError):
        return []


class _lock:
    """Two processes of one machine must not build one set at once."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def __enter__(self):
        import fcntl

        self._file = open(self._path, "w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *exception):
        self._file.close()


def _roles(
    features, name: str
) -> tuple[str, str | None, list[str] | None, dict[str, tuple[str, ...]]]:
    """(image feature, label feature, class names, caption kind → path) of a set."""
    import tensorflow_datasets as tfds

    feature = tfds.features
    image = next((key for key, f in features.items() if isinstance(f, feature.Image)), None)
    if image is None:
        raise UserError(f"tfds:{name} has no image feature (features: {', '.join(features)})")
    label = next((key for key, f in features.items() if isinstance(f, feature.ClassLabel)), None)
    names = features[label].names if label else None
    if label is None and "label" in features and not isinstance(features["label"], feature.Text):
        label = "label"
    texts: dict[str, tuple[str, ...]] = {}

    def walk(node, path: tuple[str, ...]):
        if (
            isinstance(node, feature.Text)
            or isinstance(node, feature.Tensor)
            and node.shape == ()
            and np.dtype(node.np_dtype).kind == "O"
        ):
            if path[-1].rsplit("/", 1)[-1] not in _NAMES:
                texts["/".join(path)] = path
        elif isinstance(node, feature.FeaturesDict):
            for key, child in node.items():
                walk(child, (*path, key))
        elif isinstance(node, feature.Sequence):
            walk(node.feature, path)

    walk(features, ())
    return image, label, names, texts


def _at(fields, path: tuple[str, ...]):
    for step in path:
        fields = fields[step]
    return fields


def _strings(value) -> tuple[str, ...]:
    values = (
        value
        if isinstance(value, (list, tuple, np.ndarray)) and not isinstance(value, bytes)
        else [value]
    )
    return tuple(v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values)
