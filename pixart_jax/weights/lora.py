"""LoRA files of other tools → adapter trees (models/lora.py), and the reverse.

Read are the folders and files of peft, diffusers, the official scripts, SimpleTuner, OneTrainer and
ComfyUI. A layer's name is looked up among the model's own, under diffusers' and the official names,
dotted or flattened ("attn1_to_q").
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pixart_jax import finite
from pixart_jax.errors import Notice, UserError
from pixart_jax.files import write_json
from pixart_jax.models import lora
from pixart_jax.parallel.gather import gather_to_host
from pixart_jax.weights.files import Tensors, naming, open_tensors, read_json, write_safetensors
from pixart_jax.weights.hub import ADAPTER_CONFIG as CONFIG
from pixart_jax.weights.hub import ADAPTER_FILES, ADAPTER_FOLDER, adapter_file, model_folder
from pixart_jax.weights.table import ParamMapping, flatten, grouped, unflatten, write
from pixart_jax.weights.transformer import LINEARS

PEFT, _, DIFFUSERS, _ = ADAPTER_FILES
_METADATA = "lora_adapter_metadata"  # diffusers' key in a safetensors header: a peft config
# every layer that an adapter can be of: our path, diffusers' name, the official name, and the part
# of the official tensor
_LAYERS = (*LINEARS, ("patch_embedder", "pos_embed.proj", "x_embedder.proj"))

# a tensor's key: its layer, and what it is of the layer
_KEY = re.compile(
    r"(?P<layer>.+)\.(?:"
    r"(?P<a>(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight)|"
    r"(?P<b>(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight)|"
    r"(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.\w+)*)|"
    r"(?P<alpha>alpha))"
)
_SAVED = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_NAMES = {"a": "lora_A (lora_down)", "b": "lora_B (lora_up)"}
_OFFICIAL_PREFIX = "unet.base_model.model."
_DOTTED = re.compile(r"(?:(?:base_model|model|transformer|unet|diffusion_model|module)\.)*")
_FLAT = ("", "lora_", "lora_transformer_", "lora_unet_", "lycoris_")
_TEXT = re.compile(
    r"(?:lora_te\d*_|t5\.|text_encoder(?:_\d)?\.|bundle_emb\.|(?:base_model\.model\.)?encoder\.block\.)"
)
_OTHERS = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "glora_": "GLoRA",
    "vera_": "VeRA",
    "lora_mid": "LoCon with a middle tensor",
    "lora_embedding": "LoRA of an embedding",
    ".diff": "a full difference",
    "bias": "a bias (lora_bias)",
}
# fields of peft's config that change what the tensors mean
_UNREAD = (
    *("modules_to_save", "lora_bias", "layer_replication", "target_parameters", "use_qalora"),
    *("alora_invocation_tokens", "trainable_token_indices", "use_bdlora", "arrow_config"),
    *("kasa_config", "velora_config", "monteclora_config"),
)
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """tree: of models/lora.py, on the host. name: of its file or folder. digest: ten hex digits of
    the values, with the scale in them."""

    tree: Mapping
    name: str
    digest: str


class _Place(NamedTuple):
    """The parameter that a file's layer adapts: its path and, if stacked, its layer. part: (k, n),
    the k-th of n equal parts of the file's outputs (a fused qkv)."""

    path: str
    layer: int | None
    part: tuple[int, int]


