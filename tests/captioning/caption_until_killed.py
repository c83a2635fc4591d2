"""Caption a folder with a slow captioner on Ray, in a process that a test kills: python -m
tests.captioning.caption_until_killed FOLDER FILE."""

import sys
from pathlib import Path

import pytest

from tests.captioning import written_captions

if __name__ == "__main__":
    written_captions.use(pytest.MonkeyPatch(), written_captions.Slow, ray=True)
    written_captions.caption(f"folder:{sys.argv[1]}", Path(sys.argv[2]))
