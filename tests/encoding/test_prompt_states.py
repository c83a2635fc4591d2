"""encode --prompts: a kill costs a part, and the file is that of an undisturbed run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pixart_jax import cli
from pixart_jax.encoding import command as encode_command
from pixart_jax.encoding.prompts import encode_prompt_file
from pixart_jax.pipeline import PromptEncoder, TextStates
from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.text import clean_caption


def test_a_crash_costs_one_part_and_the_file_is_that_of_an_undisturbed_run(tiny_model, tmp_path):
    """The encoder fails at its second part, again and again."""
    texts = [f"a large red circle {n} left of the star" for n in range(20)]
    made = ModelFolder.open(tiny_model).text_identity(None, clean_caption) | {
        "stored_in": "bfloat16"
    }
    encoder = PromptEncoder.from_pretrained(tiny_model)

    def encode(out, encoder):
        return encode_prompt_file(texts, out, made, lambda: encoder, part=6, progress=False)

    class Crashing:
        def __init__(self):
            self.calls = 0

        def states(self, *arguments):
            self.calls += 1
            if self.calls == 2:
                raise MemoryError
            return encoder.states(*arguments)

    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert encode(whole, encoder) == 20
    parts = tmp_path / ".killed.safetensors.parts"
    for count in (1, 2, 3):
        with pytest.raises(MemoryError):
            encode(killed, Crashing())
        (parts / ".00009.safetensors.part").write_bytes(b"half a part")
        assert len(list(parts.glob("*.safetensors"))) == count and not killed.exists()
    assert encode(killed, encoder) == 20 - 3 * 6  # only what was missing
    assert killed.read_bytes() == whole.read_bytes() and not parts.exists()


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
    named = "text_encoder tokenizer text_tokens cleaning width computed_in stored_in"
    assert states.identity.keys() >= set(named.split())
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
    assert set(TextStates.open(out)) == {*states, "a green star", "a hat"}
    np.testing.assert_array_equal(TextStates.open(out)["a blue star"], want)


def test_mistakes_are_one_line_and_nothing_is_begun(tiny_model, rows, tmp_path, capsys):
    out = tmp_path / "out" / "s.safetensors"
    good = {"--prompts": rows, "--model": tiny_model, "--out": out}
    for changed, says in (
        ({"--prompts": tmp_path / "absent.txt"}, "no prompt file"),
        ({"--out": tmp_path / "out" / "s.bin"}, "NAME.safetensors"),
        ({"--stored": "float16"}, "--stored"),
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
    assert out.read_bytes() == before
