"""Attention behind one function, and the kernels that can compute it."""

from pixart_jax.models.attention.attend import attention
from pixart_jax.models.attention.backends import (
    NAMES,
    Call,
    check_backend,
    choose,
    platform,
    refusal,
)
