"""``evaluate fid`` from flags to files. A small stand-in for the network, but in the slow tests."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pixart_jax.errors import UserError
from pixart_jax.evaluation import coco, features, generated, inception
from pixart_jax.evaluation.features import Extractor, ImageSet, on_devices
from pixart_jax.evaluation.set_scores import kid
from pixart_jax.pipeline.output import PromptShard
from tests.evaluation.calls import evaluate, refused, score_of, write_images

NET = inception.Inception({"w": np.ones(1, np.float32)}, "stand-in", "d1935c")


@jax.jit
def small_net(params, pixels):
    """Means of 3 × 3 fields; the whole batch has a hand in it to the last bits, as in any library
    that sums in an order of its own."""
    cells = jax.image.resize(pixels, (len(pixels), 3, 3, 3), "linear").reshape(len(pixels), -1)
    cells = params["w"] * cells + 1e-6 * cells.mean()
    return {"pool": cells, "spatial": cells**2, "logits": jnp.exp(3 * cells)}


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    monkeypatch.setattr(inception, "apply", small_net)
    monkeypatch.setattr(inception, "random", lambda seed: NET)
    for name in ("pool", "spatial"):
        monkeypatch.setitem(inception.WIDTHS, name, 27)
    return tmp_path


def pictures(folder, count, seed, side=16, **settings):
    rng = np.random.default_rng(seed)
    images = (rng.normal(90 + 3 * seed, 60, (side, side, 3)) for _ in range(count))
    images = [np.clip(image, 0, 255).astype(np.uint8) for image in images]
    names = [f"{n:03d}.png" for n in range(count)]
    return write_images(folder, images, names if settings else (), names, **settings)


fid = functools.partial(evaluate, "fid")


def test_from_folders_to_the_score_and_its_files(stand_in, capsys, monkeypatch):
    a = pictures(stand_in / "a", 23, 1, steps=20, guidance=4.5, solver="dpm++")
    b = pictures(stand_in / "b", 20, 5)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(a / "grid.png")  # sample.py's sheet
    out, saved = stand_in / "deep" / "out", stand_in / "b.npz"
    common = ["--random-inception", 0, "--batch-size", 8]
    metrics = ["--metrics", "fid", "kid", "sfid", "is", "prdc", "fid_infinity"]
    files = ["--out", out, "--save-statistics", saved]
    assert fid(a, "--reference", b, *common, *metrics, *files) == 0
    record = score_of(out)
    printed = capsys.readouterr().out
    assert "mode clean" in printed and "precision" in printed and "fid_infinity" in printed
    assert record["metric"] == "fid (stand-in)"
    assert record["n"] == {"generated": 23, "reference": 20}
    assert record["interval"][0] < record["value"] < record["interval"][1]
    assert (record["mode"], record["steps"], record["guidance"]) == ("clean", 20, 4.5)
    assert record["seeds"] == [0, 22] and len(record["prompts"]) == 64
    assert record["weights"]["sha256"] == NET.digest and record["versions"]["jax"]
    assert len({record["images"][side]["sha256"] for side in ("generated", "reference")}) == 2
    assert "2048" in record["warnings"][0] and record["scores"]["fid"]["bias"] > 0
    assert Image.open(out / "fid_infinity.png").size[0] > 500
    arrays = [
        np.stack([inception.preprocess(ImageSet.open(s).pixels(i)[0], "clean") for i in range(n)])
        for s, n in ((a, 23), (b, 20))
    ]
    plain = [np.asarray(small_net(NET.params, x)["pool"]) for x in arrays]
    assert record["scores"]["kid"]["value"] == pytest.approx(kid(*plain)[0], abs=1e-4)

    # the statistics stand for the folder, and are those of one mode, network and size
    assert fid("--generated", a, "--reference", saved, *common, "--out", out) == 0
    again = score_of(out)
    assert again["value"] == pytest.approx(record["value"], rel=1e-6)
    assert again["n"]["reference"] == 20
    hashes = [of["images"]["reference"]["sha256"] for of in (record, again)]
    assert hashes[0] == hashes[1]
    for flags, says in (
        (["--mode", "pytorch"], "mode clean, not pytorch"),
        (["--size", 8], "size 0, not 8"),
        (["--metrics", "kid"], "give a folder"),
        (["--metrics", "sfid", "prdc"], "give a folder"),
    ):
        assert says in refused(capsys, "fid", a, "--reference", saved, *common, *flags)
    other = dataclasses.replace(NET, digest="another")
    monkeypatch.setattr(inception, "random", lambda seed: other)
    error = refused(capsys, "fid", a, "--reference", saved, *common)
    assert "weights d1935c, not another" in error


def test_statistics_alone_and_adms_files(stand_in, capsys):
    a = pictures(stand_in / "a", 20, 1)
    flags = [a, "--random-inception", 0, "--mode", "tensorflow"]
    assert fid(*flags, "--save-statistics", stand_in / "a.npz", "--out", stand_in / "out") == 0
    assert not (stand_in / "out").exists()  # no score without a reference
    held = dict(np.load(stand_in / "a.npz"))
    stack = np.stack([np.asarray(Image.open(path)) for path in sorted(a.glob("*.png"))])
    statistics = {name: held[name] for name in ("mu", "sigma")}
    spatial = {f"{name}_s": held[name] for name in ("mu", "sigma")}
    np.savez(stand_in / "adm.npz", arr_0=stack, **statistics, **spatial)
    flags += ["--reference", stand_in / "adm.npz"]
    assert fid(*flags, "--metrics", "fid", "prdc", "--out", stand_in / "out") == 0
    record = score_of(stand_in / "out")
    scores = record["scores"]
    assert record["n"] == {"generated": 20, "reference": None}  # the file does not say it
    assert scores["fid"]["value"] == pytest.approx(0, abs=1e-6)
    assert scores["precision"]["value"] == 1.0 and scores["coverage"]["value"] == 1.0
    assert "mode tensorflow, not clean" in refused(capsys, "fid", *flags, "--mode", "clean")


def test_any_number_of_processes_and_a_restart_give_the_same_bits(stand_in, monkeypatch):
    images = ImageSet.open(pictures(stand_in / "a", 45, 1))

    def run(place, index=0, count=1):
        monkeypatch.setattr(features, "cache_folder", lambda keep: stand_in / place)
        share = PromptShard(index, count)
        net = dataclasses.replace(on_devices(NET, "clean"), wanted=("pool", "spatial"))
        return Extractor(net, 8, share)(images, "these")

    whole, listed = run("one")
    assert whole["pool"].shape == (45, 27) and whole["pool"].std() > 0
    assert [run("four", k, 4) for k in (3, 1, 2)] == [None] * 3
    shared, also = run("four", 0, 4)
    assert also == listed and all(np.array_equal(shared[n], whole[n]) for n in whole)

    read = ImageSet.pixels

    def killed(self, number):
        if number == 30:
            raise KeyboardInterrupt
        return read(self, number)

    monkeypatch.setattr(ImageSet, "pixels", killed)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    done = sorted((stand_in / "cut" / "features").glob("*/*.npz"))
    assert 0 < len(done) < 6
    seen = []
    monkeypatch.setattr(ImageSet, "pixels", lambda s, n: seen.append(n) or read(s, n))
    resumed, _ = run("cut")
    assert len(seen) == 45 - 8 * len(done)
    assert np.array_equal(resumed["pool"], whole["pool"])
    done[0].write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        run("cut")


def test_sizes_are_made_alike_by_a_square_cut(stand_in, capsys):
    a = pictures(stand_in / "a", 6, 1)
    (stand_in / "c").mkdir()
    for i in range(6):  # upright, with a margin that the cut takes away
        wide = np.zeros((20, 16, 3), np.uint8)
        wide[2:18] = np.asarray(Image.open(a / f"{i:03d}.png"))
        Image.fromarray(wide).save(stand_in / "c" / f"{i}.png")
    flags = [a, "--reference", stand_in / "c", "--random-inception", 0, "--out", stand_in]
    error = refused(capsys, "fid", *flags)
    assert "16×16" in error and "20×16" in error and "--size" in error
    assert fid(*flags, "--size", 16) == 0
    assert score_of(stand_in)["value"] == pytest.approx(0, abs=1e-6)


def test_no_images_are_named(capsys):
    assert "give --generated" in refused(capsys, "fid", "--random-inception", 0)


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    for name, count in (("ok", 4), ("empty", 0), ("single", 1), ("mixed", 4), ("broken", 4)):
        pictures(root / name, count, 1)
    Image.new("RGB", (9, 9)).save(root / "mixed" / "odd.png")
    whole = (root / "broken" / "003.png").read_bytes()
    (root / "broken" / "003.png").write_bytes(whole[: len(whole) // 2])
    pictures(root / "twice", 2, 1, steps=20)
    again = (root / "twice" / "001.png").read_bytes()
    (root / "twice" / "001_2.png").write_bytes(again)
    (root / "bad.npz").write_bytes(b"PK no archive")
    np.savez(root / "other.npz", x=np.zeros(3))
    np.savez(root / "narrow.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(root / "nan.npz", mu=np.full(27, np.nan), sigma=np.eye(27))
    return root


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("ok --reference ok", "pt_inception-2015-12-05-6726825d.pth"),
        ("ok --reference ok --inception x --random-inception 0", "not both"),
        ("ok --reference ok --inception x.safetensors", "pytorch-fid"),
        ("ok --random-inception 0", "nothing to compare with"),
        ("none --reference ok --random-inception 0", "no folder of images"),
        ("ok --reference none --random-inception 0", "no folder of images"),
        ("ok --reference none.npz --random-inception 0", "no file"),
        ("ok --reference bad.npz --random-inception 0", "is no .npz of statistics"),
        ("ok --reference other.npz --random-inception 0", "holds no mu and sigma"),
        ("ok --reference narrow.npz --random-inception 0", "of 5 numbers, not 27"),
        ("ok --reference nan.npz --random-inception 0", "NaN"),
        ("ok --reference ok --features cmmd --random-inception 0", "uses --model"),
        ("ok --reference ok --random-inception 0 --metrics cmmd", "not available with --features"),
        ("empty --reference ok --random-inception 0", "holds no images"),
        ("ok --reference single --random-inception 0", "holds one image"),
        ("mixed --reference ok --random-inception 0", "differ in size"),
        ("broken --reference ok --random-inception 0", "003.png"),
        ("twice --reference ok --random-inception 0", "a folder of its own"),
        ("ok --reference ok --random-inception 0 --mode cleen", "clean"),
        ("ok --reference ok --random-inception 0 --metrics fdi", "fid"),
        ("ok --reference ok --random-inception 0 --batch-size 0", "at least 1"),
        ("ok --reference ok --random-inception 0 --share 2/2", "K/N"),
        ("ok --reference ok --random-inception 0 --out bad.npz/out", "bad.npz"),
        ("ok --random-inception 0 --save-statistics bad.npz/a.npz", "bad.npz"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    flags, says, bad_inputs, stand_in, capsys, monkeypatch
):
    monkeypatch.chdir(bad_inputs)
    given = "--out", stand_in / "out", "--generated", *flags.split()
    assert says in refused(capsys, "fid", *given)
    assert not (stand_in / "out" / "score.json").exists()


def test_images_are_generated_first_by_sample_pys_command(stand_in, monkeypatch):
    ran = []

    def run(line):
        ran.append(line)
        pictures(stand_in / "a", 5, 1, steps=3)
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(generated.subprocess, "run", run)
    b = pictures(stand_in / "b", 5, 2)
    flags = ["--reference", b, "--random-inception", 0, "--out", stand_in]
    assert fid(stand_in / "a", *flags, "--", "--prompts", "list.txt", "--guidance", 2) == 0
    (line,) = ran
    assert line[1:4] == ["-m", "pixart_jax", "sample"]
    assert line[4:] == ["--out", str(stand_in / "a"), *"--prompts list.txt --guidance 2".split()]
    assert score_of(stand_in)["steps"] == 3
    monkeypatch.setattr(generated.subprocess, "run", lambda c: subprocess.CompletedProcess(c, 2))
    assert fid(stand_in / "a", *flags, "--", "--prompt") == 2


def test_the_coco_protocol_and_its_sweep_over_guidance(stand_in, capsys):
    """The list of captions, its hash in the score; the square cut of both sides; a folder a
    guidance, and the lowest of them."""
    pictures(stand_in / "coco" / "val2014", 9, 4, side=24)
    (stand_in / "coco" / "annotations").mkdir()
    files = [{"id": 7 + i, "file_name": f"{i:03d}.png"} for i in range(9)]
    captions = [
        {"id": 100 + n, "image_id": 7 + n % 8, "caption": f" A thing\n{n} "} for n in range(40)
    ]
    held = {"images": files, "annotations": captions}
    (stand_in / "coco" / "annotations" / "captions_val2014.json").write_text(json.dumps(held))
    rows = coco.caption_list(stand_in / "coco" / coco.ANNOTATIONS, 6)
    again = coco.caption_list(stand_in / "coco" / coco.ANNOTATIONS, 6)
    assert rows == again and len({row["file"] for row in rows}) == 6
    for row in rows:
        of = 7 + int(row["prompt"].split()[-1]) % 8
        assert row["prompt"].startswith("A thing ") and files[of - 7]["file_name"] == row["file"]
    for n, guidance in enumerate((1.5, 4)):
        folder = stand_in / "made" / f"guidance-{guidance:g}"
        images = [np.full((20, 16, 3), 100 + 40 * n + i, np.uint8) for i in range(6)]
        write_images(folder, images, [row["prompt"] for row in rows], guidance=guidance)
    flags = ["--coco", stand_in / "coco", "--coco-captions", 6, "--random-inception", 0]
    out = ["--out", stand_in / "out", "--guidance", 1.5, 4]
    assert fid(stand_in / "made", *flags, *out) == 0, capsys.readouterr().err
    record = score_of(stand_in / "out")
    one = score_of(stand_in / "out" / "guidance-4")
    assert [point["guidance"] for point in record["sweep"]] == [1.5, 4.0]
    assert record["value"] == min(point["fid"] for point in record["sweep"])
    assert record["sweep"][1]["fid"] == one["value"] and one["guidance"] == 4
    listed = (stand_in / "out" / "captions.jsonl").read_bytes()
    assert one["captions"] == {"sha256": hashlib.sha256(listed).hexdigest(), "n": 6}
    assert one["size"] == 256 and one["n"] == {"generated": 6, "reference": 9}
    assert Image.open(stand_in / "out" / "sweep.png").size[0] > 500
    for more, says in (
        (["--coco-captions", 9], "has captions of 8 images, not 9"),
        (["--coco-captions", 5], "does not fit"),
        (["--coco", stand_in], "no file"),
    ):
        assert says in refused(capsys, "fid", stand_in / "made", *flags, *out, *more)


@pytest.mark.slow
def test_inception_over_processes_after_kill_9_and_on_generated_images(tmp_path, root):
    """64 images: four processes, and one that is killed and starts again, equal one to the bit;
    renders are nearer to renders than noise is; images are generated by the command itself."""
    from pixart_jax.data import shapes
    from pixart_jax.evaluation.tasks import eval_prompts

    prompts = eval_prompts("plain", 40)[:64]
    for name, some in (("a", prompts[:32]), ("b", prompts[32:])):
        write_images(tmp_path / name, [shapes.render(prompt.scene) for prompt in some])
    rng = np.random.default_rng(0)
    write_images(tmp_path / "noise", rng.integers(0, 256, (32, 64, 64, 3), dtype=np.uint8))

    def start(cache, generated="a", before=(), after=()):
        out = tmp_path / f"{cache}-{generated}"
        words = [*before, "-m", "pixart_jax", "evaluate", "fid", str(tmp_path / generated)]
        words += ["--reference", str(tmp_path / "b"), "--random-inception", "0"]
        words += ["--batch-size", "8", "--out", str(out), *after]
        environment = {**os.environ, "PIXART_JAX_CACHE": str(tmp_path / cache)}
        return out, subprocess.Popen([sys.executable, *words], cwd=root, env=environment)

    def score(*args, **options):
        out, process = start(*args, **options)
        assert process.wait() == 0
        return score_of(out)

    one = score("one")
    assert "torch" not in one["versions"]  # which would be of an imported one
    launch = ["-m", "pixart_jax", "launch", "--processes", "4", "--"]
    assert score("four", before=launch) == one | {"images": one["images"]}
    _, process = start("killed")
    while not list((tmp_path / "killed").glob("features/*/*.npz")):
        time.sleep(0.2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert score("killed") == one
    assert score("one", "noise")["value"] > 3 * one["value"]
    (tmp_path / "list.txt").write_text("".join(f"{p.caption}\n" for p in prompts[:4]))
    flags = ["--", "--prompts", str(tmp_path / "list.txt"), "--steps", "2", "--no-grid"]
    made = score("one", "made", after=flags)
    assert (made["steps"], made["n"]["generated"]) == (2, 4)
