"""Passwd and group files for containers, and the host's accounts."""

from __future__ import annotations

import grp
import pwd
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import pytest

from ds01spawner.containers import accounts
from ds01spawner.containers.accounts import (
    Account,
    AccountWriter,
    Group,
    account_texts,
    read_image_accounts,
    uid_problems,
    uid_taken,
    unix_account,
    unix_groups,
)
from ds01spawner.errors import Code, EngineError, HostError, Refusal

PASSWD = """root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
ubuntu:x:1000:1000:Ubuntu:/home/ubuntu:/bin/bash
"""
GROUP = """root:x:0:
sudo:x:27:ubuntu
video:x:44:alice,bob
users:x:100:
ubuntu:x:1000:
"""
ALICE = Account("alice", 70001, 70001, "/home/alice")


class TestTexts:
    def test_one_line_more(self) -> None:
        passwd, group = account_texts(PASSWD, GROUP, ALICE)
        assert passwd == PASSWD + "alice:x:70001:70001:alice:/home/alice:/bin/bash\n"
        assert group == GROUP.replace("alice,bob", "bob") + "alice:x:70001:\n"

    def test_clashing_uid_of_the_image_is_replaced(self) -> None:
        passwd, group = account_texts(PASSWD, GROUP, Account("alice", 1000, 1000, "/home/alice"))
        assert "ubuntu:x:1000:1000:Ubuntu" not in passwd
        assert "alice:x:1000:1000:alice:/home/alice:/bin/bash\n" in passwd
        assert "ubuntu:x:1000:\n" in group, "the image's files keep their group's name"
        assert "sudo:x:27:\n" in group, "nobody inherits what the image's ubuntu was"

    def test_clashing_name_of_the_image_is_replaced_without_its_rights(self) -> None:
        passwd, group = account_texts(PASSWD, GROUP, Account("ubuntu", 70002, 70002, "/home/ubuntu"))
        assert [line for line in passwd.splitlines() if line.startswith("ubuntu:")] == [
            "ubuntu:x:70002:70002:ubuntu:/home/ubuntu:/bin/bash"
        ]
        assert "sudo:x:27:\n" in group
        assert "ubuntu:x:1000:\n" in group
        assert "g70002:x:70002:\n" in group

    def test_further_groups_by_number_with_the_user_as_member(self) -> None:
        account = Account(
            "alice", 70001, 100, "/home/alice", (Group("lab", 5000), Group("video", 6000), Group("x", 44))
        )
        _, group = account_texts(PASSWD, GROUP, account)
        assert "lab:x:5000:alice\n" in group
        assert "g6000:x:6000:alice\n" in group, "the name is the image's own group already"
        assert "video:x:44:bob,alice\n" in group
        assert group.count(":100:") == 1

    def test_incomplete_lines_are_dropped(self) -> None:
        passwd, group = account_texts(PASSWD + "+::::::\n#x\n\nbad:x:y:1:::\nshort:x\n", GROUP + "+:::\n", ALICE)
        assert [line.split(":")[0] for line in passwd.splitlines()] == ["root", "daemon", "ubuntu", "alice"]
        assert "+" not in group

    @pytest.mark.parametrize(
        "account",
        [
            Account("a:b", 70001, 70001, "/h"),
            Account("a\nroot2:x:0:0::/:/bin/sh", 70001, 70001, "/h"),
            Account("", 70001, 70001, "/h"),
            Account("-a", 70001, 70001, "/h"),
            Account("alice", 70001, 70001, "/h:/bin/sh"),
            Account("alice", 70001, 70001, "/h\nx"),
            Account("alice", 70001, 70001, "relative"),
            Account("root", 70001, 70001, "/h"),
            Account("alice", 0, 0, "/h"),
        ],
        ids=repr,
    )
    def test_injections_and_root_are_refused(self, account: Account) -> None:
        with pytest.raises(Refusal) as caught:
            account_texts(PASSWD, GROUP, account)
        assert caught.value.code is Code.BAD_NAME


