"""What the ledger's tests share: a clock to turn, units to hand out, decisions to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from uuid import uuid4

from sqlalchemy import create_engine, make_url, text

from ds01spawner.ledger.store import Claim, Ledger
from ds01spawner.model import Admission, Allocation, Limit, Limits, Request, Resources, Unit, Usage


class Clock:
    """A wall clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, 0, tzinfo=timezone.utc)

    def __call__(self) -> datetime:
        return self.now

    def turn(self, **parts: float) -> None:
        """Move by timedelta(**parts), backwards too."""
        self.now += timedelta(**parts)


def unit(number: int) -> Unit:
    """Unit `number`: a 1g.5gb of GPU `number // 7`, or GPU 9 as a whole for 63."""
    if number == 63:
        return Unit("GPU-9", "GPU-9", 9, "A100", 40 << 30)
    return Unit(f"MIG-{number}", f"GPU-{number // 7}", number // 7, "A100", 5 << 30, 1, 1, 7, 8, number % 7, "1g.5gb")


def claim(user: str = "alice", server_name: str = "", group: str | None = "researchers") -> Claim:
    """Somebody of a group."""
    return Claim(user, server_name, group, (group,) if group else (), 70000)


def admission(*units: Unit, image: str = "image:1") -> Admission:
    """A "yes" with these units."""
    limits = Limits("alice", "researchers", ("researchers",), {"max_cpus": Limit(8.0, "group researchers")})
    return Admission(Request(profile="torch"), limits, image, units, Resources(8.0, 1 << 30, None, None, 4096))


def granting(*units: Unit) -> Callable[[Usage], Admission]:
    """A decision that grants whatever is held."""
    return lambda _usage: admission(*units)


def bound(ledger: Ledger, allocation: Allocation, container: str = "") -> Allocation:
    """Bind a made-up container."""
    return ledger.bind(
        allocation.id,
        container_id=container or f"container-{allocation.token}",
        container_name="main._.70000",
        image="image:1",
        spec_hash="hash",
    )


def running(ledger: Ledger, *units: Unit, user: str = "alice", server_name: str = "") -> Allocation:
    """A whole start."""
    allocation = ledger.reserve(claim(user, server_name), granting(*units))
    return ledger.activate(bound(ledger, allocation).id)


def held(allocation: Allocation | None) -> set[str]:
    """Uuids of the live leases."""
    assert allocation is not None
    return {lease.unit_uuid for lease in allocation.leases}


@contextmanager
def empty_schema(url: str) -> Iterator[str]:
    """URL of a fresh schema of a PostgreSQL database; dropped afterwards."""
    name = f"ds01_{uuid4().hex[:12]}"
    base = make_url(url)
    if base.drivername == "postgresql":
        base = base.set(drivername="postgresql+psycopg2")
    engine = create_engine(base, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE SCHEMA {name}"))
        inside = base.update_query_dict({"options": f"-csearch_path={name}"})
        yield inside.render_as_string(hide_password=False)
        with engine.connect() as connection:
            connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
    finally:
        engine.dispose()
