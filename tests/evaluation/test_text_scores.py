"""CLIP score and preference scores, by tiny random models of the released kinds."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, CLIPImageProcessor, Dinov2Config, Dinov2Model

from pixart_jax import plots
from pixart_jax.config import Config, DataConfig, EvaluateConfig, PreviewConfig, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.evaluation import frechet, inception, score_command, stage_metrics
from pixart_jax.evaluation.set_scores import cmmd
from pixart_jax.evaluation.torch_models import IMAGENET_COLOURS, embeddings, load, projected
from tests.evaluation.calls import (
    evaluate,
    refused,
    rows_of,
    score_of,
    stub_sampler,
    write_images,
    write_rows,
)
from tests.evaluation.test_fid_command import NET, small_net
from tests.evaluation.tiny_clip import random_weights, save_clip

PROMPTS = ["a red circle", "two blue stars", "a dog " * 60 + "end", "", "a cat"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """clip/, a tiny CLIPModel and its processor; images/, as sample.py writes them; their arrays in
    the order of the names."""
    root = tmp_path_factory.mktemp("world")
    model, processor = save_clip(root / "clip")
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, 256, (32 + 8 * (n == 1), 48, 3), np.uint8) for n in range(5)]
    write_images(root / "images", arrays, PROMPTS, steps=20)
    return root, arrays, model, processor


def cosines(world, prefix=""):
    """One image at a time, by the model's own forward: [n]; and exp(logit_scale)."""
    _, arrays, model, processor = world
    found = []
    for array, prompt in zip(arrays, PROMPTS):
        how = {"truncation": True, "max_length": 77, "return_tensors": "pt"}
        given = processor(text=[prefix + prompt], images=[Image.fromarray(array)], **how)
        with torch.no_grad():
            found.append(float(model(**given).logits_per_image[0, 0]))
    scale = float(model.logit_scale.detach().exp())
    return np.array(found) / scale, scale


