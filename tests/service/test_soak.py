"""Hours in minutes: LLM_BOOST_SOAK=600 make test TESTS=tests/service/test_soak.py (LLM_BOOST_SOAK_MODEL).

A thousand connections stay open, 256 streams run at a time, some of their clients leave early. Nothing may be
lost, every block must come back, and memory may not grow once the KV cache was filled: give it minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from pathlib import Path

import httpx
import pytest
from test_process import served

from golden import model_dir

SECONDS = float(os.environ.get("LLM_BOOST_SOAK", "0"))
MODEL = os.environ.get("LLM_BOOST_SOAK_MODEL", str(model_dir("qwen2")))
CONNECTIONS, STREAMS, TOKENS = 1000, 256, 40

pytestmark = pytest.mark.skipif(not SECONDS, reason="needs LLM_BOOST_SOAK, the seconds that it may take")


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def stream(host: str, port: int, number: int, leaves: bool) -> int:
    """Tokens that came; 0 for a client that left on purpose."""
    reader, writer = await asyncio.open_connection(host, port)
    request = {
        "prompt": f"{number} once upon a time",
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    body = json.dumps({**request, "stream_options": {"include_usage": True}}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    received = b""
    while chunk := await reader.read(65536):
        received += chunk
        if leaves:
            writer.close()
            return 0
    writer.close()
    assert b"data: [DONE]" in received, received[-300:]
    return int(received.rpartition(b'"completion_tokens":')[2].partition(b",")[0])


async def soak(host: str, port: int, pid: int) -> tuple[int, int, list[int]]:
    """(streams that ended, tokens, resident bytes at each tenth of the time)."""
    idle = [await asyncio.open_connection(host, port) for _ in range(CONNECTIONS)]
    end = time.monotonic() + SECONDS
    done = tokens = 0
    sizes: list[int] = []

    async def one_after_another(number: int) -> None:
        nonlocal done, tokens
        chance = random.Random(number)
        while time.monotonic() < end:
            leaves = chance.random() < 0.1
            came = await stream(host, port, number, leaves)
            assert leaves or came == TOKENS
            done, tokens = done + 1, tokens + came

    async def watch() -> None:
        for _ in range(10):
            await asyncio.sleep(SECONDS / 10)
            sizes.append(resident_bytes(pid))

    await asyncio.gather(watch(), *(one_after_another(number) for number in range(STREAMS)))
    for _, writer in idle:
        writer.close()
    return done, tokens, sizes


def test_soak(packed: Path) -> None:
    arguments = ("--port", "0", "--max_num_seqs", "256", "--log_level", "warning", "--max_model_len", "512")
    with served(MODEL, *arguments, cache=packed) as (process, address):
        host, port = address.removeprefix("http://").split(":")
        done, tokens, sizes = asyncio.run(soak(host, int(port), process.pid))
        resource = httpx.get(f"{address}/v1/status").json()["resource"]
    print(
        f"{done} streams, {tokens / SECONDS:.0f} tokens/s, {sizes[0] / 1e6:.0f} to {sizes[-1] / 1e6:.0f} MB"
    )
    assert done > STREAMS
    assert resource["freeNpuBlockNums"] == resource["totalNpuBlockNums"]
    assert resource["runningRequestNum"] == resource["waitingRequestNum"] == 0
    # The KV cache becomes resident as it is used for the first time: memory is flat from then on.
    assert max(sizes[8:]) < 1.02 * max(sizes[5:8]) + 2**24
