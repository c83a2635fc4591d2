"""Where samples come from: one small protocol, and the sets that speak it. :func:`open_source`
opens any of them by its text."""

from pixart_jax.data.sources.filters import FILTERS
from pixart_jax.data.sources.mixture import Mixture, parse_mixture
from pixart_jax.data.sources.opening import open_source, parse_source
from pixart_jax.data.sources.sample import Sample, Source
from pixart_jax.data.sources.tfds import TfdsSource

__all__ = [
    "FILTERS",
    "Mixture",
    "Sample",
    "Source",
    "TfdsSource",
    "kind_of",
    "open_source",
    "parts_of",
]
