"""docs/parity.md, written from the rows and what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.parity_rows.row import Row

_HEAD = """# Parity with PyTorch

Each row draws random weights, none of them zero, in PyTorch (or transformers, or diffusers), writes them in the format that the row names,
and runs the reference on random inputs. pixart_jax then opens the same file and runs on the same inputs.

    python benchmarks/parity.py            # all rows but the slow ones; about {minutes} minutes on two cores, 6 GB of disk
    python benchmarks/parity.py --quick    # the tiny rows
    python benchmarks/parity.py --slow     # T5-XXL whole as well: 10 GB of disk, and more memory than that
    python benchmarks/parity.py --check    # exit status 1 where a row is over its bound

This page is written by that command from docs/parity.json, which it keeps; rows that a call leaves out keep their figures. It needs what
`make test` installs, and no network.

- **max** is the largest difference over the largest value of the reference, max |ours − theirs| / max |theirs|; **L2** the norm of the
  difference over the norm of the reference. Of several outputs (mean, deviation and images of an autoencoder) the worst counts. The figure
  that the bound is for is bold.
- **fp32** rows compute in fp32 on both sides. **bf16** rows compute in bf16 here, beside the fp32 reference.
- **seconds** are of one warm call, ours / PyTorch's, on the CPU; – where a side's would mislead. Of a tiny row neither seconds nor memory
  are shown: they are those of starting Python.
- **GiB** is the largest resident memory of each side's process, ours / PyTorch's, reading and writing the weights included, and of a
  converted file the conversion too.

Versions: {versions}.
"""  # noqa: E501

_NOTES = """
## What the references are

- PixArt: diffusers' PixArtTransformer2DModel. It has no q/k norm; the rows with one put a LayerNorm of the full width behind its
  projections of queries and keys, before the heads part, where PixArt-Σ has it. Official .pth files are the same weights under the official
  names, by rules written apart from the tables that read them.
- DiT: diffusers' DiTTransformer2DModel with its two differences from the published model mended: the timestep's frequencies (their
  exponent is divided by 127, not 128) and the norms' epsilon (1e-5, not 1e-6).
- T5: transformers' T5EncoderModel. "Held in bf16": the file and our parameters are bf16, the arithmetic is fp32; the reference then
  runs one layer at a time in fp32, so that it needs no more memory than one layer.
- Autoencoder: diffusers' AutoencoderKL; the posterior's mean and deviation of random images, and the images of random latents, which
  both sides divide by the folder's own scaling factor.
- Pipeline: diffusers' PixArtAlphaPipeline from the same initial noise, and for LCM the same noise between the steps. DDIM is diffusers'
  DDIMScheduler with "leading" spacing, no offset, no clipping and a last step to the clean image. The official DPM-Solver++ takes
  fractional times; its latents were made by the official code and are frozen beside the script
  (benchmarks/parity_rows/official_solver.py says how).
- Images: peak signal-to-noise ratio of 8-bit images, the worst of two.
"""  # noqa: E501


def render(rows: Sequence[Row], results: Mapping[str, Mapping]) -> str:
    """The document: one table a model, rows in their order. Rows without a result are named at the
    end."""
    known = [row for row in rows if row.name in results]
    parts = [_HEAD.format(versions=_versions(results), minutes=15)]
    for model in dict.fromkeys(row.model for row in known):
        parts.append(
            f"\n## {model[0].upper()}{model[1:]}\n\n{_table([row for row in known if row.model == model], results)}"  # noqa: E501
        )
    missing = [row.name for row in rows if row.name not in results]
    if missing:
        parts.append(f"\nNot measured yet: {', '.join(missing)}.\n")
    return "".join(parts) + _NOTES


def _versions(results: Mapping[str, Mapping]) -> str:
    found: dict[str, list[str]] = {}
    for result in results.values():
        for name, version in result.get("versions", {}).items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return ", ".join(f"{name} {' and '.join(sorted(versions))}" for name, versions in found.items())


def _table(rows: Sequence[Row], results: Mapping[str, Mapping]) -> str:
    images = all(row.measure == "psnr" for row in rows)
    columns = [
        "format",
        "size",
        "dtype",
        *(["PSNR"] if images else ["max", "L2"]),
        "bound",
        "seconds",
        "GiB",
    ]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        result = results[row.name]
        if "failed" in result:
            cells = ["failed", *[""] * (len(columns) - 4)]
        else:
            shown = ("psnr",) if images else ("max", "l2")
            cells = [_error(row, result["error"], key) for key in shown]
            cost = (
                ["", ""]
                if row.tier == "quick"
                else [_pair(result["seconds"]), _pair(result["peak_bytes"], 2**30)]
            )
            cells += [_bound(row), *cost]
        lines.append(f"| {' | '.join([row.format, row.size, row.dtype, *cells])} |")
    return "\n".join(lines) + "\n"


def _error(row: Row, error: Mapping[str, float], key: str) -> str:
    text = f"{error[key]:.0f} dB" if key == "psnr" else f"{error[key]:.1e}"
    return (
        (f"**{text}**" if row.holds(error) else f"**{text}, over**") if key == row.measure else text
    )


def _bound(row: Row) -> str:
    return f"≥ {row.bound:.0f} dB" if row.measure == "psnr" else f"≤ {row.bound:.0e}"


def _pair(sides: Mapping[str, float | None], unit: float = 1.0) -> str:
    """'ours / theirs', each with two digits that count."""
    if any(sides[side] is None for side in ("ours", "theirs")):
        return " / ".join(
            "–" if sides[side] is None else _short(sides[side] / unit)
            for side in ("ours", "theirs")
        )
    return " / ".join(_short(sides[side] / unit) for side in ("ours", "theirs"))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2g}"
