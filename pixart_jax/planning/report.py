"""A plan as a person reads it, every line marked as compiled, counted or estimate, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from pixart_jax.planning import estimate
from pixart_jax.planning.jobs import GIB
from pixart_jax.planning.plan import Plan

COMPILED, COUNTED, ESTIMATE, TABLE = "compiled", "counted", "estimate", "chip table"
LEGEND = (
    "compiled: the compiler's word on the very program that runs; counted: from shapes and "
    "shardings; estimate: a roofline "
    f"({estimate.ASSUMPTIONS})"
)

Row = tuple[str, str, str]  # what, figure, basis


def data(bytes_: float) -> str:
    """'1.96 GiB', '37.2 MiB'."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if bytes_ >= unit:
            return f"{bytes_ / unit:,.2f} {name}"
    return f"{bytes_:,.0f} B"


def clock(seconds: float) -> str:
    """'1.32 s', '12.0 ms'."""
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{seconds * 1e3:,.3g} ms"


def amount(number: float, unit: str) -> str:
    """'1.24 TFLOP'."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.3g} {prefix}{unit}"
    return f"{number:,.3g} {unit}"


def title(plan: Plan) -> str:
    job = plan.job
    mesh = f"{job.topology.label}, {job.topology.size} devices, mesh {job.label}"
    if job.drawing is not None:
        d = job.drawing
        guided = f"guidance {d.guidance:g}" if d.guidance != 1 else "no guidance"
        what = (
            f"{d.height} × {d.width} px, {d.steps} steps of {d.solver}, {guided}"
            if job.part == "denoise"
            else f"{d.height} × {d.width} px"
        )
        return f"sampling, {job.part}: {what}, batch {d.batch}, {d.dtype} · {mesh}"
    stage = job.stage_config
    many = f", largest of {len(stage.data.buckets)} buckets" if len(stage.data.buckets) > 1 else ""
    size = f"{job.bucket[0]} × {job.bucket[1]} px{many}, " if stage.task != "text_to_text" else ""
    more = f", {stage.optimizer.accumulate} micro-batches" if stage.optimizer.accumulate > 1 else ""
    how = f"remat {plan.facts.remat}, {job.config.compute_dtype}"
    return (
        f"stage {stage.name} ({stage.task}): {size}batch {stage.batch_size}{more}, {how} · {mesh}"
    )


def memory(plan: Plan) -> list[Row]:
    """Bytes a device, by kind."""
    facts = plan.facts
    rows = [(name, data(size), COUNTED) for name, size in facts.counted.items() if size]
    if facts.wanted is None:
        inputs = sum(
            size
            for name, size in facts.counted.items()
            if not plan.job.drawing or name in _inputs(plan)
        )
        if facts.arguments - inputs >= 0.01 * facts.total:
            rows.append(("padding of these by layout", data(facts.arguments - inputs), COMPILED))
        kind = (
            "gradients, activations, temporaries"
            if plan.job.drawing is None
            else "activations, temporaries"
        )
        rows.append((kind, data(facts.temporaries), COMPILED))
        if facts.outputs - facts.aliased >= 2**20:
            rows.append(("results beside the state", data(facts.outputs - facts.aliased), COMPILED))
        rows.append(("program", data(facts.code), COMPILED))
        rows.append(("total", data(facts.total), COMPILED))
        if facts.host >= 2**20:
            rows.append(("in the host's memory", data(facts.host), COMPILED))
    if plan.usable is not None:
        rows.append(("the device has", data(plan.usable), COMPILED if facts.available else TABLE))
    return rows + [("verdict", verdict(plan), "")]


def verdict(plan: Plan) -> str:
    facts = plan.facts
    if plan.fits is None:
        return "no limit is known of this device"
    if plan.fits:
        return (
            f"fits, {data(plan.usable - facts.total)} to spare "
            f"({facts.total / plan.usable:.0%} used)"
        )
    return (
        f"does not fit: needs {data(facts.total)} of {data(plan.usable)}, "
        f"{data(facts.total - plan.usable)} over"
    )


def _inputs(plan: Plan) -> set[str]:
    return {"transformer" if plan.job.part == "denoise" else "VAE", "batch"}


def arithmetic(plan: Plan) -> list[Row]:
    rows = []
    if plan.image_flops is not None:
        rows = [
            ("model FLOPs an image", amount(plan.image_flops, "FLOP"), COUNTED),
            (
                "model FLOPs a step" if plan.job.drawing is None else "model FLOPs a batch",
                amount(plan.image_flops * plan.batch, "FLOP"),
                COUNTED,
            ),
        ]
        if plan.job.drawing is None:
            rows.append(
                (
                    "products as traced, of that",
                    f"{plan.facts.flops / (plan.image_flops * plan.batch):.3f}",
                    COUNTED,
                )
            )
    else:
        rows.append(("products as traced", amount(plan.facts.flops, "FLOP"), COUNTED))
    return rows


def communication(plan: Plan) -> list[Row]:
    rows = []
    for index, c in enumerate(plan.facts.collectives):
        took = f", {clock(plan.time.wires[index])}" if plan.time else ""
        how = "asynchronous" if c.asynchronous else "waited for"
        what = f"{c.kind} over {'+'.join(c.axes)}" + (
            f" ({c.group})" if c.kind != "collective-permute" else ""
        )
        rows.append(
            (
                what,
                f"{c.count:,.0f} ×, {data(c.bytes)}, {data(c.moved)} sent, {how}{took}",
                COMPILED,
            )
        )
    return rows


def timing(plan: Plan) -> list[Row]:
    t = plan.time
    if t is None:
        return []
    rows = [
        ("compute", clock(t.compute), ESTIMATE),
        ("memory", clock(t.memory), ESTIMATE),
        ("communication, exposed", f"{clock(t.exposed)} of {clock(sum(t.wires))}", ESTIMATE),
        (
            "step" if plan.job.drawing is None else "batch",
            f"{clock(t.step)}, bound by {t.bound}",
            ESTIMATE,
        ),
    ]
    if plan.mean != 1:
        rows.append(("step, mean over the buckets", clock(plan.seconds), ESTIMATE))
    rows.append(("images/s", f"{plan.images_per_second:,.1f}", ESTIMATE))
    if plan.mfu is not None:
        rows.append(("MFU", f"{plan.mfu:.1%}", ESTIMATE))
    return rows


def cost(plan: Plan) -> list[Row]:
    if plan.cost is None:
        return []
    c = plan.cost
    return [
        (
            f"{plan.job.stage_config.steps:,} steps",
            f"{c.days:,.2f} days, {c.device_hours:,.0f} device-hours",
            ESTIMATE,
        ),
        ("USD", f"{c.usd:,.0f}", ESTIMATE),
        ("energy", f"{c.kwh:,.0f} kWh", ESTIMATE),
        ("CO2", f"{c.kg_co2:,.1f} kg", ESTIMATE),
        ("at", c.basis, ""),
    ]


def text(plan: Plan) -> str:
    """All of it as aligned lines."""
    sections = [
        ("memory a device", memory(plan)),
        ("arithmetic", arithmetic(plan)),
        ("collectives a device", communication(plan) if plan.facts.wanted is None else []),
        ("time", timing(plan)),
        ("the stage", cost(plan)),
    ]
    rows = [row for _, part in sections for row in part]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    second = min(second, 62)
    lines = [title(plan)]
    for name, part in sections:
        if part:
            lines.append(f"  {name}")
            lines += [
                f"    {what:{first}}  {figure:{second}}  {basis}".rstrip()
                for what, figure, basis in part
            ]
    f = plan.facts
    took = (
        "kept from before"
        if f.cached
        else f"compiled in {f.compile_seconds:.0f} s ({f.compile_cpu_seconds:.0f} s of CPU)"
    )
    lines.append(
        f"  {took} by {f.compiler} for {f.device_kind}, with {data(f.host_peak)} of this "
        "machine's memory"
    )
    if f.whole_share > 0.02 and plan.job.axes["fsdp"] > 1:
        lines.append(
            f"  {f.whole_share:.0%} of the parameters lie whole on every device: fsdp "
            f"{plan.job.axes['fsdp']} does not divide them"
        )
    lines += [f"  assumed: {words}" for words in f.assumptions]
    return "\n".join(lines)


def total(plans: Sequence[Plan]) -> str:
    """The stages' sum."""
    known = [plan.cost for plan in plans if plan.cost]
    if len(known) < len(plans):
        return "total: not of all stages is the time known"
    days, usd, kwh, co2 = (
        sum(getattr(c, name) for c in known) for name in ("days", "usd", "kwh", "kg_co2")
    )
    return (
        f"total of {len(plans)} stages: {days:,.2f} days, {usd:,.0f} USD, {kwh:,.0f} kWh, "
        f"{co2:,.1f} kg CO2  (estimate)"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [header, *rows]
    )


