"""Vision-language models of random weights, LLaVA and Idefics3, saved as a hub's folders are.

Each has a few thousand parameters and a tokenizer of whole words, so that what it says is nonsense
that can be read. Weights are large, so that the likeliest token is far from the next one and greedy
decoding does not hang on the last bit of a sum.
"""

from __future__ import annotations

import sys
from pathlib import Path

WORDS = """a an the of in on with and is are small large red green blue white black wooden old young man woman dog cat rocket coffee cup
table chair street sky tree house car image picture photograph style caption describe this its very detailed manner give painting
light shadow background foreground ' , . : standing sitting holding near under USER ASSISTANT User Assistant""".split()  # noqa: E501
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == "
    "'image' %}IMAGE\n"
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt "
    "%}ASSISTANT:{% endif %}"
)


# What Idefics3's processor puts around the tiles of an image.
TILES = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
TILES += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def small_llama(tokenizer, positions: int):
    """The config of the language model in three of the families."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        **SMALL,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def words_tokenizer(special: list[str]):
    """A fast tokenizer of WORDS; what is not among them is <unk>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    # words joined by spaces, none before a full stop
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",  # as many are saved; who generates has to turn it
    )
    fast.add_special_tokens({"additional_special_tokens": special})
    return fast


def _save(model, processor, folder: Path) -> Path:
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = (
                    1.0 if "embed" in name or "lm_head" in name else parameter[0].numel() ** -0.5
                )
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava(folder: Path, chat_template: bool = True) -> Path:
    """LLaVA: CLIP's vision tower, a projector, Llama."""
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = words_tokenizer(["<image>"])
    text = small_llama(tokenizer, 512)
    vision = CLIPVisionConfig(**SMALL, image_size=28, patch_size=14, projection_dim=32)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>") if chat_template else None,
    )
    return _save(LlavaForConditionalGeneration(config), processor, folder)


def idefics(folder: Path) -> Path:
    """Idefics3, SmolVLM's family: an image is cut into tiles, so that the number of its tokens
    depends on its shape."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = words_tokenizer(TILES)
    config = Idefics3Config(
        vision_config=Idefics3VisionConfig(**SMALL, image_size=32, patch_size=8),
        text_config=small_llama(tokenizer, 1024),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    template = TEMPLATE.replace("IMAGE", "<image>")
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    return _save(Idefics3ForConditionalGeneration(config), processor, folder)


# SmolVLM's and Qwen-VL's processors need torchvision, which no CPU build of PyTorch here fits
FAMILIES = {"llava": llava, "idefics3": idefics}


if __name__ == "__main__":  # python tests/captioning/tiny_vlms.py FOLDER: the LLaVA of docs/data.md
    print(llava(Path(sys.argv[1])))