def test_the_three_clip_scores_and_pickscore_are_the_models_similarity(world, tmp_path, capsys):
    root, *_ = world
    run = (root / "images", "--model", root / "clip", "--batch-size", 2, "--out", tmp_path)
    plain, scale = cosines(world)
    prefixed, _ = cosines(world, "A photo depicts ")
    assert plain.min() < 0 < plain.max()
    for what, values in (
        ("clip --definition cosine", plain),
        ("clip --definition torchmetrics", 100 * plain.clip(0)),
        ("clip --definition hessel", 2.5 * prefixed.clip(0)),
        ("preference --score pickscore", scale * plain),
    ):
        name, *flags = what.split()
        assert evaluate(name, *run, *flags) == 0, capsys.readouterr().err
        record = score_of(tmp_path)
        scores = [row["score"] for row in rows_of(tmp_path / "results.jsonl")]
        np.testing.assert_allclose(scores, values, atol=2e-5 * abs(values).max())
        assert record["value"] == pytest.approx(np.mean(values), rel=1e-4)
        half = 1.96 * np.std(values, ddof=1) / math.sqrt(5)
        assert record["interval"][1] == pytest.approx(np.mean(values) + half, rel=1e-3)
    assert record["metric"] == "pickscore" and record["n"] == {"generated": 5}
    assert record["steps"] == 20 and record["versions"]["torch"] and record["factor"] == scale
    assert all(len(of) == 64 for of in (record["prompts"], record["weights"]["sha256"]))
    (root / "list.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS if prompt))
    error = refused(capsys, "clip", *run, "--prompts", root / "list.txt")
    assert "no image" not in error and "lacks, ''" in error
    assert torch.equal(projected(torch.ones(2)), torch.ones(2))  # as in transformers 4


def test_a_stage_scores_its_images_by_its_prompts_or_the_previews(world, tmp_path):
    root, arrays, *_ = world
    cosine, _ = cosines(world)
    evaluate_every = EvaluateConfig(1, ("clip",), 5, clip=str(root / "clip"))
    data = DataConfig("folder:x")
    stage = StageConfig("words", data=data, evaluate=evaluate_every, start="fresh")
    config = Config("c", (stage,), preview=PreviewConfig(prompts=tuple(PROMPTS)))
    vae = SimpleNamespace(config=SimpleNamespace(factor=8))
    frozen = SimpleNamespace(text_states=lambda texts, limit: None, vae=vae)
    asked = []

    def generate(batch, settings):
        asked.append(settings.prompts)
        return [arrays[PROMPTS.index(prompt)] for prompt in settings.prompts]

    measure = stage_metrics.open_metric("clip", config, stage, frozen, None)
    assert measure(generate)["clip"] == pytest.approx(100 * cosine.clip(0).mean(), rel=1e-4)
    own = [PROMPTS[4], PROMPTS[1]]  # in turns, as often as images are asked for
    write_rows(tmp_path / "list.jsonl", ({"prompt": p} for p in own))
    listed = dataclasses.replace(evaluate_every, prompts=str(tmp_path / "list.jsonl"))
    stage = dataclasses.replace(stage, evaluate=listed)
    measure = stage_metrics.open_metric("clip", config, stage, frozen, None)
    expected = 100 * cosine.clip(0)[[4, 1, 4, 1, 4]].mean()
    assert measure(generate)["clip"] == pytest.approx(expected, rel=1e-4)
    assert asked == [tuple(PROMPTS), (*own, *own, own[0])]
    with pytest.raises(UserError, match="embedded world"):
        stage_metrics.open_metric("shapes", config, stage, frozen, None)


def test_a_share_of_the_blocks_is_reused(world, tmp_path, capsys):
    root, *_ = world
    run = ("clip", root / "images", "--model", root / "clip", "--batch-size", 2)
    assert evaluate(*run, "--share", "1/2") == 0
    assert "share 1/2 of the scores is done" in capsys.readouterr().out
    (block,) = (tmp_path / "cache").glob("features/*/*.npz")
    assert evaluate(*run) == 0 and block.name == "000001.npz"
    assert "torchmetrics" in capsys.readouterr().out


def test_a_sweep_over_guidance_draws_fid_against_the_clip_score(world, tmp_path, monkeypatch):
    root, arrays, *_ = world
    monkeypatch.setattr(inception, "apply", small_net)
    monkeypatch.setattr(inception, "random", lambda seed: NET)
    monkeypatch.setitem(inception.WIDTHS, "pool", 27)
    for guidance in (1.5, 4):
        dimmed = [np.clip(a[:32] * (guidance / 4), 0, 255).astype(np.uint8) for a in arrays]
        folder = root / "made" / f"guidance-{guidance:g}"
        write_images(folder, dimmed, PROMPTS, guidance=guidance)
    drawn, curves = [], plots.curves
    monkeypatch.setattr(
        plots, "curves", lambda *what, **how: drawn.append((what[1], how)) or curves(*what, **how)
    )
    flags = ("--random-inception", 0, "--guidance", 1.5, 4, "--clip", root / "clip")
    reference = ("--reference", root / "made/guidance-4", "--out", tmp_path)
    assert evaluate("fid", root / "made", *reference, *flags) == 0
    record = score_of(tmp_path)
    for point in record["sweep"]:
        folder = f"guidance-{point['guidance']:g}"
        one = score_of(tmp_path / folder)
        assert point["fid"] == one["value"]
        flags = ("--model", root / "clip", "--out", tmp_path / "clip")
        assert evaluate("clip", root / "made" / folder, *flags) == 0
        clip = score_of(tmp_path / "clip")
        assert point["clip"] == clip["value"]
    assert (record["value"], record["guidance"]) == (pytest.approx(0, abs=1e-6), 4)
    ((series, how),) = drawn
    x, y = ([point[name] for point in record["sweep"]] for name in ("clip", "fid"))
    assert series["fid"] == (x, y) and how["axis"] == "CLIP score" and x[0] != x[1]
    assert Image.open(tmp_path / "sweep.png").size[0] > 500


def test_cmmd_and_fd_dinov2_embed_as_their_authors(world, tmp_path):
    """CMMD: CLIP's normalised embedding of the centre square; FD-DINOv2: the first state of an
    image squashed to 224 × 224."""
    root, arrays, clip, _ = world
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dino = Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).eval()
    dino.save_pretrained(root / "dino")

    def embed(image):
        short = min(image.shape[:2])
        top, left = ((side - short) // 2 for side in image.shape[:2])
        square = Image.fromarray(image[top : top + short, left : left + short])
        given = CLIPImageProcessor(do_resize=False, do_center_crop=False)
        sized = square.resize((32, 32), Image.Resampling.BICUBIC)
        pixels = given(sized, return_tensors="pt").pixel_values
        first = F.normalize(projected(clip.get_image_features(pixels)))
        sized = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
        colours = {n: IMAGENET_COLOURS[i] for i, n in enumerate(("image_mean", "image_std"))}
        pixels = given(sized, return_tensors="pt", **colours).pixel_values
        return first[0].detach(), dino(pixels).last_hidden_state[0, 0].detach()

    wanted = [np.stack(rows) for rows in zip(*map(embed, arrays))]
    for rows, mode, model in zip(wanted, ("cmmd", "fd-dinov2"), ("clip", "dino")):
        network = embeddings(load(str(root / model), processor=None), mode)
        found = network.compute(np.stack([network.prepare(a) for a in arrays]), range(5))["pool"]
        np.testing.assert_allclose(found, rows, atol=1e-5)
        assert network.widths["pool"] == found.shape[1]
    for n, of in enumerate(("a", "b")):
        write_images(root / of, (a[:32] for a in arrays[2 * n : 2 * n + 3]))
    for features_of, model in (("cmmd", "clip"), ("fd-dinov2", "dino")):
        flags = ("--reference", root / "b", "--features", features_of, "--model", root / model)
        assert evaluate("fid", root / "a", *flags, "--out", tmp_path / model) == 0
    record = score_of(tmp_path / "clip")
    assert (record["metric"], record["mode"]) == ("cmmd", "cmmd")
    cut = [np.stack([embed(a[:32])[0] for a in of]) for of in (arrays[:3], arrays[2:5])]
    assert record["value"] == pytest.approx(cmmd(*cut), rel=1e-4)
    record = score_of(tmp_path / "dino")
    cut = [np.stack([embed(a[:32])[1] for a in of]) for of in (arrays[:3], arrays[2:5])]
    expected = frechet.distance(*map(frechet.statistics, cut))
    assert record["metric"].startswith("fid (") and record["value"] == pytest.approx(expected, 1e-3)


def open_clip_forward(t, pixels, ids):
    """(image, text) embeddings, written from open_clip's description of ViT-H/14."""

    def block(x, name, heads, mask=None):
        norm = lambda x, n: F.layer_norm(x, x.shape[-1:], t[f"{n}.weight"], t[f"{n}.bias"])  # noqa: E731
        attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
        own = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        attention.load_state_dict({k: t[f"{name}.attn.{k}"] for k in own})
        y = norm(x, f"{name}.ln_1")
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        layers = ((t[f"{name}.mlp.{n}.weight"], t[f"{name}.mlp.{n}.bias"]) for n in NAMES)
        (up, down), y = layers, norm(x, f"{name}.ln_2")
        return x + F.linear(F.gelu(F.linear(y, *up)), *down)

    NAMES = ("c_fc", "c_proj")
    x = F.conv2d(pixels, t["visual.conv1.weight"], stride=16).flatten(2).mT
    first = t["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + t["visual.positional_embedding"]
    wide = x.shape[-1:]
    x = F.layer_norm(x, wide, t["visual.ln_pre.weight"], t["visual.ln_pre.bias"])
    x = block(x, "visual.transformer.resblocks.0", 1)[:, 0]
    x = F.layer_norm(x, wide, t["visual.ln_post.weight"], t["visual.ln_post.bias"])
    y = t["token_embedding.weight"][ids] + t["positional_embedding"][: ids.shape[1]]
    mask = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)
    y = block(y, "transformer.resblocks.0", 1, mask)
    y = F.layer_norm(y, y.shape[-1:], t["ln_final.weight"], t["ln_final.bias"])
    y = y[torch.arange(len(y)), ids.argmax(-1)]
    return x @ t["visual.proj"], y @ t["text_projection"]


def test_hps_reads_open_clips_names_and_pads_the_shorter_side(world, tmp_path):
    root, arrays, _, processor = world
    words, shapes = len(processor.tokenizer), {}
    for of, d in (("visual.transformer", 80), ("transformer", 64)):
        at = f"{of}.resblocks.0"
        for name, out, into in (
            *(("attn.in_proj_", 3 * d, d), ("attn.out_proj.", d, d)),
            *(("mlp.c_fc.", 2 * d, d), ("mlp.c_proj.", d, 2 * d)),
        ):
            shapes |= {f"{at}.{name}weight": (out, into), f"{at}.{name}bias": (out,)}
        shapes |= {f"{at}.ln_{n}.{p}": (d,) for n in (1, 2) for p in ("weight", "bias")}
    norms = (("visual.ln_pre", 80), ("visual.ln_post", 80), ("ln_final", 64))
    shapes |= {f"{name}.{p}": (d,) for name, d in norms for p in ("weight", "bias")}
    shapes |= {"visual.conv1.weight": (80, 3, 16, 16), "visual.class_embedding": (80,)}
    shapes |= {"visual.positional_embedding": (5, 80), "visual.proj": (80, 24)}
    shapes |= {"token_embedding.weight": (words, 64), "positional_embedding": (77, 64)}
    t = random_weights((shapes | {"text_projection": (64, 24), "logit_scale": ()}).items())
    torch.save({"state_dict": t, "epoch": 1}, tmp_path / "hps.pt")
    flags = ("--model", tmp_path / "hps.pt", "--tokenizer", root / "clip", "--out", tmp_path)
    assert evaluate("preference", root / "images", "--score", "hpsv2.1", *flags) == 0
    found = rows_of(tmp_path / "results.jsonl")
    colours = CLIPImageProcessor().to_dict()
    mean, std = (torch.tensor(colours[name]) for name in ("image_mean", "image_std"))
    for array, prompt, line in zip(arrays, PROMPTS, found):
        height = round(array.shape[0] * 32 / 48)
        pixels = torch.from_numpy(array / np.float32(255)).permute(2, 0, 1)[None]
        pixels = F.interpolate(pixels, (height, 32), mode="bicubic", antialias=True)[0]
        black = torch.zeros(3, 32, 32)
        black[:, (32 - height) // 2 :][:, :height] = pixels
        black = torch.stack([(c - m) / s for c, m, s in zip(black, mean, std)])
        ids = processor.tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
        both = open_clip_forward(t, black[None], ids["input_ids"])
        assert line["score"] == pytest.approx(float(F.cosine_similarity(*both).detach()), abs=2e-5)
    del t["ln_final.bias"]
    torch.save(t, tmp_path / "hps.pt")
    assert evaluate("preference", root / "images", "--score", "hpsv2", *flags) == 2


def test_hpsv2s_benchmark_is_generated_and_scored_by_style(world, tmp_path, monkeypatch, capsys):
    root, arrays, *_ = world
    plain, scale = cosines(world)
    styles = {"photo": PROMPTS[:2], "anime": PROMPTS[2:]}
    for style, some in styles.items():
        (tmp_path / f"{style}.json").write_text(json.dumps(some))

    stub_sampler(monkeypatch, lambda n, prompt: arrays[PROMPTS.index(prompt)])
    monkeypatch.setattr(score_command, "_PART", 2)
    call = ["preference", tmp_path / "made", "--benchmark", tmp_path, "--model", root / "clip"]
    call += ["--out", tmp_path / "out"]
    assert evaluate(*call, "--", "--steps", 2) == 0, capsys.readouterr().err
    record = score_of(tmp_path / "out")
    rows = rows_of(tmp_path / "out/results.jsonl")
    assert [row["image"] for row in rows] == [
        *(f"anime/0000{n}.png" for n in range(3)),
        *(f"photo/0000{n}.png" for n in range(2)),
    ]
    anime, photo = scale * plain[2:], scale * plain[:2]
    near = {"rel": 1e-4, "abs": 1e-4}
    assert [row["score"] for row in rows] == pytest.approx([*anime, *photo], **near)
    assert record["value"] == pytest.approx(scale * plain.mean(), **near)
    deviation = np.std([anime[:2].mean(), anime[2]])
    assert record["styles"] == {
        "anime": pytest.approx({"value": anime.mean(), "deviation": deviation}, **near),
        "photo": pytest.approx({"value": photo.mean(), "deviation": 0}, **near),
    }
    assert record["steps"] == 2 and "anime" in capsys.readouterr().out
    (tmp_path / "made/photo/00001.png").unlink()
    (tmp_path / "photo").mkdir()
    (tmp_path / "photo/anime.json").write_text("{}")
    for flags, says in (
        (call, "1 of 5 images of the list are missing, the first is photo/00001"),
        ([*call, "--benchmark", root], "holds none of anime, concept-art, paintings, photo"),
        ([*call, "--benchmark", tmp_path / "photo"], "anime.json is no list of prompts"),
    ):
        assert says in refused(capsys, *flags)


def head(width):
    """The five linear layers of the aesthetic predictor and of ImageReward."""
    sizes, torch_head = (width, 1024, 128, 64, 16, 1), []
    for n, pair in enumerate(zip(sizes, sizes[1:])):
        torch_head += [nn.Linear(*pair), *([nn.Dropout(0.2)] if n < 3 else [])]
    return nn.Sequential(*torch_head).eval().requires_grad_(False)


def test_the_aesthetic_head_is_an_affine_map_of_the_image(world, tmp_path):
    root, arrays, model, processor = world
    layers = head(16)
    torch.save({f"layers.{k}": v for k, v in layers.state_dict().items()}, tmp_path / "head.pth")
    flags = ("--model", root / "clip", "--head", tmp_path / "head.pth", "--out", tmp_path)
    assert evaluate("preference", root / "images", "--score", "aesthetic", *flags) == 0
    pixels = processor(images=[Image.fromarray(a) for a in arrays], return_tensors="pt")
    embedded = F.normalize(projected(model.get_image_features(**pixels)), dim=-1)
    record = score_of(tmp_path)
    assert record["value"] == pytest.approx(float(layers(embedded).mean()), rel=1e-4)
    assert len(record["head"]) == 64


def test_image_reward_reads_its_names(world, tmp_path):
    """The vision half as BLIP writes it, the text half as a BERT that attends to it."""
    root, arrays, _, processor = world
    d, words = 64, len(processor.tokenizer)
    sizes = {"hidden_size": d, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = BertConfig(**sizes, vocab_size=words, intermediate_size=96, is_decoder=True)
    config.add_cross_attention = True
    bert = BertModel(config, add_pooling_layer=False).eval()
    floats = [(k, v.shape) for k, v in bert.state_dict().items() if v.dtype == torch.float]
    bert.load_state_dict(random_weights(floats), strict=False)
    types = "embeddings.token_type_embeddings.weight"  # BLIP's text encoder has none
    bert.embeddings.token_type_embeddings.weight.data.zero_()
    at = "blip.visual_encoder"
    shapes = {f"{at}.cls_token": (1, 1, d), f"{at}.pos_embed": (1, 5, d)}
    for name, *size in (
        *(("patch_embed.proj", d, 3, 16, 16), ("norm", d), ("blocks.0.norm1", d)),
        *(("blocks.0.norm2", d), ("blocks.0.attn.qkv", 3 * d, d), ("blocks.0.attn.proj", d, d)),
        *(("blocks.0.mlp.fc1", 4 * d, d), ("blocks.0.mlp.fc2", d, 4 * d)),
    ):
        shapes |= {f"{at}.{name}.weight": tuple(size), f"{at}.{name}.bias": (size[0],)}
    t, layers = random_weights(shapes.items()), head(d)
    whole = t | {f"blip.text_encoder.{k}": v for k, v in bert.state_dict().items() if k != types}
    whole |= {f"mlp.layers.{k}": v for k, v in layers.state_dict().items()}
    torch.save(whole | {"blip.text_proj.bias": torch.zeros(3)}, tmp_path / "reward.pt")
    flags = ("--model", tmp_path / "reward.pt", "--tokenizer", root / "clip", "--out", tmp_path)
    assert evaluate("preference", root / "images", "--score", "imagereward", *flags) == 0

    def part(name):
        return t[f"{at}.{name}.weight"], t[f"{at}.{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (d,), *part(name), eps=1e-6)

    pixels = processor(images=[Image.fromarray(a) for a in arrays], return_tensors="pt")
    x = F.conv2d(pixels["pixel_values"], *part("patch_embed.proj"), stride=16).flatten(2).mT
    x = torch.cat([t[f"{at}.cls_token"].expand(len(x), 1, d), x], 1) + t[f"{at}.pos_embed"]
    q, k, v = F.linear(norm(x, "blocks.0.norm1"), *part("blocks.0.attn.qkv")).chunk(3, -1)
    x = x + F.linear((q @ k.mT / d**0.5).softmax(-1) @ v, *part("blocks.0.attn.proj"))
    hidden = F.gelu(F.linear(norm(x, "blocks.0.norm2"), *part("blocks.0.mlp.fc1")))
    x = norm(x + F.linear(hidden, *part("blocks.0.mlp.fc2")), "norm")
    how = {"padding": True, "truncation": True, "max_length": 35, "return_tensors": "pt"}
    texts = processor.tokenizer(PROMPTS, **how)
    length = texts.attention_mask.shape[1]
    mask = texts.attention_mask[:, None, None].bool().expand(-1, 1, length, -1)
    states = bert(texts.input_ids, mask, encoder_hidden_states=x).last_hidden_state
    rewards = (layers(states[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    found = rows_of(tmp_path / "results.jsonl")
    np.testing.assert_allclose([line["score"] for line in found], rewards.detach(), atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("clip {0}/images --model {0}/none", "none"),
        ("clip {0}/images --model {0}/images", "cannot be opened"),
        ("clip {0}/images --definition cosin", "cosine"),
        ("clip {0}/plain --model {0}/clip", "give --prompts FILE"),
        ("clip {0}/plain --model {0}/clip --prompts {0}/three.txt", "3 prompts for the 2 images"),
        ("clip {0}/images --model {0}/clip --prompts {0}/three.txt", "does not fit"),
        ("preference {0}/images --score aesthetic --model {0}/clip", "--head FILE"),
        ("preference {0}/images --score hpsv2 --model {0}/three.txt", "three.txt"),
    ],
)
def test_mistakes_are_one_line(flags, says, world, capsys, tmp_path):
    root, arrays, *_ = world
    write_images(root / "plain", arrays[:2])
    (root / "three.txt").write_text("a\nb\nc\n")
    assert says in refused(capsys, *flags.format(root).split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "score.json").exists()


def test_without_pytorch_one_line_names_the_extra(world, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pixart-jax[evaluate]" in refused(capsys, "clip", world[0] / "images")
