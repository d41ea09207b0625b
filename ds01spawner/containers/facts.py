"""What Docker says of the engine, a container or an image, as frozen values. Pure: parses answers, asks nothing.

`engine.py` fills these in; `occupancy.py` and `spec.py` decide on them without importing Docker.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

_STAMP = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:?\d\d)?")


def parse_time(text: str | None) -> datetime | None:
    """A time as Docker writes it, in UTC; None for Docker's zero time (year 1: "never") and for no text.

    Docker writes up to nine digits of a second's fraction, which `datetime.fromisoformat` of Python 3.10 refuses
    (failure case B6 of the lab's old tools: the error was swallowed and nothing was ever released).

    Raises:
        ValueError: anything else.
    """
    if not text:
        return None
    match = _STAMP.fullmatch(text)
    if match is None:
        raise ValueError(f"not a time: {text!r}")
    day, clock, fraction, zone = match.groups()
    if day.startswith("0001-"):
        return None
    moment = datetime.fromisoformat(f"{day}T{clock}").replace(tzinfo=timezone.utc)
    moment += timedelta(microseconds=int(((fraction or "") + "000000")[:6]))
    if zone in (None, "Z"):
        return moment
    hours, minutes = int(zone[1:3]), int(zone[-2:])
    shift = timedelta(hours=hours, minutes=minutes)
    return moment + shift if zone[0] == "-" else moment - shift


def parse_env(lines: Sequence[str] | None) -> dict[str, str]:
    """`["A=1", "B"]` as a mapping; the last of a name wins, as in a process's environment."""
    return {name: value for name, _, value in (line.partition("=") for line in lines or ())}


@dataclass(frozen=True)
class EngineInfo:
    """The Docker engine.

    Attributes:
        cgroup_driver: `systemd` or `cgroupfs`. cgroup_version: 1 or 2.
        cdi_devices: fully qualified CDI names that the engine knows (`nvidia.com/gpu=0`).
        cdi_spec_dirs: folders of the CDI specifications; empty where the engine has no CDI.
        userns_remap: the daemon maps user namespaces (a container's root is nobody on the host).
        security: names of the security options in force (`seccomp`, `apparmor`, …).
        root_dir: where images and containers lie. driver: storage driver.
        containerd_store: images live in containerd's content store instead of the classic graph drivers.
        memory: bytes of the machine. runtimes: path of each OCI runtime by name.
    """

    version: str
    api_version: tuple[int, int]
    cgroup_driver: str
    cgroup_version: int
    cdi_devices: frozenset[str] = frozenset()
    cdi_spec_dirs: tuple[str, ...] = ()
    userns_remap: bool = False
    security: frozenset[str] = frozenset()
    root_dir: str = ""
    driver: str = ""
    containerd_store: bool = False
    ncpu: int = 1
    memory: int = 0
    default_runtime: str = "runc"
    runtimes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceRequest:
    """One entry of HostConfig.DeviceRequests: how `--gpus` and CDI devices are asked for."""

    driver: str
    count: int
    device_ids: tuple[str, ...]
    capabilities: frozenset[str] = frozenset()


@dataclass(frozen=True)
class DeviceNode:
    """One entry of HostConfig.Devices (`--device host:container:permissions`)."""

    host: str
    container: str
    permissions: str = "rwm"


@dataclass(frozen=True)
class MountPoint:
    """Something mounted into a container. kind: bind, volume, tmpfs, …; source: host path (or volume name)."""

    kind: str
    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class ContainerFacts:
    """One container as inspected. Times in UTC, sizes in bytes; 0 in a limit means that there is none.

    Attributes:
        image_ref: what it was created from, as written; image_id: what that was then.
        state: created, running, paused, restarting, removing, exited or dead. running: has processes now.
        pid: of its first process on the host, 0 if none.
        env: its environment, the image's included. Holds secrets: left out of `repr`.
        runtime: OCI runtime named at creation. restart: restart policy name, "" for none.
        device_rules: HostConfig.DeviceCgroupRules. extra: name → address on each network it is attached to.
        unreadable: why the answer could not be understood; "" = it could. Everything else may then be missing.
    """

    id: str
    name: str = ""
    image_ref: str = ""
    image_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    state: str = ""
    running: bool = False
    pid: int = 0
    created: datetime | None = None
    started: datetime | None = None
    finished: datetime | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    command: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    device_requests: tuple[DeviceRequest, ...] = ()
    devices: tuple[DeviceNode, ...] = ()
    device_rules: tuple[str, ...] = ()
    privileged: bool = False
    runtime: str = ""
    restart: str = ""
    cgroup_parent: str = ""
    mounts: tuple[MountPoint, ...] = ()
    network_mode: str = ""
    networks: Mapping[str, str] = field(default_factory=dict)
    memory: int = 0
    memory_swap: int = 0
    cpu_period: int = 0
    cpu_quota: int = 0
    nano_cpus: int = 0
    pids_limit: int = 0
    shm_size: int = 0
    unreadable: str = ""

    @property
    def may_run(self) -> bool:
        """True unless Docker says for certain that it has no process: created, exited or dead."""
        return self.running or self.state not in ("created", "exited", "dead")


@dataclass(frozen=True)
class ImageFacts:
    """One image as inspected.

    Attributes:
        layers: its layers' diff ids, lowest first. size: bytes of all layers.
        config: the raw `Config` (env, labels, command …), from which a child's configuration is rebuilt.
    """

    id: str
    tags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    labels: Mapping[str, str] = field(default_factory=dict)
    cmd: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    layers: tuple[str, ...] = ()
    size: int = 0
    architecture: str = "amd64"
    os: str = "linux"
    created: datetime | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)


