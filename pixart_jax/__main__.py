"""``python -m pixart_jax COMMAND``: each command's module is imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys

from pixart_jax import cli
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import cache_folder

# name: (module, what it does); each module has main(argv) -> exit status, and its own --help.
COMMANDS = {
    "caption": ("pixart_jax.captioning.caption_command", "images → captions by a VLM, on Ray Data"),
    "convert": ("pixart_jax.commands.convert", "official .pth, DiT .pt or diffusers → a component"),
    "edges": ("pixart_jax.commands.edges", "images → HED or Canny edge maps, for a ControlNet"),
    "encode": ("pixart_jax.encoding.command", "images, captions or prompts → latents, text states"),
    "evaluate": ("pixart_jax.evaluation.command", "score a model"),
    "inspect": ("pixart_jax.captioning.inspect", "a data set's report, before training"),
    "launch": ("pixart_jax.commands.launch", "run several processes on this machine"),
    "mcp": ("pixart_jax.serving.mcp_server", "tools for agents over stdio (MCP)"),
    "nouns": ("pixart_jax.captioning.nouns_command", "noun statistics of captions, as the paper's"),
    "plan": ("pixart_jax.planning.command", "memory, time and cost of a run on other hardware"),
    "sample": ("pixart_jax.commands.sample", "prompts → PNGs, as sample.py"),
    "serve": ("pixart_jax.serving.command", "a page, an OpenAI-compatible API and MCP over HTTP"),
    "train": ("pixart_jax.commands.train", "train the stages of a recipe, as train.py"),
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        whats = {name: what for name, (_, what) in COMMANDS.items()}
        print(cli.usage("python -m pixart_jax", whats))
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
    if name in ("edges", "encode", "evaluate", "mcp", "sample", "serve"):
        # train keeps its programs in its workdir
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "compiled"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    path = COMMANDS[name][0]
    if argv[:3] == ["evaluate", "study", "serve"]:  # serving imports evaluation, not the reverse
        path, rest = "pixart_jax.serving.study", rest[2:]
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if "serving" not in path or str(error.name).startswith("pixart_jax"):
            raise
        raise UserError(f'{error.name} is missing: pip install "pixart-jax[serve]"') from None
    return module.main(rest) or 0


def run(command: str | None = None) -> int:
    """The ``pixart-jax`` program, or one command of it: returns the process's exit status."""
    argv = [*([command] if command else []), *sys.argv[1:]]
    with cli.signals():
        if argv[:1] == ["encode"]:  # its processes work together
            from pixart_jax.parallel.processes import run_with_peers

            return run_with_peers(lambda: cli.run(main, argv))
        return cli.run(main, argv)


if __name__ == "__main__":
    sys.exit(run())
