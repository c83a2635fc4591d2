"""A ControlNet on the embedded world: does the image follow the edge map?

    python benchmarks/shapes_control.py --controlnet runs/shapes_control/adapter --out runs/control

Scenes of level free; the prompts name colours alone, the Canny edges of the true render give shapes
and places. *Followed*: each object of the scene has a detection of its own with its shape, whose
centre lies within 4 px of its centre. *Colours*: the prompt's colours are there. Both are asked of
images with control, of the same noise without, and of the true scenes after a pass through the
autoencoder (the cap). Writes table.md, scores.json and sheet.png (edges, with, without) to --out.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed.table import flag_parser, table, tell  # noqa: E402
from pixart_jax import Pipeline  # noqa: E402
from pixart_jax.data import shapes  # noqa: E402
from pixart_jax.evaluation.checker import Detection, find_objects  # noqa: E402
from pixart_jax.evaluation.tasks import eval_prompts  # noqa: E402
from pixart_jax.files import write_json, write_text  # noqa: E402
from pixart_jax.images import image_grid, to_model, to_uint8, write_png  # noqa: E402
from pixart_jax.pipeline.conditions import EdgeDetector  # noqa: E402
from pixart_jax.pipeline.sampling_config import SamplingConfig  # noqa: E402

BATCH = 50
WITHIN = 4.0  # px between centres
KINDS = ("with control", "without", "cap")
SETS = {"single": "one object", "pair": "two objects"}


def followed(scene: shapes.Scene, found: Sequence[Detection]) -> bool:
    """Every object has a detection of its own with its shape and place."""

    def matches(obj: shapes.Object, f: Detection) -> bool:
        return f.shape == obj.shape and math.hypot(f.x - obj.x, f.y - obj.y) <= WITHIN

    orders = itertools.permutations(found, len(scene.objects))
    return any(all(map(matches, scene.objects, order)) for order in orders)


def coloured(scene: shapes.Scene, found: Sequence[Detection]) -> bool:
    """The largest detections, as many as the scene has objects, have its colours."""
    wanted = Counter(o.colour for o in scene.objects)
    return Counter(f.colour for f in found[: len(scene.objects)]) == wanted


def generate(pipe: Pipeline, config, prompts, control, first: int) -> np.ndarray:
    """uint8 [n, 64, 64, 3]; image i from the noise of first + i, with control or without."""
    images: dict[int, np.ndarray] = {}
    indices = range(first, first + len(prompts))
    how = {"height": 64, "width": 64, "indices": indices, "control": control}
    for places, batch in pipe.generate(prompts, config, **how):
        images.update(zip(places, batch))
    return np.stack([images[n] for n in range(len(prompts))])


def reconstruct(pipe: Pipeline, renders: np.ndarray) -> np.ndarray:
    """True scenes, uint8 [n, 64, 64, 3], after a pass through the autoencoder."""
    mean, _ = pipe.vae.encode(to_model(renders))
    return to_uint8(np.asarray(pipe.vae.decode(mean), np.float32))


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--model", default=str(ROOT / "assets" / "shapes"))
    parser.add_argument("--controlnet", default=str(ROOT / "assets" / "shapes_control"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pipe = Pipeline.from_pretrained(options.model, controlnet=options.controlnet)
    config = SamplingConfig(guidance=options.guidance, control_scale=options.scale)
    edges = EdgeDetector.open("canny")
    scores: dict[str, dict[str, float]] = {}
    shown: list[np.ndarray] = []
    labels: list[str] = []
    for name, what in SETS.items():
        scenes = [p.scene for p in eval_prompts("free", options.count, sets=(name,))]
        renders = np.stack([shapes.render(scene) for scene in scenes])
        prompts = [shapes.captions(scene)["shapeless"] for scene in scenes]
        maps = edges.of(renders)

        made: dict[str, np.ndarray] = {}
        for kind in KINDS:
            batches: list[np.ndarray] = []
            for start in range(0, len(scenes), BATCH):
                part = slice(start, min(start + BATCH, len(scenes)))
                if kind == "cap":
                    batches.append(reconstruct(pipe, renders[part]))
                else:
                    control = list(maps[part]) if kind == "with control" else None
                    batches.append(generate(pipe, config, prompts[part], control, start))
                tell(f"{what}, {kind}: {part.stop} of {len(scenes)} images")
            made[kind] = np.concatenate(batches)
            found = [find_objects(image) for image in made[kind]]
            for ask in (followed, coloured):
                row = scores.setdefault(f"{what}: {ask.__name__}", {})
                row[kind] = float(np.mean([ask(*pair) for pair in zip(scenes, found)]))
        for n in range(4):
            shown += [maps[n], made["with control"][n], made["without"][n]]
            labels += ["edges", prompts[n], "without control"]
    for row in scores.values():
        row["of the cap"] = row["with control"] / row["cap"]
    columns = [*KINDS, "of the cap"]
    rows = [[question, *(f"{row[k]:.3f}" for k in columns)] for question, row in scores.items()]
    text = table(["", *columns], rows)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "scores.json", scores)
    write_text(options.out / "table.md", text)
    write_png(options.out / "sheet.png", image_grid(shown, labels, columns=6))
    print(text)


if __name__ == "__main__":
    main()
