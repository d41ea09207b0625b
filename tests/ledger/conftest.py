"""The ledger's tests run against SQLite, and against PostgreSQL as well when DS01_TEST_POSTGRES names one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_world import Clock, empty_schema

from ds01spawner.ledger.store import Ledger

POSTGRES = os.environ.get("DS01_TEST_POSTGRES", "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ledger_url" in metafunc.fixturenames:
        backends = ["sqlite"]
        if POSTGRES:
            backends.append(pytest.param("postgres", marks=pytest.mark.postgres))
        metafunc.parametrize("ledger_url", backends, indirect=True)


@pytest.fixture
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty ledger database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/state/ledger.sqlite"
    else:
        with empty_schema(POSTGRES) as url:
            yield url


@pytest.fixture
def clock() -> Clock:
    """A clock to turn by hand."""
    return Clock()


@pytest.fixture
def ledger(ledger_url: str, clock: Clock) -> Iterator[Ledger]:
    """An open, empty ledger with that clock."""
    with Ledger.open(ledger_url, clock=clock) as opened:
        yield opened
