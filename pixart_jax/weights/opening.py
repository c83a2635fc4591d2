"""Parameters that are read while their caller goes on: traces, compiles, encodes a text with a part
that is there already.

One thread of the process reads, part after part in the order in which they were opened: two parts
neither share a disk nor are begun in memory at once. Who asks for parameters that are not there yet
waits for them, and is told there of what went wrong.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping

import jax

# A process that ends while it reads is not held up: the copying threads take no more work then, and
# the reader stops.
_READER = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="opening")


class PendingParams:
    """Parameters under way. shapes: of all that will be there, our tree of ShapeDtypeStruct with
    shardings."""

    def __init__(self, shapes: Mapping, read: Callable[[], Mapping]):
        self.shapes = shapes
        device = jax.config.jax_default_device  # a thread has its own

        def opened() -> Mapping:
            with jax.default_device(device):
                return read()

        self._read = _READER.submit(opened)

    def result(self) -> Mapping:
        """The parameters; waits for them. Raises what reading them raised."""
        return self._read.result()


class LazyParams:
    """The field of a dataclass that is given parameters, or an Opening of them, and gives
    parameters."""

    def __set_name__(self, owner: type, name: str):
        self._name = name

    def __set__(self, instance: object, value: Mapping | PendingParams):
        vars(instance)[self._name] = value

    def __get__(self, instance: object | None, owner: type | None = None) -> Mapping:
        if instance is None:
            # a dataclass asks its class for a default: there is none
            raise AttributeError(self._name)
        value = vars(instance)[self._name]
        if isinstance(value, PendingParams):
            value = vars(instance)[self._name] = value.result()
        return value
