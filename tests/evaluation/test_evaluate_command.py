"""``python -m pixart_jax evaluate`` from flags to files, on stand-ins for the parts of a model, and
on the shipped model."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pixart_jax.data import shapes
from pixart_jax.evaluation import command
from pixart_jax.evaluation.command import SHIPPED, ShapesOptions, VAEOptions
from pixart_jax.evaluation.tasks import eval_prompts
from pixart_jax.pipeline import Pipeline
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.weights import lora
from tests.evaluation.calls import evaluate, refused, score_of


class TruePipeline:
    """Renders the scene of each prompt, in batches and in any order; every ``wrong``-th image is
    blank."""

    def __init__(self, level: str, per_task: int, wrong: int = 10**9):
        self.prompts, self.wrong = eval_prompts(level, per_task), wrong
        self.calls, self.sampling = [], SamplingConfig(guidance=1.75)

    def generate(self, prompts, config, *, height, width, indices, batch_size, seed):
        how = {name: getattr(config, name) for name in ("steps", "guidance", "solver")}
        assert config == SamplingConfig(**how, null="text")
        self.calls.append({"size": (height, width), "count": len(prompts), "seed": seed, **how})
        assert prompts == [self.prompts[i].caption for i in indices]
        for start in reversed(range(0, len(prompts), batch_size)):
            positions = list(range(start, min(start + batch_size, len(prompts))))
            batch = np.stack([shapes.render(self.prompts[indices[p]].scene) for p in positions])
            blank = [indices[p] % self.wrong == self.wrong - 1 for p in positions]
            batch[np.array(blank)] = 140
            assert batch.shape[1:] == (height, width, 3)
            yield positions, batch


def shapes_of(monkeypatch, pipe, *flags) -> int:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda folder, variant: pipe)
    return evaluate("shapes", *flags)


def test_shapes_from_flags_to_files(monkeypatch, tmp_path, capsys):
    out, pipe = tmp_path / "a" / "score", TruePipeline("plain", 10, wrong=5)
    flags = f"--per-task 10 --steps 7 --guidance 3 --seed 5 --model {tmp_path} --out {out}".split()
    assert shapes_of(monkeypatch, pipe, *flags) == 0
    how = {"steps": 7, "guidance": 3.0, "solver": "dpm++"}
    assert pipe.calls == [{"size": (64, 64), "count": 50, "seed": 5, **how}]
    printed = capsys.readouterr().out.splitlines()
    rows = {line[:30].strip(): line[30:].split() for line in printed if line[:1].isalpha()}
    for task in ("colour", "binding", "withheld: binding", "mean of the six main tasks"):
        assert rows[task][0] == "0.800"
    assert rows["colour"][-1] == "10"
    record = score_of(out)
    assert record["tasks"]["position"]["score"] == 0.8
    assert (record["level"], record["seed"], len(record["images"])) == ("plain", 5, 50)
    assert record["images"][4]["found"] == [] and record["images"][5]["right"]["colour"]
    sheet = np.asarray(Image.open(out / "sheet.png")).astype(int)
    green = (sheet[..., 1] > 130) & (sheet[..., 0] < 40) & (sheet[..., 2] < 70)
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 32) & (sheet[..., 2] < 32)
    assert green.sum() > 3 * red.sum() > 0  # one frame in five is red


def test_sizes_are_generated_apart_and_come_back_in_order(monkeypatch, capsys):
    pipe = TruePipeline("aesthetic", 6)
    flags = "--level aesthetic --per-task 6 --batch-size 4".split()
    assert shapes_of(monkeypatch, pipe, *flags) == 0
    # the model's own guidance where none is given
    assert {call["guidance"] for call in pipe.calls} == {1.75}
    assert len({call["size"] for call in pipe.calls}) == len(pipe.calls) > 1
    assert "mean of the six main tasks      1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["shape"], "did you mean 'shapes'"),
        (["shapes", "--per-taks", "3"], "did you mean '--per-task'"),
        (["shapes", "--per-task", "0"], "at least 1"),
        (["shapes", "--batch-size", "0"], "batch-size 0"),
        (["shapes", "--level", "hard"], "plain"),
        (["checker", "--level", "hard"], "plain"),
        (["shapes", "--out", "FILE/score"], "FILE"),
    ],
)
def test_mistakes_are_one_line_and_status_2(argv, says, tmp_path, capsys):
    (tmp_path / "FILE").write_text("in the way")
    argv = [a.replace("FILE", str(tmp_path / "FILE")) for a in argv]
    assert says in refused(capsys, *argv)


def test_help_names_what_can_be_evaluated(capsys):
    assert evaluate("--help") == 0
    printed = capsys.readouterr().out
    assert all(what in printed for what in ("shapes", "vae", "checker"))
    assert evaluate() == 2


def test_the_checker_scores_each_level(tmp_path, capsys):
    assert evaluate("checker", "--per-task", 3, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    for level in shapes.COLOURED:
        assert f"level {level}" in printed
        assert score_of(tmp_path / level)["mean"]["score"] == 1.0


class CoarseVAE:
    """Keeps every ``step``-th pixel of a side."""

    def __init__(self, step: int):
        self.step, self.shapes = step, set()

    def encode(self, images):
        assert images.dtype == np.float32 and -1 <= images.min() < images.max() <= 1
        self.shapes.add(images.shape)
        latents = images[:, :: self.step, :: self.step]
        return latents, np.zeros_like(latents)

    def decode(self, latents):
        return latents.repeat(self.step, 1).repeat(self.step, 2)


def test_reconstructions_are_scored_and_a_coarse_autoencoder_costs_score(capsys):
    options = VAEOptions(per_task=10, batch_size=16)
    whole = CoarseVAE(1)
    assert command.evaluate_vae(options, whole).mean.score == 1.0
    assert whole.shapes == {(16, 64, 64, 3)}  # one compiled shape, the last batch filled up
    assert command.evaluate_vae(options, CoarseVAE(16)).mean.score < 0.7
    assert "PSNR" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHIPPED / "model_index.json").exists(), reason="no shipped model in this tree"
)
def test_the_shipped_model_scores_far_above_its_floor(tmp_path):
    result = command.evaluate_shapes(ShapesOptions(per_task=25, out=tmp_path))
    assert result.mean.score > 0.8 > 0.3 > result.mean.floor
    assert result.tasks["colour"].score >= 0.9 and result.tasks["position"].score >= 0.85


def test_shapes_with_a_lora_is_the_merged_model(tmp_path, capsys):
    pipe = Pipeline.from_pretrained(SHIPPED)
    rng, kernel = np.random.default_rng(0), pipe.transformer.params["blocks"]["attn"]["q"]["kernel"]
    depth, inputs, outputs = kernel.shape
    a, b = rng.normal(size=(depth, inputs, 2)), rng.normal(size=(depth, 2, outputs)) / 10
    tree = {"blocks": {"attn": {"q": {"a": np.float32(a), "b": np.float32(b)}}}}
    lora.save(tmp_path / "style", tree)
    flags = f"--per-task 2 --steps 2 --lora {tmp_path}/style:0.5 --out {tmp_path}/out".split()
    assert evaluate("shapes", *flags) == 0
    assert "lora style:0.5" in capsys.readouterr().out
    record = score_of(tmp_path / "out")
    (recorded,) = record["lora"]
    assert recorded["name"] == "style" and recorded["weight"] == 0.5
    pipe = pipe.replace(transformer=pipe.transformer.with_lora(tmp_path / "style", 0.5))
    (path,) = (tmp_path / "out").glob("sheet.png")
    assert path.stat().st_size > 0
    options = ShapesOptions(per_task=2, sampling=SamplingConfig(steps=2))
    score = command.evaluate_shapes(options, pipe)
    tasks = {name: task["score"] for name, task in record["tasks"].items()}
    assert {name: round(task.score, 4) for name, task in score.tasks.items()} == tasks
