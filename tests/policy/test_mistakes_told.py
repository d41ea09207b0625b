"""A slip in the policy files is told where the admin looks: once in the log, with the command that shows all."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ds01spawner.errors import PolicyInvalid
from ds01spawner.policy.load import MemoryVersions, PolicyStore

GOOD = "defaults: {memory: 1g}\n"


def write(folder: Path, text: str) -> None:
    (folder / "resource-limits.yaml").write_text(text)
    (folder / "profiles.yaml").write_text("profiles: {p: {image: a/b}}\n")


def test_a_mistake_is_written_to_the_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, GOOD)
    store = PolicyStore(tmp_path, MemoryVersions())
    store.current()
    write(tmp_path, "defaults: {memroy: 1g, max_cpus: 2}\n")
    with caplog.at_level(logging.WARNING, "ds01.policy"):
        for _ in range(3):
            store.current()
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if "memroy" in line]) == 1
    assert any("resource-limits.yaml:1:" in line for line in told)
    assert any("last good version" in line for line in told)


def test_the_hint_names_the_folder_that_was_read(tmp_path: Path) -> None:
    write(tmp_path, "defaults: {memroy: 1g}\n")
    with pytest.raises(PolicyInvalid) as caught:
        PolicyStore(tmp_path, MemoryVersions()).current()
    assert f"`ds01-admin config check {tmp_path}`" in caught.value.message
