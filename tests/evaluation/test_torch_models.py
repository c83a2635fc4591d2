"""The networks of the compositional benchmarks, by tiny random models of the released kinds: from a
folder of images in the official layout to the score."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import transformers as t
from PIL import Image

from pixart_jax.evaluation import benchmark, compbench, dpg, features, geneval, torch_models
from pixart_jax.evaluation.benchmark import objects_of, read
from pixart_jax.evaluation.phrases import Phrasebook
from tests.evaluation.calls import (
    evaluate,
    refused,
    rows_of,
    score_of,
    stub_sampler,
    write_images,
    write_rows,
)
from tests.evaluation.test_benchmarks import CSV
from tests.evaluation.tiny_clip import save_clip, words_of_clip

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
SIZES["num_hidden_layers"] = 2
PROMPTS = ["a green bench and a red car", "a blue cup"]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + 8 * n, 64, 3), np.uint8) for n in range(4)]


def words_of_bert():
    known = {"[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, "yes": 2748, "no": 2053}
    known |= {word: 3000 + n for n, word in enumerate("a blue bench car cup green red ?".split())}
    filled = {0: "[PAD]"} | {n: word for word, n in known.items()}
    return t.BertTokenizer(vocab={filled.get(n, f"[unused{n}]"): n for n in range(30_522)})


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A tiny BLIP-VQA, with the table of places of a 32 px image."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("blip")
    text = {**SIZES, "vocab_size": 30_524, "encoder_hidden_size": 16, "initializer_range": 0.3}
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    model = t.BlipForQuestionAnswering(t.BlipConfig(text_config=text, vision_config=vision))
    for value in model.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    t.BlipProcessor(t.BlipImageProcessor(size=side), words_of_bert()).save_pretrained(folder)
    return folder


def by_hand(model, image, question):
    """One image and question by the network's parts: (p_yes, p_no)."""
    pixels = Image.fromarray(image).resize((480, 480), Image.Resampling.BICUBIC)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (np.asarray(pixels, np.float32) / 255 - np.float32(mean)) / np.float32(std)
    ids = [30_523, *words_of_bert()(question).input_ids[1:]]  # [ENC] for [CLS]
    with torch.no_grad():
        x = torch.tensor(pixels.transpose(2, 0, 1))[None]
        seen = model.vision_model(x, interpolate_pos_encoding=True)[0]
        states = model.text_encoder(torch.tensor([ids]), encoder_hidden_states=seen)[0]
        logits = model.text_decoder(torch.tensor([[30_522]]), encoder_hidden_states=states)[0]
    probabilities = logits[0, 0].softmax(-1)
    return float(probabilities[2748]), float(probabilities[2053])


def test_blip_vqa_in_batches_is_the_chain_by_hand(images, blip):
    net = torch_models.load(str(blip), "BlipForQuestionAnswering")
    questions = [["A green bench?", "a car?"], [], ["a blue, green. red cup?"], ["a cup?"]]
    with torch.inference_mode():
        found = torch_models.yes_and_no(net, images, questions)
    assert list(map(len, found)) == [2, 0, 1, 1]
    for image, asked, answers in zip(images, questions, found):
        for question, answer in zip(asked, answers):
            plain = question.lower().replace(".", "")
            np.testing.assert_allclose(answer, by_hand(net.model, image, plain), rtol=1e-4)
    certainties = [yes / (yes + no) for some in found for yes, no in some]
    assert np.ptp(certainties) > 1e-3  # the question matters


def layout(folder, images, names):
    return write_images(folder, images[: len(names)], "…" * len(names), names, steps=20)


