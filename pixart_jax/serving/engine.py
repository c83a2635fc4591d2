"""The engine of a server: a bounded queue, and one thread that makes batches of it.

Images that may share a compiled program are gathered into one batch of a fixed size, each with its
own prompt, seed and guidance, so an image is equal to the bit whatever shares its batch. The thread
owns every call of JAX, which a ``Renderer`` makes; nothing here knows the web.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.finite import CURE, WHAT
from pixart_jax.serving.offer import Generation, Refused

LOG = logging.getLogger("pixart_jax.serving")
GATHER = 0.02  # seconds that a batch which is not full waits for more
RETRY_LIMIT = 120  # seconds: OpenAI's clients give up at once beyond it


class Unavailable(Exception):
    """The engine cannot make the images now. reason: queue_full, timeout or the engine's state.
    retry_after: seconds until it may."""

    def __init__(self, message: str, reason: str, retry_after: int = 5):
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


class BatchFailed(Exception):
    """A bug or a device's error ended the batch; the log has it."""


class _Abandoned(Exception):
    """Nobody waits for any image of the batch."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """state: queued, compiling or running. position: images before it. step: of steps."""

    state: str
    position: int
    step: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Preview:
    """number: which preview of the image, from 0. pixels: rough, uint8 [h, w, 3]."""

    index: int
    number: int
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Done:
    """An image, uint8 [h, w, 3]."""

    index: int
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request's end, where not all images could be made."""

    error: Exception


Event = Progress | Preview | Done | Failed
OnStep = Callable[[int, np.ndarray], None]


class Renderer(Protocol):
    """What makes images."""

    def __call__(
        self, images: Sequence[tuple[Generation, int]], on_step: OnStep, every: int
    ) -> Sequence[np.ndarray | None]:
        """(generation, index) of one key each → uint8 [h, w, 3] each, None where it is not finite.
        on_step(step from 1, latents [b, h, w, c]) is called after every so many steps, and may
        raise to end the work."""

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """Latents [h, w, c] → rough uint8 [h, w, 3], without the device."""


@dataclasses.dataclass(eq=False)
class Job:
    """A request in the engine. listener: called with each Event, in the engine's thread."""

    generation: Generation
    listener: Callable[[Event], None]
    previews: int = 0
    progress: bool = False
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    started: float | None = None  # of its first batch
    cancelled: bool = False
    done: int = 0  # images
    fill: float = 0.0  # of its last batch

    @property
    def queue_seconds(self) -> float:
        return (self.started or time.monotonic()) - self.arrived

    def tell(self, event: Event) -> None:
        if not self.cancelled:
            self.listener(event)


