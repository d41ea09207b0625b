"""Users' folders, welcome notebook, what the kernel says of processes and disks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds01spawner.containers import host
from ds01spawner.containers.host import (
    Folder,
    boot_id,
    container_of_pid,
    disk_free,
    populate_welcome,
    prepare_home,
    prepare_workspace,
    project_parts,
    verify_mounted,
)
from ds01spawner.containers.pins import unpin_all
from ds01spawner.errors import Code, HostError, Refusal

UID, GID, OTHER = 70123, 70124, 70999
ID = "0123456789abcdef" * 4
INNER = "f" * 64

SWAP = """
import os, sys
os.setgroups([]); os.setresgid(GID, GID, GID); os.setresuid(UID, UID, UID)
turn = 0
def quietly(act, *names):
    try:
        act(*names)
    except OSError:
        pass
while not os.path.exists("stop"):
    turn += 1
    quietly(os.rename, "a", f"real{turn}")
    quietly(os.symlink, sys.argv[1], "a")
    quietly(os.rename, "a", "link")
    quietly(os.rename, f"real{turn}", "a")
"""
"""A user's program that puts a link in the place of a folder and back, as fast as it can. Starts as root, because
the interpreter may lie where only root can read."""

root_only = pytest.mark.docker  # needs root; the marker asks for it


def owner(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def as_user(script: str, cwd: Path) -> None:
    """Run a shell line as the user, with no rights beyond theirs."""
    subprocess.run(["setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups", "sh", "-ec", script],
                   cwd=cwd, check=True)  # fmt: skip


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Path]:
    """A place whose way down is root's, as /srv is."""
    path = tmp_path / "srv" / "workspaces"
    path.parent.mkdir()
    yield path
    unpin_all(range(UID, UID + 1))


