"""A person's choice of samples: a filter by name, or 'package.module:function', over the fields of
a record."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping

from pixart_jax.errors import UserError, nearest

FILTERS: dict[str, Callable[[Mapping], bool]] = {
    "single": lambda fields: int(fields["count"]) == 1,
    "labelled": lambda fields: int(fields["label"]) >= 0,
}
"""Filters by name, over a record's fields (all but the image decoded). A set without such a field
is an error."""


def get_filter(where: str) -> Callable[[Mapping], bool]:
    """A filter by name, or a person's own as 'package.module:function'. UserError where there is
    none such."""
    if where in FILTERS:
        return FILTERS[where]
    module, colon, function = where.partition(":")
    if not colon:
        raise UserError(
            f"unknown filter {where!r}{nearest(where, FILTERS)}; your own goes as "
            "'package.module:function'"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as fault:
        raise UserError(f"filter {where!r} cannot be imported: {fault}") from None


def identity(where: str | None) -> str | None:
    """What a set's fingerprint says of its filter: its name; of a person's own its source too, so
    that a changed one is another."""
    if where is None or where in FILTERS:
        return where
    try:
        return (
            f"{where} "
            f"{hashlib.sha256(inspect.getsource(get_filter(where)).encode()).hexdigest()[:16]}"
        )
    except (OSError, TypeError):  # made without a source file
        return where


class LazyFields(Mapping):
    """A record's fields, each made when it is asked for: so a filter over 'width' reads headers and
    one over 'label' does not.

    known: name → value. made: name → a function that gives it. A name of neither is a KeyError.
    """

    def __init__(self, known: Mapping[str, object], made: Mapping[str, Callable[[], object]]):
        self._known, self._made = dict(known), made

    def __getitem__(self, name: str) -> object:
        if name not in self._known:
            self._known[name] = self._made[name]()
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._known, *self._made]))

    def __len__(self) -> int:
        return len({*self._known, *self._made})
