"""python -m pixart_jax plan."""

from __future__ import annotations

import json
from pathlib import Path

import compilers
import pytest
from planning import small_run

from pixart_jax import cli
from pixart_jax.config import HardwareConfig
from pixart_jax.errors import UserError
from pixart_jax.parallel.chips import CHIPS
from pixart_jax.planning import command, compilation, estimate, plan, report, sweep, topology
from pixart_jax.planning.collectives import Collective
from pixart_jax.planning.target import CompiledStats, PlanTarget

pytestmark = pytest.mark.usefixtures("optimized")
RECIPE = str(Path(small_run.__file__))
TINY = ["--model.depth", "2", "--model.width", "64", "--model.heads", "4"]


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    """One folder of kept results for all tests here."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PIXART_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.mark.parametrize(
    "flags, says",
    [
        ("", "--topology"),
        ("--topology v5e:3x5", "v5e:4x4"),
        ("--topology cpu:8 --mesh fsdp=3", "sizes that divide it: 1, 2, 4, 8"),
        ("--topology cpu:8 --mesh tensor=4", "does not divide 6 heads"),
        ("--topology cpu:8 --mesh widht=4", "'widht' is no axis"),
        ("--topology cpu:8 --batch-size 12", "8 or 16 would be"),
        ("--topology cpu:8 --stage wrods", "did you mean 'words'"),
        ("--topology v5e:4x4 --slices 3 --mesh data=16,fsdp=3", "not a multiple of the 3 slices"),
        ("--topology v5e:4x4 --slices 2 --mesh data=1,fsdp=32", "which lie along data"),
        ("--topology cpu:8 --stages.0.steps none", "--stages.0.steps"),
        ("--topology cpu:8 --compile-gib -1", "must be positive"),
        ("--topology cpu:8 --sample --height 100", "height 100"),
        ("--topology cpu:8 --sweep --most 0", "--most 0"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_compiled(flags, says, monkeypatch):
    monkeypatch.setattr(
        compilation.subprocess, "Popen", lambda *a, **k: pytest.fail("something was compiled")
    )
    monkeypatch.setattr(topology, "require_compiler", lambda where: None)
    with pytest.raises(UserError) as error:
        command.main([RECIPE, *flags.split()])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_without_a_recipe_the_recipes_are_listed():
    with pytest.raises(UserError, match="xl2_1024_ms"):
        command.main(["--topology", "cpu:8"])


def test_flags_of_the_command_and_overrides_of_the_recipe_are_told_apart():
    flags = "--topology=v5e:4x4 --remat dots --sweep --stages.0.steps 5 --stage a"
    options, rest = cli.parse_known(command.PlanOptions, flags.split(), prog="plan")
    assert options == command.PlanOptions("v5e:4x4", sweep=True, stage="a")
    assert rest == ["--remat", "dots", "--stages.0.steps", "5"]


def plan_json(folder: Path, flags: str) -> dict:
    """What the command writes."""
    file = folder / "plan.json"
    assert command.main([RECIPE, *flags.split(), *TINY, "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_plan_tells_memory_flops_and_collectives_and_is_kept(tmp_path, capsys):
    flags = "--topology cpu:8 --mesh data=2,fsdp=4"
    (found,) = plan_json(tmp_path, flags)["programs"]
    printed = capsys.readouterr().out
    memory = {name: entry["value"] for name, entry in found["memory"].items()}
    assert memory["EMA"] == memory["parameters"] > 0
    assert memory["optimizer"] > 1.9 * memory["parameters"]
    assert memory["total"] > memory["temporaries"] > 0
    flops = {name: entry["value"] for name, entry in found["flops"].items()}
    assert flops["traced"] == pytest.approx(4 / 3 * flops["batch"], rel=0.05)
    over_fsdp = {c["kind"] for c in found["collectives"] if c["axes"] == ["fsdp"]}
    assert {"all-gather", "all-reduce"} & over_fsdp
    assert all(set(c["axes"]) <= {"data", "fsdp"} for c in found["collectives"])
    assert found["fits"] is None and "time" not in found
    assert "compiled" in printed and "counted" in printed and "0.18215" in printed
    (again,) = plan_json(tmp_path, flags)["programs"]
    assert again["compile"].pop("cached") and not found["compile"].pop("cached") and again == found


@pytest.mark.slow
def test_a_plan_of_sampling_has_both_programs_and_all_weights(tmp_path):
    size = "--batch-size 2 --steps 3 --height 32 --width 32"
    found = plan_json(tmp_path, f"--topology cpu:2 --mesh fsdp=2,data=1 --sample {size}")
    assert [p["program"] for p in found["programs"]] == ["denoise", "decode"]
    # T5-XXL in bfloat16 on two devices
    assert found["batch"]["peak"] > found["batch"]["weights"] > 9.5e9 / 2 * 0.98
    denoise = found["programs"][0]
    ratio = denoise["flops"]["traced"]["value"] / (2 * denoise["flops"]["image"]["value"])
    assert 0.5 < ratio <= 1.0  # the texts' keys and values are made once, not at each of the steps


# ---- what is made of a compiled program ----


def target(name: str = "v5e:2x4", mesh=(1, 8, 1, 1), **changes) -> PlanTarget:
    where = topology.parse(name)
    return PlanTarget(where, small_run.get_config(**changes), 0, mesh, small_run.BUCKET)


def stats(**changes) -> CompiledStats:
    one = Collective("all-gather", ("fsdp",), 8, 4, 8e9, 7e9, True, 2, 1)
    two = Collective("all-reduce", ("fsdp",), 8, 1, 4e9, 7e9, False, 2, 1)
    plain = {
        "device_kind": "TPU v5 lite",
        "counted": {"parameters": 1e9, "EMA": 1e9, "optimizer": 2e9, "batch": 1e8},
        "flops": 8 * 197e12 * 0.7,
        "product_bytes": 0.0,
        "arguments": 4.1e9,
        "outputs": 4e9,
        "aliased": 4e9,
        "temporaries": 3e9,
        "code": 1e8,
        "collectives": (one, two),
    }
    return CompiledStats(**{**plain, **changes})


def test_a_roofline_is_the_sum_of_what_its_docstring_says():
    found = estimate.time_of(target(), stats(), CHIPS["v5e"])
    assert found.compute == pytest.approx(1.0)
    wire = 7e9 / (50e9 * 2 * estimate.WIRE_EFFICIENCY)
    assert found.wires == pytest.approx((wire, wire))
    # the asynchronous one hides behind a second of work
    assert found.exposed == pytest.approx(wire)
    assert found.step == pytest.approx(max(found.compute, found.memory) + wire)


def test_what_crosses_slices_takes_the_network():
    slow = stats(collectives=(Collective("all-gather", ("fsdp",), 8, 4, 8e9, 7e9, True, 2, 2),))
    chip = CHIPS["v5e"]
    within = 7e9 / (chip.link_bandwidth * 2 * estimate.WIRE_EFFICIENCY)
    across = 7e9 / 4 / (chip.network_bandwidth * estimate.WIRE_EFFICIENCY)
    assert estimate.time_of(target(), slow, chip).wires[0] == pytest.approx(within + across)


def test_a_stage_costs_its_steps_on_all_devices():
    made = plan.plan_from_stats(target(), stats())
    hours = made.target.stage_config.steps * made.time.step / 3600
    assert made.cost.usd == pytest.approx(hours * 8 * CHIPS["v5e"].usd_per_hour)
    other = target(hardware=HardwareConfig(usd_per_device_hour=9.0))
    assert plan.plan_from_stats(other, stats()).cost.usd == pytest.approx(hours * 8 * 9.0)


def test_what_does_not_fit_says_by_how_much():
    over = plan.plan_from_stats(target(), stats(wanted=20 * 2**30, available=15.75 * 2**30))
    assert over.fits is False and over.time is None
    assert "needs 20.00 GiB of 15.75 GiB, 4.25 GiB over" in report.text(over)


def test_a_sweep_compiles_no_more_than_asked_and_ranks_what_fits_by_speed():
    asked = []

    def made(one, bounds):
        asked.append(one)
        if len(asked) == 2:
            raise UserError("no")
        return plan.plan_from_stats(one, stats(flops=8 * 197e12 * len(asked)))

    found = sweep.run(target(), 4, compilation.CompileLimits(), True, made)
    assert len(found) == len(asked) == 4 and found[-1].plan is None
    speeds = [o.plan.images_per_second for o in found[:-1]]
    assert speeds == sorted(speeds, reverse=True)


def test_a_sweep_leaves_out_what_arithmetic_rules_out():
    found = sweep.candidates(target("v5e:4x4", (16, 1, 1, 1)))
    assert found
    for one in found:
        plan.check(one)
        assert one.axes["tensor"] in (1, 2) and 384 % one.axes["fsdp"] == 0
    assert len({(one.mesh, one.stage_config.batch_size) for one in found}) == len(found)
    assert len({one.mesh for one in found[:4]}) > 1


# ---- with the TPU's own compiler ----


@pytest.fixture
def libtpu(monkeypatch):
    """On the path of the process that compiles; the one that asks for it does not have it, and is
    not to look."""
    monkeypatch.setenv("PYTHONPATH", compilers.path())
    monkeypatch.setattr(topology, "require_compiler", lambda where: None)


@compilers.needs("v5e:2x4")
def test_a_step_is_compiled_for_a_slice_that_is_not_here(tmp_path, libtpu):
    (found,) = plan_json(tmp_path, "--topology v5e:2x4 --mesh data=2,fsdp=4")["programs"]
    assert found["fits"]
    assert found["time"]["images_per_second"]["value"] > 0 < found["cost"]["usd"]["value"]
    assert found["memory"]["total"]["value"] < 2**30


@compilers.needs("v5e:2x2")
@pytest.mark.slow
def test_a_program_that_a_slice_cannot_hold_is_told_and_is_no_traceback(capsys, libtpu):
    flags = "--topology v5e:2x2 --mesh fsdp=4,data=1 --remat none --batch-size 65536"
    assert command.main([RECIPE, *flags.split()]) == 0
    assert "does not fit: needs" in capsys.readouterr().out
