"""The main job without a person (`./deploy/demo --check`): two users log in, start, run a cell, are compared, stop."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from rich.console import Console
from rich.table import Table

from ds01spawner.containers.cgroups import Mounts, find_mounts, read_cgroup, read_limits
from ds01spawner.containers.engine import Engine
from ds01spawner.containers.facts import ContainerFacts
from ds01spawner.containers.network import network_name
from ds01spawner.ledger.store import Ledger
from ds01spawner.model import Allocation, Inventory
from ds01spawner.policy.load import read_policy
from ds01spawner.policy.resolve import offered_profiles, resolve
from ds01spawner.policy.schema import Policy, Profile

from .check import Expected, Row, Seen, cell, compare, parse_cell
from .client import ClientFailed, Person
from .instance import Plan

USERS: Mapping[str, str] = {"student1": "small", "researcher1": "whole"}
"""Who starts which profile; on a box that has no such units, what the form preselects."""

OTHER, HOST, HUB = "another user's server", "another port of the host", "the Hub"


class CheckFailed(Exception):
    """A part of the main job could not be done at all; the message says which."""


@dataclass(frozen=True)
class Started:
    """One running server of the check."""

    person: Person
    profile: Profile
    allocation: Allocation
    container: ContainerFacts


@dataclass
class MainJob:
    """One run of the check against a running demo.

    Args:
        plan: of the demo. console: where the tables go. say: tells what happens now.
    """

    plan: Plan
    console: Console
    say: Callable[[str], None]

    def run(self) -> bool:
        """Do it all; True if everything that was compared is equal.

        Raises:
            CheckFailed: something could not be done at all.
        """
        self.settings = self.plan.resolved()
        self.policy = self._policy()
        engine, ledger = Engine(), Ledger.open(self.settings.url)
        with contextlib.closing(engine), contextlib.closing(ledger):
            try:
                return self._run(engine, ledger)
            except ClientFailed as error:
                raise CheckFailed(str(error)) from error

    def _run(self, engine: Engine, ledger: Ledger) -> bool:
        people = [Person(self.plan.url, name, self.plan.passwords[name]) for name in USERS]
        for person in people:
            self.say(f"{person.name} logs in through the form")
            person.log_in()
        rows: dict[str, list[Row]] = {
            "the forms": [row for person in people for row in self._form_rows(person, ledger)]
        }
        profiles = {person.name: self._profile_for(person) for person in people}
        self.say("both start: " + ", ".join(f"{name} {profile.title}" for name, profile in profiles.items()))
        with ThreadPoolExecutor(len(people)) as pool:
            list(pool.map(lambda person: self._start(person, profiles[person.name]), people))
        started = [self._started(engine, ledger, person, profiles[person.name]) for person in people]
        self.say("each runs a cell through the kernel API")
        rows |= self._look(engine, ledger, started)
        self.say("both stop")
        with ThreadPoolExecutor(len(people)) as pool:
            list(pool.map(Person.stop, people))
        rows["after the stop"] = self._stopped(engine, ledger, started)
        for title, found in rows.items():
            self._print(title, found)
        return all(row.ok for found in rows.values() for row in found)

    # ------------------------------------------------------------------ steps

    def _policy(self) -> Policy:
        loaded = read_policy(self.settings.config_dir)
        if loaded.policy is None:
            raise CheckFailed("the demo's policy is not valid: " + "; ".join(map(str, loaded.problems)))
        return loaded.policy

    def _form_rows(self, person: Person, ledger: Ledger) -> list[Row]:
        """The form offers what the policy does, with the policy's default in front."""
        snapshot = ledger.read_snapshot()
        has_mig = snapshot is not None and snapshot.inventory.has_mig
        limits = resolve(self.policy, person.name, at=datetime.now(timezone.utc), has_mig=has_mig)
        offered = sorted(profile.name for profile in offered_profiles(self.policy, limits))
        _, form = person.spawn_form()
        values = [*form.choices.get("choice", ()), *form.disabled.get("choice", ())]
        shown = sorted({value.partition("/")[0] for value in values})
        wanted = self.policy.profile(None)
        default = f"{wanted.name}/{wanted.default_size}" if wanted else "nothing"
        preselected = dict(form.fields).get("choice", "nothing")
        return [
            Row(f"{person.name} is offered", ", ".join(offered), ", ".join(shown), offered == shown),
            Row(f"{person.name}: preselected", default, preselected, default == preselected),
        ]

    def _profile_for(self, person: Person) -> Profile:
        """The wanted profile if this box has it, else what the form preselects."""
        wanted = USERS[person.name]
        if wanted in self.policy.profiles:
            return self.policy.profiles[wanted]
        _, form = person.spawn_form()
        sent = dict(form.fields)
        key = sent.get("choice", sent.get("profile", "")).partition("/")[0]
        return self.policy.profiles[key]

    def _start(self, person: Person, profile: Profile) -> None:
        chosen = USERS[person.name] in self.policy.profiles
        choice = {"choice": f"{profile.name}/{profile.default_size}"} if chosen else {}
        messages = person.start(**choice)
        self.say(f"{person.name}: {' → '.join(dict.fromkeys(messages))}")

    def _started(self, engine: Engine, ledger: Ledger, person: Person, profile: Profile) -> Started:
        allocation = ledger.find(person.name, "")
        if allocation is None or allocation.container_id is None:
            raise CheckFailed(f"the ledger knows no running server of {person.name}")
        container = engine.inspect_facts(allocation.container_id)
        if container is None or not container.running:
            raise CheckFailed(f"Docker knows no running container of {person.name}")
        return Started(person, profile, allocation, container)

    def _look(self, engine: Engine, ledger: Ledger, started: list[Started]) -> dict[str, list[Row]]:
        snapshot = ledger.read_snapshot()
        if snapshot is None:
            raise CheckFailed("the watcher has written no snapshot of the box")
        instance, inventory = ledger.instance, snapshot.inventory
        mounts = find_mounts(engine.info().cgroup_version)
        network = network_name(instance)
        rows = {}
        with _listener(self.settings.gateway) as host_port:
            for one in started:
                others = [other for other in started if other is not one]
                addresses = {
                    OTHER: (others[0].container.networks.get(network, ""), 8888),
                    HOST: (self.settings.gateway, host_port),
                    HUB: (self.settings.gateway, self.settings.hub_port),
                }
                folders = (
                    "/workspace",
                    *(mount.target for mount in self._expected(one, inventory, network).limits["mounts"]),
                )
                inside = parse_cell(one.person.run_cell(cell(addresses, folders)))
                seen = _seen(one, others, inside, inventory, mounts)
                rows[f"{one.person.name}: {one.profile.title}"] = compare(self._expected(one, inventory, network), seen)
        return rows

    def _expected(self, one: Started, inventory: Inventory, network: str) -> Expected:
        limits = resolve(self.policy, one.person.name, at=datetime.now(timezone.utc), has_mig=inventory.has_mig)
        size = one.profile.sizes[one.profile.default_size]
        return Expected(
            limits=limits,
            ask=size.gpu.ask(),
            image=one.profile.image or "",
            cgroup_root=self.settings.cgroup_root,
            network=network,
            workspaces=self.settings.workspaces,
            homes=self.settings.homes,
            uid_range=self.settings.uid_range,
            simulated=inventory.source == "simulated",
            reachable={HUB: True, OTHER: False, HOST: False},
        )

    @staticmethod
    def _stopped(engine: Engine, ledger: Ledger, started: list[Started]) -> list[Row]:
        """Nothing runs and nothing is held any more; the containers themselves stay, with their files."""
        rows = []
        for one in started:
            name = one.person.name
            now = engine.inspect_facts(one.container.name)
            running = "running" if now is not None and now.running else "not running"
            held = ledger.find(name, "")
            units = [lease.label or lease.unit_uuid for lease in held.leases] if held is not None else []
            rows.append(Row(f"{name}: container", "not running", running, running == "not running"))
            rows.append(Row(f"{name}: GPU units", "none", ", ".join(units) or "none", not units))
        return rows

    def _print(self, title: str, rows: list[Row]) -> None:
        table = Table("", "what", "policy", "found", title=title, title_justify="left", title_style="bold")
        for row in rows:
            mark = "[green]✓[/]" if row.ok else "[bold red]✗[/]"
            table.add_row(mark, row.what, row.expected, row.found, style="" if row.ok else "red")
        self.console.print(table)


def _seen(
    one: Started, others: list[Started], inside: Mapping[str, object], inventory: Inventory, mounts: Mounts
) -> Seen:
    own = read_limits(one.container.pid, mounts)
    parent = own.paths["memory"].rpartition("/")[0]
    units = tuple(unit for lease in one.allocation.leases if (unit := inventory.unit(lease.unit_uuid)) is not None)
    taken = frozenset(lease.unit_uuid for other in others for lease in other.allocation.leases)
    # A lease whose unit the box does not have is told as a unit without a profile, and so as a difference.
    return Seen(one.container, own, replace(read_cgroup(parent, mounts)), inside, one.allocation, units, taken)


@contextlib.contextmanager
def _listener(address: str) -> Iterator[int]:
    """A port of the host on which somebody listens, as any service of the host might."""
    with socket.create_server((address, 0)) as server:
        yield server.getsockname()[1]