def read(
    path: str | os.PathLike,
    shapes: Mapping,
    *,
    alpha: float | None = None,
    revision: str | None = None,
) -> Adapter:
    """The adapter in a file, folder or hub repository, for a transformer.

    shapes: the transformer's parameters, or anything with .shape in their place. alpha: of files
    that do not say theirs. By default such a file is read with alpha = rank, as diffusers does, and
    a Notice says so; another names tensors of a text encoder, which are left out. Raises UserError,
    in one line that names the key or field, for files of other methods (LoKr, LoHa …), options that
    are not supported, missing partners, and layers that the model lacks or has in another size.
    """
    file = find(path, revision)
    tensors = open_tensors(file)
    layers = _grouped_by_layer(tensors)
    official = any(key.startswith(_OFFICIAL_PREFIX) for key in tensors)
    stated = _stated_config(file, tensors, official)
    silent = not stated and not all("alpha" in keys for keys in layers.values())
    if silent and alpha is None:
        usual = "; the official scripts train with 8" if official else ""
        warnings.warn(
            f"{tensors.source} does not say its alpha: read as alpha = rank, as diffusers does"
            f"{usual} (--lora-alpha, or alpha=, names another)",
            Notice,
            stacklevel=2,
        )
    places, flat = _places(shapes), flatten(shapes)
    found: dict[str, dict[int | None, dict[str, np.ndarray]]] = {}
    unknown, wrong = [], []
    for name, keys in layers.items():
        here = _look_up(name, places)
        if not here:
            unknown.append(name)
            continue
        module = _module(tensors, name, keys, stated, alpha)
        for place in here:
            own, kernel = _part(module, place.part), flat[f"{place.path}/kernel"]
            shape = tuple(kernel.shape[0 if place.layer is None else 1 :])
            sizes = (*own["a"].shape[:-1], own["b"].shape[-1])
            if sizes != shape:
                wrong.append(f"{name} is of {sizes}, the model's layer of {shape}")
            elif place.layer in found.setdefault(place.path, {}):
                raise UserError(f"{tensors.source} holds {name} twice: one adapter a file is read")
            else:
                found[place.path][place.layer] = own
    if unknown or wrong:
        _refuse(tensors.source, flat, unknown, wrong)
    tree: dict[str, np.ndarray] = {}
    for at, of_layers in found.items():
        depth = None if None in of_layers else flat[f"{at}/kernel"].shape[0]
        tree |= {f"{at}/{part}": value for part, value in _stacked(of_layers, depth).items()}
    name = file.parent.name if file.name in ADAPTER_FILES else file.name
    return Adapter(unflatten(tree), name, _digest(tree))


def find(path: str | os.PathLike, revision: str | None = None) -> Path:
    """The local weights file of an adapter: the file itself, or the one in a folder or a hub
    repository ("owner/name", or "owner/name/file.safetensors"). Raises UserError where there is
    none, or where there are several."""
    path = model_folder(path, (), revision)
    if not path.exists():
        raise UserError(f"{path}: no such adapter: give a file, a folder or a hub id")
    if path.is_file():
        return path
    files = [file for pattern in ("*", "*/*") for file in path.glob(pattern)]
    return path / adapter_file((file.relative_to(path).as_posix() for file in files), str(path))


def is_adapter(path: Path) -> bool:
    """Whether a file or folder holds an adapter, of whatever method."""
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        if {"config.json", "model_index.json"} & names:
            return False
        named = bool({CONFIG, *ADAPTER_FILES, ADAPTER_FOLDER} & names)
        return named or any(is_adapter(file) for file in path.glob("*.safetensors"))
    if path.suffix != ".safetensors":
        return False
    return any(re.search(r"lora[._]|lokr_|hada_", key) for key in open_tensors(path))


def _grouped_by_layer(tensors: Tensors) -> dict[str, dict[str, str]]:
    """{a layer's name in the file: {a, b, magnitude, alpha: key}}. Raises UserError for what is no
    LoRA or DoRA, and for a, b without the other."""
    layers: dict[str, dict[str, str]] = {}
    text, others = [], []
    for key in tensors:
        if _TEXT.match(key):
            text.append(key)
            continue
        if (match := _KEY.fullmatch(key)) is None:
            others.append(key)
            continue
        layer, part = layers.setdefault(match["layer"], {}), str(match.lastgroup)
        if part in layer:
            raise UserError(f"{tensors.source} holds {layer[part]} and {key}: one is read")
        layer[part] = key
    for key in others:
        for sign, method in _OTHERS.items():
            if sign in key and (sign != "bias" or "lora_" in key):
                raise UserError(f"{tensors.source}: {key}: {method} is not read, LoRA and DoRA are")
    if others and layers:
        raise UserError(
            f"{tensors.source}: {', '.join(grouped(others)[:4])}: modules_to_save is not read"
        )
    if not layers:
        what = "an adapter of a text encoder alone" if text else "no LoRA"
        example = f" ({(text or others)[0]})" if text or others else ""
        raise UserError(
            f"{tensors.source} holds {what}{example}: an adapter of a transformer is read"
        )
    if text:
        warnings.warn(
            f"{tensors.source}: {len(text)} tensors of a text encoder are left out "
            f"({text[0]} …): the transformer's are read",
            Notice,
            stacklevel=3,
        )
    for layer in layers.values():
        if missing := {"a", "b"} - layer.keys():
            raise UserError(
                f"{tensors.source}: {next(iter(layer.values()))} has no partner "
                f"{_NAMES[min(missing)]}: the file is not complete"
            )
    return layers


