"""Configuration of a real JupyterHub that shows the spawn form without Docker: for browser tests.

`DS01_FORM_WORLD` names a JSON file that tests rewrite while the Hub runs:
    {"taken": {"1g.5gb": 9, "whole": 1}, "own": 0, "stale": false, "last_choice": {...}, "profiles": {...}}
The Hub is reached directly, without a proxy. A start that is not refused stays in its stages until it is stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from jupyterhub.authenticators.shared import SharedPasswordAuthenticator
from jupyterhub.proxy import Proxy
from jupyterhub.spawner import Spawner
from tornado import web
from traitlets import default

sys.path.insert(0, str(Path(__file__).parent.parent))

import form_scene

from ds01spawner import admission
from ds01spawner.errors import Ds01Error, Refusal
from ds01spawner.form.choice import choose
from ds01spawner.form.render import TEMPLATES, render_form
from ds01spawner.form.request import SpawnRequest, options_from_form, options_from_query
from ds01spawner.form.view import build_view, quota_sentence
from ds01spawner.model import DEFAULT_SERVER, Holding, Limits, Snapshot, Usage
from ds01spawner.policy.schema import Profile
from ds01spawner.progress import GPU, IMAGE, QUOTA, ProgressLog


class NoProxy(Proxy):
    """The tests talk to the Hub's own port."""

    should_start = False

    async def get_all_routes(self) -> dict[str, Any]:
        return {}

    async def add_route(self, routespec: str, target: str, data: Any) -> None:
        return None

    async def delete_route(self, routespec: str) -> None:
        return None


def world(user: str) -> tuple[Limits, Usage, Snapshot, datetime, dict[str, Any]]:
    """What the file says now."""
    said = json.loads(Path(os.environ["DS01_FORM_WORLD"]).read_text())
    now = datetime.now(timezone.utc)
    inventory = form_scene.box()
    holdings: list[Holding] = []
    for kind, count in said.get("taken", {}).items():
        found = form_scene.units(inventory, None if kind == "whole" else kind)[:count]
        holdings += [form_scene.held(f"other{unit.label}", [unit], group="staff") for unit in found]
    if said.get("own"):
        holdings.append(form_scene.held(user, form_scene.units(inventory, "2g.10gb"), server="lab"))
    at = now - timedelta(minutes=5) if said.get("stale") else now
    limits = replace(form_scene.limits(**said.get("limits", {})), user=user)
    return limits, Usage(tuple(holdings)), Snapshot(at=at, inventory=inventory), now, said


def offered(said: dict[str, Any]) -> tuple[Profile, ...]:
    """The profiles of the file, else those of the scene."""
    return form_scene.profiles(said.get("profiles", form_scene.PROFILES))


def tell(what: str, text: str) -> None:
    """Leave word for the test."""
    Path(os.environ["DS01_FORM_WORLD"] + what).write_text(text)


class FormSpawner(Spawner):
    """Shows the form, asks the real admission, then waits."""

    _log: ProgressLog | None = None

    async def _form(self) -> str:
        limits, usage, snapshot, now, said = world(self.user.name)
        return render_form(
            build_view(
                user=self.user.name,
                server_name=self.name,
                limits=limits,
                profiles=offered(said),
                usage=usage,
                snapshot=snapshot,
                now=now,
                image_of=lambda profile: profile.image,
                last_choice=said.get("last_choice"),
            )
        )

    @default("options_form")
    def _default_options_form(self) -> Any:
        return FormSpawner._form

    @default("options_from_form")
    def _default_options_from_form(self) -> Any:
        return options_from_form

    def options_from_query(self, query_data: dict[str, list[str]]) -> dict[str, Any]:
        return options_from_query(query_data)

    async def start(self) -> str:
        self._log = ProgressLog(asyncio.get_running_loop())
        tell(".asked", json.dumps([self.name, self.user_options]))
        limits, usage, snapshot, now, said = world(self.user.name)
        try:
            request = SpawnRequest.parse(self.user_options, server_name=self.name, door="form")
            profile, size = choose(request, offered(said))
            admission.check(request, profile, size, profile.image or "", limits, usage, snapshot, now)
        except Ds01Error as error:
            refused = web.HTTPError(error.http_status, error.message)
            refused.jupyterhub_message = error.sentence() if isinstance(error, Refusal) else error.message
            raise refused from error
        self._log.add(QUOTA, "Within your quota.")
        self._log.add(GPU, "You get a GPU slice with 5 GB.")
        self._log.add(IMAGE, "Fetching <the> image.", fraction=0.5)
        try:
            await asyncio.sleep(float(said.get("start_s", 60)))
        except asyncio.CancelledError:  # the Hub cancels a start that somebody stops (trap T6)
            tell(".stopped", self.name or DEFAULT_SERVER)
            raise
        raise web.HTTPError(500, "never ready")

    async def progress(self) -> AsyncIterator[dict[str, Any]]:
        if self._log is not None:
            async for event in self._log.read():
                yield event

    async def stop(self, now: bool = False) -> None:
        return None

    async def poll(self) -> int | None:
        return 0


def quota_line(user: Any) -> str:
    """What `configure` provides as a template variable."""
    return quota_sentence([form_scene.view().quota[0]]) if user is not None else ""


c = get_config()  # noqa: F821 - given by traitlets
c.JupyterHub.authenticator_class = SharedPasswordAuthenticator
c.SharedPasswordAuthenticator.user_password = "form-and-nothing-else"
c.Authenticator.allow_all = True
c.JupyterHub.proxy_class = NoProxy
c.JupyterHub.spawner_class = FormSpawner
c.JupyterHub.hub_bind_url = f"http://127.0.0.1:{os.environ['DS01_FORM_PORT']}"
c.JupyterHub.bind_url = f"http://127.0.0.1:{os.environ['DS01_FORM_PORT']}"
c.JupyterHub.allow_named_servers = True
c.JupyterHub.db_url = "sqlite:///:memory:"
c.JupyterHub.template_paths = [str(TEMPLATES)]
c.JupyterHub.template_vars = {"ds01_quota_line": quota_line}
c.JupyterHub.log_level = 30
