"""The demo's accounts: real logins through the Hub's own form, with passwords made up for one run."""

from __future__ import annotations

import secrets
from typing import Any

from jupyterhub.auth import Authenticator
from traitlets import Dict, Unicode

ACCOUNTS = ("student1", "researcher1", "admin")
"""One of each group of deploy/demo-policy; `admin` administers the Hub too."""

_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # without what looks alike


def made_up_passwords() -> dict[str, str]:
    """A new password for each account, easy to type and 49 bits strong."""
    return {name: "-".join(_word() for _ in range(2)) for name in ACCOUNTS}


def _word() -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(5))


class DemoAuthenticator(Authenticator):  # type: ignore[misc]  # jupyterhub has no types
    """Knows the demo's accounts and nobody else."""

    passwords = Dict(value_trait=Unicode(), config=True, help="Password of each account.")

    async def authenticate(self, handler: Any, data: dict[str, str]) -> str | None:
        """The name, if the password is right."""
        known = self.passwords.get(data["username"], "")
        given = data["password"].encode()
        return data["username"] if secrets.compare_digest(known.encode(), given) and known else None
