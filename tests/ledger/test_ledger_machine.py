"""A machine of arbitrary steps, deaths and clock jumps over the real ledger, beside a model of a few lines.

After every step: one live lease per unit, tokens only grow, usage and every allocation equal the model.
`DS01_LONG=1` runs 2,000 examples instead of 200.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from ledger_world import Clock, admission, claim, empty_schema, unit
from sqlalchemy import event, func, select

from ds01spawner.errors import Code, LedgerError, Refusal, UnitTaken
from ds01spawner.ledger import tables
from ds01spawner.ledger.store import Ledger
from ds01spawner.model import Admission, State, Usage

LONG = os.environ.get("DS01_LONG") == "1"
UNITS = 5
SERVERS = [("alice", ""), ("alice", "two"), ("bob", "")]
LIMIT = 3
"""Units one user may hold: what the made-up decision counts."""


class Died(BaseException):
    """The process is gone at this very point."""


@dataclass
class Row:
    """What the model knows of one allocation. `units`: number → (wanted, held before this reserve)."""

    id: int
    token: int
    state: State
    units: dict[int, tuple[bool, bool]]
    container_token: int | None = None
    ever_active: bool = False
    first_started: datetime | None = None
    stopped: datetime | None = None


@dataclass
class Model:
    """Live allocations by server, and the counters."""

    live: dict[tuple[str, str], Row] = field(default_factory=dict)
    ids: int = 0
    tokens: int = 0
    changes: int = 0

    def units(self, *, but: tuple[str, str]) -> set[int]:
        return {number for server, row in self.live.items() if server != but for number in row.units}

    def settle(self, row: Row) -> None:
        if row.container_token is not None:
            row.token = row.container_token

    def stop(self, row: Row, now: datetime) -> None:
        if row.state is State.RESERVED:
            self.settle(row)
        if row.state is State.ACTIVE or row.stopped is None:
            row.stopped = now
        row.state = State.HELD


SERVER = st.sampled_from(SERVERS)
DEATH = st.sampled_from(["", "", "", "", "before commit", "after commit"])


class LedgerMachine(RuleBasedStateMachine):
    """The ledger under arbitrary use."""

    template: Path | None = None
    schema: Callable[[], object] = staticmethod(nullcontext)

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        if self.template is not None:
            folder = self.stack.enter_context(_fast_folder())
            shutil.copy(self.template, folder / "ledger.sqlite")
            self.url = f"sqlite:///{folder}/ledger.sqlite"
        else:
            self.url = str(self.stack.enter_context(self.schema()))  # type: ignore[arg-type]
        self.clock = Clock()
        self.made = 0
        self.model = Model()
        self.ledger = Ledger.open(self.url, clock=self.clock)

    def teardown(self) -> None:
        self.ledger.close()
        self.stack.close()

    # ----------------------------------------------------------------- how a step happens

    def step(self, death: str, real: Callable[[], object], model: Callable[[], None]) -> None:
        """Do it; die before or after its commit; then the model does it too, if it was committed."""
        if death == "before commit":

            def die(_connection: object) -> None:
                raise Died

            event.listen(self.ledger._db._engine, "commit", die)
            with pytest.raises(Died):
                real()
            self.reopen()
            return
        real()
        model()
        self.model.changes += 1
        if death == "after commit":
            self.reopen()

    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = Ledger.open(self.url, clock=self.clock)

    def refused(self, real: Callable[[], object], error: type[Exception] = LedgerError) -> None:
        with pytest.raises(error):
            real()

    def row(self, server: tuple[str, str]) -> Row | None:
        return self.model.live.get(server)

    def rows_of(self, user: str) -> list[Row]:
        return [row for server, row in self.model.live.items() if server[0] == user]

    # ----------------------------------------------------------------- rules

    @rule(server=SERVER, wanted=st.sets(st.integers(0, UNITS - 1), max_size=3), death=DEATH)
    def reserve(self, server: tuple[str, str], wanted: set[int], death: str) -> None:
        user, name = server
        others = self.model.units(but=server)
        held = [row.units for key, row in self.model.live.items() if key[0] == user and key != server]
        over = sum(map(len, held)) + len(wanted) > LIMIT

        def decide(usage: Usage) -> Admission:
            if usage.units_of(user) + len(wanted) > LIMIT:
                raise Refusal(Code.USER_COUNT, "too many")
            return admission(*map(unit, sorted(wanted)))

        def real() -> None:
            self.made = self.ledger.reserve(claim(user, name), decide).id

        if over:
            self.refused(real, Refusal)
        elif wanted & others:
            self.refused(real, UnitTaken)
        else:
            self.step(death, real, lambda: self.reserved(server, wanted))

    def reserved(self, server: tuple[str, str], wanted: set[int]) -> None:
        row = self.row(server)
        if row is None:
            assert self.made > self.model.ids  # PostgreSQL's numbers have gaps after a rollback
            self.model.ids = self.made
            self.model.tokens += 1
            units = dict.fromkeys(wanted, (True, False))
            self.model.live[server] = Row(self.model.ids, self.model.tokens, State.RESERVED, units)
            return
        before = {number: (number in wanted, old) for number, (_, old) in row.units.items()}
        row.units = {number: before.get(number, (True, False)) for number in wanted | before.keys()}
        row.state = State.RESERVED
        self.model.settle(row)

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), death=DEATH, new=st.booleans())
    def bind(self, data: st.DataObject, death: str, new: bool) -> None:
        row = self.model.live[data.draw(st.sampled_from(sorted(self.model.live)))]
        if new or row.container_token is None:

            def renewed() -> None:
                self.model.tokens += 1
                row.token = self.model.tokens

            self.step("after commit" if death else "", lambda: self.ledger.renew_token(row.id), renewed)
            if death:
                return

        def bound() -> None:
            row.container_token = row.token

        self.step(
            death,
            lambda: self.ledger.bind(
                row.id, container_id=f"c{row.token}", container_name="n", image="i", spec_hash="h"
            ),
            bound,
        )

    @rule(server=SERVER, death=DEATH)
    def activate(self, server: tuple[str, str], death: str) -> None:
        row = self.row(server)
        if row is None:
            return
        if row.state is not State.RESERVED or row.container_token != row.token:
            self.refused(lambda: self.ledger.activate(row.id))
            return

        def activated() -> None:
            long_stop = row.stopped is not None and self.clock.now - row.stopped > timedelta(minutes=10)
            if row.first_started is None or long_stop:
                row.first_started = self.clock.now
            row.stopped, row.state, row.ever_active = None, State.ACTIVE, True
            row.units = {number: (True, True) for number, (wanted, _) in row.units.items() if wanted}

        self.step(death, lambda: self.ledger.activate(row.id), activated)

    @rule(server=SERVER, death=DEATH)
    def hold(self, server: tuple[str, str], death: str) -> None:
        row = self.row(server)
        if row is None:
            return

        def real() -> None:
            self.ledger.hold(row.id, until=None, reason="stopped")

        if row.state is State.RESERVED:
            self.refused(real)
            return

        def holding() -> None:
            self.model.stop(row, self.clock.now)
            row.units = dict.fromkeys(row.units, (True, True))

        self.step(death, real, holding)

    @rule(server=SERVER, death=DEATH)
    def drop_leases(self, server: tuple[str, str], death: str) -> None:
        row = self.row(server)
        if row is None:
            return
        if row.state is State.RESERVED:
            self.refused(lambda: self.ledger.drop_leases(row.id, ""))
            return

        def dropped() -> None:
            self.model.stop(row, self.clock.now)
            row.units = {}

        self.step(death, lambda: self.ledger.drop_leases(row.id, "hold ended"), dropped)

    @rule(server=SERVER, death=DEATH)
    def rollback(self, server: tuple[str, str], death: str) -> None:
        row = self.row(server)
        if row is None:
            return
        if row.state is not State.RESERVED:
            self.refused(lambda: self.ledger.rollback(row.id, ""))
            return

        def undone() -> None:
            if not row.ever_active:
                del self.model.live[server]
                return
            self.model.stop(row, self.clock.now)
            row.units = {number: (True, True) for number, (_, old) in row.units.items() if old}

        self.step(death, lambda: self.ledger.rollback(row.id, "create failed"), undone)

    @rule(server=SERVER, death=DEATH)
    def release(self, server: tuple[str, str], death: str) -> None:
        row = self.row(server)
        if row is None:
            return
        self.step(death, lambda: self.ledger.release(row.id, "over"), lambda: self.model.live.pop(server) and None)

    @rule(server=SERVER, lost=st.booleans())
    def operation(self, server: tuple[str, str], lost: bool) -> None:
        row = self.row(server)
        if row is None:
            return
        mine = self.ledger.operation(row.id, "stop", "watcher")
        mine.__enter__()
        if not lost:
            mine.__exit__(None, None, None)
            return
        self.ledger._heart.stop()  # the process hangs: its row stays, its heart does not beat
        self.clock.turn(seconds=61)
        self.reopen()
        with self.ledger.operation(row.id, "reconcile", "watcher"):
            self.model.changes += 1  # taking over is audited
        mine.__exit__(None, None, None)

    @rule(seconds=st.sampled_from([-86400, -1, 1, 540, 601, 86400, 10**8]))
    def clock_jumps(self, seconds: int) -> None:
        self.clock.turn(seconds=seconds)

    # ----------------------------------------------------------------- what must always hold

    @invariant()
    def one_live_lease_per_unit(self) -> None:
        query = (
            select(func.count())
            .select_from(tables.leases)
            .where(tables.live(tables.leases))
            .group_by(tables.leases.c.unit_uuid)
        )
        with self.ledger._db.read() as connection:
            assert set(connection.scalars(query)) <= {1}

    @invariant()
    def allocations_equal_the_model(self) -> None:
        found = {(item.user, item.server_name): item for item in self.ledger.allocations()}
        assert found.keys() == self.model.live.keys()
        for server, row in self.model.live.items():
            item = found[server]
            told = (item.id, item.token, item.state, item.container_token, item.first_started_at, item.stopped_at)
            assert told == (row.id, row.token, row.state, row.container_token, row.first_started, row.stopped)
            leases = {lease.unit_uuid: lease.wanted for lease in item.leases}
            assert leases == {unit(number).uuid: wanted for number, (wanted, _) in row.units.items()}

    @invariant()
    def usage_equals_the_model(self) -> None:
        usage = self.ledger.usage(exclude=SERVERS[0])
        assert (usage.own is not None) == (SERVERS[0] in self.model.live)
        assert usage.taken() == {unit(number).uuid for number in self.model.units(but=SERVERS[0])}
        for user in ("alice", "bob"):  # units that wait for an old container to go may come on top, for that server
            wanted = [len([1 for want, _ in row.units.values() if want]) for row in self.rows_of(user)]
            assert sum(wanted) <= LIMIT

    @invariant()
    def tokens_only_grow_and_every_change_is_audited(self) -> None:
        with self.ledger._db.read() as connection:
            assert connection.scalar(select(tables.meta.c.token)) == self.model.tokens
            given = list(connection.scalars(select(tables.tokens.c.token).order_by(tables.tokens.c.token)))
            assert given == list(range(1, self.model.tokens + 1))
            assert connection.scalar(select(func.count()).select_from(tables.audit)) == self.model.changes


@contextmanager
def _fast_folder() -> Iterator[Path]:
    """A folder in memory where the machine has one: what is tested here is not the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


def run(machine: type[LedgerMachine], examples: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    profile = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        derandomize=not LONG,
        database=None,
        suppress_health_check=checks,
        print_blob=True,
        phases=[p for p in Phase if p is not Phase.explain],
    )
    run_state_machine_as_test(machine, settings=profile)


def test_machine_of_arbitrary_steps_deaths_and_clock_jumps_on_sqlite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "ds01spawner.ledger.operations")  # lost operations are meant to be lost
    template = tmp_path / "ledger.sqlite"
    Ledger.open(f"sqlite:///{template}").close()

    class OnSqlite(LedgerMachine):
        pass

    OnSqlite.template = template
    run(OnSqlite, 2000 if LONG else 200)


@pytest.mark.postgres
def test_machine_of_arbitrary_steps_deaths_and_clock_jumps_on_postgres(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "ds01spawner.ledger.operations")
    url = os.environ.get("DS01_TEST_POSTGRES")
    if not url:
        pytest.skip("DS01_TEST_POSTGRES names no database")

    class OnPostgres(LedgerMachine):
        schema = staticmethod(lambda: empty_schema(url))

    run(OnPostgres, 200 if LONG else 15)
