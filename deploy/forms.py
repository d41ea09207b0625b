"""Reads HTML forms as a browser would submit them. Pure; standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_NOT_SENT = ("submit", "button", "reset", "image", "file")


@dataclass
class Form:
    """One form of a page.

    Attributes:
        action, method, id: of the form. fields: what would be sent now, in order.
        choices: every value that radio buttons and selectors offer, by field; `disabled`: those greyed out.
    """

    action: str = ""
    method: str = "get"
    id: str = ""
    fields: list[tuple[str, str]] = field(default_factory=list)
    choices: dict[str, list[str]] = field(default_factory=dict)
    disabled: dict[str, list[str]] = field(default_factory=dict)

    def filled(self, **values: str) -> list[tuple[str, str]]:
        """The fields with some of them set; a field that the form does not have is a KeyError."""
        known = {name for name, _ in self.fields} | set(self.choices)
        unknown = set(values) - known
        if unknown:
            raise KeyError(f"the form has no field {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
        return [(name, value) for name, value in self.fields if name not in values] + list(values.items())


def forms_of(html: str) -> tuple[Form, ...]:
    """All forms of a page."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return tuple(reader.forms)


def text_of(html: str) -> str:
    """The page's visible text, one space between words."""
    reader = _TextReader()
    reader.feed(html)
    reader.close()
    return " ".join(" ".join(reader.parts).split())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.forms: list[Form] = []
        self._open: Form | None = None
        self._select: str | None = None
        self._first_option: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self._open = Form(given.get("action", ""), given.get("method", "get").lower(), given.get("id", ""))
            self.forms.append(self._open)
        elif self._open is None:
            return
        elif tag == "input":
            self._input(self._open, given)
        elif tag == "select":
            self._select, self._first_option = given.get("name"), None
        elif tag == "option" and self._select:
            self._option(self._open, self._select, given)

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._open = None
        elif tag == "select" and self._open is not None and self._select:
            # A browser sends the first option when none is marked.
            if self._first_option is not None and all(name != self._select for name, _ in self._open.fields):
                self._open.fields.append((self._select, self._first_option))
            self._select = None

    @staticmethod
    def _input(form: Form, given: dict[str, str]) -> None:
        name, kind = given.get("name", ""), given.get("type", "text").lower()
        if not name or kind in _NOT_SENT:
            return
        value = given.get("value", "on" if kind in ("checkbox", "radio") else "")
        if kind in ("radio", "checkbox"):
            (form.disabled if "disabled" in given else form.choices).setdefault(name, []).append(value)
        if "disabled" not in given and (kind not in ("radio", "checkbox") or "checked" in given):
            form.fields.append((name, value))

    def _option(self, form: Form, name: str, given: dict[str, str]) -> None:
        value = given.get("value", "")
        form.choices.setdefault(name, []).append(value)
        if self._first_option is None:
            self._first_option = value
        if "selected" in given:
            form.fields.append((name, value))


class _TextReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style", "head")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)
