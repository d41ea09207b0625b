"""The data behind the spawn form and the quota line: read the world once, then the pure view."""

from __future__ import annotations

import html
import logging

from .errors import Alternative, Code, Ds01Error, Refusal
from .form.render import render_form
from .form.view import FormView, build_view, quota_lines, quota_sentence
from .images import profile_image
from .runtime import Runtime
from .scene import Person, Scene, look

log = logging.getLogger("ds01.form")

WANTING = frozenset(
    {Code.NO_GPU, Code.USER_COUNT, Code.USER_QUOTA, Code.GROUP_QUOTA, Code.FULL_NOT_ALLOWED, Code.NOT_IN_PROFILE}
)
"""Refusals after which another card may do."""
MAX_MISTAKES = 3
MAX_OFFERS = 3
"""More would make a sentence that nobody reads."""


def spawn_form(runtime: Runtime, person: Person, server_name: str) -> str:
    """The form of `person` for one server, as HTML. A refusal becomes a sentence in its place."""
    try:
        scene = look(runtime, person)
    except Ds01Error as error:
        return f'<p class="alert alert-danger" role="alert">{html.escape(error.message)}</p>'
    return _mistakes(runtime, person) + render_form(_view(runtime, scene, person, server_name))


def _mistakes(runtime: Runtime, person: Person) -> str:
    """For admins of the Hub: what is wrong with the policy files, and what to run."""
    wrong = [str(problem) for problem in runtime.policies.problems if not problem.warning]
    if not wrong or not person.admin:
        return ""
    lines = "<br>".join(html.escape(line) for line in wrong[:MAX_MISTAKES])
    command = html.escape(f"ds01-admin config check {runtime.settings.config_dir}")
    return f'<p class="alert alert-danger" role="alert">{lines}<br>To see all: <code>{command}</code></p>'


def with_offers(runtime: Runtime, refusal: Refusal, scene: Scene | None, person: Person, server_name: str) -> Refusal:
    """A refusal for want of something, with the form's cards that could start now in place of admission's variations
    of what was asked; at most `MAX_OFFERS`. Any other refusal as it is."""
    if scene is None or refusal.code not in WANTING:
        return refusal
    try:
        view = _view(runtime, scene, person, server_name)
    except Ds01Error as error:
        log.warning("%s: no alternatives can be offered: %s", person.name, error.message)
        return refusal
    cards = sorted((card for card in view.cards if card.available), key=lambda card: -card.share)
    offers = [Alternative(card.title, {"profile": card.profile, "size": card.size}) for card in cards[:MAX_OFFERS]]
    others = () if refusal.code is Code.NOT_IN_PROFILE else refusal.alternatives
    return Refusal(refusal.code, refusal.message, facts=refusal.facts, alternatives=offers or others)


def _view(runtime: Runtime, scene: Scene, person: Person, server_name: str) -> FormView:
    newest = runtime.newest_image(scene.snapshot)
    return build_view(
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


def quota_line(runtime: Runtime, person: Person) -> str:
    """What `person` holds of what they may have, in one line; "" where nothing can be said."""
    try:
        scene = look(runtime, person)
    except Ds01Error:
        return ""
    return quota_sentence(quota_lines(scene.limits, runtime.ledger.usage(), person.name))
