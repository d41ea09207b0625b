"""The Docker network of one installation: one bridge on which containers cannot reach each other.

One network per user would end at about 30 of them (Docker's address pools), hence one for all, with
`enable_icc=false`, no IPv6, and the host rules of `firewall`. A network is used only if it is exactly ours: name,
owner label, driver, options and subnet; anything else is refused and never touched.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import docker.errors
import docker.types
import requests

from ds01spawner.errors import Code, EngineError, HostError

from .aime import LABEL_INSTANCE, LABEL_MANAGED
from .firewall import ensure_rules, remove_rules, verify_rules

__all__ = [
    "Network",
    "bridge_name",
    "ensure_network",
    "ensure_rules",
    "network_name",
    "remove_network",
    "remove_rules",
    "verify_rules",
]

_ROUTES = Path("/proc/net/route")
_BRIDGE = "com.docker.network.bridge"


@dataclass(frozen=True)
class Network:
    """A network that is ready. `gateway` is the host's address on it, where Hub and service listen."""

    id: str
    name: str
    bridge: str
    subnet: str
    gateway: str


def network_name(instance: str) -> str:
    """Docker name of the installation's network, `ds01-<first 8 of its uuid>`; `bridge_name` is the same.

    Raises:
        HostError: `instance` is not a uuid.
    """
    if not re.fullmatch(r"[0-9a-f]{8}(?:-?[0-9a-f]+)*", instance):
        raise HostError(f"{instance!r} is not the uuid of an installation.", code=Code.INTERNAL)
    return f"ds01-{instance[:8]}"


def bridge_name(instance: str) -> str:
    """Interface name of the network's bridge on the host: 13 of the 15 characters that Linux allows."""
    return network_name(instance)


def ensure_network(client: docker.APIClient, instance: str, subnet: str) -> Network:
    """The installation's network, made if it is not there.

    Args:
        instance: uuid of the installation. subnet: IPv4 network (`Settings.subnet`).

    Raises:
        HostError: `network_not_enforced`: a network of that name is not ours or not as it must be, or the subnet is
            in use; says what to do.
        EngineError: Docker does not answer.
    """
    name = network_name(instance)
    try:
        found = _find(client, name)
        if not found:
            _create(client, name, instance, subnet)
            found = _find(client, name)
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise EngineError(f"Docker cannot say or make the network {name}: {error}") from error
    if len(found) != 1:
        raise _refused(
            f"there are {len(found)} Docker networks {name}",
            f"Remove them by id: {', '.join(row['Id'] for row in found)}",
        )
    wrong = differences(found[0], _wanted(name, instance, subnet))
    if wrong:
        raise _refused(
            f"the Docker network {name} is not as it must be: {'; '.join(wrong)}",
            f"Stop this installation's servers, then run: docker network rm {name}. It is made anew at the next start.",
        )
    return Network(found[0]["Id"], name, bridge_name(instance), subnet, _gateway(subnet))


def remove_network(client: docker.APIClient, instance: str) -> None:
    """Remove the installation's network and rules; another's network of the same name is left alone.

    Raises:
        EngineError: Docker does not answer, or containers are still connected.
        HostError: the rules cannot be changed.
    """
    name = network_name(instance)
    try:
        for row in _find(client, name):
            if (row.get("Labels") or {}).get(LABEL_INSTANCE) == instance:
                client.remove_network(row["Id"])
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise EngineError(f"The Docker network {name} cannot be removed: {error}") from error
    remove_rules(bridge_name(instance))


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What of an existing network (the answer of inspect) is not as wanted, one sentence each."""
    configs = (found.get("IPAM") or {}).get("Config") or []
    plain = {
        "Driver": found.get("Driver"),
        "EnableIPv6": bool(found.get("EnableIPv6")),
        "Internal": bool(found.get("Internal")),
        "Subnets": [(row.get("Subnet"), row.get("Gateway")) for row in configs],
    }
    maps = {"label": found.get("Labels") or {}, "option": found.get("Options") or {}}
    wrong = [f"{key} is {plain[key]}, not {value}" for key, value in wanted["plain"].items() if plain[key] != value]
    wrong += [
        f"{kind} {key} is {maps[kind].get(key)!r}, not {value!r}"
        for kind in maps
        for key, value in wanted[kind].items()
        if maps[kind].get(key) != value
    ]
    return wrong


def _wanted(name: str, instance: str, subnet: str) -> dict[str, Any]:
    return {
        "plain": {"Driver": "bridge", "EnableIPv6": False, "Internal": False, "Subnets": [(subnet, _gateway(subnet))]},
        "label": {LABEL_INSTANCE: instance},
        "option": {
            f"{_BRIDGE}.name": name,
            f"{_BRIDGE}.enable_icc": "false",
            f"{_BRIDGE}.enable_ip_masquerade": "true",
        },
    }


def _gateway(subnet: str) -> str:
    return str(next(ipaddress.IPv4Network(subnet).hosts()))


def _find(client: docker.APIClient, name: str) -> list[dict[str, Any]]:
    """All networks of exactly that name: Docker's filter matches parts, and it allows twins."""
    return [client.inspect_network(row["Id"]) for row in client.networks(names=[name]) if row["Name"] == name]


def _create(client: docker.APIClient, name: str, instance: str, subnet: str) -> None:
    for other, where in _used_subnets(client.networks(), _ROUTES.read_text(), name):
        if other.overlaps(ipaddress.IPv4Network(subnet)):
            raise _refused(
                f"the subnet {subnet} overlaps {other} of {where}",
                "Choose another `subnet` in the settings, for instance a /20 of 172.16.0.0/12 that nothing uses.",
            )
    wanted = _wanted(name, instance, subnet)
    pool = docker.types.IPAMPool(subnet=subnet, gateway=_gateway(subnet))
    try:
        client.create_network(
            name,
            driver="bridge",
            options=wanted["option"],
            ipam=docker.types.IPAMConfig(pool_configs=[pool]),
            labels=wanted["label"] | {LABEL_MANAGED: "true"},
            enable_ipv6=False,
        )
    except docker.errors.APIError as error:
        if error.status_code == 409:  # another process of ours was quicker
            return
        raise _refused(
            f"Docker cannot make the network {name}: {error.explanation or error}",
            "Check `docker network ls`, the setting `subnet` and that dockerd may use iptables.",
        ) from error


def _used_subnets(
    networks: Iterable[Mapping[str, Any]], routes: str, bridge: str
) -> Iterator[tuple[ipaddress.IPv4Network, str]]:
    """Address ranges that Docker's networks and the host's routes use, with who uses them."""
    for row in networks:
        for config in (row.get("IPAM") or {}).get("Config") or []:
            subnet = config.get("Subnet") or ""
            if subnet and ":" not in subnet:
                yield ipaddress.IPv4Network(subnet, strict=False), f"the Docker network {row['Name']}"
    for line in routes.splitlines()[1:]:
        columns = line.split()
        interface, address, mask = columns[0], _dotted(columns[1]), _dotted(columns[7])
        if mask != "0.0.0.0" and interface != bridge:  # noqa: S104 - the default route's mask, nothing is bound
            yield ipaddress.IPv4Network(f"{address}/{mask}", strict=False), f"the interface {interface}"


def _dotted(word: str) -> str:
    """An address as /proc/net/route writes it: hexadecimal, in the machine's own byte order."""
    return socket.inet_ntoa(struct.pack("=I", int(word, 16)))


def _refused(why: str, remedy: str) -> HostError:
    return HostError(
        f"The installation's network cannot be used: {why}. {remedy}",
        code=Code.NETWORK_NOT_ENFORCED,
        facts={"problem": why},
    )
