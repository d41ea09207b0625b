"""Host rules of one installation's bridge: its containers reach exactly the Hub's and the service's port.

Two chains per installation, `DS01-<8hex>` for what goes to the host itself (hooked into INPUT) and
`DS01-<8hex>-F` for what is forwarded (hooked into DOCKER-USER, or into FORWARD where Docker has none). Docker
keeps DOCKER-USER and never touches INPUT, but `firewall-cmd --reload` and `iptables -F` take everything away:
so `ensure_rules` runs before every start; it costs one listing per address family when all is in place. Chains
and hooks are written in one `iptables-restore --noflush`: there is no moment with half of them. Works with both
iptables back ends (nft, legacy).
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds01spawner.errors import Code, HostError

LINK_LOCAL = "169.254.0.0/16"
"""Where clouds serve a machine's secrets (169.254.169.254); nothing else there is meant for containers."""

_HARMLESS = ("DROP", "REJECT", "LOG", "NFLOG", "DS01-")
"""Targets of rules that may stand before ours: they let nothing in (chains of other installations included)."""

_BRIDGE_FILTER = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
_IPV6 = Path("/proc/net/if_inet6")
_TIMEOUT = 20
"""Seconds that one call may take."""
_WAIT = "5"
"""Seconds to wait for another program's lock on the rules."""


@dataclass(frozen=True)
class Wall:
    """What is to be enforced.

    Attributes:
        bridge: interface of the Docker network, `ds01-<8hex>`.
        gateway: the host's IPv4 address on it.
        ports: TCP ports of the host that containers may reach, on the gateway address only.
    """

    bridge: str
    gateway: str
    ports: tuple[int, ...]

    @property
    def chain(self) -> str:
        """Chain for traffic to the host."""
        return self.bridge.upper()

    @property
    def forward_chain(self) -> str:
        """Chain for forwarded traffic."""
        return f"{self.chain}-F"

    def rules(self, family: int) -> dict[str, list[str]]:
        """Rules by chain, as `iptables -S` prints them. family: 4 or 6 (where nothing at all may pass)."""
        if family == 6:
            return {self.chain: ["-j DROP"], self.forward_chain: ["-j DROP"]}
        known = "-m conntrack --ctstate RELATED,ESTABLISHED"
        doors = [f"-d {self.gateway}/32 -p tcp -m tcp --dport {port} -j ACCEPT" for port in self.ports]
        return {
            self.chain: [f"{known} -j ACCEPT", *doors, "-j DROP"],
            # Nobody opens a connection into a container: not its neighbours (their frames cross the bridge), not other
            # networks. The Hub does not count: what the host itself sends is not forwarded.
            self.forward_chain: [
                f"-o {self.bridge} {known} -j RETURN",
                f"-o {self.bridge} -j DROP",
                f"-d {LINK_LOCAL} -j DROP",
            ],
        }

    def hooks(self, forward: str) -> list[tuple[str, str]]:
        """(built-in or Docker's chain, rule) that lead into ours."""
        return [
            ("INPUT", f"-i {self.bridge} -j {self.chain}"),
            (forward, f"-i {self.bridge} -j {self.forward_chain}"),
            (forward, f"-o {self.bridge} -j {self.forward_chain}"),
        ]


def ensure_rules(bridge: str, gateway: str, ports: Sequence[int]) -> None:
    """Put the rules in force; repeatable, quick if they already are.

    Raises:
        HostError: `network_not_enforced`: they are not in force; says why and what to do.
    """
    wall = Wall(bridge, gateway, tuple(ports))
    _filter_bridged_frames()
    for family in _families():
        if _problems(wall, family):
            _rebuild(wall, family)
            problems = _problems(wall, family)
            if problems:
                raise _failed(wall, "; ".join(problems))


def verify_rules(bridge: str, gateway: str, ports: Sequence[int]) -> tuple[str, ...]:
    """What is not in force, one sentence each; () = everything. Changes nothing.

    Raises:
        HostError: `network_not_enforced`: the rules cannot be read.
    """
    wall = Wall(bridge, gateway, tuple(ports))
    problems = [problem for family in _families() for problem in _problems(wall, family)]
    if _bridge_filter() != "1":
        problems.append(f"{_BRIDGE_FILTER} is not 1: frames between two containers pass no rule")
    return tuple(problems)


def remove_rules(bridge: str) -> None:
    """Take away everything that `ensure_rules` made for this bridge, and nothing else.

    Raises:
        HostError: `network_not_enforced`: the rules cannot be changed.
    """
    wall = Wall(bridge, "", ())
    for family in _families():
        chains = _read(family)
        lines = [
            f"-D {chain} {rule}"
            for chain, rules in chains.items()
            for rule in rules
            if _target(rule) in (wall.chain, wall.forward_chain)
        ]
        ours = [chain for chain in (wall.chain, wall.forward_chain) if chain in chains]
        lines += [f"-F {chain}" for chain in ours] + [f"-X {chain}" for chain in ours]
        if lines:
            _restore(family, lines)


# --------------------------------------------------------------------------- reading


def _problems(wall: Wall, family: int) -> list[str]:
    chains = _read(family)
    problems = [
        f"IPv{family} chain {chain} is not there or was changed"
        for chain, rules in wall.rules(family).items()
        if not _same(family, chain, chains.get(chain), rules)
    ]
    problems += [
        f"IPv{family} chain {chain} does not lead into {_target(rule)}, or lets traffic through before it"
        for chain, rule in wall.hooks(_forward_hook(chains))
        if not leads(chains.get(chain, []), rule, wall.bridge)
    ]
    return problems


