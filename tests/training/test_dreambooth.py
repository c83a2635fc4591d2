"""DreamBooth: both terms of its loss, the identifier's check, and class images that go on where
they were cut off."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pixart_jax import load_component
from pixart_jax.commands import train
from pixart_jax.config import (
    Config,
    DataConfig,
    DreamBoothConfig,
    LoraConfig,
    ObjectiveConfig,
    StageConfig,
)
from pixart_jax.data.sources import open_source
from pixart_jax.data.sources.sample import Sample
from pixart_jax.errors import UserError
from pixart_jax.files import find
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.pipeline import Pipeline
from pixart_jax.text import load_tokenizer
from pixart_jax.training import dreambooth, recipes
from pixart_jax.training.metrics import read
from pixart_jax.training.tasks.denoising import DiffusionObjective
from pixart_jax.training.tasks.text_to_image import TextToImage
from pixart_jax.weights.table import flatten
from tests.parameters import normal_params

SHAPES = find("assets/shapes")
SUBJECT = DreamBoothConfig("a star", "star", class_prompt="a circle", class_images=6)


def stage_of(**changes) -> StageConfig:
    config = {"start": "assets/shapes", "dreambooth": SUBJECT, **changes}
    return StageConfig("subject", **config)


# ---- the loss ----


def rows(seed: int, count: int = 3) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "mean": jnp.asarray(rng.normal(size=(count, 4, 4, 4)), jnp.float32),
        "std": jnp.asarray(rng.uniform(0.1, 1, (count, 4, 4, 4)), jnp.float32),
        "text_states": jnp.asarray(rng.normal(size=(count, 8, 16)), jnp.bfloat16),
        "text_lengths": jnp.asarray(rng.integers(2, 9, count), jnp.int32),
        "size": jnp.full((count, 2), 32.0),
        "aspect_ratio": jnp.ones((count,)),
    }


def test_both_terms_of_the_loss_are_those_of_the_rows_by_themselves():
    module = PixArtTransformer(
        TransformerConfig(depth=1, width=24, heads=2, sample_size=4, caption_width=16)
    )
    denoising = DiffusionObjective(ObjectiveConfig(condition_dropout=0.5), 0.5)
    subject = dataclasses.replace(SUBJECT, prior_weight=0.25)
    stage = StageConfig("stage", start="base", dreambooth=subject)
    task = TextToImage(module, denoising, None, 0, stage)
    params = normal_params(task.init)
    own, others = rows(0), rows(1)
    keys = jax.random.split(jax.random.key(5), 3)
    batch = own | {f"class_{name}": value for name, value in others.items()}
    batch |= {"label": jnp.zeros(3), "class_label": jnp.zeros(3)}
    found = jax.jit(task.losses)(params, batch, keys)
    plain = jax.jit(dataclasses.replace(task, stage=StageConfig("stage")).losses)
    first = plain(params, own, keys)
    second = plain(params, others, jax.vmap(lambda key: jax.random.fold_in(key, 5))(keys))
    np.testing.assert_allclose(found["mse"], first["mse"], rtol=1e-5)
    np.testing.assert_allclose(found["prior"], second["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["loss"], first["loss"] + 0.25 * second["loss"], rtol=1e-5)
    # the mean over the batch: mean‖ε̂ − ε‖² of the subject + weight · that of the class
    by_hand = np.mean(first["loss"]) + 0.25 * np.mean(second["loss"])
    assert float(found["loss"].mean()) == pytest.approx(float(by_hand), rel=1e-5)


# ---- the identifier ----


@pytest.mark.parametrize(
    ("prompt", "identifier", "left"),
    [
        ("a photo of <sks> dog", "<sks>", "'a photo of dog'"),
        ("a photo of C0rn dog", "C0rn", "'a photo of dog'"),
        ("a photo of abc123 dog", "abc123", "'a photo of dog'"),
        ("[V] dog", "[V]", "'v dog'"),
    ],
)
def test_an_identifier_that_cleaning_deletes_is_named(prompt, identifier, left):
    stage = stage_of(dreambooth=DreamBoothConfig(prompt, identifier))
    with pytest.raises(UserError) as error:
        dreambooth.check_identifier(stage)
    message = str(error.value)
    assert f"identifier {identifier!r} does not survive" in message and left in message
    assert "\n" not in message


@pytest.mark.parametrize("word", ["sks", "ohwx01", "sks_dog", "SKS"])
def test_an_identifier_that_survives_is_taken(word):
    dreambooth.check_identifier(stage_of(dreambooth=DreamBoothConfig(f"a {word} dog", word)))


def test_the_identifiers_pieces_are_told_and_an_unknown_one_refused():
    tokenizer = load_tokenizer(SHAPES / "tokenizer")
    said = dreambooth.describe_identifier(stage_of(), tokenizer)
    assert said == "the tokenizer reads identifier 'star' as 1: ▁star"
    unknown = stage_of(dreambooth=DreamBoothConfig("a 狗", "狗"))
    with pytest.raises(UserError, match="identifier '狗' is not known to the text encoder's"):
        dreambooth.describe_identifier(unknown, tokenizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DreamBoothConfig("a dog", "sks"), "must be a word of the prompt 'a dog'"),
        (lambda: DreamBoothConfig("a b", "b", class_prompt="a b"), "must differ from prompt"),
        (lambda: stage_of(start="fresh"), "class images are generated by a model"),
        (lambda: stage_of(task="autoencoder"), "dreambooth trains a text_to_image model"),
    ],
)
def test_a_wrong_config_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


class Pictures:
    """Of a source: two pictures with captions of their own."""

    def __init__(self, *texts: str):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"p{index}", b"", {"caption": (self._texts[index],)})


def test_pictures_may_have_captions_of_their_own_with_the_identifier_in_each():
    subject = DreamBoothConfig(None, "sks")
    stage = stage_of(dreambooth=subject, data=DataConfig(captions=(("caption", 1.0),)))
    dreambooth.check_identifier(stage)

    def opened(*texts):
        return dreambooth.open_samples(None, stage, Pictures(*texts), None, lambda *how: how)

    source, kinds = opened("a red sks", "a blue SKS")
    assert len(source) == 2 and kinds == (("caption", 1.0),)
    with pytest.raises(UserError, match="stage subject: p1: 'a blue dog' lacks the identifier"):
        opened("a red sks", "a blue dog")
    lost = stage_of(dreambooth=DreamBoothConfig(None, "<sks>"))
    with pytest.raises(UserError, match="'<sks>' does not survive"):
        dreambooth.check_identifier(lost)


# ---- class images, and whole runs ----


@pytest.fixture
def few_steps(monkeypatch):
    """Pictures of two steps."""
    real = Pipeline.__call__
    monkeypatch.setattr(
        Pipeline, "__call__", lambda self, *a, **how: real(self, *a, **{**how, "steps": 2})
    )


def contents(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")
    }


def test_class_images_go_on_where_they_were_cut_off(tmp_path, few_steps, monkeypatch, capsys):
    config = dreambooth_config(tmp_path)
    stage = config.stages[0]
    dreambooth.generate_class_images(config, stage, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == [f"{n:05d}.png" for n in range(6)] and len(set(whole.values())) == 6

    write, count = dreambooth.write_png, 0

    def cut_off(*how):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        write(*how)

    monkeypatch.setattr(dreambooth, "write_png", cut_off)
    with pytest.raises(KeyboardInterrupt):
        dreambooth.generate_class_images(config, stage, tmp_path / "cut")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").iterdir()}
    capsys.readouterr()
    dreambooth.generate_class_images(config, stage, tmp_path / "cut")
    assert "class images: 2 are there, 4 to generate" in capsys.readouterr().out
    assert contents(tmp_path / "cut") == whole
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    other = dataclasses.replace(SUBJECT, class_prompt="a cross")
    other = dataclasses.replace(stage, dreambooth=other)
    with pytest.raises(UserError, match="was generated with prompt 'a circle', not 'a cross'"):
        dreambooth.generate_class_images(config, other, tmp_path / "cut")


def test_class_images_of_a_file_of_prompts_take_turns_and_keep_their_captions(tmp_path, few_steps):
    (tmp_path / "p.txt").write_text("a large red star\na small blue circle\n")
    config = dreambooth_config(tmp_path)
    subject = dataclasses.replace(SUBJECT, class_prompt=f"file:{tmp_path}/p.txt", class_images=5)
    stage = dataclasses.replace(config.stages[0], dreambooth=subject)
    dreambooth.generate_class_images(config, stage, folder := tmp_path / "images")
    source = open_source(f"folder:{folder}", "train")
    texts = [dreambooth.Captioned(source, None)[n].captions[dreambooth.KIND] for n in range(5)]
    lines = ["a large red star", "a small blue circle"] * 3
    assert texts == [(line,) for line in lines[:5]]
    assert dreambooth.prompts(subject) == [subject.prompt] * 4 + lines[:4]


def dreambooth_config(folder: Path, *flags: str) -> Config:
    """The recipe on four pictures of noise, six steps."""
    (folder / "pictures").mkdir(exist_ok=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        file = folder / "pictures" / f"{number}.png"
        if not file.exists():
            Image.fromarray(pixels).save(file)
    argv = f"--stages.0.data.source folder:{folder / 'pictures'} --stages.0.steps 6 --log-every 1"
    argv += " --preview.steps 2 --dreambooth.class-images 6"
    words = ["--dreambooth.prompt", "a star", "--dreambooth.identifier", "star"]
    words += ["--dreambooth.class-prompt", "a circle"]
    recipe = Path(__file__).parents[2] / "configs" / "dreambooth.py"
    return recipes.parse_config(recipe, [*argv.split(), *words, *flags])


def test_a_run_with_prior_preservation_trains_an_adapter(tmp_path, few_steps, monkeypatch, capsys):
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))
    config = dreambooth_config(tmp_path, "--lora.rank", "2")
    assert config.stages[0].lora == LoraConfig(rank=2)
    train.train(config, tmp_path / "run", train.encode)
    printed = capsys.readouterr().out
    assert "identifier 'star' as 1: ▁star" in printed and "0 are there, 6 to generate" in printed
    lines = read(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 6
    for line in lines:
        assert line["loss"] == pytest.approx(line["mse"] + line["vb"] + line["prior"], rel=1e-5)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    sheet = Image.open(next((tmp_path / "run" / "samples").iterdir()))
    assert min(sheet.size) > 64  # four pictures of the identifier, four of the class
    assert not (tmp_path / "run" / "model").exists()
    # the same command finds its class images and trains nothing
    train.train(config, tmp_path / "run", train.encode)
    assert "6 are there, 0 to generate" in capsys.readouterr().out


def test_a_run_without_class_images_trains_all_weights(tmp_path, few_steps, monkeypatch):
    """Here under the pictures' own captions, which the preview then takes."""
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))
    flags = ["--dreambooth.class-prompt", "None", "--stages.0.steps", "2"]
    config = dreambooth_config(tmp_path, *flags, "--dreambooth.prompt", "None")
    for number in range(4):
        (tmp_path / "pictures" / f"{number}.txt").write_text("a red star")
    train.train(config, tmp_path / "run", train.encode)
    assert list((tmp_path / "run" / "samples").iterdir())
    assert not (tmp_path / "run" / "class_images").exists()
    assert all("prior" not in line for line in read(tmp_path / "run" / "metrics.jsonl"))
    ours, base = (
        flatten(load_component(folder / "transformer").params)
        for folder in (tmp_path / "run" / "model", SHAPES)
    )
    moved = {path for path, value in ours.items() if np.abs(value - base[path]).max() > 0}
    assert moved | {"null_caption"} == set(ours)