def _places(shapes: Mapping) -> dict[str, list[_Place]]:
    """{every name of a layer of the model: its places, several of a fused one}."""
    flat, found = flatten(shapes), collections.defaultdict(list)
    for path, theirs, official, *part in _LAYERS:
        if (kernel := flat.get(f"{path}/kernel")) is None:
            continue
        k, parts = part[0] if part else (0, 1)
        names = {theirs: (0, 1), official: (k, parts)}
        if parts > 1:
            names[f"{official}.{k}"] = (0, 1)
        for i in range(kernel.shape[0]) if "{i}" in theirs else (None,):
            for name, cut in names.items():
                name = name.format(i=i)
                for spelled in {name, name.replace(".", "_")}:
                    found[spelled].append(_Place(path, i, cut))
    return found


def _dotted(name: str) -> str:
    return name[_DOTTED.match(name).end() :]  # type: ignore[union-attr]  # it matches nothing too


def _look_up(name: str, places: Mapping[str, list[_Place]]) -> list[_Place]:
    name = _dotted(name)
    tried = (name.removeprefix(prefix) for prefix in _FLAT if name.startswith(prefix))
    return next((places[name] for name in tried if name in places), [])


def _refuse(source: str, flat: Mapping, unknown: list[str], wrong: list[str]) -> None:
    problems = []
    if unknown:
        names = grouped(_dotted(name) for name in unknown)
        listed = f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
        depth = flat["blocks/attn/q/kernel"].shape[0]
        problems.append(f"{len(unknown)} layers that it lacks (it has {depth} blocks): {listed}")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        problems.append(f"of another size: {wrong[0]}{more}")
    raise UserError(f"{source} is an adapter of another model: {'; '.join(problems)}")


def _stated_config(file: Path, tensors: Tensors, official: bool) -> dict[str, Any]:
    """The peft config of the adapter: in the file's header, else beside it, that of the official
    scripts one folder up; empty where there is none. Raises UserError for an unsupported option."""
    values, where = dict[str, Any](), file
    if header := getattr(tensors, "metadata", {}).get(_METADATA):
        with naming(file):
            values = json.loads(header)
            for prefix in ("transformer.", "unet."):
                own = {k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)}
                values = own or values
            values = values if {"r", "lora_alpha"} & values.keys() else {}  # of the text encoder
    else:
        official |= file.parent.name == ADAPTER_FOLDER
        folders = (file.parent, file.parent.parent)[: 2 if official else 1]
        if found := [folder / CONFIG for folder in folders if (folder / CONFIG).is_file()]:
            where, values = found[0], read_json(found[0])
    if not values:
        return {}
    kind, bias = values.get("peft_type", "LORA"), values.get("bias", "none")
    init = values.get("init_lora_weights")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type {kind!r} is not read: LORA is")
    if bias != "none":
        raise UserError(f"{where}: bias {bias!r} is not read: 'none' is")
    for field in _UNREAD:
        if values.get(field):
            raise UserError(f"{where}: {field} is not supported")
    if isinstance(init, str) and init.lower().startswith(_CHANGE_BASE):
        raise UserError(
            f"{where}: init_lora_weights {init!r} changed the base's weights: convert the adapter "
            "to a plain LoRA with peft (path_initial_model_for_weight_conversion)"
        )
    return values


