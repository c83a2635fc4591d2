"""A plan as text and as JSON; every figure is marked as compiled, counted or estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pixart_jax.parallel.chips import GIB
from pixart_jax.planning import estimate
from pixart_jax.planning.plan import Plan, SamplingPlan
from pixart_jax.planning.sweep import Outcome
from pixart_jax.planning.target import PlanTarget

COMPILED, COUNTED, ESTIMATE, TABLE = "compiled", "counted", "estimate", "chip table"
LEGEND = (
    "compiled: the compiler's figures of the program that a run executes; counted: from shapes and "
    f"shardings; estimate: a roofline ({estimate.ASSUMPTIONS})"
)


def data(size: float) -> str:
    """'1.96 GiB', '37.2 MiB'."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:,.0f} B"


def clock(seconds: float | None) -> str:
    """'1.32 s', '12.0 ms'."""
    if seconds is None:
        return ""
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{seconds * 1e3:,.3g} ms"


def flop(count: float) -> str:
    """'1.24 TFLOP'."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:,.3g} {prefix}FLOP"
    return f"{count:,.3g} FLOP"


Format = Callable[[float], str]
SECTIONS: dict[str, tuple[str, Format]] = {  # name in the JSON: title, how its figures are shown
    "memory": ("memory a device; temporaries: activations, gradients", data),
    "flops": ("FLOPs of the model, and of the traced program", flop),
    "time": ("time", clock),
    "cost": ("the whole stage", "{:,.2f}".format),
}
RATES: dict[str, Format] = {"images_per_second": "{:,.1f}".format, "mfu": "{:.1%}".format}


def figures(plan: Plan) -> dict[str, dict[str, dict]]:
    """Section → name → {"value", "basis"}: bytes on a device, FLOPs, seconds, cost of the stage."""

    def of(basis: str, **values: float | None) -> dict[str, dict]:
        return {n: {"value": v, "basis": basis} for n, v in values.items() if v is not None}

    stats, t, image, part = plan.stats, plan.time, plan.image_flops, plan.target.part
    used = {"transformer" if part == "denoise" else "VAE", "batch"}
    inputs = sum(n for name, n in stats.counted.items() if part == "step" or name in used)
    compiled = {"total": stats.total}
    if stats.wanted is None:
        compiled = {
            "padding": stats.arguments - inputs,
            "temporaries": stats.temporaries,
            "results": stats.outputs - stats.aliased,
            "program": stats.code,
            **compiled,
            "host": stats.host,
        }
    found = {"memory": of(COUNTED, **stats.counted) | of(COMPILED, **compiled)}
    found["memory"] |= of(COMPILED if stats.available else TABLE, available=plan.usable)
    whole = image and image * plan.target.batch
    found["flops"] = of(COUNTED, image=image, batch=whole, traced=stats.flops)
    if t is not None:
        parts = {"compute": t.compute, "memory": t.memory, "communication": sum(t.wires)}
        rate = {"images_per_second": plan.images_per_second, "mfu": plan.mfu}
        found["time"] = of(ESTIMATE, **parts, exposed=t.exposed, step=plan.seconds, **rate)
    if plan.cost is not None:
        values = dataclasses.asdict(plan.cost)
        del values["basis"]
        found["cost"] = of(ESTIMATE, **values)
    return found


def title(plan: Plan) -> str:
    target, stage = plan.target, plan.target.stage_config
    how = [f"{target.size[0]} × {target.size[1]} px", f"batch {target.batch}"]
    if (work := target.sampling) is not None:
        what = f"sampling, {target.part}"
        how += [work.dtype, f"{work.steps} steps of {work.sampling.solver}"]
        how.append(f"guidance {work.sampling.guidance:g}")
    else:
        what, micro = f"stage {stage.name} ({stage.task})", stage.optimizer.accumulate
        how += [f"largest of {len(stage.data.buckets)} buckets"] if plan.mean != 1 else []
        how += [f"{micro} micro-batches"] if micro > 1 else []
        how += [f"remat {plan.stats.remat}", target.config.compute_dtype]
    where = f"{target.topology.label}, {target.topology.size} devices, mesh {target.label}"
    return f"{what}: {', '.join(how)} · {where}"


def verdict(plan: Plan) -> str:
    total, usable = plan.stats.total, plan.usable
    if usable is None:
        return "does not fit" if plan.fits is False else "no limit is known of this device"
    if plan.fits:
        return f"fits, {data(usable - total)} to spare ({total / usable:.0%} used)"
    return f"does not fit: needs {data(total)} of {data(usable)}, {data(total - usable)} over"


def communication(plan: Plan) -> Iterator[tuple[str, str, str]]:
    for index, c in enumerate(plan.stats.collectives):
        took = f", {clock(plan.time.wires[index])}" if plan.time else ""
        how = "asynchronous" if c.asynchronous else "waited for"
        group = f" ({c.group})" if c.kind != "collective-permute" else ""
        figure = f"{c.count:,.0f} ×, {data(c.bytes)}, {data(c.moved)} sent, {how}{took}"
        yield f"{c.kind} over {'+'.join(c.axes)}{group}", figure, COMPILED


def text(plan: Plan) -> str:
    """The report: aligned lines by section."""
    stats, sections = plan.stats, {}
    for section, values in figures(plan).items():
        name, show = SECTIONS[section]
        sections[name] = [
            (key.replace("_", " "), RATES.get(key, show)(f["value"]), f["basis"])
            for key, f in values.items()
            if f["value"]
        ]
        if section == "memory":
            sections[name].append(("verdict", verdict(plan), ""))
            sections["collectives a device"] = list(communication(plan))
        if section == "time" and plan.time:
            sections[name].append(("bound by", plan.time.bound, ESTIMATE))
        if section == "cost" and plan.cost:
            sections[name].append(("at", plan.cost.basis, ""))
    width = max(len(row[0]) for rows in sections.values() for row in rows)
    lines = [title(plan)]
    for name, rows in sections.items():
        lines += [f"  {name}", *_aligned(rows, "    ", width)] if rows else []
    took = f"compiled in {stats.compile_seconds:.0f} s ({stats.compile_cpu_seconds:.0f} s of CPU)"
    took = "compiled earlier" if stats.cached else took
    host = f"with {data(stats.host_peak)} of this machine's memory"
    lines.append(f"  {took} by {stats.compiler} for {stats.device_kind}, {host}")
    return "\n".join([*lines, *(f"  assumed: {words}" for words in stats.assumptions)])


def _aligned(rows: Sequence[tuple[str, str, str]], indent: str, first: int = 0) -> list[str]:
    first = first or max(len(row[0]) for row in rows)
    return [f"{indent}{a:{first}}  {b:62}  {basis}".rstrip() for a, b, basis in rows]


def sampling_figures(plan: SamplingPlan) -> dict[str, tuple[float, str]]:
    """Of a batch as a whole, name → (value, basis): bytes on a device, seconds."""
    found = {
        "weights": (plan.weights, COUNTED),
        "peak": (plan.peak, COMPILED),
        "peak_without_text_encoder": (plan.without_text_encoder, COMPILED),
    }
    if plan.seconds is not None and plan.text is not None:
        rate = plan.denoise.target.batch / plan.seconds
        found |= {"seconds": (plan.seconds, ESTIMATE), "text_seconds": (plan.text, ESTIMATE)}
        found["images_per_second"] = (rate, ESTIMATE)
    return found


def sampling_text(plan: SamplingPlan) -> str:
    """Both programs, and the batch as a whole."""
    rows, usable = [], plan.denoise.usable
    for name, (value, basis) in sampling_figures(plan).items():
        show = RATES.get(name, clock if "seconds" in name else data)
        rows.append((name.replace("_", " "), show(value), basis))
    if usable is not None:
        offloaded = plan.without_text_encoder <= usable
        fits = "fits with the text encoder offloaded" if offloaded else "does not fit"
        fits = "fits" if plan.peak <= usable else fits
        rows.append(("available", f"{data(usable)}: {fits}", TABLE))
    batch = f"a batch of {plan.denoise.target.batch} images, a device"
    parts = f"{text(plan.denoise)}\n\n{text(plan.decode)}\n\n{batch}"
    return "\n".join([parts, *_aligned(rows, "  ")])


def total(plans: Sequence[Plan]) -> str:
    """The stages' sum."""
    known = [plan.cost for plan in plans if plan.cost]
    if len(known) < len(plans):
        return "total: unknown, as the time of some stages is"
    names = {"days": "days", "usd": "USD", "kwh": "kWh", "kg_co2": "kg CO2"}
    sums = [f"{sum(getattr(c, key) for c in known):,.2f} {name}" for key, name in names.items()]
    return f"total of {len(plans)} stages: {', '.join(sums)}  (estimate)"


