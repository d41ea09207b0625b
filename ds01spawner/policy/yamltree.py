"""YAML text → plain data that remembers where each value stood.

PyYAML's constructors are not used: they lose the place of a value, silently let the last of two equal keys win,
and turn `007`, `no`, `1:30` and `2025-01-01` into numbers, booleans and dates, although in a list of account names
they are names. Here every scalar stays the text that was written (a plain null becomes None), and the schema says
what it means. Only mappings, sequences and scalars exist; tags that would make objects are refused.

The tree is built from parser events with an explicit stack, so that depth is a counter and not Python's recursion,
and aliases are counted by the size of what they repeat ("billion laughs").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from ds01spawner.errors import Problem

MAX_BYTES = 1 << 20
"""Largest policy file: a policy with a thousand people in it has about 100 KiB."""

MAX_NODES = 100_000
"""Most values of a file, repetitions by alias included."""

MAX_DEPTH = 24
"""Deepest nesting; the schema needs eight."""

Path = tuple[str | int, ...]

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_SAFE_TAGS = frozenset(
    "tag:yaml.org,2002:" + name for name in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")
) | {"!"}
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is there: ten times faster


class TreeError(Exception):
    """The text is no YAML that a policy may be. `problems` has at least one entry."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(str(p) for p in problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Place:
    """Line and column, both from 1."""

    line: int
    column: int


@dataclass
class Node:
    """One value of the file.

    Attributes:
        place: where the value starts. kind: `scalar`, `list` or `map`.
        text: a scalar's text, None for null. items: a list's values. entries: a map's key → (place of key, value).
        size: number of nodes in it, aliases counted as what they repeat. height: levels below it.
        merges: values of `<<` keys in order, applied when the map ends.
    """

    place: Place
    kind: str
    text: str | None = None
    items: list[Node] = field(default_factory=list)
    entries: dict[str, tuple[Place, Node]] = field(default_factory=dict)
    size: int = 1
    height: int = 0
    merges: list[Node] = field(default_factory=list)

    def data(self) -> Any:
        """The value as None, str, list and dict. Its depth is bounded by `MAX_DEPTH`."""
        if self.kind == "map":
            return {key: node.data() for key, (_, node) in self.entries.items()}
        if self.kind == "list":
            return [node.data() for node in self.items]
        return self.text

    def place_of(self, path: Path, *, key: bool = False) -> Place:
        """Place of the value at `path` (of its key, if `key`), or of the nearest value above that exists."""
        node, place = self, self.place
        for step, part in enumerate(path):
            last = step == len(path) - 1
            if node.kind == "map" and str(part) in node.entries:
                key_place, node = node.entries[str(part)]
                # A null value has no width of its own: its key is the better place to point at.
                place = key_place if (key and last) or (node.text is None and node.kind == "scalar") else node.place
            elif node.kind == "list" and isinstance(part, int) and part < len(node.items):
                node = node.items[part]
                place = node.place
            else:
                break
        return place

    def walk(self, path: Path = ()) -> Iterator[tuple[Path, Node]]:
        """Every value with its path, top down."""
        yield path, self
        for key, (_, node) in self.entries.items():
            yield from node.walk((*path, key))
        for index, node in enumerate(self.items):
            yield from node.walk((*path, index))


