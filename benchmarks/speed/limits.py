"""What the machine can do at most, as measured: a large square matrix product, and copying of a
large array."""

from __future__ import annotations

import time
from collections.abc import Callable

SIDE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
COPIED = {"cpu": 256 << 20, "gpu": 4 << 30, "tpu": 1 << 30}  # bytes
REPEAT = 10


def best(call: Callable[[], None], repeat: int = REPEAT) -> float:
    """Seconds of the fastest of some calls; the first is not counted."""
    call()
    found = []
    for _ in range(repeat):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found)


def rates(
    product: Callable[[], None], copy: Callable[[], None], side: int, copied: int
) -> dict[str, float]:
    """{"product": FLOP/s, "copy": bytes/s, read and written}."""
    return {
        "product": 2.0 * side**3 / best(product),
        "copy": 2.0 * copied / best(copy),
        "side": side,
    }


def of_jax(dtype: str) -> dict[str, float]:
    """Through jax, on random numbers: on a GPU zeros are faster."""
    import jax
    import jax.numpy as jnp

    platform = jax.default_backend()
    side, copied = SIDE[platform], COPIED[platform]
    a, b = (
        jax.random.normal(jax.random.key(n), (side, side), jnp.float32).astype(dtype)
        for n in range(2)
    )
    large = jax.random.normal(jax.random.key(2), (copied // 4,))
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.copy)
    return rates(
        lambda: product(a, b).block_until_ready(),
        lambda: copy(large).block_until_ready(),
        side,
        copied,
    )


def of_torch(dtype: str) -> dict[str, float]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    platform = "gpu" if device == "cuda" else "cpu"
    side, copied = SIDE[platform], COPIED[platform]
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out, large = torch.empty_like(a), torch.randn(copied // 4, device=device)
    target = torch.empty_like(large)

    def settled(call):
        def run():
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return rates(
        settled(lambda: torch.matmul(a, b, out=out)),
        settled(lambda: target.copy_(large)),
        side,
        copied,
    )
