"""Text in: caption cleaning, tokenization and prompt files.

Captions and prompts are cleaned as PixArt's training captions were, with DeepFloyd IF's rules, as
the official code and diffusers do: URLs, markup, file names, article numbers and shop phrases are
removed; dashes, quotes and white space are normalized. The rules are one table, in the order in
which they apply; :func:`clean_caption` goes through it twice, as both references do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import os
import re
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pixart_jax import tables
from pixart_jax.errors import Notice, UserError, one_line
from pixart_jax.files import write_json
from pixart_jax.remote_path import Location, local, located

_HOST = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_FILE = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = r"\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0\uFE31\uFE32\uFE58\uFE63\uFF0D"  # noqa: E501


def _rules(*pairs: tuple[str, str]) -> tuple[tuple[re.Pattern, str], ...]:
    return tuple((re.compile(pattern), to) for pattern, to in pairs)


_ADDRESSES = _rules(
    (r"<person>", "person"),
    (rf"\b((?:https?:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_HOST}))", ""),
    (rf"\b((?:www:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_HOST}))", ""),
)
_MARKS = _rules(
    (r"@[\w\d]+\b", ""),  # @nickname
    # CJK strokes and ideographs, phonetic extensions of Katakana, enclosed and compatibility
    # letters, hexagrams
    (
        r"[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+",
        "",
    ),
    (rf"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # an IP address
    (r"\d:\d\d\s+$", ""),  # the number of an article
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILE})", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINTS = re.compile(r"[-_]")  # four and more make a caption of file-name-like-words
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 64x64; the second x is Cyrillic
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text: str) -> str:
    """A caption or prompt as the text encoder gets it; of plain words only capitals and outer
    blanks change."""
    return _once(_once(text))


def lower_caption(text: str) -> str:
    """Lower case without outer blanks: what remains of cleaning where it is switched off."""
    return text.lower().strip()


def caption_cleaner(clean: bool) -> Callable[[str], str]:
    """:func:`clean_caption`, or :func:`lower_caption` where captions are not to be cleaned."""
    return clean_caption if clean else lower_caption


EMPTIED, HALVED = "empty after cleaning", "at least half lost in cleaning"


def cleaning_loss(text: str, cleaned: str) -> str | None:
    """EMPTIED where cleaning left nothing of a text that is not blank, HALVED where it removed at
    least half of its letters and digits, else None."""
    if not cleaned:
        return EMPTIED if text.strip() else None
    before, after = (sum(map(str.isalnum, one)) for one in (text, cleaned))
    return HALVED if before and 2 * after <= before else None


def notice_loss(what: str, texts: Iterable[str], clean: Callable[[str], str]) -> None:
    """Warn of the texts that cleaning empties or halves, with what is left. what: 'prompt'."""
    cleaned = {text: clean(text) for text in texts}
    for kind in (EMPTIED, HALVED):
        lost = [text for text, left in cleaned.items() if cleaning_loss(text, left) == kind]
        if not lost:
            continue
        shown = "; ".join(f"{text[:40]!r} → {cleaned[text][:40]!r}" for text in lost[:3])
        many = f"{len(lost)} {what}s are" if lost[1:] else f"a {what} is"
        warnings.warn(
            f"{many} {kind}: {shown}{'; …' if lost[3:] else ''} (--no-clean-caption, "
            "clean_caption=False in Python, keeps the words)",
            Notice,
            stacklevel=3,
        )


def clean_captions(
    texts: Iterable[str], clean: Callable[[str], str]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """([(caption, cleaned)] without those of which nothing is left, [(EMPTIED or HALVED, caption)])
    of a sample's captions."""
    both = [(text, clean(text)) for text in texts]
    found = [(cleaning_loss(*one) if one[1] else EMPTIED, one[0]) for one in both]
    return [one for one in both if one[1]], [(kind, text) for kind, text in found if kind]


def _once(text: str) -> str:
    import ftfy

    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _apply(_MARKS, _without_markup(_apply(_ADDRESSES, text)))
    if len(_JOINTS.findall(text)) > 3:
        text = _JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(_WORDS, text).strip()


def _apply(rules, text: str) -> str:
    for pattern, to in rules:
        text = pattern.sub(to, text)
    return text


def _without_markup(text: str) -> str:
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning

    with warnings.catch_warnings():
        # a caption may look like a file's name
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        return BeautifulSoup(text, features="html.parser").text


# ---- tokens ----


