"""One real Hub per test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_hub import LiveHub, live_hub
from stub_hub import StubHub, stub_hub


@pytest.fixture(scope="module")
def hub(demo_image: str) -> Iterator[LiveHub]:
    """A running Hub with real containers, the demo's policy and the simulated box."""
    with live_hub(demo_image) as running:
        yield running


@pytest.fixture(scope="session")
def _shared_stub(demo_image: str) -> Iterator[StubHub]:
    with stub_hub(demo_image) as running:
        yield running


@pytest.fixture
def stub(_shared_stub: StubHub) -> Iterator[StubHub]:
    """The one Hub with faults to order, shared by all tests that use it, and swept before each."""
    if _shared_stub.process is None or _shared_stub.process.poll() is not None:
        _shared_stub.end()
        _shared_stub.start()
    _shared_stub.sweep()
    yield _shared_stub
    _shared_stub.no_faults()
