"""The HTML of the spawn form: a fragment that JupyterHub puts into its own <form> (`spawn.html`)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .request import FRESH_CHOICE
from .view import FormView

TEMPLATES = Path(__file__).parent.parent / "templates"
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
    return _environment().get_template("ds01_form.html").render(view=view, fresh_choice=FRESH_CHOICE)
