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
from pixart_jax.captioning import inspect_command
from pixart_jax.captioning.inspect import FIGURES, InspectOptions, duplicate_groups, survey, write
from pixart_jax.data.sources import Sample
from pixart_jax.encoding import command as encode_command
from pixart_jax.errors import UserError

BUCKETS = ((64, 64), (48, 96), (96, 48))


class InMemory:
    """A source over a list."""

    name, fingerprint, num_classes, caption_kinds = "memory", "0", None, ("caption",)

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
    return [
        photographs.astronaut(),
        photographs.coffee(),
        photographs.chelsea(),
        photographs.rocket(),
    ]


@pytest.fixture(scope="module")
def found(photos):
    samples = [
        Sample("astronaut", jpeg(photos[0]), {"caption": ("a woman in an orange suit",)}),
        Sample(
            "coffee", jpeg(photos[1]), {"caption": ("a cup of coffee <b>on</b> a table & a spoon",)}
        ),
        Sample(
            "again", jpeg(photos[1], 40, (300, 200)), {"caption": ("a woman in an orange suit", "")}
        ),
        Sample("cat", jpeg(photos[2]), {}),
        Sample("torn", jpeg(photos[3])[:900], {"caption": ("a rocket",)}),
        Sample("nothing", b"", {"caption": ("nothing at all",)}),
        Sample("wide", jpeg(photos[3][100:150, :100]), {"caption": ("clouds",)}),
    ]
    return survey(InMemory(samples), InspectOptions(BUCKETS, shown=2, threads=2), progress=False)


def test_every_picture_is_counted_in_its_bucket_and_what_cannot_be_read_is_named(found):
    assert (found.samples, found.looked_at, len(found.sizes)) == (7, 7, 5)
    assert found.buckets == {(64, 64): 1, (48, 96): 4, (96, 48): 0}
    assert sorted(fault.place for fault in found.faults) == ["nothing", "torn"]
    assert found.faults.summary() == "2 left out: 2 unreadable image"


def test_a_recompressed_and_smaller_copy_is_a_duplicate_and_other_photographs_are_not(found):
    assert found.groups == [["coffee", "again"]]
    assert [[shown.key for shown in group] for group in found.group_pictures] == [
        ["coffee", "again"]
    ]


def test_captions_are_counted_with_those_that_are_empty_repeated_or_missing(found):
    texts = found.captions["caption"]
    assert (texts.samples, texts.texts, texts.empty, texts.repeated) == (6, 7, 1, 1)
    assert texts.words[6] == 2 and texts.words[0] == 1


def test_the_pictures_shown_do_not_depend_on_order_or_on_what_else_is_there(photos):
    samples = [Sample(f"k{i}", jpeg(photos[i % 4], 30, (64, 64)), {}) for i in range(40)]
    forward = survey(
        InMemory(samples), InspectOptions(BUCKETS, shown=5, duplicates=-1), progress=False
    )
    backward = survey(
        InMemory(samples[::-1]), InspectOptions(BUCKETS, shown=5, duplicates=-1), progress=False
    )
    keys = {shown.key for shown in forward.shown[64, 64]}
    assert len(keys) == 5 and keys == {shown.key for shown in backward.shown[64, 64]}


def test_groups_of_hashes_are_those_of_comparing_every_pair():
    random = np.random.default_rng(3)
    for distance in (0, 1, 4, 9):
        seeds = random.integers(0, 2**64, 60, np.uint64)
        hashes = np.concatenate(
            [seeds]
            + [
                seeds ^ np.uint64(sum(1 << int(b) for b in random.choice(64, 5, replace=False)))
                for _ in range(2)
            ]
        )
        linked = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance
        reach = linked.copy()
        for _ in range(8):
            reach = reach @ reach
        wanted = sorted(
            {tuple(np.flatnonzero(row)) for row in reach if row.sum() > 1},
            key=lambda g: (-len(g), g[0]),
        )
        assert [tuple(group) for group in duplicate_groups(hashes, distance)] == wanted


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.files, self.bold = [], 0

    def handle_starttag(self, tag, attributes):
        self.files += [value for name, value in attributes if name == "src"]
        self.bold += tag == "b"


def test_the_page_shows_files_that_are_there_and_captions_as_text(found, tmp_path):
    path = write(found, InspectOptions(BUCKETS, shown=2), tmp_path / "page", None)
    text, links = path.read_text(), Links()
    links.feed(text)
    assert len(links.files) >= 5 and all(
        (path.parent / file).stat().st_size for file in links.files
    )
    assert links.bold == 0 and "&lt;b&gt;on&lt;/b&gt;" in text
    assert "torn" in text and "unreadable image" in text
    for file in links.files:
        Image.open(path.parent / file).load()
    numbers = json.loads((tmp_path / "page" / FIGURES).read_text())
    assert numbers["buckets"]["48×96"] == 4 and numbers["left_out"] == {"unreadable image": 2}