def ranking(target: PlanTarget, outcomes: Sequence[Outcome]) -> str:
    """The table of a sweep."""
    rows = [("mesh", "batch", "memory a device", "step", "images/s", "MFU", "")]
    for o in outcomes:
        if (p := o.plan) is None:
            rows.append((o.target.label, "", "", "", "", "", o.error[:80]))
            continue
        speed, mfu = (f"{p.images_per_second:,.1f}", f"{p.mfu or 0:.1%}") if p.time else ("", "")
        fits = "fits" if p.fits else verdict(p)
        figures = (f"{p.target.batch:,}", data(p.stats.total), clock(p.seconds), speed, mfu, fits)
        rows.append((o.target.label, *figures))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f"{target.topology.label}, {target.topology.size} devices: {_stage(target)}"]
    for first, *rest in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    note = "(batch: counted; memory: compiled; step, images/s, MFU: estimate)"
    return "\n".join([*lines, note])


def _stage(target: PlanTarget) -> str:
    if target.sampling is not None:
        return "sampling, denoise"
    return f"stage {target.stage_config.name}, remat {target.config.remat}"


def as_json(plan: Plan) -> dict[str, Any]:
    """Every figure with its basis; bytes, seconds, FLOPs."""
    target, stats = plan.target, plan.stats
    found: dict[str, Any] = {
        "program": target.part,
        "topology": target.topology.label,
        "devices": target.topology.size,
        "mesh": target.axes,
        "stage": target.stage_config.name,
        "batch_size": target.batch,
        "bucket": list(target.size),
        "remat": stats.remat,
        "fits": plan.fits,
        "collectives": [dataclasses.asdict(c) | {"basis": COMPILED} for c in stats.collectives],
        "compile": {
            "seconds": stats.compile_seconds,
            "cpu_seconds": stats.compile_cpu_seconds,
            "host_peak": stats.host_peak,
            "compiler": stats.compiler,
            "cached": stats.cached,
        },
        "assumptions": [*stats.assumptions, estimate.ASSUMPTIONS],
        **figures(plan),
    }
    if plan.cost is not None:
        found["cost"]["at"] = plan.cost.basis
    return found


def sampling_json(plan: SamplingPlan) -> dict[str, Any]:
    """Both programs, and the batch as a whole."""
    batch = {name: value for name, (value, _) in sampling_figures(plan).items()}
    return {"programs": [as_json(plan.denoise), as_json(plan.decode)], "batch": batch}
