"""Wrong policy files: each is refused with file, line and column, and changes nothing that was in force."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds01spawner.errors import PolicyInvalid, Problem
from ds01spawner.policy.load import MemoryVersions, PolicyStore, policy_from_text, read_policy

GOOD = {
    "resource-limits.yaml": "defaults:\n  memory: 32g\ngroups:\n  students:\n    members: [ann]\n",
    "profiles.yaml": "profiles:\n  lab: {image: lab, sizes: {s: {}}}\n",
    "external.yaml": "external: []\n",
    "groups/students.members": "bob\n",
}

# (file, text, line:column of the first error, words of its sentence or hint)
LIMITS = [
    ("defaults: {max_cpu: 8}", "1:12", "did you mean max_cpus?"),
    ("defaults: {memroy: 32g}", "1:12", "did you mean memory?"),
    ("default: {memory: 32g}\ngroups: {}", "1:1", "did you mean defaults?"),
    ("defaults:\n  memory: lots", "2:11", '"lots" is not a size'),
    ("defaults:\n  memory: -1", "2:11", "negative"),
    ("defaults:\n  memory: 64", "2:3", "less than the 6 MiB"),
    ("defaults:\n  memory: {max: 3}", "2:11", "is not a number"),
    ("defaults:\n  idle_timeout: soon", "2:17", "is not a duration"),
    ("defaults:\n  idle_timeout_h: 1,5h", "2:19", "not a comma"),
    ("defaults:\n  idle_timeout: 1:30", "2:17", "is not a duration"),
    ("defaults:\n  max_cpus: true", "2:13", "is not a number"),
    ("defaults:\n  max_cpus: .inf", "2:13", "not a finite number"),
    ("defaults:\n  max_cpus: .nan", "2:13", "not a finite number"),
    ("defaults:\n  max_cpus: ''", "2:13", "empty"),
    ("defaults:\n  max_gpu_equivalents: -0.5", "2:24", "negative"),
    ("defaults:\n  max_gpu_equivalents: null\n  max_gpu_slots: -1", "3:18", "negative"),
    ("defaults:\n  max_mig_instances: 1.5", "2:22", "whole"),
    ("defaults:\n  pids_limit: 0x10", "2:15", "is not a number"),
    ("defaults:\n  pids_limit: 010", "2:15", "is not a number"),
    ("defaults:\n  allow_full_gpu: maybe", "2:19", "neither true nor false"),
    ("defaults:\n  allow_full_gpu: 1", "2:19", "neither true nor false"),
    ("defaults:\n  allow_full_gpu:", "2:3", "neither true nor false"),
    ("defaults:\n  priority: null", "2:3", "must be a number"),
    ("defaults:\n  memory: 8g\n  memory_swap: 4g", "3:3", "memory_swap 4 GiB is below memory 8 GiB"),
    ("defaults:\n  memory: null\n  memory_swap: 4g", "3:3", "below memory no limit"),
    ("defaults:\n  memory: 8g\n  memory: 9g", "3:3", "written twice"),
    ("defaults: [memory]", "1:11", "section of keys"),
    ("defaults: 3", "1:11", "section of keys"),
    ("- defaults", "1:1", "section of keys"),
    ("just words", "1:1", "section of keys"),
    ("defaults:\n  gpu_pool: {a: 1}", "2:13", "list of GPU indices"),
    ("defaults:\n  aggregate: {cpu_qouta: 1}", "2:15", "did you mean cpu_quota?"),
    ("defaults:\n  aggregate: {memory_max: 50%}", "2:27", "share of the machine"),
    ("defaults:\n  mounts: [{host: data, target: /data}]", "2:19", "not an absolute path"),
    ("defaults:\n  mounts: [{host: /srv/../etc, target: /data}]", "2:19", ".."),
    ("defaults:\n  mounts: ['/var/run/docker.sock:/s']", "2:12", "may not be mounted"),
    ("defaults:\n  mounts: ['/:/host']", "2:12", "may not be mounted"),
    ("defaults:\n  mounts: [{host: /srv/a, target: /a, mode: rwx}]", "2:45", "did you mean rw?"),
    ("defaults:\n  mounts: [{host: /srv/a}]", "2:12", '"target" is missing'),
    ("defaults:\n  mounts: ['/srv/a:/x', '/srv/b:/x']", "2:11", "two mounts"),
    ("groups:\n  a: {members: [[x]]}", "2:17", "is not a name"),
    ("groups:\n  a: {members: [~]}", "2:17", "name is missing"),
    ("groups:\n  a: {members: {x: 1}}", "2:16", "list is expected"),
    ("groups:\n  a/b: {}", "2:3", "is not a name"),
    ("groups:\n  a: {member: [x]}", "2:7", "did you mean members?"),
    ("groups:\n  a: {}\n  a: {}", "3:3", "written twice"),
    ("default_group: studnets\ngroups: {students: {}}", "1:1", "did you mean students?"),
    ("groups: {}\nmembers: [a]", "2:1", "belongs into a group"),
    ("max_cpus: 8\ngroups: {}", "1:1", "belongs into defaults"),
    ("defaults: {}\nuser_overrides:\n  u: {until: 2026-13-01}", "3:14", "is not a day"),
    ("defaults: {}\nuser_overrides:\n  u: {until: soon}", "3:14", "is not a day"),
    ("defaults: {}\nuser_overrides:\n  u: {members: [x]}", "3:7", "belongs into a group"),
    ("defaults: {}\ngrants:\n  - {user: u, memory: +1g}", "3:5", '"until" is missing'),
    ("defaults: {}\ngrants:\n  - {user: u, until: 2026-01-01}", "3:5", "at least one limit"),
    (
        "defaults: {}\ngrants:\n  - {user: u, group: g, memory: 1g, until: 2026-01-01}",
        "3:5",
        "either a user or a group",
    ),
    ("defaults: {}\ngrants:\n  - {group: g, memory: 1g, until: 2026-01-01}", "3:6", 'no group "g"'),
    ("defaults: {}\ngrants:\n  - {user: u, memory: '+', until: 2026-01-01}", "3:23", "empty"),
    ("defaults: {}\ngrants:\n  - {user: u, memory: +-1g, until: 2026-01-01}", "3:23", "negative"),
    ("defaults: {}\ngrants:\n  - {user: u, allow_full_gpu: +true, until: 2026-01-01}", "3:31", "adds nothing"),
    ("policies: {cpu_idle_treshold: 2}\ndefaults: {}", "1:12", "did you mean cpu_idle_threshold?"),
    ("policies: {warn_at: 1.5}\ndefaults: {}", "1:21", "between 0 and 1"),
    ("policies: {warn_at: 0.9, final_at: 0.8}\ndefaults: {}", "1:11", "must be smaller"),
    ("policies: {mode: watch}\ndefaults: {}", "1:18", "is not one of"),
    ("show_holders: everybody\ndefaults: {}", "1:15", "is not one of"),
    ("container_types: {api: {idle: 3}}\ndefaults: {}", "1:25", "unknown key"),
    ("defaults:\ngroups:\n", "1:1", "no section has anything"),
    ("", "1:1", "empty"),
    ("# nothing\n", "1:1", "empty"),
    ("defaults:\n\tmemory: 1g", "2:1", "tabs"),
    ("defaults: {memory: 32g", "", "not valid YAML"),
    ("defaults: {memory: !!python/name:os.system x}", "1:20", "tag"),
    ("defaults: &d {memory: *d}", "1:23", "stands in"),
    ("defaults: {}\n---\ngroups: {}", "2:1", "second document"),
    ("defaults: {}\n\x00", "2:1", "does not allow"),
]
PROFILES = [
    ("profiles: {}", "1:1", "nobody could start anything"),
    ("profil: {}", "1:1", "did you mean profiles?"),
    ("profiles:\n  a: {}", "2:6", "either an image or a framework"),
    ("profiles:\n  a: {image: i, framework: f}", "2:6", "either an image or a framework"),
    ("profiles:\n  a: {image: i, version: '2'}", "2:6", "belongs to framework"),
    ("profiles:\n  a b: {image: i}", "2:3", "is not a key"),
    ("profiles:\n  a: {image: i, groups: [studens]}", "2:26", "did you mean students?"),
    ("profiles:\n  a: {image: i, name: b}", "2:17", "must be the key"),
    ("profiles:\n  a: {image: i, default: true}\n  b: {image: i, default: yes}", "3:17", "default profile already"),
    ("profiles:\n  a: {image: i, sizes: {s: {gpu: {kind: ful}}}}", "2:41", "did you mean full?"),
    ("profiles:\n  a: {image: i, sizes: {s: {gpu: {mig_profile: big}}}}", "2:48", "is not a MIG profile"),
    ("profiles:\n  a: {image: i, sizes: {s: {gpu: {kind: none, count: 1}}}}", "2:34", "kind: none"),
    ("profiles:\n  a: {image: i, sizes: {s: {gpu: {kind: mig, count: 2}}}}", "2:34", "one MIG instance"),
    ("profiles:\n  a: {image: i, sizes: {s: {gpu: {kind: full, mig_profile: 1g.5gb}}}}", "2:34", "needs kind: mig"),
    ("profiles:\n  a: {image: i, sizes: {s: {memory: 1m}}}", "2:29", "6 MiB"),
    ("profiles:\n  a: {image: i, env: {NVIDIA_VISIBLE_DEVICES: all}}", "2:22", "set by ds01 itself"),
    ("profiles:\n  a: {image: i, env: {a-b: c}}", "2:22", "not the name"),
]
EXTERNAL = [
    ("externals: []", "1:1", "did you mean external?"),
    ("external: [{name: x}]", "1:12", '"image" is missing'),
    ("external: [{name: x, image: '*'}]", "1:29", "fits every image"),
    ("", "1:1", "empty"),
]
MEMBERS = [
    ("ann\n  two names\n", "2:3", "is not one name"),
    ("ann, bob\n", "1:1", "is not one name"),
    ("ann\na/b # x\n", "2:1", "is not a name"),
]
CASES = [
    pytest.param(file, *case, id=f"{file.split('.')[0].split('/')[0]}-{number:02}")
    for file, cases in (
        ("resource-limits.yaml", LIMITS),
        ("profiles.yaml", PROFILES),
        ("external.yaml", EXTERNAL),
        ("groups/students.members", MEMBERS),
    )
    for number, case in enumerate(cases)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A policy folder with a good policy."""
    (tmp_path / "groups").mkdir()
    for file, text in GOOD.items():
        (tmp_path / file).write_text(text)
    return tmp_path


