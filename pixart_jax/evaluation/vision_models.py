"""Networks of transformers that look at images for the compositional benchmarks: detectors, depth,
BLIP-VQA, CLIP. Each takes a block of images, uint8 [h, w, 3], and gives rows of JSON (see
detections.py). torch is imported inside functions."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.evaluation import geneval, torch_models
from pixart_jax.evaluation.torch_models import TorchModel, embed_pixels, embed_texts, unit
from pixart_jax.weights.hub import model_folder

Images = Sequence[np.ndarray]
KEPT = 0.1  # of a detection's score, to lie above; the rules' own thresholds act later
VQA_SIDE = 480  # px
_ENC, _DEC = 30523, 30522  # tokens that begin BLIP's question and its answer
_YES, _NO = 2748, 2053
_GREY = 0x99  # of the pixels around an object whose colour is asked


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
    """Any detector of transformers: with masks (Mask2Former …), of fixed classes (DETR, RT-DETR,
    YOLOS …) or of words (OWL-ViT, Grounding DINO …)."""

    net: TorchModel

    @property
    def digest(self) -> str:
        return self.net.digest

    @classmethod
    def load(cls, path: str) -> Detector:
        """Raises UserError for a model that detects nothing."""
        torch_models.require()
        config = model_folder(path, ()) / "config.json"
        names = json.loads(config.read_text()).get("architectures") if config.is_file() else None
        kind = (names or ["nothing"])[0]
        if not kind.endswith(("ForObjectDetection", "ForUniversalSegmentation")):
            raise UserError(f"{path} is {kind}, no detector of transformers")
        grounded = re.match("Owl|Grounding|MMGrounding|OmDet", kind)
        processor = "AutoProcessor" if grounded else "AutoImageProcessor"
        return cls(torch_models.load(path, kind, processor))

    def __call__(self, images: Images, words: Sequence[Sequence[str]]) -> list[list[dict]]:
        """The detections in each image: {class, score, box, mask (bool [h, w]) or None}. words: of
        each image, for detectors of words."""
        if hasattr(self.net.processor, "post_process_grounded_object_detection"):
            return [self._of_words(image, list(asked)) for image, asked in zip(images, words)]
        inputs = self.net.inputs(images)
        outputs = self.net.model(**inputs)
        sizes = [image.shape[:2] for image in images]
        labels = self.net.model.config.id2label
        if "masks_queries_logits" not in outputs:
            processed = self.net.processor.post_process_object_detection(
                outputs, threshold=KEPT, target_sizes=sizes
            )
            return [_rows([labels[int(n)] for n in found["labels"]], found) for found in processed]
        processed = self.net.processor.post_process_instance_segmentation(
            outputs, threshold=KEPT, target_sizes=sizes, return_binary_maps=True
        )
        return [
            [
                _of_mask(labels[segment["label_id"]], segment["score"], mask.cpu().numpy() > 0)
                for segment, mask in zip(found["segments_info"], found["segmentation"])
            ]
            for found in processed
        ]

    def _of_words(self, image: np.ndarray, words: list[str]) -> list[dict]:
        import inspect

        if not words:
            return []
        owl = self.net.model.config.model_type.startswith("owl")
        texts = [f"a photo of a {word}" for word in words] if owl else words
        inputs = self.net.inputs([image], text=[texts])
        process = self.net.processor.post_process_grounded_object_detection
        given = {"text_labels": [words], "input_ids": inputs.get("input_ids"), "threshold": KEPT}
        known = inspect.signature(process).parameters
        given = {name: value for name, value in given.items() if name in known}
        found = process(self.net.model(**inputs), target_sizes=[image.shape[:2]], **given)[0]
        # Grounding DINO answers with the words that it used, of one or several labels
        named = [[word for word in words if word in label] for label in found["text_labels"]]
        return [
            {**row, "class": word}
            for row, those in zip(_rows(found["text_labels"], found), named)
            for word in those[:1]
        ]


def _rows(names: Sequence[str], found: Any) -> list[dict]:
    return [
        {"class": name, "score": float(score), "box": [float(v) for v in box], "mask": None}
        for name, score, box in zip(names, found["scores"], found["boxes"])
    ]


def _of_mask(name: str, score: float, mask: np.ndarray) -> dict:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [float(v) for v in (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)]
    return {"class": name, "score": score, "box": box, "mask": mask}


def add_depths(net: TorchModel, images: Images, found: Sequence[list[dict]]) -> None:
    """Set the depth of each detection: the mean over its box of a depth map between 0 and 1, larger
    is nearer."""
    maps = net.model(**net.inputs(images)).predicted_depth
    sizes = [image.shape[:2] for image in images]
    torch = torch_models.require()
    for depth, (h, w), rows in zip(maps, sizes, found):
        depth = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=1e-12)
        depth = torch.nn.functional.interpolate(
            depth[None, None], (h, w), mode="bilinear", align_corners=True
        )[0, 0]
        for row in rows:
            x, y = (_inside(row["box"][n], row["box"][n + 2], side) for n, side in ((0, w), (1, h)))
            row["depth"] = float(depth[y, x].mean())


def _inside(low: float, high: float, side: int) -> slice:
    """The pixels of a box along an axis of ``side`` px, at least one."""
    start = min(max(round(low), 0), side - 1)
    return slice(start, max(min(round(high), side), start + 1))


def crop(image: np.ndarray, box: Sequence[float], mask: np.ndarray | None) -> np.ndarray:
    """An object cut out, uint8 [h, w, 3]; grey (#999) outside its mask."""
    h, w = image.shape[:2]
    shown = image if mask is None else np.where(mask[..., None], image, np.uint8(_GREY))
    return shown[_inside(box[1], box[3], h), _inside(box[0], box[2], w)]


def colours(clip: TorchModel, crops: Images, name: str) -> list[str]:
    """The colour of objects of one class by zero-shot CLIP: the nearest of geneval.COLOURS."""
    nearest = (embed_images(clip, crops) @ _colour_texts(clip, name).T).argmax(-1)
    return [geneval.COLOURS[int(n)] for n in nearest]


@functools.lru_cache
def _colour_texts(clip: TorchModel, name: str) -> Any:
    """[colours, d]: the mean over three texts each."""
    forms = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
    texts = [form.format(c, name) for c in geneval.COLOURS for form in forms]
    return unit(embed_texts(clip, texts).reshape(len(geneval.COLOURS), len(forms), -1).mean(1))


def add_colours(
    colours_of: Callable[[Images, str], Sequence[str]],
    image: np.ndarray,
    found: Sequence[dict],
    names: Iterable[str],
) -> None:
    """Set the colour of those detections of classes ``names`` that GenEval's rules may look at."""
    for name in sorted(names):
        some = [
            one
            for one in found
            if geneval.benchmark_name(one["class"]) == name and one["score"] > geneval.THRESHOLD
        ]
        crops = [crop(image, one["box"], one["mask"]) for one in some]
        for one, colour in zip(some, colours_of(crops, name) if some else ()):
            one["color"] = colour


def embed_images(clip: TorchModel, images: Images) -> Any:
    """[n, d], of norm 1."""
    pixels = clip.inputs(images, input_data_format="channels_last")["pixel_values"]
    return embed_pixels(clip, pixels)


def yes_and_no(
    net: TorchModel, images: Images, questions: Sequence[Sequence[str]]
) -> list[list[tuple[float, float]]]:
    """BLIP-VQA's probabilities of yes and no as the first word of its answer to each question about
    each image, as the original network computes them: images squashed to VQA_SIDE, the question's
    first token replaced by [ENC]. Questions of one length form a batch, so none is padded."""
    torch, model = torch_models.require(), net.model
    side = {"height": VQA_SIDE, "width": VQA_SIDE}
    pixels = torch.cat([net.inputs([image], size=side)["pixel_values"] for image in images])
    seen = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True)[0]
    asked = [(n, _asked(question)) for n, some in enumerate(questions) for question in some]
    tokens = [
        net.processor.tokenizer(text, truncation=True, max_length=35).input_ids for _, text in asked
    ]
    pairs: dict[int, tuple[float, float]] = {}
    for length in {len(some) for some in tokens}:
        rows = [n for n, some in enumerate(tokens) if len(some) == length]
        ids = torch.tensor([[_ENC, *tokens[n][1:]] for n in rows], device=seen.device)
        states = model.text_encoder(
            input_ids=ids, encoder_hidden_states=seen[[asked[n][0] for n in rows]], return_dict=True
        ).last_hidden_state
        logits = model.text_decoder(
            input_ids=torch.full_like(ids[:, :1], _DEC),
            encoder_hidden_states=states,
            return_dict=True,
        ).logits[:, 0]
        found = logits.double().softmax(-1)[:, [_YES, _NO]].tolist()
        pairs |= {n: (yes, no) for n, (yes, no) in zip(rows, found)}
    answers: list[list[tuple[float, float]]] = [[] for _ in images]
    for n, (owner, _) in enumerate(asked):
        answers[owner].append(pairs[n])
    return answers


def _asked(text: str) -> str:
    words = re.sub(r'[.!"()*#:;~]', "", text.lower()).rstrip(" ").split(" ")
    return " ".join(words[:50])