def test_images_become_answers_once_and_two_processes_write_the_same(
    images, blip, tmp_path, capsys, monkeypatch
):
    names = [f"samples/{PROMPTS[n // 2]}_00000{n}.png" for n in range(4)]
    folder = layout(tmp_path / "color", images, names)
    call = ["compbench", "--category", "color", "--images", folder, "--vqa", blip]
    call += ["--batch-size", 1]
    assert evaluate(*call, "--out", tmp_path / "one") == 0
    score = score_of(tmp_path / "one")
    assert score["metric"] == f"color (vqa={blip}, phrases=textblob 0.20.1)"
    assert score["steps"] == 20 and score["n"] == {"generated": 4, "prompts": 2}
    lines = (tmp_path / "one/answers.jsonl").read_bytes()
    assert [json.loads(line)["chunk"] for line in lines.splitlines()] == [
        *["a blue cup"] * 2,
        *["a green bench", "a red car"] * 2,
    ]
    monkeypatch.setattr(features, "cache_folder", lambda keep: tmp_path / "other")
    share = [*call, "--out", tmp_path / "two", "--share"]
    assert evaluate(*share, "1/2") == evaluate(*share, "0/2") == 0
    assert (tmp_path / "two/answers.jsonl").read_bytes() == lines
    monkeypatch.setattr(compbench, "yes_and_no", None)  # the second call asks nothing
    assert evaluate(*share, "0/2") == 0
    given = call[:3] + ["--answers", tmp_path / "two/answers.jsonl", "--out", tmp_path / "three"]
    assert evaluate(*given) == 0
    again = score_of(tmp_path / "three")
    assert (again["value"], again["metric"]) == (score["value"], score["metric"])
    os.remove(folder / names[0])
    (tmp_path / "color_val.txt").write_text("\n".join(PROMPTS))
    call += ["--out", tmp_path, "--benchmark", tmp_path, "--per-prompt", 2]
    assert "1 of 4 images of the list are missing" in refused(capsys, *call)


