"""Find a model's tensors in files of other tools: behind the prefixes of trainers and user
interfaces, and among the branches of a checkpoint."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence

from pixart_jax.errors import UserError, nearest
from pixart_jax.weights.files import Tensors

# Wrappers that PyTorch puts before single modules too, anywhere in a name.
_WRAPPERS = re.compile(r"(?<![^./])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
_AVERAGE = re.compile(r"(?<![a-z])(?:ema|swa|averaged?|shadow)(?![a-z])", re.IGNORECASE)
# Other parts that single-file checkpoints hold beside a transformer without a prefix.
_PARTS = re.compile(r"(?:text_encoders?|cond_stage_model|conditioner|first_stage_model|vae)\.")
_NO_MODEL = re.compile(r"(?<![a-z])(?:optim\w*|exp_avg\w*|grads?)(?![a-z])", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Selection:
    """tensors: the model's, under its own names; their source names branch and prefix. place: the
    two in words, '' for neither. notes: what was passed over or left out."""

    tensors: Tensors
    place: str
    notes: list[str]


def select(
    tensors: Tensors, anchors: Sequence[str], *, branch: str | None = None, average: bool = True
) -> Selection:
    """The tensors of one model in a file, found by keys that every such model has.

    A key is an anchor behind a prefix of any kind ('module._orig_mod.', 'model.diffusion_model.')
    and, in a PyTorch file, in any mapping ('state_dict_ema/'). Of several places that hold the
    model, an average is taken unless ``average`` is False; branch: names one of them. Without an
    anchor all tensors are returned as they are. Raises UserError where no or several places remain.
    """
    names = {_WRAPPERS.sub("", key): key for key in tensors}
    if len(names) < len(tensors):  # the same model, wrapped and not
        names = {key: key for key in tensors}
    places = _places(names, anchors)
    if not places:
        common = re.sub(r"[^./]*$", "", os.path.commonprefix(list(names)))
        return _selection(tensors, names, common, [])
    chosen = _choose(tensors.source, list(places), branch, average)
    other = [place for place in places if place != chosen]
    inner = tuple(place for place in other if place.startswith(chosen))
    own, outside = {}, []
    for name, key in names.items():
        rest = name[len(chosen) :] if name.startswith(chosen) else "/"
        if "/" not in rest and not _PARTS.match(rest) and not name.startswith(inner):
            own[rest] = key
        elif not name.startswith(tuple(place for place in other if place)):
            outside.append(key)
    notes = []
    for is_average, what in ((True, "the average "), (False, "")):
        if found := [_label(p) for p in other if bool(_AVERAGE.search(p)) == is_average]:
            notes.append(f"passed over: {what}{', '.join(found)}")
    if empty := [name for name in getattr(tensors, "empty", ()) if _AVERAGE.search(name)]:
        notes.append(f"the average {', '.join(empty)} is empty")
    if left := _groups(key for key in outside if tensors.shape(key)):
        notes.append(f"left out: {left}")
    raw = own[places[chosen]]
    prefix = raw.removesuffix(places[chosen]) if raw.endswith(places[chosen]) else chosen
    return _selection(tensors, own, prefix, notes)


def _selection(tensors: Tensors, names: dict[str, str], prefix: str, notes: list[str]) -> Selection:
    branch, _, prefix = prefix.rpartition("/")
    place = ", ".join([branch] * bool(branch) + [f"prefix {prefix!r}"] * bool(prefix))
    source = f"{tensors.source} ({place})" if place else tensors.source
    return Selection(Tensors(source, tensors.renamed(names).entries), place, notes)


def _places(names: Iterable[str], anchors: Sequence[str]) -> dict[str, str]:
    """{prefix before an anchor: the anchor}, in the file's order."""
    found: dict[str, str] = {}
    for name in names:
        for anchor in anchors:
            prefix = name.removesuffix(anchor)
            if name.endswith(anchor) and prefix[-1:] in ("", ".", "/"):
                found.setdefault(prefix, anchor)
    return {prefix: anchor for prefix, anchor in found.items() if not _NO_MODEL.search(prefix)}


def _choose(source: str, places: list[str], branch: str | None, average: bool) -> str:
    if branch is not None:
        named = [
            p for p in places if _label(p) == branch or re.match(rf"{re.escape(branch)}[./]", p)
        ]
        if not named:
            raise UserError(
                f"{source} holds no model in {branch!r}{nearest(branch, map(_label, places))}"
            )
        places = named
    averages = [place for place in places if _AVERAGE.search(place)]
    plain = [place for place in places if place not in averages]
    found = (averages or plain) if average or branch is not None else plain
    if not found:
        raise UserError(f"{source} holds averages alone: {', '.join(map(_label, averages))}")
    if len(found) > 1:
        raise UserError(
            f"{source} holds several models ({', '.join(map(_label, found))}): choose by --branch"
        )
    return found[0]


def _label(place: str) -> str:
    return place.rstrip("./") or "the file's own level"


def _groups(keys: Iterable[str]) -> str:
    """'text_encoders (219 tensors), vae (248 tensors)'; the optimizer's are not worth a word."""
    counts: dict[str, int] = {}
    for key in keys:
        if not _NO_MODEL.search(key):
            *branches, name = key.split("/")
            group = "/".join([*branches, name.split(".")[0]])
            counts[group] = counts.get(group, 0) + 1
    return ", ".join(f"{group} ({n} tensor{'s' * (n > 1)})" for group, n in sorted(counts.items()))
