"""sample.py: prompts become PNGs once, and what a user got wrong is one line and exit status
2."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixart_jax import Pipeline, cli
from pixart_jax.commands import sample
from pixart_jax.commands.sample_flags import Flags
from pixart_jax.images import png_settings
from pixart_jax.pipeline.sampler import generate_jit
from pixart_jax.text import PromptRow

PROMPTS = ["a large red circle", "a small blue star", "a green square"]


def run(model: Path, out: Path, text: str, *flags) -> int:
    """sample.py with flags in ``text``, between blanks, and others that may hold blanks."""
    argv = ["--model", str(model), "--out", str(out), *text.split(), *map(str, flags)]
    return cli.run(sample.main, argv)


def images_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_prompt_becomes_a_png_that_records_how(tiny_model, tmp_path, capsys):
    flags = "--steps 2 --guidance 3 --seed 5"
    assert run(tiny_model, tmp_path, flags, "--prompt", PROMPTS[0]) == 0
    out, err = capsys.readouterr()
    path = tmp_path / "0000_a-large-red-circle_5.png"
    assert str(path) in out and "image" in err and "/s" in err
    said = {"prompt": PROMPTS[0], "steps": 2, "guidance": 3.0, "seed": 5, "height": 64, "width": 64}
    said |= {"solver": "dpm++", "model": "tiny", "index": 0, "negative_prompt": ""}
    assert png_settings(path).items() >= said.items()
    with Image.open(path) as image:
        assert image.info["parameters"].startswith(
            f"{PROMPTS[0]}\nSteps: 2, Sampler: dpm++, CFG scale: 3, Seed: 5, Size: 64x64"
        )
    want = Pipeline.from_pretrained(tiny_model)(PROMPTS[0], steps=2, guidance=3.0, seed=5)[0]
    np.testing.assert_array_equal(pixels(path), want)


def test_without_a_guidance_the_models_own_is_taken_and_recorded(tiny_model, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(tiny_model, own)
    (own / "sampling_config.json").write_text('{"guidance": 2}')
    assert run(own, tmp_path / "o", "--steps 2", "--prompt", PROMPTS[0]) == 0
    (path,) = (tmp_path / "o").glob("*.png")
    assert png_settings(path)["guidance"] == 2.0
    want = Pipeline.from_pretrained(tiny_model)(PROMPTS[0], steps=2, guidance=2.0)[0]
    np.testing.assert_array_equal(pixels(path), want)


def test_a_file_of_prompts_becomes_a_folder_and_a_second_call_generates_only_what_is_missing(
    tiny_model, tmp_path, capsys
):
    (tmp_path / "p.txt").write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]))
    out, flags = tmp_path / "out", f"--prompts {tmp_path}/p.txt --batch-size 2"
    assert run(tiny_model, out, f"{flags} --steps 2") == 0
    names = ["0000_a-large-red-circle_0.png", "0001_a-small-blue-star_0.png"]
    names += ["0002_a-green-square_0.png", "grid.png"]
    assert images_in(out) == names
    first, lost = (out / names[0]).read_bytes(), pixels(out / names[1]).astype(int)
    (out / names[1]).unlink()
    stamp = (out / names[0]).stat().st_mtime_ns
    capsys.readouterr()
    assert run(tiny_model, out, f"{flags} --steps 2") == 0
    assert "2 of them already there" in capsys.readouterr().out
    assert (out / names[0]).stat().st_mtime_ns == stamp
    assert images_in(out) == names
    assert np.abs(pixels(out / names[1]) - lost).max() <= 1  # alone in its batch this time
    # Other settings: written beside, nothing is lost.
    assert run(tiny_model, out, f"{flags} --steps 1 --no-grid") == 0
    assert {f"{name[:-4]}_2.png" for name in names[:3]} < set(images_in(out))
    assert (out / names[0]).read_bytes() == first


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", 'id,prompt\n1,a red circle\n2,"a star, blue"\n'),
        ("p.jsonl", '{"prompt": "a red circle"}\n\n"a star, blue"\n'),
    ],
)
def test_csv_and_jsonl_files_of_prompts(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    rows = [PromptRow("a red circle"), PromptRow("a star, blue")]
    assert Flags(prompts=tmp_path / name).prompt_rows() == rows


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_rows_have_their_own_sizes_seeds_and_negative_prompts_and_each_size_compiles_once(
    tiny_model, tmp_path, form
):
    rows = [(PROMPTS[0], 64, 96, None, None), (PROMPTS[1], 96, 64, 7, None)]
    rows += [(PROMPTS[2], 64, 96, None, "a star"), (PROMPTS[0], 96, 64, 7, "")]
    names = ("prompt", "height", "width", "seed", "negative_prompt")
    if form == "csv":
        lines = [",".join("" if v is None else str(v) for v in row) for row in (names, *rows)]
    else:
        lines = [json.dumps({k: v for k, v in zip(names, row) if v is not None}) for row in rows]
    (tmp_path / f"p.{form}").write_text("\n".join(lines))
    out, before = tmp_path / "out", generate_jit._cache_size()
    flags = f"--prompts {tmp_path}/p.{form} --steps 3 --batch-size 2 --no-grid"
    assert run(tiny_model, out, flags) == 0
    # a size each, whatever the order of the rows; the first has two negative prompts
    assert generate_jit._cache_size() - before <= 2
    pipe = Pipeline.from_pretrained(tiny_model)
    for n, (prompt, height, width, seed, negative) in enumerate(rows):
        (path,) = out.glob(f"{n:04d}_*.png")
        own = {"height": height, "width": width, "seed": seed or 0}
        own["negative_prompt"] = negative or ""
        assert png_settings(path).items() >= own.items()
        want = pipe(prompt, indices=[n], steps=3, batch_size=2, **own)[0].astype(int)
        assert np.abs(pixels(path).astype(int) - want).max() <= 1


def bad(tmp_path: Path, name: str, text: str | bytes = "") -> str:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


BAD = {  # name: (flags beside --model and --out, or a function of (folder, model); what is said)
    "no model folder": (lambda t, m: f"--prompt x --model {t}/absent", "no model folder"),
    "a part of a model": (lambda t, m: f"--prompt x --model {m}/vae", "part of a model"),
    "no prompt": ("", "--prompt TEXT or --prompts FILE"),
    "both": ("--prompt x --prompts y", "not both"),
    "no prompt file": (lambda t, m: f"--prompts {t}/absent.txt", "no prompt file"),
    "empty file": (lambda t, m: f"--prompts {bad(t, 'p.txt', chr(10))}", "holds no prompt"),
    "binary file": (lambda t, m: f"--prompts {bad(t, 'p.txt', BINARY)}", "not UTF-8"),
    "folder of prompts": (lambda t, m: f"--prompts {t}", "is a folder"),
    "no column": (
        lambda t, m: f"--prompts {bad(t, 'p.csv', 'text' + chr(10) + 'x')}",
        "no column 'prompt'",
    ),
    "empty csv": (lambda t, m: f"--prompts {bad(t, 'p.csv')}", "holds no prompt"),
    "broken jsonl": (lambda t, m: f"--prompts {bad(t, 'p.jsonl', '{')}", "line 1"),
    "a row's size": (
        lambda t, m: f"--prompts {bad(t, 'p.csv', SIZES)}",
        "prompt 2, 'y': height 72",
    ),
    "a row's width": (lambda t, m: f"--prompts {bad(t, 'p.jsonl', WIDE)}", "line 1: width 'wide'"),
    "a row's guidance": (
        lambda t, m: f"--prompts {bad(t, 'p.jsonl', WIDE.replace('width', 'guidance'))}",
        "line 1: guidance 'wide' is not a finite number",
    ),
    "no prompt in a row": (lambda t, m: f"--prompts {bad(t, 'p.jsonl', NO_PROMPT)}", "line 1"),
    "height": ("--prompt x --height 72", "multiple of 16"),
    "width": ("--prompt x --width -64", "multiple of 16"),
    "solver": ("--prompt x --solver dmp++", "did you mean 'dpm++'"),
    "steps": ("--prompt x --steps -3", "at least 1"),
    "steps no number": ("--prompt x --steps many", "many"),
    "seed": (f"--prompt x --seed {2**64}", f"a whole number from 0 to {2**64 - 1}"),
    "batch size": ("--prompt x --batch-size 0", "at least 1"),
    "unknown flag": ("--prompt x --guidence 3", "did you mean '--guidance'"),
    "out is a file": (lambda t, m: f"--prompt x --out {bad(t, 'file')}", "file"),
    "out below a file": (lambda t, m: f"--prompt x --out {bad(t, 'file')}/deep", "not a directory"),
    "out cannot be written": ("--prompt x --out /proc/nowhere", "/proc/nowhere"),
    "dtype": ("--prompt x --dtype float23", "dtype 'float23' is unknown (did you mean 'float32'?)"),
    "null": ("--prompt x --null txt", "null 'txt' is unknown (did you mean 'text'?)"),
    "offload": ("--prompt x --offload-text-encoder allways", "did you mean 'always'"),
    "share": ("--prompt x --share 2/2", "--share '2/2': K/N is needed"),
    "share no number": ("--prompt x --share half", "0/4 … 3/4"),
    "no cluster": ("--prompt x --share cluster", "--share cluster: JAX finds no cluster"),
    "mesh axis": ("--prompt x --mesh fdsp=2", "did you mean 'fsdp'"),
    "mesh size": ("--prompt x --mesh fsdp=two", "is not AXIS=SIZE"),
    "mesh of 3": ("--prompt x --mesh fsdp=3", "does not fit 1 device"),
    "mesh rest": ("--prompt x --mesh data=-1,fsdp=-1", "only one axis"),
}
BINARY, SIZES = b"\xff\xfe\x00", "prompt,height\nx,64\ny,72\n"
WIDE, NO_PROMPT = '{"prompt": "x", "width": "wide"}', '{"text": "x"}'


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_status_2(tiny_model, tmp_path, capsys, case):
    flags, says = BAD[case]
    flags = flags if isinstance(flags, str) else flags(tmp_path, tiny_model)
    assert run(tiny_model, tmp_path / "out", flags) == 2  # a flag given twice counts as the second
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert not (tmp_path / "out").exists()


def test_full_disk_keeps_what_was_generated_and_the_same_command_goes_on(
    tiny_model, tmp_path, capsys, monkeypatch
):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    flags = f"--prompts {tmp_path}/p.txt --batch-size 1 --steps 2"
    whole, real = [], os.fsync

    def fills_up(descriptor):
        if len(whole) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fills_up)
    out = tmp_path / "out"
    assert run(tiny_model, out, flags) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the disk is full")
    assert len(images_in(out)) == 2 and all(png_settings(path) for path in out.iterdir())
    monkeypatch.undo()
    assert run(tiny_model, out, flags) == 0
    assert len(images_in(out)) == 4


def test_the_program_itself_generates_and_refuses(tiny_model, root, tmp_path):
    """As a user starts it: another folder, another process."""
    command = [sys.executable, str(root / "sample.py"), "--model", str(tiny_model), "--steps", "1"]
    command += ["--prompt", PROMPTS[0]]
    how = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(command, **how, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "0000_a-large-red-circle_0.png").is_file()
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    cloud = {"botocore", "gcsfs", "google.cloud.storage", "s3fs"}
    assert "jax" in imported and not imported & cloud
    refused = subprocess.run([*command, "--solver", "dpm"], **how)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def test_the_shipped_model_is_the_default(root):
    model = Flags().model
    assert model == root / "assets" / "shapes"
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtAlphaPipeline"
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) <= 25 * 2**20


def test_several_images_of_a_prompt_are_those_of_the_next_seeds(tiny_model, tmp_path):
    pipe = Pipeline.from_pretrained(tiny_model)
    how = {"steps": 1, "batch_size": 2}
    found = pipe(PROMPTS[:2], num_images_per_prompt=2, seed=[5, 2**64 - 1], **how)
    for k, seeds in enumerate(([5, 2**64 - 1], [6, 0])):
        want = pipe(PROMPTS[:2], seed=seeds, **how).astype(int)
        assert np.abs(found[k::2].astype(int) - want).max() <= 1
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS[:2]))
    flags = f"--prompts {tmp_path}/p.txt --steps 1 --batch-size 2 --seed 5 --no-grid"
    assert run(tiny_model, tmp_path / "o", f"{flags} --num-images-per-prompt 2") == 0
    names = [f"0000_a-large-red-circle_{seed}.png" for seed in (5, 6)]
    names += [f"0001_a-small-blue-star_{seed}.png" for seed in (5, 6)]
    assert images_in(tmp_path / "o") == names
    np.testing.assert_array_equal(pixels(tmp_path / "o" / names[0]), found[0])
    assert png_settings(tmp_path / "o" / names[3])["index"] == 1


@pytest.mark.parametrize("count", ["0", "-1", "1.5"])
def test_a_bad_number_of_images_a_prompt_is_one_line(tiny_model, tmp_path, capsys, count):
    flags = f"--num-images-per-prompt {count}"
    assert run(tiny_model, tmp_path / "o", flags, "--prompt", PROMPTS[0]) == 2
    assert "num-images-per-prompt" in capsys.readouterr().err and not (tmp_path / "o").exists()
