"""Reading a policy folder, warnings, and the store that keeps the last good version."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from ds01spawner.errors import LedgerError, PolicyInvalid
from ds01spawner.policy import load
from ds01spawner.policy.load import MemoryVersions, PolicyStore, policy_from_text, read_policy

LIMITS = "defaults:\n  pids_limit: 100\ngroups:\n  students:\n    members: [ann]\n"
PROFILES = "profiles:\n  lab: {image: lab, sizes: {s: {}}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A policy folder with a good policy, old enough not to look half-written."""
    (tmp_path / "groups").mkdir()
    write(tmp_path, "resource-limits.yaml", LIMITS)
    write(tmp_path, "profiles.yaml", PROFILES)
    return tmp_path


def write(folder: Path, file: str, text: str, *, age: float = 60) -> Path:
    """Write a file as an editor did `age` seconds ago."""
    path = folder / file
    path.write_text(text)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def warnings(folder: Path) -> list[str]:
    loaded = read_policy(folder)
    assert loaded.policy is not None, loaded.problems
    assert loaded.policy.warnings == loaded.problems
    return [str(problem).removeprefix(f"{folder}/") for problem in loaded.problems]


def pids(store: PolicyStore) -> int | None:
    return store.current().limits.defaults.pids_limit


# --------------------------------------------------------------------------- reading


def test_members_come_from_both_places(folder: Path) -> None:
    text = "# the course of autumn\nbob\n  cem   # joined late\n\n007\nx#y\nj.roe@uni.example\r\nno\n"
    (folder / "groups/students.members").write_bytes(b"\xef\xbb\xbf" + text.encode())
    loaded = read_policy(folder)
    assert loaded.policy is not None
    assert loaded.policy.members == {
        "students": frozenset({"ann", "bob", "cem", "007", "x#y", "j.roe@uni.example", "no"})
    }


def test_names_that_yaml_would_turn_into_something_else(folder: Path) -> None:
    names = "[007, no, 2025-01-01, 1e3, 0x1f, 1_000, 12:30, true, 1.50, 'null', .5]"
    write(
        folder, "resource-limits.yaml", f"groups:\n  0123: {{members: {names}}}\nuser_overrides:\n  on: {{cpus: 2}}\n"
    )
    loaded = read_policy(folder)
    assert loaded.policy is not None
    expected = {"007", "no", "2025-01-01", "1e3", "0x1f", "1_000", "12:30", "true", "1.50", "null", ".5"}
    assert loaded.policy.members["0123"] == expected
    assert list(loaded.policy.limits.user_overrides) == ["on"]


def test_empty_sections_are_sections(folder: Path) -> None:
    text = "defaults:\ngroups:\n  g:\n  h:\n    members:\n    aggregate:\n    mounts:\nuser_overrides:\ngrants:\n"
    write(folder, "resource-limits.yaml", text)
    loaded = read_policy(folder)
    assert loaded.policy is not None and list(loaded.policy.groups) == ["g", "h"]


def test_anchors_and_extension_keys(folder: Path) -> None:
    text = "x-base: &base {pids_limit: 5}\ngroups:\n  a: {<<: *base}\n  b: {<<: *base, pids_limit: 6}\n"
    write(folder, "resource-limits.yaml", text)
    loaded = read_policy(folder)
    assert loaded.policy is not None
    assert [group.pids_limit for group in loaded.policy.groups.values()] == [5, 6]


def test_old_keys_warn_and_say_what_to_do(folder: Path) -> None:
    text = (
        "defaults: {max_tasks: 5, idle_timeout: 48h, idle_timeout_h: 24, storage_tmp: 1g}\n"
        "user_overrides:\n  ann: {reserved_gpus: [0], policies: {auto_stop_idle: true}}\n"
        "gpu_allocation: {strategy: x, nested: [1]}\n"
    )
    write(folder, "resource-limits.yaml", text)
    found = warnings(folder)
    assert found[0].startswith('resource-limits.yaml:1:12: warning: the key "max_tasks" has no effect here')
    assert any('"idle_timeout" is ignored: "idle_timeout_h" says the same' in text for text in found)
    assert sum("no effect" in text for text in found) == 5
    loaded = read_policy(folder)
    assert loaded.policy is not None and loaded.policy.limits.defaults.idle_timeout_h == 86400


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("groups:\n  a: {members: [x, x]}\n", "2:20", "listed twice"),
        ("groups:\n  a: {members: [x]}\n  b: {members: [x]}\n", "3:3", "same priority"),
        ("defaults: {max_cpus: 0}\ngroups: {}\n", "1:12", "no server can start"),
        ("defaults: {cpus: 0}\ngroups: {}\n", "1:12", "no server can start"),
        ("defaults: {aggregate: {memory_high: 2g, memory_max: 1g}}\n", "1:24", "no effect"),
        ("defaults: {}\ngrants: [{user: u, memory: 1g, until: 2020-01-01}]\n", "2:10", "by and reason"),
        ("groups: {a: {members: [anna]}}\nuser_overrides: {ana: {cpus: 1}}\n", "2:18", "did you mean anna?"),
    ],
)
def test_oddities_are_warnings(folder: Path, text: str, place: str, words: str) -> None:
    write(folder, "resource-limits.yaml", text)
    (warning,) = warnings(folder)
    assert warning.startswith(f"resource-limits.yaml:{place}: warning") and words in warning


