"""docs/parity.md, written from the rows and what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.parity_rows.row import Row

_HEAD = """# Parity with PyTorch

Each row draws random, non-zero weights in PyTorch, transformers or diffusers, writes them in the row's format, and compares both
implementations on random inputs.

    python benchmarks/parity.py            # all rows but the slow ones; about {minutes} minutes on two cores, 6 GB of disk
    python benchmarks/parity.py --quick    # the tiny rows
    python benchmarks/parity.py --slow     # also the whole T5-XXL: 10 GB of disk, and more memory than that
    python benchmarks/parity.py --check    # exit status 1 if a row exceeds its bound

The command writes this page from docs/parity.json and keeps the figures of rows that it does not run.

- **max**: max |ours − theirs| / max |theirs|. **L2**: norm of the difference over norm of the reference. The worst of several outputs counts.
- **Bounds** apply to the bold figure: 1e-4 for fp32 rows, 2e-2 for bf16 rows, 1e-3 for latents of the pipeline, 45 dB for images.
- **fp32** rows compute in fp32 on both sides, **bf16** rows in bf16 here and in fp32 in the reference.

Versions: {versions}.
"""  # noqa: E501

_NOTES = """
## References

- PixArt: diffusers' PixArtTransformer2DModel. Rows with q/k norm add a LayerNorm of the full width to its query and key projections, as in PixArt-Σ.
  Official .pth files are written by rules that are independent of the tables that read them.
- DiT: diffusers' DiTTransformer2DModel with two corrections to match the published model: the timestep frequencies (exponent over 128, not 127)
  and the norms' epsilon (1e-6, not 1e-5).
- T5: transformers' T5EncoderModel. "Held in bf16": bf16 weights with fp32 arithmetic.
- Autoencoder: diffusers' AutoencoderKL; mean and deviation of random images, and decoded random latents.
- Pipeline: diffusers' PixArtAlphaPipeline from the same noise. DDIM is diffusers' DDIMScheduler with "leading" spacing, no offset and no
  clipping. The official DPM-Solver++ uses fractional times; its latents were made by the official code
  (benchmarks/parity_rows/official_solver.py).
- Images: peak signal-to-noise ratio of 8-bit images, the worst of two.
"""  # noqa: E501


def render(rows: Sequence[Row], results: Mapping[str, Mapping]) -> str:
    """The document: one table a model, rows in their order. Rows without a result are named at the
    end."""
    known = [row for row in rows if row.name in results]
    parts = [_HEAD.format(versions=_versions(results), minutes=15)]
    for model in dict.fromkeys(row.model for row in known):
        table = _table([row for row in known if row.model == model], results)
        parts.append(f"\n## {model[0].upper()}{model[1:]}\n\n{table}")
    if missing := [row.name for row in rows if row.name not in results]:
        parts.append(f"\nNot measured yet: {', '.join(missing)}.\n")
    return "".join(parts) + _NOTES


def _versions(results: Mapping[str, Mapping]) -> str:
    found: dict[str, set[str]] = {}
    for result in results.values():
        for name, version in result.get("versions", {}).items():
            found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(versions))}" for name, versions in found.items())


def _table(rows: Sequence[Row], results: Mapping[str, Mapping]) -> str:
    titles = {"psnr": "PSNR"}
    if any(row.measure != "psnr" for row in rows):
        titles = {"max": "max", "l2": "L2"}
    lines = [["format", "size", "dtype", *titles.values()]]
    for row in rows:
        result, cells = results[row.name], ["failed", *[""] * (len(titles) - 1)]
        if "failed" not in result:
            cells = [_error(row, result["error"], measure) for measure in titles]
        lines.append([row.format, row.size, row.dtype, *cells])
    text = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([text[0], f"|{'---|' * len(lines[0])}\n", *text[1:]])


def _error(row: Row, error: Mapping[str, float], key: str) -> str:
    text = f"{error[key]:.0f} dB" if key == "psnr" else f"{error[key]:.1e}"
    if key != row.measure:
        return text
    return f"**{text}**" if row.holds(error) else f"**{text}, over**"
