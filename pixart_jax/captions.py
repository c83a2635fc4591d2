"""Captions and prompts made plain, as those were that PixArt's transformer learned from.

DeepFloyd's rules, which the official code and diffusers apply to what they train on and to what
they are asked to draw: web addresses, markup, file names, article numbers and the words of shop
pages go, dashes, quotes and blanks become of one kind. They are written here as one table, in the
order in which they apply; ``clean`` goes through it twice, as both do.
"""

from __future__ import annotations

import html
import re
import urllib.parse
import warnings

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


def clean(text: str) -> str:
    """A caption or a prompt as the text encoder is to see it; of plain words nothing but capitals
    and outer blanks change."""
    return _once(_once(text))


def plain(text: str) -> str:
    """Lower case and no blanks around it: what is done where cleaning is not wanted."""
    return text.lower().strip()


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
