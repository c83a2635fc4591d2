"""A vision-language model of transformers: pictures and prompts → captions, each the same whatever
it is batched with."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pixart_jax.errors import UserError

NEEDS = "pip install torch 'ray[data]'"
# px: the sides of a picture as the official script shows it to the model
SHORTEST, LONGEST = 400, 800


@dataclasses.dataclass(frozen=True)
class Generation:
    """One caption. tokens: how many were drawn, the end mark not counted. finish: 'stop' at the end
    mark, 'length' at the limit."""

    text: str
    tokens: int
    finish: str


def resize(image: Image.Image) -> Image.Image:
    """Keeping its ratio: the short side at most 400 px, the long one at most 800; never enlarged.
    The official script's rule, which asks for a thin line's short side to be 0 px; here it is 1."""
    longest, shortest = max(image.size), min(image.size)
    ratio = longest / shortest
    short = max(1, int(min(LONGEST / ratio, SHORTEST, shortest)))
    long = max(1, min(int(short * ratio), LONGEST))
    return image.resize((short, long) if image.height > image.width else (long, short))


def seed_of(seed: int, key: str, attempt: int = 0) -> int:
    """The seed of one picture's draw: of its key, not of its place in a batch or its worker. 63
    bits."""
    return (
        int.from_bytes(
            hashlib.blake2b(
                f"{seed}\0{attempt}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8
            ).digest()
        )
        >> 1
    )


class VisionLanguageModel:
    """Whatever AutoModelForImageTextToText opens, with its AutoProcessor.

    model: a folder, or a name on the hub. dtype: of the computation; 'auto' is the file's own on a
    GPU and float32 on a CPU. threads: of a CPU; given, no GPU is used. UserError for a folder that
    is not there, a model that sees no pictures, a processor that lacks a package.
    """

    def __init__(self, model: str, dtype: str = "auto", threads: int | None = None):
        import torch

        check(model)
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device(
            "cuda" if threads is None and torch.cuda.is_available() else "cpu"
        )
        kind = dtype if dtype != "auto" else ("float32" if self.device.type == "cpu" else "auto")
        try:
            self.processor = AutoProcessor.from_pretrained(model)
            self.model = AutoModelForImageTextToText.from_pretrained(
                model, dtype=kind if kind == "auto" else getattr(torch, kind)
            )
        except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError) as fault:
            raise UserError(f"{model} cannot be opened: {_first_words(fault)}") from fault
        self.model = self.model.to(self.device).eval()
        self.tokenizer = getattr(self.processor, "tokenizer", None)
        if self.tokenizer is None or getattr(self.processor, "image_processor", None) is None:
            raise UserError(
                f"{model}: its processor takes no pictures ({type(self.processor).__name__})"
            )
        self.tokenizer.padding_side = "left"  # what is drawn follows the last token of every prompt
        self.ends = _ends(self.model, self.tokenizer)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = self.ends[0]
        self._template = bool(
            getattr(self.processor, "chat_template", None)
            or getattr(self.tokenizer, "chat_template", None)
        )
        image_mark = getattr(self.processor, "image_token", None)
        self.image_mark = str(image_mark) if image_mark else "<image>"
        self.special = tuple(
            sorted(
                {self.image_mark, "<image>", *self.tokenizer.all_special_tokens},
                key=len,
                reverse=True,
            )
        )

    def conversation(self, prompt: str) -> str:
        """The prompt as the model was trained to see it: by its chat template, or LLaVA's plain
        form where it has none."""
        if not self._template:
            return f"USER: {self.image_mark}\n{prompt} ASSISTANT:"
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )

    def say(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        temperature: float,
        most: int,
    ) -> list[Generation]:
        """One caption an image. temperature: 0 takes the likeliest token each time; else each
        picture draws with its own seed.

        Prompts are padded on the left and the padding is masked. A draw is the largest of logits /
        temperature + Gumbel noise, and a row's noise comes from its own seed, so that a caption
        does not depend on what it is batched with (up to ties that the rounding of another batch
        shape decides).
        """
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        texts = [self.conversation(prompt) for prompt in prompts]
        marked = self.tokenizer.bos_token is not None and texts[0].startswith(
            self.tokenizer.bos_token
        )
        inputs = self.processor(
            text=texts,
            images=[[image] for image in images],
            padding=True,
            return_tensors="pt",
            add_special_tokens=not marked,
        ).to(self.device)
        for name, values in inputs.items():
            if torch.is_tensor(values) and values.is_floating_point():
                inputs[name] = values.to(self.model.dtype)
        # The model's own settings (a temperature, a penalty) would be filled in where these say
        # nothing.
        config = GenerationConfig(
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.model.generation_config = config
        noise = [] if temperature <= 0 else [_Gumbel(temperature, seeds, self.device)]
        try:
            with torch.inference_mode():
                tokens = self.model.generate(
                    **inputs, generation_config=config, logits_processor=LogitsProcessorList(noise)
                )
        except torch.OutOfMemoryError:
            raise UserError(
                f"the device is out of memory with {len(images)} pictures at once: a smaller "
                "--batch-size would fit"
            ) from None
        return [self._said(row) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]

    def _said(self, tokens: list[int]) -> Generation:
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Generation(
            " ".join(text.split()),
            len(tokens) if end is None else end,
            "length" if end is None else "stop",
        )


class _Gumbel:
    """A logits processor after which the likeliest token is a draw from softmax(logits /
    temperature), with a generator a row."""

    def __init__(self, temperature: float, seeds: Sequence[int], device):
        import torch

        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, ids, scores):  # [b, l], [b, vocabulary] → [b, vocabulary] fp32
        import torch

        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self._temperature - noise.log()


def check_engines() -> None:
    """UserError, the one line that says how to get them, where PyTorch or Ray is not installed."""
    lacking = [
        name
        for name, module in (("PyTorch", "torch"), ("Ray Data", "ray"))
        if not _installed(module)
    ]
    if lacking:
        raise UserError(
            f"captioning needs PyTorch and Ray Data, and {' and '.join(lacking)} is not "
            f"installed: {NEEDS}"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # taken out of sys.modules
        return False


def check(model: str):
    """The model's config; UserError where there is none, or where it is that of a model that sees
    no pictures. Opens no weights."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as fault:
        if os.path.isdir(model):
            raise UserError(
                f"{model} holds no model of transformers: {_first_words(fault)}"
            ) from None
        raise UserError(
            f"no model folder {model} here, and the hub gives no model of that name: "
            f"{_first_words(fault)}"
        ) from None
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(
            f"{model} is a {config.model_type} model, which does not write about pictures: LLaVA, "
            "SmolVLM, Qwen-VL and the like do "
            "(AutoModelForImageTextToText)"
        )
    return config


def identity(model: str) -> str:
    """What the model is, so that two models' captions are not mixed: a hash of its folder's files
    (large ones by size and both ends), or the hub's commit."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{getattr(check(model), '_commit_hash', None) or 'unknown'}"
    whole = hashlib.sha256()
    for file in sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    ):
        size = file.stat().st_size
        whole.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as data:
            whole.update(data.read(1 << 20))
            data.seek(max(0, size - (1 << 20)))
            whole.update(data.read())
    return whole.hexdigest()


def _ends(model, tokenizer) -> list[int]:
    """Every token that ends a caption: the model's own list (a chat model has two) and the
    tokenizer's end mark."""
    given = model.generation_config.eos_token_id
    given = given if isinstance(given, list) else [given]
    ends = [token for token in dict.fromkeys([*given, tokenizer.eos_token_id]) if token is not None]
    if not ends:
        raise UserError(
            "the model names no end mark (eos_token_id), so that no caption would ever end"
        )
    return ends


def _first_words(fault: BaseException) -> str:
    return " ".join(str(fault).split())[:240]
