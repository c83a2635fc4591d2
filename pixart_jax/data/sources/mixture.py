"""Several sets with weights: '0.7*folder:photos + 0.3*webdataset:scraped/{000..099}.tar'."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

import numpy as np

from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources.indexed import IndexedSource
from pixart_jax.data.sources.sample import Captions, Sample
from pixart_jax.errors import UserError

_WEIGHT = re.compile(r"\s*[0-9.]+(?:[eE][-+]?\d+)?\s*\*")
_TERM = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*(\S.*?)\s*")


def parse_mixture(text: str) -> list[tuple[float, str]]:
    """[(share, source)] of a mixture, shares adding up to 1; [(1, text)] of any other text. Raises
    UserError for a malformed mixture."""
    if not _WEIGHT.match(text):
        return [(1.0, text)]
    found = []
    for term in re.split(r"\s+\+\s+(?=\S)", text):
        match = _TERM.fullmatch(term)
        weight = float(match[1]) if match else 0.0
        if match is None or not 0 < weight < float("inf"):
            raise UserError(
                f"{term.strip()!r} is not WEIGHT*SOURCE, as in '0.7*folder:a + 0.3*folder:b'"
            )
        found.append((weight, match[2]))
    total = sum(weight for weight, _ in found)
    return [(weight / total, source) for weight, source in found]


class Mixture:
    """The samples of all parts, one part after the other, each once; a key is NAME/KEY. weights:
    the parts' shares, by which training draws them (data/mixed.py)."""

    def __init__(
        self, parts: Sequence[IndexedSource], weights: Sequence[float], faults: BadRecords
    ):
        self.parts, self.weights, self.faults = tuple(parts), tuple(weights), faults
        weighted = list(zip(parts, weights, strict=True))
        self.name = " + ".join(f"{weight:g}*{part.name}" for part, weight in weighted)
        identity = json.dumps([[part.fingerprint, weight] for part, weight in weighted])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        kinds = (kind for part in parts for kind in part.caption_kinds)
        self.caption_kinds = tuple(dict.fromkeys(kinds))
        self._starts = np.cumsum([0, *map(len, parts)])
        names = [part.name.partition(":")[2] or part.name for part in parts]
        self._names = [
            f"{name}-{names[:i].count(name) + 1}" if name in names[:i] else name
            for i, name in enumerate(names)
        ]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _at(self, index: int) -> tuple[int, int]:
        """(number of the part, index in it)."""
        index = range(len(self))[index]
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])

    def captions_at(self, index: int) -> tuple[str, Captions]:
        """(key, captions) of a sample, without its image."""
        part, inside = self._at(index)
        key, captions = self.parts[part].captions_at(inside)
        return f"{self._names[part]}/{key}", captions

    def __getitem__(self, index: int) -> Sample:
        part, inside = self._at(index)
        found = self.parts[part][inside]
        return Sample(f"{self._names[part]}/{found.key}", found.image, found.captions, found.label)

    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: (height, width), (0, 0) for an unreadable image."""
        return np.concatenate([part.sizes() for part in self.parts])
