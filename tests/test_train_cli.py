"""train.py and a person's mistakes: each one line, exit status 2, nothing touched."""

from __future__ import annotations

import errno
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from pixart_jax import cli
from pixart_jax.commands import train
from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.parallel.mesh import AXES
from pixart_jax.training import recipes
from pixart_jax.training.checks import check_run
from pixart_jax.training.workdir import Workdir

RECIPE = """
from pixart_jax.config import Config, DataConfig, OptimizerConfig, StageConfig
from pixart_jax.models.transformer import TransformerConfig


def get_config():
    stage = StageConfig("words", steps=10, batch_size=8, data=DataConfig(source="no/such/shards", buckets=((64, 64),)))
    return Config(name="small", model=TransformerConfig(depth=1, width=24, heads=2), vae="no/such/vae", stages=(stage,))
"""  # noqa: E501


@pytest.fixture
def recipe(tmp_path) -> str:
    (tmp_path / "small.py").write_text(RECIPE)
    return str(tmp_path / "small.py")


def refused(capsys, *argv) -> str:
    """The one line with which the command line is refused."""
    assert cli.run(train.main, [str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err and "│" not in err
    return err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["configs/xl2_256_sma.py", "--workdir", "{run}"], "xl2_256_sam"),
        (["xl2_curiculum", "--workdir", "{run}"], "did you mean"),
        ([], "xl2_curriculum"),
        (["{recipe}"], "--workdir is missing"),
        (["{recipe}", "--workdir"], "--workdir needs a folder"),
        (["{recipe}", "--workdir", "http://host/run"], "begin with gs:// or s3://"),
        (["{recipe}", "--workdir", "gs:/bucket/run"], "write gs://BUCKET/NAME"),
        (["{recipe}", "--workdir", "{run}", "--scratch", "x"], "only a workdir in gs:// or s3://"),
        (["{bad}", "--workdir", "{run}"], "is not a recipe"),
        (["{other}", "--workdir", "{run}"], "returned int"),
    ],
)
def test_recipe_and_workdir_are_checked_first(capsys, recipe, tmp_path, argv, said):
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "other.py").write_text("def get_config():\n    return 3\n")
    names = {name: tmp_path / f"{name}.py" for name in ("bad", "other")}
    names |= {"recipe": recipe, "run": tmp_path / "run"}
    assert said in refused(capsys, *(part.format(**names) for part in argv))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (["--stages.0.stpes", "5"], "--stages.0.steps"),
        (["--stages.0.optimizer.learning-rat", "1"], "--stages.0.optimizer.learning-rate"),
        (["--stages.7.steps", "5"], "--stages.0.steps"),
        (["--mesh.fsdpp", "2"], "--mesh.fsdp"),
        (["--stages.0.steps", "-5"], "must not be negative"),
        (["--stages.0.steps", "many"], "many"),
        (["--stages.0.optimizer.schedule", "cosin"], "did you mean 'cosine'"),
        (["--stages.0.data.buckets", "60", "64"], "60×64 is not divisible by 16 (8 × patch size)"),
        (["--model.width", "25"], "width"),
        (["--mesh.fsdp", "7"], "mesh data -1 × fsdp 7"),
        (["--mesh.fsdp", "0"], "at least 1"),
        (["stray"], "stray"),
        ([], "no/such/"),
        (["--stages.0.start", "no/such/model"], "start 'no/such/model': no such folder"),
        (["--mesh"], "as --mesh fsdp=8,tensor=2"),
        (["--mesh", "fdsp=8"], "did you mean 'fsdp'"),
        (["--mesh", "fsdp=8"], "does not fit 1 device"),
        (["--mesh", "context_attention=rnig"], "did you mean 'ring'"),
        (["--remat", "offload"], "a CPU has no other memory"),
    ],
)
def test_a_mistake_is_one_line(capsys, recipe, tmp_path, override, said):
    assert said in refused(capsys, recipe, "--workdir", tmp_path / "run", *override)
    assert not (tmp_path / "run" / "config.json").exists(), (
        "the mended command must not be refused for another config"
    )


def test_a_workdir_with_another_config(capsys, recipe, tmp_path):
    with Workdir(tmp_path / "run", runpy.run_path(recipe)["get_config"]()) as folder:
        folder.save_config()
    line = refused(capsys, recipe, "--workdir", tmp_path / "run", "--stages.0.batch-size", "4")
    assert "holds another config: stages.0.batch_size was 8, now 4" in line


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE: ... No space left on device"),
    ],
)
def test_a_full_disk_is_one_line(capsys, recipe, tmp_path, monkeypatch, error):
    from pixart_jax.training import workdir

    def full(*_, **__):
        raise error

    monkeypatch.setattr(workdir, "write_json", full)
    there = "--stages.0.data.source tfds:shapes/plain --stages.0.start fresh --vae assets/shapes"
    argv = [recipe, "--workdir", tmp_path / "run", *there.split()]
    assert "the disk is full" in refused(capsys, *argv)


