"""An installation for tests of what the reconciler does: a real ledger, a clock to turn, an engine made of values."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from reconcile_scene import BOX, LIMITS, NOW, container, never_started, picture

from ds01spawner.containers.engine import Engine
from ds01spawner.containers.facts import ContainerFacts
from ds01spawner.errors import EngineError
from ds01spawner.ledger.records import Claim
from ds01spawner.ledger.store import Ledger
from ds01spawner.model import Admission, Allocation, Inventory, Limit, Limits, Request, Resources, Snapshot
from ds01spawner.policy.load import PolicyStore
from ds01spawner.reconcile.findings import Report
from ds01spawner.reconcile.reconciler import Reconciler
from ds01spawner.runtime import Runtime
from ds01spawner.settings import Settings


class FakeEngine(Engine):
    """Containers as values. `fails`: verbs that fail; `calls`: what was asked for; `before`: runs before each list."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        super().__init__()
        self.clock = clock
        self.found: dict[str, ContainerFacts] = {}
        self.calls: list[tuple[str, str]] = []
        self.fails: dict[str, str] = {}
        self.before: list[Callable[[], None]] = []

    def _do(self, verb: str, container: str) -> None:
        if verb in self.fails:
            raise EngineError(self.fails[verb])
        self.calls.append((verb, container))

    def list_facts(self) -> tuple[ContainerFacts, ...]:
        for step in self.before[:1]:
            self.before.pop(0)
            step()
        if "list" in self.fails:
            raise EngineError(self.fails["list"])
        return tuple(self.found.values())

    def inspect_facts(self, container: str) -> ContainerFacts | None:
        return next((c for c in self.found.values() if container in (c.id, c.name)), None)

    def stop(self, container: str, timeout: int = 10) -> None:
        self._do("stop", container)
        self.change(container, running=False, state="exited", finished=self.clock())

    def remove(self, container: str, *, force: bool = False) -> None:
        self._do("remove", container)
        self.found.pop(container, None)

    def remove_image(self, ref: str) -> bool:
        return True

    # ------------------------------------------------------------- what the outside world does

    def change(self, container: str, **values: Any) -> None:
        """Somebody did something to a container."""
        self.found[container] = replace(self.found[container], **values)

    def run(self, container: str) -> None:
        """`docker start`."""
        self.change(container, running=True, state="running", started=self.clock())

    def die(self, container: str, code: int = 137) -> None:
        """Its process ends."""
        self.change(container, running=False, state="exited", exit_code=code, finished=self.clock())


@dataclass
class World:
    """One installation and what is around it."""

    folder: Path
    now: datetime = NOW
    inventory: Inventory = BOX
    boot: str = "11111111-0000-0000-0000-000000000000"
    fresh: bool = True
    made: int = 0
    hold_after_stop: float | None = 0.0
    ledger: Ledger = field(init=False)
    engine: Any = field(init=False)
    runtime: Runtime = field(init=False)
    reconciler: Reconciler = field(init=False)

    def __post_init__(self) -> None:
        self.engine = self.make_engine()
        self.open(self.folder / "ledger.sqlite")

    def make_engine(self) -> Engine:
        """What stands for Docker."""
        return FakeEngine(self.clock)

    def open(self, path: Path) -> None:
        """Open a ledger with a watcher that begins to look now."""
        self.ledger = Ledger.open(f"sqlite:///{path}", clock=self.clock)
        settings = Settings(state_dir=self.folder, config_dir=self.folder, unsafe_no_isolation=True)
        policies = PolicyStore(self.folder, self.ledger)
        self.runtime = Runtime(settings, self.ledger, self.engine, policies, "test", self.clock)
        self.restart()

    def restart(self) -> None:
        """The watcher is started anew."""
        self.reconciler = Reconciler(self.runtime, self.picture, watching_since=self.clock())

    def close(self) -> None:
        """Close what was opened."""
        self.runtime.close()

    def clock(self) -> datetime:
        return self.now

    def turn(self, **parts: float) -> None:
        """Time passes."""
        self.now += timedelta(**parts)

    def picture(self) -> Snapshot | None:
        """The watcher's newest snapshot."""
        at = self.clock() - timedelta(seconds=0 if self.fresh else 60)
        return picture(self.inventory, at, self.boot)

    def pass_(self, **options: Any) -> Report:
        """One pass of the reconciler."""
        return self.reconciler.run(**options)

    def backup(self, target: Path) -> None:
        """A consistent copy of the ledger, as a backup tool takes it."""
        file = self.folder / "ledger.sqlite"
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy)

    # ------------------------------------------------------------- what the Hub does

    def reserve(self, user: str = "alice", *units: str) -> Allocation:
        """A start begins."""
        values = {key: Limit(value["value"], "test") for key, value in LIMITS["values"].items()}
        values["gpu_hold_after_stop"] = Limit(self.hold_after_stop, "test")
        policies = {key: Limit(value["value"], "test") for key, value in LIMITS["policies"].items()}
        limits = Limits(user, "researchers", ("researchers",), values, policies)
        wanted = tuple(unit for unit in BOX.units if unit.uuid in units)
        yes = Admission(Request(), limits, "image:1", wanted, Resources(1.0, 2**30, None, None, None))
        self.turn(milliseconds=1)
        claim = Claim(user, "", "researchers", ("researchers",), 70000)
        return self.ledger.reserve(claim, lambda _usage: yes)

    def create(self, allocation: Allocation, *units: str) -> str:
        """Its container is created, with a token of its own, and not written down yet."""
        self.turn(milliseconds=1)
        token = self.ledger.renew_token(allocation.id)
        self.made += 1
        new = container(token, *units, number=f"c{self.made}", user=allocation.user, instance=self.ledger.instance)
        made = never_started(replace(new, name=f"main._.{allocation.uid}-{self.made}"))
        self.engine.found[made.id] = replace(made, created=self.now)
        return made.id

    def bind(self, allocation: Allocation, container: str) -> Allocation:
        """The container is written down."""
        return self.ledger.bind(
            allocation.id, container_id=container, container_name=container, image="image:1", spec_hash="x"
        )

    def start(self, user: str = "alice", *units: str) -> Allocation:
        """A whole start."""
        allocation = self.reserve(user, *units)
        made = self.create(allocation, *units)
        self.bind(allocation, made)
        self.engine.run(made)
        return self.ledger.activate(allocation.id)

    def hold(self, allocation: Allocation, **until: float) -> Allocation:
        """The Hub stops it and holds its units for so long."""
        self.engine.die(allocation.container_id or "", 0)
        return self.ledger.hold(allocation.id, until=self.now + timedelta(**until) if until else None, reason="stopped")

    def again(self, allocation: Allocation) -> Allocation:
        """The allocation as it is now."""
        found = self.ledger.get(allocation.id)
        assert found is not None
        return found
