"""A plan as text, every line marked as compiled, counted or estimate, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pixart_jax.parallel.chips import GIB
from pixart_jax.planning import estimate
from pixart_jax.planning.plan import Plan, SamplingPlan

COMPILED, COUNTED, ESTIMATE, TABLE = "compiled", "counted", "estimate", "chip table"
LEGEND = (
    "compiled: the compiler's figures of the program that a run executes; counted: from shapes and "
    f"shardings; estimate: a roofline ({estimate.ASSUMPTIONS})"
)

Row = tuple[str, str, str]  # what, figure, basis


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


def amount(flops: float) -> str:
    """'1.24 TFLOP'."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if flops >= size:
            return f"{flops / size:,.3g} {prefix}FLOP"
    return f"{flops:,.3g} FLOP"


def title(plan: Plan) -> str:
    target, stage = plan.target, plan.target.stage_config
    mesh = f"{target.topology.label}, {target.topology.size} devices, mesh {target.label}"
    size = f"{target.size[0]} × {target.size[1]} px"
    if (work := target.sampling) is not None:
        guidance = (
            f"guidance {work.sampling.guidance:g}" if work.sampling.guidance != 1 else "no guidance"
        )
        steps = f", {work.steps} steps of {work.sampling.solver}, {guidance}"
        how = f"{size}{steps if target.part == 'denoise' else ''}, batch {work.batch}, {work.dtype}"
        return f"sampling, {target.part}: {how} · {mesh}"
    buckets, micro = len(stage.data.buckets), stage.optimizer.accumulate
    size += f", largest of {buckets} buckets, " if buckets > 1 else ", "
    how = f"{size if stage.task != 'text_to_text' else ''}batch {stage.batch_size}"
    how += f", {micro} micro-batches" if micro > 1 else ""
    how += f", remat {plan.stats.remat}, {target.config.compute_dtype}"
    return f"stage {stage.name} ({stage.task}): {how} · {mesh}"


def memory(plan: Plan) -> list[Row]:
    """Bytes on a device, by kind."""
    stats, sampling = plan.stats, plan.target.sampling is not None
    rows = [(name, data(size), COUNTED) for name, size in stats.counted.items() if size]
    if stats.wanted is None:
        used = {"transformer" if plan.target.part == "denoise" else "VAE", "batch"}
        inputs = sum(n for name, n in stats.counted.items() if not sampling or name in used)
        beside = stats.outputs - stats.aliased
        kinds = "activations, temporaries" if sampling else "gradients, activations, temporaries"
        lines = (
            ("padding of these by layout", stats.arguments - inputs, 0.01 * stats.total),
            (kinds, stats.temporaries, 0),
            ("results beside the state", beside, 2**20),
            ("program", stats.code, 0),
            ("total", stats.total, 0),
            ("in the host's memory", stats.host, 2**20),
        )
        rows += [(name, data(size), COMPILED) for name, size, least in lines if size >= least]
    if plan.usable is not None:
        rows.append(("the device has", data(plan.usable), COMPILED if stats.available else TABLE))
    return [*rows, ("verdict", verdict(plan), "")]


def verdict(plan: Plan) -> str:
    total, usable = plan.stats.total, plan.usable
    if usable is None:
        return "does not fit" if plan.fits is False else "no limit is known of this device"
    if plan.fits:
        return f"fits, {data(usable - total)} to spare ({total / usable:.0%} used)"
    return f"does not fit: needs {data(total)} of {data(usable)}, {data(total - usable)} over"


def arithmetic(plan: Plan) -> list[Row]:
    if plan.image_flops is None:
        return [("products as traced", amount(plan.stats.flops), COUNTED)]
    whole = plan.image_flops * plan.target.batch
    rows = [("model FLOPs an image", amount(plan.image_flops), COUNTED)]
    if plan.target.sampling is not None:
        return [*rows, ("model FLOPs a batch", amount(whole), COUNTED)]
    traced = f"{plan.stats.flops / whole:.3f}"
    rows.append(("model FLOPs a step", amount(whole), COUNTED))
    return [*rows, ("products as traced, of that", traced, COUNTED)]


def communication(plan: Plan) -> list[Row]:
    rows = []
    for index, c in enumerate(plan.stats.collectives):
        took = f", {clock(plan.time.wires[index])}" if plan.time else ""
        how = "asynchronous" if c.asynchronous else "waited for"
        group = f" ({c.group})" if c.kind != "collective-permute" else ""
        figure = f"{c.count:,.0f} ×, {data(c.bytes)}, {data(c.moved)} sent, {how}{took}"
        rows.append((f"{c.kind} over {'+'.join(c.axes)}{group}", figure, COMPILED))
    return rows


