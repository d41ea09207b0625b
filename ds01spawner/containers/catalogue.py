"""AIME's image catalogue `ml_images.repo`: framework, version, architectures, image. Pure but for `open_catalogue`.

The grammar is a superset of what the upstream parser takes: blank lines, `#` comments, a byte order mark, blanks in
the architecture list and quotes anywhere are fine; a row that cannot be used is left out with a warning that names
its line, where the upstream parser would crash or match nothing. Order is kept: the file is newest first per
framework, and the first of two equal rows wins, as upstream.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ds01spawner.errors import Code, Ds01Error, Problem

BLACKWELL = "CUDA_BLACKWELL"
ADA = "CUDA_ADA"
AMPERE = "CUDA_AMPERE"
OLD_CUDA = "CUDA"
ARCHITECTURES = (BLACKWELL, ADA, AMPERE, OLD_CUDA)
"""NVIDIA's, newest first. ROCm's (`ROCM6`, `ROCM5`) are kept in rows but never chosen by compute capability."""
MAX_BYTES = 2**20

_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
_LIST = re.compile(r"\[([^\[\]]*)\]")
_COMMENT = re.compile(r"(^|\s)#.*$")

USUAL_PLACES = (Path("/opt/aime-mlc/ml_images.repo"), Path("/opt/aime-ml-containers/ml_images.repo"))
"""Where AIME's own instructions put the tools."""


@dataclass(frozen=True)
class Row:
    """One image. architectures: as in the file; line counts from 1."""

    framework: str
    version: str
    architectures: tuple[str, ...]
    image: str
    line: int

    @property
    def label(self) -> str:
        """`Pytorch-2.8.0-aime`, as in AIME's FRAMEWORK label."""
        return f"{self.framework}-{self.version}"


@dataclass(frozen=True)
class Catalogue:
    """The rows of one file in its order, and what was found wrong with it (warnings only)."""

    rows: tuple[Row, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def frameworks(self) -> tuple[str, ...]:
        """All frameworks, in the order of the file."""
        return tuple(dict.fromkeys(row.framework for row in self.rows))

    def of(self, framework: str, architecture: str | None = None) -> tuple[Row, ...]:
        """Rows of a framework (any letter case), newest first; only those for `architecture`, if given."""
        return tuple(
            row
            for row in self.rows
            if row.framework.lower() == framework.lower()
            and (architecture is None or architecture in row.architectures)
        )

    def newest(self, framework: str, version: str | None = None, architecture: str | None = None) -> Row | None:
        """The newest image of a framework for a box.

        Args:
            version: exactly that one (`2.8.0-aime`), or the newest that begins with it (`2.8`); None = any.
            architecture: of the box's GPUs (`architecture_of`). Images for an older one do not run on newer GPUs,
                so there is no second choice. None (no NVIDIA GPU known) takes the first row of the framework.
        """
        rows = self.of(framework, architecture)
        if version is None:
            return rows[0] if rows else None
        exact = next((row for row in rows if row.version == version), None)
        return exact or next((row for row in rows if re.match(rf"{re.escape(version)}([.-]|$)", row.version)), None)

    def row_of(self, image: str, architecture: str | None = None) -> Row | None:
        """The row that names `image`: the one for `architecture` first; None if the catalogue does not know it."""
        rows = [row for row in self.rows if row.image == image]
        fitting = [row for row in rows if architecture in row.architectures]
        return next(iter(fitting or rows), None)


def architecture_of(compute_capability: tuple[int, int] | None) -> str | None:
    """AIME's architecture for a compute capability: 10 and above Blackwell, 8.9 and 9.x Ada (with Hopper), 8.0 to 8.8
    Ampere, below that plain CUDA (Pascal to Turing); None where it is unknown."""
    if compute_capability is None:
        return None
    for lowest, architecture in (((10, 0), BLACKWELL), ((8, 9), ADA), ((8, 0), AMPERE)):
        if compute_capability >= lowest:
            return architecture
    return OLD_CUDA


def architecture_of_box(capabilities: Iterable[tuple[int, int] | None]) -> str | None:
    """The architecture to choose images for, on a box of these GPUs: the newest one, because images mostly run on
    older GPUs than theirs and never on newer ones."""
    known = [capability for capability in capabilities if capability is not None]
    return architecture_of(max(known)) if known else None


def find_catalogue(places: Iterable[Path] = USUAL_PLACES) -> Path | None:
    """Where AIME's catalogue is installed on this host, or None."""
    return next((place for place in places if place.is_file()), None)


def open_catalogue(path: Path | None) -> Catalogue:
    """Read the file; None gives an empty catalogue.

    Raises:
        Ds01Error: code settings_invalid, when the file is named but cannot be read.
    """
    if path is None:
        return Catalogue()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise OSError(None, f"more than {MAX_BYTES} bytes")
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise Ds01Error(
            f"The image catalogue {path} cannot be read: {error.strerror}. Correct or remove the setting `catalogue`.",
            code=Code.SETTINGS_INVALID,
        ) from error
    return read_catalogue(text, str(path))


def read_catalogue(text: str, file: str = "ml_images.repo") -> Catalogue:
    """All usable rows of `text`. `file` is what warnings call it."""
    rows: list[Row] = []
    problems: list[Problem] = []
    seen: dict[tuple[str, str, str], int] = {}
    for number, line in _lines(text):
        found = _row(line, number)
        if isinstance(found, str):
            problems.append(Problem(file, found, line=number, hint="the row is left out", warning=True))
            continue
        earlier = [seen.get((found.framework, found.version, arch)) for arch in found.architectures]
        twice = next((place for place in earlier if place is not None), None)
        if twice is not None:
            message = f"{found.label} was already given in line {twice}"
            problems.append(Problem(file, message, line=number, hint="the first one is used", warning=True))
        for arch in found.architectures:
            seen.setdefault((found.framework, found.version, arch), number)
        rows.append(found)
    return Catalogue(tuple(rows), tuple(problems))


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that say something, with their numbers and without comments."""
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff")), start=1):
        content = _COMMENT.sub("", line).strip()
        if content:
            yield number, content


def _row(line: str, number: int) -> Row | str:
    """The row, or why it is none."""
    # A list with commas is one field, whether quoted or not.
    joined = _LIST.sub(lambda match: f"[{match[1].replace(',', ';')}]", line)
    try:
        fields = [field.strip() for field in next(csv.reader([joined], skipinitialspace=True, strict=True))]
    except csv.Error as error:
        return f"cannot be read: {error}"
    if len(fields) < 4 or not all(fields[:4]):
        return "needs four fields: framework, version, [architectures], image"
    framework, version, listed, image = fields[:4]
    architectures = tuple(part.strip() for part in re.split(r"[;,]", listed.strip("[] \t")) if part.strip())
    if not architectures:
        return "names no architecture"
    if not _IMAGE.fullmatch(image):
        return f"{image!r} is no image reference"
    return Row(framework, version, architectures, image, number)
