"""What the commands find on this machine without a Hub: its settings, policy folder and accounts."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

from ds01spawner.settings import DEFAULT_STATE_DIR, SETTINGS_ENV, Settings, load_settings


def installed_settings() -> Settings | None:
    """The installation's settings, or None where nothing is installed.

    Raises:
        SettingsInvalid: they are there, or named by the environment, and wrong.
    """
    if not os.environ.get(SETTINGS_ENV) and not (DEFAULT_STATE_DIR / "settings.json").exists():
        return None
    return load_settings()


def policy_folder(settings: Settings | None) -> Path:
    """Where the policy files are: the installation's, else ./config."""
    return settings.config_dir if settings is not None else Path("config")


def unix_groups(user: str) -> Iterator[str]:
    """Names of the Unix groups of an account of this host; none if there is no such account."""
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        return
    named = {group.gr_gid: group.gr_name for group in grp.getgrall()}
    for gid in os.getgrouplist(user, account.pw_gid):
        if gid in named:
            yield named[gid]
