"""Scores of an image and its prompt by released models: CLIP score, PickScore, HPSv2, ImageReward,
LAION's aesthetic predictor.

With the cosine c of CLIP's embeddings of an image and of prefix + prompt, cut to the model's
length, a similarity is factor · c, or factor · max(c, 0) where it is clamped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pixart_jax.errors import UserError, one_line
from pixart_jax.evaluation.features import Network
from pixart_jax.evaluation.torch_models import (
    CLIP_COLOURS,
    TorchModel,
    embed_pixels,
    embed_texts,
    load,
    placed,
    require,
)
from pixart_jax.weights.checkpoints import select
from pixart_jax.weights.files import open_tensors
from pixart_jax.weights.hub import model_folder

BASE, LARGE = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
HUGE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
REWARD_MEAN, REWARD_DEVIATION = 0.16717362830052426, 1.0333394966054072

Fit = Callable[[np.ndarray], np.ndarray] | None
DEFINITIONS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (its customary model, similarity)
    # T2I-CompBench and GigaGAN; torchmetrics; Hessel et al. 2021
    "cosine": (LARGE, {}),
    "torchmetrics": (LARGE, {"factor": 100.0, "clamp": True}),
    "hessel": (BASE, {"factor": 2.5, "clamp": True, "prefix": "A photo depicts "}),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """score: (pixels [n, 3, h, w], prompts) → tensor [n]. facts: of the definition, for score.json.
    fit: image → pixels [3, h, w], instead of the model's own processor."""

    model: TorchModel
    score: Callable[[Any, Sequence[str]], Any]
    facts: Mapping[str, Any]
    fit: Fit = None

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 3] → float32 [3, h, w]."""
        if self.fit is not None:
            return self.fit(image)
        process = getattr(self.model.processor, "image_processor", self.model.processor)
        found = process(image, input_data_format="channels_last", return_tensors="np")
        return found.pixel_values[0]

    def of_prompts(self, prompts: Sequence[str]) -> Network:
        """The scores of a set's images, each under its prompt."""

        def compute(pixels: np.ndarray, numbers: Sequence[int]) -> Mapping[str, Any]:
            torch = require()
            some = torch.from_numpy(pixels[: len(numbers)]).to(self.model.model.device)
            with torch.inference_mode():
                scores = self.score(some, [prompts[n] for n in numbers])
            return {"score": scores.float().cpu().numpy()}

        digest = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
        key = self.model.digest, sorted(self.facts.items()), digest
        return Network(key=key, prepare=self.prepare, compute=compute, wanted=("score",))


def similarity(
    clip: TorchModel, factor: float = 1.0, clamp: bool = False, prefix: str = "", fit: Fit = None
) -> Scorer:
    """The scorer by CLIP's cosine, as above."""

    def score(pixels: Any, prompts: Sequence[str]) -> Any:
        texts = embed_texts(clip, [prefix + prompt for prompt in prompts])
        cosine = (embed_pixels(clip, pixels) * texts).sum(-1)
        return factor * (cosine.clamp(min=0) if clamp else cosine)

    return Scorer(clip, score, {"factor": factor, "clamp": clamp, "prefix": prefix}, fit)


# ---- models ----


def clip_score(definition: str, model: str | None) -> Scorer:
    """The scorer of one of DEFINITIONS, by its customary model or another CLIP."""
    usual, how = DEFINITIONS[definition]
    return similarity(_clip(model or usual), **how)


def pickscore(model: str | None, tokenizer: str | None, head: str | None) -> Scorer:
    """exp(logit_scale) · cosine."""
    clip = _clip(model or "yuvalkirstain/PickScore_v1")
    return similarity(clip, float(clip.model.logit_scale.exp()))


def hps(model: str | None, tokenizer: str | None, head: str | None, version: str = "") -> Scorer:
    """The cosine; papers print 100 times it. version: '' or '.1'."""
    clip = _open_clip(model or f"xswu/HPSv2/HPS_v2{version}_compressed.pt", tokenizer or HUGE)
    side = clip.model.config.vision_config.image_size
    return similarity(clip, fit=lambda image: _whole(image, side))


def aesthetic(model: str | None, tokenizer: str | None, head: str | None) -> Scorer:
    """LAION's predictor, version 2: an affine map of CLIP's normalised embedding of the image;
    prompts have no part in it."""
    if head is None:
        raise UserError(
            "the aesthetic score needs --head FILE: sac+logos+ava1-l14-linearMSE.pth of "
            "github.com/christophschuhmann/improved-aesthetic-predictor"
        )
    file = model_folder(head)
    if not file.is_file():
        raise UserError(f"no file {head}")
    affine, facts = _affine(dict(open_tensors(file)), str(head))
    clip = _clip(model or LARGE)
    return Scorer(clip, lambda pixels, prompts: affine(embed_pixels(clip, pixels)), facts)