class FastTokenizer:
    """A tokenizer.json that transformers 5 wrote, read by the tokenizers library alone: importing
    transformers takes seconds. What this package uses of a transformers tokenizer, with the same
    results."""

    def __init__(self, folder: Path):
        import tokenizers

        file = folder / "tokenizer.json"
        try:
            self.backend_tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower one
            raise UserError(f"{file} is damaged ({one_line(error)}): copy it again") from None
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        self._config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        self.tokenizer_class = self._config.get("tokenizer_class", "T5Tokenizer")
        for name in ("pad", "eos", "unk", "mask"):
            token = self._config.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            found = None if token is None else self.backend_tokenizer.token_to_id(token)
            setattr(self, f"{name}_token_id", found)

    def __call__(
        self,
        texts: str | Sequence[str],
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        padding: bool = False,
    ) -> dict[str, Any]:
        """{"input_ids"}: of one text, or of each; cut texts keep their end mark."""
        one = isinstance(texts, str)
        found = self.backend_tokenizer.encode_batch_fast(
            [texts] if isinstance(texts, str) else list(texts),
            add_special_tokens=add_special_tokens,
        )
        ids = [encoding.ids for encoding in found]
        if truncation and max_length is not None:
            marks = self.backend_tokenizer.num_special_tokens_to_add(False) * add_special_tokens
            ids = [
                row if len(row) <= max_length else row[: max_length - marks] + row[-marks:]
                for row in ids
            ]
        return {"input_ids": ids[0] if one else ids}

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def save_pretrained(self, folder: str) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers and diffusers open."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.backend_tokenizer.save(str(Path(folder) / "tokenizer.json"))
        write_json(Path(folder) / "tokenizer_config.json", self._config)


def load_tokenizer(folder: str | os.PathLike):
    """The tokenizer of a model folder's tokenizer/ (tokenizer.json, or a SentencePiece
    spiece.model)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no tokenizer in {folder}: that folder does not exist")
    config: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        config = dict(json.loads((folder / "tokenizer_config.json").read_text("utf-8")))
    # what earlier versions wrote, transformers reads with its own rules for each class
    if config.get("backend") == "tokenizers" and (folder / "tokenizer.json").is_file():
        return FastTokenizer(folder)

    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise UserError(f"no tokenizer in {folder}: neither tokenizer.json nor spiece.model")

    import transformers

    # AutoTokenizer imports torch where it is installed, and does not open a lone spiece.model
    is_t5 = str(config.get("tokenizer_class", "T5Tokenizer")).startswith("T5Tokenizer")
    kind = transformers.T5Tokenizer if is_t5 else transformers.AutoTokenizer
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises what a damaged file happens to cause
        raise UserError(f"no tokenizer in {folder}: {one_line(error)}") from error


def word_tokenizer(words: Sequence[str]):
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
    characters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-/&"
    pieces += [(c, -20.0) for c in characters if c not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def save_tokenizer(tokenizer, folder: str | os.PathLike) -> None:
    """Write the tokenizer as it was opened: without the cutting and padding of its last call, which
    transformers would write along."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(str(folder))


