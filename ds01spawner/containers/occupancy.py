"""Which units something outside this installation holds or could reach. Pure.

Evidence is every container of the engine, by every way in which one can ask for a GPU, and every process that the
driver sees on one. What counts, and when:

| whose container | counts |
|---|---|
| ours, token of a live allocation | only units that this allocation has not leased |
| ours, any other token (restored backup!) | what it names, running or not (design, point 4) |
| another installation's | what it names, running or not: its own ledger may hold them for a stopped container |
| anybody else's, while it may run | everything that it names or could reach |
| anybody else's, stopped | what it names one by one if Docker will start it again by itself (policy `always`) |
| anybody else's, created and never started | what it names one by one, for a while: `docker run` creates first |

A stopped container of others that names all GPUs blocks none: it can be started at any time, as any other can be
created at any time, and is seen then. A container that an admin has listed (name and image) holds nothing.
Mounts of /dev or of Docker's socket give no GPU by themselves; `notes` tells of them.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from ds01spawner.model import External, Inventory

from . import aime, gpu_names
from .facts import ContainerFacts, DeviceRequest
from .gpu_names import Meaning
from .spec import SIMULATED_HOST_NODE, simulated_unit

CREATED_GRACE = timedelta(minutes=2)
"""So long a container that was created and not started yet counts as about to start."""
_PLAIN_RUNTIME = re.compile(r"runc|crun|youki|sysbox-runc|kata.*|io\.containerd\.(runc\.v\d+|runtime\.v1\.linux)")
"""OCI runtimes that read no GPU variable. Any other name (nvidia, runsc with nvproxy, a site's own) may."""
_OTHER_DRIVERS = ("amd",)
VISIBLE = "NVIDIA_VISIBLE_DEVICES"
RECONCILE = "Run `ds01-admin reconcile` to see what it is and what to do."


class Exemption(Protocol):
    """One rule of `external.yaml`: both patterns must match (`*` and `?` stand for any characters)."""

    @property
    def name(self) -> str: ...
    @property
    def image(self) -> str: ...


@dataclass(frozen=True)
class LocatedProcess:
    """A process that the driver sees on a unit (or on a GPU), and the container that its cgroup says it is in.

    container_id: None = on the host itself. name: of the program, "" if unknown.
    """

    unit_uuid: str
    pid: int
    container_id: str | None
    name: str = ""


@dataclass(frozen=True)
class Reach:
    """One way in which a container gets at units: what it means, and the evidence for people."""

    meaning: Meaning
    why: str


@dataclass(frozen=True)
class _View:
    """What everything is judged against; see `external`."""

    inventory: Inventory
    instance: str
    live: Mapping[int, Collection[str]]
    rules: Sequence[Exemption]
    default_runtime: str
    now: datetime | None

    def ours(self, container: ContainerFacts) -> bool:
        """True if this installation made it."""
        return aime.is_ours(container.labels, self.instance)

    def leased(self, container: ContainerFacts) -> frozenset[str] | None:
        """Units that its allocation holds; None if it has no live allocation of ours."""
        token = aime.token_of(container.labels, self.instance) if self.ours(container) else None
        return frozenset(self.live[token]) if token is not None and token in self.live else None

    def exempt(self, container: ContainerFacts) -> bool:
        """True if a rule names it. Our own containers hold by the ledger and cannot be exempted."""
        if self.ours(container) or container.unreadable:
            return False
        return any(_matches(container.name, r.name) and _matches(container.image_ref, r.image) for r in self.rules)

    def remedy(self, container: ContainerFacts) -> str:
        """What the admin can do about it."""
        return RECONCILE if self.ours(container) else exemption(container)


def external(
    facts: Sequence[ContainerFacts],
    inventory: Inventory,
    processes: Sequence[LocatedProcess],
    *,
    instance: str,
    live: Mapping[int, Collection[str]],
    rules: Sequence[Exemption] = (),
    default_runtime: str = "runc",
    now: datetime | None = None,
) -> tuple[External, ...]:
    """Who outside holds which unit; one entry per unit and holder, in the order of the units.

    Args:
        facts: all containers. Must have been listed before `live` was read: an allocation is written before its
            container is created, so a container of this list then has its token in `live`.
        instance: uuid of this installation. live: token → units leased, of every live allocation.
        rules: what the admin exempts. default_runtime: of the engine, for containers that name none.
        now: lets a created container stop counting after `CREATED_GRACE`; without it, it counts for ever.
    """
    view = _View(inventory, instance, live, rules, default_runtime, now)
    found: list[External] = []
    for container in facts:
        if not view.exempt(container):
            found += _of_container(container, view)
    by_id = {container.id: container for container in facts}
    for process in processes:
        found += _of_process(process, by_id.get(process.container_id or ""), view)
    order = {unit.uuid: place for place, unit in enumerate(inventory.units)}
    return tuple(sorted(found, key=lambda e: (order[e.unit_uuid], e.kind, e.holder)))


def notes(facts: Iterable[ContainerFacts]) -> tuple[str, ...]:
    """Running containers that hold no GPU by what follows but could get one: Docker's socket or /dev inside."""
    found = []
    for container in facts:
        if not container.may_run:
            continue
        sources = [mount.source.rstrip("/") or "/" for mount in container.mounts]
        if any(source.endswith("docker.sock") for source in sources):
            found.append(f"Container {container.name} has Docker's socket: it can start containers with any GPU.")
        if "/dev" in sources and not container.privileged:
            found.append(
                f"Container {container.name} has the host's /dev mounted; its device rules decide what it may use."
            )
    return tuple(found)


# --------------------------------------------------------------------------- containers


def _of_container(container: ContainerFacts, view: _View) -> list[External]:
    ours, leased = view.ours(container), view.leased(container)
    units: dict[str, list[str]] = {}
    for reach in reaches(container, view.inventory, view.default_runtime):
        if view.inventory.source == "simulated" and reach.meaning.everything and not container.unreadable:
            continue  # who may reach every real GPU reaches no simulated unit without naming it
        if ours or _counts(container, reach.meaning, view.now):
            for uuid in reach.meaning.units - (leased or frozenset()):
                units.setdefault(uuid, []).append(reach.why)
    prefix = "another ds01 installation: " if _other_installation(container) else ""
    if ours:
        token = container.labels.get(aime.LABEL_TOKEN, "none")
        prefix = f"token {token} is not of a live allocation: " if leased is None else "not leased to it: "
    return [
        External(
            unit_uuid=uuid,
            kind="unreadable" if container.unreadable else "container",
            holder=container.name or container.id[:12],
            why=prefix + ", ".join(dict.fromkeys(whys)),
            image=container.image_ref,
            remedy=view.remedy(container),
        )
        for uuid, whys in units.items()
    ]


def _other_installation(container: ContainerFacts) -> bool:
    """True for containers with the labels of an installation; asked of those that are not ours."""
    return container.labels.get(aime.LABEL_MANAGED) == "true" and bool(container.labels.get(aime.LABEL_INSTANCE))


def _counts(container: ContainerFacts, meaning: Meaning, now: datetime | None) -> bool:
    """The table above, for containers that are not ours."""
    if container.may_run or container.unreadable:
        return True
    if meaning.everything:
        return False
    if _other_installation(container):
        return True
    if container.state == "created":
        return now is None or container.created is None or now - container.created < CREATED_GRACE
    return container.restart == "always"


def reaches(container: ContainerFacts, inventory: Inventory, default_runtime: str = "runc") -> tuple[Reach, ...]:
    """Every way in which `container` gets at units, whoever it belongs to; empty if it gets at none."""
    everything = gpu_names.every(inventory)
    if container.unreadable:
        return (Reach(everything, f"Docker's answer about it cannot be read ({container.unreadable})"),)
    found = [Reach(everything, "--privileged")] if container.privileged else []
    found += [_of_request(request, inventory) for request in container.device_requests]
    found += _of_environment(container, inventory, default_runtime)
    found += _of_devices(container, inventory)
    for rule in container.device_rules:
        found.append(Reach(gpu_names.of_rule(rule, inventory), f"--device-cgroup-rule '{rule}'"))
    for mount in container.mounts:
        found.append(Reach(gpu_names.of_mount(mount.target, inventory), f"mount on {mount.target}"))
    return tuple(reach for reach in found if reach.meaning.units)


def _of_request(request: DeviceRequest, inventory: Inventory) -> Reach:
    if request.driver in _OTHER_DRIVERS:
        return Reach(gpu_names.NO_UNIT, f"driver {request.driver}")
    if request.driver not in ("", "nvidia", "cdi"):
        return Reach(gpu_names.every(inventory), f"device driver {request.driver}")
    if request.count < 0:
        return Reach(gpu_names.every(inventory), "--gpus all")
    if request.count > 0:
        return Reach(gpu_names.every(inventory), f"--gpus {request.count}, which does not say which")
    names = [name for entry in request.device_ids for name in entry.split(",")]
    read = gpu_names.of_cdi if request.driver == "cdi" else gpu_names.of_device
    meaning = gpu_names.NO_UNIT
    for name in names:
        meaning |= read(name, inventory)
    word = "--device " if request.driver == "cdi" else "--gpus device="
    return Reach(meaning, word + ",".join(names))


def _of_environment(container: ContainerFacts, inventory: Inventory, default_runtime: str) -> list[Reach]:
    """NVIDIA_VISIBLE_DEVICES, where something reads it: NVIDIA's runtime, or a request that names no device.

    Docker writes the variable itself for a request that names devices, after the image's and the user's. An image of
    CUDA's first years (CUDA_VERSION without NVIDIA_REQUIRE_CUDA) asks for all by asking for nothing.
    """
    ours = [r for r in container.device_requests if r.driver in ("", "nvidia")]
    if any(request.device_ids or request.count for request in ours):
        return []
    runtime = container.runtime or default_runtime
    if _PLAIN_RUNTIME.fullmatch(runtime) and not ours:
        return []
    value = container.env.get(VISIBLE)
    if value is None:
        old_image = container.env.get("CUDA_VERSION") and "NVIDIA_REQUIRE_CUDA" not in container.env
        return [Reach(gpu_names.every(inventory), f"old CUDA image under runtime {runtime}")] if old_image else []
    meaning = gpu_names.NO_UNIT
    for name in value.split(","):
        meaning |= gpu_names.of_device(name, inventory)
    return [Reach(meaning, f"{VISIBLE}={value} under runtime {runtime}")]


def _of_devices(container: ContainerFacts, inventory: Inventory) -> list[Reach]:
    found, paths = [], []
    known = {unit.uuid for unit in inventory.units}
    for node in container.devices:
        # Only our harmless host node makes it a simulated unit; the same path over a real node is that node.
        uuid = simulated_unit(node.container) if node.host == SIMULATED_HOST_NODE else None
        if uuid is None:
            paths.append(node.host)
        elif uuid in known:
            found.append(Reach(Meaning(frozenset({uuid})), f"--device {node.host}:{node.container}"))
    meaning = gpu_names.of_nodes(paths, inventory)
    return [*found, Reach(meaning, "--device " + ", ".join(paths))] if meaning.units else found


# --------------------------------------------------------------------------- processes


def _of_process(process: LocatedProcess, container: ContainerFacts | None, view: _View) -> list[External]:
    """A process on a unit counts unless its container has leased that unit, or is exempt."""
    meaning = gpu_names.of_device(process.unit_uuid, view.inventory)
    image, place = "", "on the host"
    remedy = f"End it on the server if it should not be there (kill {process.pid})."
    if container is not None:
        # A process that is only known to be on the parent GPU is taken to use what its container leases there.
        if view.exempt(container) or meaning.units & (view.leased(container) or frozenset()):
            return []
        image, place, remedy = container.image_ref, f"in container {container.name}", view.remedy(container)
    elif process.container_id:
        place = f"in container {process.container_id[:12]}, which is not listed"
    holder = f"pid {process.pid}" + (f" ({process.name})" if process.name else "")
    return [
        External(uuid, "process", holder, f"compute process {place}", image, remedy) for uuid in sorted(meaning.units)
    ]


# --------------------------------------------------------------------------- exemptions


def _matches(text: str, pattern: str) -> bool:
    return bool(text) and fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))


def exemption(container: ContainerFacts) -> str:
    """The line for config/external.yaml that would exempt this very container; "" if it has no name or image."""
    if not container.name or not container.image_ref:
        return ""
    name, image = json.dumps(container.name), json.dumps(container.image_ref)
    return f'- {{name: {name}, image: {image}, reason: "holds no GPU"}}'