def parse(text: str, file: str) -> Node:
    """The tree of one YAML document.

    Args:
        text: the file's text. file: its name, for problems.

    Raises:
        TreeError: not YAML, empty, too large, several documents, a key twice, a tag that is not plain data.
    """
    if len(text) > MAX_BYTES:
        raise TreeError([Problem(file, f"the file is larger than {MAX_BYTES >> 10} KiB; this is no policy")])
    builder = _Builder(file)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        raise TreeError([_syntax(error, file, text)]) from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position] if isinstance(error.position, int) else ""
        place = Place(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
        raise TreeError([_at(file, place, f"a character that YAML does not allow ({error.reason})")]) from error
    if builder.root is None or (builder.root.text is None and builder.root.kind == "scalar"):
        raise TreeError([Problem(file, "the file is empty", 1, 1, "an empty file changes nothing: restore its text")])
    if builder.problems:
        raise TreeError(builder.problems)
    return builder.root


class _Builder:
    """Turns parser events into nodes."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.root: Node | None = None
        self.problems: list[Problem] = []
        self._open: list[tuple[Node, str | None]] = []  # unfinished collections with their anchors
        self._keys: list[Node | None] = []  # for each open map: the key that waits for its value
        self._anchors: dict[str, Node | None] = {}  # None while the anchored value is unfinished
        self._documents = 0

    def take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise self._failure(_place(event), "a second document starts here; a policy file holds one")
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.ScalarEvent):
            self._check_tag(event)
            plain_null = not event.style and not event.tag and event.value in _NULLS
            tagged_null = event.tag == "tag:yaml.org,2002:null"
            node = Node(_place(event), "scalar", None if plain_null or tagged_null else event.value)
            self._remember(event.anchor, node)
            self._add(node, merge=not event.style and event.value == "<<")
        elif isinstance(event, yaml.CollectionStartEvent):
            self._check_tag(event)
            if len(self._open) >= MAX_DEPTH:
                raise self._failure(_place(event), f"nested deeper than {MAX_DEPTH} levels")
            kind = "map" if isinstance(event, yaml.MappingStartEvent) else "list"
            if event.anchor:
                self._anchors[event.anchor] = None
            self._open.append((Node(_place(event), kind), event.anchor))
            self._keys.append(None)
        elif isinstance(event, yaml.CollectionEndEvent):
            node, anchor = self._open.pop()
            self._keys.pop()
            self._merge(node)
            self._remember(anchor, node)
            self._add(node)

    def _alias(self, event: yaml.AliasEvent) -> None:
        node = self._anchors.get(event.anchor or "")
        if node is None:
            known = event.anchor in self._anchors
            why = "repeats the value that it stands in" if known else "is not defined above"
            raise self._failure(_place(event), f"the alias *{event.anchor} {why}")
        self._add(node)

    def _remember(self, anchor: str | None, node: Node) -> None:
        if anchor:
            self._anchors[anchor] = node

    def _add(self, node: Node, *, merge: bool = False) -> None:
        """Put a finished value into the collection that is open, as key or as value."""
        if not self._open:
            self.root = node
            return
        parent = self._open[-1][0]
        parent.size += node.size
        parent.height = max(parent.height, node.height + 1)
        if parent.size > MAX_NODES:
            raise self._failure(node.place, f"more than {MAX_NODES} values, repetitions by alias included")
        if len(self._open) + node.height > MAX_DEPTH:
            raise self._failure(node.place, f"nested deeper than {MAX_DEPTH} levels")
        if parent.kind == "list":
            parent.items.append(node)
        elif self._keys[-1] is None:
            self._keys[-1] = self._key(node, merge)
        else:
            key, self._keys[-1] = self._keys[-1], None
            self._entry(parent, key, node)

    def _key(self, node: Node, merge: bool) -> Node:
        if node.kind != "scalar" or node.text is None:
            raise self._failure(node.place, "a key must be a plain word")
        return Node(node.place, "merge" if merge else "scalar", node.text)

    def _entry(self, parent: Node, key: Node, node: Node) -> None:
        if key.kind == "merge":
            parent.merges.extend(node.items if node.kind == "list" else [node])
            return
        name = key.text or ""
        if name in parent.entries:
            first = parent.entries[name][0].line
            hint = f"first written in line {first}; keep one of the two"
            self.problems.append(_at(self.file, key.place, f'the key "{name}" is written twice', hint))
        else:
            parent.entries[name] = (key.place, node)

    def _merge(self, node: Node) -> None:
        """Apply `<<`: keys of the merged maps that the map does not have itself, first map first."""
        for other in node.merges:
            if other.kind != "map":
                raise self._failure(other.place, "<< takes a mapping, or a list of them")
            for name, entry in other.entries.items():
                node.entries.setdefault(name, entry)

    def _check_tag(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
        if event.tag and event.tag not in _SAFE_TAGS:
            raise self._failure(_place(event), f"the tag {event.tag[:60]} is not allowed; write plain values")

    def _failure(self, place: Place, message: str) -> TreeError:
        return TreeError([*self.problems, _at(self.file, place, message)])


def _place(event: yaml.Event) -> Place:
    mark = event.start_mark
    return Place(mark.line + 1, mark.column + 1) if mark is not None else Place(1, 1)


def _at(file: str, place: Place, message: str, hint: str = "") -> Problem:
    return Problem(file, message, place.line, place.column, hint)


def _syntax(error: yaml.MarkedYAMLError, file: str, text: str) -> Problem:
    """PyYAML's syntax error as a problem; its context says where the unfinished thing began."""
    mark = error.problem_mark or error.context_mark
    message = f"not valid YAML: {error.problem or error.context or 'cannot be read'}"
    hint = ""
    lines = text.splitlines()
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        hint = "indent with blanks, not with tabs"
    elif error.context and error.context_mark:
        hint = f"{error.context} from line {error.context_mark.line + 1}"
    if mark is None:
        return Problem(file, message, 1, 1, hint)
    return Problem(file, message, mark.line + 1, mark.column + 1, hint)
