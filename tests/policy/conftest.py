"""Hypothesis on shared machines: the same examples every time, and no deadline that a busy core could miss."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
