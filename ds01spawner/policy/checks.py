"""What several keys or several files say together: contradictions are errors, oddities are warnings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from ds01spawner.errors import Problem

from .explain import at, closest
from .fields import canonical_names, canonical_values
from .layers import Group, Layer, built_ins
from .mounts import MountEntry
from .quantity import format_size
from .schema import ExternalFile, LimitsFile, ProfilesFile
from .yamltree import Node, Path

DOCKER_MINIMUM = 6 << 20
"""Docker refuses a container with less memory."""

_NOTHING_RUNS = ("max_cpus", "memory", "pids_limit")


def check_limits(limits: LimitsFile, members: Mapping[str, frozenset[str]], tree: Node, file: str) -> Iterator[Problem]:
    """Findings about `resource-limits.yaml` and the people that it names.

    Args:
        members: group → all names, those of the members files included.
    """
    if all(node.kind == "scalar" and node.text is None for _, node in tree.entries.values()):
        yield at(tree, file, (), "no section has anything in it", "a half-written file changes nothing")
    for path, layer in _layers(limits):
        yield from _check_layer(layer, path, tree, file)
    yield from _check_references(limits, tree, file)
    yield from _check_ties(limits, members, tree, file)
    yield from _check_strangers(limits, members, tree, file)
    writable = _writable(layer.mounts for _, layer in _layers(limits))
    for path, layer in _layers(limits):
        yield from _check_mounts(layer.mounts, writable, path, tree, file)


def check_profiles(profiles: ProfilesFile, limits: LimitsFile | None, tree: Node, file: str) -> Iterator[Problem]:
    """Findings about `profiles.yaml`; `limits` is None where that file is not valid itself."""
    if not profiles.profiles:
        yield at(tree, file, ("profiles",), "no profile: nobody could start anything")
    marked = [key for key, profile in profiles.profiles.items() if profile.default]
    for key in marked[1:]:
        yield at(tree, file, ("profiles", key, "default"), f'"{marked[0]}" is the default profile already')
    layers = [layer.mounts for _, layer in _layers(limits)] if limits is not None else []
    writable = _writable([*layers, *(profile.mounts for profile in profiles.profiles.values())])
    for key, profile in profiles.profiles.items():
        path: Path = ("profiles", key)
        yield from _check_mounts(profile.mounts, writable, path, tree, file)
        for index, entry in enumerate(profile.mounts):
            below = [other.host for layer in layers for other in layer if _swappable(other.host, [entry.host])]
            if entry.mode == "rw" and below:
                yield at(tree, file, (*path, "mounts", index), _decides(entry.host, below[0]), _APART)
        written = tree.data().get("profiles", {}).get(key, {})
        if "name" in written and written["name"] != key:
            yield at(tree, file, (*path, "name"), f'the name must be the key "{key}"; use title for people')
        defaults = [name for name, size in profile.sizes.items() if size.default]
        for name in defaults[1:]:
            yield at(tree, file, (*path, "sizes", name, "default"), f'"{defaults[0]}" is the default size already')
        if any(not image.strip("*?/.:") for image in profile.images):
            yield at(tree, file, (*path, "images"), "users may start every image there is", warning=True)
        for name, size in profile.sizes.items():
            if size.memory is not None and size.memory < DOCKER_MINIMUM:
                yield at(tree, file, (*path, "sizes", name, "memory"), _too_little(size.memory))
        for index, group in enumerate(profile.groups or ()):
            if limits is not None and group not in limits.groups:
                hint = closest(group, limits.groups)
                yield at(tree, file, (*path, "groups", index), f'there is no group "{group}"', hint)


def check_external(external: ExternalFile, tree: Node, file: str) -> Iterator[Problem]:
    """Findings about `external.yaml`."""
    seen: set[tuple[str, str]] = set()
    for index, rule in enumerate(external.external):
        if (rule.name, rule.image) in seen:
            yield at(tree, file, ("external", index), f'"{rule.name}" is listed twice', warning=True)
        seen.add((rule.name, rule.image))


def group_priority(limits: LimitsFile, group: Group) -> int:
    """A group's priority: its own, else that of defaults, else the built-in one."""
    for layer in (group, limits.defaults):
        if "priority" in layer.model_fields_set:
            return layer.priority
    return int(built_ins(Layer)["priority"])


def _layers(limits: LimitsFile) -> Iterator[tuple[Path, Layer]]:
    yield ("defaults",), limits.defaults
    for name, group in limits.groups.items():
        yield ("groups", name), group
    for name, override in limits.user_overrides.items():
        yield ("user_overrides", name), override