def save_detr(folder):
    """Of one class more or less: all boxes are alike."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    backbone = t.ResNetConfig(layer_type="basic", out_features=["stage2"], **sizes)
    sizes = {"d_model": 16, "num_queries": 4, "id2label": {0: "bench", 1: "cat", 2: "dog"}}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 16}
    config = t.DetrConfig(use_timm_backbone=False, backbone_config=backbone, **sizes)
    t.DetrForObjectDetection(config).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    t.DetrImageProcessor(size=size).save_pretrained(folder)


def save_mask2former(folder):
    stages = [f"stage{n}" for n in range(1, 5)]
    swin = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
    sizes |= {"encoder_feedforward_dim": 32, "dim_feedforward": 32, "num_attention_heads": 2}
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}
    backbone = t.SwinConfig(window_size=4, out_features=stages, **swin)
    names = {0: "bench", 1: "car"}
    config = t.Mask2FormerConfig(backbone_config=backbone, id2label=names, **sizes)
    t.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    t.Mask2FormerImageProcessor(size=size).save_pretrained(folder)


def save_owl(folder):
    tokenizer, count = words_of_clip("!")  # 0 in the first place says that a query is none
    text = {**SIZES, "vocab_size": count, "max_position_embeddings": 40}
    text |= {"bos_token_id": 1, "eos_token_id": count - 1, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 64, "patch_size": 16}
    config = t.Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    t.Owlv2ForObjectDetection(config).save_pretrained(folder)
    tokenizer.model_max_length = 40
    images = t.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    t.Owlv2Processor(images, tokenizer).save_pretrained(folder)


def save_depth(folder):
    sizes = {**SIZES, "num_hidden_layers": 4, "image_size": 32, "patch_size": 16}
    sizes |= {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4}
    config = t.DPTConfig(fusion_hidden_size=8, **sizes)
    t.DPTForDepthEstimation(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    t.DPTImageProcessor(size=size).save_pretrained(folder)


def test_a_colour_is_the_nearest_of_ten_by_three_texts_each(images, tmp_path):
    save_clip(tmp_path)
    net = torch_models.load(str(tmp_path), "CLIPModel")
    unit = torch.nn.functional.normalize

    def embed(text):
        tokens = net.processor.tokenizer([text], return_tensors="pt")
        return unit(torch_models.projected(net.model.get_text_features(**tokens)))[0]

    forms = "a photo of a {} car", "a photo of a {}-colored car", "a photo of a {} object"
    means = [sum(embed(form.format(c)) for form in forms) / 3 for c in geneval.COLOURS]
    expected = []
    for image in images:
        given = net.processor.image_processor([Image.fromarray(image)], return_tensors="pt")
        seen = torch_models.projected(net.model.get_image_features(**given))
        cosines = unit(seen) @ unit(torch.stack(means)).T
        expected.append(geneval.COLOURS[int(cosines.argmax())])
    assert geneval.colours(net, images, "car") == expected


@pytest.mark.slow  # 10 s
@pytest.mark.parametrize("save", [save_detr, save_mask2former, save_owl])
def test_any_detector_writes_the_lines_that_the_rules_read(
    save, images, tmp_path, capsys, monkeypatch
):
    torch.manual_seed(0)
    monkeypatch.setattr(torch_models, "KEPT", 0.0)  # of random weights
    save(tmp_path / "detector")
    names = [f"a cat {how} a dog_00000{n}.png" for n, how in enumerate(["behind", "hidden by"])]
    folder = layout(tmp_path / "images", images, names)
    save_depth(tmp_path / "depth")
    call = ["compbench", "--category", "3d_spatial", "--images", folder]
    call += ["--detector", tmp_path / "detector", "--depth", tmp_path / "depth"]
    assert evaluate(*call, "--out", tmp_path / "out") == 0
    found = read(tmp_path / "out/detections.jsonl", "", lambda row: ("", row), str)
    for name, image in zip(names, images):
        row = found[name][""]
        assert row["size"] == [64, len(image)]
        assert row["objects"]
        for one in objects_of(row):
            assert one.score > 0 and 0 <= one.depth <= 1
    assert "3d_spatial (detector=" in capsys.readouterr().out


def test_colours_are_set_on_the_objects_that_the_rules_look_at(images, monkeypatch):
    mask = np.ones(images[0].shape[:2], bool)
    found = [
        {"class": name, "score": score, "box": [0, 0, 9, 9], "mask": mask}
        for name, score in (("mouse", 0.9), ("mouse", 0.2), ("car", 0.9))
    ]
    seen = []

    def colours(clip, crops, name):
        seen.append((name, len(crops)))
        return ["red"] * len(crops)

    monkeypatch.setattr(geneval, "colours", colours)
    geneval.add_colours(None, images[0], found, {"computer mouse", "tv remote"})
    assert [one.get("color") for one in found] == ["red", None, None]
    assert seen == [("computer mouse", 1)]


def test_complex_prompts_are_scored_from_images_by_three_networks(
    images, blip, tmp_path, monkeypatch
):
    """The mean of two or three of BLIP-VQA, spatial and CLIP by the prompt's list; CLIP reads the
    prompt without its adjectives. Two processes compute the same."""
    torch.manual_seed(0)
    save_detr(tmp_path / "detr")
    save_clip(tmp_path / "clip")
    prompts = ["a green cat on the left of a red dog", "a blue cup near a bench", "the red car"]
    for name, some in (("", prompts), ("_spatial", prompts[:1]), ("_action", prompts[2:])):
        (tmp_path / f"complex_val{name}.txt").write_text("\n".join(some))
    names = [f"{prompt}_{n:06d}.png" for n, prompt in enumerate(prompts)]
    folder = layout(tmp_path / "images", images, names)
    call = ["compbench", "--category", "complex", "--images", folder, "--benchmark", tmp_path]
    models = ["--vqa", blip, "--detector", tmp_path / "detr", "--clip", tmp_path / "clip"]
    out = tmp_path / "out"
    call += [*models, "--per-prompt", 1, "--batch-size", 1, "--out"]
    assert evaluate(*call, out) == 0
    monkeypatch.setattr(features, "cache_folder", lambda keep: tmp_path / "other")
    monkeypatch.setattr(features, "_PATIENCE", 0.0)  # process 0 finds all blocks of the other
    assert evaluate(*call, tmp_path / "two", "--share", "1/2") == 0
    assert not (tmp_path / "two/score.json").exists()
    assert evaluate(*call, tmp_path / "two", "--share", "0/2") == 0
    results = [(tmp_path / f"{name}/results.jsonl").read_bytes() for name in ("out", "two")]
    assert results[0] == results[1]
    score = score_of(out)
    assert all(f"{model}=" in score["metric"] for model in ("vqa", "detector", "clip"))
    kinds = "answers", "detections", "similarities"
    answers, *others = (rows_of(out / f"{kind}.jsonl") for kind in kinds)
    detections, cosines = ({row["image"]: row for row in rows} for rows in others)
    net, book, expected = torch_models.load(str(tmp_path / "clip")), Phrasebook.by(), []
    without = ["a cat on the left of a dog", "a cup near a bench", "the car"]
    for n, (name, image) in enumerate(zip(names, images)):
        given = net.inputs([image], text=[without[n]])
        cosine = net.model(**given).logits_per_image[0, 0] / net.model.logit_scale.exp()
        assert cosines[name]["cosine"] == pytest.approx(float(cosine), abs=1e-5)
        asked = [row for row in answers if row["image"] == name]
        fit = compbench.attribute(compbench.certainty(r["p_yes"], r["p_no"]) for r in asked)
        found = compbench.scaled(objects_of(detections[name]), detections[name]["size"])
        placed = compbench.spatial(prompts[n], book[prompts[n]], found, complex=True)
        of = {"answers": fit, "detections": placed, "similarities": float(cosine)}
        kinds = (["answers", "detections"], list(of), ["answers", "similarities"])[n]
        expected.append(np.mean([of[kind] for kind in kinds]))
    assert [row["score"] for row in rows_of(out / "results.jsonl")] == pytest.approx(expected)
    assert score["value"] == pytest.approx(np.mean(expected))


def test_dpg_asks_the_parts_of_its_grids_and_after_an_interruption_only_what_is_left(
    tmp_path, monkeypatch
):
    cup = "p3,a cup,,1,0,entity,whole,entity - whole (cup),Is there a cup?\n"
    (tmp_path / "dpg_bench.csv").write_text(CSV + cup)

    asked: list[list[int]] = []

    def yes_and_no(net, parts, questions):
        assert all(part.shape == (8, 6, 3) and np.ptp(part) == 0 for part in parts)
        asked.append([int(part.max()) for part in parts])
        if len(asked) == 3:
            raise KeyboardInterrupt
        grey = [(0.2, 0.6) if part.max() == 1 else (0.6, 0.2) for part in parts]
        return [[answer] * len(some) for answer, some in zip(grey, questions)]

    stub_sampler(monkeypatch, lambda n, prompt: np.full((8, 6, 3), n, np.uint8))
    monkeypatch.setitem(benchmark._LOAD, "vqa", lambda path: SimpleNamespace(digest=path))
    monkeypatch.setattr(dpg, "yes_and_no", yes_and_no)
    call = ["dpg", "--images", tmp_path / "grids", "--benchmark", tmp_path, "--vqa", "some"]
    call += ["--batch-size", 1, "--out", tmp_path / "out", "--", "--steps", 2]
    assert evaluate(*call) == 130
    assert not (tmp_path / "out/answers.jsonl").exists()
    assert evaluate(*call) == 0
    grids = [[4 * item + part for part in range(4)] for item in range(3)]
    done = 6 - len(asked)  # finished before the interruption, and not asked again
    assert asked == grids + grids[done:] and done > 0
    grid = np.asarray(Image.open(tmp_path / "grids/p2.png"))
    assert grid.shape == (16, 12, 3) and list(grid[::8, ::6, 0].flat) == grids[1]
    score = score_of(tmp_path / "out")
    assert (score["metric"], score["steps"]) == ("dpg (vqa=some)", 2)
    assert score["n"] == {"generated": 12, "prompts": 3}
    assert score["value"] == pytest.approx(100 * (0.75 + 1 + 1) / 3)  # p1's second part falls
    assert score["categories"]["relation"] == 75


KILLED = """
import os, signal, sys
import numpy as np
from pixart_jax import cli
from pixart_jax.evaluation import command

