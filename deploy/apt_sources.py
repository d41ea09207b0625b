"""Reads a host's apt sources, so that a base image can be made from the mirror that this machine already uses.

Pure but for `read_sources`; both formats of sources.list(5): one line each, and deb822 (`.sources`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_ONE_LINE = re.compile(r"^deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>[^#]+)")


@dataclass(frozen=True)
class Source:
    """One archive of binary packages.

    Attributes:
        uri: address of the mirror. suite: e.g. `bookworm-security`. components: e.g. `("main",)`.
        signed_by: path of the keyring that must have signed it, or None (apt's trusted keys).
    """

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str | None = None

    def line(self) -> str:
        """The source in the one-line format."""
        option = f"[signed-by={self.signed_by}] " if self.signed_by else ""
        return f"deb {option}{self.uri} {self.suite} {' '.join(self.components)}"


def parse_one_line(text: str) -> tuple[Source, ...]:
    """Sources of a `sources.list`; `deb-src` and comments are left out, unreadable lines too."""
    found = []
    for line in text.splitlines():
        match = _ONE_LINE.match(line.strip())
        if match is None:
            continue
        options = dict(part.split("=", 1) for part in (match["options"] or "").split() if "=" in part)
        found.append(
            Source(
                match["uri"], match["suite"], tuple(match["components"].split()), _key_path(options.get("signed-by"))
            )
        )
    return tuple(found)


def parse_deb822(text: str) -> tuple[Source, ...]:
    """Sources of a `.sources` file; disabled stanzas are left out."""
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        fields = _fields(stanza)
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
            continue
        found += [
            Source(uri, suite, tuple(fields.get("components", "").split()), _key_path(fields.get("signed-by")))
            for uri in fields.get("uris", "").split()
            for suite in fields.get("suites", "").split()
        ]
    return tuple(found)


def for_release(sources: Iterable[Source], codename: str) -> tuple[Source, ...]:
    """The sources of the distribution's own release `codename`: itself, then its updates and security fixes.

    Other people's archives (a driver's, a cloud's) carry other suites or lack `main` and are left out.
    """
    wanted = (codename, f"{codename}-updates", f"{codename}-security")
    chosen = [s for s in sources if s.suite in wanted and "main" in s.components]
    return tuple(sorted(dict.fromkeys(chosen), key=lambda s: wanted.index(s.suite)))


def read_sources(apt: Path = Path("/etc/apt")) -> tuple[Source, ...]:
    """All binary sources of this host in apt's reading order."""
    found: list[Source] = []
    main = apt / "sources.list"
    if main.is_file():
        found += parse_one_line(main.read_text(errors="replace"))
    for path in sorted((apt / "sources.list.d").glob("*")):
        if path.suffix == ".list":
            found += parse_one_line(path.read_text(errors="replace"))
        elif path.suffix == ".sources":
            found += parse_deb822(path.read_text(errors="replace"))
    return tuple(found)


def _fields(stanza: str) -> dict[str, str]:
    """Field → value of one stanza, keys in lower case, continuation lines joined."""
    fields: dict[str, str] = {}
    key = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace() and key:
            fields[key] += "\n" + line.strip()
        elif ":" in line:
            key, _, value = line.partition(":")
            key = key.strip().lower()
            fields[key] = value.strip()
    return fields


def _key_path(value: str | None) -> str | None:
    """`value` if it is the path of a keyring (signed-by may also hold a fingerprint or a whole key)."""
    return value if value and value.startswith("/") and "\n" not in value else None
