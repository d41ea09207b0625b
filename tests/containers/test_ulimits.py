"""AIME's ulimits: only those that this machine's Docker daemon may really raise."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds01spawner.containers.ulimits import AIME_ULIMITS, daemon_ulimits

ALL, NONE = "000001ffffffffff", "000001fffeffffff"  # with and without CAP_SYS_RESOURCE


def daemon(folder: Path, capabilities: str, memlock: str, stack: str) -> tuple[Path, Path]:
    """A /proc with one daemon in it, and its pid file."""
    process = folder / "proc" / "42"
    process.mkdir(parents=True)
    (process / "status").write_text(f"Name:\tdockerd\nCapEff:\t{capabilities}\n")
    (process / "limits").write_text(
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        f"Max stack size            8388608              {stack:<20} bytes     \n"
        f"Max locked memory         8388608              {memlock:<20} bytes     \n"
    )
    (folder / "docker.pid").write_text("42\n")
    return folder / "docker.pid", folder / "proc"


@pytest.mark.parametrize(
    ("capabilities", "memlock", "stack", "given", "told"),
    [
        (ALL, "8388608", "8388608", ["memlock", "stack"], 0),
        (NONE, "8388608", "unlimited", ["stack"], 1),
        (NONE, "unlimited", "67108864", ["memlock", "stack"], 0),
        (NONE, "8388608", "8388608", [], 2),
    ],
)
def test_ulimits_only_as_far_as_the_daemon_may(
    tmp_path: Path, capabilities: str, memlock: str, stack: str, given: list[str], told: int
) -> None:
    found, warnings = daemon_ulimits(*daemon(tmp_path, capabilities, memlock, stack))
    assert [ulimit.name for ulimit in found] == given
    assert set(found) <= set(AIME_ULIMITS)
    assert len(warnings) == told


def test_a_daemon_that_cannot_be_looked_at_gets_its_own_defaults(tmp_path: Path) -> None:
    found, warnings = daemon_ulimits(tmp_path / "none.pid", tmp_path)
    assert found == () and "cannot be read" in warnings[0]
