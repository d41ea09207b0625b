"""Plain words for amounts: what a person reads on a card. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ds01spawner.admission_words import amount
from ds01spawner.errors import Code, Refusal
from ds01spawner.gpu.mig import parse_name
from ds01spawner.model import GpuAsk, GpuKind, Unit
from ds01spawner.policy.quantity import format_duration

_GIB = 2**30
_MIB = 2**20
_TELLS_MEMORY = re.compile(r"\d\s?(?:[GM]i?B|[gm]b)\b")
_NO_TITLE = ("standard", "no gpu")
"""Titles of a size that say nothing where it is the only one (`policy.schema.IMPLICIT_SIZE`)."""


def size_text(size: int | None) -> str:
    """Bytes as people say them: "32 GB", "1.5 GB", "512 MB" (binary multiples, as in `docker run -m 32g`)."""
    if size is None:
        return "no limit"
    if size >= _GIB:
        return f"{amount(size / _GIB)} GB"
    return f"{amount(size / _MIB)} MB"


def cores_text(cores: float | None) -> str:
    """Cores as people say them: "8 cores", "1 core", "0.5 cores"."""
    if cores is None:
        return "all cores"
    return "1 core" if cores == 1 else f"{amount(cores)} cores"


def wait_text(seconds: float) -> str:
    """A wait in words, rounded up to minutes: "in about 12m"."""
    minutes = max(1, -(-int(seconds) // 60))
    return f"in about {format_duration(minutes * 60)}"


def gpu_text(ask: GpuAsk, granted: Sequence[Unit]) -> str:
    """The GPU part in a few words: "5 GB slice", "40 GB, whole", "2 × 40 GB, whole", "none"."""
    if ask.count == 0:
        return "none"
    times = f"{ask.count} × " if ask.count > 1 else ""
    if not granted:
        return times + {GpuKind.MIG: "slice", GpuKind.FULL: "whole"}.get(ask.kind, "any")
    memory = _memory_text(min(granted, key=lambda unit: unit.memory_bytes))
    return f"{times}{memory}, whole" if all(unit.whole for unit in granted) else f"{times}{memory} slice"


def _memory_text(unit: Unit) -> str:
    """A unit's memory by its usual name: a 1g.5gb slice is "5 GB", though programs see 4.75 of them."""
    named = parse_name(unit.mig_profile) if unit.mig_profile else None
    return f"{named.memory_gb} GB" if named else f"{max(1, round(unit.memory_bytes / _GIB))} GB"


def memory_of(units: Sequence[Unit]) -> str:
    """GPU memory of what is granted, "5 GB" or "40 GB each"; "" without a GPU."""
    if not units:
        return ""
    memory = _memory_text(min(units, key=lambda unit: unit.memory_bytes))
    return f"{memory} each" if len(units) > 1 else memory


def sized(title: str, memory: str) -> str:
    """A title with the GPU memory it stands for, unless it says so itself: "Small GPU, 5 GB"."""
    return title if not memory or _TELLS_MEMORY.search(title) else f"{title}, {memory}"


def gives_text(ask: GpuAsk, granted: Sequence[Unit], memory: int | None) -> str:
    """What one gets, for people who know neither MIG nor cgroups: "A slice of a GPU · 16 GB memory"."""
    if ask.count == 0:
        gpu = "No GPU"
    elif ask.count > 1:
        gpu = f"{ask.count} whole GPUs"
    elif granted:
        gpu = "A whole GPU" if granted[0].whole else "A slice of a GPU"
    else:
        gpu = {GpuKind.MIG: "A slice of a GPU", GpuKind.FULL: "A whole GPU"}.get(ask.kind, "A GPU")
    return gpu if memory is None else f"{gpu} · {size_text(memory)} memory"


def instead_text(typical: Sequence[Unit], now: Sequence[Unit]) -> str:
    """What is told where another unit than usual would be given; "" where it is as usual."""
    if not typical or not now:
        return ""
    usual, found = (sum(unit.memory_bytes for unit in units) for units in (typical, now))
    if memory_of(typical) == memory_of(now):
        return ""
    return f"What is free now is {'larger' if found > usual else 'smaller'}: {memory_of(now)}."


def sentence(text: str) -> str:
    """`text` with a capital first and a full stop last."""
    text = text.strip()
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?…" else ".")


def joined_title(profile: str, size: str) -> str:
    """One title for a profile of which one size is offered: not the same twice."""
    one, other = profile.casefold(), size.casefold()
    if not size or other in _NO_TITLE or one.startswith(other):
        return profile
    return size if other.startswith(one) else f"{profile}: {size}"


def unit_words(unit: Unit) -> str:
    """One unit for its holder: "a 5 GB slice of one A100-40GB", "one whole A100-40GB with 40 GB"."""
    memory = _memory_text(unit)
    return f"one whole {unit.model} with {memory}" if unit.whole else f"a {memory} slice of one {unit.model}"


def plain_title(ask: GpuAsk, granted: Sequence[Unit]) -> str:
    """A title for a size that has none."""
    return "No GPU" if ask.count == 0 else f"GPU, {gpu_text(ask, granted)}"


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
    if refusal.code is Code.INVENTORY_STALE:
        return "What is free is not known right now."  # the rest stands once, on top of the form
    if refusal.code is Code.TOO_MANY_SERVERS:
        return "You run as many servers as you may."  # and so does this
    if refusal.code is not Code.NO_GPU:
        return refusal.message
    facts = refusal.facts
    if facts.get("suitable", 0) < facts.get("asked", 1):
        return "This server has no such GPU at the moment."
    total, free = facts["suitable"], facts.get("free", 0)
    parts = [
        (facts[key], text)
        for key, text in (
            ("leased", "held by servers, running or stopped a short while ago"),
            ("external", "used by something outside this service"),
            ("unhealthy", "out of order"),
        )
        if facts.get(key)
    ]
    if not free and len(parts) == 1:
        return f"{'It is' if total == 1 else f'All {total} are'} {parts[0][1]}."
    start = f"Only {free} of {total} {'is' if free == 1 else 'are'} free" if free else f"All {total} are taken"
    return f"{start}: {', '.join(f'{number} {text}' for number, text in parts)}."