_Item = tuple[Job, int]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server makes at once, and how much may wait."""

    batch_size: int = 8
    """Images of every batch. An image does not depend on what shares its batch."""
    max_queue: int = 64
    """Images that may wait; further requests get 429 with Retry-After."""
    max_programs: int = 64
    """Compiled programs at most; each combination of size, steps, solver and edit is one."""
    timeout: float = 300
    """Seconds that a request may wait."""
    stuck_after: float = 600
    """Seconds of one batch after which /healthz fails."""


class Engine:
    """open_renderer: opens the model, in the engine's thread. warm_up: generated before the state
    is ready. on_batch(one of its generations, images, seconds, whether it compiled): called after
    each batch.

    ``state``: loading (the model is being opened; requests are refused), compiling (requests wait),
    ready, draining (requests are refused, those accepted are finished), failed.
    """

    def __init__(
        self,
        open_renderer: Callable[[], Renderer],
        warm_up: Sequence[Generation] = (),
        limits: Limits = Limits(),
        on_failure: Callable[[Exception], None] = lambda error: None,
    ):
        self._open, self._warm_up, self.limits = open_renderer, list(warm_up), limits
        self.on_failure = on_failure
        self.on_batch: Callable[[Generation, int, float, bool], None] = lambda *report: None
        self.state = "loading"
        self._queue: list[_Item] = []
        self._changed = threading.Condition()
        self._programs: set[Hashable] = {one.program for one in warm_up}  # compiled or promised
        self._compiled: set[Hashable] = set()
        self._running: list[_Item] = []
        self._began: float | None = None  # the batch that runs
        self._seconds_an_image = 1.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- any thread ----

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests in the batch that runs."""
        return len({id(job) for job, _ in self._running})

    @property
    def programs(self) -> int:
        """Compiled programs."""
        return len(self._compiled)

    @property
    def alive(self) -> bool:
        """Whether the thread lives and its batch is not stuck."""
        began = self._began
        stuck = began is not None and time.monotonic() - began > self.limits.stuck_after
        return self._thread.is_alive() and not stuck

    def submit(
        self,
        generation: Generation,
        listener: Callable[[Event], None],
        previews: int = 0,
        progress: bool = False,
    ) -> Job:
        """Queue a request; its events go to ``listener``: Done for each image, or one Failed.
        Raises Unavailable, and Refused for one program more than may be compiled."""
        job = Job(generation, listener, previews, progress)
        with self._changed:
            if self.state not in ("compiling", "ready"):
                raise _unavailable(self.state)
            if len(self._queue) + generation.count > self.limits.max_queue:
                wait = math.ceil((len(self._queue) or generation.count) * self._seconds_an_image)
                wait = min(max(wait, 1), RETRY_LIMIT)
                full = f"the queue is full: try again in {wait} s"
                raise Unavailable(full, "queue_full", wait)
            if generation.program not in self._programs:
                if len(self._programs) >= (most := self.limits.max_programs):
                    more = f"program {most + 1} of at most {most}"
                    raise Refused(f"this size with these options would be {more}: use others")
                self._programs.add(generation.program)
            if progress:
                job.tell(Progress("queued", len(self._queue), 0, generation.run_steps))
            self._queue.extend((job, index) for index in range(generation.count))
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for the job. A batch without any other ends at its next step."""
        with self._changed:
            job.cancelled = True
            self._queue = [one for one in self._queue if one[0] is not job]
            self._changed.notify_all()

    def drain(self) -> None:
        """Refuse new requests; the thread ends when those accepted are finished."""
        with self._changed:
            if self.state != "failed":
                self.state = "draining"
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and wait for the thread; whether it ended in time."""
        self.drain()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- the engine's thread ----

    def _run(self) -> None:
        try:
            self._renderer = self._open()
            self._set_state("loading", "compiling")
            for generation in self._warm_up:
                if self.state != "draining":
                    nobody = Job(generation, lambda event: None)
                    self._generate([(nobody, index) for index in range(generation.count)])
                    if nobody.done < generation.count:
                        raise UserError("the model's first image failed: the log says why")
            self._set_state("compiling", "ready")
        except Exception as error:
            if not isinstance(error, UserError):
                LOG.exception("the model could not be opened")
            with self._changed:
                self.state, lost = "failed", {job for job, _ in self._queue}
                self._queue.clear()
            for job in lost:
                job.tell(Failed(_unavailable("failed")))
            self.on_failure(error)
            return
        while (batch := self._next_batch()) is not None:
            self._generate(batch)

    def _set_state(self, before: str, after: str) -> None:
        with self._changed:
            if self.state == before:
                self.state = after
                LOG.info("%s", after)

    def _next_batch(self) -> list[_Item] | None:
        """The oldest image and those behind it that may share its batch; None at the end."""
        with self._changed:
            while True:
                self._expire()
                if not self._queue:
                    if self.state == "draining":
                        return None
                    self._changed.wait()
                    continue
                oldest = self._queue[0][0]
                batch = [
                    one for one in self._queue if one[0].generation.key == oldest.generation.key
                ]
                wait = oldest.arrived + GATHER - time.monotonic()
                if len(batch) >= self.limits.batch_size or wait <= 0 or self.state == "draining":
                    break
                self._changed.wait(timeout=wait)
            batch = batch[: self.limits.batch_size]
            taken = set(map(id, batch))
            waiting = self._queue = [one for one in self._queue if id(one) not in taken]
        for position, (job, index) in enumerate(waiting):
            if job.progress and index == 0:
                job.tell(Progress("queued", position, 0, job.generation.run_steps))
        return batch

    def _expire(self) -> None:
        limit = time.monotonic() - self.limits.timeout
        late = {job for job, _ in self._queue if job.arrived < limit}
        self._queue = [one for one in self._queue if one[0] not in late]
        for job in late:
            waited = f"waited longer than {self.limits.timeout:g} s"
            job.tell(Failed(Unavailable(waited, "timeout")))
            job.cancelled = True

    def _generate(self, batch: list[_Item]) -> None:
        first = batch[0][0].generation
        new = first.program not in self._compiled
        jobs = list(dict.fromkeys(job for job, _ in batch))
        began = self._began = time.monotonic()
        self._running = batch
        for job in jobs:
            job.started, job.fill = job.started or began, len(batch) / self.limits.batch_size
            if job.progress:
                job.tell(Progress("compiling" if new else "running", 0, 0, first.run_steps))

        def on_step(step: int, latents: np.ndarray) -> None:
            if all(job.cancelled for job in jobs):
                raise _Abandoned
            for job in jobs:
                if job.progress:
                    job.tell(Progress("running", 0, step, first.run_steps))
            for (job, index), one in zip(batch, latents):
                if (number := _preview_at(step, first.run_steps, job.previews)) is not None:
                    job.tell(Preview(index, number, self._renderer.preview(one)))

        every = 1
        if not any(job.progress or job.previews for job in jobs):  # once a second, to be cancelled
            seconds = self._seconds_an_image * self.limits.batch_size / first.run_steps
            every = min(max(1, int(1 / seconds)), first.run_steps)
        images: Sequence[np.ndarray | None] = []
        failure: Exception = UserError(f"the image is {WHAT}: {CURE}")
        try:
            asked = [(job.generation, index) for job, index in batch]
            images = self._renderer(asked, on_step, every)
        except UserError as error:
            failure = error
        except Exception:
            failure = BatchFailed("the batch failed")
            if not all(job.cancelled for job in jobs):
                LOG.exception("a batch failed")
        seconds = time.monotonic() - began
        self._running, self._began = [], None
        if images:
            self._compiled.add(first.program)
            self.on_batch(first, len(batch), seconds, new)
            if not new:
                self._seconds_an_image += 0.2 * (seconds / len(batch) - self._seconds_an_image)
        for (job, index), pixels in zip(batch, images or [None] * len(batch)):
            if pixels is not None:
                job.done += 1
                job.tell(Done(index, pixels))
            elif not job.cancelled:
                job.tell(Failed(failure))
                self.cancel(job)


def _unavailable(state: str) -> Unavailable:
    return Unavailable(f"the server is {state}: try again later", state)


def _preview_at(step: int, steps: int, previews: int) -> int | None:
    """Which of ``previews`` previews, evenly spaced, is due after a step; None where none is."""
    due = [round(steps * (n + 1) / (previews + 1)) for n in range(previews)]
    return due.index(step) if step in due and step < steps else None
