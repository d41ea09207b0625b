"""The edge to Docker: typed answers, one kind of error, safe to use from many threads.

Every failure of Docker or of the way to it is an `EngineError` with the remedy in it, so that callers can fail
closed without knowing docker-py. Nothing here decides; `occupancy.py` and `spec.py` do.
"""

from __future__ import annotations

import io
import re
import secrets
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import docker
import requests
from docker.utils import decode_json_header, kwargs_from_env

from ds01spawner.errors import Code, EngineError

from . import aime, cdi
from .engine_errors import EngineConflict, EngineNotFound, EngineUnreachable, told, told_each
from .facts import ContainerFacts, EngineInfo, ImageFacts, container_facts, engine_info, image_facts
from .pulling import PullMeter, PullProgress

TIMEOUT_S = 60
"""Longest wait for one answer; stopping and waiting for a container add their own time."""
MAX_FACT_AGE_S = 60.0
"""A running container is looked at again after this long even if nothing seems to have changed."""
MAX_FILE_BYTES = 2**20
GO_SYMLINK = 1 << 27
GO_NOT_REGULAR = 1 << 31 | 1 << 27 | 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21
"""Bits of Go's FileMode: folder, link, device, pipe, socket, character device."""
EVENT_TYPES = ("container", "image")
QUIET_EVENTS = ("exec_", "health_status", "top", "resize", "attach", "detach", "archive-path", "export")
"""Beginnings of what changes nothing that `ContainerFacts` has; health checks alone make several a second."""

__all__ = [
    "ContainerFacts",
    "Engine",
    "EngineConflict",
    "EngineEvent",
    "EngineInfo",
    "EngineNotFound",
    "EngineUnreachable",
    "ImageFacts",
    "PullProgress",
]


@dataclass(frozen=True)
class EngineEvent:
    """One event. kind: container or image; action: start, die, destroy, …; id: of what it happened to; at: epoch s."""

    kind: str
    action: str
    id: str
    at: float
    attributes: Mapping[str, str]


@dataclass(frozen=True)
class _Cached:
    """A fully inspected container, the listing that it belongs to, and when (monotonic s) it was inspected."""

    facts: ContainerFacts
    listing: tuple[Any, ...]
    at: float