def test_an_earlier_page_is_replaced_and_anything_else_is_refused(found, tmp_path):
    write(found, InspectOptions(BUCKETS), tmp_path / "page", None)
    (tmp_path / "page" / "old.jpg").write_bytes(b"")
    write(found, InspectOptions(BUCKETS), tmp_path / "page", None)
    assert not (tmp_path / "page" / "old.jpg").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else than an earlier page"):
        write(found, InspectOptions(BUCKETS), tmp_path / "mine", None)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "page"]


def run(capsys, *argv) -> tuple[int, str, str]:
    status = cli.run(inspect_command.main, [str(a) for a in argv])
    said = capsys.readouterr()
    return (
        status,
        said.out,
        [line for line in said.err.splitlines() if line.startswith("error: ")][:1],
    )


@pytest.fixture
def folder(photos, tmp_path):
    """A folder of photographs with captions beside them, one of them torn."""
    root = tmp_path / "photos"
    root.mkdir()
    for name, pixels in zip(("astronaut", "coffee", "cat"), photos):
        (root / f"{name}.jpg").write_bytes(jpeg(pixels))
        (root / f"{name}.txt").write_text(
            f"a photograph of a {name} with a long tail of words " * 3
        )
    (root / "torn.jpg").write_bytes(jpeg(photos[3])[:900])
    (root / "torn.txt").write_text("torn")
    return root


def test_the_command_says_what_it_found_and_where_the_page_is(folder, tmp_path, capsys):
    out = tmp_path / "page"
    status, said, _ = run(
        capsys,
        folder,
        "--out",
        out,
        "--buckets",
        "256",
        "--tokenizer",
        "assets/shapes",
        "--max-text-tokens",
        "30",
    )
    assert status == 0 and f"the page: {out / 'index.html'}" in said
    assert (
        "3 pictures in" in said
        and "captions caption: 4 of 4 samples, 3 longer than 30 tokens" in said
    )
    assert "1 left out: 1 unreadable image" in said
    assert json.loads((out / "inspect.json").read_text())["captions"]["caption"]["cut"] == 3


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--buckets", "64"], "HEIGHTxWIDTH"),
        (["--shown", "-1"], "--shown -1: must be at least 0"),
        (["--duplicates", "40"], "at most 16 bits"),
        (["--tokenizer", "nowhere"], "no tokenizer in nowhere"),
        (["--strict"], "torn: unreadable image"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(folder, tmp_path, capsys, flags, line):
    status, _, (error,) = run(capsys, folder, "--out", tmp_path / "page", *flags)
    assert status == 2 and line in error and not (tmp_path / "page").exists()


def test_encoded_shards_show_what_their_vae_makes_of_them_and_no_other_vae_is_taken(
    folder, tmp_path, capsys
):
    shards, out = tmp_path / "shards", tmp_path / "page"
    flags = [
        "--source",
        folder,
        "--model",
        "assets/shapes",
        "--captions",
        "caption",
        "--buckets",
        "64x64,48x80",
        "--out",
        shards,
    ]
    assert cli.run(encode_command.main, [str(flag) for flag in flags]) == 0
    status, said, _ = run(capsys, shards, "--vae", "assets/shapes", "--out", out)
    assert (
        status == 0
        and "3 pictures in 2 buckets" in said
        and "captions caption: 3 of 3 samples" in said
    )
    (shown,) = [path for path in (out / "pictures").glob("64x64-*.jpg")]
    near = np.asarray(Image.open(shown)).astype(float) - np.asarray(
        Image.fromarray(photographs.astronaut()).resize((64, 64))
    ).astype(float)
    assert np.sqrt((near**2).mean()) < 60, (
        "an autoencoder of coloured shapes keeps the light and dark of a photograph"
    )
    assert "give --vae" in run(capsys, shards, "--out", out)[2][0]
    assert (
        "have buckets of their own"
        in run(capsys, shards, "--vae", "assets/shapes", "--buckets", "64x64")[2][0]
    )
    assert "--vae is for encoded shards" in run(capsys, folder, "--vae", "assets/shapes")[2][0]
    other = tmp_path / "other"
    shutil.copytree("assets/shapes/vae", other)
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: array + 1 for name, array in weights.items()},
        other / "diffusion_pytorch_model.safetensors",
    )
    assert "encoded with another VAE" in run(capsys, shards, "--vae", other)[2][0]
