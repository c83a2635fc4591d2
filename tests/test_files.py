"""Files appear whole or not at all; locks; what the project ships is found."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
import sys

import pytest

from pixart_jax import files
from pixart_jax.errors import Notice, UserError


def test_a_file_is_replaced_whole_with_the_permissions_of_a_new_one(tmp_path):
    file = tmp_path / "a.json"
    files.write_json(file, {"b": 1, "a": "é"}, sort_keys=True, ensure_ascii=False)
    assert file.read_text() == '{\n  "a": "é",\n  "b": 1\n}\n'
    (tmp_path / "new").touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "new").stat().st_mode)
    with pytest.raises(OSError, match="full"), files.atomic_write(file) as half:
        half.write(b"half")
        raise OSError("full")
    assert json.loads(file.read_text()) == {"a": "é", "b": 1}
    assert sorted(os.listdir(tmp_path)) == ["a.json", "new"]


def test_what_killed_processes_left_is_removed_and_what_others_write_stays(tmp_path):
    code = (
        "import os, sys, time; from pixart_jax import files\n"
        "with files.atomic_write(sys.argv[1]) as f:\n"
        "    print(flush=True); time.sleep(600)"
    )
    writing = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / name], stdout=subprocess.PIPE)
        for name in ("killed.json", "alive.json")
    ]
    for process in writing:
        process.stdout.readline()
    writing[0].kill()
    writing[0].wait()
    (tmp_path / ".other.part").touch()  # not ours
    files.write_json(tmp_path / "mine.json", {})
    left = sorted(os.listdir(tmp_path))
    writing[1].kill()
    assert [name.split(".")[1] for name in left] == ["alive", "other", "json"]


def _hold(path, held, leave):
    with files.locked(path):
        held.set()
        leave.wait(300)


def test_a_lock_is_refused_or_waited_for(tmp_path):
    fork = multiprocessing.get_context("spawn")
    held, leave = fork.Event(), fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path / "lock", held, leave))
    other.start()
    assert held.wait(300)
    busy = RuntimeError("in use")
    with pytest.raises(RuntimeError, match="in use"), files.locked(tmp_path / "lock", busy=busy):
        pass
    with files.locked(tmp_path / "lock", on_wait=leave.set):
        pass
    other.join(300)
    assert leave.is_set() and other.exitcode == 0


def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    assert files.find("assets/shapes") == root / "assets" / "shapes"
    (tmp_path / "assets" / "shapes").mkdir(parents=True)
    assert files.find("assets/shapes").resolve() == (tmp_path / "assets" / "shapes").resolve()
    assert str(files.find("absent")) == "absent"


def test_hashes_are_the_same_on_every_machine():
    assert files.hash64("a red circle") == 0x8CBF502735C9B035
    assert files.hash64("\ud800") != files.hash64("")  # a lone surrogate


@pytest.mark.parametrize("folder", ["/proc/no/such", "~nobody-of-that-name/cache", "FILE/below"])
def test_a_cache_that_cannot_be_written_is_named_and_a_temporary_one_takes_its_place(
    tmp_path, monkeypatch, folder
):
    (tmp_path / "FILE").touch()
    monkeypatch.setenv("PIXART_JAX_CACHE", folder.replace("FILE", f"{tmp_path}/FILE"))
    with pytest.warns(Notice, match="cannot be written .*: nothing is cached for the next start"):
        made = files.cache_folder()
    assert made.is_dir() and files.cache_folder() == made
    with pytest.raises(UserError, match="cannot be written .*: name another one"):
        files.cache_folder(keep=True)  # encoded shards must outlast the process


NO_HOME = """
import os, pwd, sys
def unknown(*_): raise KeyError("no such user")
pwd.getpwuid = unknown
from pixart_jax.__main__ import run
sys.exit(run("sample"))
"""


def test_without_a_home_folder_a_program_still_samples(tiny_model, root, tmp_path):
    """A user whom the system does not know, as in containers, and no $HOME."""
    flags = ["--prompt", "a red star", "--steps", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-c", NO_HOME, "--model", str(tiny_model), *flags]
    kept = {k: v for k, v in os.environ.items() if k.startswith("JAX_")}
    how = {"cwd": root, "env": {"PATH": os.environ["PATH"], **kept}}
    done = subprocess.run(command, **how, capture_output=True, text=True)
    assert done.returncode == 0 and list(tmp_path.glob("*.png")), done.stderr
    assert done.stderr.count("no home folder is known") == 1