def timing(plan: Plan) -> list[Row]:
    if (t := plan.time) is None:
        return []
    step = "step" if plan.target.sampling is None else "batch"
    rows = [
        ("compute", clock(t.compute)),
        ("memory", clock(t.memory)),
        ("communication, exposed", f"{clock(t.exposed)} of {clock(sum(t.wires))}"),
        (step, f"{clock(t.step)}, bound by {t.bound}"),
    ]
    if plan.mean != 1:
        rows.append(("step, mean over the buckets", clock(plan.seconds)))
    rows.append(("images/s", f"{plan.images_per_second:,.1f}"))
    if plan.mfu is not None:
        rows.append(("MFU", f"{plan.mfu:.1%}"))
    return [(what, figure, ESTIMATE) for what, figure in rows]


def cost(plan: Plan) -> list[Row]:
    if (c := plan.cost) is None:
        return []
    days = f"{c.days:,.2f} days, {c.device_hours:,.0f} device-hours"
    return [
        (f"{plan.target.stage_config.steps:,} steps", days, ESTIMATE),
        ("USD", f"{c.usd:,.0f}", ESTIMATE),
        ("energy", f"{c.kwh:,.0f} kWh", ESTIMATE),
        ("CO2", f"{c.kg_co2:,.1f} kg", ESTIMATE),
        ("at", c.basis, ""),
    ]


def text(plan: Plan) -> str:
    """All of it as aligned lines."""
    sections = {
        "memory a device": memory(plan),
        "arithmetic": arithmetic(plan),
        "collectives a device": communication(plan) if plan.stats.wanted is None else [],
        "time": timing(plan),
        "the stage": cost(plan),
    }
    rows = [row for part in sections.values() for row in part]
    lines = [title(plan)]
    for name, part in sections.items():
        if part:
            lines += [f"  {name}", *_aligned(part, rows, "    ")]
    stats = plan.stats
    took = f"compiled in {stats.compile_seconds:.0f} s ({stats.compile_cpu_seconds:.0f} s of CPU)"
    took = "compiled earlier" if stats.cached else took
    host = f"with {data(stats.host_peak)} of this machine's memory"
    lines.append(f"  {took} by {stats.compiler} for {stats.device_kind}, {host}")
    if stats.whole_share > 0.02 and plan.target.axes["fsdp"] > 1:
        lines.append(
            f"  {stats.whole_share:.0%} of the parameters are whole on every device: fsdp "
            f"{plan.target.axes['fsdp']} does not divide them"
        )
    return "\n".join([*lines, *(f"  assumed: {words}" for words in stats.assumptions)])


def _aligned(rows: Sequence[Row], widest: Sequence[Row], indent: str) -> list[str]:
    first = max(len(row[0]) for row in widest)
    second = min(max(len(row[1]) for row in widest), 62)
    return [f"{indent}{a:{first}}  {b:{second}}  {basis}".rstrip() for a, b, basis in rows]


def sampling_text(plan: SamplingPlan) -> str:
    """Both programs, and the batch as a whole."""
    usable, batch = plan.denoise.usable, plan.denoise.target.batch
    rows: list[Row] = [
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
    if plan.seconds is not None and plan.denoise.time and plan.decode.time:
        rows += [
            ("text encoder", clock(plan.text), ESTIMATE),
            ("denoise", clock(plan.denoise.time.step), ESTIMATE),
            ("decode", clock(plan.decode.time.step), ESTIMATE),
            ("a batch", clock(plan.seconds), ESTIMATE),
            ("images/s", f"{batch / plan.seconds:,.2f}", ESTIMATE),
        ]
    parts = f"{text(plan.denoise)}\n\n{text(plan.decode)}\n\na batch of {batch} images, a device"
    return "\n".join([parts, *_aligned(rows, rows, "  ")])


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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for first, *rest in [header, *rows]:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """Every figure with its basis; bytes, seconds, FLOPs."""
    target, stats = plan.target, plan.stats

    def figures(basis: str, **values: float | None) -> dict:
        return {name: {"value": value, "basis": basis} for name, value in values.items()}

    device = {"temporaries": stats.temporaries, "program": stats.code, "total": stats.total}
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
        "memory": figures(COUNTED, **stats.counted)
        | figures(COMPILED, **device, host=stats.host)
        | figures(COMPILED if stats.available else TABLE, available=plan.usable),
        "flops": figures(COUNTED, image=plan.image_flops, traced=stats.flops),
        "collectives": [dataclasses.asdict(c) | {"basis": COMPILED} for c in stats.collectives],
        "compile": {
            "seconds": stats.compile_seconds,
            "cpu_seconds": stats.compile_cpu_seconds,
            "host_peak": stats.host_peak,
            "compiler": stats.compiler,
            "kept": stats.cached,
        },
        "assumptions": [*stats.assumptions, estimate.ASSUMPTIONS],
    }
    if (t := plan.time) is not None:
        found["time"] = figures(
            ESTIMATE,
            compute=t.compute,
            memory=t.memory,
            communication=sum(t.wires),
            exposed=t.exposed,
            step=plan.seconds,
            images_per_second=plan.images_per_second,
            mfu=plan.mfu,
        )
    if plan.cost is not None:
        values = dataclasses.asdict(plan.cost)
        found["cost"] = {"at": values.pop("basis")} | figures(ESTIMATE, **values)
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
