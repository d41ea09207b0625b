"""The installation's network and host rules, tried from inside containers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ds01spawner.containers import firewall, network
from ds01spawner.containers.engine import Engine
from ds01spawner.containers.firewall import Wall, leads, parse_rules
from ds01spawner.containers.network import (
    Network,
    bridge_name,
    differences,
    ensure_network,
    ensure_rules,
    network_name,
    remove_network,
    remove_rules,
    verify_rules,
)
from ds01spawner.errors import Code, EngineError, HostError

BRIDGE, GATEWAY, PORTS = "ds01-aabbccdd", "172.31.0.1", (8081, 8082)
INSTANCE = "0a1b2c3d-1111-4222-8333-444444444444"


def shell(line: str) -> str:
    return subprocess.run(["sh", "-ec", line], capture_output=True, text=True, check=True).stdout


# --------------------------------------------------------------------------- pure parts


def test_names_fit_an_interface() -> None:
    assert network_name(INSTANCE) == bridge_name(INSTANCE) == "ds01-0a1b2c3d"
    assert len(bridge_name(INSTANCE)) <= 15
    for odd in ("", "x", "../../etc", "DEADBEEF-1"):
        with pytest.raises(HostError):
            network_name(odd)


@pytest.mark.parametrize(
    ("before", "in_place"),
    [
        ([], True),
        (["-j DROP"], True),
        (["-p tcp -m tcp --dport 22 -j REJECT --reject-with icmp-port-unreachable", "-j LOG"], True),
        (["-i ds01-00000000 -j DS01-00000000"], True),
        (["-i lo -j ACCEPT", "-i docker0 -j ACCEPT"], True),
        (["-m comment --comment counted"], True),
        (["-j ACCEPT"], False),
        (["-j RETURN"], False),
        (["-p tcp -m tcp --dport 80 -j ACCEPT"], False),
        (["-i ds01-aabbccdd -j ACCEPT"], False),
        (["-i ds01-+ -j ACCEPT"], False),
        (["-i + -j ACCEPT"], False),
        (["! -i eth0 -j ACCEPT"], False),
        (["-j ufw-before-input"], False),
    ],
)
def test_hook_counts_only_if_nothing_before_it_lets_traffic_through(before: list[str], in_place: bool) -> None:
    hook = f"-i {BRIDGE} -j DS01-AABBCCDD"
    assert leads([*before, hook, "-j ACCEPT"], hook, BRIDGE) is in_place
    assert not leads(before, hook, BRIDGE)


def test_rules_are_parsed_by_chain() -> None:
    text = "-P INPUT ACCEPT\n-N X\n-A INPUT -i eth0 -j X\n-A X -j DROP\n"
    assert parse_rules(text) == {"INPUT": ["-i eth0 -j X"], "X": ["-j DROP"]}


def test_ipv6_rules_let_nothing_pass() -> None:
    assert set(map(tuple, Wall(BRIDGE, GATEWAY, PORTS).rules(6).values())) == {("-j DROP",)}


def test_used_subnets_come_from_docker_and_routes() -> None:
    networks = [{"Name": "bridge", "IPAM": {"Config": [{"Subnet": "172.17.0.0/16"}, {"Subnet": "fd00::/64"}]}},
                {"Name": "host", "IPAM": {"Config": None}}]  # fmt: skip
    routes = (
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n"
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\n"
        "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n"
        f"{BRIDGE}\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n"
    )
    found = [(str(subnet), where) for subnet, where in network._used_subnets(networks, routes, BRIDGE)]
    assert found == [("172.17.0.0/16", "the Docker network bridge"), ("192.0.2.0/24", "the interface eth0")]


# --------------------------------------------------------------------------- rules, in a network namespace of their own


@pytest.fixture
def apart() -> Callable[[Callable[[], object]], None]:
    """Runs a function in a fresh network namespace: its iptables touch nobody's."""

    def run(test: Callable[[], object]) -> None:
        failures: list[BaseException] = []

        def inside() -> None:
            try:
                if ctypes.CDLL(None, use_errno=True).unshare(0x40000000) != 0:  # CLONE_NEWNET
                    raise OSError(ctypes.get_errno(), "unshare")
                test()
            except BaseException as error:  # carried over to the test's own thread
                failures.append(error)

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]

    return run