save, count = np.savez, iter(range(99))

def savez(file, **arrays):  # the third block is half written
    if next(count) == 2:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(file, **arrays)

np.savez = savez
sys.exit(cli.run(command.main, sys.argv[1:]))
"""


@pytest.mark.slow  # 30 s: processes of their own
@pytest.mark.parametrize("what", ["preference", "geneval"])
def test_after_kill_9_the_same_command_goes_on_to_the_same_score(
    what, images, tmp_path, root, monkeypatch
):
    """The other benchmarks go geneval's way."""
    torch.manual_seed(0)
    detector, clip = tmp_path / "detector", tmp_path / "clip"
    save_mask2former(detector)
    save_clip(clip)
    flags, results, place = {
        "preference": (["--score", "pickscore", "--model", clip], "results", ""),
        "geneval": (["--detector", detector, "--clip", clip], "detections", "00000/samples/"),
    }[what]
    folder = layout(tmp_path / "images", images, [f"{place}000{n}.png" for n in range(4)])
    if what == "geneval":
        clause = {"class": "bench", "count": 1, "color": "red"}
        line = {"tag": "colors", "include": [clause], "prompt": "a photo of a red bench"}
        write_rows(folder / "00000/metadata.jsonl", [line])
    call = [what, "--images", folder, *flags, "--batch-size", 1, "--out"]

    def finished(cache, out):
        monkeypatch.setattr(features, "cache_folder", lambda keep: tmp_path / cache)
        assert evaluate(*call, tmp_path / out) == 0
        score = score_of(tmp_path / out)
        assert score["n"]["generated"] == 4
        return (tmp_path / out / f"{results}.jsonl").read_bytes(), score["value"], score["interval"]

    whole = finished("one", "whole")
    command_line = [sys.executable, "-c", KILLED, *map(str, call), str(tmp_path / "out")]
    environment = {**os.environ, "PIXART_JAX_CACHE": str(tmp_path / "killed")}
    status = subprocess.run(command_line, cwd=root, env=environment).returncode
    assert status == -signal.SIGKILL and not (tmp_path / "out/score.json").exists()
    assert len(list((tmp_path / "killed").glob("features/*/*.npz"))) == 2
    read_again, read_image = [], features.ImageSet.pixels

    def pixels(self, number):
        read_again.append(number)
        return read_image(self, number)

    monkeypatch.setattr(features.ImageSet, "pixels", pixels)
    assert finished("killed", "out") == whole
    assert sorted(read_again) == [2, 3]


@pytest.mark.slow  # 40 s: sample.py's own process
def test_non_spatial_generates_into_the_official_layout(tmp_path):
    save_clip(tmp_path / "clip")
    (tmp_path / "non_spatial_val.txt").write_text("a red circle\na blue square\n")
    folder = tmp_path / "images"
    call = ["--category", "non_spatial", "--benchmark", tmp_path, "--images", folder]
    call += ["--per-prompt", 2, "--clip", tmp_path / "clip", "--out", tmp_path / "out"]
    call += "-- --model assets/shapes --steps 2 --height 64 --width 64".split()
    command = [sys.executable, "-m", "pixart_jax", "evaluate", "compbench", *map(str, call)]
    subprocess.run(command, check=True, env={**os.environ, "PIXART_JAX_CACHE": str(tmp_path)})
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        *(f"a blue square_00000{n}.png" for n in (2, 3)),
        *(f"a red circle_00000{n}.png" for n in (0, 1)),
    ]
    score = score_of(tmp_path / "out")
    assert score["metric"].startswith("non_spatial (clip=") and score["steps"] == 2
