"""Models of transformers on PyTorch, by which images are scored (the extra evaluate): how they are
opened; CLIP and DINOv2; detectors, depth and BLIP-VQA, each of a block of images, uint8 [h, w, 3].
torch is imported inside functions."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pixart_jax.errors import UserError, one_line
from pixart_jax.evaluation.features import FeatureNetwork, square
from pixart_jax.weights.hub import model_folder

# mean and deviation of the channels, of 0 … 1
CLIP_COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Images = Sequence[np.ndarray]
KEPT = 0.1  # of a detection's score, to lie above; the rules' own thresholds act later
VQA_SIDE = 480  # px
_ENC, _DEC = 30523, 30522  # tokens that begin BLIP's question and its answer
_YES, _NO = 2748, 2053


@dataclasses.dataclass(frozen=True, eq=False)
class TorchModel:
    """model: in evaluation mode, fp32, on a GPU where there is one. processor: of its images and
    texts. digest: SHA-256 of the weights' names and values, whatever the files' format."""

    model: Any
    processor: Any
    name: str
    digest: str

    def inputs(self, images: Images, **given: Any) -> dict[str, Any]:
        """The processor's tensors on the model's device. images: uint8 [h, w, 3] each; given: text,
        padding and other options of the processor."""
        from PIL import Image

        given |= {"images": [Image.fromarray(image) for image in images], "return_tensors": "pt"}
        return dict(self.processor(**given).to(self.model.device))


def load(path: str, kind: str = "AutoModel", processor: str | None = "AutoProcessor") -> TorchModel:
    """A local folder or hub id, opened by two classes of transformers (processor None: none).
    Raises UserError without PyTorch, and for a folder that they cannot open."""
    require()
    import transformers

    folder = model_folder(path, ())
    try:
        model = getattr(transformers, kind).from_pretrained(folder, dtype="float32")
        opened = processor and getattr(transformers, processor).from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be opened by {kind}: {one_line(error)}") from None
    return placed(model, opened, path)


def placed(model: Any, processor: Any, name: str) -> TorchModel:
    """A model of transformers made ready to score."""
    torch, digest = require(), hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(key.encode() + data.tobytes())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.eval().requires_grad_(False).to(device)
    return TorchModel(model, processor, name, digest.hexdigest())


def require() -> Any:
    """The module torch; transformers is made silent. Raises UserError where PyTorch is missing."""
    try:
        import torch
    except ImportError:
        raise UserError('this score needs PyTorch: pip install "pixart-jax[evaluate]"') from None
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return torch


def embeddings(net: TorchModel, mode: str) -> FeatureNetwork:
    """One vector an image. mode: 'cmmd' (CLIP's projected embedding, normalised, of the centre
    square) or 'fd-dinov2' (DINOv2's first state, of the image squashed to 224×224)."""
    config, is_clip = net.model.config, mode == "cmmd"
    side = config.vision_config.image_size if is_clip else 224
    mean, deviation = CLIP_COLOURS if is_clip else IMAGENET_COLOURS

    def prepare(image: np.ndarray) -> np.ndarray:
        from PIL import Image

        shown = Image.fromarray(square(image) if is_clip else image)
        resized = shown.resize((side, side), Image.Resampling.BICUBIC)
        scaled = (np.asarray(resized) / 255 - mean) / deviation
        return np.ascontiguousarray(scaled.transpose(2, 0, 1), "f4")

    def compute(pixels: np.ndarray, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        torch = require()
        with torch.inference_mode():
            some = torch.from_numpy(pixels).to(net.model.device)
            found = embed_pixels(net, some) if is_clip else net.model(some).pooler_output
        return {"pool": found.cpu().numpy()}

    return FeatureNetwork(
        key=(net.digest, mode),
        prepare=prepare,
        compute=compute,
        wanted=("pool",),
        name=net.name,
        digest=net.digest,
        mode=mode,
        widths={"pool": config.projection_dim if is_clip else config.hidden_size},
    )


def embed_pixels(clip: TorchModel, pixels: Any) -> Any:
    """CLIP's embeddings [n, d] of pixels [n, 3, h, w], of norm 1."""
    return unit(projected(clip.model.get_image_features(pixels)))


def embed_texts(clip: TorchModel, texts: Sequence[str]) -> Any:
    """[n, d], of norm 1; texts are cut to the model's length."""
    tokenizer = getattr(clip.processor, "tokenizer", clip.processor)
    most = clip.model.config.text_config.max_position_embeddings
    how = {"padding": "max_length", "truncation": True, "max_length": most}
    tokens = tokenizer(list(texts), **how, return_tensors="pt").to(clip.model.device)
    return unit(projected(clip.model.get_text_features(**tokens)))


def unit(vectors: Any) -> Any:
    """Vectors [n, d] of norm 1."""
    return vectors / vectors.norm(dim=-1, keepdim=True)


def projected(output: Any) -> Any:
    """The embedding [n, d] of get_image_features or get_text_features: a tensor in transformers 4,
    pooler_output in 5."""
    return getattr(output, "pooler_output", output)


# ---- what the compositional benchmarks ask ----


def load_detector(path: str) -> TorchModel:
    """Any detector of transformers: with masks (Mask2Former …), of fixed classes (DETR, RT-DETR,
    YOLOS …) or of words (OWL-ViT, Grounding DINO …). Raises UserError for another model."""
    require()
    config = model_folder(path, ()) / "config.json"
    names = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    kind = (names or ["nothing"])[0]
    if not kind.endswith(("ForObjectDetection", "ForUniversalSegmentation")):
        raise UserError(f"{path} is {kind}, no detector of transformers")
    grounded = re.match("Owl|Grounding|MMGrounding|OmDet", kind)
    return load(path, kind, "AutoProcessor" if grounded else "AutoImageProcessor")


def detect(net: TorchModel, images: Images, words: Sequence[Sequence[str]]) -> list[list[dict]]:
    """The detections in each image: {class, score, box, mask (bool [h, w]) or None}. words: of each
    image, for detectors of words."""
    processor, labels = net.processor, net.model.config.id2label
    if hasattr(processor, "post_process_grounded_object_detection"):
        return [_of_words(net, image, list(asked)) for image, asked in zip(images, words)]
    outputs = net.model(**net.inputs(images))
    how = {"threshold": KEPT, "target_sizes": [image.shape[:2] for image in images]}
    if "masks_queries_logits" not in outputs:
        processed = processor.post_process_object_detection(outputs, **how)
        return [_rows([labels[int(n)] for n in found["labels"]], found) for found in processed]
    how["return_binary_maps"] = True
    processed = processor.post_process_instance_segmentation(outputs, **how)
    return [
        [
            _of_mask(labels[segment["label_id"]], segment["score"], mask.cpu().numpy() > 0)
            for segment, mask in zip(found["segments_info"], found["segmentation"])
        ]
        for found in processed
    ]


def _of_words(net: TorchModel, image: np.ndarray, words: list[str]) -> list[dict]:
    if not words:
        return []
    owl = net.model.config.model_type.startswith("owl")
    inputs = net.inputs([image], text=[[f"a photo of a {w}" for w in words] if owl else words])
    process = net.processor.post_process_grounded_object_detection
    given = {"text_labels": [words], "input_ids": inputs.get("input_ids"), "threshold": KEPT}
    known = inspect.signature(process).parameters
    given = {name: value for name, value in given.items() if name in known}
    found = process(net.model(**inputs), target_sizes=[image.shape[:2]], **given)[0]
    rows = []
    for row in _rows(found["text_labels"], found):
        # Grounding DINO answers with the words that it used, of one or several labels
        named = [word for word in words if word in row["class"]]
        rows += [{**row, "class": word} for word in named[:1]]
    return rows


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
    torch = require()
    for depth, (h, w), rows in zip(maps, sizes, found):
        depth = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=1e-12)
        how = {"mode": "bilinear", "align_corners": True}
        depth = torch.nn.functional.interpolate(depth[None, None], (h, w), **how)[0, 0]
        for row in rows:
            x, y = (inside(row["box"][n], row["box"][n + 2], side) for n, side in ((0, w), (1, h)))
            row["depth"] = float(depth[y, x].mean())


def inside(low: float, high: float, side: int) -> slice:
    """The pixels of a box along an axis of ``side`` px, at least one."""
    start = min(max(round(low), 0), side - 1)
    return slice(start, max(min(round(high), side), start + 1))


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
    torch, model = require(), net.model
    side = {"height": VQA_SIDE, "width": VQA_SIDE}
    pixels = torch.cat([net.inputs([image], size=side)["pixel_values"] for image in images])
    seen = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True)[0]
    asked = [(n, _asked(question)) for n, some in enumerate(questions) for question in some]
    how = {"truncation": True, "max_length": 35}
    tokens = [net.processor.tokenizer(text, **how).input_ids for _, text in asked]
    pairs: dict[int, tuple[float, float]] = {}
    for length in {len(some) for some in tokens}:
        rows = [n for n, some in enumerate(tokens) if len(some) == length]
        ids = torch.tensor([[_ENC, *tokens[n][1:]] for n in rows], device=seen.device)
        states = model.text_encoder(
            input_ids=ids, encoder_hidden_states=seen[[asked[n][0] for n in rows]], return_dict=True
        ).last_hidden_state
        first = torch.full_like(ids[:, :1], _DEC)
        decoded = model.text_decoder(first, encoder_hidden_states=states, return_dict=True)
        found = decoded.logits[:, 0].double().softmax(-1)[:, [_YES, _NO]].tolist()
        pairs |= {n: (yes, no) for n, (yes, no) in zip(rows, found)}
    answers: list[list[tuple[float, float]]] = [[] for _ in images]
    for n, (owner, _) in enumerate(asked):
        answers[owner].append(pairs[n])
    return answers


def _asked(text: str) -> str:
    words = re.sub(r'[.!"()*#:;~]', "", text.lower()).rstrip(" ").split(" ")
    return " ".join(words[:50])