def image_reward(model: str | None, tokenizer: str | None, head: str | None) -> Scorer:
    """ImageReward 1.0: an affine map of the first state of BLIP's text encoder, which attends to
    the image, scaled to mean 0 and deviation 1 over the images of its authors."""
    path = model or "THUDM/ImageReward/ImageReward.pt"
    require()
    from transformers import BlipConfig, BlipForImageTextRetrieval, CLIPImageProcessor

    tensors = _open(path, ("mlp.layers.0.weight",))
    held = {_renamed(key, _BLIP): value for key, value in tensors.items()}
    mlp = {key: held.pop(key) for key in list(held) if key.startswith("mlp.")}
    held = {k: v for k, v in held.items() if k.startswith(("vision_model", "text_encoder"))}
    held.pop("text_encoder.embeddings.position_ids", None)
    text = "text_encoder.encoder.layer"
    words, width = held["text_encoder.embeddings.word_embeddings.weight"].shape
    vision = {**_vision(held, 64), "layer_norm_eps": 1e-6}
    language = {
        **{"hidden_size": width, "num_attention_heads": width // 64, "vocab_size": words},
        "num_hidden_layers": _count(held, text),
        "encoder_hidden_size": vision["hidden_size"],
        "intermediate_size": held[f"{text}.0.intermediate.dense.weight"].shape[0],
    }
    blip = BlipForImageTextRetrieval(BlipConfig(text_config=language, vision_config=vision))
    _fill(blip, held, path, ("vision_proj", "text_proj", "itm_head"))
    affine, facts = _affine(mlp, path)
    net = placed(blip, _tokenizer(tokenizer or "google-bert/bert-base-uncased"), path)
    side = vision["image_size"]
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
    how = {"padding": "max_length", "truncation": True, "max_length": 35, "return_tensors": "pt"}

    def score(pixels: Any, prompts: Sequence[str]) -> Any:
        seen = net.model.vision_model(pixels).last_hidden_state
        tokens = net.processor(list(prompts), **how).to(net.model.device)
        mask = seen.new_ones(seen.shape[:2])
        attended = {"encoder_hidden_states": seen, "encoder_attention_mask": mask}
        states, *_ = net.model.text_encoder(**tokens, **attended, return_dict=False)
        return (affine(states[:, 0]) - REWARD_MEAN) / REWARD_DEVIATION

    def fit(image: np.ndarray) -> np.ndarray:
        return images(image, return_tensors="np").pixel_values[0]

    return Scorer(net, score, facts, fit)


# name: (model, tokenizer, head; None: the customary ones) → the scorer
PREFERENCES: dict[str, Callable[..., Scorer]] = {
    "pickscore": pickscore,
    "hpsv2": hps,
    "hpsv2.1": functools.partial(hps, version=".1"),
    "imagereward": image_reward,
    "aesthetic": aesthetic,
}


def _clip(path: str) -> TorchModel:
    found = load(path)
    if not hasattr(found.model, "get_image_features"):
        raise UserError(f"{path} is a {found.model.config.model_type} model, not a CLIP")
    return found


def _open(path: str, anchors: Sequence[str]) -> dict[str, np.ndarray]:
    file = model_folder(path)
    if not file.is_file():
        raise UserError(f"no file {path}, and the hub is not asked for it by that name")
    found = dict(select(open_tensors(file), anchors).tensors)
    if anchors[0] not in found:
        raise UserError(f"{path} holds no {anchors[0]}: it is of another model")
    return found


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no tokenizer {path} (--tokenizer): {one_line(error)}") from None


def _renamed(key: str, table: Sequence[tuple[str, str]]) -> str:
    for pattern, to in table:
        key = re.sub(pattern, to, key)
    return key


_BLOCKS = (
    (r"\.resblocks\.", ".layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)
_CLIP = (
    (r"^visual\.transformer", "vision_model.encoder"),
    (r"^transformer", "text_model.encoder"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    *_BLOCKS,
)
_BLIP = (
    (r"^blip\.", ""),
    (r"^visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj", "vision_model.embeddings.patch_embedding"),
    (r"^visual_encoder\.norm", "vision_model.post_layernorm"),
    (r"^visual_encoder\.blocks", "vision_model.encoder.layers"),
    (r"(vision_model.*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
)


def _open_clip(path: str, tokenizer: str) -> TorchModel:
    """A file of open_clip's ViT-H/14, whatever its sizes, as a CLIPModel."""
    require()
    from transformers import CLIPConfig, CLIPModel

    held: dict[str, np.ndarray] = {}
    for key, value in _open(path, ("visual.class_embedding", "ln_final.weight")).items():
        name = _renamed(key, _CLIP)
        if name in ("text_projection.weight", "visual_projection.weight"):
            value = value.T
        if ".in_proj_" in name:
            for part, piece in zip("qkv", np.split(value, 3)):
                held[re.sub(r"in_proj_", f"{part}_proj.", name)] = piece
        else:
            held[name] = value

    words = held["text_model.embeddings.token_embedding.weight"].shape[0]
    positions = held["text_model.embeddings.position_embedding.weight"].shape[0]
    # eos 2: the state at the largest id is pooled, as in open_clip
    text = {**_tower(held, "text_model", 64), "vocab_size": words, "eos_token_id": 2}
    config = CLIPConfig(
        text_config={**text, "max_position_embeddings": positions, "hidden_act": "gelu"},
        vision_config={**_vision(held, 80), "hidden_act": "gelu"},
        projection_dim=held["visual_projection.weight"].shape[0],
    )
    model = CLIPModel(config)
    _fill(model, held, path)
    return placed(model, _tokenizer(tokenizer), path)


def _tower(held: Mapping[str, np.ndarray], of: str, head: int) -> dict[str, int]:
    """Sizes of a Transformer with such heads."""
    width = held[f"{of}.encoder.layers.0.layer_norm1.weight"].shape[0]
    inner = held[f"{of}.encoder.layers.0.mlp.fc1.weight"].shape[0]
    layers = _count(held, f"{of}.encoder.layers")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, inner, layers, width // head)))


def _vision(held: Mapping[str, np.ndarray], head: int) -> dict[str, int]:
    at = "vision_model.embeddings."
    (places,) = (v.shape[-2] for k, v in held.items() if k.startswith(f"{at}position"))
    patch = held[f"{at}patch_embedding.weight"].shape[-1]
    side = patch * round((places - 1) ** 0.5)
    return {**_tower(held, "vision_model", head), "image_size": side, "patch_size": patch}


def _count(names: Mapping[str, Any], of: str) -> int:
    return len({key.removeprefix(f"{of}.").split(".")[0] for key in names if key.startswith(of)})


def _fill(model: Any, held: Mapping[str, np.ndarray], path: str, but: Sequence[str] = ()) -> None:
    """Load all of ``held``; no parameter may be left out, but those of names that begin so."""
    torch = require()
    tensors = {key: torch.tensor(np.asarray(value, np.float32)) for key, value in held.items()}
    try:
        found = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path} is of another model: {one_line(error)}") from None
    missing = [key for key in found.missing_keys if not key.startswith(tuple(but))]
    if wrong := missing + found.unexpected_keys:
        kind = "lacks" if missing else "holds also"
        raise UserError(f"{path} is of another model: it {kind} {wrong[0]} ({len(wrong)} names)")


def _affine(
    tensors: Mapping[str, np.ndarray], path: str
) -> tuple[Callable[[Any], Any], dict[str, str]]:
    """Linear layers 0, 2, 4, 6, 7 with nothing between them, as one: ([n, d] → [n], its digest)."""
    weight, bias = np.eye(1), np.zeros(1)
    try:
        for n in (7, 6, 4, 2, 0):
            of = next(key for key in tensors if key.endswith(f"layers.{n}.weight"))
            keys = of, of.replace("weight", "bias")
            matrix, shift = (np.asarray(tensors[key], "f8") for key in keys)
            bias, weight = bias + weight @ shift, weight @ matrix
    except (StopIteration, KeyError, ValueError):
        raise UserError(f"{path} holds no head of linear layers 0, 2, 4, 6 and 7") from None
    digest = hashlib.sha256(weight.tobytes() + bias.tobytes()).hexdigest()
    return lambda x: x @ x.new_tensor(weight[0]) + float(bias[0]), {"head": digest}


def _whole(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [h, w, 3] → float32 [3, side, side]: the longer side resized to ``side`` (bicubic), the
    other padded in black on both ends, normalised as CLIP's images."""
    torch = require()
    mean, deviation = (np.array(of, "f4")[:, None, None] for of in CLIP_COLOURS)
    pixels = torch.from_numpy(image.transpose(2, 0, 1) / np.float32(255))[None]
    if (longer := max(image.shape[:2])) != side:
        height, width = (round(n * side / longer) for n in image.shape[:2])
        how = {"mode": "bicubic", "antialias": True}
        pixels = torch.nn.functional.interpolate(pixels, (height, width), **how)
        top, left = (side - height) // 2, (side - width) // 2
        edges = (left, side - width - left, top, side - height - top)
        pixels = torch.nn.functional.pad(pixels, edges)
    return (pixels[0].numpy() - mean) / deviation
