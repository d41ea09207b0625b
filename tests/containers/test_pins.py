"""A checked folder on a path that nobody but root can change: what a swap after the check reaches is nothing."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds01spawner.containers import pins as module
from ds01spawner.containers.host import Folder, prepare_workspace, verify_mounted
from ds01spawner.containers.pins import KEPT, pin, unpin_all
from ds01spawner.errors import Code, HostError

pytestmark = pytest.mark.docker  # needs root; the marker asks for it

UID = 70125


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    """A place of this test's own for pins."""
    place = tmp_path / "run" / "pins"
    yield place
    unpin_all(range(UID, UID + 1), pins=place)


@pytest.fixture
def workspaces(tmp_path: Path) -> Path:
    """Parent of the workspaces; root's."""
    return tmp_path / "workspaces"


def project(workspaces: Path, pins: Path, name: str = "thesis") -> Folder:
    return prepare_workspace(workspaces, UID, UID, name, pins=pins)


def mounted(place: Path) -> int:
    return sum(line.split()[4] == str(place) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def test_race_a_link_put_there_after_the_check_leads_nowhere(workspaces: Path, pins: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "secret").touch()
    folder = project(workspaces, pins)
    (folder.shown / "mine").touch()
    folder.shown.rename(folder.shown.with_name("aside"))
    folder.shown.symlink_to(victim)
    assert [entry.name for entry in folder.path.iterdir()] == ["mine"], "what Docker mounts is what was checked"
    verify_mounted(os.getpid(), str(folder.path), folder)


def test_race_a_link_put_there_before_the_bind_is_not_followed(workspaces: Path, pins: Path, tmp_path: Path) -> None:
    """Between the last look at the path and the mount: only the open folder counts."""
    folder = project(workspaces, pins)
    descriptor = os.open(folder.shown, os.O_RDONLY | os.O_DIRECTORY)
    try:
        folder.shown.rename(folder.shown.with_name("aside"))
        folder.shown.symlink_to(tmp_path)
        bound = pin(descriptor, UID, "other", pins=pins)
        assert bound.stat().st_ino == folder.inode
    finally:
        os.close(descriptor)


def test_the_path_is_roots_and_stays_the_same(workspaces: Path, pins: Path) -> None:
    first, again, other = project(workspaces, pins), project(workspaces, pins), project(workspaces, pins, "a/b")
    assert first.path == again.path != other.path, "a stopped container names it, and is used again"
    assert mounted(first.path) == 1
    for place in (pins, first.path.parent):
        found = place.stat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o700)
    assert first.path.stat().st_uid == UID


def test_a_folder_that_was_made_anew_is_bound_anew(workspaces: Path, pins: Path) -> None:
    first = project(workspaces, pins)
    first.shown.rename(first.shown.with_name("old"))
    again = project(workspaces, pins)
    assert (again.path, mounted(again.path)) == (first.path, 1)
    assert again.inode != first.inode
    assert again.path.stat().st_ino == again.inode


def test_setuid_programs_and_devices_in_it_have_no_effect(workspaces: Path, pins: Path) -> None:
    folder = project(workspaces, pins)
    flags = os.statvfs(folder.path).f_flag
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV
    subprocess.run(["cp", "/usr/bin/id", str(folder.path / "id")], check=True)
    (folder.path / "id").chmod(0o4755)
    told = subprocess.run(
        ["setpriv", "--reuid=70999", "--regid=70999", "--clear-groups", str(folder.path / "id"), "-u"],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert told.stdout.strip() in ("70999", ""), "never root: by nosuid, or not reachable at all"


def test_pins_do_not_pile_up(workspaces: Path, pins: Path) -> None:
    for number in range(KEPT + 2):
        project(workspaces, pins, f"p{number}")
    left = list((pins / str(UID)).iterdir())
    assert 1 <= len(left) <= KEPT
    assert all(mounted(place) == 1 for place in left)


def test_unpin_all_takes_mounts_and_folders_away_and_nothing_in_them(workspaces: Path, pins: Path) -> None:
    folder = project(workspaces, pins)
    (folder.path / "work").touch()
    unpin_all(range(UID, UID + 1), pins=pins)
    assert not folder.path.exists()
    assert (folder.shown / "work").exists()
    unpin_all(range(UID, UID + 1), pins=pins)


def test_a_kernel_that_refuses_is_a_sentence(workspaces: Path, pins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str | None, target: Path, flags: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module, "_mount", refuse)
    with pytest.raises(HostError, match=r"cannot be bound.*Operation not permitted.*whole workspace start") as caught:
        project(workspaces, pins)
    assert caught.value.code is Code.STORAGE_REFUSED


def test_a_place_that_others_may_write_to_is_refused(workspaces: Path, pins: Path) -> None:
    pins.parent.mkdir()
    pins.parent.chmod(0o777)
    with pytest.raises(HostError, match="could be changed by others"):
        project(workspaces, pins)