@root_only
class TestFolders:
    def test_home_is_made_private_below_a_root_owned_parent(self, parent: Path) -> None:
        folder = prepare_home(parent, UID, GID, "alice")
        assert folder.path == parent.resolve() / str(UID)
        assert folder.created
        assert owner(folder.path) == (UID, GID, 0o700)
        assert owner(parent) == (0, 0, 0o711)
        found = folder.path.stat()
        assert (folder.device, folder.inode) == (found.st_dev, found.st_ino)

    def test_again_changes_nothing(self, parent: Path) -> None:
        first = prepare_workspace(parent, UID, GID)
        first.path.chmod(0o750)
        (first.path / "data").touch()
        again = prepare_workspace(parent, UID, GID)
        assert (again.path, again.device, again.inode, again.created) == (first.path, first.device, first.inode, False)
        assert owner(again.path) == (UID, GID, 0o750)
        assert owner(again.path / "data")[0] == 0

    def test_project_folders_are_the_users(self, parent: Path) -> None:
        folder = prepare_workspace(parent, UID, GID, "thesis/Übung 1")
        assert folder.shown == parent.resolve() / str(UID) / "thesis" / "Übung 1"
        assert owner(folder.path) == owner(folder.shown) == owner(folder.shown.parent) == (UID, GID, 0o700)

    def test_a_workspace_of_millions_is_not_read_to_its_end(
        self, parent: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = prepare_workspace(parent, UID, GID)
        (folder.path / "one").touch()
        monkeypatch.setattr(os, "listdir", None)
        assert not populate_welcome(folder, b"{}", UID, GID)

    def test_another_owner_is_refused_and_nothing_is_chowned(self, parent: Path) -> None:
        path = prepare_workspace(parent, UID, GID).path
        os.chown(path, OTHER, OTHER)
        (path / "secret").touch()
        with pytest.raises(HostError, match=f"belongs to uid {OTHER}, not to {UID}.*chown -R -h {UID}:{GID}") as caught:
            prepare_workspace(parent, UID, GID)
        assert caught.value.code is Code.STORAGE_REFUSED
        assert owner(path)[0] == OTHER
        assert owner(path / "secret")[0] == 0

    def test_roots_own_folder_is_handed_over_only_if_empty(self, parent: Path) -> None:
        prepare_workspace(parent, OTHER, OTHER)
        (parent / str(UID)).mkdir(0o700)
        assert not prepare_workspace(parent, UID, GID).created, "made by a start that died before its chown"
        assert owner(parent / str(UID)) == (UID, GID, 0o700)
        kept = parent / str(UID) / "kept-by-root"
        kept.mkdir(0o700)
        (kept / "secret").touch()
        with pytest.raises(HostError, match="belongs to uid 0"):
            prepare_workspace(parent, UID, GID, "kept-by-root")
        assert owner(kept)[0] == 0

    @pytest.mark.parametrize("plant", ["ln -s {outside} project", "ln -s . project", "touch project", "mkfifo project"])
    def test_what_a_user_planted_is_not_followed(self, parent: Path, tmp_path: Path, plant: str) -> None:
        outside = tmp_path / "outside"
        outside.mkdir(0o700)
        workspace = prepare_workspace(parent, UID, GID).path
        tmp_path.chmod(0o755)
        as_user(plant.format(outside=outside), _reachable(workspace))
        for project in ("project", "project/below"):
            with pytest.raises(HostError, match="is not a folder of its own"):
                prepare_workspace(parent, UID, GID, project)
        assert owner(outside)[0] == 0
        assert list(outside.iterdir()) == []

    def test_race_of_a_user_who_swaps_the_project_for_a_link(self, parent: Path, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.mkdir(0o700)
        workspace = _reachable(prepare_workspace(parent, UID, GID).path)
        stop = workspace / "stop"
        script = SWAP.replace("UID", str(UID)).replace("GID", str(GID))
        swapper = subprocess.Popen([sys.executable, "-S", "-c", script, victim], cwd=workspace)
        outcomes = {"ok": 0, "refused": 0}
        try:
            for _ in range(300):
                try:
                    folder = prepare_workspace(parent, UID, GID, "a/b")
                except HostError as error:
                    assert error.code is Code.STORAGE_REFUSED
                    outcomes["refused"] += 1
                else:
                    assert folder.inode != victim.stat().st_ino
                    outcomes["ok"] += 1
        finally:
            stop.touch()
            assert swapper.wait(timeout=30) == 0
        print(outcomes)
        assert list(victim.iterdir()) == []
        assert owner(victim) == (0, 0, 0o700)

    def test_parent_that_others_may_write_to_is_refused(self, parent: Path) -> None:
        parent.mkdir()
        parent.chmod(0o777)
        with pytest.raises(HostError, match=r"could be changed by others than root.*chmod go-w"):
            prepare_workspace(parent, UID, GID)
        parent.chmod(0o755)
        os.chown(parent, UID, GID)
        with pytest.raises(HostError, match=f"owner {UID}"):
            prepare_workspace(parent, UID, GID)

    def test_grandparent_that_others_may_write_to_is_refused(self, parent: Path) -> None:
        parent.mkdir()
        parent.parent.chmod(0o775)
        with pytest.raises(HostError, match="could be changed"):
            prepare_workspace(parent, UID, GID)

    def test_sticky_grandparent_will_do(self, parent: Path) -> None:
        parent.parent.chmod(0o1777)
        assert prepare_workspace(parent, UID, GID).created

    def test_roots_links_in_the_settings_are_resolved(self, parent: Path, tmp_path: Path) -> None:
        (tmp_path / "big-disk" / "ws").mkdir(parents=True)
        parent.symlink_to(Path("..") / "big-disk" / "ws")
        folder = prepare_workspace(parent, UID, GID)
        assert folder.path == tmp_path.resolve() / "big-disk" / "ws" / str(UID)

    def test_link_below_a_users_folder_is_refused_even_if_it_leads_to_roots(self, tmp_path: Path) -> None:
        users = prepare_home(tmp_path / "homes", UID, GID, "alice").path
        (users / "link").symlink_to(tmp_path)
        with pytest.raises(HostError, match="could be changed by others"):
            prepare_workspace(users / "link", UID, GID)

    def test_endless_links_are_refused(self, parent: Path) -> None:
        parent.symlink_to(parent)
        with pytest.raises(HostError, match="too many links"):
            prepare_workspace(parent, UID, GID)

    def test_root_gets_no_folder(self, parent: Path) -> None:
        with pytest.raises(HostError):
            prepare_home(parent, 0, 0, "root")

    def test_race_of_two_starts_of_one_user(self, parent: Path) -> None:
        folders: list[Folder] = []
        threads = [
            threading.Thread(target=lambda: folders.append(prepare_workspace(parent, UID, GID, "p/q")))
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(folders) == 16
        assert len({(folder.device, folder.inode) for folder in folders}) == 1

    def test_race_a_folder_handed_over_by_another_start_is_theirs(
        self, parent: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between our look at its owner and our look into it, the other start hands it over and fills it."""

        def handed_over(descriptor: int) -> bool:
            os.fchown(descriptor, UID, GID)
            return False

        monkeypatch.setattr(host, "_empty", handed_over)
        assert prepare_workspace(parent, UID, GID).created

    def test_no_descriptor_is_left_open(self, parent: Path) -> None:
        def count() -> int:
            return len(list(Path("/proc/self/fd").iterdir()))

        before = count()
        prepare_workspace(parent, UID, GID, "a/b/c")
        (parent / str(UID) / "link").symlink_to("/")
        for project in ("link", "link/x"):
            with pytest.raises(HostError):
                prepare_workspace(parent, UID, GID, project)
        with pytest.raises(HostError):
            prepare_workspace(Path("/proc/version/x"), UID, GID)
        assert count() == before


class TestProjectNames:
    @pytest.mark.parametrize("name", ["thesis", "thesis/run1", "Übung 1", "a.b", "x_1-2", "a+b", "数据"])
    def test_plain_ones_pass(self, name: str) -> None:
        assert "/".join(project_parts(name)) == name

    @pytest.mark.parametrize(
        "name",
        [
            "", "/", "/etc", "..", ".", "a/..", "../x", "a//b", "a/", "./a", ".ssh", "a/.ssh", "a\0b", "a\nb", "a\x1bb",
            "-rf", "~root", "a:b", "a,ro", "a\\b", "$HOME", "a`b", "a;'b", " a", "a ", "a\u202eb", "\udcff", "x" * 256,
            "/".join("a" * 17),
        ],
    )  # fmt: skip
    def test_weird_ones_are_refused(self, name: str) -> None:
        with pytest.raises(Refusal, match="below your workspace") as caught:
            project_parts(name)
        assert caught.value.code is Code.BAD_REQUEST


@root_only
class TestWelcome:
    def test_empty_workspace_gets_it_as_the_users(self, parent: Path) -> None:
        folder = prepare_workspace(parent, UID, GID)
        assert populate_welcome(folder, b"{}", UID, GID)
        file = folder.path / "welcome.ipynb"
        assert file.read_bytes() == b"{}"
        assert owner(file) == (UID, GID, 0o644)
        assert not populate_welcome(folder, b"other", UID, GID), "no longer empty"
        assert file.read_bytes() == b"{}"

    def test_planted_link_is_not_written_through(self, parent: Path, tmp_path: Path) -> None:
        folder = prepare_workspace(parent, UID, GID)
        (folder.path / "welcome.ipynb").symlink_to(tmp_path / "shadow")
        assert not populate_welcome(folder, b"{}", UID, GID)
        assert not (tmp_path / "shadow").exists()

    def test_swapped_workspace_is_refused(self, parent: Path) -> None:
        folder = prepare_workspace(parent, UID, GID)
        folder.path.rename(parent / "old")
        folder.path.mkdir()
        with pytest.raises(HostError, match="was replaced"):
            populate_welcome(folder, b"{}", UID, GID)


@root_only
class TestVerifyMounted:
    def test_same_folder_passes_and_another_fails(self, parent: Path) -> None:
        folder = prepare_workspace(parent, UID, GID, "a/b")
        verify_mounted(os.getpid(), str(folder.path), folder)
        with pytest.raises(HostError, match="another folder is mounted"):
            verify_mounted(os.getpid(), str(folder.path.parent), folder)

    def test_link_inside_the_container_does_not_count(self, parent: Path) -> None:
        folder = prepare_workspace(parent, UID, GID)
        (parent / "link").symlink_to(folder.path)
        with pytest.raises(HostError, match="cannot be checked"):
            verify_mounted(os.getpid(), str(parent.resolve() / "link"), folder)

    def test_ended_container_is_no_success(self, parent: Path, tmp_path: Path) -> None:
        folder = prepare_workspace(parent, UID, GID)
        with pytest.raises(HostError, match="may have ended"):
            verify_mounted(1, "/workspace", folder, proc=tmp_path)


class TestKernel:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (f"12:memory:/docker/{ID}\n1:name=systemd:/docker/{ID}\n", ID),
            (f"9:pids:/ds01/students/alice/{ID}\n", ID),
            (f"0::/system.slice/docker-{ID}.scope\n", ID),
            (f"0::/ds01.slice/ds01-a.slice/ds01-a-b.slice/docker-{ID}.scope\n", ID),
            (f"0::/docker/{ID}/docker/{INNER}\n", ID),
            (f"0::/system.slice/docker-{ID}.scope/init.scope\n", ID),
            (f"0::/../../docker-{ID}.scope\n", ID),
            (f"4:cpu:/kubepods/besteffort/pod1/{ID}\n0::/\n", ID),
            (f"0::/kubepods.slice/cri-containerd-{ID}.scope\n", ID),
            (f"0::/user.slice/user-1000.slice/user@1000.service/docker-{ID}.scope\n", None),
            (f"0::/system.slice/{ID[:63]}\n0::/x{ID}\n", None),
            ("0::/user.slice/user-1000.slice/session-3.scope\n", None),
            ("9:name=systemd:/\n0::/\n", None),
            ("", None),
        ],
    )
    def test_container_of_pid(self, tmp_path: Path, text: str, expected: str | None) -> None:
        (tmp_path / "77").mkdir()
        (tmp_path / "77" / "cgroup").write_text(text)
        assert container_of_pid(77, tmp_path) == expected

    def test_ended_process_is_in_no_container(self, tmp_path: Path) -> None:
        assert container_of_pid(77, tmp_path) is None

    def test_boot_id_and_disk(self, tmp_path: Path) -> None:
        assert len(boot_id()) == 36
        disk = disk_free(tmp_path)
        assert 0 < disk.free <= disk.total
        with pytest.raises(HostError, match="cannot be measured"):
            disk_free(tmp_path / "missing")


def _reachable(workspace: Path) -> Path:
    """Open the way down to the workspace for its user: pytest's folders are root's alone."""
    for folder in workspace.parents:
        if str(folder).startswith("/tmp/") or "pytest" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o011)
    return workspace
