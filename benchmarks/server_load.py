"""Load on a server over loopback: throughput, time to first token and memory.

    python benchmarks/server_load.py nano --clients 1 4 16 --seconds 60

Starts the server, then so many clients, each of which asks again and again about one of some images
and reads the streamed answer.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

QUESTIONS = ("Describe the picture.", "What is in the center?", "How many shapes are there?")


@dataclass
class Seen:
    """Measurements of one round's clients."""

    first: list[float] = field(default_factory=list)
    """Seconds to the first piece of each answer"""
    tokens: int = 0
    failed: int = 0


def images(count: int) -> list[str]:
    """Return data URIs of images of random pixels."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (96, 96, 3), np.uint8)).save(file, "png")
        found.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    return found


def body(image: str, question: str, max_tokens: int) -> dict[str, Any]:
    """Return a request."""
    parts = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": question},
    ]
    return {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def one(client: httpx.AsyncClient, asked: dict[str, Any], seen: Seen) -> None:
    """Ask once."""
    start, first, ended = time.perf_counter(), 0.0, False
    async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        async for line in response.aiter_lines():
            ended = ended or line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if not first and event["choices"] and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - start
            seen.tokens += (event.get("usage") or {}).get("completion_tokens", 0)
    seen.failed += not ended
    seen.first.append(first or time.perf_counter() - start)


async def round_of(address: str, clients: int, seconds: float, max_tokens: int) -> Seen:
    """Let so many clients ask for so long."""
    seen, shown = Seen(), images(8)
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        end = time.perf_counter() + seconds

        async def ask(index: int) -> None:
            count = index
            while time.perf_counter() < end:
                asked = body(shown[count % 8], QUESTIONS[count % 3], max_tokens)
                await one(client, asked, seen)
                count += 1

        await asyncio.gather(*map(ask, range(clients)))
    return seen


def resident_mb(address: str) -> float:
    """Return the server's resident memory."""
    text = httpx.get(f"{address}metrics").text
    [value] = re.findall(r"^mobilevlm_resident_memory_bytes (\S+)", text, re.MULTILINE)
    return float(value) / 1e6


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=48)
    given = parser.parse_args()
    program = [sys.executable, "-m", "mobilevlm", "serve", given.model, "--port", "0"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = re.findall(r"http://\S+", server.stderr.readline())[0]
        print("| clients | answers/s | tokens/s | first token p50 | p99 | failed | resident MB |")
        print("|---|---|---|---|---|---|---|")
        for clients in given.clients:
            start = time.perf_counter()
            seen = asyncio.run(round_of(address, clients, given.seconds, given.max_tokens))
            took = time.perf_counter() - start
            p50, p99 = np.percentile(seen.first, [50, 99]) * 1000
            print(
                f"| {clients} | {len(seen.first) / took:.1f} | {seen.tokens / took:.0f} | "
                f"{p50:.0f} ms | {p99:.0f} ms | {seen.failed} | {resident_mb(address):.0f} |",
                flush=True,
            )
        server.terminate()


if __name__ == "__main__":
    main()
