"""Which encoders made a set of records: hashes of their weights and configs, and of the tokenizer.

Records name them twice. Their identity hashes the numbers that computed, from whatever file they
were read. Beside it stands a fingerprint of those files, which costs no reading of gigabytes: where
that agrees no weights are opened (:func:`expected_identity`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from pixart_jax.files import folder_fingerprint
from pixart_jax.text import load_tokenizer
from pixart_jax.weights.component import load_component

ENCODERS = ("vae", "text_encoder")
_DEFAULT_DTYPE = "float32"


def component_identity(component) -> str:
    """sha256 in hex over a component's .config, the dtype it computes in and each of its .params
    (path, shape, dtype, bytes). Parameters that live on other hosts cannot be hashed here."""
    digest = hashlib.sha256()
    config = component.config
    fields = config if isinstance(config, dict) else dataclasses.asdict(config)
    digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    digest.update(str(getattr(component, "dtype", "")).encode())
    leaves, _ = jax.tree_util.tree_flatten_with_path(component.params)
    for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype.name} {array.shape}".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()


def tokenizer_identity(tokenizer) -> str:
    """sha256 in hex of what a tokenizer does to text, without padding and cutting."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        fields = json.loads(backend.to_str())
        fields.pop("padding", None)
        fields.pop("truncation", None)
    else:
        fields = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def made_from(
    folders: Mapping[str, Path], dtypes: Mapping[str, str] | None = None
) -> dict[str, dict[str, str]]:
    """What encoders were opened from, for a manifest: part → {"files": fingerprint, "dtype": of the
    computation}. folders: of 'vae', 'text_encoder' and 'tokenizer'. dtypes: where not float32."""
    dtype = {**dict.fromkeys(folders, _DEFAULT_DTYPE), **(dtypes or {})}
    return {
        part: {"files": folder_fingerprint(folder), "dtype": dtype[part]}
        for part, folder in folders.items()
    }


def expected_identity(
    identity: Mapping[str, str],
    opened_from: Mapping[str, Mapping[str, str]],
    folders: Mapping[str, Path],
) -> dict[str, str]:
    """The identity that records must have for the 'vae', 'text_encoder' and 'tokenizer' in
    ``folders``; ``EncodedSamples(…, expected=…)`` refuses others by name.

    identity, opened_from: a manifest's ``identity`` and ``made_from``. A part whose files are those
    that the records were made from keeps its identity, for a few reads; of any other the weights
    are opened and hashed, in the dtype that the records were computed in. A part that the records
    or ``folders`` lack is not compared. Raises UserError where a folder cannot be opened.
    """
    expected = {}
    for part in (*ENCODERS, "tokenizer"):
        if part not in identity or part not in folders:
            continue
        opened = opened_from.get(part, {})
        if opened.get("files") == folder_fingerprint(folders[part]):
            expected[part] = identity[part]
        elif part == "tokenizer":
            expected[part] = tokenizer_identity(load_tokenizer(folders[part]))
        else:
            component = load_component(folders[part], opened.get("dtype", _DEFAULT_DTYPE))
            expected[part] = component_identity(component)
    return expected
