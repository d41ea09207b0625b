"""What Docker is asked for: one server's container as one create body. Pure: values in, a dict for the API out.

Everything that keeps a user's processes from the host is computed last and wins over whatever an admin added
(design, point 12): non-root user, no new privileges, no capability, no device but the leased ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ds01spawner.errors import SettingsInvalid
from ds01spawner.model import Mount, Resources, Unit

from . import aime
from .facts import ContainerFacts
from .pins import PINS

CPU_PERIOD_US = 100_000
"""Period of the CPU quota in microseconds (the kernel's default)."""
MIN_QUOTA_US = 1_000
"""Smallest quota that the kernel takes."""
MIN_MEMORY = 6 * 2**20
"""Docker refuses less than 6 MiB."""
MIN_SHM = 4096
"""One page: the least that can be mounted."""
STOP_TIMEOUT_S = 10
OOM_SCORE_ADJ = 100
"""Users' processes go first when the host itself runs out of memory."""
LOG_CONFIG: Mapping[str, Any] = {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}
"""Capped, so that nobody fills the host's disk by printing."""
WORKING_DIR = "/workspace"
SIMULATED_HOST_NODE = "/dev/null"
SIMULATED_FOLDER = "/dev/ds01/"
"""Where simulated units appear in a container, as harmless nodes named after the unit's uuid."""
CDI_KIND = "nvidia.com/gpu"
VOLATILE_ENV = frozenset({"JUPYTERHUB_API_TOKEN", "JPY_API_TOKEN"})
"""New at every start of the Hub's spawner; a container that is started again keeps its old ones (see `api_token`)."""
GPU_ENV_OWNED = ("NVIDIA_VISIBLE_DEVICES", "NVIDIA_MIG_", "NVIDIA_IMEX_CHANNELS", "DS01_GPUS")
"""Variables by which a container could ask NVIDIA's runtime for more; nobody else sets them here."""
_BLOCK_IO_KEYS = {"BlkioWeight", "BlkioWeightDevice", "StorageOpt"} | {
    f"BlkioDevice{way}{unit}" for way in ("Read", "Write") for unit in ("Bps", "IOps")
}
_CPU_KEYS = {"CpuShares", "CpusetCpus", "CpusetMems", "MemoryReservation", "MemorySwappiness"}
_NAME_KEYS = {"Dns", "DnsOptions", "DnsSearch", "ExtraHosts"}
EXTRA_HOST_KEYS = frozenset({"LogConfig", "Tmpfs", "Ulimits"} | _BLOCK_IO_KEYS | _CPU_KEYS | _NAME_KEYS)
"""What an admin may add to HostConfig; nothing in here reaches devices, capabilities or namespaces."""
EXTRA_CONFIG_KEYS = frozenset({"Domainname", "Entrypoint", "Healthcheck", "Shell", "StopSignal", "StopTimeout", "Tty"})
UPDATE_KEYS = ("Memory", "MemorySwap", "CpuPeriod", "CpuQuota", "PidsLimit")


@dataclass(frozen=True)
class Bind:
    """A host path mounted into the container. The source must exist: Docker makes no folder for it."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Ulimit:
    """A resource limit of the processes, as far as the daemon may raise it."""

    name: str
    soft: int
    hard: int


@dataclass(frozen=True)
class DevicePlan:
    """By which way each unit reaches the container. Exactly one of the three is used at a time.

    Attributes:
        cdi: fully qualified CDI names. nvidia: UUIDs for Docker's nvidia driver. simulated: uuids of simulated units.
    """

    cdi: tuple[str, ...] = ()
    nvidia: tuple[str, ...] = ()
    simulated: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpecInput:
    """Everything that goes into one container.

    Attributes:
        name: Docker name. image: reference to create from (the private tag). base_image, base_image_id: the policy's
            image that it goes back to; another one means a container from the new image.
        uid, gid, groups: of the processes; never 0.
        units, devices: the leased units and the way to them (`plan_devices`).
        network: Docker network; `host` only where the settings allow it. port: where the server listens.
        volatile: names of further variables that are new at every start and force nothing.
        extra_host, extra_config: raw Engine API keys that the admin adds; what could weaken the container is left
            out and named in `ContainerSpec.ignored`.
    """

    name: str
    image: str
    base_image: str
    base_image_id: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    labels: Mapping[str, str]
    uid: int
    gid: int
    resources: Resources
    groups: tuple[int, ...] = ()
    units: tuple[Unit, ...] = ()
    devices: DevicePlan = DevicePlan()
    mounts: tuple[Bind, ...] = ()
    cgroup_parent: str = ""
    network: str = "bridge"
    port: int = 8888
    working_dir: str = WORKING_DIR
    hostname: str = ""
    ulimits: tuple[Ulimit, ...] = ()
    volatile: frozenset[str] = VOLATILE_ENV
    extra_host: Mapping[str, Any] = field(default_factory=dict)
    extra_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ContainerSpec:
    """What to create.

    Attributes:
        config: body of `POST /containers/create`. name: Docker name.
        hash: of everything that forces a new container when it changes (also in the label `ds01.spec`).
        update: the part that `docker update` changes in place; 0 in it = no limit.
        ignored: keys the admin added that are not used, each with the reason.
    """

    name: str
    config: Mapping[str, Any]
    hash: str
    update: Mapping[str, int]
    base_image: str = ""
    base_image_id: str = ""
    ignored: tuple[str, ...] = ()


class Reuse(str, Enum):
    """What to do with the stopped container of an earlier start."""

    START = "start"
    UPDATE = "update"
    RECREATE = "recreate"
    NEW_IMAGE = "new_image"


# --------------------------------------------------------------------------- devices


def plan_devices(units: Sequence[Unit], *, source: str, cdi_devices: Collection[str]) -> DevicePlan:
    """How the units reach the container, always by UUID.

    Args:
        source: `Inventory.source`; units of a simulated box become device nodes without effect.
        cdi_devices: names that the engine knows. CDI is used where it knows every unit, because injection by
            NVIDIA's hook loses its devices at a `docker update` or `systemctl daemon-reload`; mixing both ways in
            one container is untested ground, so one missing name sends all through the nvidia driver.
    """
    uuids = tuple(unit.uuid for unit in units)
    if source == "simulated":
        return DevicePlan(simulated=uuids)
    names = tuple(f"{CDI_KIND}={uuid}" for uuid in uuids)
    if all(name in cdi_devices for name in names):
        return DevicePlan(cdi=names)
    return DevicePlan(nvidia=uuids)


def simulated_unit(path_in_container: str) -> str | None:
    """The unit's uuid that a simulated device node stands for, or None."""
    if not path_in_container.startswith(SIMULATED_FOLDER):
        return None
    return path_in_container[len(SIMULATED_FOLDER) :] or None


def named_units(container: ContainerFacts) -> frozenset[str]:
    """Units that a container of ours was created with, by uuid: what `plan_devices` gave it, read back."""
    found = {unit for node in container.devices if (unit := simulated_unit(node.container)) is not None}
    for request in container.device_requests:
        found |= {name.removeprefix(f"{CDI_KIND}=") for name in request.device_ids}
    return frozenset(found)


def _device_parts(plan: DevicePlan) -> dict[str, Any]:
    requests: list[dict[str, Any]] = []
    if plan.cdi:
        requests.append({"Driver": "cdi", "DeviceIDs": list(plan.cdi)})
    if plan.nvidia:
        requests.append({"Driver": "nvidia", "DeviceIDs": list(plan.nvidia), "Capabilities": [["gpu"]]})
    nodes = [
        {"PathOnHost": SIMULATED_HOST_NODE, "PathInContainer": SIMULATED_FOLDER + uuid, "CgroupPermissions": "rw"}
        for uuid in plan.simulated
    ]
    return {"DeviceRequests": requests, "Devices": nodes, "DeviceCgroupRules": []}


# --------------------------------------------------------------------------- the whole


def build(given: SpecInput) -> ContainerSpec:
    """The container of one server.

    Raises:
        SettingsInvalid: a value that no container may have (a root user, a broken variable name, a wrong mount).
    """
    _require_user(given)
    update = limits(given.resources)
    host, ignored_host = _chosen(given.extra_host, EXTRA_HOST_KEYS, "extra_host_config")
    top, ignored_top = _chosen(given.extra_config, EXTRA_CONFIG_KEYS, "extra_create_kwargs")
    host = {"LogConfig": dict(LOG_CONFIG)} | host | _own_host(given, host, update)
    config = {"Healthcheck": {"Test": ["NONE"]}, "StopSignal": "SIGTERM", "StopTimeout": STOP_TIMEOUT_S} | top
    config |= {
        "Image": given.image,
        "Cmd": list(given.command) or None,
        "Env": _environment(given),
        "User": f"{given.uid}:{given.gid}",
        "WorkingDir": given.working_dir,
        "Hostname": _hostname(given.hostname),
        "ExposedPorts": {f"{given.port}/tcp": {}},
        "HostConfig": host,
        "NetworkingConfig": {"EndpointsConfig": {} if given.network == "host" else {given.network: {}}},
    }
    digest = _digest(given, config)
    config["Labels"] = {**given.labels, aime.LABEL_SPEC: digest}
    return ContainerSpec(
        name=given.name,
        config=config,
        hash=digest,
        update=update,
        base_image=given.base_image,
        base_image_id=given.base_image_id,
        ignored=ignored_host + ignored_top,
    )


def _own_host(given: SpecInput, extra: Mapping[str, Any], update: Mapping[str, int]) -> dict[str, Any]:
    """The part of HostConfig that nobody else may set. Also states what Docker would do anyway, so that a changed
    default of the daemon (an nvidia runtime excepted, see `_environment`) changes nothing here."""
    ulimits = [{"Name": u.name, "Soft": u.soft, "Hard": u.hard} for u in given.ulimits]
    named = {u.name for u in given.ulimits}
    ulimits += [entry for entry in extra.get("Ulimits") or () if entry.get("Name") not in named]
    return {
        **{key: value for key, value in update.items() if value},
        # Docker reads 0 as its own 64 MB; the policy means none at all.
        **({} if given.resources.shm_size is None else {"ShmSize": max(MIN_SHM, given.resources.shm_size)}),
        **_device_parts(given.devices),
        "Ulimits": ulimits,
        "Mounts": _mounts(given.mounts),
        "Binds": [],
        "CgroupParent": given.cgroup_parent,
        "CgroupnsMode": "private",
        "GroupAdd": [str(gid) for gid in given.groups],
        "NetworkMode": given.network,
        "PortBindings": {},
        "PublishAllPorts": False,
        "IpcMode": "private",
        "PidMode": "",
        "UTSMode": "",
        "UsernsMode": "",
        "Privileged": False,
        "CapAdd": [],
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "Init": True,
        "AutoRemove": False,
        "RestartPolicy": {"Name": "no"},
        "OomScoreAdj": OOM_SCORE_ADJ,
        "OomKillDisable": False,
    }


def _require_user(given: SpecInput) -> None:
    if given.uid < 1000 or given.uid == 65534 or given.gid < 1 or any(gid < 1 for gid in given.groups):
        raise SettingsInvalid(
            f"Container {given.name} would run as {given.uid}:{given.gid} with groups {list(given.groups)}: a uid "
            "below 1000, 65534 and the group 0 are the system's. Check uid_range and the account of this user."
        )


def limits(resources: Resources) -> dict[str, int]:
    """The limits that can be changed in place, in Docker's words; 0 = none (-1 for swap without a limit).

    CPU is a quota per period and never NanoCpus: Docker refuses a container with both (trap T20), and DockerSpawner's
    own `cpu_limit` is a quota. No swap limit of its own means as much as `memory`: Docker's default would double it.
    """
    memory = max(MIN_MEMORY, resources.memory) if resources.memory else 0
    swap = resources.memory_swap
    return {
        "Memory": memory,
        "MemorySwap": (-1 if swap == -1 else max(memory, swap or 0)) if memory else 0,
        "CpuPeriod": CPU_PERIOD_US if resources.cpus else 0,
        "CpuQuota": max(MIN_QUOTA_US, round(resources.cpus * CPU_PERIOD_US)) if resources.cpus else 0,
        "PidsLimit": resources.pids_limit or 0,
    }


def _environment(given: SpecInput) -> list[str]:
    """Sorted variables, ours last: as a process's environment takes the last of two, NVIDIA's runtime hands out
    nothing whatever image or user set (a leased unit is asked for by device request only, which Docker adds later)."""
    plain = {}
    for name, value in given.env.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise SettingsInvalid(f"{name!r} is no environment variable: a name may not be empty or contain '='.")
        if not name.startswith(GPU_ENV_OWNED):
            plain[name] = value
    lines = [f"{name}={value}" for name, value in sorted(plain.items())]
    return [*lines, f"DS01_GPUS={describe_units(given.units)}", "NVIDIA_VISIBLE_DEVICES=void"]


def describe_units(units: Sequence[Unit]) -> str:
    """The units for people, `3.0 1g.5gb MIG-…;…`; never an identity for programs."""
    return ";".join(f"{unit.label} {unit.mig_profile or unit.model} {unit.uuid}" for unit in units)


def _hostname(wanted: str) -> str:
    """`wanted` as a host name: at most 63 of letters, digits and `-`."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in wanted)[:63].strip("-")


def _mounts(binds: Sequence[Bind]) -> list[dict[str, Any]]:
    targets: set[str] = set()
    entries = []
    for bind in sorted(binds, key=lambda b: b.target):
        wrong = not bind.source.startswith("/") or not bind.target.startswith("/") or ".." in bind.target.split("/")
        if wrong or bind.target in targets or bind.target == "/":
            raise SettingsInvalid(
                f"{bind.source!r} cannot be mounted on {bind.target!r}: both must be absolute paths, and a target is "
                "used once."
            )
        targets.add(bind.target)
        # A mount, not a bind: Docker refuses a missing source instead of making it as root.
        entries.append(
            {
                "Type": "bind",
                "Source": bind.source,
                "Target": bind.target,
                "ReadOnly": bind.read_only,
                "BindOptions": {"Propagation": "rprivate"},
            }
        )
    return entries


def policy_binds(mounts: Sequence[Mount]) -> tuple[Bind, ...]:
    """The policy's mounts as binds."""
    return tuple(Bind(mount.host, mount.target, mount.read_only) for mount in mounts)


def _chosen(extra: Mapping[str, Any], allowed: frozenset[str], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    kept = {key: value for key, value in extra.items() if key in allowed}
    left_out = sorted(set(extra) - set(kept))
    return kept, tuple(f"{where}: {key} is set by ds01spawner alone" for key in left_out)


def _digest(given: SpecInput, config: Mapping[str, Any]) -> str:
    """Hash of what forces a new container: all of the body but the image's private tag (its base instead), labels,
    what `docker update` changes, and variables that are new at every start."""
    skip = given.volatile | VOLATILE_ENV
    body = {key: value for key, value in config.items() if key != "Image"}
    body["HostConfig"] = {key: value for key, value in config["HostConfig"].items() if key not in UPDATE_KEYS}
    body["Env"] = [line for line in config["Env"] if line.partition("=")[0] not in skip]
    text = json.dumps([body, given.base_image, given.base_image_id], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


# --------------------------------------------------------------------------- reuse


def decide_reuse(old: ContainerFacts, old_hash: str | None, new: ContainerSpec) -> Reuse:
    """Whether the container of an earlier start will do.

    Args:
        old: the stopped container. old_hash: what the ledger says it was created with; None = not known.

    Anything that does not fit exactly means a new container: labels that disagree with the ledger, devices or a
    cgroup parent that are not the wanted ones, a limit that would have to be lifted (Docker cannot unset one).
    """
    # A base that was pruned since has no id any more; its name then decides.
    moved = new.base_image_id and old.labels.get(aime.LABEL_IMAGE_ID, "") != new.base_image_id
    if moved or old.labels.get(aime.LABEL_IMAGE, "") != aime.clean(new.base_image):
        return Reuse.NEW_IMAGE
    known = old_hash == new.hash == old.labels.get(aime.LABEL_SPEC) and not old.unreadable
    if not known or not _same_reach(old, new):
        return Reuse.RECREATE
    before, after = limits_of(old), dict(new.update)
    if before == after:
        return Reuse.START
    lifted = any(before[key] and not after[key] for key in UPDATE_KEYS) or old.nano_cpus
    return Reuse.RECREATE if lifted else Reuse.UPDATE


def _same_reach(old: ContainerFacts, new: ContainerSpec) -> bool:
    """True if the old container reaches exactly the devices, cgroup and network of the new one."""
    host = new.config["HostConfig"]
    asked = {(r["Driver"], tuple(r["DeviceIDs"])) for r in host["DeviceRequests"]}
    has = {(r.driver, r.device_ids) for r in old.device_requests}
    nodes = {d["PathInContainer"] for d in host["Devices"]}
    return (
        asked == has
        and all(request.count == 0 for request in old.device_requests)
        and nodes == {node.container for node in old.devices}
        and not old.privileged
        and not old.device_rules
        and old.user == new.config["User"]
        and old.cgroup_parent == host["CgroupParent"]
        and old.network_mode == host["NetworkMode"]
    )


def limits_of(old: ContainerFacts) -> dict[str, int]:
    """The limits that a container has, in the form of `limits`."""
    return {
        "Memory": max(0, old.memory),
        "MemorySwap": old.memory_swap,
        "CpuPeriod": old.cpu_period,
        "CpuQuota": max(0, old.cpu_quota),
        "PidsLimit": max(0, old.pids_limit),
    }


def without_devices(old: ContainerFacts, image: str = "") -> dict[str, Any]:
    """Create body of the stand-in that takes a stopped container's place, and names no device (design, point 1).

    It keeps labels, user, mounts and limits, so that nothing a user or tool can see is lost but the units; the next
    start finds another specification and creates anew.

    Args:
        old: the stopped container. image: where its changes were committed to; "" = what it was created from.
    """
    # A pinned project folder is bound anew at each start; after a reboot Docker would not find it.
    kept_mounts = (m for m in old.mounts if m.kind == "bind" and not m.source.startswith(f"{PINS}/"))
    mounts = [Bind(m.source, m.target, m.read_only) for m in kept_mounts]
    host: dict[str, Any] = {key: value for key, value in limits_of(old).items() if value}
    host |= _device_parts(DevicePlan())
    host |= {
        "Mounts": _mounts(mounts),
        "CgroupParent": old.cgroup_parent,
        "NetworkMode": old.network_mode,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "Init": True,
        "RestartPolicy": {"Name": "no"},
        "LogConfig": dict(LOG_CONFIG),
    }
    # No Hub token stays in a container that will never be started: the next start makes a new one.
    kept = {name: v for name, v in old.env.items() if not name.startswith(GPU_ENV_OWNED) and name not in VOLATILE_ENV}
    env = [f"{name}={value}" for name, value in kept.items()]
    labels = {**old.labels, aime.LABEL_GPUS: "", "aime.mlc.GPUS": "", aime.LABEL_SPEC: ""}
    return {
        "Image": image or old.image_ref,
        "Cmd": list(old.command) or None,
        "Env": [*env, "NVIDIA_VISIBLE_DEVICES=void"],
        "User": old.user,
        "WorkingDir": old.working_dir,
        "Labels": labels,
        "HostConfig": host,
    }


def api_token(old: ContainerFacts) -> str | None:
    """The Hub token inside an existing container: a Hub that starts it again must go on with that one."""
    return old.env.get("JUPYTERHUB_API_TOKEN") or old.env.get("JPY_API_TOKEN") or None
