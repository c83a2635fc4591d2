"""A thousand prompts, killed again and again: every picture is there, whole, and the one that an
undisturbed run draws."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pixart_jax.data import shapes
from pixart_jax.images import png_settings

COUNT = 1000


@pytest.mark.slow
def test_a_thousand_prompts_killed_often_are_those_of_an_undisturbed_run(root, tmp_path):
    scenes = (shapes.scene_at("plain", "test", index) for index in range(COUNT))
    prompts = [shapes.captions(scene)["short"] for scene in scenes]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))

    def start(out):
        argv = f"--prompts {tmp_path}/prompts.txt --out {tmp_path}/{out} --steps 4 --batch-size 32"
        command = [sys.executable, str(root / "sample.py"), *argv.split(), "--no-grid"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, **pipes)

    def drawn(out) -> int:
        return len(list((tmp_path / out).glob("*.png")))

    chance, stops = random.Random(0), 0
    for goal in sorted(chance.sample(range(30, COUNT - 100), 4)):
        run = start("killed")
        while drawn("killed") < goal and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.wait()
        stops += drawn("killed") < COUNT
    assert stops == 4
    for out in ("killed", "whole"):
        run = start(out)
        _, said = run.communicate(timeout=300)
        assert run.returncode == 0, said
    found = {
        out: {png_settings(path)["index"]: path for path in (tmp_path / out).glob("*.png")}
        for out in ("killed", "whole")
    }
    assert drawn("killed") == drawn("whole") == COUNT
    for index in range(COUNT):
        killed, whole = (found[out][index] for out in ("killed", "whole"))
        assert killed.name == whole.name and png_settings(killed) == png_settings(whole)
        with Image.open(killed) as one, Image.open(whole) as other:
            # A run that goes on draws other images side by side, which may round the last bit of a
            # pixel otherwise.
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
