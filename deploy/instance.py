"""One demo on this machine: what it was given (`Plan`), and how every trace of it is removed again.

Each demo has its own state folder, instance, network, cgroup root and user ids; nothing here touches a container,
network or folder of anybody else. What a killed demo left behind is found by its folder and removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import docker
import yaml
from docker.errors import APIError, NotFound

from ds01spawner.containers import aime
from ds01spawner.containers.cgroups import find_mounts
from ds01spawner.containers.network import remove_network
from ds01spawner.containers.pins import unpin_all
from ds01spawner.errors import Ds01Error
from ds01spawner.ledger.store import Ledger
from ds01spawner.model import Inventory
from ds01spawner.settings import Settings

from . import surroundings
from .accounts import made_up_passwords

DEMO_ENV = "DS01_DEMO"
"""Environment variable with the path of the plan; all of a demo's own processes carry it or its settings' path."""

STATE_PARENT = Path("/var/lib")
"""Root-owned down from /, as the folders that containers mount must be."""
STATE_PREFIX = "ds01-demo-"
ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "deploy"
POLICY = HERE / "demo-policy"
SIMULATED_BOX = HERE / "demo-box.yaml"
STOP_SECONDS = 5


@dataclass(frozen=True)
class Plan:
    """What one demo was given. Saved as `<state>/plan.json`, readable by root only (it holds the passwords).

    Attributes:
        settings: arguments of `ds01spawner.setup`. port: of the page. proxy_api_port: of the Hub's proxy.
    """

    state: Path
    settings: dict[str, Any]
    port: int
    proxy_api_port: int
    image: str
    passwords: dict[str, str] = field(repr=False)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def file(self) -> Path:
        """Where the plan is saved."""
        return self.state / "plan.json"

    def resolved(self) -> Settings:
        """The settings, validated."""
        return Settings(**self.settings)

    def save(self) -> None:
        """Write the plan for the Hub's process."""
        text = json.dumps(asdict(self), default=str, indent=2)
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as output:
            output.write(text)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """The plan that `save` wrote."""
        fields = json.loads(path.read_text())
        return cls(**{**fields, "state": Path(fields["state"])})


# ------------------------------------------------------------------------------------------------ setting up


@contextlib.contextmanager
def prepared(client: docker.APIClient, *, port: int, image: str) -> Iterator[Plan]:
    """A demo's plan and folders; when the block ends, everything of that demo is removed.

    Args:
        port: wanted for the page; another one is taken if somebody listens there.
    """
    remove_leftovers(client)
    state = Path(tempfile.mkdtemp(prefix=STATE_PREFIX, dir=STATE_PARENT))
    with _alive(state):
        try:
            yield _plan(client, state, port, image)
        finally:
            remove(client, state)


def _plan(client: docker.APIClient, state: Path, port: int, image: str) -> Plan:
    gpus = surroundings.real_gpus()
    inventory = "nvml" if gpus else _own_box(state)
    page = surroundings.free_port(port)
    ports = [page]
    for _ in range(3):
        ports.append(surroundings.free_port(taken=ports))
    settings: dict[str, Any] = {
        "config_dir": str(state / "policy"),
        "state_dir": str(state / "state"),
        "workspaces": str(state / "workspaces"),
        "homes": str(state / "homes"),
        "inventory": inventory,
        "cgroup_root": "ds01demo" + state.name.removeprefix(STATE_PREFIX).lower(),
        "subnet": surroundings.free_subnet(client),
        "uid_range": surroundings.free_uids(client),
        "hub_port": ports[1],
        "service_port": ports[2],
    }
    for folder in ("shared/data", "shared/models", "workspaces", "homes"):
        (state / folder).mkdir(parents=True)
        (state / folder).chmod(0o755)
    state.chmod(0o755)  # containers' users reach their mounts below it; what is secret in it has its own mode
    (state / "shared/data/README.txt").write_text("A folder that everybody may read: data sets go here.\n")
    write_policy(state / "policy", state, image, gpus)
    plan = Plan(state, settings, page, ports[3], image, made_up_passwords())
    plan.save()
    return plan


def _own_box(state: Path) -> str:
    """A copy of the simulated box: its units get identities of their own, so two demos do not see each other's."""
    return str(shutil.copy(SIMULATED_BOX, state / "box.yaml"))


def write_policy(folder: Path, state: Path, image: str, gpus: Inventory | None) -> None:
    """The demo's policy for this box; `gpus` None means the simulated one, which has every kind."""
    folder.mkdir(mode=0o755)
    smallest, medium = "1g.5gb", "2g.10gb"
    if gpus is not None:
        cut = {unit.memory_bytes: unit.mig_profile for unit in gpus.units if unit.mig_profile}
        smallest, medium, *_ = (*(cut[memory] for memory in sorted(cut)), "", "")
    words = {"@IMAGE@": image, "@STATE@": str(state), "@MIG@": smallest, "@MEDIUM@": medium}
    for source in sorted(POLICY.glob("*.yaml")):
        text = source.read_text()
        for word, value in words.items():
            text = text.replace(word, value)
        (folder / source.name).write_text(text)
    absent = [name for name, profile in (("small", smallest), ("medium", medium)) if not profile]
    if gpus is not None and not any(unit.whole for unit in gpus.units):
        absent.append("whole")
    if absent:
        _drop_profiles(folder / "profiles.yaml", absent)


