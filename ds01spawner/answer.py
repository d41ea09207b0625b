"""Does a server answer on HTTP? The Hub asks the same question later, with growing pauses; a start asks it often."""

from __future__ import annotations

import asyncio

TIMEOUT_S = 5.0
"""For one question; a server under load may take seconds for its first answer."""


async def answers(address: str, port: int, path: str) -> bool:
    """True if something at address:port answers a GET of `path` with any status below 500 (the Hub's own rule)."""
    try:
        return await asyncio.wait_for(_status(address, port, path), TIMEOUT_S) < 500
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.TimeoutError):
        return False


async def _status(address: str, port: int, path: str) -> int:
    reader, writer = await asyncio.open_connection(address, port, limit=4096)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}:{port}\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        line = (await reader.readline()).decode("ascii", "replace").split()
    finally:
        writer.close()
    if len(line) < 2 or not line[0].startswith("HTTP/"):
        raise ValueError("not an HTTP answer")
    return int(line[1])
