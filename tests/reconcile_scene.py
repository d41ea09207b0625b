"""Values for tests of the reconciler: an installation's allocations, containers and pictures, made in one line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

from ds01spawner.containers import aime
from ds01spawner.containers.facts import ContainerFacts, DeviceNode
from ds01spawner.containers.spec import SIMULATED_FOLDER, SIMULATED_HOST_NODE
from ds01spawner.gpu.simulated import SimulatedGpu, SimulatedUnit, build
from ds01spawner.ledger.records import OperationRow
from ds01spawner.model import Allocation, Inventory, Lease, Snapshot, State
from ds01spawner.reconcile.evidence import Evidence, Origin
from ds01spawner.reconcile.findings import Action, Finding

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc)
INSTANCE = "0a1b2c3d-1111-4222-8333-444444444444"
OTHER = "ffffffff-1111-4222-8333-444444444444"
BOOT = "11111111-0000-0000-0000-000000000000"
POLICIES = {"gpu_hold_after_crash_m": {"value": 15}, "sigterm_grace_s": {"value": 1}}
LIMITS: Mapping[str, Any] = {"values": {"gpu_hold_after_stop": {"value": 0.0}}, "policies": POLICIES}


def ago(**parts: float) -> datetime:
    """So long before NOW."""
    return NOW - timedelta(**parts)


def box(*small: str, whole: int = 1) -> Inventory:
    """Whole GPUs, then one GPU cut into these MIG profiles (none: only whole ones)."""
    gpus = [SimulatedGpu("A100-40GB") for _ in range(whole)]
    if small:
        gpus.append(SimulatedGpu("A100-40GB", units=tuple(SimulatedUnit(name) for name in small)))
    return build(gpus, salt="reconcile")


BOX = box("3g.20gb", "2g.10gb", "1g.5gb")
WHOLE, MIG_3G, MIG_2G, MIG_1G = (unit.uuid for unit in BOX.units)


def picture(inventory: Inventory = BOX, at: datetime = NOW, boot: str = BOOT) -> Snapshot:
    """The watcher's snapshot."""
    return Snapshot(at, inventory, (), boot)


def allocation(
    state: State = State.ACTIVE,
    *units: str,
    number: int = 1,
    token: int = 5,
    container: str | None = "c1",
    container_token: int | None = None,
    user: str = "alice",
    **more: Any,
) -> Allocation:
    """One that was reserved and started an hour ago."""
    values: dict[str, Any] = {
        "created_at": ago(hours=2),
        "reserved_at": ago(hours=1),
        "activated_at": ago(minutes=59),
        "stopped_at": ago(minutes=30) if state is State.HELD else None,
    }
    return Allocation(
        id=number,
        token=token,
        user=user,
        group="researchers",
        groups=("researchers",),
        server_name="",
        state=state,
        uid=70000,
        request={},
        limits=LIMITS,
        leases=tuple(Lease(uuid, 1.0, state, label=uuid[:8]) for uuid in units),
        container_id=container,
        container_name=None if container is None else "main._.70000",
        container_token=container_token if container_token is not None or container is None else token,
        **(values | more),
    )


def container(
    token: int | None = 5,
    *units: str,
    number: str = "c1",
    runs: bool = True,
    user: str = "alice",
    instance: str = INSTANCE,
    **more: Any,
) -> ContainerFacts:
    """One of ours, created an hour ago and running since, or ended half an hour ago."""
    given = aime.LabelInput(login=user, user=user, name="main", instance=instance, token=token or 0, image="image:1")
    labels = aime.labels(given)
    if token is None:
        labels[aime.LABEL_TOKEN] = "?"
    nodes = tuple(DeviceNode(SIMULATED_HOST_NODE, SIMULATED_FOLDER + uuid, "rw") for uuid in units)
    values: dict[str, Any] = {
        "name": "main._.70000" if number == "c1" else f"main._.70000-{number}",
        "state": "running" if runs else "exited",
        "created": ago(minutes=60),
        "started": ago(minutes=59),
        "finished": None if runs else ago(minutes=30),
        "exit_code": 0 if runs else 137,
    }
    return ContainerFacts(id=number, labels=labels, running=runs, devices=nodes, image_ref="image:1", **(values | more))


def never_started(made: ContainerFacts, **age: float) -> ContainerFacts:
    """The same, created and not started."""
    return replace(made, state="created", running=False, started=None, finished=None, created=ago(**age))


def operation(
    number: int = 1, *, what: str = "start", since: datetime | None = None, stale: bool = False
) -> OperationRow:
    """A row of a running operation, or of one whose holder died."""
    return OperationRow(number, what, "hub", "host:1:2", since or ago(minutes=1), ago(seconds=5), stale)


def origin(made: Allocation, at: datetime | None = None) -> Origin:
    """Where a token comes from."""
    return Origin(made, at or ago(hours=1))


def evidence(
    allocations: Iterable[Allocation] = (),
    facts: Iterable[ContainerFacts] = (),
    *operations: OperationRow,
    origins: Mapping[int, Origin] | None = None,
    **more: Any,
) -> Evidence:
    """What a pass of a watcher knows that has been looking for ten minutes on a machine that is up for a day."""
    values: dict[str, Any] = {
        "last_token": 100,
        "snapshot": picture(),
        "watching_since": ago(minutes=10),
        "booted_at": ago(days=1),
    }
    return Evidence(
        now=NOW,
        instance=INSTANCE,
        facts=tuple(facts),
        allocations=tuple(allocations),
        operations=operations,
        origins=origins or {},
        **(values | more),
    )


def told(findings: Iterable[Finding]) -> list[tuple[str, Action]]:
    """What was found and what is to be done, in order."""
    return [(finding.what.value, finding.action) for finding in findings]
