"""What one process of an installation needs to act: settings, ledger, Docker, policy, host edges, threads."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

from .containers import aime
from .containers.accounts import Account, AccountWriter, uid_taken, unix_account, unix_groups
from .containers.catalogue import Catalogue, architecture_of_box, find_catalogue, open_catalogue
from .containers.cgroups import CgroupParents, open_cgroups
from .containers.engine import Engine, EngineInfo
from .containers.firewall import ensure_rules, verify_rules
from .containers.network import bridge_name, ensure_network, network_name
from .errors import Code, HostError
from .ledger.store import Ledger
from .model import Snapshot
from .policy.load import PolicyStore
from .policy.schema import Profile
from .progress import StartQueue
from .settings import Settings, load_settings

THREADS = 16
"""Threads for short Docker and ledger calls; DockerSpawner has one for the whole Hub (trap T1)."""
PULL_THREADS = 4
"""Pulls have threads of their own, and so have stops (`Runtime.ends`): ten seconds of SIGTERM delay nobody's start."""
STARTS_PER_CORE = 2.5


def utc_now() -> datetime:
    """The time, aware, in UTC."""
    return datetime.now(timezone.utc)


@dataclass
class Runtime:
    """One process's hands. Thread-safe; made by `open`, ended by `close`."""

    settings: Settings
    ledger: Ledger
    engine: Engine
    policies: PolicyStore
    role: str
    now: Callable[[], datetime] = utc_now
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, "ds01"))
    pulls: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(PULL_THREADS, "ds01-pull"))
    admissions: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, "ds01-admit"))
    ends: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, "ds01-end"))
    _info: EngineInfo | None = None
    _cgroups: CgroupParents | None = None

    def __post_init__(self) -> None:
        self.accounts = AccountWriter(self.settings.state_dir)
        width = self.settings.start_concurrency or max(2, int((os.cpu_count() or 1) * STARTS_PER_CORE))
        self.starts = StartQueue(width)

    @classmethod
    def open(cls, path: Path | None = None, *, role: str, settings: Settings | None = None) -> Runtime:
        """Open everything that `settings` (or the file at `path`) name. Docker is not asked yet.

        Raises:
            SettingsInvalid, LedgerError: with the remedy.
        """
        settings = settings or load_settings(path)
        ledger = Ledger.open(settings.url)
        return cls(settings, ledger, Engine(), PolicyStore(settings.config_dir, ledger), role)

    def close(self) -> None:
        """End threads and connections."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.pulls.shutdown(wait=False, cancel_futures=True)
        self.admissions.shutdown(wait=False, cancel_futures=True)
        self.ends.shutdown(wait=False, cancel_futures=True)
        self.engine.close()
        self.ledger.close()

    @property
    def who(self) -> str:
        """Who holds an operation row: role, host and process."""
        return f"{self.role}@{socket.gethostname()}:{os.getpid()}"

    @property
    def network(self) -> str:
        """Docker network of this installation's containers."""
        return "host" if self.settings.network_mode == "host" else network_name(self.ledger.instance)

    @property
    def info(self) -> EngineInfo:
        """What Docker is (cgroup driver, runtimes), asked once. CDI devices come and go: `engine.info()` for those."""
        if self._info is None:
            self._info = self.engine.info()
        return self._info

    @property
    def cgroups(self) -> CgroupParents:
        """The backend for users' cgroup parents."""
        if self._cgroups is None:
            self._cgroups = open_cgroups(self.info.cgroup_driver, self.info.cgroup_version, self.settings.cgroup_root)
        return self._cgroups

    def account(self, user: str) -> Account:
        """Who `user` is inside containers: the Unix account where settings say so, else the uid given for good.

        Raises:
            Refusal: not_allowed or bad_name. LedgerError: the uid range is used up.
        """
        if self.settings.unix_accounts:
            return unix_account(user)
        uid = self.ledger.uid_of(user, self.settings.uid_range, self._uid_taken)
        name = aime.account_name(user, uid)
        return Account(name, uid, uid, f"/home/{name}")

    def _uid_taken(self, uid: int) -> bool:
        """True if a uid means somebody already: an account of the host, or files that a ledger restored from an older
        backup does not know of."""
        folders = (self.settings.homes / str(uid), self.settings.workspaces / str(uid))
        return uid_taken(uid) or any(folder.exists() for folder in folders)

    def unix_groups(self, user: str) -> tuple[str, ...]:
        """Names of the Unix groups of `user`; () unless Hub names are Unix accounts here."""
        return tuple(group.name for group in unix_groups(user)) if self.settings.unix_accounts else ()

    def catalogue(self) -> Catalogue:
        """AIME's image catalogue, read again when the file changed; empty where none is installed."""
        path = self.settings.catalogue or find_catalogue()
        if path is None:
            return Catalogue()
        return _catalogue(path, path.stat().st_mtime_ns if path.exists() else 0)

    def newest_image(self, snapshot: Snapshot | None) -> Callable[[str, str | None], str | None]:
        """(framework, version) → newest catalogue image for the GPUs of this box."""

        def newest(framework: str, version: str | None) -> str | None:
            row = self.catalogue().newest(framework, version, box_architecture(snapshot))
            return row.image if row else None

        return newest


def box_architecture(snapshot: Snapshot | None) -> str | None:
    """AIME's word for the box's GPUs (`CUDA_ADA`); None where none is known."""
    gpus = snapshot.inventory.gpus if snapshot else ()
    return architecture_of_box(gpu.compute_capability for gpu in gpus)


@lru_cache(maxsize=4)
def _catalogue(path: Path, _changed: int) -> Catalogue:
    return open_catalogue(path)


def framework_of(profile: Profile) -> str:
    """What the FRAMEWORK label says: the profile's framework, else its name."""
    return profile.framework or profile.name


def prepare_network(runtime: Runtime) -> None:
    """Make (or check) the installation's Docker network and the host rules that separate its containers.

    Raises:
        HostError: network_not_enforced, unless the settings carry the test switch.
        EngineError: Docker does not answer.
    """
    settings = runtime.settings
    if settings.network_mode == "host":
        return
    network = ensure_network(runtime.engine.client, runtime.ledger.instance, settings.subnet)
    try:
        ensure_rules(network.bridge, network.gateway, (settings.hub_port, settings.service_port))
    except HostError as error:
        if error.code is not Code.NETWORK_NOT_ENFORCED or not settings.unsafe_no_isolation:
            raise


def require_isolation(runtime: Runtime) -> None:
    """Refuse to go on where the host rules are not in force; a firewall reload may have taken them away.

    Raises:
        HostError: network_not_enforced.
    """
    settings = runtime.settings
    if settings.network_mode == "host" or settings.unsafe_no_isolation:
        return
    bridge, ports = bridge_name(runtime.ledger.instance), (settings.hub_port, settings.service_port)
    if verify_rules(bridge, settings.gateway, ports):
        ensure_rules(bridge, settings.gateway, ports)