def padded_length(longest: int, limit: int) -> int:
    """The length to pad to: the next multiple of 8, so that few shapes compile, and at most the
    model's ``limit``."""
    return min(limit, -(-max(longest, 1) // 8) * 8)


def tokenize(
    tokenizer,
    texts: Sequence[str],
    limit: int,
    length: int | None = None,
    clean: Callable[[str], str] = clean_caption,
) -> tuple[np.ndarray, np.ndarray]:
    """Texts → (ids int32 [n, l], lengths int32 [n]).

    Texts are cleaned, cut at ``limit`` tokens (the end mark stays) and padded to ``length``, by
    default the next multiple of 8 over the longest. No result may depend on the padding. A Notice
    names the words that a cut text lost.
    """
    cleaned = [clean(text) for text in texts]
    ids = tokenizer(cleaned, truncation=True, max_length=limit, add_special_tokens=True)
    ids = ids["input_ids"]
    for text, row in zip(cleaned, ids):
        if len(row) >= limit:
            _warn_of_cut(tokenizer, text, limit)
    length = length or padded_length(max((len(row) for row in ids), default=1), limit)
    out = np.full((len(ids), length), tokenizer.pad_token_id or 0, np.int32)
    for row, tokens in zip(out, ids, strict=True):
        row[: len(tokens)] = tokens[:length]
    # A tokenizer without an end mark gives "" no token at all; attention needs one.
    return out, np.maximum([min(len(row), length) for row in ids], 1).astype(np.int32)


def count_tokens(tokenizer, text: str, limit: int) -> tuple[int, list[str]]:
    """(tokens of a cleaned text, its words beyond ``limit`` tokens)."""
    whole = tokenizer(text, add_special_tokens=True)["input_ids"]
    if len(whole) <= limit:
        return len(whole), []
    marked = int(tokenizer.eos_token_id is not None and whole[-1] == tokenizer.eos_token_id)
    beyond = whole[limit - marked : len(whole) - marked]
    return len(whole), tokenizer.decode(beyond, skip_special_tokens=True).split()


def _warn_of_cut(tokenizer, text: str, limit: int) -> None:
    """Warn of a text with more tokens than ``limit``, naming the words beyond them."""
    count, lost = count_tokens(tokenizer, text, limit)
    if count <= limit:
        return
    shown = " ".join(lost) if len(lost) <= 30 else f"{' '.join(lost[:20])} … {' '.join(lost[-5:])}"
    warnings.warn(
        f"the prompt {text[:40]!r}… has {count} tokens and was cut to {limit}, the model's "
        f"limit: lost are its last {count - limit} tokens, {len(lost)} words: {shown!r}",
        Notice,
        stacklevel=3,
    )


# ---- prompt files ----


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """A prompt, and its row's height and width (pixels), seed, guidance, negative_prompt and
    strength, the image and mask that it edits, and what a ControlNet follows (control); None where
    the row leaves them out."""

    prompt: str
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    guidance: float | None = None
    strength: float | None = None
    image: str | None = None
    mask: str | None = None
    control: str | None = None

    def overrides(self) -> dict:
        """What the row sets beside its prompt."""
        values = dataclasses.asdict(self).items()
        return {name: v for name, v in values if name != "prompt" and v is not None}


def read_prompts(path: str | os.PathLike) -> list[PromptRow]:
    """The rows of a file, also of a bucket's, in their order, without those of a blank prompt: a
    table that ``tables.rows`` reads, or one prompt a line. Other columns are ignored. Raises
    UserError for an empty file and for a row that cannot be read."""
    folder, path = located(path).parent, local(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a file of prompts (.txt, .csv or .jsonl)")
    if not path.exists():
        raise UserError(f"no prompt file {path}")

    def refuse(place: str, kind: str, detail: str, repaired: bool) -> NoReturn:
        hint = "; a prompt with commas needs quotes" if "columns" in detail else ""
        raise UserError(f"{folder / place}: {kind}, {detail}{hint}")

    if path.suffix.lower() in tables.SUFFIXES:
        found = tables.rows(path, refuse)
    else:
        found = ((place, {"prompt": line}) for place, line in tables.lines(path, refuse))
    rows = [_prompt_row(folder, place, fields) for place, fields in found]
    rows = [row for row in rows if row.prompt]
    if not rows:
        raise UserError(f"{path} holds no prompt: write one a line")
    return rows


def check_encodable(what: str, text: str) -> str:
    """The text; a UserError where it holds half a character, which no file and no tokenizer takes:
    a lone surrogate in JSON, or bytes of a command line that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = ascii(text[error.start])
        raise UserError(f"{what} has an invalid character, {shown}, at {error.start}") from None
    return text


def _prompt_row(folder: Location, place: str, fields: Mapping[str, Any]) -> PromptRow:
    place = str(folder / place)
    fields = {name.strip().lower(): value for name, value in fields.items()}
    if "prompt" not in fields:
        raise UserError(f"{place}: no column 'prompt' (columns: {', '.join(fields)})")
    named = ("image", "mask", "control")
    texts = {name: fields.get(name) for name in ("prompt", "negative_prompt", *named)}
    for name, text in texts.items():
        if not isinstance(text, str | None):
            raise UserError(f"{place}: {name} {text!r} is not text")
        check_encodable(f"{place}: {name}", text or "")
    own: dict[str, Any] = {}
    for name in ("height", "width", "seed", "guidance", "strength"):
        value = fields.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        real = name in ("guidance", "strength")
        kind, form = (float, "finite number") if real else (int, "whole number")
        try:
            own[name] = kind(value)
            # an int of 64 bits is not compared as a float
            if isinstance(value, bool) or (isinstance(value, float) and own[name] != value):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{place}: {name} {str(value)[:40]!r} is not a {form}") from None
    files = {name: texts[name] for name in named}
    own |= {name: str(folder / file) for name, file in files.items() if file}
    negative = texts["negative_prompt"] or None
    return PromptRow((texts["prompt"] or "").strip(), negative_prompt=negative, **own)