def container_facts(answer: Mapping[str, Any]) -> ContainerFacts:
    """What `GET /containers/{id}/json` answered. An answer that makes no sense gives facts marked `unreadable`."""
    try:
        return _container_facts(answer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        labels = (answer.get("Config") or {}).get("Labels") if isinstance(answer.get("Config"), Mapping) else None
        return ContainerFacts(
            id=str(answer.get("Id", "")),
            name=str(answer.get("Name", "")).lstrip("/"),
            labels=dict(labels) if isinstance(labels, Mapping) else {},
            unreadable=f"{type(error).__name__}: {error}",
        )


def _container_facts(answer: Mapping[str, Any]) -> ContainerFacts:
    config, host, state = answer["Config"], answer["HostConfig"], answer["State"]
    networks = (answer.get("NetworkSettings") or {}).get("Networks") or {}
    return ContainerFacts(
        id=answer["Id"],
        name=answer["Name"].lstrip("/"),
        image_ref=config.get("Image") or "",
        image_id=answer.get("Image") or "",
        labels=dict(config.get("Labels") or {}),
        state=state["Status"],
        running=bool(state["Running"]),
        pid=int(state.get("Pid") or 0),
        created=parse_time(answer.get("Created")),
        started=parse_time(state.get("StartedAt")),
        finished=parse_time(state.get("FinishedAt")),
        exit_code=state.get("ExitCode"),
        oom_killed=bool(state.get("OOMKilled")),
        error=state.get("Error") or "",
        env=parse_env(config.get("Env")),
        command=tuple(config.get("Cmd") or ()),
        user=config.get("User") or "",
        working_dir=config.get("WorkingDir") or "",
        device_requests=tuple(_device_request(item) for item in host.get("DeviceRequests") or ()),
        devices=tuple(_device(item) for item in host.get("Devices") or ()),
        device_rules=tuple(host.get("DeviceCgroupRules") or ()),
        privileged=bool(host.get("Privileged")),
        runtime=host.get("Runtime") or "",
        restart=_restart(host.get("RestartPolicy") or {}),
        cgroup_parent=host.get("CgroupParent") or "",
        mounts=tuple(_mount(item) for item in answer.get("Mounts") or ()),
        network_mode=host.get("NetworkMode") or "",
        networks={name: (entry or {}).get("IPAddress") or "" for name, entry in networks.items()},
        memory=int(host.get("Memory") or 0),
        memory_swap=int(host.get("MemorySwap") or 0),
        cpu_period=int(host.get("CpuPeriod") or 0),
        cpu_quota=int(host.get("CpuQuota") or 0),
        nano_cpus=int(host.get("NanoCpus") or 0),
        pids_limit=int(host.get("PidsLimit") or 0),
        shm_size=int(host.get("ShmSize") or 0),
    )


def _device_request(item: Mapping[str, Any]) -> DeviceRequest:
    alternatives = item.get("Capabilities") or ()
    return DeviceRequest(
        driver=item.get("Driver") or "",
        count=int(item.get("Count") or 0),
        device_ids=tuple(item.get("DeviceIDs") or ()),
        capabilities=frozenset(str(word) for words in alternatives for word in words),
    )


def _device(item: Mapping[str, Any]) -> DeviceNode:
    return DeviceNode(
        host=item["PathOnHost"],
        container=item.get("PathInContainer") or item["PathOnHost"],
        permissions=item.get("CgroupPermissions") or "rwm",
    )


def _mount(item: Mapping[str, Any]) -> MountPoint:
    return MountPoint(
        kind=item.get("Type") or "bind",
        source=item.get("Source") or item.get("Name") or "",
        target=item["Destination"],
        read_only=not item.get("RW", True),
    )


def _restart(policy: Mapping[str, Any]) -> str:
    name = policy.get("Name") or ""
    return "" if name == "no" else name


def image_facts(answer: Mapping[str, Any]) -> ImageFacts:
    """What `GET /images/{ref}/json` answered."""
    config = answer.get("Config") or {}
    return ImageFacts(
        id=answer["Id"],
        tags=tuple(answer.get("RepoTags") or ()),
        env=parse_env(config.get("Env")),
        labels=dict(config.get("Labels") or {}),
        cmd=tuple(config.get("Cmd") or ()),
        entrypoint=tuple(config.get("Entrypoint") or ()),
        user=config.get("User") or "",
        working_dir=config.get("WorkingDir") or "",
        layers=tuple((answer.get("RootFS") or {}).get("Layers") or ()),
        size=int(answer.get("Size") or 0),
        architecture=answer.get("Architecture") or "amd64",
        os=answer.get("Os") or "linux",
        created=parse_time(answer.get("Created")),
        config=dict(config),
    )


def engine_info(info: Mapping[str, Any], version: Mapping[str, Any], cdi_devices: frozenset[str]) -> EngineInfo:
    """What `GET /info` and `GET /version` answered; `cdi_devices` were found by the caller (`cdi.py`)."""
    options = [dict(part.partition("=")[::2] for part in line.split(",")) for line in info.get("SecurityOptions") or ()]
    names = frozenset(str(option.get("name", "")) for option in options) - {""}
    major, _, minor = str(version.get("ApiVersion") or "0.0").partition(".")
    status = {str(row[0]): str(row[1]) for row in info.get("DriverStatus") or () if len(row) == 2}
    return EngineInfo(
        version=str(version.get("Version") or info.get("ServerVersion") or ""),
        api_version=(int(major), int(minor or 0)),
        cgroup_driver=str(info.get("CgroupDriver") or "cgroupfs"),
        cgroup_version=int(info.get("CgroupVersion") or 1),
        cdi_devices=cdi_devices,
        cdi_spec_dirs=tuple(info.get("CDISpecDirs") or ()),
        userns_remap="userns" in names,
        security=names,
        root_dir=str(info.get("DockerRootDir") or ""),
        driver=str(info.get("Driver") or ""),
        containerd_store=status.get("driver-type", "").startswith("io.containerd.snapshotter"),
        ncpu=int(info.get("NCPU") or 1),
        memory=int(info.get("MemTotal") or 0),
        default_runtime=str(info.get("DefaultRuntime") or "runc"),
        runtimes={name: str((entry or {}).get("path") or "") for name, entry in (info.get("Runtimes") or {}).items()},
    )
