"""Several sets as one, with weights: '0.7*folder:photos +
0.3*webdataset:scraped/{000..099}.tar'."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources.sample import Sample, Source, faults_of
from pixart_jax.errors import UserError

_TERM = re.compile(r"\s*([0-9.eE+-]+)\s*\*\s*(\S.*?)\s*")


def parse_mixture(text: str) -> list[tuple[float, str]]:
    """[(share, source)] of a mixture, the shares adding up to 1; of any other text [(1, text)].
    UserError where one is badly written."""
    if not re.match(r"\s*[0-9.]+(?:[eE][-+]?\d+)?\s*\*", text):
        return [(1.0, text)]
    found = []
    for term in re.split(r"\s+\+\s+(?=\S)", text):
        match = _TERM.fullmatch(term)
        try:
            weight = float(match[1]) if match else -1.0
        except ValueError:
            weight = -1.0
        if not match or not 0 < weight < float("inf"):
            raise UserError(
                f"mixture {text!r}: {term.strip()!r} is not WEIGHT*SOURCE, as in '0.7*folder:a + "
                "0.3*folder:b'"
            )
        found.append((weight, match[2]))
    total = sum(weight for weight, _ in found)
    return [(weight / total, source) for weight, source in found]


class Mixture:
    """The samples of all parts, one part after the other, each once. A key is NAME/KEY, with the
    part's name behind its colon.

    weights: the part's shares, which add up to 1. They say how often each is drawn in training
    (data/mixed.py), not how many samples
    are here: whoever counts, looks at or encodes a mixture sees every sample once.
    """

    def __init__(
        self, parts: Sequence[Source], weights: Sequence[float], faults: BadRecords | None = None
    ):
        self.parts, self.weights = tuple(parts), tuple(weights)
        self.name = " + ".join(
            f"{weight:g}*{part.name}" for weight, part in zip(weights, parts, strict=True)
        )
        self.fingerprint = hashlib.sha256(
            json.dumps([[p.fingerprint, w] for p, w in zip(parts, weights)]).encode()
        ).hexdigest()
        self.caption_kinds = tuple(
            dict.fromkeys(kind for part in parts for kind in part.caption_kinds)
        )
        classes = {part.num_classes for part in parts}
        self.num_classes = classes.pop() if len(classes) == 1 else None
        self.faults = BadRecords() if faults is None else faults
        if faults is None:
            for part in parts:
                self.faults.extend(faults_of(part))
        self.starts = np.cumsum([0, *map(len, parts)])
        names = [part.name.partition(":")[2] or part.name for part in parts]
        self._names = [
            f"{name}-{names[:i].count(name) + 1}" if name in names[:i] else name
            for i, name in enumerate(names)
        ]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _at(self, index: int) -> tuple[int, int]:
        """(number of the part, index in it)."""
        index = range(len(self))[index]
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, index - int(self.starts[part])

    def captions_at(self, index: int) -> tuple[str, Mapping[str, tuple[str, ...]]]:
        """(key, captions) of a sample, for whoever counts words: no picture is read where the
        part's kind of source can do without."""
        part, inside = self._at(index)
        if read := getattr(self.parts[part], "captions_at", None):
            key, captions = read(inside)
        else:
            found = self.parts[part][inside]
            key, captions = found.key, found.captions
        return f"{self._names[part]}/{key}", captions

    def __getitem__(self, index: int) -> Sample:
        part, inside = self._at(index)
        found = self.parts[part][inside]
        return Sample(f"{self._names[part]}/{found.key}", found.image, found.captions, found.label)

    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: (height, width); (0, 0) where the image is unreadable."""
        return np.concatenate([part.sizes() for part in self.parts])
