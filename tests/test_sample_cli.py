"""sample.py: prompts become PNGs once, and what a person got wrong is one line and exit status
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
from pixart_jax.text import PromptRow

PROMPTS = ["a large red circle", "a small blue star", "a green square"]


def images_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_prompt_becomes_a_png_that_says_how(tiny_model, tmp_path, capsys):
    argv = [
        "--model",
        str(tiny_model),
        "--prompt",
        PROMPTS[0],
        "--out",
        str(tmp_path),
        "--steps",
        "2",
        "--guidance",
        "3",
        "--seed",
        "5",
    ]
    assert cli.run(sample.main, argv) == 0
    out, err = capsys.readouterr()
    path = tmp_path / "0000_a-large-red-circle_5.png"
    assert str(path) in out and "image/s" in err.replace(" images", "image").replace(
        "images", "image"
    )
    found = png_settings(path)
    assert (
        found.items()
        >= {
            "prompt": PROMPTS[0],
            "steps": 2,
            "guidance": 3.0,
            "seed": 5,
            "height": 64,
            "width": 64,
            "solver": "dpm++",
            "model": "tiny",
            "index": 0,
            "negative_prompt": "",
        }.items()
    )
    with Image.open(path) as image:
        assert image.info["parameters"].startswith(
            f"{PROMPTS[0]}\nSteps: 2, Sampler: dpm++, CFG scale: 3, Seed: 5, Size: 64x64"
        )
        np.testing.assert_array_equal(
            np.asarray(image),
            Pipeline.from_pretrained(tiny_model)(PROMPTS[0], steps=2, guidance=3.0, seed=5)[0],
        )


def test_without_a_guidance_the_models_own_is_taken_and_told(tiny_model, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(tiny_model, own)
    (own / "sampling_config.json").write_text('{"guidance": 2}')
    assert (
        cli.run(
            sample.main,
            [
                "--model",
                str(own),
                "--prompt",
                PROMPTS[0],
                "--out",
                str(tmp_path / "o"),
                "--steps",
                "2",
            ],
        )
        == 0
    )
    (path,) = (tmp_path / "o").glob("*.png")
    assert png_settings(path)["guidance"] == 2.0
    with Image.open(path) as image:
        np.testing.assert_array_equal(
            np.asarray(image),
            Pipeline.from_pretrained(tiny_model)(PROMPTS[0], steps=2, guidance=2.0)[0],
        )


def test_a_file_of_prompts_becomes_a_folder_and_a_second_call_draws_only_what_is_missing(
    tiny_model, tmp_path, capsys
):
    (tmp_path / "p.txt").write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]))
    out = tmp_path / "out"
    argv = [
        "--model",
        str(tiny_model),
        "--prompts",
        str(tmp_path / "p.txt"),
        "--out",
        str(out),
        "--steps",
        "2",
        "--batch-size",
        "2",
    ]
    assert cli.run(sample.main, argv) == 0
    names = [
        "0000_a-large-red-circle_0.png",
        "0001_a-small-blue-star_0.png",
        "0002_a-green-square_0.png",
        "grid.png",
    ]
    assert images_in(out) == names
    first = {name: (out / name).read_bytes() for name in names}
    (out / names[1]).unlink()
    stamp = (out / names[0]).stat().st_mtime_ns
    capsys.readouterr()
    assert cli.run(sample.main, argv) == 0
    assert "2 of them already there" in capsys.readouterr().out
    assert (out / names[0]).stat().st_mtime_ns == stamp
    assert images_in(out) == names
    redrawn, before = (
        np.asarray(Image.open(p)).astype(int)
        for p in (out / names[1], _bytes(tmp_path, first[names[1]]))
    )
    assert np.abs(redrawn - before).max() <= 1  # drawn alone this time
    # Other settings: drawn beside, nothing is lost.
    assert cli.run(sample.main, [*argv[:-4], "--steps", "1", "--no-grid"]) == 0
    assert {f"{name[:-4]}_2.png" for name in names[:3]} < set(images_in(out))
    assert (out / names[0]).read_bytes() == first[names[0]]


def _bytes(folder: Path, data: bytes) -> Path:
    (folder / "before.png").write_bytes(data)
    return folder / "before.png"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", 'id,prompt\n1,a red circle\n2,"a star, blue"\n'),
        ("p.jsonl", '{"prompt": "a red circle"}\n\n"a star, blue"\n'),
    ],
)
def test_csv_and_jsonl_files_of_prompts(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert Flags(prompts=tmp_path / name).prompt_rows() == [
        PromptRow("a red circle"),
        PromptRow("a star, blue"),
    ]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_rows_have_their_own_sizes_seeds_and_negative_prompts_and_each_size_compiles_once(
    tiny_model, tmp_path, form
):
    from pixart_jax.pipeline.sampler import generate_jit

    rows = [(PROMPTS[0], 64, 96, None, None), (PROMPTS[1], 96, 64, 7, None)]
    rows += [(PROMPTS[2], 64, 96, None, "a star"), (PROMPTS[0], 96, 64, 7, "")]
    names = ("prompt", "height", "width", "seed", "negative_prompt")
    if form == "csv":
        lines = [
            ",".join(names),
            *(",".join("" if v is None else str(v) for v in row) for row in rows),
        ]
    else:
        lines = [json.dumps({k: v for k, v in zip(names, row) if v is not None}) for row in rows]
    (tmp_path / f"p.{form}").write_text("\n".join(lines))
    out, before = tmp_path / "out", generate_jit._cache_size()
    how = {"steps": 3, "batch_size": 2}
    argv = [
        "--model",
        str(tiny_model),
        "--prompts",
        str(tmp_path / f"p.{form}"),
        "--out",
        str(out),
        "--steps",
        "3",
        "--batch-size",
        "2",
    ]
    assert cli.run(sample.main, [*argv, "--no-grid"]) == 0
    assert generate_jit._cache_size() - before <= 2  # a size each, whatever the order of the rows
    pipe = Pipeline.from_pretrained(tiny_model)
    for n, (prompt, height, width, seed, negative) in enumerate(rows):
        (path,) = out.glob(f"{n:04d}_*.png")
        own = {
            "height": height,
            "width": width,
            "seed": seed or 0,
            "negative_prompt": negative or "",
        }
        assert png_settings(path).items() >= own.items()
        want = pipe(prompt, indices=[n], **own, **how)[0].astype(int)
        assert np.abs(np.asarray(Image.open(path)).astype(int) - want).max() <= 1


def bad(tmp_path: Path, name: str, text: str | bytes = "") -> str:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


BAD = {
    "no model folder": (
        lambda t, m: ["--prompt", "x", "--model", str(t / "absent")],
        "no model folder",
    ),
    "a part of a model": (
        lambda t, m: ["--prompt", "x", "--model", str(m / "vae")],
        "part of a model",
    ),
    "no prompt": (lambda t, m: [], "--prompt TEXT or --prompts FILE"),
    "both": (lambda t, m: ["--prompt", "x", "--prompts", "y"], "not both"),
    "no prompt file": (lambda t, m: ["--prompts", str(t / "absent.txt")], "no prompt file"),
    "empty prompt file": (lambda t, m: ["--prompts", bad(t, "p.txt", "\n  \n")], "holds no prompt"),
    "binary prompt file": (
        lambda t, m: ["--prompts", bad(t, "p.txt", b"\xff\xfe\x00")],
        "not UTF-8",
    ),
    "folder of prompts": (lambda t, m: ["--prompts", str(t)], "is a folder"),
    "csv without the column": (
        lambda t, m: ["--prompts", bad(t, "p.csv", "text\nx\n")],
        "no column 'prompt'",
    ),
    "empty csv": (lambda t, m: ["--prompts", bad(t, "p.csv")], "holds no prompt"),
    "broken jsonl": (lambda t, m: ["--prompts", bad(t, "p.jsonl", "{")], "line 1"),
    "a row of a wrong size": (
        lambda t, m: ["--prompts", bad(t, "p.csv", "prompt,height\nx,64\ny,72\n")],
        "prompt 2, 'y': height 72",
    ),
    "a row of no number": (
        lambda t, m: ["--prompts", bad(t, "p.jsonl", '{"prompt": "x", "width": "wide"}')],
        "line 1: width 'wide'",
    ),
    "jsonl without prompt": (
        lambda t, m: ["--prompts", bad(t, "p.jsonl", '{"text": "x"}')],
        "line 1",
    ),
    "height": (lambda t, m: ["--prompt", "x", "--height", "72"], "multiple of 16"),
    "width": (lambda t, m: ["--prompt", "x", "--width", "-64"], "multiple of 16"),
    "solver": (lambda t, m: ["--prompt", "x", "--solver", "dmp++"], "did you mean 'dpm++'"),
    "steps": (lambda t, m: ["--prompt", "x", "--steps", "-3"], "at least 1"),
    "steps no number": (lambda t, m: ["--prompt", "x", "--steps", "many"], "many"),
    "batch size": (lambda t, m: ["--prompt", "x", "--batch-size", "0"], "at least 1"),
    "unknown flag": (
        lambda t, m: ["--prompt", "x", "--guidence", "3"],
        "did you mean '--guidance'",
    ),
    "out is a file": (lambda t, m: ["--prompt", "x", "--out", bad(t, "file")], "file"),
    "out is below a file": (
        lambda t, m: ["--prompt", "x", "--out", bad(t, "file") + "/deep"],
        "not a directory",
    ),
    "out cannot be written": (
        lambda t, m: ["--prompt", "x", "--out", "/proc/nowhere"],
        "/proc/nowhere",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_status_2(tiny_model, tmp_path, capsys, case):
    make, says = BAD[case]
    argv = make(tmp_path, tiny_model)
    given = argv if "--model" in argv else [*argv, "--model", str(tiny_model)]
    given = given if "--out" in given else [*given, "--out", str(tmp_path / "out")]
    assert cli.run(sample.main, given) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert not (tmp_path / "out").exists()


def test_full_disk_keeps_what_was_drawn_and_the_same_command_goes_on(
    tiny_model, tmp_path, capsys, monkeypatch
):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    where = [
        "--model",
        str(tiny_model),
        "--prompts",
        str(tmp_path / "p.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    argv = [*where, "--batch-size", "1", "--steps", "2"]
    whole, real = [], os.fsync

    def fills_up(descriptor):
        if len(whole) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fills_up)
    assert cli.run(sample.main, argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the disk is full")
    assert len(images_in(tmp_path / "out")) == 2 and all(
        png_settings(path) for path in (tmp_path / "out").iterdir()
    )
    monkeypatch.undo()
    assert cli.run(sample.main, argv) == 0
    assert len(images_in(tmp_path / "out")) == 4


def test_the_program_itself_draws_and_refuses(tiny_model, root, tmp_path):
    """As a person starts it: another folder, another process."""
    command = [
        sys.executable,
        str(root / "sample.py"),
        "--model",
        str(tiny_model),
        "--prompt",
        PROMPTS[0],
        "--steps",
        "1",
    ]
    drawn = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "out" / "0000_a-large-red-circle_0.png").is_file()
    refused = subprocess.run(
        [*command, "--solver", "dpm"], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def test_the_shipped_model_is_the_default(root):
    assert Flags().model == root / "assets" / "shapes"
    if not (root / "assets" / "shapes" / "model_index.json").is_file():
        pytest.skip("assets/shapes is not there yet")
    assert (
        json.loads((Flags().model / "model_index.json").read_text())["_class_name"]
        == "PixArtAlphaPipeline"
    )
    size = sum(p.stat().st_size for p in Flags().model.rglob("*") if p.is_file())
    assert size <= 25 * 2**20
