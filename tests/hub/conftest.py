"""One real Hub per test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_hub import LiveHub, live_hub


@pytest.fixture(scope="module")
def hub(demo_image: str) -> Iterator[LiveHub]:
    """A running Hub with real containers, the demo's policy and the simulated box."""
    with live_hub(demo_image) as running:
        yield running