class Engine:
    """One Docker engine. All methods block and may be called from any thread; all raise EngineError.

    Args:
        base_url: of the daemon; None = $DOCKER_HOST, then the usual socket.
        timeout: seconds to wait for one answer.
    """

    def __init__(self, base_url: str | None = None, *, timeout: int = TIMEOUT_S) -> None:
        self._base_url = base_url
        self._timeout = timeout
        self._local = threading.local()
        self._lock = threading.Lock()
        self._clients: list[docker.APIClient] = []
        self._version = ""
        self._cache: dict[str, _Cached] = {}

    @property
    def client(self) -> docker.APIClient:
        """This thread's own docker-py client (they are not safe to share)."""
        client: docker.APIClient | None = getattr(self._local, "client", None)
        if client is None:
            client = self._connect(self._timeout)
            self._local.client = client
        return client

    def _connect(self, timeout: int) -> docker.APIClient:
        options: dict[str, Any] = dict(kwargs_from_env())
        if self._base_url:
            options = {"base_url": self._base_url}
        with told("Connecting to Docker"):
            # The version is agreed once; later clients save the question.
            client = docker.APIClient(version=self._version or "auto", timeout=timeout, **options)
        with self._lock:
            self._version = client.api_version
            self._clients.append(client)
        return client

    def close(self) -> None:
        """Close all threads' connections. The engine may be used again afterwards."""
        with self._lock:
            clients, self._clients = self._clients, []
        self._local = threading.local()
        for client in clients:
            with suppress(OSError, requests.RequestException):
                client.close()

    # ------------------------------------------------------------------ engine

    def info(self) -> EngineInfo:
        """What the engine is and can do; asked anew at each call (CDI devices come and go)."""
        with told("Asking Docker what it is"):
            info, version = self.client.info(), self.client.version()
            major, _, minor = str(version.get("ApiVersion", "0.0")).partition(".")
            return engine_info(info, version, cdi.discover(info, (int(major), int(minor or 0))))

    def ping(self) -> None:
        """Return if Docker answers, raise otherwise."""
        with told("Asking Docker for a sign of life"):
            self.client.ping()

    def events(self, since: float | None = None) -> Iterator[EngineEvent]:
        """Container and image events as they come, from `since` (epoch seconds) or from now; ends with the daemon.

        Events only wake: the daemon keeps few and may drop some, so that the list stays the evidence. Each event
        also makes `list_facts` look at its container again. Closing the generator closes the connection.
        """
        what = "Following Docker's events"
        client = self._connect(self._timeout)
        try:
            with told(what):
                moment = None if since is None else int(since)
                stream = client.events(since=moment, filters={"type": list(EVENT_TYPES)}, decode=True)
            for raw in told_each(what, stream):
                event = _event(raw)
                if not event.action.startswith(QUIET_EVENTS):
                    self.forget(event.id)
                yield event
        finally:
            self._drop(client)

    def _drop(self, client: docker.APIClient) -> None:
        with self._lock, suppress(ValueError):
            self._clients.remove(client)
        client.close()

    # ------------------------------------------------------------------ containers, looking

    def list_facts(self) -> tuple[ContainerFacts, ...]:
        """Every container of the engine, ours or not, running or not, sorted by name.

        One question for the list, and one more per container that is new, looks different in the list, had an event,
        or runs and was last inspected more than a minute ago. One that vanishes in between is left out.
        """
        with told("Listing containers"):
            rows = self.client.containers(all=True)
        facts = [self._known(row) for row in rows]
        alive = {row["Id"] for row in rows}
        with self._lock:
            for gone in set(self._cache) - alive:
                del self._cache[gone]
        return tuple(sorted((f for f in facts if f is not None), key=lambda f: f.name))

    def _known(self, row: Mapping[str, Any]) -> ContainerFacts | None:
        listing = _listing(row)
        now = time.monotonic()
        with self._lock:
            cached = self._cache.get(row["Id"])
        if cached is not None and cached.listing == listing:
            settled = not cached.facts.may_run
            if settled or now - cached.at < MAX_FACT_AGE_S:
                return cached.facts
        facts = self.inspect_facts(row["Id"])
        if facts is not None:
            with self._lock:
                self._cache[facts.id] = _Cached(facts, listing, now)
        return facts

    def forget(self, container: str = "") -> None:
        """Let the next `list_facts` inspect that container (id or name) anew; "" = all of them."""
        with self._lock:
            for key, cached in list(self._cache.items()):
                if not container or key.startswith(container) or cached.facts.name == container:
                    del self._cache[key]

    def inspect_facts(self, container: str) -> ContainerFacts | None:
        """One container by id or name, asked now; None if there is none.

        Raises:
            ValueError: no id and no name (trap T18: Docker would answer for the list of all).
        """
        _require(container)
        try:
            with told(f"Looking at container {container}"):
                return container_facts(self.client.inspect_container(container))
        except EngineNotFound:
            return None

    def logs(self, container: str, lines: int = 50) -> str:
        """The last lines that the container wrote, both streams."""
        _require(container)
        with told(f"Reading the log of {container}"):
            raw = self.client.logs(container, stdout=True, stderr=True, tail=lines)
        return bytes(raw).decode(errors="replace")

    def disk_use(self, container: str) -> int:
        """Bytes that the container itself has written outside its mounts. Docker measures at each call."""
        _require(container)
        with told(f"Measuring container {container}"):
            client: Any = self.client  # docker-py has no public way to ask for the size
            url = client._url("/containers/{0}/json", container)
            answer = client._result(client._get(url, params={"size": 1}), True)
        return int(answer.get("SizeRw") or 0)

    def changes(self, container: str) -> tuple[tuple[str, int], ...]:
        """What differs from its image, as (path, kind): 0 = modified, 1 = added, 2 = deleted."""
        _require(container)
        with told(f"Comparing container {container} with its image"):
            return tuple((row["Path"], int(row["Kind"])) for row in self.client.diff(container) or ())

    # ------------------------------------------------------------------ containers, acting

    def create(self, name: str, config: Mapping[str, Any]) -> str:
        """Create a container from a raw API body (`spec.build`) and return its id.

        Raises:
            EngineConflict: the name is taken. EngineNotFound: no such image.
        """
        with told(f"Creating container {name}"):
            client: Any = self.client
            return str(client.create_container_from_config(dict(config), name)["Id"])

    def start(self, container: str) -> None:
        """Start it; no error if it runs already."""
        with self._acting("Starting", container):
            self.client.start(container)

    def stop(self, container: str, timeout: int = 10) -> None:
        """SIGTERM, then SIGKILL after `timeout` seconds; returns when it has stopped, at once if it had before."""
        with self._acting("Stopping", container):
            self.client.stop(container, timeout=timeout)

    def kill(self, container: str, signal: str = "SIGKILL") -> None:
        """Send a signal.

        Raises:
            EngineConflict: it does not run.
        """
        with self._acting("Killing", container):
            self.client.kill(container, signal)

    def remove(self, container: str, *, force: bool = False) -> None:
        """Remove it with its anonymous volumes; no error if it is gone already. force: even if it runs."""
        with suppress(EngineNotFound), self._acting("Removing", container):
            self.client.remove_container(container, v=True, force=force)

    def rename(self, container: str, name: str) -> None:
        """Give it another name.

        Raises:
            EngineConflict: the name is taken.
        """
        with self._acting("Renaming", container):
            self.client.rename(container, name)

    def update(self, container: str, update: Mapping[str, int]) -> None:
        """Change limits in place (`ContainerSpec.update`; 0 = leave as it is).

        Sent in one question, memory and swap together: Docker refuses a memory above the old swap limit.
        """
        with self._acting("Changing the limits of", container):
            client: Any = self.client  # update_container() of docker-py cannot change pids_limit
            wanted = {key: value for key, value in update.items() if value}
            url = client._url("/containers/{0}/update", container)
            client._result(client._post_json(url, data=wanted), True)

    def wait(self, container: str, timeout: int | None = None) -> int:
        """Wait until it has stopped; its exit code. timeout: seconds, then EngineUnreachable."""
        with self._acting("Waiting for", container):
            return int(self.client.wait(container, timeout=timeout)["StatusCode"])

    @contextmanager
    def _acting(self, what: str, container: str) -> Iterator[None]:
        _require(container)
        try:
            with told(f"{what} container {container}"):
                yield
        finally:
            self.forget(container)

    # ------------------------------------------------------------------ images

    def image_facts(self, ref: str) -> ImageFacts | None:
        """One image by reference or id, or None if it is not on this machine."""
        _require(ref)
        try:
            with told(f"Looking at image {ref}"):
                client: Any = self.client
                return image_facts(client.inspect_image(ref))
        except EngineNotFound:
            return None

    def tag(self, image: str, ref: str) -> None:
        """Give an image a further name; a name that pointed elsewhere moves."""
        repo, _, label = ref.rpartition(":")
        with told(f"Tagging {image} as {ref}"):
            self.client.tag(image, repo, label, force=True)

    def remove_image(self, ref: str) -> bool:
        """Untag it, and delete it when that was its last name. False if it was gone or is in use."""
        try:
            with told(f"Removing image {ref}"):
                self.client.remove_image(ref)
        except (EngineNotFound, EngineConflict):
            return False
        return True

    def commit(self, container: str, config: Mapping[str, Any], comment: str = "") -> str:
        """Make an untagged image of a container's file system and return its id. config: overrides (API `Config`)."""
        _require(container)
        with told(f"Saving the changes of container {container}"):
            return str(self.client.commit(container, message=comment, conf=dict(config))["Id"])

    def save(self, image: str) -> Iterator[bytes]:
        """The image as a `docker save` archive, in pieces."""
        what = f"Reading image {image}"
        with told(what):
            stream = self.client.get_image(image)
        yield from told_each(what, stream)

    def load(self, archive: Iterable[bytes] | io.BufferedIOBase) -> None:
        """Take in a `docker save` archive; layers that the engine has may be missing in it."""
        client: Any = self.client
        with told("Loading an image"):
            rows = list(client.load_image(archive))
        failed = [row["error"] for row in rows if "error" in row]
        if failed:
            raise EngineError(f"Loading an image: {failed[0]}", code=Code.INTERNAL)

    def pull(self, ref: str, on_progress: Callable[[PullProgress], None] | None = None) -> ImageFacts:
        """Fetch an image from its registry.

        Args:
            on_progress: called with bytes done and expected, summed over the layers, whenever they change.

        Raises:
            EngineError: code image_missing when the registry does not have it or does not let us.
        """
        meter = PullMeter()
        try:
            with told(f"Pulling {ref}"):
                events = self.client.pull(ref, stream=True, decode=True)
        except EngineNotFound as error:
            raise EngineError(error.message, code=Code.IMAGE_MISSING) from error
        except EngineError as error:
            if error.facts.get("status") != 400:
                raise
            # A name that Docker's grammar does not know is somebody's slip, not a fault of the engine.
            raise EngineError(f"{error.message}: {ref} is no image reference.", code=Code.IMAGE_MISSING) from error
        for event in told_each(f"Pulling {ref}", events):
            if "error" in event:
                raise EngineError(
                    f"{ref} cannot be fetched: {event['error']}. Check the name and the way to its registry, or "
                    f"bring the image by hand (docker load).",
                    code=Code.IMAGE_MISSING,
                )
            progress = meter.feed(event)
            if progress is not None and on_progress is not None:
                on_progress(progress)
        facts = self.image_facts(ref)
        if facts is None:
            raise EngineError(f"{ref} was fetched but is not there.", code=Code.IMAGE_MISSING)
        return facts

    def read_file(self, image: str, path: str) -> bytes | None:
        """A small file out of an image, or None if it has none of that name. No process of the image ever runs.

        Ask with an image id and keep the answer: each call makes and removes a container.
        """
        body = {
            "Image": image,
            "Cmd": ["-"],
            # An image that says `all` would make this container look as if it held every GPU.
            "Env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "Labels": {**aime.PROBE_LABELS, aime.LABEL_PROBE: "true"},
            "HostConfig": {"NetworkMode": "none"},
        }
        name = f"ds01-probe-{secrets.token_hex(6)}"
        container = self.create(name, body)
        try:
            return self._read(container, path, follow=True)
        finally:
            self.remove(container, force=True)

    def _read(self, container: str, path: str, *, follow: bool) -> bytes | None:
        client: Any = self.client
        try:
            with told(f"Reading {path}"):
                # Asked first: an archive that is not read to its end keeps Docker from removing the container.
                url = client._url("/containers/{0}/archive", container)
                answer = client.head(url, params={"path": path}, timeout=self._timeout)
                client._raise_for_status(answer)
                stat = decode_json_header(answer.headers["x-docker-container-path-stat"])
                if stat["mode"] & GO_SYMLINK:
                    # Docker has followed it to its end, inside the image.
                    return self._read(container, stat["linkTarget"], follow=False) if follow else None
                if stat["mode"] & GO_NOT_REGULAR:
                    return None
                if stat["size"] > MAX_FILE_BYTES:
                    raise EngineError(f"{path} has more than {MAX_FILE_BYTES} bytes.", code=Code.INTERNAL)
                raw = b"".join(client.get_archive(container, path)[0])
        except EngineNotFound:
            return None
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            member = archive.next()
            file = archive.extractfile(member) if member is not None else None
            return file.read() if file is not None else None


def _require(name: str) -> None:
    if not name:
        raise ValueError("an empty container or image name would mean all of them")


def _listing(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a row in the list must be as before for a cached inspection to hold. Of the status only the part
    that does not count minutes: `Up 5 minutes (Paused)` → `Up (Paused)`."""
    networks = (row.get("NetworkSettings") or {}).get("Networks") or {}
    addresses = tuple(sorted((name, (entry or {}).get("IPAddress", "")) for name, entry in networks.items()))
    note = re.search(r"\(.*?\)", row.get("Status") or "")
    return (row.get("State"), tuple(row.get("Names") or ()), row.get("Image"), note and note[0], addresses)


def _event(raw: Mapping[str, Any]) -> EngineEvent:
    actor = raw.get("Actor") or {}
    at = raw.get("timeNano")
    return EngineEvent(
        kind=str(raw.get("Type") or ""),
        action=str(raw.get("Action") or raw.get("status") or ""),
        id=str(actor.get("ID") or raw.get("id") or ""),
        at=at / 1e9 if isinstance(at, int) else float(raw.get("time") or 0),
        attributes=dict(actor.get("Attributes") or {}),
    )
