"""What goes into one container: the admission, the account, the image and the Hub's wishes put together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .containers import aime
from .containers.accounts import Account, AccountFiles
from .containers.engine import ImageFacts
from .containers.host import Folder
from .containers.spec import Bind, ContainerSpec, DevicePlan, SpecInput, build, plan_devices, policy_binds
from .containers.ulimits import daemon_ulimits
from .errors import Code, HostError, Refusal
from .images import ImageChoice, SavedImage
from .model import Admission, Mount
from .policy.schema import Profile
from .runtime import Runtime, box_architecture, framework_of

SINGLEUSER = ("jupyterhub-singleuser",)
"""What runs in the container where neither profile nor Hub say otherwise; images put it on PATH."""

_RAW_CONFIG = {
    "domainname": "Domainname",
    "entrypoint": "Entrypoint",
    "healthcheck": "Healthcheck",
    "stop_signal": "StopSignal",
    "tty": "Tty",
}
"""docker-py's names of what an admin may set by `extra_create_kwargs`, in the words of the Engine API."""


@dataclass(frozen=True)
class HubSide:
    """What the Hub wants inside the container, and what the admin's DockerSpawner traits add.

    Attributes:
        environment: the Hub's variables, tokens included. command, args: of the single-user server; () = default.
        port: where it listens. extra_host_config, extra_create_kwargs: in docker-py's words.
        token_lives: whether the Hub still takes a token that a stopped container carries; called from a thread.
    """

    environment: Mapping[str, str] = field(repr=False)
    command: tuple[str, ...]
    args: tuple[str, ...]
    port: int
    extra_host_config: Mapping[str, Any] = field(default_factory=dict)
    extra_create_kwargs: Mapping[str, Any] = field(default_factory=dict)
    token_lives: Callable[[str], bool] = lambda token: bool(token)


@dataclass(frozen=True)
class Plan:
    """Everything that was decided and prepared for one container.

    Attributes:
        image_facts: of what it is created from. base_id: id of the policy's image behind it; "" if it is gone.
        token: fencing token for the labels. files: passwd and group to mount.
    """

    admission: Admission
    profile: Profile
    account: Account
    image: ImageChoice
    image_facts: ImageFacts
    base_id: str
    container_name: str
    server_name: str
    token: int
    home: Folder
    workspace: Folder
    files: AccountFiles
    cgroup_parent: str

    @property
    def private_image(self) -> str:
        """The tag that only this container has."""
        return aime.private_image(self.image.base, self.container_name)

    def with_token(self, token: int) -> Plan:
        """The same with the token of a new container."""
        return replace(self, token=token)

    def from_saved(self, saved: SavedImage, facts: ImageFacts) -> Plan:
        """The same, created from what was just saved."""
        return replace(self, image=replace(self.image, source=saved.ref, saved=saved), image_facts=facts)


def require_limits(admission: Admission) -> None:
    """Refuse a limit of nothing: Docker reads 0 as "no limit", the policy means "none at all".

    Raises:
        Refusal: not_allowed, naming where the 0 comes from.
    """
    resources, limits = admission.resources, admission.limits
    found = {"max_cpus": resources.cpus, "memory": resources.memory, "pids_limit": resources.pids_limit}
    for key, value in found.items():
        if value is not None and value <= 0:
            source = limits.source(key) if limits[key] == value else "the profile"
            raise Refusal(
                Code.NOT_ALLOWED,
                f"No server can start: {key} is {value:g} for you ({source}). Ask the admin to change that.",
                facts={"limit": key, "value": value, "source": source},
            )


def require_folders(mounts: Iterable[Mount]) -> None:
    """Refuse before anything is done if a folder of the policy is not there; Docker would say so halfway.

    Raises:
        HostError: storage_refused, naming it.
    """
    for mount in mounts:
        if not Path(mount.host).is_dir():
            raise HostError(
                f"The folder {mount.host}, which the policy mounts at {mount.target}, is not on this server. Please "
                "tell the admin; nothing was started.",
                code=Code.STORAGE_REFUSED,
                facts={"host": mount.host, "target": mount.target},
            )


