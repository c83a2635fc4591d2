"""Rows of the ControlNet: a folder of diffusers' research layout, beside outputs that diffusers'
research code once gave.

The outputs lie frozen in controlnet.npz. They are made from a checkout of huggingface/diffusers
(2843b3d37a is the last commit that changed the code):

    python benchmarks/parity_rows/controlnet.py path/to/diffusers

Weights and inputs come from NumPy's RandomState, whose stream never changes; the file keeps the
names and shapes of the adapter's tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.parity_rows.row import Outputs, Row
from benchmarks.parity_rows.transformer import TINY, TINY_MS, Case

CODE = Path("examples", "research_projects", "pixart", "controlnet_pixart_alpha.py")
FROZEN = Path(__file__).with_name("controlnet.npz")
CASES = {
    "plain": dataclasses.replace(TINY, fields={**TINY.fields, "num_layers": 5}),
    "multi-scale": dataclasses.replace(TINY_MS, fields={**TINY_MS.fields, "num_layers": 4}),
}
UNITS = 3


def values(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """Random tensors by name, in the order of their names."""
    random = np.random.RandomState(seed)
    found = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        wide = 0.3 if len(shape) == 1 else 0.9 * float(np.prod(shape[1:])) ** -0.5
        found[name] = (wide * random.standard_normal(shape)).astype(np.float32)
    return found


def condition(case: Case) -> np.ndarray:
    """[b, h, w, 4]."""
    shape = len(case.lengths), case.height, case.width, 4
    return np.random.RandomState(9).standard_normal(shape).astype(np.float32)


def base(case: Case):
    """diffusers' transformer with these weights."""
    import torch
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(**case.fields).eval()
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    state = {name: torch.from_numpy(value) for name, value in values(shapes, 6).items()}
    model.load_state_dict(state, strict=False)  # the position table is a buffer
    return model


def theirs(name: str, folder: Path) -> Outputs:
    """The base's folder and the adapter's; the frozen output."""
    import safetensors.numpy

    case, frozen = CASES[name], np.load(FROZEN)
    base(case).save_pretrained(folder / "transformer")
    shapes = json.loads(str(frozen[f"{name} shapes"]))
    heads, head = (case.fields[key] for key in ("num_attention_heads", "attention_head_dim"))
    config = {"_class_name": "PixArtControlNetAdapterModel", "num_layers": UNITS}
    config |= {"num_attention_heads": heads, "attention_head_dim": head}
    target = folder / "controlnet"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    file = target / "diffusion_pytorch_model.safetensors"
    safetensors.numpy.save_file(values(shapes, 7), file, metadata={"format": "pt"})
    return {"output": frozen[f"{name} output"]}


def ours(name: str, folder: Path) -> Outputs:
    from pixart_jax import load_component

    case, part = CASES[name], load_component(folder / "transformer")
    control = {"controlnet": load_component(folder / "controlnet"), "control": condition(case)}
    return {"output": np.asarray(part.apply(*case.inputs().values(), **control))}


def research_code(checkout: Path):
    """The module in a checkout of diffusers."""
    spec = importlib.util.spec_from_file_location("research", checkout / CODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def freeze(checkout: Path) -> None:
    """Run diffusers' research code and write FROZEN."""
    import torch

    from benchmarks.parity_rows.transformer import run

    research, found = research_code(checkout), {}
    for name, case in CASES.items():
        names = ("num_attention_heads", "attention_head_dim", "cross_attention_dim")
        sizes = {key: case.fields[key] for key in names}
        adapter = research.PixArtControlNetAdapterModel(num_layers=0)
        blocks = (research.PixArtControlNetAdapterBlock(i, **sizes) for i in range(UNITS))
        adapter.controlnet_blocks.extend(blocks)
        shapes = {key: list(p.shape) for key, p in adapter.named_parameters()}
        state = {key: torch.from_numpy(value) for key, value in values(shapes, 7).items()}
        adapter.load_state_dict(state)
        both = research.PixArtControlNetTransformerModel(base(case), adapter, blocks_num=UNITS)
        given = torch.from_numpy(condition(case)).permute(0, 3, 1, 2).contiguous()
        output = run(functools.partial(both, controlnet_cond=given), case)["output"]
        found |= {f"{name} shapes": json.dumps(shapes), f"{name} output": output}
    np.savez_compressed(FROZEN, **found)


ROWS = tuple(
    Row(
        name=f"controlnet {name}",
        model="ControlNet-Transformer",
        format="diffusers' research folder, its code's outputs frozen",
        size=f"tiny, {8 * case.height} × {8 * case.width} px",
        theirs=functools.partial(theirs, name),
        ours=functools.partial(ours, name),
    )
    for name, case in CASES.items()
)

if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / CODE).is_file():
        sys.exit(f"error: give a checkout of huggingface/diffusers, with {CODE} in it")
    freeze(Path(sys.argv[1]))
