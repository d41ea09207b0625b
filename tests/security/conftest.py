"""One lab for the whole folder: a real Hub, real containers, and people who do not mean well."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "hub"))

from intruder import Lab, lab_of
from live_hub import live_hub


@pytest.fixture(scope="session")
def lab(demo_image: str) -> Iterator[Lab]:
    """A running Hub whose servers are stubs that answer at once; `alice` is the victim, `mallory` attacks."""
    with lab_of(demo_image, live_hub) as running:
        yield running