def test_files_that_mean_nothing_here_are_named(folder: Path) -> None:
    write(folder, "groups/studens.members", "x\n")
    write(folder, "user-overrides.yaml", "a: 1\n")
    write(folder, "groups/students.members~", "zoe\n")
    (folder / "profiles.yaml").unlink()
    (folder / "resource-limits.yaml").chmod(0o666)
    text = "\n".join(warnings(folder))
    assert "did you mean students?" in text
    assert "user-overrides.yaml: warning: this file is not read here" in text
    assert "profiles.yaml: warning: there is no such file" in text
    assert "everybody may write this file" in text


def test_time_changes_no_files_validity(folder: Path) -> None:
    text = "groups: {g: {members: [u]}}\nuser_overrides: {u: {cpus: 1, until: 1999-12-31}}\n"
    text += "grants: [{group: g, memory: +1g, until: '1999-12-31', by: a, reason: b}]\n"
    write(folder, "resource-limits.yaml", text)
    assert warnings(folder) == []


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "huge", "latin-1", "no folder", "link to device"])
def test_what_cannot_be_read_is_a_problem_and_never_hangs(folder: Path, kind: str) -> None:
    path = folder / "resource-limits.yaml"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        path.write_bytes(b"#" * (2 << 20))
    elif kind == "latin-1":
        path.write_bytes("a: 1\nb: Fü\n".encode("latin-1"))
    elif kind == "link to device":
        path.symlink_to("/dev/zero")
    loaded = read_policy(folder / "nowhere" if kind == "no folder" else folder)
    assert loaded.policy is None and loaded.errors
    if kind == "latin-1":
        assert (loaded.errors[0].line, loaded.errors[0].column) == (2, 5)


def test_the_bundle_gives_the_same_policy_and_the_hash_follows_every_file(folder: Path) -> None:
    first = read_policy(folder)
    assert first.policy is not None
    again = policy_from_text(first.text)
    assert (again.limits, again.members, again.profiles) == (
        first.policy.limits,
        first.policy.members,
        first.policy.profiles,
    )
    assert again.hash == first.hash == first.policy.hash
    hashes = {first.hash}
    for file, text in (
        ("groups/students.members", "x\n"),
        ("external.yaml", "external: []\n"),
        ("profiles.yaml", PROFILES + "\n"),
    ):
        write(folder, file, text)
        hashes.add(read_policy(folder).hash)
    assert len(hashes) == 4


def test_two_hundred_people_load_quickly(folder: Path) -> None:
    people = [f"person{number}" for number in range(200)]
    overrides = "".join(f"  {name}: {{memory: 64g, max_cpus: 12, until: 2027-01-31, reason: x}}\n" for name in people)
    grants = "".join(
        f"  - {{user: {name}, max_gpu_slots: +1, until: 2027-01-31, by: a, reason: b}}\n" for name in people
    )
    groups = "".join(f"  g{n}: {{members: [{', '.join(people)}], priority: {n}}}\n" for n in range(10))
    write(folder, "resource-limits.yaml", f"groups:\n{groups}user_overrides:\n{overrides}grants:\n{grants}")
    started = time.perf_counter()
    loaded = read_policy(folder)
    taken = time.perf_counter() - started
    print(f"200 people in 10 groups, 200 overrides, 200 grants: {taken * 1000:.0f} ms")
    assert loaded.policy is not None and taken < 2


# --------------------------------------------------------------------------- the version in force


def test_an_edit_takes_effect_at_the_next_look(folder: Path) -> None:
    versions = MemoryVersions()
    store = PolicyStore(folder, versions)
    assert (store.hash, store.problems) == ("", ())
    first = store.current()
    assert store.current() is first and store.hash == first.hash
    assert versions.last_policy() == (first.hash, first.text)
    for number in range(101, 120):
        (folder / "resource-limits.yaml").write_text(LIMITS.replace("100", str(number)))
        assert pids(store) == number, "also within one tick of the clock, with the same size"
    assert versions.last_policy() == (store.hash, store.current().text)


