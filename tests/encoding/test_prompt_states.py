"""encode --prompts: a kill costs a part, and the file is that of an undisturbed run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pixart_jax import cli
from pixart_jax.encoding import command as encode_command
from pixart_jax.encoding import prompts as prompt_states
from pixart_jax.pipeline import PromptEncoder, TextStates
from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.text import clean_caption

COUNT = 60
ENCODE = """
import sys, time
from pathlib import Path
from pixart_jax.encoding import prompts
from pixart_jax.pipeline import PromptEncoder
from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.text import clean_caption

model, out, delay = sys.argv[1:]
texts = [f"a large red circle {n} left of the star" for n in range(60)]
made = {**ModelFolder.open(model).text_identity(None, clean_caption), "stored_in": "bfloat16"}
class Slow(PromptEncoder):
    def states(self, *args):
        time.sleep(float(delay))
        return super().states(*args)
print(prompts.encode_prompt_file(texts, Path(out), made, lambda: Slow.from_pretrained(model), part=6, progress=False))
"""  # noqa: E501


def start(model, out, delay):
    return subprocess.Popen(
        [sys.executable, "-c", ENCODE, str(model), str(out), str(delay)],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_often_it_ends_with_the_file_of_an_undisturbed_run(tiny_model, tmp_path):
    texts = [f"a large red circle {n} left of the star" for n in range(COUNT)]
    identity = ModelFolder.open(tiny_model).text_identity(None, clean_caption)
    made = {**identity, "stored_in": "bfloat16"}
    whole = tmp_path / "whole.safetensors"
    assert (
        prompt_states.encode_prompt_file(
            texts,
            whole,
            made,
            lambda: PromptEncoder.from_pretrained(tiny_model),
            part=6,
            progress=False,
        )
        == COUNT
    )
    parts = tmp_path / ".killed.safetensors.parts"
    for goal in (3, 7):
        run = start(tiny_model, tmp_path / "killed.safetensors", 0.2)
        while len(list(parts.glob("*.safetensors"))) < goal and run.poll() is None:
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not (tmp_path / "killed.safetensors").exists()
    last = start(tiny_model, tmp_path / "killed.safetensors", 0)
    assert int(last.communicate(timeout=200)[0]) <= COUNT - 7 * 6  # only what was missing
    assert (tmp_path / "killed.safetensors").read_bytes() == whole.read_bytes()
    assert not parts.exists()


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "p.jsonl"
    made = [
        {"prompt": "a red circle"},
        {"prompt": "A Blue star", "negative_prompt": "a square", "height": 64},
        {"prompt": "a red circle"},
    ]
    path.write_text("\n".join(map(json.dumps, made)))
    return path


def run(*argv) -> int:
    return cli.run(encode_command.main, [str(word) for word in argv])


def test_a_file_holds_negative_prompts_and_the_empty_one_and_grows_by_what_is_missing(
    tiny_model, rows, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "deep" / "s.safetensors"
    argv = ["--prompts", rows, "--model", tiny_model, "--out", out, "--stored", "float32"]
    assert run(*argv) == 0
    said = capsys.readouterr()
    assert "4 texts, 4 of them new" in said.out and "prompts/s" in said.err
    states = TextStates.open(out)
    assert list(states) == ["a red circle", "a blue star", "", "a square"]
    assert states.identity.keys() >= {
        "text_encoder",
        "tokenizer",
        "text_tokens",
        "cleaning",
        "width",
        "computed_in",
        "stored_in",
    }
    want = PromptEncoder.from_pretrained(tiny_model).states(["a blue star"])["a blue star"]
    np.testing.assert_array_equal(states["a blue star"], want)
    first = out.read_bytes()
    monkeypatch.setattr(
        PromptEncoder, "from_pretrained", lambda *_: pytest.fail("nothing is missing")
    )
    assert run(*argv) == 0
    assert (
        "4 texts, all of them already there" in capsys.readouterr().out
        and out.read_bytes() == first
    )
    monkeypatch.undo()
    (tmp_path / "more.txt").write_text("a green star\na red circle")
    assert run("--prompts", tmp_path / "more.txt", *argv[2:], "--negative-prompt", "a hat") == 0
    assert "4 texts, 2 of them new" in capsys.readouterr().out
    assert set(TextStates.open(out)) == {
        "a red circle",
        "a blue star",
        "",
        "a square",
        "a green star",
        "a hat",
    }
    np.testing.assert_array_equal(TextStates.open(out)["a blue star"], want)


def test_mistakes_are_one_line_and_nothing_is_begun(tiny_model, rows, tmp_path, capsys):
    out = tmp_path / "out" / "s.safetensors"
    good = {"--prompts": rows, "--model": tiny_model, "--out": out}
    for changed, says in (
        ({"--prompts": tmp_path / "absent.txt"}, "no prompt file"),
        ({"--out": tmp_path / "out" / "s.bin"}, "NAME.safetensors"),
        ({"--stored": "float16"}, "stored 'float16' is unknown (did you mean 'bfloat16'?)"),
        ({"--dtype": "float23"}, "did you mean 'float32'"),
        ({"--model": tmp_path / "nowhere"}, "no model folder"),
        ({"--promts": "x"}, "did you mean '--prompts'"),
    ):
        assert run(*(word for pair in {**good, **changed}.items() for word in pair)) == 2
        said = capsys.readouterr()
        assert (
            said.out == ""
            and said.err.startswith("error: ")
            and said.err.count("\n") == 1
            and says in said.err
        ), said.err
        assert not out.parent.exists()


def test_a_file_made_otherwise_is_refused_and_kept(tiny_model, rows, tmp_path, capsys):
    out = tmp_path / "s.safetensors"
    assert run("--prompts", rows, "--model", tiny_model, "--out", out) == 0
    before = out.read_bytes()
    for more, says in (
        (["--stored", "float32"], "another dtype (bfloat16)"),
        (["--no-clean-caption"], "another cleaning of prompts"),
    ):
        capsys.readouterr()
        assert run("--prompts", rows, "--model", tiny_model, "--out", out, *more) == 2
        assert says in capsys.readouterr().err
    assert out.read_bytes() == before and prompt_states.PART >= 1
