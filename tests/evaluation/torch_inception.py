"""Inception-v3 of 2015-12-05 in PyTorch's functions, written from the table of its layers: what the
Flax network is compared with, and the peer of benchmarks/fid.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def in_torch(tensors, x, eps=1e-3, last_pool=F.max_pool2d, padding_counts=False):
    """{pool, spatial, logits} of x [b, 3, h, w], as the network is published."""
    t = {name: torch.as_tensor(value) for name, value in tensors.items()}
    cat = lambda *parts: torch.cat(parts, 1)  # noqa: E731

    def unit(x, name, stride=1, pad=0):
        parts = ("running_mean", "running_var", "weight", "bias")
        stats = (t[f"{name}.bn.{part}"] for part in parts)
        x = F.conv2d(x, t[f"{name}.conv.weight"], stride=stride, padding=pad)
        return F.relu(F.batch_norm(x, *stats, eps=eps))

    def chain(x, block, *names):
        """7×1 and 1×7 kernels are told apart by their shape; others keep the size if they can."""
        for name in names:
            h, w = t[f"{block}.{name}.conv.weight"].shape[2:]
            x = unit(x, f"{block}.{name}", pad=(h // 2, w // 2))
        return x

    def mean_pool(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=padding_counts)

    def a_or_c(x, block, *branches):
        parts = [chain(x, block, *(f"{b}_{n}" for n in range(1, k + 1))) for b, k in branches]
        one = chain(x, block, "branch1x1")
        return cat(one, *parts, chain(mean_pool(x), block, "branch_pool")), one

    def e(x, block, pool):
        three, double = chain(x, block, "branch3x3_1"), chain(x, block, "branch3x3dbl_1")
        double = chain(double, block, "branch3x3dbl_2")
        return cat(
            chain(x, block, "branch1x1"),
            *(chain(three, block, f"branch3x3_2{side}") for side in "ab"),
            *(chain(double, block, f"branch3x3dbl_3{side}") for side in "ab"),
            chain(pool, block, "branch_pool"),
        )

    x = unit(unit(unit(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", pad=1)
    x = unit(unit(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x, _ = a_or_c(x, block, ("branch5x5", 2), ("branch3x3dbl", 3))
    double = chain(x, "Mixed_6a", "branch3x3dbl_1", "branch3x3dbl_2")
    double = unit(double, "Mixed_6a.branch3x3dbl_3", 2)
    x = cat(unit(x, "Mixed_6a.branch3x3", 2), double, F.max_pool2d(x, 3, 2))
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x, one = a_or_c(x, block, ("branch7x7", 3), ("branch7x7dbl", 5))
        if block == "Mixed_6d":
            spatial = one[:, :7].permute(0, 2, 3, 1).flatten(1)
    three = unit(chain(x, "Mixed_7a", "branch3x3_1"), "Mixed_7a.branch3x3_2", 2)
    seven = chain(x, "Mixed_7a", *(f"branch7x7x3_{n}" for n in (1, 2, 3)))
    x = cat(three, unit(seven, "Mixed_7a.branch7x7x3_4", 2), F.max_pool2d(x, 3, 2))
    x = e(x, "Mixed_7b", mean_pool(x))
    x = e(x, "Mixed_7c", last_pool(x, 3, 1, 1))
    pool = x.mean((2, 3))
    found = {"pool": pool, "spatial": spatial, "logits": pool @ t["fc.weight"].T}
    return {name: value.cpu().numpy() for name, value in found.items()}