def _drop_profiles(path: Path, names: Iterable[str]) -> None:
    content = yaml.safe_load(path.read_text())
    for name in names:
        del content["profiles"][name]
    path.write_text(yaml.safe_dump(content, sort_keys=False))


# ------------------------------------------------------------------------------------------------ taking away


@contextlib.contextmanager
def _alive(state: Path) -> Iterator[TextIO]:
    """Hold the lock that tells other demos that this one lives."""
    with (state / "alive").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _is_dead(state: Path) -> bool:
    try:
        with (state / "alive").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return time.time() - state.stat().st_mtime > 60  # not being set up at this moment
    return True


def remove_leftovers(client: docker.APIClient) -> None:
    """Remove what demos left that were killed before they could clean up."""
    for state in STATE_PARENT.glob(f"{STATE_PREFIX}*"):
        if state.is_dir() and _is_dead(state):
            remove(client, state)


def remove(client: docker.APIClient, state: Path) -> None:
    """Remove a demo completely: its processes, containers, images, network, cgroups and folders. Repeatable."""
    end_processes(state)
    try:
        plan = Plan.load(state / "plan.json")
    except (FileNotFoundError, ValueError):  # killed before it had one: nothing else can exist
        shutil.rmtree(state, ignore_errors=True)
        return
    settings = plan.resolved()
    with _ledger(settings) as ledger:
        instance = ledger.instance if ledger is not None else None
    if instance is not None:
        remove_containers(client, instance)
        remove_images(client, plan)
        with contextlib.suppress(Ds01Error):
            remove_network(client, instance)
    remove_cgroups(settings.cgroup_root)
    unpin_all(range(settings.uid_range[0], settings.uid_range[1] + 1))
    shutil.rmtree(state, ignore_errors=True)


@contextlib.contextmanager
def _ledger(settings: Settings) -> Iterator[Ledger | None]:
    """The demo's ledger; None if there is none yet (the Hub never came so far) or it cannot be read."""
    if not (settings.state_dir / "ledger.sqlite").exists():
        yield None
        return
    try:
        ledger = Ledger.open(settings.url)
    except (Ds01Error, OSError):
        yield None
        return
    try:
        yield ledger
    finally:
        ledger.close()


def box_is_known(plan: Plan) -> bool:
    """True once the watcher has told what the box is: before that nobody could get a GPU."""
    with _ledger(plan.resolved()) as ledger:
        return ledger is not None and ledger.read_snapshot() is not None


def end_processes(state: Path) -> None:
    """End the demo's own processes on the host (Hub, proxy, watcher), politely first."""
    for signal_number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 3.0)):
        processes = _processes_of(state)
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and _processes_of(state):
            time.sleep(0.1)
        if not _processes_of(state):
            return


def _processes_of(state: Path) -> list[int]:
    """Host processes whose environment names this demo's state folder. Containers' never do."""
    marks = (f"{DEMO_ENV}={state}/".encode(), f"DS01_SETTINGS={state}/".encode())
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(folder.name) != os.getpid() and any(value.startswith(marks) for value in variables):
            found.append(int(folder.name))
    return found


def remove_containers(client: docker.APIClient, instance: str) -> None:
    """Stop and remove the containers of that installation, all at once."""
    chosen = {"label": f"{aime.LABEL_INSTANCE}={instance}"}
    ids = [str(container["Id"]) for container in client.containers(all=True, filters=chosen)]

    def one(container: str) -> None:
        own = docker.APIClient()
        with contextlib.closing(own), contextlib.suppress(NotFound):
            own.stop(container, timeout=STOP_SECONDS)
            own.remove_container(container, force=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, ids))


def remove_images(client: docker.APIClient, plan: Plan) -> None:
    """Remove the private tags (`<repository>:<name>._.<uid>`) of this demo's users; its image stays for the next."""
    first, last = plan.resolved().uid_range
    for image in client.images():
        for tag in image.get("RepoTags") or ():
            if any(aime.is_private(tag, uid) for uid in _uid_in(tag, first, last)):
                with contextlib.suppress(APIError):
                    client.remove_image(tag)


def _uid_in(tag: str, first: int, last: int) -> Iterator[int]:
    digits = tag.rpartition(aime.SEPARATOR)[2].partition("-")[0]
    if digits.isdigit() and first <= int(digits) <= last:
        yield int(digits)


def remove_cgroups(root: str) -> None:
    """Remove the demo's empty cgroup tree, under whichever driver and version it was made."""
    if shutil.which("systemctl"):
        subprocess.run(["systemctl", "stop", f"{root}.slice"], capture_output=True, check=False)
    for version in (1, 2):
        try:
            trees = set(find_mounts(version).trees.values())
        except Ds01Error:
            continue
        for tree in trees:
            for top in (tree / root, tree / f"{root}.slice"):
                _remove_cgroup(top)


def _remove_cgroup(top: Path) -> None:
    """rmdir from the leaves up: a cgroup's files go with it, and one that is in use stays."""
    if not top.is_dir():
        return
    for child in sorted(top.iterdir()):
        if child.is_dir():
            _remove_cgroup(child)
    with contextlib.suppress(OSError):
        top.rmdir()
