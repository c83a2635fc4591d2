"""A tiny CLIP with random weights, as transformers saves it."""

from __future__ import annotations

import numpy as np
import torch
import transformers as t


def words_of_clip(*first: str):
    """(a tokenizer of letters, its number of words). first: words before them."""
    letters = [chr(c) for c in (*range(97, 123), 45)]
    words = [*first, "<|startoftext|>", *letters, *(f"{c}</w>" for c in letters), "<|endoftext|>"]
    return t.CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[]), len(words)


def random_weights(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {k: torch.tensor(0.2 * rng.standard_normal(s), dtype=torch.float) for k, s in shapes}


def save_clip(folder):
    """(the model, its processor), also written to the folder."""
    tokenizer, count = words_of_clip()
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    sizes["num_hidden_layers"] = 2
    ends = {"bos_token_id": 0, "eos_token_id": count - 1, "pad_token_id": count - 1}
    config = t.CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": count},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    model = t.CLIPModel(config).eval()
    shapes = ((k, v.shape) for k, v in model.state_dict().items() if v.shape)
    model.load_state_dict(random_weights(shapes), strict=False)
    images = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    processor = t.CLIPProcessor(images, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
