"""Prompts → token ids, as the text encoder was trained to see them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pixart_jax import captions
from pixart_jax.errors import Notice, UserError


def load(folder: str | os.PathLike):
    """The tokenizer of a model folder's tokenizer/ (tokenizer.json, or a SentencePiece
    spiece.model)."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no tokenizer in {folder}: that folder does not exist")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as fault:
        raise UserError(
            f"no tokenizer in {folder}: {' '.join(str(fault).split())[:300]}"
        ) from fault


def from_words(words: Sequence[str]):
    """A T5 tokenizer whose pieces are these whole words; any other word is spelled in single
    characters.

    For small closed worlds. Saved with ``save_pretrained`` it opens in transformers and in
    diffusers as T5Tokenizer does.
    """
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in dict.fromkeys(words)]
    known = {piece for piece, _ in pieces}
    # A character costs more than any word, so a word is spelled only where it is not in the list.
    pieces += [
        (c, -20.0) for c in "▁abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-/&" if c not in known
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def save(tokenizer, folder: str | os.PathLike) -> None:
    """Write the tokenizer as it was opened: without the cutting and padding of its last call, which
    transformers would write along."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(str(folder))


def padded_length(longest: int, most: int) -> int:
    """The length to pad to: the next multiple of 8, so that few shapes compile, and never more than
    the model's ``most``."""
    return min(most, -(-max(longest, 1) // 8) * 8)


def tokenize(
    tokenizer,
    texts: Sequence[str],
    most: int,
    length: int | None = None,
    clean: Callable[[str], str] = captions.clean,
) -> tuple[np.ndarray, np.ndarray]:
    """Texts → (ids int32 [n, l], lengths int32 [n]).

    Texts are cleaned (``captions.clean`` or ``captions.plain``), cut at ``most`` tokens (the end
    mark kept) and padded to
    ``length``: by default the next multiple of 8 over the longest. Nothing that reads the result
    may depend on the padding. A text that is cut is told of by a Notice that names what was lost.
    """
    cleaned = [clean(text) for text in texts]
    ids = tokenizer(cleaned, truncation=True, max_length=most, add_special_tokens=True)["input_ids"]
    for n, row in enumerate(ids):
        if len(row) >= most:
            _tell_what_is_cut(tokenizer, cleaned[n], most)
    length = length or padded_length(max((len(row) for row in ids), default=1), most)
    pad = tokenizer.pad_token_id or 0
    out = np.full((len(ids), length), pad, np.int32)
    for row, tokens in zip(out, ids, strict=True):
        row[: len(tokens)] = tokens[:length]
    # A tokenizer without an end mark gives "" no token at all; attention needs one.
    return out, np.maximum([min(len(row), length) for row in ids], 1).astype(np.int32)


def _tell_what_is_cut(tokenizer, text: str, most: int) -> None:
    """Warn of a text that has more tokens than ``most``, naming the words beyond them."""
    whole = tokenizer(text, add_special_tokens=True)["input_ids"]
    if len(whole) <= most:
        return
    marked = int(tokenizer.eos_token_id is not None and whole[-1] == tokenizer.eos_token_id)
    lost = tokenizer.decode(
        whole[most - marked : len(whole) - marked], skip_special_tokens=True
    ).split()
    shown = " ".join(lost) if len(lost) <= 30 else f"{' '.join(lost[:20])} … {' '.join(lost[-5:])}"
    warnings.warn(
        f"the prompt {text[:40]!r}… has {len(whole)} tokens and was cut to {most}, the model's "
        "most: "
        f"lost are its last {len(whole) - most} tokens, {len(lost)} words: {shown!r}",
        Notice,
        stacklevel=3,
    )