def test_files_that_did_not_change_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PolicyStore(folder, MemoryVersions())
    store.current()
    real = load._signature
    # ctime cannot be set back: pretend that ten seconds have passed.
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr(load, "_signature", lambda path: load.replace(real(path), taken_ns=later))
    store.current()
    monkeypatch.setattr(load, "read_policy", lambda path: pytest.fail("read again"))
    store.current()


def test_a_wrong_edit_keeps_the_version_and_says_so_until_it_is_mended(folder: Path) -> None:
    store = PolicyStore(folder, MemoryVersions())
    first = store.current()
    (folder / "resource-limits.yaml").write_text("defaults: {pids: 3}\n")
    assert store.current() is first
    assert "resource-limits.yaml:1:12" in str(store.problems[0])
    (folder / "resource-limits.yaml").write_text(LIMITS.replace("100", "300"))
    assert pids(store) == 300
    assert store.problems == ()


def test_restart_with_wrong_files_uses_the_stored_version(folder: Path) -> None:
    versions = MemoryVersions()
    first = PolicyStore(folder, versions).current()
    for wrong in ("", "defaults: {", None):
        path = folder / "resource-limits.yaml"
        path.unlink(missing_ok=True)
        if wrong is not None:
            path.write_text(wrong)
        store = PolicyStore(folder, versions)
        again = store.current()
        assert (again.hash, again.limits) == (first.hash, first.limits)
        assert any(not problem.warning for problem in store.problems)
        with pytest.raises(PolicyInvalid, match="resource-limits"):
            PolicyStore(folder, MemoryVersions()).current()
        with pytest.raises(PolicyInvalid):
            PolicyStore(folder, MemoryVersions(("hash", "not a bundle"))).current()


def test_a_vanished_or_emptied_file_is_an_accident(folder: Path) -> None:
    members = write(folder, "groups/students.members", "bob\n")
    versions = MemoryVersions()
    store = PolicyStore(folder, versions)
    first = store.current()
    for break_it in (
        lambda: (folder / "profiles.yaml").unlink(),
        members.unlink,
        lambda: members.write_text(""),
    ):
        break_it()
        assert store.current() is first
        assert any(not problem.warning for problem in store.problems)
        assert PolicyStore(folder, versions).current().hash == first.hash, "after a restart too"
        write(folder, "profiles.yaml", PROFILES)
        write(folder, "groups/students.members", "bob\n")
        assert store.current().hash == first.hash and store.problems == ()
    members.write_text("# nobody this term\n")
    assert store.current().members["students"] == {"ann"}
    members.unlink()
    (folder / "resource-limits.yaml").write_text("groups: {others: {members: [x]}}\n")
    assert list(store.current().groups) == ["others"], "a group goes together with its file"


def test_a_removed_end_is_believed_a_moment_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PolicyStore(folder, MemoryVersions())
    first = store.current()
    (folder / "resource-limits.yaml").write_text("defaults:\n  pids_limit: 100\n")
    assert store.current() is first
    assert "half-written" in str(store.problems[0])
    real = load._signature
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr(load, "_signature", lambda path: load.replace(real(path), taken_ns=later))
    assert store.current().groups == {}


def test_files_that_change_while_they_are_read_are_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PolicyStore(folder, MemoryVersions())
    first = store.current()
    real = load.read_policy

    def slow(path: Path) -> load.Loaded:
        loaded = real(path)
        write(folder, "resource-limits.yaml", LIMITS.replace("100", "7777"))
        return loaded

    (folder / "resource-limits.yaml").write_text(LIMITS.replace("100", "200"))
    monkeypatch.setattr(load, "read_policy", slow)
    assert store.current() is first, "200 may be half of two versions"
    monkeypatch.setattr(load, "read_policy", real)
    assert pids(store) == 7777


def test_failure_to_store_a_version_keeps_it_out_of_force(folder: Path) -> None:
    class Broken(MemoryVersions):
        def save_policy(self, hash: str, text: str) -> None:  # noqa: A002
            raise LedgerError("the disk is full")

    store = PolicyStore(folder, Broken())
    with pytest.raises(LedgerError):
        store.current()
    assert store.hash == ""


def test_race_of_many_threads_sees_whole_versions_only(folder: Path) -> None:
    store = PolicyStore(folder, MemoryVersions())
    store.current()
    wrong: list[object] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            policy = store.current()
            number = policy.limits.defaults.pids_limit
            if number is None or not 100 <= number < 150 or "lab" not in policy.profiles:
                wrong.append(policy)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(100, 150):
        draft = write(folder, "draft.new", LIMITS.replace("100", str(number)))
        draft.replace(folder / "resource-limits.yaml")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pids(store) == 149