def _pattern(values: Mapping, field: str, name: str) -> float | None:
    """peft's rank_pattern or alpha_pattern: of the first that the name's end matches."""
    for pattern, value in (values.get(field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return None


def _scale(
    tensors: Tensors,
    name: str,
    keys: Mapping[str, str],
    rank: int,
    stated: Mapping,
    alpha: float | None,
) -> float:
    """alpha / rank, or alpha / √rank, of a layer."""
    dotted = _dotted(name)
    if "alpha" in keys:
        value = float(np.asarray(tensors[keys["alpha"]], np.float32).reshape(-1)[0])
    elif "lora_alpha" in stated or "r" in stated:
        said = _pattern(stated, "rank_pattern", dotted) or stated.get("r", rank)
        if said != rank:
            raise UserError(
                f"{tensors.source}: {keys['a']} is of rank {rank}, its config says {said}"
            )
        of_layer = _pattern(stated, "alpha_pattern", dotted)
        value = stated.get("lora_alpha", 8) if of_layer is None else of_layer
    else:
        value = rank if alpha is None else alpha
    return value / (rank**0.5 if stated.get("use_rslora") else rank)


def _module(
    tensors: Tensors, name: str, keys: Mapping[str, str], stated: Mapping, alpha: float | None
) -> dict[str, np.ndarray]:
    """{a [.., r], b [r, out], magnitude [out]} in fp32, with the scale in b."""
    source = tensors.source
    arrays = {
        part: finite.check_tensor(f"{source}: {key}", np.asarray(tensors[key], np.float32))
        for part, key in keys.items()
        if part != "alpha"
    }
    a, b, magnitude = arrays["a"], arrays["b"], arrays.get("magnitude")
    rank, outputs, axes = a.shape[0], len(b), {a.ndim, b.ndim}
    if axes - {2, 4} or not rank == b.shape[1] > 0 or math.prod(b.shape[2:]) > 1:
        raise UserError(
            f"{source}: {keys['a']} {a.shape} and {keys['b']} {b.shape} are not of one rank"
        )
    with naming(Path(source)):
        scale = _scale(tensors, name, keys, rank, stated, alpha)
    a = a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T
    module = {"a": a, "b": np.float32(scale) * b.reshape(b.shape[:2]).T}
    if magnitude is None:
        if stated.get("use_dora"):
            missing = "has no partner lora_magnitude_vector (use_dora)"
            raise UserError(f"{source}: {keys['a']} {missing}")
        return module
    key = keys["magnitude"]
    if stated.get("use_dora") is False:
        raise UserError(f"{source}: {key} is DoRA's, its config has no use_dora")
    per_input = key.endswith("dora_scale") and magnitude.shape[0] != outputs
    if magnitude.size != outputs or per_input:
        raise UserError(f"{source}: {key} {magnitude.shape} is not of the {outputs} outputs")
    return {**module, "magnitude": magnitude.reshape(-1)}


def _part(module: Mapping[str, np.ndarray], part: tuple[int, int]) -> dict[str, np.ndarray]:
    """The adapter of one part of a fused layer's outputs."""
    k, parts = part
    size = module["b"].shape[-1] // parts
    cut = {n: x if n == "a" else x[..., k * size : (k + 1) * size] for n, x in module.items()}
    return cut if parts > 1 else dict(module)


def _stacked(layers: Mapping[int | None, Mapping], depth: int | None) -> dict[str, np.ndarray]:
    """One adapter per layer → arrays with a leading axis ``depth``, or as they are."""
    if depth is None:
        return {part: np.ascontiguousarray(value) for part, value in layers[None].items()}
    one = next(iter(layers.values()))
    rank = max(module["a"].shape[-1] for module in layers.values())
    out = {
        "a": np.zeros((depth, *one["a"].shape[:-1], rank), np.float32),
        "b": np.zeros((depth, rank, one["b"].shape[-1]), np.float32),
    }
    if any("magnitude" in module for module in layers.values()):
        out["magnitude"] = np.zeros((depth, one["b"].shape[-1]), np.float32)
    for i, module in layers.items():
        own = module["a"].shape[-1]
        out["a"][i, ..., :own], out["b"][i, :own] = module["a"], module["b"]
        if "magnitude" in module:
            out["magnitude"][i] = module["magnitude"]
    return out


def _digest(flat: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for path, value in sorted(flat.items()):
        digest.update(f"{path} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()[:10]


def save(
    folder: str | os.PathLike,
    tree: Mapping,
    rank: int | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    dtype: Any = np.float32,
) -> None:
    """Write an adapter: adapter_config.json and adapter_model.safetensors, a folder that peft
    opens, and pytorch_lora_weights.safetensors, which diffusers' loaders open.

    tree: of models/lora.py, with a and b as they were trained; the product is scaled by alpha /
    rank (rslora: alpha / √rank). rank: by default that of most layers; alpha: by default the rank.
    dtype: of the files. Layers that are zero are left out. Where several processes share the tree
    all must call it; the first writes. Raises UserError for values that are not finite.
    """
    folder = Path(folder)
    tree = jax.tree.map(lambda leaf: np.asarray(gather_to_host(leaf), np.float32), dict(tree))
    if jax.process_index() > 0:
        return
    modules = {"/".join(parts): dict(module) for parts, module in lora.modules(tree)}
    ranks = {path: module["a"].shape[-1] for path, module in modules.items()}
    usual = collections.Counter(ranks.values()).most_common(1)[0][0] if rank is None else rank
    alpha = usual if alpha is None else alpha
    names = {path: theirs for path, theirs, *_ in _LAYERS}
    flat: dict[str, np.ndarray] = {}
    table: list[ParamMapping] = []
    targets: set[str] = set()
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for path, module in modules.items():
        theirs, layers, suffixes = names[path], None, [names[path]]
        if "{i}" in theirs:
            there = [np.any(array != 0, axis=(*range(1, array.ndim),)) for array in module.values()]
            held = np.any(there, 0)
            layers = tuple(np.flatnonzero(held).tolist())
            module = {part: array[held] for part, array in module.items()}
            short = theirs.partition("{i}.")[2]
            suffixes = [short] if held.all() else [theirs.format(i=i) for i in layers]
        targets |= {*suffixes}
        if ranks[path] != usual:
            rank_pattern |= dict.fromkeys(suffixes, ranks[path])
            scaled = alpha * (ranks[path] / usual) ** (0.5 if rslora else 1.0)
            alpha_pattern |= dict.fromkeys(suffixes, _integer(scaled))
        layouts = {"a": "linear", "b": "linear", "magnitude": "same"}
        if path == "patch_embedder":
            layouts |= {"a": "conv", "b": "pointwise"}
            if "magnitude" in module:
                module["magnitude"] = module["magnitude"].reshape(1, -1, 1, 1)
        for part, array in module.items():
            flat[f"{path}/{part}"] = array.astype(dtype)
            key, layout = f"{theirs}.{_SAVED[part]}", layouts[part]
            table.append(ParamMapping(f"{path}/{part}", key, layout, layers=layers))
    values = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": usual,
        "lora_alpha": _integer(alpha),
        "target_modules": sorted(targets),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_dora": any(path.endswith("/magnitude") for path in flat),
        "use_rslora": rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    tensors = write(table, unflatten(flat))
    header = {f"transformer.{name}": value for name, value in values.items()}
    metadata = {_METADATA: json.dumps(header, indent=2, sort_keys=True)}
    for file, prefix, extra in (
        (PEFT, "base_model.model.", {}),
        (DIFFUSERS, "transformer.", metadata),
    ):
        named = {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
        write_safetensors(folder / file, named, extra)
    try:
        write_json(folder / CONFIG, values)
    except OSError as error:
        raise UserError(f"cannot write {folder / CONFIG}: {error.strerror or error}") from None


def _integer(value: float) -> float | int:
    return int(value) if value == int(value) else value
