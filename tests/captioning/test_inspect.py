"""The page that shows a set before anything is trained on it."""

from __future__ import annotations

import html.parser
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from skimage import data as photographs

from pixart_jax import cli
from pixart_jax.captioning.inspect import (
    FIGURES,
    InspectOptions,
    duplicate_groups,
    main,
    survey,
    write,
)
from pixart_jax.data.sources import Sample
from pixart_jax.encoding import command as encode_command
from pixart_jax.errors import UserError

BUCKETS = ((64, 64), (48, 96), (96, 48))


class InMemory:
    """A source over a list."""

    name, fingerprint, caption_kinds = "memory", "0", ("caption",)

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def jpeg(pixels, quality=90, size=None) -> bytes:
    picture = Image.fromarray(pixels)
    out = io.BytesIO()
    (picture.resize(size) if size else picture).save(out, "JPEG", quality=quality)
    return out.getvalue()


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Real photographs."""
    names = ("astronaut", "coffee", "chelsea", "rocket")
    return [getattr(photographs, name)() for name in names]


def look_at(samples, **options):
    return survey(InMemory(samples), InspectOptions(BUCKETS, threads=2, **options), progress=False)


@pytest.fixture(scope="module")
def found(photos):
    suit = "a woman in an orange suit"
    texts = [(suit,), ("a cup of coffee <b>on</b> a table & a spoon",), (suit, "")]
    samples = [
        Sample("astronaut", jpeg(photos[0]), {"caption": texts[0]}),
        Sample("coffee", jpeg(photos[1]), {"caption": texts[1]}),
        Sample("again", jpeg(photos[1], 40, (300, 200)), {"caption": texts[2]}),
        Sample("cat", jpeg(photos[2]), {}),
        Sample("torn", jpeg(photos[3])[:900], {"caption": ("a rocket",)}),
        Sample("nothing", b"", {"caption": ("nothing at all",)}),
        Sample("wide", jpeg(photos[3][100:150, :100]), {"caption": ("clouds",)}),
    ]
    return look_at(samples, shown=2)


def test_images_captions_duplicates_and_unreadable_files_are_counted(found):
    figures = found.figures
    assert [figures[name] for name in ("samples", "looked_at", "readable")] == [7, 7, 5]
    assert figures["buckets"] == {"64×64": 1, "48×96": 4, "96×48": 0}
    assert figures["left_out"] == {"unreadable image": 2}
    assert sorted(fault["place"] for fault in figures["faults"]) == ["nothing", "torn"]
    texts = figures["captions"]["caption"]
    counts = [texts[name] for name in ("samples", "texts", "empty", "repeated")]
    assert counts == [6, 7, 1, 1] and (texts["words"]["least"], texts["words"]["most"]) == (0, 10)
    # a recompressed and smaller copy is a duplicate, other photographs are not
    assert figures["duplicate_groups"] == [["coffee", "again"]]
    assert [look.key for look in found.pictures["duplicates 1: 2 pictures"]] == ["coffee", "again"]


def test_the_images_shown_do_not_depend_on_order_or_on_what_else_is_there(photos):
    samples = [Sample(f"k{i}", jpeg(photos[i % 4], 30, (64, 64)), {}) for i in range(40)]
    shown = [
        {look.key for look in look_at(some, shown=5, duplicates=-1).pictures["64×64 px: 5 of 40"]}
        for some in (samples, samples[::-1])
    ]
    assert len(shown[0]) == 5 and shown[0] == shown[1]


def test_groups_of_hashes_are_those_of_comparing_every_pair():
    random = np.random.default_rng(3)
    for distance in (0, 1, 4, 9):
        seeds = random.integers(0, 2**64, 60, np.uint64)
        flips = [sum(1 << int(b) for b in random.choice(64, 5, replace=False)) for _ in range(2)]
        hashes = np.concatenate([seeds, *(seeds ^ np.uint64(flip) for flip in flips)])
        reach = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance
        for _ in range(8):
            reach = reach @ reach
        groups = {tuple(np.flatnonzero(row)) for row in reach if row.sum() > 1}
        wanted = sorted(groups, key=lambda g: (-len(g), g[0]))
        assert [tuple(group) for group in duplicate_groups(hashes, distance)] == wanted


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.files, self.bold = [], 0

    def handle_starttag(self, tag, attributes):
        self.files += [value for name, value in attributes if name == "src"]
        self.bold += tag == "b"


def test_the_page_shows_files_that_are_there_and_captions_as_text(found, tmp_path):
    path = write(found, tmp_path / "page")
    text, links = path.read_text(), Links()
    links.feed(text)
    assert len(links.files) >= 5
    assert links.bold == 0 and "&lt;b&gt;on&lt;/b&gt;" in text
    assert "torn" in text and "unreadable image" in text
    for file in links.files:
        Image.open(path.parent / file).load()
    assert json.loads((tmp_path / "page" / FIGURES).read_text()) == found.figures


def test_an_earlier_page_is_replaced_and_anything_else_is_refused(found, tmp_path):
    write(found, tmp_path / "page")
    (tmp_path / "page" / "old.jpg").write_bytes(b"")
    write(found, tmp_path / "page")
    assert not (tmp_path / "page" / "old.jpg").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else than an earlier page"):
        write(found, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "page"]


def run(capsys, *argv) -> tuple[int, str, str]:
    """(exit status, output, the line of the error)."""
    status = cli.run(main, [str(a) for a in argv])
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    return status, said.out, (errors or [""])[0]


@pytest.fixture
def folder(photos, tmp_path):
    """A folder of photographs with captions beside them, one of them torn."""
    root = tmp_path / "photos"
    root.mkdir()
    for name, pixels in zip(("astronaut", "coffee", "cat"), photos):
        (root / f"{name}.jpg").write_bytes(jpeg(pixels))
        text = f"a photograph of a {name} with a long tail of words " * 3
        (root / f"{name}.txt").write_text(text)
    (root / "torn.jpg").write_bytes(jpeg(photos[3])[:900])
    (root / "torn.txt").write_text("torn")
    return root


def test_the_command_says_what_it_found_and_where_the_page_is(folder, tmp_path, capsys):
    out = tmp_path / "page"
    flags = "--buckets 256 --tokenizer assets/shapes --max-text-tokens 30".split()
    status, said, _ = run(capsys, folder, "--out", out, *flags)
    assert status == 0 and f"the page: {out / 'index.html'}" in said
    assert "captions caption: 4 of 4 samples, 3 longer than 30 tokens" in said
    assert "3 pictures in" in said and "1 left out: 1 unreadable image" in said
    assert json.loads((out / "inspect.json").read_text())["captions"]["caption"]["cut"] == 3


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--buckets 64", "HEIGHTxWIDTH"),
        ("--shown -1", "--shown -1: must be at least 0"),
        ("--duplicates 40", "at most 16 of the 64 bits"),
        ("--tokenizer nowhere", "no tokenizer in nowhere"),
        ("--vae assets/shapes", "--vae is for encoded shards"),
        ("--strict", "torn: unreadable image"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(folder, tmp_path, capsys, flags, line):
    status, _, error = run(capsys, folder, "--out", tmp_path / "page", *flags.split())
    assert status == 2 and line in error and not (tmp_path / "page").exists()


def test_encoded_shards_show_what_their_vae_makes_of_them_and_no_other_vae_is_taken(
    folder, tmp_path, capsys
):
    shards, out, model = tmp_path / "shards", tmp_path / "page", "assets/shapes"
    flags = f"--source {folder} --model {model} --captions caption --buckets 64x64,48x80"
    assert cli.run(encode_command.main, [*flags.split(), "--out", str(shards)]) == 0
    status, said, _ = run(capsys, shards, "--vae", model, "--out", out, "--duplicates", -1)
    assert status == 0 and "3 pictures in 2 buckets" in said
    assert "captions caption: 3 of 3 samples" in said
    original = Image.fromarray(photographs.astronaut()).resize((64, 64))
    near = np.asarray(Image.open(out / "pictures/000-00.jpg"), float) - np.asarray(original, float)
    # an autoencoder of coloured shapes keeps the light and dark of a photograph
    assert np.sqrt((near**2).mean()) < 60
    other = tmp_path / "other"
    shutil.copytree("assets/shapes/vae", other)
    weights = other / "diffusion_pytorch_model.safetensors"
    save_file({name: array + 1 for name, array in load_file(weights).items()}, weights)
    for more, line in (
        (["--out", out], "give --vae"),
        (["--vae", model, "--buckets", "64x64"], "have buckets of their own"),
        (["--vae", other], "encoded with another VAE"),
    ):
        assert line in run(capsys, shards, *more)[2]
