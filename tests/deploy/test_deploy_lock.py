"""The lock file of the server install: every dependency is in it, in a version that pyproject.toml allows."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent


def _declared() -> list[Requirement]:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    return [Requirement(line.strip().strip('",')) for line in block.splitlines() if line.strip().startswith('"')]


@pytest.mark.parametrize("wanted", _declared(), ids=str)
def test_deploy_lock_fits_what_is_declared(wanted: Requirement) -> None:
    lines = (ROOT / "deploy" / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in locked.items()}
    version = versions.get(canonicalize_name(wanted.name))
    assert version is not None, f"{wanted.name} is not in deploy/requirements.lock"
    assert wanted.specifier.contains(version), f"{wanted.name} {version} is not in {wanted.specifier}"
