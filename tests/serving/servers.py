"""Servers for tests: the real API over a renderer that only waits, or over the shipped model."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from PIL import Image

from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.serving import api
from pixart_jax.serving.engine import Engine
from pixart_jax.serving.offer import Offer

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "assets" / "shapes"


class StubRenderer:
    """Images of one color, the seed's; ``seconds`` a step."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.batches, self.every = seconds, [], []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, images, on_step, every):
        self.every.append(every)
        self.batches.append([(generation, index) for generation, index in images])
        first = images[0][0]
        latents = np.zeros((len(images), 2, 2, 4), np.float32)
        for step in range(first.run_steps):
            self.gate.wait(20)
            if self.seconds:
                time.sleep(self.seconds)
            if (step + 1) % every == 0:
                on_step(step + 1, latents)
        if "explode" in first.prompt:
            raise RuntimeError("secret detail")
        shape = first.height, first.width, 3
        return [
            None if "infinite" in d.prompt else np.full(shape, (d.seed + k) % 2**64 % 251, np.uint8)
            for d, k in images
        ]

    def preview(self, latents):
        return np.zeros((2, 2, 3), np.uint8)


def stub_service(renderer=None, offer=None):
    """(Service, its StubRenderer); the engine is not started."""
    renderer = renderer or StubRenderer()
    offer = offer or Offer.of(ModelFolder.open(SHIPPED), adapters=["heart"])
    return api.Service(Engine(lambda: renderer), offer), renderer


@contextlib.contextmanager
def listening(app):
    """The app behind a real socket; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    limit = time.monotonic() + 60
    while not server.started and time.monotonic() < limit:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def in_process(app, **options):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **options)


def png(size=(64, 64), mode="RGB", color=(9, 9, 9)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "png")
    return file.getvalue()
