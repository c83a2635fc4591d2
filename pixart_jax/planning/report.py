"""A plan as text and as JSON; every figure is marked as compiled, counted or estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
TITLES = {"memory": "memory a device", "flops": "arithmetic", "cost": "the stage"}


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


class Figure(NamedTuple):
    """key: in the JSON. label, text: in the report; a figure without text is in the JSON alone."""

    section: str
    key: str
    value: float | None
    basis: str
    label: str
    text: str


def figures(plan: Plan) -> Iterator[Figure]:
    """Every figure of a plan but its collectives."""

    def row(section, key, value, basis, label="", text="") -> Figure:
        return Figure(section, key, value, basis, label or key, text)

    stats, t, sampling = plan.stats, plan.time, plan.target.sampling is not None
    for name, size in stats.counted.items():
        yield row("memory", name, size, COUNTED, text=data(size) if size else "")
    used = {"transformer" if plan.target.part == "denoise" else "VAE", "batch"}
    inputs = sum(n for name, n in stats.counted.items() if not sampling or name in used)
    gradients = "" if sampling else "gradients, "
    for key, label, size in (
        ("padding", "padding of these by layout", stats.arguments - inputs),
        ("temporaries", f"{gradients}activations, temporaries", stats.temporaries),
        ("results", "results beside the state", stats.outputs - stats.aliased),
        ("program", "", stats.code),
        ("total", "", stats.total),
        ("host", "in the host's memory", stats.host),
    ):
        shown = stats.wanted is None and size >= 0.001 * stats.total
        yield row("memory", key, size, COMPILED, label, data(size) if shown else "")
    if (usable := plan.usable) is not None:
        basis = COMPILED if stats.available else TABLE
        yield row("memory", "available", usable, basis, "the device has", data(usable))

    if (image := plan.image_flops) is None:
        yield row("flops", "traced", stats.flops, COUNTED, "products as traced", flop(stats.flops))
    else:
        whole, unit = image * plan.target.batch, "batch" if sampling else "step"
        yield row("flops", "image", image, COUNTED, "model FLOPs an image", flop(image))
        yield row("flops", "batch", whole, COUNTED, f"model FLOPs a {unit}", flop(whole))
        share = f"{stats.flops / whole:.3f}"
        yield row("flops", "traced", stats.flops, COUNTED, "products as traced, of that", share)

    if t is not None and (rate := plan.images_per_second) is not None:
        wires, unit = sum(t.wires), "batch" if sampling else "step"
        exposed = f"{clock(t.exposed)} of {clock(wires)}"
        bound = f"{clock(t.step)}, bound by {t.bound}"
        yield row("time", "compute", t.compute, ESTIMATE, text=clock(t.compute))
        yield row("time", "memory", t.memory, ESTIMATE, text=clock(t.memory))
        yield row("time", "communication", wires, ESTIMATE)
        yield row("time", "exposed", t.exposed, ESTIMATE, "communication, exposed", exposed)
        yield row("time", "compiled_step", t.step, ESTIMATE, unit, bound)
        several = clock(plan.seconds) if plan.mean != 1 else ""
        yield row("time", "step", plan.seconds, ESTIMATE, "step, mean over the buckets", several)
        yield row("time", "images_per_second", rate, ESTIMATE, "images/s", f"{rate:,.1f}")
        if plan.mfu is not None:
            yield row("time", "mfu", plan.mfu, ESTIMATE, "MFU", f"{plan.mfu:.1%}")

    if (c := plan.cost) is not None:
        steps = f"{plan.target.stage_config.steps:,} steps"
        days = f"{c.days:,.2f} days, {c.device_hours:,.0f} device-hours"
        yield row("cost", "days", c.days, ESTIMATE, steps, days)
        yield row("cost", "device_hours", c.device_hours, ESTIMATE)
        yield row("cost", "usd", c.usd, ESTIMATE, "USD", f"{c.usd:,.0f}")
        yield row("cost", "kwh", c.kwh, ESTIMATE, "energy", f"{c.kwh:,.0f} kWh")
        yield row("cost", "kg_co2", c.kg_co2, ESTIMATE, "CO2", f"{c.kg_co2:,.1f} kg")


def title(plan: Plan) -> str:
    target, stage = plan.target, plan.target.stage_config
    mesh = f"{target.topology.label}, {target.topology.size} devices, mesh {target.label}"
    size = f"{target.size[0]} × {target.size[1]} px"
    if (work := target.sampling) is not None:
        how = f"{size}, batch {work.batch}, {work.dtype}"
        if target.part == "denoise":
            how += f", {work.steps} steps of {work.sampling.solver}"
            how += f", guidance {work.sampling.guidance:g}"
        return f"sampling, {target.part}: {how} · {mesh}"
    buckets, micro = len(stage.data.buckets), stage.optimizer.accumulate
    size += f", largest of {buckets} buckets, " if buckets > 1 else ", "
    how = f"{size if stage.task != 'text_to_text' else ''}batch {stage.batch_size}"
    how += f", {micro} micro-batches" if micro > 1 else ""
    how += f", remat {plan.stats.remat}, {target.config.compute_dtype}"
    return f"stage {stage.name} ({stage.task}): {how} · {mesh}"


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
    stats = plan.stats
    sections: dict[str, list[tuple[str, str, str]]] = {"memory": [], "flops": []}
    sections["collectives a device"] = list(communication(plan))
    for f in figures(plan):
        if f.text:
            sections.setdefault(f.section, []).append((f.label, f.text, f.basis))
    sections["memory"].append(("verdict", verdict(plan), ""))
    if plan.cost is not None:
        sections["cost"].append(("at", plan.cost.basis, ""))
    width = max(len(row[0]) for rows in sections.values() for row in rows)
    lines = [title(plan)]
    for name, rows in sections.items():
        if rows:
            lines += [f"  {TITLES.get(name, name)}", *_aligned(rows, "    ", width)]
    took = f"compiled in {stats.compile_seconds:.0f} s ({stats.compile_cpu_seconds:.0f} s of CPU)"
    took = "compiled earlier" if stats.cached else took
    host = f"with {data(stats.host_peak)} of this machine's memory"
    lines.append(f"  {took} by {stats.compiler} for {stats.device_kind}, {host}")
    return "\n".join([*lines, *(f"  assumed: {words}" for words in stats.assumptions)])


def _aligned(rows: Sequence[tuple[str, str, str]], indent: str, first: int = 0) -> list[str]:
    first = first or max(len(row[0]) for row in rows)
    return [f"{indent}{a:{first}}  {b:62}  {basis}".rstrip() for a, b, basis in rows]


def sampling_text(plan: SamplingPlan) -> str:
    """Both programs, and the batch as a whole."""
    usable, batch = plan.denoise.usable, plan.denoise.target.batch
    rows = [
        ("weights of all models", data(plan.weights), COUNTED),
        ("peak with the text encoder beside", data(plan.peak), COMPILED),
        ("peak with it offloaded", data(plan.without_text_encoder), COMPILED),
    ]
    if usable is not None:
        fits = "fits with the text encoder offloaded"
        if plan.peak <= usable:
            fits = "fits"
        elif plan.without_text_encoder > usable:
            fits = "does not fit"
        rows.append(("the device has", f"{data(usable)}: {fits}", TABLE))
    if plan.seconds is not None:
        rows += [
            ("text encoder", clock(plan.text), ESTIMATE),
            ("a batch", clock(plan.seconds), ESTIMATE),
            ("images/s", f"{batch / plan.seconds:,.2f}", ESTIMATE),
        ]
    parts = f"{text(plan.denoise)}\n\n{text(plan.decode)}\n\na batch of {batch} images, a device"
    return "\n".join([parts, *_aligned(rows, "  ")])


def total(plans: Sequence[Plan]) -> str:
    """The stages' sum."""
    known = [plan.cost for plan in plans if plan.cost]
    if len(known) < len(plans):
        return "total: unknown, as the time of some stages is"
    days, usd, kwh, co2 = (
        sum(getattr(c, name) for c in known) for name in ("days", "usd", "kwh", "kg_co2")
    )
    return (
        f"total of {len(plans)} stages: {days:,.2f} days, {usd:,.0f} USD, {kwh:,.0f} kWh, "
        f"{co2:,.1f} kg CO2  (estimate)"
    )


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
    }
    for f in figures(plan):
        found.setdefault(f.section, {})[f.key] = {"value": f.value, "basis": f.basis}
    if plan.cost is not None:
        found["cost"]["at"] = plan.cost.basis
    return found


def sampling_json(plan: SamplingPlan) -> dict[str, Any]:
    """Both programs, and the batch as a whole."""
    batch: dict[str, Any] = {
        "weights": plan.weights,
        "peak": plan.peak,
        "peak_without_text_encoder": plan.without_text_encoder,
    }
    if plan.seconds is not None:
        rate = plan.denoise.target.batch / plan.seconds
        batch |= {"seconds": plan.seconds, "text_seconds": plan.text, "images_per_second": rate}
    return {"programs": [as_json(plan.denoise), as_json(plan.decode)], "batch": batch}
