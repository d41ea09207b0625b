"""What the Hub may store as a server's `user_options`: JupyterHub 6 lets people set them without a start (PUT, PATCH).

The Hub checks neither size nor shape: tens of megabytes would lie in its database and be logged, and an object in the
place of a text (`{"profile": {"a": 1}}`) breaks its admin page for everybody. What no start would accept is not kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jupyterhub import orm
from sqlalchemy import event

from .errors import Ds01Error
from .form.request import SpawnRequest

MAX_STORED = 4096
"""Characters of JSON; nobody honest comes near."""


def acceptable(options: object) -> bool:
    """True for options that a start would at least read."""
    if options is None:
        return True
    try:
        if not isinstance(options, Mapping) or len(json.dumps(options)) > MAX_STORED:
            return False
        SpawnRequest.parse(options, server_name="", door="rest")
    except (Ds01Error, TypeError, ValueError, RecursionError):
        return False
    return True


def guard() -> None:
    """Make the Hub's database keep `{}` in place of what is not acceptable. For the Hub's process; repeatable."""
    if not event.contains(orm.Spawner.user_options, "set", _kept):
        event.listen(orm.Spawner.user_options, "set", _kept, retval=True)


def _kept(_target: object, value: Any, _old: object, _initiator: object) -> Any:
    return value if acceptable(value) else {}
