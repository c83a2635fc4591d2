"""What can be wrong with a generated caption: it is empty, cut at the limit, a loop or a refusal.
Each check has a name and is counted."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]]*\s*$")
_REFUSAL = re.compile(
    r"^\W*(?:i['’]?m sorry|i am sorry|sorry,|i apologi[sz]e|as an ai\b"
    r"|i['’]?m (?:unable|not able)|i am (?:unable|not able)"
    r"|i (?:cannot|can['’]?t) (?:see|describe|view|help|assist|provide|identify)"
    r"|there is no image|no image (?:was|has been) provided)",
    re.IGNORECASE,
)
LONGEST_LOOP = 40  # words of a phrase whose repetition is looked for
LOOP_WORDS = 8  # a loop covers at least so many words, or a third of the caption
PROSE_WORDS = 12  # a caption of so many words is prose, and prose ends with a full stop


def failed_checks(text: str, finish: str) -> tuple[str, ...]:
    """The names of the checks that a caption fails. finish: 'length' where the token limit cut it,
    else 'stop'.

    empty: no word. truncated: the limit cut it before a sentence's end. unfinished: prose of 12
    words or more that the model ended in mid-sentence. repeating: see ``repeats``. refusal: it
    begins as an apology or mentions a missing image.
    """
    words = [word.lower() for word in _WORD.findall(text)]
    cut = finish == "length" and not _SENTENCE_END.search(text)
    if not words:
        return ("empty", "truncated") if finish == "length" else ("empty",)
    found = {
        "truncated": cut,
        "unfinished": not cut and len(words) >= PROSE_WORDS and not _SENTENCE_END.search(text),
        "repeating": repeats(words),
        "refusal": bool(_REFUSAL.search(text)),
    }
    return tuple(name for name, failed in found.items() if failed)


def repeats(words: list[str]) -> bool:
    """Whether a phrase of 1 to 40 words occurs three times or more without a break, over 8 words or
    more or a third of the caption; or, from 24 words on, most runs of four words are repeated."""
    n = len(words)
    for length in range(1, min(LONGEST_LOOP, n // 3) + 1):
        same = 0  # words that equal the word one phrase before them, without a break
        for place in range(length, n):
            same = same + 1 if words[place] == words[place - length] else 0
            covered = same + length
            if same >= 2 * length and (covered >= LOOP_WORDS or 3 * covered >= n):
                return True
    runs = [tuple(words[i : i + 4]) for i in range(n - 3)]
    return n >= 24 and 2 * len(set(runs)) < len(runs)
