"""The host rules that keep containers apart, looked at again and again: a firewall reload takes them away."""

from __future__ import annotations

import logging

from ds01spawner.containers.firewall import ensure_rules, verify_rules
from ds01spawner.containers.network import bridge_name
from ds01spawner.errors import HostError
from ds01spawner.runtime import Runtime

from .alerts import tell
from .findings import Finding, Severity, What

log = logging.getLogger("ds01.reconcile")

SUBJECT = "network"


def guard_isolation(runtime: Runtime) -> tuple[str, ...]:
    """Verify the rules and put them back; gives what was missing. A failure is an alert, told once.

    Raises:
        LedgerError: the alert cannot be written down.
    """
    settings = runtime.settings
    if settings.network_mode == "host" or settings.unsafe_no_isolation:
        return ()
    bridge, ports = bridge_name(runtime.ledger.instance), (settings.hub_port, settings.service_port)
    missing: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    try:
        missing = verify_rules(bridge, settings.gateway, ports)
        if missing:
            ensure_rules(bridge, settings.gateway, ports)
            log.warning("network: rules were put back that something had taken away: %s", "; ".join(missing))
            runtime.ledger.audit(runtime.who, "network.repair", bridge, "; ".join(missing))
    except HostError as error:
        findings = (Finding(What.NETWORK_OPEN, SUBJECT, error.message, severity=Severity.ALERT),)
    tell(runtime.ledger, runtime.who, findings, {What.NETWORK_OPEN})
    return missing
