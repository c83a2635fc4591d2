"""Models of transformers on PyTorch, by which images are scored (the extra evaluate)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pixart_jax.errors import UserError, one_line
from pixart_jax.weights.hub import model_folder

# mean and deviation of the channels, of 0 … 1
CLIP_COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, eq=False)
class TorchModel:
    """model: in evaluation mode, fp32, on a GPU where there is one. processor: of its images and
    texts. digest: SHA-256 of the weights' names and values, whatever the files' format."""

    model: Any
    processor: Any
    name: str
    digest: str

    def inputs(self, images: Sequence[np.ndarray] | None = None, **given: Any) -> dict[str, Any]:
        """The processor's tensors on the model's device. images: uint8 [h, w, 3] each; given: text,
        padding and other options of the processor."""
        if images is not None:
            from PIL import Image

            given["images"] = [Image.fromarray(image) for image in images]
        return dict(self.processor(**given, return_tensors="pt").to(self.model.device))


@dataclasses.dataclass(frozen=True, eq=False)
class Embeddings:
    """One vector an image, as features.Extractor runs it. mode: 'cmmd' (CLIP's projected embedding,
    normalised, of the centre square) or 'fd-dinov2' (DINOv2's first state, of the image squashed to
    224×224)."""

    model: TorchModel
    mode: str
    wanted: tuple[str, ...] = ("pool",)
    devices: int = 1

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def digest(self) -> str:
        return self.model.digest

    @property
    def key(self) -> Sequence[Any]:
        return self.digest, self.mode

    def width(self, name: str) -> int:
        config = self.model.model.config
        return config.projection_dim if self.mode == "cmmd" else config.hidden_size

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 3] → float32 [3, side, side]."""
        from PIL import Image

        if self.mode == "cmmd":
            side, (mean, deviation) = self.model.model.config.vision_config.image_size, CLIP_COLOURS
            short = min(image.shape[:2])
            top, left = ((length - short) // 2 for length in image.shape[:2])
            image = image[top : top + short, left : left + short]
        else:
            side, (mean, deviation) = 224, IMAGENET_COLOURS
        resized = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        scaled = (np.asarray(resized) / 255 - mean) / deviation
        return np.ascontiguousarray(scaled.transpose(2, 0, 1), "f4")

    def compute(self, pixels: np.ndarray, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        torch, model = require(), self.model.model
        with torch.inference_mode():
            some = torch.from_numpy(pixels).to(model.device)
            if self.mode == "cmmd":
                found = torch.nn.functional.normalize(projected(model.get_image_features(some)))
            else:
                found = model(some).pooler_output
        return {"pool": found.cpu().numpy()}


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
    model = model.eval().requires_grad_(False)
    return TorchModel(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        processor,
        name,
        digest.hexdigest(),
    )


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


def projected(output: Any) -> Any:
    """The embedding [n, d] of get_image_features or get_text_features: a tensor in transformers 4,
    pooler_output in 5."""
    return getattr(output, "pooler_output", output)
