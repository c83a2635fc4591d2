"""Random weights for the references: none is zero, and activations keep the size that they have in
trained models."""

from __future__ import annotations

import math
from collections.abc import Iterable

_TABLES = {  # what is looked up or added as it is: its deviation does not fall with its width
    "scale_shift_table": 0.5,  # gates that matter
    "embedding_table.weight": 0.5,
    "relative_attention_bias.weight": 1.0,
    "shared.weight": 1.0,
    "embed_tokens.weight": 1.0,
}


def distribution(
    name: str, shape: tuple[int, ...], t5_head: int | None = None
) -> tuple[float, float]:
    """(mean, deviation) of a parameter by its name. t5_head: d_kv of a T5, whose logits are not
    divided by √d_kv: its queries are that much smaller."""
    for ending, deviation in _TABLES.items():
        if name.endswith(ending):
            return 0.0, deviation
    if len(shape) == 1:  # of a norm, or a bias
        return (1.0, 0.2) if name.endswith("weight") else (0.0, 0.2)
    deviation = math.prod(shape[1:]) ** -0.5
    if t5_head and name.endswith("SelfAttention.q.weight"):
        deviation *= 2 * t5_head**-0.5
    return 0.0, deviation


def draw(
    parameters: Iterable[tuple[str, object]], seed: int = 0, t5_head: int | None = None
) -> None:
    """Fill PyTorch parameters in place, in their order."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            mean, deviation = distribution(name, tuple(parameter.shape), t5_head)
            parameter.normal_(generator=generator).mul_(deviation).add_(mean)


def materialised(build, seed: int = 0, t5_head: int | None = None):
    """build()'s PyTorch model with random weights; its initialisation, which takes longer than a
    forward pass, is not computed.

    Buffers that are computed at initialisation (position tables) are for the caller to renew.
    """
    import torch

    with torch.device("meta"):
        model = build()
    model = model.to_empty(device="cpu")
    draw(model.named_parameters(), seed, t5_head)
    return model.eval().requires_grad_(False)
