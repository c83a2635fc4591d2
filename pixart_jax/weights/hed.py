"""HED in files: the names of ControlNetHED.pth, which our folders use too, and its config.json."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping

from pixart_jax.models.configs import HEDConfig
from pixart_jax.weights.files import Tensors
from pixart_jax.weights.table import ParamMapping, layer

CLASS_NAME = "HED"  # config.json's _class_name
ANCHORS = ("block1.projection.weight",)


def table(config: HEDConfig, values: Mapping, keys: Container[str] = ()) -> tuple:
    """(the entries, keys to ignore)."""
    entries = [ParamMapping("norm", "norm")]
    for n, layers in enumerate(config.layers, 1):
        for i in range(layers):
            entries += layer(f"block{n}_conv{i}/conv", f"block{n}.convs.{i}", "conv")
        entries += layer(f"block{n}_projection", f"block{n}.projection", "pointwise")
    return tuple(entries), ()


def config_of_tensors(tensors: Tensors) -> dict:
    """The config.json of a file of these names."""

    def run(name: str) -> list[str]:
        names = (name.format(n) for n in itertools.count(1))
        return list(itertools.takewhile(lambda key: key in tensors, names))

    blocks = range(1, len(run("block{}.projection.weight")) + 1)
    widths = [tensors.shape(f"block{n}.projection.weight")[1] for n in blocks]
    layers = [1 + len(run(f"block{n}.convs.{{}}.weight")) for n in blocks]
    return config_to_json(HEDConfig(tuple(widths), tuple(layers)))


def config_from_json(values: Mapping) -> HEDConfig:
    return HEDConfig(tuple(values["widths"]), tuple(values["layers"]))


def config_to_json(config: HEDConfig) -> dict:
    return {"_class_name": CLASS_NAME, "widths": list(config.widths), "layers": list(config.layers)}
