"""What this machine already uses, so that a demo can keep out of its way: ports, addresses, user ids, GPUs."""

from __future__ import annotations

import contextlib
import ipaddress
import pwd
import random
import re
import socket
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import docker

from ds01spawner.errors import InventoryError
from ds01spawner.gpu.inventory import open_inventory
from ds01spawner.model import Inventory

UID_POOL = (70_000, 99_999)
UID_SLICE = 200
"""User ids that one demo takes; it has three users, the rest is for what somebody tries out."""

SUBNETS = ipaddress.IPv4Network("172.16.0.0/12")
SUBNET_PREFIX = 24
PORTS = range(20_000, 32_000)
"""Below the kernel's range of outgoing connections (32768 and up), which take ports without asking."""


class NothingFree(Exception):
    """Everything that could be used is in use; the message says what."""


def free_port(wanted: int | None = None, *, host: str = "127.0.0.1", taken: Collection[int] = ()) -> int:
    """A TCP port that nobody listens on: `wanted` if that is free, else any.

    Raises:
        NothingFree: none of a hundred tries was free.
    """
    tries = [wanted] if wanted is not None else []
    tries += random.sample(PORTS, 100)
    for port in tries:
        if port not in taken and _can_bind(host, port):
            return port
    raise NothingFree(f"no free port on {host}")


def _can_bind(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_subnet(client: docker.APIClient, routes: Path = Path("/proc/net/route")) -> str:
    """A private IPv4 network that no route of the host and no Docker network touches.

    Raises:
        NothingFree: all are in use.
    """
    used = [*host_routes(routes.read_text() if routes.exists() else ""), *_docker_subnets(client)]
    candidates = list(SUBNETS.subnets(new_prefix=SUBNET_PREFIX))
    random.shuffle(candidates)
    for candidate in candidates:
        if not any(candidate.overlaps(network) for network in used):
            return str(candidate)
    raise NothingFree(f"no free network in {SUBNETS}")


def host_routes(table: str) -> tuple[ipaddress.IPv4Network, ...]:
    """The destinations of /proc/net/route (hexadecimal, little-endian), the default route left out."""
    rows = [line.split() for line in table.splitlines()[1:]]
    found = []
    for row in rows:
        address, mask = (bytes.fromhex(row[column])[::-1] for column in (1, 7))
        if any(mask):
            found.append(ipaddress.IPv4Network((int.from_bytes(address, "big"), bin(int.from_bytes(mask)).count("1"))))
    return tuple(found)


def _docker_subnets(client: docker.APIClient) -> Iterable[ipaddress.IPv4Network]:
    networks: list[dict[str, Any]] = client.networks()
    for network in networks:
        for part in (network.get("IPAM") or {}).get("Config") or ():
            subnet = part.get("Subnet", "")
            if subnet and ":" not in subnet:
                yield ipaddress.IPv4Network(subnet)


def free_uids(client: docker.APIClient) -> tuple[int, int]:
    """First and last of a slice of user ids that no account, process or container has.

    Raises:
        NothingFree: every slice is touched.
    """
    used = used_uids(client)
    starts = list(range(UID_POOL[0], UID_POOL[1] - UID_SLICE + 2, UID_SLICE))
    random.shuffle(starts)
    for start in starts:
        if not any(start <= uid < start + UID_SLICE for uid in used):
            return start, start + UID_SLICE - 1
    raise NothingFree(f"no {UID_SLICE} unused user ids between {UID_POOL[0]} and {UID_POOL[1]}")


def used_uids(client: docker.APIClient) -> frozenset[int]:
    """User ids of this host's accounts, of its running processes, and of all containers (`<name>._.<uid>`, user)."""
    found = {account.pw_uid for account in pwd.getpwall()}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            found.add(folder.stat().st_uid)
    for container in client.containers(all=True):
        for name in container.get("Names") or ():
            match = re.search(r"\._\.(\d+)$", name)
            if match:
                found.add(int(match[1]))
    return frozenset(found | set(_subordinate_uids()))


def _subordinate_uids(path: Path = Path("/etc/subuid")) -> Iterable[int]:
    """Ids that /etc/subuid gives to user namespaces, as far as they lie in our pool."""
    for line in path.read_text().splitlines() if path.exists() else ():
        fields = line.split(":")
        if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
            first = int(fields[1])
            yield from range(max(first, UID_POOL[0]), min(first + int(fields[2]), UID_POOL[1] + 1))


def real_gpus() -> Inventory | None:
    """What NVML tells of this machine's GPUs; None if there are none."""
    try:
        with open_inventory("auto") as source:
            inventory = source.read()
    except InventoryError:
        return None
    return inventory if inventory.gpus else None
