"""Keys and values of negative prompts, cached a text: "" is encoded once, not once a batch, and an
image does not depend on the negative prompts beside it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.models.transformer import TextKV

LIMIT = 4  # texts that stay: 31 MB each for XL/2 in bfloat16

States = tuple[jax.Array, jax.Array]  # [n, l, c], lengths [n]


class NegativePrompts:
    """The cache of one transformer's keys and values."""

    def __init__(self) -> None:
        self.rows: dict[Hashable, tuple[TextKV, object]] = {}

    def text_kv(
        self,
        texts: Sequence[str],
        key: Hashable,
        source: object,
        encode: Callable[[list[str]], States],
        project: Callable[..., TextKV],
        null_caption: States | None,
        lengths: jax.Array,
    ) -> TextKV:
        """Keys and values of the rows' texts [b], cleaned.

        key: whatever else they depend on. source: what encodes; its id is in the key. encode(texts)
        → states. project(states, lengths) → TextKV. null_caption: states of a "", which is then
        read under ``lengths`` [b] of the prompts; None: "" is encoded.
        """
        names = [(text, key, id(source)) for text in texts]
        is_null = np.array([null_caption is not None and not text for text in texts])
        found = {name: self.rows[name] for name in names if name in self.rows}
        missing = {name: text for text, name in zip(texts, names) if name not in found}
        states: dict[tuple, States] = {}
        if null_caption is not None and any(is_null):
            states[names[is_null.argmax()]] = null_caption
        if read := {name: text for name, text in missing.items() if name not in states}:
            both = encode(list(read.values()))
            states |= {
                name: (both[0][n : n + 1], both[1][n : n + 1]) for n, name in enumerate(read)
            }
        for name in missing:
            # the source is held, so that no other object takes its id
            found[name] = self.rows[name] = project(*states[name]), source
        while len(self.rows) > LIMIT:
            self.rows.pop(next(iter(self.rows)))
        columns = zip(*(found[name][0] for name in names))
        keys, values, own = (jnp.concatenate(a, n) for a, n in zip(columns, (1, 1, 0)))
        return TextKV(keys, values, jnp.where(is_null, lengths, own))
