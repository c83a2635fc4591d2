"""The server under load: clients that never pause, and whether each answer is the one that the same
request got alone.

    python benchmarks/serve_load.py --minutes 10 --clients 100 --requests 256

Starts ``python -m pixart_jax serve`` on the shipped model; sends each of the fixed requests (n = 4,
50 guided steps) alone; then lets the clients send them at random, waiting as Retry-After says.
Prints the shares and rates, and fails where one misses its bound: only 200 and 429; equal images;
batches at least 0.8 full; the engine inside a batch 0.95 of the time; 0.9 of the rate of
sample.py; 99% of the answers within 1.2 times what the queue takes; no thread, memory or
place in the queue that stays.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed.table import flag_parser  # noqa: E402
from pixart_jax.data import shapes  # noqa: E402

BATCH, QUEUE, STEPS, COUNT = 8, 64, 50, 4


def fixed_requests(count: int, steps: int) -> list[dict]:
    scenes = (shapes.scene_at("plain", "eval", n) for n in range(count))
    prompts = (shapes.captions(scene)["short"] for scene in scenes)
    common = {"n": COUNT, "num_inference_steps": steps}
    return [{"prompt": text, "seed": n * 101, **common} for n, text in enumerate(prompts)]


def sample_rate(steps: int, batches: int = 12) -> float:
    """Images a second of sample.py, from the time that more batches take."""

    def seconds(count: int) -> float:
        with tempfile.TemporaryDirectory() as out:
            flags = [
                "--batch-size",
                BATCH,
                "--steps",
                steps,
                "--num-images-per-prompt",
                count,
                "--out",
                out,
            ]
            begin = time.perf_counter()
            call = [sys.executable, "sample.py", "--prompt", "a red star", *map(str, flags)]
            subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
            return time.perf_counter() - begin

    seconds(BATCH)  # compiles
    few = seconds(BATCH)
    return BATCH * batches / (seconds(BATCH * (1 + batches)) - few)


def metric(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))


def held(pid: int) -> tuple[float, int]:
    """(MiB, threads) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory, threads = (
        int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads")
    )
    return memory / 1024, threads


async def load(url: str, pid: int, options) -> dict:
    requests = fixed_requests(options.requests, options.steps)
    limits = httpx.Limits(max_connections=options.clients + 2)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as http:

        async def post(body: dict) -> tuple[int, str, float]:
            answer = await http.post("/v1/images/generations", json=body)
            if answer.status_code != 200:
                return answer.status_code, "", float(answer.headers.get("retry-after", 1))
            images = "".join(one["b64_json"] for one in answer.json()["data"])
            return 200, hashlib.sha256(images.encode()).hexdigest(), 0.0

        while (await http.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.2)
        start = time.perf_counter()
        alone = []
        for n, body in enumerate(requests):
            alone.append((await post(body))[1])
            if n % 16 == 15:
                print(
                    f"alone: {n + 1} of {len(requests)}, {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
        before, memory, begin = (await http.get("/metrics")).text, held(pid), time.perf_counter()
        end, statuses, seconds, wrong = begin + 60 * options.minutes, {}, [], 0

        async def client(number: int) -> None:
            nonlocal wrong
            rng = random.Random(number)
            while (sent := time.perf_counter()) < end:
                n = rng.randrange(len(requests))
                status, digest, wait = await post(requests[n])
                statuses[status] = statuses.get(status, 0) + 1
                if status == 200:
                    seconds.append(time.perf_counter() - sent)
                    wrong += digest != alone[n]
                else:
                    await asyncio.sleep(min(wait, max(0.0, end - time.perf_counter())))

        work = [asyncio.ensure_future(client(n)) for n in range(options.clients)]
        await asyncio.sleep(60 * options.minutes)
        wall, after = time.perf_counter() - begin, (await http.get("/metrics")).text
        await asyncio.gather(*work)
        last = (await http.get("/metrics")).text
    grew = {
        name: metric(after, name) - metric(before, name)
        for name in (
            "pixart_images_total",
            "pixart_busy_seconds_total",
            "pixart_batch_fill_ratio_sum",
            "pixart_batch_fill_ratio_count",
        )
    }
    images, busy, fill, batches = grew.values()
    seconds.sort()
    left = metric(last, "pixart_num_images_waiting") + metric(last, "pixart_num_requests_running")
    now = held(pid)
    return {
        "statuses": statuses, "wrong": wrong, "fill": fill / batches, "busy": busy / wall,
        "rate": images / wall, "p50": seconds[len(seconds) // 2],
        "p99": seconds[int(0.99 * (len(seconds) - 1))], "left": left,
        "more MiB": now[0] - memory[0], "more threads": now[1] - memory[1],
    }  # fmt: skip


def main() -> int:
    parser = flag_parser(__doc__)
    for name, value in (("minutes", 10.0), ("clients", 100), ("requests", 256), ("steps", STEPS)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = parser.parse_args()
    rate = sample_rate(options.steps)
    print(f"sample.py: {rate:.2f} images/s", flush=True)
    command = [sys.executable, "-m", "pixart_jax", "serve", "--port", "0", "--no-page"]
    command += ["--batch-size", str(BATCH), "--max-queue", str(QUEUE), "--timeout", "600"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            url = server.stdout.readline().split(" at ")[1].split()[0]
            found = asyncio.run(load(url, server.pid, options))
        finally:
            server.terminate()
    found["share of sample.py's rate"] = found["rate"] / rate
    found["p99 in queues"] = found["p99"] / ((QUEUE + BATCH) / found["rate"])
    for name, value in found.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    good = {
        "only 200 and 429": set(found["statuses"]) <= {200, 429},
        "every image as alone": not found["wrong"],
        "fill >= 0.8": found["fill"] >= 0.8,
        "busy >= 0.95": found["busy"] >= 0.95,
        "rate >= 0.9": found["share of sample.py's rate"] >= 0.9,
        "p99 <= 1.2 queues": found["p99 in queues"] <= 1.2,
        "nothing stays": not found["left"]
        and found["more threads"] <= 8
        and found["more MiB"] < 200,
    }
    print("\n".join(f"{'ok  ' if value else 'MISS'} {name}" for name, value in good.items()))
    return 0 if all(good.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
