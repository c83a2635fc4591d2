"""sample.py --walk: from each prompt of a file to the next, as one animation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pixart_jax.errors import UserError
from pixart_jax.pipeline.sampling_config import check_count
from pixart_jax.remote_path import Location


@dataclasses.dataclass(frozen=True)
class WalkFlags:
    """A walk through the prompts and their noise."""

    walk: int | None = None
    """So many frames from each prompt of --prompts to the next, as an animation: texts and noise
    are interpolated."""
    movie: str = "walk.webp"
    """Its name in --out: .webp, .gif or .mp4 (which needs the extra 'video')."""
    fps: int = 12
    """Its frames a second."""

    def frames(self, keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The settings of all frames, from those of the prompts' own images, the key frames, which
        stay what they are without a walk. Raises UserError for prompts that cannot be walked
        between."""
        if self.walk is None:
            return keys
        from pixart_jax.images import check_animation

        for name in ("walk", "fps"):
            check_count(name, getattr(self, name))
        check_animation(self.movie)
        if len(keys) < 2:
            raise UserError("a walk needs at least two prompts: give --prompts FILE")
        own = {"prompt", "index", "seed"}
        first = {name: value for name, value in keys[0].items() if name not in own}
        frames = []
        for here, there in zip(keys, keys[1:]):
            for name, value in there.items():
                if name not in own and value != first.get(name):
                    raise UserError(f"a walk's prompts must be alike: {name} differs")
            toward = {"toward": there["prompt"], "toward_seed": there["seed"]}
            toward["toward_index"] = there["index"]
            frames.append(here)
            for k in range(1, self.walk):
                frames.append({**here, **toward, "frame": k, "share": k / self.walk})
        return [*frames, keys[-1]]

    def write(self, folder) -> Location:
        """The animation of an OutputFolder whose frames are all there."""
        from pixart_jax.images import write_animation

        frames = [folder.paths[n] for n in range(len(folder.wanted))]
        write_animation(folder.folder / self.movie, frames, self.fps)
        return folder.folder / self.movie


def toward_of(images: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """``toward`` of ``Pipeline.generate`` for frames between two prompts."""
    names = ("toward", "toward_seed", "toward_index", "share")
    return [tuple(image[name] for name in names) for image in images]
