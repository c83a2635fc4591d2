"""What a captioner says of a picture, and what is done with it, without Ray."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from captioning import tiny_vlms, written_captions
from PIL import Image

from pixart_jax.captioning.guards import failed_checks
from pixart_jax.captioning.model import (
    GumbelNoise,
    VisionLanguageModel,
    check,
    check_engines,
    identity,
    resize,
    seed_of,
)
from pixart_jax.captioning.worker import CaptionOptions, caption_samples, fill, template
from pixart_jax.data.sources import Sample
from pixart_jax.errors import UserError

torch = pytest.importorskip("torch")
COLOURS = "red blue green black white".split()
RANDOM = np.random.default_rng(7)
PICTURES = [
    Image.fromarray(RANDOM.integers(0, 256, (h, w, 3), np.uint8))
    for h, w in ((40, 60), (90, 30), (64, 64), (20, 70))
]
PROMPTS = [
    "a dog",
    "describe this picture in a very detailed manner",
    "red",
    "a large old wooden house with a red car in the street",
]


@pytest.fixture(scope="module", params=tiny_vlms.FAMILIES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm") / request.param
    return VisionLanguageModel(str(tiny_vlms.FAMILIES[request.param](folder)))


def generate(model, images, prompts, seeds, temperature=0.0, limit=20):
    return model.generate(images, prompts, seeds, temperature=temperature, max_new_tokens=limit)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_caption_is_the_same_in_a_batch_as_alone(model, temperature):
    seeds = [seed_of(0, f"p{i}") for i in range(4)]
    requests = list(zip(PICTURES, PROMPTS, seeds))
    together = generate(model, *zip(*requests), temperature)
    alone = [generate(model, *([part] for part in one), temperature)[0] for one in requests]
    turned = generate(model, *zip(*requests[::-1]), temperature)[::-1]
    assert together == alone == turned
    assert len({made.text for made in alone}) > 2  # they differ


def test_the_padding_is_on_the_left_and_masked(model):
    assert model.tokenizer.padding_side == "left"
    texts, images = [model.conversation(p) for p in PROMPTS], [[p] for p in PICTURES]
    inputs = model.processor(text=texts, images=images, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"]
    assert (mask[:, -1] == 1).all() and (mask.diff(dim=1) >= 0).all() and mask.min() == 0


def test_a_caption_depends_on_the_picture_and_on_the_seed(model):
    assert len({generate(model, [p], ["a dog"], [1])[0].text for p in PICTURES}) > 1
    some = [generate(model, PICTURES[:1], ["a dog"], [seed], 2.0)[0].text for seed in range(4)]
    assert len(set(some)) > 2


def test_samples_are_from_the_softmax_of_the_logits_over_the_temperature():
    scores = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    noise = GumbelNoise(0.7, [3], torch.device("cpu"))
    counts = np.bincount([int(noise(None, scores).argmax()) for _ in range(20_000)], minlength=4)
    np.testing.assert_allclose(counts / 20_000, torch.softmax(scores[0] / 0.7, 0), atol=0.012)


def test_finish_says_whether_the_end_mark_or_the_limit_ended_it(model):
    for made in generate(model, PICTURES, PROMPTS, [1, 2, 3, 4], 1.0, 40):
        assert made.finish == ("length" if made.tokens == 40 else "stop")
    assert generate(model, PICTURES[:1], PROMPTS[:1], [0], limit=1)[0].tokens <= 1


def test_a_processor_without_a_chat_template_gets_llava_s_plain_form(tmp_path):
    plain = VisionLanguageModel(str(tiny_vlms.llava(tmp_path / "plain", chat_template=False)))
    assert plain.conversation("what is it") == "USER: <image>\nwhat is it ASSISTANT:"
    assert len(generate(plain, PICTURES[:2], PROMPTS[:2], [0, 1], limit=5)) == 2


def test_a_raw_caption_cannot_write_the_models_marks(model):
    raw = f"two dogs {model.image_mark}{model.image_mark}\x00\n</s> <image> in a car"
    text = fill(template("paper", True), raw, model.special)
    assert "'two dogs in a car'" in text
    assert len(generate(model, PICTURES[:1], [text], [0], limit=4)) == 1


def test_the_prompts_are_the_papers():
    plain = "Describe this image and its style in a very detailed manner"
    assert template("paper", False) == plain
    asked = fill(template("paper", True), "a dog")
    assert asked == f"Give the caption of this image 'a dog', d{plain[1:]}"
    with pytest.raises(UserError, match="needs {caption}"):
        CaptionOptions("m", prompt="What is it?", raw_caption="txt")
    with pytest.raises(UserError, match="--raw-caption KIND is needed"):
        CaptionOptions("m", prompt="{caption}: what is it?")


def test_pictures_are_resized_as_the_official_script_does():
    def official(size):  # pad2square of the released captioning script
        max_hw, min_hw = max(size), min(size)
        aspect_ratio = max_hw / min_hw
        shortest_edge = int(min(800 / aspect_ratio, 400, min_hw))
        longest_edge = int(shortest_edge * aspect_ratio)
        return (shortest_edge, longest_edge) if size[1] > size[0] else (longest_edge, shortest_edge)

    for width, height in RANDOM.integers(20, 1500, (60, 2)).tolist():
        if official((width, height))[1] > 0:
            assert resize(Image.new("L", (width, height))).size == official((width, height))
    assert resize(Image.new("L", (3000, 2))).size == (800, 1)
    assert resize(Image.new("L", (1, 1))).size == (1, 1)


# ---- guards ----


@pytest.mark.parametrize(
    ("text", "finish", "names"),
    [
        (written_captions.GOOD, "stop", ()),
        (written_captions.GOOD, "length", ()),  # the limit fell on a sentence's end
        ("a red circle", "stop", ()),
        ("", "stop", ("empty",)),
        (" ,.! ", "stop", ("empty",)),
        (written_captions.CAPTIONS[2][0], "length", ("truncated",)),
        (written_captions.CAPTIONS[5][0], "stop", ("unfinished",)),
        (written_captions.LOOP, "length", ("truncated", "repeating")),
        ("The the the the the the the the the dog.", "stop", ("repeating",)),
        ("dog dog dog", "stop", ("repeating",)),
        ("It is a very, very, very large dog that sits on the green grass of a park.", "stop", ()),
        ("Two dogs. " * 9 + "It is late.", "stop", ("repeating",)),
        (
            " ".join(f"There is a {c} car on the left side of the street." for c in COLOURS),
            "stop",
            ("repeating",),
        ),
        ("I'm sorry, but I cannot see any image here.", "stop", ("refusal",)),
        ("As an AI language model, I am unable to view images.", "stop", ("refusal",)),
        ("A woman looks sorry; she cannot see the dog.", "stop", ()),
    ],
)
def test_guards_speak_against_bad_captions_alone(text, finish, names):
    assert failed_checks(text, finish) == names


def _samples(reds):
    return [
        Sample(f"p{n}", written_captions.png(red), {"txt": (f"raw {n}",)})
        for n, red in enumerate(reds)
    ]


def test_a_bad_caption_is_drawn_again_warmer_and_then_left_out():
    stub = written_captions.Written()
    options = CaptionOptions("written", temperature=0.2, retries=2)
    found = caption_samples(stub, [10, 11, 12, 13], _samples([0, 1, 3, 4]), options)
    assert [calls for calls, _ in stub.calls] == [[0, 1, 3, 4], [1, 3, 4], [3]]
    assert [temperature for _, temperature in stub.calls] == pytest.approx([0.2, 0.5, 0.8])
    assert [row["index"] for row in found] == [10, 11, 12, 13]
    guards = [row["guards"] for row in found]
    assert guards == [[], ["empty"], ["truncated", "repeating"], ["refusal"]]
    assert [row["attempts"] for row in found] == [1, 2, 3, 2]
    assert found[1]["caption"] == written_captions.GOOD and "left_out" not in found[1]
    assert found[2]["left_out"][0] == "truncated caption"


@pytest.mark.parametrize(("action", "left_out"), [("drop", True), ("keep", False)])
def test_a_bad_caption_is_left_out_or_kept_as_asked(action, left_out):
    stub = written_captions.Written()
    (row,) = caption_samples(
        stub, [0], _samples([1]), CaptionOptions("written", guard_action=action)
    )
    assert len(stub.calls) == 1 and ("left_out" in row) == left_out and row["guards"] == ["empty"]


def test_what_cannot_be_captioned_is_named_and_the_rest_goes_on():
    samples = _samples([0] * 6)
    cut = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), np.uint8)).save(cut, "JPEG")
    samples[1] = Sample("cut", cut.getvalue()[:900], {"txt": ("x",)})
    samples[2] = Sample("zero", b"", {"txt": ("x",)})
    samples[3] = UserError("a.tar, 000123: the record cannot be read")
    samples[4] = Sample("silent", written_captions.png(0), {"txt": (" ",)})
    samples[5] = Sample("long", written_captions.png(0), {"txt": ("word " * 2_000_000,)})
    found = caption_samples(
        written_captions.Written(), range(6), samples, CaptionOptions("written", raw_caption="txt")
    )
    kinds = [row.get("left_out", [""])[0] for row in found]
    assert kinds[:4] == ["", "unreadable image", "unreadable image", "unreadable record"]
    assert kinds[4:] == ["missing caption", "caption too long"]
    assert found[0]["prompt"].startswith("Give the caption of this image 'raw 0', ")
    assert (
        "000123" in found[3]["left_out"][1] and "10,000,000 characters" in found[5]["left_out"][1]
    )


# ---- models that cannot be used ----


def test_a_model_that_sees_no_pictures_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'
    )
    with pytest.raises(UserError, match="is a t5: a model that writes about pictures"):
        check(str(tmp_path))


def test_a_model_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no model folder .*nowhere here") as caught:
        check(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="holds no model of transformers"):
        check(str(tmp_path))


def test_without_ray_or_torch_the_line_says_how_to_get_them(monkeypatch):
    check_engines()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError, match=r"captioning needs Ray Data: pip install torch 'ray\[data\]'"
    ):
        check_engines()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="captioning needs PyTorch and Ray Data: "):
        check_engines()


def test_a_models_identity_is_that_of_its_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(3_000_000))
    first = identity(str(tmp_path))
    assert first == identity(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(bytes([1]) * 3_000_000)
    assert identity(str(tmp_path)) != first
