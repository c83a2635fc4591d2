"""Random input through every reader: it is used, or named in one line; nothing else happens.

`make test` tries a hundred of each kind, `make test-all` ten thousand, and thirty by command.
"""

from __future__ import annotations

import io
import json
import posixpath
import random
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_jax.data.images import PICTURES
from pixart_jax.data.sources import open_source
from pixart_jax.errors import UserError
from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.text import read_prompts
from pixart_jax.weights.files import open_tensors
from tests.data.tiny_sets import encoded, picture, write


def few_and_many(check, **strategies):
    """A check as a fast test of a hundred examples, and as a slow one of ten thousand."""
    few, many = (
        settings(max_examples=count, deadline=None)(given(**strategies)(check))
        for count in (100, 10_000)
    )
    return few, pytest.mark.slow(many)


# ---- prompt files ----

NAMES = ("prompt", "seed", "height", "guidance", "negative_prompt", "file_name", "caption")
CELL = st.text(max_size=12) | st.sampled_from(['"', '""', ",", ";", "\n", "1e999", "9" * 30, "NaN"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
CSV_FILE = st.builds(
    lambda header, rows, mark: "\n".join(mark.join(row) for row in [header, *rows]),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    st.lists(st.lists(CELL, max_size=5), max_size=6),
    st.sampled_from([",", ";", "\t"]),
)
JSON_FILE = st.lists(
    st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4) | JSON, max_size=5
).flatmap(lambda rows: st.sampled_from(["\n".join(map(json.dumps, rows)), json.dumps(rows)]))
ENCODED = st.tuples(
    st.one_of(st.text(max_size=60), CSV_FILE, JSON_FILE),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-32"]),
).map(lambda pair: pair[0].encode(pair[1], "replace"))
SUFFIX = st.sampled_from([".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet", ".prompts"])


def check_random_prompt_file(tmp_path_factory, data: bytes, suffix: str) -> None:
    """Every line is a prompt or blank, or the file is refused in one line."""
    path = tmp_path_factory.getbasetemp() / f"p{suffix}"
    path.write_bytes(data)
    try:
        rows = read_prompts(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert rows
    for row in rows:
        row.prompt.encode()
        assert row.prompt.strip()


test_random_prompt_files, test_ten_thousand_random_prompt_files = few_and_many(
    check_random_prompt_file, data=st.binary(max_size=60) | ENCODED, suffix=SUFFIX
)


# ---- folders and tars ----

PICTURE = encoded(picture())
STEM = st.sampled_from(
    ["a", "b", "A", "c.d", "e f", "ü", "sub/a", "sub/.h", "captions", "metadata"]
)
ENDING = st.sampled_from(
    [".jpg", ".PNG", ".webp", ".txt", ".Caption", ".dense.txt", ".json", ".jsonl", ".csv", ".tsv"]
    + [".parquet", ".npz", ".md", ".mask.png", ".tar.gz", ""]
)
CONTENT = (
    st.sampled_from([PICTURE, PICTURE[:200], b"", b"a red star", b"key,caption\na,x\nb,y\n"])
    | st.binary(max_size=40)
    | ENCODED
)
FILES = st.dictionaries(st.builds(str.__add__, STEM, ENDING), CONTENT, min_size=1, max_size=9)


def check_source(text: str, paths: list[str]) -> None:
    """Every file below the source is a used picture, belongs to one, or is named or counted.

    paths: all files, relative to the root. What a picture or a text is, this walk decides itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            source = open_source(text)
        except UserError as error:
            assert "\n" not in str(error)
            return
        samples = [source[n] for n in range(len(source))]
        for sample in samples:
            try:
                sample.pixels()
            except UserError as error:
                assert "\n" not in str(error) and sample.key in str(error)
    keys = Counter(sample.key for sample in samples)
    assert max(keys.values()) == 1
    unread, named = Counter(source.faults.unread), [str(fault) for fault in source.faults]
    free = set(keys)  # whose picture was not met yet
    for path in paths:
        stem, suffix = posixpath.splitext(path)
        parent, _, name = stem.rpartition("/")
        group = f"{parent}/{name.partition('.')[0]}".removeprefix("/")  # a tar's a.mask.png, a.txt
        if any(path in fault or f", {group}: caption without" in fault for fault in named):
            continue
        if suffix.lower().removeprefix(".") in PICTURES and stem in free:
            free.remove(stem)
            continue
        owned = stem in keys or any(f"{key}.".startswith(f"{group}.") for key in keys)
        if suffix.lower() in (".txt", ".caption", ".json") and owned:
            continue  # a text of a used picture
        if posixpath.basename(stem).lower() in ("captions", "metadata"):
            continue  # a table, whose rows are checked in test_sources_folder.py
        unread[suffix.lower() or "no suffix"] -= 1
    assert all(count >= 0 for count in unread.values()), (unread, named, paths)


def check_random_folder(tmp_path_factory, files: dict[str, bytes]) -> None:
    root = tmp_path_factory.getbasetemp() / "folder"
    shutil.rmtree(root, ignore_errors=True)
    write(root, files)
    hidden = [name for name in files if "/." in f"/{name}"]
    check_source(f"folder:{root}", [name for name in files if name not in hidden])


def check_random_tar(tmp_path_factory, files: dict[str, bytes], cut: int) -> None:
    """cut: bytes that the tar has lost."""
    root = tmp_path_factory.getbasetemp() / "tar"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    whole = buffer.getvalue()
    (root / "a.tar").write_bytes(whole[: max(0, len(whole) - cut)])
    check_source(f"webdataset:{root}/a.tar", [] if cut else list(files))


test_random_folders, test_ten_thousand_random_folders = few_and_many(
    check_random_folder, files=FILES
)
test_random_tars, test_ten_thousand_random_tars = few_and_many(
    check_random_tar, files=FILES, cut=st.just(0) | st.integers(0, 30_000)
)


# ---- weights and configs ----

FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F99"]) | JSON,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(-4, 40), st.integers(-4, 40)) | JSON,
    },
)
HEADER = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), FIELDS | JSON, max_size=3)


def check_random_safetensors(tmp_path_factory, header, length: int | None, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "w.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    try:
        tensors = open_tensors(path)
        for key in tensors:
            assert tensors[key].shape == tensors.shape(key)
    except UserError as error:
        assert "\n" not in str(error)


test_random_safetensors, test_ten_thousand_random_safetensors = few_and_many(
    check_random_safetensors,
    header=HEADER | JSON | st.binary(max_size=40),
    length=st.none() | st.integers(0, 2**64 - 1),
    data=st.binary(max_size=48),
)


CONFIGS = (
    "model_index.json transformer/config.json vae/config.json text_encoder/config.json "
    "scheduler/scheduler_config.json sampling.json"
).split()
VALUE = JSON | st.sampled_from([-1, 0, 1e9, 1e400, "float16", [], {}, [[]], "AutoencoderKL"])


def check_random_config(tmp_path_factory, root: Path, name: str, changes: dict, raw) -> None:
    """One config file with other values, or other bytes; the folder opens or is refused."""
    folder = tmp_path_factory.getbasetemp() / "model"
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / part).mkdir(parents=True)
    shipped = root / "assets" / "shapes"
    for config in CONFIGS:
        if (shipped / config).exists():
            shutil.copy(shipped / config, folder / config)
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    names = sorted(values)
    values |= {names[key % len(names)] if names else "steps": v for key, v in changes.items()}
    (folder / name).write_bytes(json.dumps(values).encode() if raw is None else raw)
    try:
        ModelFolder.open(folder, ())
    except UserError as error:
        assert "\n" not in str(error)


test_random_configs, test_ten_thousand_random_configs = few_and_many(
    check_random_config,
    name=st.sampled_from(CONFIGS),
    changes=st.dictionaries(st.integers(0, 50), VALUE, min_size=1, max_size=3),
    raw=st.none() | st.none() | st.binary(max_size=30) | JSON.map(lambda v: json.dumps(v).encode()),
)


# ---- thirty by command ----

GOOD = {
    "p.csv": b"prompt,seed\na red star,1\na blue circle,2\n",
    "p.jsonl": b'{"prompt": "a red star", "seed": 3}\n{"prompt": "a blue circle"}\n',
    "p.txt": "a red star\na blue cirçle\n".encode(),
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, removed, doubled or inserted, in up to three places."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, count = rng.randrange(len(out) + 1), rng.randint(1, 12)
        piece = bytes(rng.randrange(256) for _ in range(count))
        out[at : at + rng.choice((0, count, len(out)))] = rng.choice((b"", piece, out[at:]))
    return bytes(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_a_command_with_damaged_input_ends_with_a_result_or_one_line(root, tmp_path, seed):
    rng, out = random.Random(seed), tmp_path / "out"
    kind = ("prompts", "model", "folder")[seed % 3]
    if kind == "prompts":
        name = rng.choice(list(GOOD))
        (tmp_path / name).write_bytes(damaged(GOOD[name], rng))
        command = ["sample.py", "--prompts", str(tmp_path / name), "--out", str(out)]
        command += ["--steps", "2"]
    elif kind == "model":
        shutil.copytree(root / "assets" / "shapes", tmp_path / "model")
        files = sorted(p for p in (tmp_path / "model").rglob("*") if p.is_file())
        file = rng.choice(files)
        file.write_bytes(damaged(file.read_bytes(), rng))
        command = ["sample.py", "--prompt", "a red star", "--out", str(out), "--steps", "2"]
        command += ["--model", str(tmp_path / "model"), "--weights-cache", "none"]
    else:
        for name, data in {
            "a.png": PICTURE,
            "a.txt": b"a star",
            "captions.csv": GOOD["p.csv"],
        }.items():
            (tmp_path / "set").mkdir(exist_ok=True)
            (tmp_path / "set" / name).write_bytes(damaged(data, rng))
        (tmp_path / "set" / "b.png").write_bytes(PICTURE)
        command = ["-m", "pixart_jax", "inspect", f"folder:{tmp_path / 'set'}", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, *command], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 2), (done.returncode, done.stderr)
    if done.returncode == 2:
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert not list(tmp_path.glob("out/*.png"))
