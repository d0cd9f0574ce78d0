"""Load on a server over loopback: throughput, time to first token and memory.

    python benchmarks/server_load.py nano --clients 1 4 16 --seconds 60 [--bad]

Starts the server, then so many clients, each of which asks again and again about one of some images
and reads the streamed answer. With ``--bad``, one client of each kind in bad_clients.py is beside
them. A request is lost if its answer has no end. Exit code 1: one was lost, or a bad client got
another answer than it should.
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
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from bad_clients import Outcomes, misbehave
from PIL import Image

QUESTIONS = ("Describe the picture.", "What is in the center?", "How many shapes are there?")


@dataclass
class Seen:
    """Measurements of one round's clients."""

    first: list[float] = field(default_factory=list)
    """Seconds to the first piece of each answer"""
    tokens: int = 0
    lost: int = 0
    bad: dict[str, Outcomes] = field(default_factory=dict)
    """Requests of each bad client by what became of them"""

    @property
    def wrong(self) -> int:
        """Requests of bad clients that got a wrong answer."""
        found = sum(self.bad.values(), Counter[str]())
        return sum(count for outcome, count in found.items() if outcome.endswith("(wrong)"))


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
    try:
        async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            async for line in response.aiter_lines():
                ended = ended or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if not first and event["choices"] and event["choices"][0]["delta"].get("content"):
                    first = time.perf_counter() - start
                seen.tokens += (event.get("usage") or {}).get("completion_tokens", 0)
    except httpx.HTTPError as error:
        print(f"lost: {error!r}", file=sys.stderr)
    if not ended:
        seen.lost += 1
        return
    seen.first.append(first or time.perf_counter() - start)


async def round_of(
    address: str, clients: int, seconds: float, max_tokens: int, with_bad: bool
) -> Seen:
    """Let so many clients ask for so long."""
    seen, shown = Seen(), images(8)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        end = time.perf_counter() + seconds

        async def ask(index: int) -> None:
            count = index
            while time.perf_counter() < end:
                asked = body(shown[count % 8], QUESTIONS[count % 3], max_tokens)
                await one(client, asked, seen)
                count += 1

        bad = asyncio.ensure_future(misbehave(address)) if with_bad else None
        await asyncio.gather(*map(ask, range(clients)))
        if bad is not None:
            bad.cancel()
            seen.bad = await bad
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
    parser.add_argument("--bad", action="store_true", help="bad clients beside them")
    given = parser.parse_args()
    program = [sys.executable, "-m", "mobilevlm", "serve", given.model, "--port", "0"]
    rounds: list[Seen] = []
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = re.findall(r"http://\S+", server.stderr.readline())[0]
        told: deque[str] = deque(maxlen=20)
        threading.Thread(target=told.extend, args=(server.stderr,), daemon=True).start()
        print(
            "| clients | answers/s | tokens/s | first token p50 | p99 | lost | MB before → after |"
        )
        print("|---|---|---|---|---|---|---|")
        for clients in given.clients:
            before, start = resident_mb(address), time.perf_counter()
            seen = asyncio.run(
                round_of(address, clients, given.seconds, given.max_tokens, given.bad)
            )
            took = time.perf_counter() - start
            p50, p99 = np.percentile(seen.first, [50, 99]) * 1000
            print(
                f"| {clients} | {len(seen.first) / took:.1f} | {seen.tokens / took:.0f} | "
                f"{p50:.0f} ms | {p99:.0f} ms | {seen.lost} | "
                f"{before:.0f} → {resident_mb(address):.0f} |",
                flush=True,
            )
            rounds.append(seen)
        server.terminate()
    for clients, seen in zip(given.clients, rounds, strict=True):
        for name, outcomes in seen.bad.items():
            shown = ", ".join(f"{count} × {told}" for told, count in outcomes.most_common())
            print(f"beside {clients}: {name}: {shown or 'still at it'}")
    sys.exit(any(seen.lost or seen.wrong for seen in rounds))


if __name__ == "__main__":
    main()
