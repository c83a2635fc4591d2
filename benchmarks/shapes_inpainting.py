"""Inpainting on the embedded world: one of two objects is replaced, and the exact checker says
whether the new one is right, the old one gone and the other one whole.

    python benchmarks/shapes_inpainting.py --count 1000 --out runs/inpainting

The mask is a square around the first object; the prompt is the scene's caption with the new one
in its place. The other object is judged in the decoded latents, before known pixels are put back.
Writes table.md and sheet.png (scene, mask, result) to --out.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed.table import flag_parser, table, tell  # noqa: E402
from pixart_jax import Pipeline  # noqa: E402
from pixart_jax.data import shapes  # noqa: E402
from pixart_jax.evaluation.checker import Detection, find_objects  # noqa: E402
from pixart_jax.evaluation.tasks import eval_prompts  # noqa: E402
from pixart_jax.images import image_grid, to_model, write_png  # noqa: E402
from pixart_jax.pipeline import editing  # noqa: E402

BATCH = 50
MARGIN = 5  # px between an object's radius and its mask's edge


def replaced(scene: shapes.Scene, index: int) -> shapes.Scene:
    """The scene with another first object: of its size and place, but a colour and a shape of
    neither object."""
    rng = np.random.default_rng([7, index])
    old, other = scene.objects
    colours = [c for c in shapes.COLOURS if c not in (old.colour, other.colour)]
    kinds = shapes.LEVELS["plain"].shapes
    names = [s for s in kinds if s not in (old.shape, other.shape)]
    pairs = [(c, s) for c in colours for s in names if (c, s) not in shapes.WITHHELD]
    colour, shape = pairs[rng.integers(len(pairs))]
    new = dataclasses.replace(old, colour=colour, shape=shape)
    return dataclasses.replace(scene, objects=(new, other))


def mask_of(scene: shapes.Scene) -> np.ndarray:
    """bool [h, w]: a square around the first object."""
    obj = scene.objects[0]
    y, x = np.mgrid[: scene.height, : scene.width] + 0.5
    return np.maximum(abs(x - obj.x), abs(y - obj.y)) <= obj.radius + MARGIN


def judged(old: shapes.Scene, new: shapes.Scene, mask: np.ndarray, image: np.ndarray):
    """Whether the new object is right, the old one gone, and the other one there."""
    found = find_objects(image)

    def inside(f: Detection) -> bool:
        return mask[min(int(f.y), len(mask) - 1), min(int(f.x), mask.shape[1] - 1)]

    def like(f: Detection, o: shapes.Object) -> bool:
        return (f.colour, f.shape) == (o.colour, o.shape)

    return {
        "new object right": any(like(f, new.objects[0]) for f in found if inside(f)),
        "old object gone": not any(like(f, old.objects[0]) for f in found),
        "other object whole": any(like(f, old.objects[1]) for f in found if not inside(f)),
    }


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--model", default=str(ROOT / "assets" / "shapes"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.7, 0.8, 0.9, 1.0])
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pipe = Pipeline.from_pretrained(options.model)
    scenes = [p.scene for p in eval_prompts("plain", options.count, sets=("pair",))]
    wanted = [replaced(scene, n) for n, scene in enumerate(scenes)]
    masks = [mask_of(scene) for scene in scenes]
    images = [shapes.render(scene) for scene in scenes]
    prompts = [shapes.captions(scene)["short"] for scene in wanted]
    scores: dict[str, dict[str, float]] = {}
    for strength in options.strengths:
        made: list[np.ndarray] = []
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            given = prompts[part], images[part], masks[part]
            made += list(before_pasting(pipe, *given, start, strength, options.guidance))
            tell(f"strength {strength:g}: {len(made)} of {len(images)} images")
        verdicts = [judged(*each) for each in zip(scenes, wanted, masks, made)]
        scores[f"{strength:g}"] = {k: float(np.mean([v[k] for v in verdicts])) for k in verdicts[0]}
    how = {"strength": options.strengths[-1], "guidance": options.guidance}
    results = pipe(prompts[:8], image=images[:8], mask=masks[:8], **how)
    options.out.mkdir(parents=True, exist_ok=True)
    names = list(next(iter(scores.values())))
    rows = [[name, *(f"{scores[s][name]:.3f}" for s in scores)] for name in names]
    text = table(["", *(f"strength {s}" for s in scores)], rows)
    (options.out / "table.md").write_text(text)
    print(text)
    shown = [part for n in range(8) for part in (images[n], results[n])]
    labels = [part for n in range(8) for part in (shapes.captions(scenes[n])["short"], prompts[n])]
    write_png(options.out / "sheet.png", image_grid(shown, labels))


def before_pasting(pipe, prompts, images, masks, first, strength, guidance) -> np.ndarray:
    """What the pipeline generates, before it puts known pixels back; uint8 [n, h, w, 3]."""
    canvases = [editing.Canvas(image, mask) for image, mask in zip(images, masks)]
    mean, _ = pipe.vae.encode(to_model(np.stack(images)))
    indices = range(first, first + len(images))
    noise, _ = pipe.noise(0, indices, *images[0].shape[:2])
    latents = pipe.denoise(
        *pipe.encode_text(prompts),
        noise,
        latents=mean * pipe.vae.config.scaling_factor,
        mask=np.stack([canvas.latent_mask(pipe.factor) for canvas in canvases]),
        strength=strength,
        guidance=pipe.sampling.guidance if guidance is None else guidance,
    )
    return np.asarray(pipe.decode(latents))


if __name__ == "__main__":
    main()
