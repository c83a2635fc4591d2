"""Who made a record: hashes of an encoder's weights and config, and of a tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax
import numpy as np


def component_identity(component) -> str:
    """sha256 in hex over a component's .config, the dtype it computes in and each of its .params (path, shape, dtype, bytes).

    One that knows its own identity says so in ``.identity``; parameters that live on other hosts cannot be hashed here.
    """
    if isinstance(known := getattr(component, "identity", None), str):
        return known
    digest = hashlib.sha256()
    config = component.config
    fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    digest.update(str(getattr(component, "dtype", "")).encode())  # of the computation
    leaves, _ = jax.tree_util.tree_flatten_with_path(component.params)
    for path, leaf in sorted(((jax.tree_util.keystr(path), leaf) for path, leaf in leaves), key=lambda item: item[0]):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype.name} {array.shape}".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()


def tokenizer_identity(tokenizer) -> str:
    """sha256 in hex of what a tokenizer does to text; padding and cutting, which callers choose, do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        fields = json.loads(backend.to_str())
        fields.pop("padding", None)
        fields.pop("truncation", None)
    else:
        fields = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