class TestWriter:
    @pytest.fixture
    def reads(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Image ids that Docker was asked for."""
        seen: list[str] = []

        def read(_client: object, image_id: str) -> tuple[str, str]:
            seen.append(image_id)
            return PASSWD, GROUP

        monkeypatch.setattr(accounts, "read_image_accounts", read)
        return seen

    def test_written_once_per_image_and_never_by_others(self, tmp_path: Path, reads: list[str]) -> None:
        client: Any = None
        files = AccountWriter(tmp_path).write(client, "sha256:abc1", ALICE)
        assert files.passwd == tmp_path / "accounts/70001/abc1/passwd"
        assert files.passwd.read_text() == account_texts(PASSWD, GROUP, ALICE)[0]
        assert files.group.read_text() == account_texts(PASSWD, GROUP, ALICE)[1]
        for path in (files.passwd, files.group):
            assert path.stat().st_mode & 0o777 == 0o644
        before = files.passwd.stat()
        assert AccountWriter(tmp_path).write(client, "sha256:abc1", ALICE) == files
        after = files.passwd.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        AccountWriter(tmp_path).write(client, "sha256:abc1", Account("bob", 70002, 70002, "/home/bob"))
        assert reads == ["sha256:abc1"]
        AccountWriter(tmp_path).write(client, "sha256:abc2", ALICE)
        assert reads == ["sha256:abc1", "sha256:abc2"]
        assert not list(tmp_path.rglob("*.new"))

    def test_changed_account_replaces_the_file_instead_of_writing_into_it(
        self, tmp_path: Path, reads: list[str]
    ) -> None:
        client: Any = None
        writer = AccountWriter(tmp_path)
        path = writer.write(client, "sha256:abc1", ALICE).passwd
        with path.open() as mounted:
            writer.write(client, "sha256:abc1", Account("alice2", 70001, 70001, "/home/alice"))
            assert "alice2" not in mounted.read()
        assert "alice2" in path.read_text()

    def test_odd_image_ids_cannot_leave_the_folder(self, tmp_path: Path, reads: list[str]) -> None:
        client: Any = None
        files = AccountWriter(tmp_path).write(client, "sha256:../../../etc", ALICE)
        assert files.passwd.is_relative_to(tmp_path / "accounts" / "70001")
        with pytest.raises(HostError):
            AccountWriter(tmp_path).write(client, "sha256:", ALICE)


@pytest.mark.docker
class TestImage:
    @pytest.fixture
    def client(self) -> Any:
        client = docker.APIClient()
        yield client
        client.close()

    def test_accounts_of_an_image_are_read_without_running_it(self, client: Any, tiny_image: str) -> None:
        image_id = client.inspect_image(tiny_image)["Id"]
        before = {row["Id"] for row in client.containers(all=True, filters={"label": "ds01.probe"})}
        passwd, group = read_image_accounts(client, image_id)
        assert passwd.startswith("root:x:0:0:")
        assert group.startswith("root:x:0:")
        after = {row["Id"] for row in client.containers(all=True, filters={"label": "ds01.probe"})}
        assert after <= before

    def test_missing_image_is_an_engine_error(self, client: Any) -> None:
        with pytest.raises(EngineError, match="cannot be read"):
            read_image_accounts(client, "sha256:" + "0" * 64)


class TestUnixAccounts:
    @pytest.fixture
    def known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A host with one account `jroe` (uid 5001), some system accounts, and a directory that ignores case."""
        users = {
            "jroe": (5001, 5001),
            "root": (0, 0),
            "daemon": (1, 1),
            "nobody": (65534, 65534),
            "wheel": (5002, 0),
        }
        groups = {0: "root", 27: "sudo", 5001: "jroe", 6000: "lab"}

        def getpwnam(name: str) -> Any:
            uid, gid = users[name.lower()]
            return SimpleNamespace(pw_name=name.lower(), pw_uid=uid, pw_gid=gid, pw_dir=f"/home/{name.lower()}")

        monkeypatch.setattr(pwd, "getpwnam", getpwnam)
        monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=groups[gid]))
        monkeypatch.setattr("os.getgrouplist", lambda name, gid: [gid, 27, 6000, 6001])

    @pytest.mark.usefixtures("known")
    def test_account_with_its_groups_less_the_systems(self) -> None:
        assert unix_account("jroe") == Account(
            "jroe", 5001, 5001, "/home/jroe", (Group("lab", 6000), Group("g6001", 6001))
        )
        assert unix_account("jroe", home="/home/x").home == "/home/x"
        assert [group.name for group in unix_groups("jroe")] == ["jroe", "sudo", "lab", "g6001"]

    @pytest.mark.usefixtures("known")
    def test_group_root_is_not_carried_over(self) -> None:
        assert unix_account("wheel").gid == 5002

    @pytest.mark.usefixtures("known")
    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("root", "uid 0 is a system account"),
            ("daemon", "uid 1 is a system account"),
            ("nobody", "uid 65534 is a system account"),
            ("JRoe", "spelled 'jroe'"),
            ("ghost", "no such Unix account"),
        ],
    )
    def test_others_are_refused(self, name: str, why: str) -> None:
        with pytest.raises(Refusal, match=why) as caught:
            unix_account(name)
        assert caught.value.code is Code.NOT_ALLOWED

    def test_real_host(self) -> None:
        with pytest.raises(Refusal):
            unix_account("root")
        with pytest.raises(Refusal):
            unix_account("a\0b")
        assert unix_groups("root")[0] == Group("root", 0)
        assert unix_groups("no-such-account") == ()
        assert uid_taken(0)
        assert not uid_taken(3_999_999_999)


class TestUidRange:
    @pytest.fixture
    def subuid(self, tmp_path: Path) -> Path:
        path = tmp_path / "subuid"
        path.write_text("# comment\nalice:100000:65536\nbob:69000:1001\nodd\n")
        return path

    def test_free_range(self, subuid: Path) -> None:
        assert uid_problems((70001, 99999), files=(subuid, subuid.with_name("missing")), accounts=list) == ()

    def test_overlaps_name_file_line_and_remedy(self, subuid: Path) -> None:
        (problem,) = uid_problems((70000, 99999), files=(subuid,), accounts=list)
        assert str(problem) == (
            f"{subuid}:3: error: 69000-70000, subordinate ids of bob, overlap uid_range 70000-99999 "
            "(choose another uid_range)"
        )
        assert [p.line for p in uid_problems((165535, 165600), files=(subuid,), accounts=list)] == [2]
        assert uid_problems((165536, 165600), files=(subuid,), accounts=list) == ()

    def test_existing_accounts(self) -> None:
        entry: Any = SimpleNamespace(pw_uid=70500, pw_name="jroe")
        (problem,) = uid_problems((70000, 99999), files=(), accounts=lambda: [entry])
        assert "uid 70500 in uid_range 70000-99999 belongs to jroe" in str(problem)

    @pytest.mark.parametrize("span", [(999, 2000), (2000, 1999), (60000, 70000)])
    def test_special_numbers(self, span: tuple[int, int]) -> None:
        assert "must start at 1000" in str(uid_problems(span, files=(), accounts=list)[0])
