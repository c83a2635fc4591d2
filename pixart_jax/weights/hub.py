"""Models on a hub: an id such as "PixArt-alpha/PixArt-XL-2-1024-MS" → a local folder.

huggingface_hub does the transfer, the cache (HF_HOME), the authentication (HF_TOKEN), mirrors
(HF_ENDPOINT) and offline use (HF_HUB_OFFLINE). This module chooses the files: of each part the
configuration and one set of weights, safetensors before .bin, and of the wanted variant alone.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pixart_jax.errors import UserError
from pixart_jax.files import find, stage
from pixart_jax.remote_path import RemotePath, located
from pixart_jax.weights.files import WeightSets, choose_set, weight_sets

PARTS = ("transformer", "text_encoder", "vae")
_ID = re.compile(
    r"([\w][\w.-]*/[\w][\w.-]*)"
    r"(?:/(transformer|text_encoder|vae|tokenizer|[^/]+\.(?:safetensors|pth|pt)))?"
)
# of an adapter: peft's files and diffusers', and the folder of the official training scripts
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (
    *("adapter_model.safetensors", "adapter_model.bin"),
    *("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
)
ADAPTER_FOLDER = "transformer_lora"
_SMALL = (".json", ".model", ".txt", ".jinja", "null_caption.safetensors")


def model_folder(
    model: str | os.PathLike,
    parts: Sequence[str] = PARTS,
    revision: str | None = None,
    variant: str | None = None,
) -> Path:
    """A model's local folder: ``model`` itself where it exists, else the shipped model of that name
    (assets/…), else the hub's model of that id; of a bucket's address the staged copy.

    An id may be followed by a part, as "PixArt-alpha/PixArt-XL-2-1024-MS/vae", or a file. Of an
    adapter's repository (weights/lora.py) its weights are taken. Downloads only
    missing files, of the named parts, with progress bars; without network, files that an earlier
    call downloaded are used. variant: such as "fp16"; by default the weights without one, or the
    only ones there are. Raises UserError for an unknown id or revision, a gated model, and where
    there is neither network nor a cached copy.
    """
    address = located(model)
    if isinstance(address, RemotePath):
        return _staged(address, tuple(parts), variant)
    path = find(model)
    match = _ID.fullmatch(str(model))
    if path.exists() or match is None:
        return path
    from huggingface_hub import HfApi, snapshot_download

    name, part = match.groups()
    parts = (part,) if part else parts
    with _as_user_errors(name, revision):
        try:
            info = HfApi().model_info(name, revision=revision)
            names = [file.rfilename for file in info.siblings or ()]
            files = wanted(names, parts, variant)
        except _unreachable():
            folder = snapshot_download(
                name, revision=revision, local_files_only=True, allow_patterns=["*config*.json"]
            )
            return Path(folder, part or "")
        patterns = [glob.escape(file) for file in files]
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns)
    _remove_partial_files(Path(folder).parents[1])
    return Path(folder, part or "")


@functools.cache
def _staged(address: RemotePath, parts: Sequence[str], variant: str | None) -> Path:
    """Once a process: all of a run opens one version."""
    if not address.names:  # a file
        return stage(str(address))
    return stage(str(address), {*wanted(address.names, parts, variant)}.__contains__)


def wanted(files: Iterable[str], parts: Sequence[str], variant: str | None = None) -> list[str]:
    """The files to download: all configurations and tokenizers, and one set of weights for each of
    ``parts`` and for the top level (a repository of one component); of an adapter its one file,
    or the one that ``parts`` names.

    Raises UserError where the variant does not exist, or where several do and none is named.
    """
    files_of: dict[str, list[str]] = {}
    files = list(files)
    named = [part for part in parts if part.endswith((".safetensors", ".pth", ".pt"))]
    if named or not weight_sets(file.rpartition("/")[2] for file in files):
        adapter = named or [adapter_file(files, "the repository")]
        configs = [file for file in files if file.endswith(ADAPTER_CONFIG)]
        return [file for file in [*configs, *adapter] if file in files]
    for file in files:
        folder, _, name = file.rpartition("/")
        files_of.setdefault(folder, []).append(name)
    chosen: list[tuple[str, str]] = []
    weights: dict[str, WeightSets] = {}
    for folder, names in files_of.items():
        if folder in parts or not folder:
            weights[folder] = weight_sets(names)
        of_weights = {name for found in weight_sets(names).values() for name in found}
        small = (n for n in names if n.endswith(_SMALL) and n not in of_weights)
        chosen += [(folder, name) for name in small]
    mixed = any(variant == of for sets in weights.values() for _, of in sets)
    for folder, sets in weights.items():
        if sets:  # a part that lacks the variant that others have: its default, as in diffusers
            own = variant if any(variant == of for _, of in sets) or not mixed else None
            found = sets[choose_set(sets, own, folder or "the model")]
            chosen += [(folder, name) for name in found]
    return [f"{folder}/{name}" if folder else name for folder, name in chosen]


def adapter_file(names: Iterable[str], where: str) -> str:
    """The weights among the files of an adapter's folder. Raises UserError unless there is one."""
    names = set(names)
    for folder in ("", f"{ADAPTER_FOLDER}/"):
        for name in ADAPTER_FILES:
            if f"{folder}{name}" in names:
                return f"{folder}{name}"
    others = sorted(name for name in names if re.fullmatch(r"[^/]+\.safetensors", name))
    if len(others) == 1:
        return others[0]
    if others:
        raise UserError(f"{where} holds several files ({', '.join(others)}): name one of them")
    would = f"{ADAPTER_FILES[0]} with {ADAPTER_CONFIG}, or {ADAPTER_FILES[2]} would do"
    raise UserError(f"{where} holds no adapter: {would}")


def _unreachable() -> tuple[type[Exception], ...]:
    """Exceptions that mean: no network, or not allowed to use it."""
    from huggingface_hub import errors

    found: list[type[Exception]] = [errors.OfflineModeIsEnabled]
    for library in ("httpx2", "httpx"):  # of huggingface_hub 2 and 1
        with contextlib.suppress(ImportError):
            module = importlib.import_module(library)
            found += [module.ConnectError, module.TimeoutException]
    return tuple(found)


@contextlib.contextmanager
def _as_user_errors(name: str, revision: str | None):
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its terms on the hub, then set HF_TOKEN to your access token"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such folder, and no model of that id on the hub (private? set HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r}") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{name}: no such folder, and as a model id it is not in the cache and the hub cannot "
            "be reached (no network, or HF_HUB_OFFLINE is set)"
        ) from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"{name}: the hub answered {' '.join(str(error).split())[:200]}") from None
    except _unreachable() as error:
        raise UserError(f"{name}: the download was cut off ({error}); run it again") from None


def _remove_partial_files(repository: Path) -> None:
    """Remove partial downloads that no process is writing any more (each attempt makes one)."""
    from filelock import FileLock, Timeout

    for partial in repository.glob("blobs/*.incomplete"):
        blob = partial.name.split(".")[0]
        lock = repository.parent / ".locks" / repository.name / f"{blob}.lock"
        with contextlib.suppress(Timeout, FileNotFoundError), FileLock(lock, timeout=0):
            partial.unlink()
