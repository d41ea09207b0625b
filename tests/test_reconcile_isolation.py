"""The network rules are looked at every minute, put back, and an admin is told once where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from reconcile_world import World

from ds01spawner.errors import Code, HostError
from ds01spawner.reconcile import isolation
from ds01spawner.reconcile.alerts import open_alerts
from ds01spawner.reconcile.isolation import guard_isolation
from ds01spawner.settings import Settings


class Rules:
    """The host's rules as values: what is missing, and why they cannot be put back."""

    def __init__(self) -> None:
        self.missing: tuple[str, ...] = ()
        self.fails = ""
        self.written = 0

    def verify(self, bridge: str, gateway: str, ports: tuple[int, ...]) -> tuple[str, ...]:
        assert bridge.startswith("ds01-") and gateway == "172.31.240.1" and ports == (8081, 8082)
        return self.missing

    def ensure(self, bridge: str, gateway: str, ports: tuple[int, ...]) -> None:
        if self.fails:
            raise HostError(self.fails, code=Code.NETWORK_NOT_ENFORCED)
        self.written += 1
        self.missing = ()


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Rules:
    made = Rules()
    monkeypatch.setattr(isolation, "verify_rules", made.verify)
    monkeypatch.setattr(isolation, "ensure_rules", made.ensure)
    return made


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.runtime.settings = Settings(state_dir=tmp_path)
    yield made
    made.close()


def test_reconcile_isolation_that_is_in_place_is_left(world: World, rules: Rules) -> None:
    assert guard_isolation(world.runtime) == ()
    assert not rules.written and not world.ledger.audit_rows()


def test_reconcile_isolation_that_was_taken_away_is_put_back(world: World, rules: Rules) -> None:
    rules.missing = ("IPv4 chain DS01-X is not there",)
    assert guard_isolation(world.runtime) == ("IPv4 chain DS01-X is not there",)
    assert rules.written == 1
    (row,) = world.ledger.audit_rows()
    assert row.action == "network.repair" and "DS01-X" in row.reason
    assert guard_isolation(world.runtime) == ()


def test_reconcile_isolation_that_cannot_be_put_back_is_told_once(world: World, rules: Rules) -> None:
    rules.missing, rules.fails = ("gone",), "iptables is not installed"
    for _ in range(3):
        guard_isolation(world.runtime)
        world.pass_()
        world.turn(minutes=1)
    assert open_alerts(world.ledger) == {("network_open", "network", "")}
    (row,) = world.ledger.audit_rows(action="alert.raised")
    assert "iptables is not installed" in row.reason
    rules.fails = ""
    guard_isolation(world.runtime)
    assert not open_alerts(world.ledger)


@pytest.mark.parametrize("fields", [{"unsafe_no_isolation": True}, {"network_mode": "host"}])
def test_reconcile_isolation_is_not_looked_at_where_there_is_none(
    world: World, rules: Rules, fields: dict[str, object]
) -> None:
    rules.missing = ("all of it",)
    world.runtime.settings = Settings.model_validate({"unsafe_no_isolation": True, **fields})
    assert guard_isolation(world.runtime) == () and not rules.written
