"""Models of transformers on PyTorch, by which images are scored (the extra evaluate)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pixart_jax.errors import UserError, one_line
from pixart_jax.evaluation.features import FeatureNetwork, square
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
