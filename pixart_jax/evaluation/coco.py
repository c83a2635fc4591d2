"""The list of captions of zero-shot FID on COCO."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.errors import UserError, one_line
from pixart_jax.files import write_text

ANNOTATIONS, IMAGES = Path("annotations", "captions_val2014.json"), "val2014"
SIZE = 256  # px, of both sides
LIST = "captions.jsonl"


def caption_list(annotations: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` distinct images, each with one of its captions, both at random: rows {prompt,
    annotation, file}, by image id. Raises UserError for a file of another form and for too few
    images."""
    try:
        held = json.loads(annotations.read_text("utf-8"))
        files = {image["id"]: image["file_name"] for image in held["images"]}
        captions: dict[int, list[tuple[int, str]]] = {}
        for one in held["annotations"]:
            words = " ".join(one["caption"].split())
            captions.setdefault(one["image_id"], []).append((one["id"], words))
    except FileNotFoundError:
        raise UserError(f"no file {annotations}: give COCO's folder of 2014") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{annotations} holds no COCO captions: {one_line(error)}") from None
    known = sorted(captions.keys() & files)
    if len(known) < count:
        raise UserError(f"{annotations} has captions of {len(known)} images, not {count}")
    rng, rows = np.random.default_rng(seed), []
    for place in np.sort(rng.choice(len(known), count, replace=False)):
        image = known[place]
        number, words = sorted(captions[image])[rng.integers(len(captions[image]))]
        rows.append({"prompt": words, "annotation": number, "file": files[image]})
    return rows


def write_captions(coco: Path, out: Path, count: int) -> tuple[Path, dict[str, Any]]:
    """(the file of the list, in the folder of results; facts for score.json)."""
    rows = caption_list(coco / ANNOTATIONS, count)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out.mkdir(parents=True, exist_ok=True)
    file = out / LIST
    write_text(file, text)
    digest = sha256(text.encode()).hexdigest()
    print(f"captions: {file}, {len(rows)} of distinct images, SHA-256 {digest}")
    return file, {"protocol": "coco 2014 val", "captions": {"sha256": digest, "n": len(rows)}}
