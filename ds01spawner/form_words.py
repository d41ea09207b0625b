"""Plain words for amounts: what a person reads on a card. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .admission_words import amount
from .errors import Code, Refusal
from .gpu.mig import parse_name
from .model import GpuAsk, GpuKind, Unit
from .policy.quantity import format_duration

_GIB = 2**30
_MIB = 2**20


def size_text(size: int | None) -> str:
    """Bytes as people say them: "32 GB", "1.5 GB", "512 MB" (binary multiples, as in `docker run -m 32g`)."""
    if size is None:
        return "no limit"
    if size >= _GIB:
        return f"{amount(size / _GIB)} GB"
    return f"{amount(size / _MIB)} MB"


def cores_text(cores: float | None) -> str:
    """Cores as people say them: "8 CPU cores", "half a core" is "0.5 CPU cores"."""
    if cores is None:
        return "all CPU cores"
    return "1 CPU core" if cores == 1 else f"{amount(cores)} CPU cores"


def wait_text(seconds: float) -> str:
    """A wait in words, rounded up to minutes: "in about 12m"."""
    minutes = max(1, -(-int(seconds) // 60))
    return f"in about {format_duration(minutes * 60)}"


def gpu_text(ask: GpuAsk, granted: Sequence[Unit]) -> str:
    """The GPU part in a few words: "1 slice of a GPU, 5 GB", "2 whole GPUs, 80 GB each", "no GPU"."""
    if ask.count == 0:
        return "no GPU"
    if not granted:
        return {GpuKind.MIG: "slice of a GPU", GpuKind.FULL: _count("whole GPU", ask.count)}.get(
            ask.kind, _count("GPU", ask.count)
        )
    memory = _memory_text(min(granted, key=lambda unit: unit.memory_bytes))
    thing = "whole GPU" if all(unit.whole for unit in granted) else "GPU slice"
    return f"{_count(thing, len(granted))} with {memory}" + (" each" if len(granted) > 1 else "")


def _memory_text(unit: Unit) -> str:
    """A unit's memory by its usual name: a 1g.5gb slice is "5 GB", though programs see 4.75 of them."""
    named = parse_name(unit.mig_profile) if unit.mig_profile else None
    return f"{named.memory_gb} GB" if named else f"{max(1, round(unit.memory_bytes / _GIB))} GB"


def plain_title(ask: GpuAsk, granted: Sequence[Unit]) -> str:
    """A title for a size that has none."""
    text = gpu_text(ask, granted)
    return text[:1].upper() + text[1:]


def _count(thing: str, number: int) -> str:
    return f"1 {thing}" if number == 1 else f"{number} {thing}s"


BADGES: Mapping[Code, str] = {
    Code.NO_GPU: "none free now",
    Code.USER_COUNT: "your quota is used",
    Code.USER_QUOTA: "your quota is used",
    Code.GROUP_QUOTA: "your group's quota is used",
    Code.TOO_MANY_SERVERS: "too many servers",
    Code.INVENTORY_STALE: "not known now",
    Code.IMAGE_MISSING: "image missing",
}
"""Why a card cannot start, in three words; the sentence of the refusal stands below it."""


def badge_text(code: Code | None, free: int | None, total: int | None) -> str:
    """The state of a card at a glance: "3 of 7 free now", "your quota is used"."""
    if code is not None:
        return "not on this server" if code is Code.NO_GPU and total == 0 else BADGES.get(code, "not now")
    return "can start now" if free is None else f"{free} of {total} free now"


def reason_text(refusal: Refusal) -> str:
    """Why a card cannot start, for its face: the refusal's sentence, without NVIDIA's names where they stand in it.

    The sentence itself is shown under Details.
    """
    if refusal.code is not Code.NO_GPU:
        return refusal.message
    facts = refusal.facts
    if facts.get("suitable", 0) < facts.get("asked", 1):
        return "This server has no such GPU at the moment."
    parts = [
        f"{facts[key]} {text}"
        for key, text in (
            ("leased", "held by servers, running or stopped a short while ago"),
            ("external", "used by something outside this service"),
            ("unhealthy", "out of order"),
        )
        if facts.get(key)
    ]
    return f"Of {facts['suitable']} that would do: {', '.join(parts)}."
