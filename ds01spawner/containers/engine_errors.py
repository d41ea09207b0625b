"""One kind of error for everything that can go wrong between us and Docker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import docker
import requests
import urllib3

from ds01spawner.errors import Code, EngineError

T = TypeVar("T")


class EngineUnreachable(EngineError):
    """No answer from Docker at all, or one that says that the daemon itself is in trouble. Nothing is known."""


class EngineNotFound(EngineError):
    """Docker answered: there is no such container or image."""

    code = Code.INTERNAL


class EngineConflict(EngineError):
    """Docker answered: the name is taken, the container runs, the image is in use."""

    code = Code.INTERNAL


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn whatever docker-py and below raise into an EngineError that says what was being done."""
    try:
        yield
    except docker.errors.NotFound as error:
        raise EngineNotFound(f"{what}: Docker has no such thing ({_said(error)}).") from error
    except docker.errors.APIError as error:
        message = f"{what}: {_said(error)}"
        status = error.status_code
        if status == 409:
            raise EngineConflict(message, facts={"status": 409}) from error
        if status is not None and status < 500:
            raise EngineError(message, code=Code.INTERNAL, facts={"status": status}) from error
        raise EngineError(
            f"{message}. See the daemon's log (journalctl -u docker).", facts={"status": status}
        ) from error
    except (docker.errors.DockerException, requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise EngineUnreachable(
            f"{what}: Docker does not answer ({error}). Is the daemon running (systemctl status docker), and may this "
            "process use its socket ($DOCKER_HOST or /var/run/docker.sock)?"
        ) from error
    except ValueError as error:
        raise EngineUnreachable(f"{what}: Docker's answer makes no sense ({error}).") from error


def _said(error: docker.errors.APIError) -> str:
    explanation = error.explanation
    text = explanation.decode(errors="replace") if isinstance(explanation, bytes) else str(explanation or error)
    return text.strip().rstrip(".")


def told_each(what: str, stream: Iterable[T]) -> Iterator[T]:
    """The items of `stream`, with `told` around the fetching of each one, not around what is done with it."""
    items = iter(stream)
    while True:
        with told(what):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
