"""The machine's Docker engine and a tiny image for the tests of the containers' room."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tiny_image import TINY_TAG, ensure_tiny

from ds01spawner.containers.engine import Engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The machine's Docker engine."""
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def tiny_image(engine: Engine, require: Callable[[str, str | None], None]) -> str:
    """Reference of a 2 MB image with a shell, HOME-less users and odd inherited labels."""
    require("busybox", ensure_tiny(engine))
    return TINY_TAG
