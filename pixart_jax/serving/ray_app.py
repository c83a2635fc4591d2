"""The server as replicas on a Ray cluster: routing, autoscaling, health and draining are Ray
Serve's; each replica has the engine and the app of the command ``serve``.

    serve run pixart_jax.serving.ray_app:app replicas=2 gpus=1 flags="--model PATH"
"""

from __future__ import annotations

import shlex
import time
from typing import Any

from ray import serve

from pixart_jax import cli
from pixart_jax.errors import UserError
from pixart_jax.serving.engine import Engine

_ENGINES: list[Engine] = []  # of this replica's process


def app(args: dict[str, Any]) -> Any:
    """A Ray Serve application. args: replicas; or min_replicas and max_replicas, between which Ray
    scales; gpus or tpus (chips), and cpus, of each replica; flags: of the command ``serve``."""
    known = {"replicas", "min_replicas", "max_replicas", "gpus", "tpus", "cpus", "flags"}
    if unknown := sorted(set(args) - known):
        raise UserError(f"unknown argument {unknown[0]}: one of {', '.join(sorted(known))}")
    flags = str(args.get("flags", ""))

    def build() -> Any:
        """The app, when its engine is ready."""
        from pixart_jax.serving.command import Flags, make_app

        given = cli.parse(Flags, shlex.split(flags), prog="ray_app flags")
        # callers reach the proxy by any name
        found, engine = make_app(given, public=True)
        _ENGINES.append(engine)
        engine.start()
        while engine.state in ("loading", "compiling"):
            time.sleep(0.1)
        return found

    @serve.ingress(build)
    class Replica:
        """A server; Ray replaces it where its engine is stuck or dead."""

        def check_health(self) -> None:
            if not all(engine.alive for engine in _ENGINES):
                raise RuntimeError("the engine is stuck or has ended")

    resources: dict[str, Any] = {"num_cpus": float(args.get("cpus", 1))}
    if "gpus" in args:
        resources["num_gpus"] = float(args["gpus"])
    if "tpus" in args:
        resources["resources"] = {"TPU": float(args["tpus"])}
    options: dict[str, Any] = {
        "num_replicas": int(args.get("replicas", 1)),
        # the engine's own queue answers 429
        "max_ongoing_requests": 128,
        "graceful_shutdown_timeout_s": 60,
    }
    if "max_replicas" in args:
        del options["num_replicas"]
        options["autoscaling_config"] = {
            "min_replicas": int(args.get("min_replicas", 1)),
            "max_replicas": int(args["max_replicas"]),
            "target_ongoing_requests": 16,  # two batches
        }
    deployment = serve.deployment(Replica, name="pixart", ray_actor_options=resources, **options)
    return deployment.bind()
