"""Attention behind one function, and the kernels that can compute it."""

from pixart_jax.models.attention.attend import attention
from pixart_jax.models.attention.backends import (
    NAMES,
    AttentionShape,
    check_backend,
    choose,
    platform,
    unsupported_reason,
)