def leads(rules: Sequence[str], hook: str, bridge: str) -> bool:
    """True if `hook` is among `rules` and no rule before it could let the bridge's traffic pass."""
    before = rules[: rules.index(hook)] if hook in rules else None
    return before is not None and not any(_may_pass(rule, bridge) for rule in before)


def _may_pass(rule: str, bridge: str) -> bool:
    """True if a rule could let traffic that comes from the bridge through, or out of the chain."""
    if not _target(rule) or _target(rule).startswith(_HARMLESS):
        return False
    words = rule.split()
    if "-i" not in words or words[max(0, words.index("-i") - 1)] == "!":
        return True
    interface = words[words.index("-i") + 1]
    return bridge.startswith(interface[:-1]) if interface.endswith("+") else interface == bridge


def _same(family: int, chain: str, found: Sequence[str] | None, wanted: Sequence[str]) -> bool:
    """True if the chain has exactly these rules; where a version prints them otherwise, iptables itself compares."""
    if found is None or len(found) != len(wanted):
        return False
    if list(found) == list(wanted):
        return True
    checks = (_run(family, ["-w", _WAIT, "-C", chain, *rule.split()], check=False) for rule in wanted)
    return all(done.returncode == 0 for done in checks)


def _read(family: int) -> dict[str, list[str]]:
    """All chains of the filter table with their rules, in order."""
    return parse_rules(_run(family, ["-w", _WAIT, "-S"]).stdout)


def parse_rules(text: str) -> dict[str, list[str]]:
    """Rules by chain from the output of `iptables -S`."""
    chains: dict[str, list[str]] = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        chain, _, rule = rest.partition(" ")
        if word in ("-P", "-N"):
            chains.setdefault(chain, [])
        elif word == "-A":
            chains.setdefault(chain, []).append(rule)
    return chains


def _forward_hook(chains: Mapping[str, Sequence[str]]) -> str:
    """Docker inserts its own accepting rules on top of FORWARD, but below DOCKER-USER."""
    return "DOCKER-USER" if "-j DOCKER-USER" in chains.get("FORWARD", []) else "FORWARD"


def _target(rule: str) -> str:
    words = rule.split()
    return words[words.index("-j") + 1] if "-j" in words else ""


# --------------------------------------------------------------------------- writing


def _rebuild(wall: Wall, family: int) -> None:
    """Write chains and hooks anew in one transaction; hooks go to the top."""
    chains = _read(family)
    rules = wall.rules(family)
    lines = [f":{chain} - [0:0]" for chain in rules]  # declares a chain, and empties an existing one
    lines += [f"-A {chain} {rule}" for chain, body in rules.items() for rule in body]
    hooks = wall.hooks(_forward_hook(chains))
    lines += [f"-D {chain} {rule}" for chain, rule in hooks for found in chains.get(chain, []) if found == rule]
    lines += [f"-I {chain} 1 {rule}" for chain, rule in reversed(hooks)]
    _restore(family, lines)


def _restore(family: int, lines: Sequence[str]) -> None:
    text = "\n".join(["*filter", *lines, "COMMIT", ""])
    _run(family, ["--noflush", "-w", _WAIT], text, program="-restore")


def _run(
    family: int, arguments: Sequence[str], text: str = "", *, program: str = "", check: bool = True
) -> subprocess.CompletedProcess[str]:
    name = f"{'iptables' if family == 4 else 'ip6tables'}{program}"
    try:
        done = subprocess.run(
            [name, *arguments], input=text, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except FileNotFoundError as error:
        raise _refused(f"{name} is not installed", "Install the package iptables.") from error
    except subprocess.TimeoutExpired as error:
        raise _refused(f"{name} did not end within {_TIMEOUT} s", "See who holds /run/xtables.lock.") from error
    if check and done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise _refused(f"{name} said: {words[0]}", "The Hub must run as root on the Docker host (CAP_NET_ADMIN).")
    return done


def _filter_bridged_frames() -> None:
    """Switch on that frames between two ports of a bridge pass FORWARD, as Docker does for enable_icc=false."""
    if _bridge_filter() == "1":
        return
    try:
        _BRIDGE_FILTER.write_text("1\n")
    except OSError as error:
        raise _refused(
            f"{_BRIDGE_FILTER} cannot be set to 1 ({error.strerror}): frames between two containers pass no rule",
            "Run: modprobe br_netfilter; sysctl net.bridge.bridge-nf-call-iptables=1",
        ) from error


def _bridge_filter() -> str:
    try:
        return _BRIDGE_FILTER.read_text().strip()
    except OSError:
        return ""


def _families() -> tuple[int, ...]:
    """4, and 6 unless the kernel has no IPv6 at all."""
    return (4, 6) if _IPV6.exists() else (4,)


def _failed(wall: Wall, why: str) -> HostError:
    return _refused(f"bridge {wall.bridge}: {why}", "Another firewall may undo them: look for it in `iptables -S`.")


def _refused(why: str, remedy: str) -> HostError:
    return HostError(
        f"The network rules that keep users apart are not in force: {why}. {remedy}",
        code=Code.NETWORK_NOT_ENFORCED,
        facts={"problem": why},
    )
