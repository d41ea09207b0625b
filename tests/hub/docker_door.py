"""A door in front of Docker's socket that a test can shut: to whoever goes through it, Docker is then away."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

DOCKER = "/var/run/docker.sock"


class DockerDoor:
    """Passes bytes both ways between its own socket and Docker's, until it is shut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For whoever is to go through the door."""
        return {"DOCKER_HOST": f"unix://{self.path}"}

    def open(self) -> None:
        """Let everybody through."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        """Docker is away: connections break, new ones are refused."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # A thread is in accept(): only shutdown wakes it.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.path.unlink(missing_ok=True)
        with self._lock:
            broken, self._open = self._open, []
        for each in broken:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(DOCKER)
            with self._lock:
                self._open += [client, server]
            left = threading.Semaphore(0)
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=_pass_on, args=(source, target, left), daemon=True).start()
            threading.Thread(target=self._clear, args=(client, server, left), daemon=True).start()

    def _clear(self, client: socket.socket, server: socket.socket, left: threading.Semaphore) -> None:
        left.acquire()
        left.acquire()
        with self._lock:
            self._open = [each for each in self._open if each not in (client, server)]
        client.close()
        server.close()


def _pass_on(source: socket.socket, target: socket.socket, left: threading.Semaphore) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
    left.release()