def first_error(problems: tuple[Problem, ...], file: Path) -> str:
    return next(str(problem) for problem in problems if not problem.warning and problem.file == str(file))


@pytest.mark.parametrize(("file", "text", "place", "words"), CASES)
def test_malformed_files_are_refused_with_their_place_and_change_nothing(
    folder: Path, file: str, text: str, place: str, words: str
) -> None:
    versions = MemoryVersions()
    store = PolicyStore(folder, versions)
    before = store.current()
    saved = versions.last_policy()

    (folder / file).write_text(text)

    loaded = read_policy(folder)
    error = first_error(loaded.problems, folder / file)
    assert loaded.policy is None
    assert error.startswith(f"{folder / file}:{place}"), error
    assert words in error
    problem = next(p for p in loaded.errors if p.file == str(folder / file))
    assert problem.line is not None and problem.column is not None
    assert store.current() is before, "the version in force stays"
    assert versions.last_policy() == saved, "nothing is stored"
    assert any(not p.warning for p in store.problems)
    with pytest.raises(PolicyInvalid):
        PolicyStore(folder, MemoryVersions()).current()


def test_there_are_fifty_of_them() -> None:
    assert len(CASES) >= 50


@pytest.mark.parametrize("cut", range(1, len(GOOD["resource-limits.yaml"]), 3))
def test_a_half_written_file_changes_nothing(folder: Path, cut: int) -> None:
    store = PolicyStore(folder, MemoryVersions())
    before = store.current()
    (folder / "resource-limits.yaml").write_text(GOOD["resource-limits.yaml"][:cut])
    after = store.current()
    assert after is before or after.limits == before.limits
    assert store.problems or cut == len(GOOD["resource-limits.yaml"]) - 1


def test_all_errors_of_all_files_are_found_at_once(folder: Path) -> None:
    (folder / "resource-limits.yaml").write_text("defaults: {max_cpu: 1, memory: x}\ngroups: {a: {member: []}}\n")
    (folder / "profiles.yaml").write_text("profiles: {a: {imag: 1}}\n")
    (folder / "groups/students.members").write_text("two names\n")
    files = [Path(problem.file).name for problem in read_policy(folder).errors]
    assert files.count("resource-limits.yaml") == 3
    assert files.count("profiles.yaml") == 1 and files.count("students.members") == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"resource-limits.yaml": 3}', '{"resource-limits.yaml": ""}', "{}"])
def test_damaged_stored_versions_are_refused(text: str) -> None:
    with pytest.raises(PolicyInvalid):
        policy_from_text(text)


def test_a_stored_version_says_where_it_is_wrong() -> None:
    with pytest.raises(PolicyInvalid, match=r"resource-limits\.yaml:1:12"):
        policy_from_text(json.dumps({"resource-limits.yaml": "defaults: {zzz: 1}"}))
