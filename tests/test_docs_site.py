"""The documentation site builds without a warning, and the paper table links to the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_links_the_paper_to_the_code(root, tmp_path):
    scripts = Path(sys.executable).parent
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path],
        cwd=root,
        env={**os.environ, "PATH": path, "NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    start = (tmp_path / "index.html").read_text("utf-8")
    assert "Quick start" in start and 'href="sampling/"' in start
    assert "training_loss" in (tmp_path / "tutorial/index.html").read_text("utf-8")
    paper = (tmp_path / "paper/index.html").read_text("utf-8")
    links = dict(re.findall(r'href="(\.\./reference/[^"]*#([\w.]+))"', paper))
    assert len(links) > 30
    for link, name in links.items():
        page = (tmp_path / "paper" / link.split("#")[0] / "index.html").read_text("utf-8")
        assert f'id="{name}"' in page
