"""The spawn form: what others need of it, in one place, and the HTML.

`SpawnRequest`, `options_from_form` and `choose` read what users send; `build_view` works out what the form shows;
`render_form` writes it as an HTML fragment, which JupyterHub puts into its own <form> (`spawn.html`).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .form_cards import Card
from .form_choice import choose
from .form_request import SpawnRequest, options_from_form, options_from_query
from .form_view import FormView, build_view, quota_lines, quota_sentence

__all__ = [
    "TEMPLATES",
    "Card",
    "FormView",
    "SpawnRequest",
    "build_view",
    "choose",
    "options_from_form",
    "options_from_query",
    "quota_lines",
    "quota_sentence",
    "render_form",
]

TEMPLATES = Path(__file__).parent / "templates"
"""Our pages: overrides of the Hub's own (`c.JupyterHub.template_paths`), and the form's fragment."""


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_form(view: FormView) -> str:
    """`view` as HTML for `Spawner.options_form`: style and script included, every text escaped."""
    return _environment().get_template("ds01_form.html").render(view=view)