def as_json(plan: Plan) -> dict:
    """Every figure with its basis; bytes, seconds, FLOPs."""
    job, facts = plan.job, plan.facts

    def figure(value, basis):
        return {"value": value, "basis": basis}

    found = {
        "program": job.part,
        "topology": job.topology.label,
        "devices": job.topology.size,
        "mesh": job.axes,
        "stage": job.stage_config.name,
        "batch_size": plan.batch,
        "bucket": list(
            job.bucket if job.drawing is None else (job.drawing.height, job.drawing.width)
        ),
        "remat": facts.remat,
        "fits": plan.fits,
        "memory": {
            **{name: figure(size, COUNTED) for name, size in facts.counted.items()},
            "temporaries": figure(facts.temporaries, COMPILED),
            "program": figure(facts.code, COMPILED),
            "total": figure(facts.total, COMPILED),
            "host": figure(facts.host, COMPILED),
            "available": figure(plan.usable, COMPILED if facts.available else TABLE),
        },
        "flops": {
            "image": figure(plan.image_flops, COUNTED),
            "traced": figure(facts.flops, COUNTED),
        },
        "collectives": [
            {
                "kind": c.kind,
                "axes": list(c.axes),
                "group": c.group,
                "count": c.count,
                "bytes": c.bytes,
                "moved": c.moved,
                "asynchronous": c.asynchronous,
                "basis": COMPILED,
            }
            for c in facts.collectives
        ],
        "compile": {
            "seconds": facts.compile_seconds,
            "cpu_seconds": facts.compile_cpu_seconds,
            "host_peak": facts.host_peak,
            "compiler": facts.compiler,
            "kept": facts.cached,
        },
        "assumptions": [*facts.assumptions, estimate.ASSUMPTIONS],
    }
    if plan.time is not None:
        t = plan.time
        found["time"] = {
            name: figure(value, ESTIMATE)
            for name, value in {
                "compute": t.compute,
                "memory": t.memory,
                "communication": sum(t.wires),
                "exposed": t.exposed,
                "step": plan.seconds,
                "images_per_second": plan.images_per_second,
                "mfu": plan.mfu,
            }.items()
        }
    if plan.cost is not None:
        c = plan.cost
        found["cost"] = {
            name: figure(getattr(c, name), ESTIMATE)
            for name in ("days", "device_hours", "usd", "kwh", "kg_co2")
        }
        found["cost"]["at"] = c.basis
    return found
