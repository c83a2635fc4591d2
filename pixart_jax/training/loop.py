"""The loop of one stage: batches in, steps, and from time to time a line, a save and a look at what it draws."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable

import jax
from tqdm import tqdm

from pixart_jax.parallel import liveness
from pixart_jax.training.batches import put
from pixart_jax.training.state import TrainState


class Diverged(Exception):
    """Loss or gradient is no longer finite. The message names the stage and the step."""


@dataclasses.dataclass
class Window:
    """Sums of the metrics since the last logged line; saved with a checkpoint, so that a resumed run logs the same lines."""

    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    count: int = 0

    def add(self, values: dict[str, float]) -> None:
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        return {name: value / self.count for name, value in self.sums.items()}


@dataclasses.dataclass(frozen=True)
class Watch:
    """What the loop does besides stepping. log(step, values); save(step, state, window); preview(step, state)."""

    log_every: int
    save_every: int
    preview_every: int
    log: Callable[[int, dict[str, float]], None]
    save: Callable[[int, TrainState, Window], None]
    preview: Callable[[int, TrainState], None]


def train(
    state: TrainState, step_function, loader, *, name: str, start: int, steps: int, key: jax.Array, sharding, watch: Watch, window: Window
) -> TrainState:
    """Run steps start … steps − 1 of a stage; step k's key is ``key`` with k folded in.

    Each step's metrics are read while the next one runs, so a NaN stops the run one dispatch later, before anything is
    saved, and the device never waits for the host. Raises Diverged with the step's number (counted from 1).
    """
    if start >= steps:
        return state
    batches = loader.iterator(start=start)
    often = 0.5 if sys.stderr.isatty() else 15.0  # seconds; a log file wants few lines
    bar = tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True, mininterval=often, disable=jax.process_index() > 0)
    pending: tuple[int, dict] | None = None
    since = Since(loader)

    def settle() -> None:
        nonlocal pending, window
        if pending is None:
            return
        number, metrics = pending
        pending = None
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        bad = [key for key in ("loss", "grad_norm") if not math.isfinite(values[key])]
        if bad:
            raise Diverged(f"stage {name}, step {number}: {' and '.join(f'{key} is {values[key]}' for key in bad)}")
        window.add(values)
        bar.update()
        liveness.beat(number)
        since.begin(number)
        if number % watch.log_every == 0 or number == steps:
            line = {**window.means(), "lr": values["lr"], **since.rates(number)}
            rate = line.get("images_per_second")
            bar.set_postfix(loss=f"{line['loss']:.4g}", **({"images_s": f"{rate:.3g}"} if rate else {}), refresh=False)
            watch.log(number, line)
            window = Window()

    try:
        for number in range(start + 1, steps + 1):
            batch = put(next(batches), sharding)
            state, metrics = step_function(state, batch, jax.random.fold_in(key, number - 1))
            settle()
            pending = (number, metrics)
            last = number == steps
            look = last or (watch.preview_every and number % watch.preview_every == 0)
            keep = last or number % watch.save_every == 0
            if look or keep:
                settle()
                with since.paused():
                    if keep:
                        watch.save(number, state, window)
                    if look:
                        watch.preview(number, state)
    finally:
        liveness.beat(None)
        bar.close()
        close = getattr(batches, "close", None)
        if close:
            close()
    return state


class Since:
    """Rates since the last line, saves and previews left out, and the first step of a process, which compiles, too."""

    def __init__(self, loader):
        self._batch = loader.plan.batch_size
        self._from: tuple[float, int] | None = None
        self._out = 0.0

    def begin(self, number: int) -> None:
        """Step ``number`` is done; the first call starts the clock."""
        if self._from is None:
            self._from = (time.perf_counter(), number)

    def rates(self, number: int) -> dict[str, float]:
        """{} where no step has been timed yet."""
        now = time.perf_counter()
        seconds, steps = now - self._from[0] - self._out, number - self._from[1]
        self._from, self._out = (now, number), 0.0
        if steps == 0:
            return {}
        return {"steps_per_second": steps / seconds, "images_per_second": steps * self._batch / seconds}

    def paused(self):
        return _Pause(self)


class _Pause:
    def __init__(self, since: Since):
        self._since = since

    def __enter__(self):
        self._at = time.perf_counter()

    def __exit__(self, *_):
        self._since._out += time.perf_counter() - self._at
