"""A vision-language model of transformers: images and prompts → captions."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Sequence
from typing import Any

from PIL import Image

from pixart_jax.errors import UserError
from pixart_jax.files import folder_fingerprint, hash64
from pixart_jax.weights.files import choose_set, weight_sets
from pixart_jax.weights.hub import model_folder

# px: the sides of an image as the official script shows it to the model
SHORTEST, LONGEST = 400, 800


@dataclasses.dataclass(frozen=True)
class Generation:
    """One caption. tokens: how many were generated, without the end token. finish: 'stop' at the
    end token, 'length' at the limit."""

    text: str
    tokens: int
    finish: str


def resize(image: Image.Image) -> Image.Image:
    """Keep the ratio: short side at most 400 px, long side at most 800; never enlarge. The official
    script's rule, which gives a thin line's short side 0 px; here it is 1."""
    longest, shortest = max(image.size), min(image.size)
    ratio = longest / shortest
    short = max(1, int(min(LONGEST / ratio, SHORTEST, shortest)))
    long = max(1, min(int(short * ratio), LONGEST))
    return image.resize((short, long) if image.height > image.width else (long, short))


def seed_of(seed: int, key: str, attempt: int = 0) -> int:
    """The 63-bit seed of one image's sampling: of its key, not of its batch or worker."""
    return hash64(f"{seed}\0{attempt}\0{key}") >> 1


class VisionLanguageModel:
    """Whatever AutoModelForImageTextToText opens, with its AutoProcessor.

    model: a folder, or a hub id. dtype: of the computation; 'auto' is the file's own on a GPU and
    float32 on a CPU. threads: of a CPU; if given, no GPU is used. variant: of the weights' files.
    Raises UserError for a folder that does not exist, a model without image input or a missing
    package.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "auto",
        threads: int | None = None,
        variant: str | None = None,
    ):
        import torch

        folder = local(model, variant)
        check(folder)
        if os.path.isdir(folder) and (sets := weight_sets(os.listdir(folder))):
            variant = choose_set(sets, variant, model)[1] or None
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        gpu = threads is None and torch.cuda.is_available()
        self.device = torch.device("cuda" if gpu else "cpu")
        kind = "float32" if dtype == "auto" and not gpu else dtype
        try:
            self.processor = AutoProcessor.from_pretrained(folder)
            self.model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=kind if kind == "auto" else getattr(torch, kind), variant=variant
            )
        except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{model} cannot be opened: {_brief(error)}") from error
        self.model = self.model.to(self.device).eval()
        self.tokenizer: Any = getattr(self.processor, "tokenizer", None)
        if self.tokenizer is None or getattr(self.processor, "image_processor", None) is None:
            raise UserError(
                f"{model}: its processor takes no pictures ({type(self.processor).__name__})"
            )
        self.tokenizer.padding_side = "left"  # new tokens follow the last token of every prompt
        # a chat model has several end tokens
        ends = self.model.generation_config.eos_token_id
        ends = [*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id]
        self.ends = [token for token in dict.fromkeys(ends) if token is not None]
        if not self.ends:
            raise UserError(
                "the model names no end mark (eos_token_id), so that no caption would ever end"
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = self.ends[0]
        holders = (self.processor, self.tokenizer)
        self._template = any(getattr(holder, "chat_template", None) for holder in holders)
        self.image_mark = str(getattr(self.processor, "image_token", None) or "<image>")
        special = {self.image_mark, "<image>", *self.tokenizer.all_special_tokens}
        self.special = sorted(special, key=len, reverse=True)

    def conversation(self, prompt: str) -> str:
        """The prompt in the model's chat template, or in LLaVA's plain form where it has none."""
        if not self._template:
            return f"USER: {self.image_mark}\n{prompt} ASSISTANT:"
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )

    def generate(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_new_tokens: int,
    ) -> list[Generation]:
        """One caption per image. temperature: 0 takes the likeliest token; otherwise each image is
        sampled with its own seed.

        Prompts are padded on the left and the padding is masked. A sample is the largest of logits
        / temperature + Gumbel noise, with a generator per row, so a caption does not depend on its
        batch (up to ties that the rounding of another batch shape decides).
        """
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        texts = [self.conversation(prompt) for prompt in prompts]
        start = self.tokenizer.bos_token
        inputs = self.processor(
            text=texts,
            images=[[image] for image in images],
            padding=True,
            return_tensors="pt",
            add_special_tokens=start is None or not texts[0].startswith(start),
        ).to(self.device)
        for name, values in inputs.items():
            if torch.is_tensor(values) and values.is_floating_point():
                inputs[name] = values.to(self.model.dtype)
        # The model's own settings (a temperature, a penalty) would fill what is not given here.
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.model.generation_config = config
        noise = [] if temperature <= 0 else [GumbelNoise(temperature, seeds, self.device)]
        try:
            with torch.inference_mode():
                tokens = self.model.generate(
                    **inputs, generation_config=config, logits_processor=LogitsProcessorList(noise)
                )
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory with {len(images)} pictures at once: a smaller --batch-size fits"
            ) from None
        return [self._decode(row) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]

    def _decode(self, tokens: list[int]) -> Generation:
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        text = " ".join(self.tokenizer.decode(tokens[:end], skip_special_tokens=True).split())
        if end is None:
            return Generation(text, len(tokens), "length")
        return Generation(text, end, "stop")


class GumbelNoise:
    """Its argmax samples from softmax(logits / temperature), one generator a row."""

    def __init__(self, temperature: float, seeds: Sequence[int], device):
        import torch

        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, ids, scores):  # [b, l], [b, vocabulary] → [b, vocabulary] fp32
        noise = scores.float().clone()
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self._temperature - noise.log()


def check_engines() -> None:
    """Raise UserError, with the command that installs them, where PyTorch or Ray is missing."""
    missing = []
    for name, module in {"PyTorch": "torch", "Ray Data": "ray"}.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f"captioning needs {' and '.join(missing)}: pip install torch 'ray[data]'")


def local(model: str, variant: str | None = None) -> str:
    """The model's folder; of a hub id it is downloaded first, with one set of weights."""
    return str(model_folder(model, (), variant=variant))


def check(model: str) -> Any:
    """Return the model's config. Raises UserError where there is none or it takes no images."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        what = f"no model folder {model} here, and the hub gives no model of that name"
        if os.path.isdir(model):
            what = f"{model} holds no model of transformers"
        raise UserError(f"{what}: {_brief(error)}") from None
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(
            f"{model} is a {config.model_type}: a model that writes about pictures is needed"
        )
    return config


def identity(model: str, variant: str | None = None) -> str:
    """A fingerprint of a model folder's files, or the hub's commit."""
    if os.path.isdir(model):
        return folder_fingerprint(model)
    return f"{model}@{os.path.basename(local(model, variant))}"


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:240]
