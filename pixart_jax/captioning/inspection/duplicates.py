"""Pictures that are the same to the eye: a perceptual hash of each, and groups of hashes that
differ in few bits.

The hash is ImageHash's phash: signs of the lowest 8×8 frequencies of the picture at 32×32 gray, 64
bits. Resizing, recompression and small changes of tone leave it nearly as it was; two different
photographs differ in about 32 bits.
"""

from __future__ import annotations

import numpy as np

_BITS = 64


def perceptual_hash(pixels: np.ndarray) -> np.uint64:
    """uint8 [h, w, 3] → 64 bits."""
    import imagehash
    from PIL import Image

    bits = imagehash.phash(Image.fromarray(pixels)).hash.reshape(_BITS)
    return np.packbits(bits).view(">u8")[0].astype(np.uint64)


def groups(hashes: np.ndarray, distance: int) -> list[np.ndarray]:
    """Indices of hashes that lie together, largest group first; pictures without a like are in
    none.

    hashes: uint64 [n]. distance: two hashes that differ in at most so many bits are linked, and
    links chain. Exact, and without
    comparing all pairs: of distance + 1 bands of bits, two such hashes share at least one.
    """
    kinds, which = np.unique(hashes, return_inverse=True)  # equal ones are one node, however many
    parent = np.arange(len(kinds))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    edges = np.linspace(0, _BITS, distance + 2).astype(int)
    for low, high in zip(edges, edges[1:]) if distance else ():
        band = (kinds >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for block in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for at, i in enumerate(block[:-1]):
                near = block[at + 1 :][
                    np.bitwise_count(kinds[block[at + 1 :]] ^ kinds[i]) <= distance
                ]
                for j in near:
                    parent[root(int(j))] = root(int(i))
    roots = np.array([root(i) for i in range(len(kinds))])[which.reshape(-1)]
    order = np.argsort(roots, kind="stable")
    found = [
        block
        for block in np.split(order, np.flatnonzero(np.diff(roots[order])) + 1)
        if len(block) > 1
    ]
    return sorted(found, key=lambda block: (-len(block), block[0]))
