"""What a user plants in their own folders, and when: Docker mounts what was checked, or nothing."""

from __future__ import annotations

import contextlib
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from intruder import Foothold, Lab

from ds01spawner.containers.host import prepare_workspace
from ds01spawner.containers.pins import unpin_all
from ds01spawner.errors import Problem
from ds01spawner.policy.load import read_policy

UID = 70126


@pytest.mark.docker
class TestDockersMount:
    """The moment between our check and Docker's mount, held still."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Iterator[Path]:
        """A parent for workspaces, and what the attacker wants to see: a folder of the host's."""
        (tmp_path / "host" / "etc").mkdir(parents=True)
        (tmp_path / "host" / "etc" / "passwd").write_text("host\n")
        yield tmp_path
        unpin_all(range(UID, UID + 1), pins=tmp_path / "run" / "pins")

    @pytest.mark.parametrize("plant", ["link", "link above", "gone"])
    def test_race_link_swapped_in_before_dockers_mount_leads_nowhere(
        self, place: Path, demo_image: str, plant: str
    ) -> None:
        """Fails if the project's own path is given to Docker: its container then has the host's folder, and hands a
        descriptor of it to the user's other containers before anybody looks."""
        folder = prepare_workspace(place / "workspaces", UID, UID, "thesis/run", pins=place / "run" / "pins")
        (folder.shown / "mine").touch()
        victim = folder.shown if plant == "link" else folder.shown.parent
        if plant == "gone":
            shutil.rmtree(victim)
        else:
            victim.rename(victim.with_name("aside"))
            (place / "host" / "run").mkdir(exist_ok=True)
            victim.symlink_to(place / "host")
        client = docker.APIClient(timeout=60)
        mounts = [docker.types.Mount("/workspace", str(folder.path), type="bind")]
        made = client.create_container(
            demo_image,
            command=["sh", "-c", "ls -A /workspace; cat /workspace/etc/passwd"],
            user=f"{UID}:{UID}",
            host_config=client.create_host_config(mounts=mounts, network_mode="none"),
        )["Id"]
        told = ""
        try:
            with contextlib.suppress(docker.errors.APIError) if plant == "gone" else contextlib.nullcontext():
                client.start(made)
                client.wait(made)
                told = client.logs(made).decode()
        finally:
            client.remove_container(made, force=True)
            client.close()
        assert "host\n" not in told and "etc\n" not in told
        assert "mine\n" in told or plant == "gone"


SWAP = """
import ctypes, os, time
libc = ctypes.CDLL(None)
os.makedirs("/workspace/swap", exist_ok=True)
os.symlink("/", "/workspace/away")
end = time.time() + 60
while time.time() < end and not os.path.exists("/workspace/enough"):
    libc.syscall(316, -100, b"/workspace/swap", -100, b"/workspace/away", 2)  # renameat2, RENAME_EXCHANGE
    time.sleep(0.004)
"""

LOOK = """#!/bin/sh
if [ -e /workspace/etc/passwd ] || [ -e /workspace/proc/1 ]; then touch ~/looted; else touch ~/nothing; fi
PATH=${PATH#*:} exec python3 "$@"
"""
"""Stands in front of the server's own program on PATH, in the user's own folder: it runs before anybody looks."""


@pytest.mark.docker
@pytest.mark.hub
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of the system call is x86_64's")
def test_race_a_swapping_user_never_gets_the_hosts_folders(lab: Lab) -> None:
    """The whole way on a real Hub: a second server of the user swaps the project folder for a link to `/`."""
    mallory: Foothold = lab.inside("mallory")
    mallory.run("sh", "-c", "cd /workspace; rm -rf swap away enough ~/looted ~/nothing; mkdir -p $PYTHONUSERBASE/bin")
    swapper = lab.client.exec_create(mallory.container, ["python3", "-c", SWAP], user=f"{mallory.uid}:{mallory.uid}")
    lab.client.exec_start(swapper["Id"], detach=True)
    tool = "$PYTHONUSERBASE/bin/python3"
    mallory.run("sh", "-c", f'printf %s "$0" > {tool} && chmod +x {tool}', LOOK)
    started = 0
    try:
        for _ in range(16):
            answer = lab.hub.ask("mallory", {"profile": "cpu", "project": "swap"}, "swap")
            if answer.status_code in (201, 202):
                started += 1
                lab.hub.halt("mallory", "swap")
            else:
                assert "is not a folder of its own" in answer.text, answer.text
            if started == 4:
                break
    finally:
        mallory.run("sh", "-c", f"touch /workspace/enough; rm -f {tool}")
    home = lab.hub.plan.resolved().homes / str(mallory.uid)
    assert not (home / "looted").exists()
    assert (home / "nothing").exists() == (started > 0), "the attacker's program did look"
    print(f"started {started} times while the folder was being swapped")


# --------------------------------------------------------------------------- the policy's mounts


def problems(
    tmp_path: Path, limits: str, profiles: str = "profiles: {p: {image: x, sizes: {s: {}}}}\n"
) -> list[Problem]:
    (tmp_path / "resource-limits.yaml").write_text(limits)
    (tmp_path / "profiles.yaml").write_text(profiles)
    return [problem for problem in read_policy(tmp_path).problems if not problem.warning]


@pytest.mark.parametrize("target", ["/workspace", "/workspace/shared", "/home", "/home/alice/data", "/home/x"])
def test_nothing_is_mounted_where_a_user_could_put_a_link(tmp_path: Path, target: str) -> None:
    """The place of a mount is looked up in the container: below the user's own folders they would choose it."""
    found = problems(tmp_path, f"defaults: {{mounts: ['/srv/data:{target}:ro']}}\n")
    assert len(found) == 1 and "may not be mounted" in found[0].message


def test_nothing_is_mounted_from_a_folder_that_users_may_write_to(tmp_path: Path) -> None:
    """With a link in its place they would choose what Docker mounts for the next one, in whatever file it stands."""
    limits = (
        "defaults: {mounts: ['/srv/shared/data:/data:ro']}\n"
        "groups:\n  staff: {members: [a], mounts: ['/srv/shared:/shared:rw']}\n"
    )
    found = problems(tmp_path, limits)
    assert len(found) == 1 and "put a link in the place of /srv/shared/data" in found[0].message
    assert found[0].line == 1
    profiles = "profiles: {p: {image: x, mounts: ['/srv/shared:/shared:rw'], sizes: {s: {}}}}\n"
    found = problems(tmp_path, "defaults: {mounts: ['/srv/shared/data:/data:ro']}\n", profiles)
    assert len(found) == 1 and "profiles.yaml" in str(found[0])
    inner = "profiles: {p: {image: x, mounts: ['/srv/shared/data:/data:ro'], sizes: {s: {}}}}\n"
    found = problems(tmp_path, "defaults: {mounts: ['/srv/shared:/shared:rw']}\n", inner)
    assert len(found) == 1 and "profiles.yaml" in str(found[0])


@pytest.mark.parametrize(
    "mounts",
    [
        ["/srv/shared:/shared:ro", "/srv/shared/data:/data:ro"],
        ["/srv/shared:/shared:ro", "/srv/shared/data:/data:rw"],
        ["/srv/shared:/shared:rw", "/srv/shared:/data:ro"],
        ["/srv/shared:/shared:rw", "/srv/shared2/data:/data:ro"],
    ],
)
def test_mounts_that_nobody_can_swap_are_fine(tmp_path: Path, mounts: list[str]) -> None:
    assert problems(tmp_path, f"defaults: {{mounts: {mounts}}}\n") == []
