"""`ds01spawner.setup(c)`: one line in jupyterhub_config.py.

It prepares the machine (state folder, ledger, Docker network, host rules) and sets traits on `c`. Every trait can be
set again after it. What would leave users unprotected ends the Hub here with a sentence, before anybody can log in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tornado import web

from .containers.accounts import uid_problems
from .containers.network import bridge_name
from .containers.ulimits import daemon_ulimits
from .errors import Ds01Error, EngineError, PolicyInvalid, SettingsInvalid
from .policy.resolve import may_log_in
from .runtime import Runtime, prepare_network
from .scene import Person
from .settings import SETTINGS_ENV, Settings

log = logging.getLogger("ds01.setup")

HERE = Path(__file__).parent

LOGIN_REFUSED = (
    "You are not on this server's list of users. Ask the admin of this server to add you to a group of the policy."
)


def setup(c: Any, **fields: Any) -> Settings:
    """Configure a JupyterHub for ds01spawner.

    Args:
        c: the config object of jupyterhub_config.py.
        **fields: any field of `Settings` (config_dir, state_dir, workspaces, subnet, …).

    Returns:
        The settings, also written to `<state_dir>/settings.json`.

    Raises:
        SystemExit: with a sentence, where starting would break a promise: wrong settings, no valid policy,
            no isolation of the containers' network.
    """
    try:
        settings = Settings(**fields)
        path = settings.save()
        runtime = Runtime.open(path, role="setup")
        try:
            _prepare(runtime)
        finally:
            runtime.close()
    except ValidationError as error:
        raise SystemExit(f"ds01spawner: the settings given to setup() are not valid: {error}") from error
    except Ds01Error as error:
        raise SystemExit(f"ds01spawner: {error.message}") from error
    except PermissionError as error:
        raise SystemExit(
            f"ds01spawner: {error}. The Hub must run as root: it makes users' folders, cgroups and network rules."
        ) from error
    _set_hub(c, settings, path)
    _set_spawner(c, path)
    _set_login(c, settings, path)
    _set_services(c, path)
    return settings


def _prepare(runtime: Runtime) -> None:
    settings = runtime.settings
    overlaps = () if settings.unix_accounts else uid_problems(settings.uid_range)
    if overlaps:
        # A uid that somebody else's user namespace maps would open a Hub user's files to them.
        lines = "\n  ".join(str(problem) for problem in overlaps)
        raise SettingsInvalid(f"the uids for Hub users are not free:\n  {lines}")
    for warning in daemon_ulimits()[1]:
        log.warning("%s", warning)
    try:
        runtime.policies.current()
    except PolicyInvalid as error:
        lines = "\n  ".join(str(problem) for problem in error.problems)
        raise SettingsInvalid(f"no valid policy in {settings.config_dir}:\n  {lines}") from error
    if settings.network_mode == "host":
        log.warning("TEST ONLY: containers use the host's network; nobody is separated from anybody.")
        return
    try:
        prepare_network(runtime)
    except EngineError as error:
        # Running servers must be adopted although Docker is away (design, point 8); new ones cannot start anyway.
        bridge = bridge_name(runtime.ledger.instance)
        if not Path("/sys/class/net", bridge).exists():
            raise
        log.warning("Docker does not answer (%s); going on with the network %s as it is.", error.message, bridge)


def _set_hub(c: Any, settings: Settings, path: Path) -> None:
    host = "127.0.0.1" if settings.network_mode == "host" else settings.gateway
    c.JupyterHub.hub_bind_url = f"http://{host}:{settings.hub_port}"
    # A Hub restart stops nobody (design, point 8; trap T9).
    c.JupyterHub.cleanup_servers = False
    c.JupyterHub.allow_named_servers = True
    # Names cost rows in the Hub's database even when their start is refused; running ones are counted by the policy.
    c.JupyterHub.named_server_limit_per_user = 20
    c.JupyterHub.template_paths = [str(HERE / "templates")]
    c.JupyterHub.template_vars = {"ds01_quota_line": partial(QuotaLine, path)}


class QuotaLine:
    """The quota line of the home page: called by the template that shows it, and worked out in a thread (the ledger and
    the policy are read for it, some milliseconds that the Hub's event loop has better uses for)."""

    def __init__(self, path: Path, user: Any) -> None:
        self._path = path
        self._user = user

    async def __call__(self) -> str:
        """What the user holds of what they may have; "" where there is nothing to say."""
        from .spawn_page import quota_line
        from .spawner import DS01Spawner

        if self._user is None or not hasattr(self._user, "groups"):
            return ""
        person = Person(self._user.name, tuple(group.name for group in self._user.groups))
        runtime = DS01Spawner.runtime_of(str(self._path))
        try:
            return await asyncio.get_running_loop().run_in_executor(runtime.threads, quota_line, runtime, person)
        except Exception:
            log.exception("the quota line of %s could not be worked out", person.name)
            return ""


def _set_spawner(c: Any, path: Path) -> None:
    c.JupyterHub.spawner_class = "ds01spawner.DS01Spawner"
    c.DS01Spawner.settings_file = str(path)
    # A first start may pull an image of 20 GB; everything after the pull is quick or fails by itself.
    c.DS01Spawner.start_timeout = 3600
    c.DS01Spawner.http_timeout = 120


def _set_login(c: Any, settings: Settings, path: Path) -> None:
    """Who may log in follows the policy, on top of the authenticator's own rules."""

    async def only_named(authenticator: Any, handler: Any, auth_model: dict[str, Any]) -> dict[str, Any]:
        name = str(auth_model["name"])
        groups = auth_model.get("groups")
        if groups is None:
            user = handler.find_user(name)
            groups = [group.name for group in user.groups] if user is not None else []
        allowed = await asyncio.to_thread(_may_log_in, path, settings, name, tuple(groups))
        if not allowed:
            authenticator.log.warning("ds01: %r is named by no group of the policy and there is no default_group", name)
            raise web.HTTPError(403, LOGIN_REFUSED)
        return auth_model

    # Everyone whom the authenticator knows and the policy names; narrower rules of the authenticator may be set after.
    c.Authenticator.allow_all = True
    c.Authenticator.post_auth_hook = only_named


def _may_log_in(path: Path, settings: Settings, name: str, groups: tuple[str, ...]) -> bool:
    from .spawner import DS01Spawner

    runtime = DS01Spawner.runtime_of(str(path))
    return may_log_in(runtime.policies.current(), name, hub_groups=groups, unix_groups=runtime.unix_groups(name))


def _set_services(c: Any, path: Path) -> None:
    environment = {SETTINGS_ENV: str(path)}
    for name in ("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "LD_LIBRARY_PATH"):
        if name in os.environ:
            environment[name] = os.environ[name]
    c.JupyterHub.services.append(
        {
            "name": "ds01-watcher",
            "command": [sys.executable, "-m", "ds01spawner.watcher"],
            "environment": environment,
        }
    )