def test_help_prints_and_exits_with_0(capsys, recipe):
    assert cli.run(train.main, ["--help"]) == 0
    assert "recipes: " in capsys.readouterr().out
    assert cli.run(train.main, [recipe, "--help"]) == 0
    assert "--stages.0.optimizer.learning-rate" in capsys.readouterr().out


def test_every_recipe_can_be_built_also_where_the_folder_has_another_name(
    root, tmp_path, monkeypatch
):
    """As pixart_jax/recipes in a wheel, where no folder ``configs`` is on the path."""
    shutil.copytree(root / "configs", tmp_path / "recipes")
    monkeypatch.setattr(recipes, "RECIPES", tmp_path / "recipes")
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    assert {"xl2_curriculum", "shapes_demo"} <= set(recipes.known())
    for name in recipes.known():
        assert recipes.find(name).parent == tmp_path / "recipes"
        assert recipes.load(recipes.find(name)).stages
    found = sys.modules["configs._xl2"].__file__
    assert found is not None and Path(found).parent == tmp_path / "recipes"
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)


def test_the_program_itself_exits_with_2_and_one_line(root: Path, tmp_path):
    command = [sys.executable, "train.py", "shapes_dmeo", "--workdir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: no recipe 'shapes_dmeo'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag",
    [
        ["--mesh", "fsdp=8,tensor=2"],
        ["--mesh=fsdp=8,tensor=2"],
        ["--mesh.fsdp", "8", "--mesh.tensor", "2"],
    ],
)
def test_a_mesh_is_one_flag_or_one_for_each_axis(recipe, flag):
    config = recipes.parse_config(Path(recipe), [*flag, "--seed", "3"])
    assert config.mesh == MeshConfig(data=-1, fsdp=8, tensor=2) and config.seed == 3


def test_heads_and_tokens_that_the_mesh_does_not_divide_are_named_before_anything_is_opened(recipe):
    config = recipes.parse_config(Path(recipe), [])
    for sizes, says in (
        ({"tensor": 4}, "stage words: mesh tensor 4 does not divide 2 heads; tensor 1 or 2"),
        ({"context": 3}, r"3 does not divide bucket 64×64 \(16 tokens\); context 1, 2 or 4 would"),
    ):
        with pytest.raises(UserError, match=says):
            check_run(config, mesh_of(**sizes))


def mesh_of(**sizes):
    """One device over and over: enough to say what divides."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.sharding.Mesh(np.array(jax.devices()[:1] * math.prod(shape)).reshape(shape), AXES)


def test_lora_flags_name_every_text_to_image_stage(root):
    recipe = root / "configs" / "xl2_512_aesthetic.py"
    argv = "--stages.0.start m --lora.targets to_q to_k --seed 3 --lora.rank 8".split()
    config = recipes.parse_config(recipe, argv)
    assert config.seed == 3 and config.stages[0].start == "m"
    assert (config.stages[0].lora.rank, config.stages[0].lora.targets) == (8, ("to_q", "to_k"))
    with pytest.raises(UserError, match="--lora.rank: shapes_vae has no text_to_image stage"):
        recipes.parse_config(root / "configs" / "shapes_vae.py", ["--lora.rank", "8"])


def test_a_base_gives_the_sizes_the_prediction_and_the_frozen_parts(root):
    argv = "--base assets/shapes --dreambooth.class-prompt shape --seed 3".split()
    config = recipes.parse_config(root / "configs" / "dreambooth.py", argv)
    (stage,) = config.stages
    assert (stage.start, config.vae, config.text_encoder) == ("assets/shapes",) * 3
    assert stage.objective.prediction == "v" and stage.dreambooth.class_prompt == "shape"
    assert stage.data.buckets == ((64, 64),) and config.seed == 3
    lora = recipes.parse_config(root / "configs" / "xl2_512_lora.py", argv[:2])
    assert lora.model == config.model and lora.stages[0].objective.prediction == "v"
    with pytest.raises(UserError, match="--base no/model/here: no model"):
        recipes.parse_config(root / "configs" / "dreambooth.py", ["--base", "no/model/here"])