Apart = Callable[[Callable[[], object]], None]


def listing() -> str:
    return shell("iptables -S; ip6tables -S")


@pytest.mark.docker
class TestRules:
    @pytest.fixture(params=["nft", "legacy"])
    def backend(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """Both kinds of iptables, whichever is the machine's default."""
        for family in ("iptables", "ip6tables"):
            for end in ("", "-restore"):
                tool = shutil.which(f"{family}-{request.param}{end}")
                if tool is None:
                    pytest.skip(f"no {family}-{request.param}{end} here")
                (tmp_path / f"{family}{end}").symlink_to(tool)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return str(request.param)

    @pytest.mark.usefixtures("backend")
    def test_made_once_repaired_and_removed(self, apart: Apart) -> None:
        def test() -> None:
            shell("iptables -A INPUT -i lo -j ACCEPT; iptables -N MINE; iptables -A FORWARD -j MINE")
            before = listing()
            assert len(verify_rules(BRIDGE, GATEWAY, PORTS)) >= 10
            ensure_rules(BRIDGE, GATEWAY, PORTS)
            assert verify_rules(BRIDGE, GATEWAY, PORTS) == ()
            made = listing()
            ensure_rules(BRIDGE, GATEWAY, PORTS)
            assert listing() == made, "again changes nothing"
            for harm in (
                "iptables -F",
                "iptables -D INPUT 1",
                f"iptables -I INPUT -i {BRIDGE} -j ACCEPT",
                "iptables -I DS01-AABBCCDD 1 -j ACCEPT",
                "iptables -D DS01-AABBCCDD-F 2",
                "iptables -A DS01-AABBCCDD -j ACCEPT",
                "ip6tables -F DS01-AABBCCDD",
                "ip6tables -I FORWARD -j ACCEPT",
            ):
                shell(harm)
                assert verify_rules(BRIDGE, GATEWAY, PORTS), harm
                ensure_rules(BRIDGE, GATEWAY, PORTS)
                assert verify_rules(BRIDGE, GATEWAY, PORTS) == (), harm
                assert listing().count(f"-A INPUT -i {BRIDGE} -j DS01-AABBCCDD\n") == 2, harm
            shell("iptables -F INPUT; iptables -A INPUT -i lo -j ACCEPT; ip6tables -D FORWARD -j ACCEPT")
            shell("iptables -F FORWARD; iptables -A FORWARD -j MINE")
            remove_rules(BRIDGE)
            assert listing() == before
            remove_rules(BRIDGE)

        apart(test)

    @pytest.mark.usefixtures("backend")
    def test_changed_ports_take_the_place_of_the_old_ones(self, apart: Apart) -> None:
        def test() -> None:
            ensure_rules(BRIDGE, GATEWAY, (1, 2))
            ensure_rules(BRIDGE, GATEWAY, (3,))
            assert "--dport 3 " in listing()
            assert "--dport 1 " not in listing()

        apart(test)

    def test_two_installations_do_not_disturb_each_other(self, apart: Apart) -> None:
        def test() -> None:
            others = ("ds01-00000000", "172.30.0.1", (1, 2))
            ensure_rules(BRIDGE, GATEWAY, PORTS)
            ensure_rules(*others)
            assert verify_rules(BRIDGE, GATEWAY, PORTS) == ()
            remove_rules(BRIDGE)
            assert verify_rules(*others) == ()

        apart(test)

    def test_forwarding_hooks_lie_where_docker_leaves_them(self, apart: Apart) -> None:
        def test() -> None:
            shell("iptables -N DOCKER-USER; iptables -A DOCKER-USER -j RETURN; iptables -A FORWARD -j DOCKER-USER")
            ensure_rules(BRIDGE, GATEWAY, PORTS)
            shell("iptables -I FORWARD 2 -j ACCEPT")  # as Docker does for each new network
            assert verify_rules(BRIDGE, GATEWAY, PORTS) == ()
            assert f"-A DOCKER-USER -o {BRIDGE} -j DS01-AABBCCDD-F\n" in listing()

        apart(test)

    def test_rules_that_print_otherwise_are_compared_by_iptables_itself(
        self, apart: Apart, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def test() -> None:
            ensure_rules(BRIDGE, GATEWAY, PORTS)
            plain = Wall.rules
            monkeypatch.setattr(  # the same rules in another spelling, as an older version might print them
                Wall,
                "rules",
                lambda wall, family: {
                    chain: [rule.replace("-m tcp --dport", "--dport") for rule in rules]
                    for chain, rules in plain(wall, family).items()
                },
            )
            assert verify_rules(BRIDGE, GATEWAY, PORTS) == ()
            assert verify_rules(BRIDGE, GATEWAY, (8081, 8083)) != ()

        apart(test)


class TestFailure:
    def test_missing_iptables(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(firewall, "_BRIDGE_FILTER", self._switch(tmp_path, "1"))
        with pytest.raises(HostError, match=r"iptables is not installed\. Install the package") as caught:
            ensure_rules(BRIDGE, GATEWAY, PORTS)
        assert caught.value.code is Code.NETWORK_NOT_ENFORCED

    def test_missing_rights(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        tool = tmp_path / "iptables"
        tool.write_text("#!/bin/sh\necho 'Permission denied (you must be root)' >&2\nexit 4\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(firewall, "_BRIDGE_FILTER", self._switch(tmp_path, "1"))
        with pytest.raises(HostError, match=r"you must be root.*must run as root"):
            ensure_rules(BRIDGE, GATEWAY, PORTS)

    def test_bridged_frames_that_pass_no_rule(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(firewall, "_BRIDGE_FILTER", tmp_path / "missing" / "file")
        with pytest.raises(HostError, match="modprobe br_netfilter"):
            ensure_rules(BRIDGE, GATEWAY, PORTS)

    def test_bridge_filter_is_switched_on(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        switch = self._switch(tmp_path, "0")
        monkeypatch.setattr(firewall, "_BRIDGE_FILTER", switch)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(HostError, match="not installed"):
            ensure_rules(BRIDGE, GATEWAY, PORTS)
        assert switch.read_text() == "1\n"

    def _switch(self, folder: Path, value: str) -> Path:
        path = folder / "bridge-nf-call-iptables"
        path.write_text(value)
        return path


# --------------------------------------------------------------------------- the real thing


@dataclass
class Listener:
    """A TCP server of the host on all addresses that says hello."""

    port: int


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    with socket.create_server(("0.0.0.0", 0), backlog=50) as server:
        server.settimeout(0.2)
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    connection.sendall(b"hello\n")
                    connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Listener(server.getsockname()[1])
        finally:
            stop.set()
            thread.join()


@dataclass
class Box:
    """A container, and what it can reach."""

    client: Any
    id: str
    ip: str

    def sh(self, line: str) -> str:
        made = self.client.exec_create(self.id, ["sh", "-c", line])
        return str(self.client.exec_start(made["Id"]).decode())

    def reaches(self, *targets: tuple[str, int]) -> list[bool]:
        """Which of the TCP servers say something within 2 s, asked all at once."""
        asks = [
            f"(busybox timeout 2 nc -w 2 {ip} {port} </dev/null 2>/dev/null | grep -q hello && echo {number}) &"
            for number, (ip, port) in enumerate(targets)
        ]
        answered = self.sh(" ".join(asks) + " wait").split()
        return [str(number) in answered for number in range(len(targets))]


@pytest.fixture(scope="module")
def instance() -> str:
    return str(uuid.uuid4())


@pytest.fixture(scope="module")
def net(engine: Engine, instance: str, require: Callable[[str, str | None], None]) -> Iterator[Network]:
    """A network without rules yet. Every test run takes its own subnet, so that runs do not disturb each other."""
    require("iptables", None if shutil.which("iptables-restore") else "no iptables")
    made = ensure_network(engine.client, instance, f"10.219.{os.getpid() % 250}.0/28")
    yield made
    remove_network(engine.client, instance)
    assert made.name not in [row["Name"] for row in engine.client.networks()]
    assert bridge_name(instance) not in listing()


@pytest.fixture(scope="module")
def boxes(engine: Engine, net: Network, tiny_image: str) -> Iterator[tuple[Box, Box, Box]]:
    """Two containers on the network and one on Docker's own, each with a server on port 7000."""
    client = engine.client
    made: list[Box] = []
    for number, name in enumerate((net.name, net.name, "bridge")):
        body = client.create_container_config(
            tiny_image,
            ["sh", "-c", "busybox nc -ll -p 7000 -e echo hello"],
            user="70001:70001",
            host_config=client.create_host_config(network_mode=name, cap_drop=["ALL"], init=True),
        )
        made_id = client.create_container_from_config(body, f"dstest-host-net{number}-{net.name[5:]}")["Id"]
        client.start(made_id)
        addresses = client.inspect_container(made_id)["NetworkSettings"]["Networks"]
        made.append(Box(client, made_id, addresses[name]["IPAddress"]))
    yield made[0], made[1], made[2]
    for box in made:
        client.remove_container(box.id, force=True)


@pytest.fixture(scope="module")
def outside() -> Iterator[tuple[str, str]]:
    """Addresses of a machine beyond the host, which also plays a cloud's metadata server."""
    name, public, metadata = f"dstest-{os.getpid()}", "198.51.100.2", "169.254.169.254"
    link = f"dst{os.getpid()}"
    shell(f"""ip netns add {name}; ip link add {link} type veth peer name eth9 netns {name}
        ip addr add 198.51.100.1/24 dev {link}; ip link set {link} up; ip route add {metadata}/32 dev {link}
        ip -n {name} addr add {public}/24 dev eth9; ip -n {name} addr add {metadata}/32 dev eth9
        ip -n {name} link set eth9 up; ip -n {name} link set lo up""")
    server = subprocess.Popen(
        ["ip", "netns", "exec", name, "busybox", "nc", "-ll", "-p", "7000", "-e", "echo", "hello"]
    )
    yield public, metadata
    server.terminate()
    server.wait()
    shell(f"ip link del {link} || true; ip netns del {name}")


def host_reaches(ip: str, port: int) -> bool:
    try:
        with socket.create_connection((ip, port), timeout=2) as connection:
            connection.settimeout(2)
            return connection.recv(10) == b"hello\n"
    except OSError:
        return False


@pytest.mark.docker
class TestFromInside:
    """One story in one order: without rules, with them, repaired."""

    def test_isolation_of_the_host_and_the_neighbour(
        self, net: Network, boxes: tuple[Box, Box, Box], outside: tuple[str, str]
    ) -> None:
        one, two, foreign = boxes
        public, metadata = outside
        host = shell("ip -4 -o addr show scope global").split()
        others = [word.split("/")[0] for word in host if "/" in word and not word.startswith(net.gateway)]
        with listening() as hub, listening() as service, listening() as other:
            hosts_own = [(ip, other.port) for ip in (net.gateway, *others)]
            hubs_elsewhere = [(ip, hub.port) for ip in others if ip[:4] != "198."]
            neighbours = [(two.ip, 7000), (foreign.ip, 7000)]

            # Controls: everything listens, and without rules the host's ports are open to containers.
            assert all(host_reaches(*target) for target in (*neighbours, (public, 7000), (metadata, 7000)))
            assert all(one.reaches(*hosts_own)), "the rules, not something else, close these"
            assert one.reaches((metadata, 7000)) == [True]

            ensure_rules(net.bridge, net.gateway, (hub.port, service.port))
            assert one.reaches((net.gateway, hub.port), (net.gateway, service.port)) == [True, True]
            assert not any(one.reaches(*hosts_own, *hubs_elsewhere)), "only the gateway's two ports"
            assert not any(one.reaches(*neighbours, (metadata, 7000)))
            assert foreign.reaches((one.ip, 7000)) == [False]
            assert one.reaches((public, 7000)) == [True], "the way out through NAT is open"
            assert host_reaches(one.ip, 7000), "the Hub reaches the server"
            assert foreign.reaches(hosts_own[0]) == [True], "other networks are not ours to close"

    def test_no_ipv6_at_all_in_containers(self, boxes: tuple[Box, Box, Box]) -> None:
        lines = boxes[0].sh("cat /proc/net/if_inet6").splitlines()
        assert all(line.endswith(" lo") for line in lines)

    def test_raw_packets_are_refused(self, boxes: tuple[Box, Box, Box]) -> None:
        answer = boxes[0].sh(f"busybox arping -c 1 {boxes[1].ip} 2>&1; busybox ping -c 1 -W 1 {boxes[1].ip} 2>&1")
        assert "1 packets received" not in answer
        assert "bytes from" not in answer


@pytest.mark.docker
class TestNetwork:
    def test_again_finds_the_same(self, engine: Engine, instance: str, net: Network) -> None:
        assert ensure_network(engine.client, instance, net.subnet) == net
        options = engine.client.inspect_network(net.id)["Options"]
        assert options["com.docker.network.bridge.enable_icc"] == "false"
        assert Path("/sys/class/net", net.bridge).exists()

    def test_other_subnet_is_refused_with_a_remedy(self, engine: Engine, instance: str, net: Network) -> None:
        with pytest.raises(HostError, match=f"Subnets is .*docker network rm {net.name}") as caught:
            ensure_network(engine.client, instance, "10.218.0.0/28")
        assert caught.value.code is Code.NETWORK_NOT_ENFORCED

    def test_network_in_use_is_not_torn_away(
        self, engine: Engine, instance: str, net: Network, boxes: tuple[Box, Box, Box]
    ) -> None:
        with pytest.raises(EngineError, match="cannot be removed"):
            remove_network(engine.client, instance)
        assert host_reaches(boxes[0].ip, 7000)

    def test_overlap_names_who_has_the_subnet(self, engine: Engine, net: Network) -> None:
        stranger = str(uuid.uuid4())
        try:
            with pytest.raises(HostError, match=f"overlaps {net.subnet} of the Docker network {net.name}"):
                ensure_network(engine.client, stranger, net.subnet)
        finally:
            remove_network(engine.client, stranger)

    def test_foreign_network_of_that_name_is_refused_and_kept(self, engine: Engine) -> None:
        client, stranger = engine.client, str(uuid.uuid4())
        foreign = client.create_network(network_name(stranger), driver="bridge", labels={"whose": "not ours"})["Id"]
        try:
            with pytest.raises(HostError, match=r"label ds01\.instance is None"):
                ensure_network(client, stranger, "10.217.0.0/28")
            remove_network(client, stranger)
            assert client.inspect_network(foreign)["Id"] == foreign
        finally:
            client.remove_network(foreign)

    def test_every_difference_is_told(self, engine: Engine, instance: str, net: Network) -> None:
        wanted = network._wanted(net.name, instance, net.subnet)
        found = engine.client.inspect_network(net.id)
        assert differences(found, wanted) == []
        changed = found | {"Internal": True, "EnableIPv6": True, "Driver": "macvlan", "Options": {}, "Labels": None}
        assert len(differences(changed, wanted)) == 7