def build_spec(runtime: Runtime, hub: HubSide, plan: Plan) -> ContainerSpec:
    """The container to create, or to compare with the one that is there.

    Raises:
        SettingsInvalid: a value that no container may have.
    """
    admission, account = plan.admission, plan.account
    host = "127.0.0.1" if runtime.settings.network_mode == "host" else "0.0.0.0"  # noqa: S104 - inside the container
    binds = (
        Bind(str(plan.home.path), account.home),
        Bind(str(plan.workspace.path), "/workspace"),
        Bind(str(plan.files.passwd), "/etc/passwd", read_only=True),
        Bind(str(plan.files.group), "/etc/group", read_only=True),
        *policy_binds(admission.mounts),
    )
    ulimits, _ = daemon_ulimits()
    return build(
        SpecInput(
            name=plan.container_name,
            image=plan.private_image,
            base_image=plan.image.base,
            base_image_id=plan.base_id,
            command=_command(hub, plan),
            env=_environment(hub, plan) | {"JUPYTERHUB_SERVICE_URL": _service_url(hub, host)},
            labels=_labels(runtime, plan),
            uid=account.uid,
            gid=account.gid,
            groups=tuple(group.gid for group in account.groups),
            resources=admission.resources,
            units=admission.units,
            devices=_devices(runtime, plan),
            mounts=binds,
            cgroup_parent=plan.cgroup_parent,
            network=runtime.network,
            port=hub.port,
            hostname=aime.short_name(plan.server_name),
            ulimits=ulimits,
            extra_host=_raw_host(runtime, hub),
            extra_config={_RAW_CONFIG.get(key, key): value for key, value in hub.extra_create_kwargs.items()},
        )
    )


def _command(hub: HubSide, plan: Plan) -> tuple[str, ...]:
    return (*(plan.profile.command or hub.command or SINGLEUSER), *hub.args)


def _service_url(hub: HubSide, host: str) -> str:
    prefix = hub.environment.get("JUPYTERHUB_SERVICE_PREFIX", "/")
    return f"http://{host}:{hub.port}{prefix}"


def _environment(hub: HubSide, plan: Plan) -> dict[str, str]:
    account = plan.account
    user_base = f"{account.home}/.local/ds01/{_slug(plan.image.base)}"
    path = plan.image_facts.env.get("PATH") or "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    own = {
        "HOME": account.home,
        "USER": account.name,
        "LOGNAME": account.name,
        "SHELL": "/bin/bash",
        # Per image, so that packages survive a new container and never meet another image's Python.
        "PYTHONUSERBASE": user_base,
        "PIP_USER": "1",
        # Debian and Ubuntu mark their Python as managed (PEP 668); a user's own folder is none of its business.
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
        "PATH": path if path.startswith(f"{user_base}/bin:") else f"{user_base}/bin:{path}",
        "JUPYTER_IMAGE": plan.image.base,
        "JUPYTER_IMAGE_SPEC": plan.image.base,
    }
    if plan.profile.default_url:
        own["JUPYTERHUB_DEFAULT_URL"] = plan.profile.default_url
    return {**plan.profile.env, **hub.environment, **own}


def _slug(image: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", image)[:100]


def _labels(runtime: Runtime, plan: Plan) -> dict[str, str]:
    mounts = {mount.target: mount.host for mount in plan.admission.mounts}
    snapshot = runtime.ledger.read_snapshot()
    return aime.labels(
        aime.LabelInput(
            login=plan.account.name if runtime.settings.unix_accounts else plan.admission.limits.user,
            user=plan.admission.limits.user,
            name=aime.short_name(plan.server_name),
            instance=runtime.ledger.instance,
            token=plan.token,
            image=plan.image.base,
            image_id=plan.base_id,
            framework=framework_of(plan.profile),
            architecture=box_architecture(snapshot) or "",
            gpus=tuple(unit.uuid for unit in plan.admission.units),
            workspace=str(plan.workspace.shown),
            data=mounts.get("/data"),
            models=mounts.get("/models"),
            inherited=plan.image_facts.labels,
        )
    )


def _devices(runtime: Runtime, plan: Plan) -> DevicePlan:
    units = plan.admission.units
    if not units:
        return DevicePlan()
    snapshot = runtime.ledger.read_snapshot()
    source = snapshot.inventory.source if snapshot else ""
    names = frozenset() if source == "simulated" else runtime.engine.info().cdi_devices
    return plan_devices(units, source=source, cdi_devices=names)


def _raw_host(runtime: Runtime, hub: HubSide) -> dict[str, Any]:
    """The admin's `extra_host_config` in the words of the Engine API, without what docker-py adds by itself."""
    if not hub.extra_host_config:
        return {}
    client: Any = runtime.engine.client
    plain = client.create_host_config()
    raw = client.create_host_config(**hub.extra_host_config)
    return {key: value for key, value in raw.items() if plain.get(key) != value}