def _check_layer(layer: Layer, path: Path, tree: Node, file: str) -> Iterator[Problem]:
    """Contradictions within one layer."""
    values = canonical_values(layer)
    memory, swap = values.get("memory", 0), values.get("memory_swap", 0)
    if "memory" in values and "memory_swap" in values and swap is not None and (memory is None or swap < memory):
        message = f"memory_swap {format_size(swap)} is below memory {format_size(memory)}"
        hint = "memory_swap is memory and swap together; leave it out for no swap"
        yield at(tree, file, (*path, "memory_swap"), message, hint)
    for key in ("memory", "memory_swap"):
        size = values.get(key)
        if size is not None and 0 < size < DOCKER_MINIMUM:
            yield at(tree, file, (*path, key), f"{key}: {_too_little(size)}", "a bare number is bytes; write 32g")
    for key in _NOTHING_RUNS:
        if values.get(key) == 0 and key in values:
            hint = "to keep people from starting servers write max_containers_per_user: 0"
            written = next(name for name in canonical_names(type(layer))[key] if name in layer.model_fields_set)
            yield at(tree, file, (*path, written), f"with {written}: 0 no server can start", hint, warning=True)
    aggregate = layer.aggregate
    high, most = aggregate.memory_high, aggregate.memory_max
    if high is not None and most is not None and high > most:
        message = "memory_high above memory_max has no effect"
        yield at(tree, file, (*path, "aggregate", "memory_high"), message, warning=True)


_APART = "mount folders that do not lie in each other, or the outer one read-only"


def _writable(layers: Iterable[Sequence[MountEntry]]) -> list[str]:
    """Host folders that somebody may write to."""
    return sorted({entry.host for layer in layers for entry in layer if entry.mode == "rw"})


def _check_mounts(
    mounts: Sequence[MountEntry], writable: Sequence[str], path: Path, tree: Node, file: str
) -> Iterator[Problem]:
    """A folder in one that users may write to: with a link in its place they would choose what Docker mounts."""
    for index, entry in enumerate(mounts):
        outer = _swappable(entry.host, writable)
        if outer is not None:
            yield at(tree, file, (*path, "mounts", index), _decides(outer, entry.host), _APART)


def _swappable(host: str, writable: Sequence[str]) -> str | None:
    return next((outer for outer in writable if host.startswith(f"{outer}/")), None)


def _decides(outer: str, inner: str) -> str:
    return f"{outer} is mounted read-write, so users could put a link in the place of {inner}, which is mounted too"


def _too_little(size: int) -> str:
    return f"{format_size(size)} is less than the 6 MiB that Docker needs for a container"


def _check_references(limits: LimitsFile, tree: Node, file: str) -> Iterator[Problem]:
    """Names of groups that do not exist, and people listed twice."""
    if limits.default_group is not None and limits.default_group not in limits.groups:
        hint = closest(limits.default_group, limits.groups)
        message = f'default_group: there is no group "{limits.default_group}"'
        yield at(tree, file, ("default_group",), message, hint)
    for index, grant in enumerate(limits.grants):
        if grant.group is not None and grant.group not in limits.groups:
            hint = closest(grant.group, limits.groups)
            yield at(tree, file, ("grants", index, "group"), f'there is no group "{grant.group}"', hint)
        missing = [key for key in ("by", "reason") if not getattr(grant, key)]
        if missing:
            message = f"the grant does not say {' and '.join(missing)}"
            yield at(tree, file, ("grants", index), message, "people will ask", warning=True)
    for name, group in limits.groups.items():
        seen: set[str] = set()
        for index, member in enumerate(group.members):
            if member in seen:
                path: Path = ("groups", name, "members", index)
                yield at(tree, file, path, f'"{member}" is listed twice', warning=True)
            seen.add(member)


def _check_ties(limits: LimitsFile, members: Mapping[str, frozenset[str]], tree: Node, file: str) -> Iterator[Problem]:
    """People in two groups of the same priority: the first in the file counts, which is easily not what was meant."""
    for (first, one), (second, other) in combinations(limits.groups.items(), 2):
        both = members.get(first, frozenset()) & members.get(second, frozenset())
        if both and group_priority(limits, one) == group_priority(limits, other):
            names = ", ".join(sorted(both)[:5]) + (f" and {len(both) - 5} more" if len(both) > 5 else "")
            message = f'{names} in "{first}" and in "{second}", which have the same priority: "{first}" counts'
            yield at(tree, file, ("groups", second), message, "give the groups different priorities", warning=True)


def _check_strangers(
    limits: LimitsFile, members: Mapping[str, frozenset[str]], tree: Node, file: str
) -> Iterator[Problem]:
    """Overrides of people whom no group names, where only members of groups may log in."""
    open_groups = any(group.hub_groups or group.unix_groups for group in limits.groups.values())
    if limits.default_group is not None or open_groups:
        return
    named = frozenset[str]().union(*members.values())
    for user in limits.user_overrides:
        if user not in named:
            message = f'"{user}" has an override but is in no group, and there is no default_group: they cannot log in'
            hint = closest(user, sorted(named)) or "set default_group, or add the name to a group's members"
            yield at(tree, file, ("user_overrides", user), message, hint, warning=True)
