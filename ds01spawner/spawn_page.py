"""The data behind the spawn form and the quota line: read the world once, then the pure view."""

from __future__ import annotations

import html

from .errors import Ds01Error
from .form.render import render_form
from .form.view import build_view, quota_lines, quota_sentence
from .images import profile_image
from .runtime import Runtime
from .scene import Person, look


def spawn_form(runtime: Runtime, person: Person, server_name: str) -> str:
    """The form of `person` for one server, as HTML. A refusal becomes a sentence in its place."""
    try:
        scene = look(runtime, person)
    except Ds01Error as error:
        return f'<p class="alert alert-danger" role="alert">{html.escape(error.message)}</p>'
    newest = runtime.newest_image(scene.snapshot)
    view = build_view(
        user=person.name,
        server_name=server_name,
        limits=scene.limits,
        profiles=scene.profiles,
        usage=runtime.ledger.usage(exclude=(person.name, server_name)),
        snapshot=scene.snapshot,
        now=runtime.now(),
        image_of=lambda profile: profile_image(profile, newest),
        last_choice=runtime.ledger.last_choice(person.name, server_name),
        private_images=scene.saved,
        policy_problems=any(not problem.warning for problem in runtime.policies.problems),
    )
    return render_form(view)


def quota_line(runtime: Runtime, person: Person) -> str:
    """What `person` holds of what they may have, in one line; "" where nothing can be said."""
    try:
        scene = look(runtime, person)
    except Ds01Error:
        return ""
    return quota_sentence(quota_lines(scene.limits, runtime.ledger.usage(), person.name))
