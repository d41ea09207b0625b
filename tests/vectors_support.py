"""The shared vectors: where they are, and their fixture as a `Policy`.

`DS01_VECTORS` names another folder with files of the same form.
"""

from __future__ import annotations

import json
import os
from datetime import date, datetime, time, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds01spawner.policy.load import LIMITS, policy_from_text
from ds01spawner.policy.schema import Policy

VECTORS = Path(os.environ.get("DS01_VECTORS") or Path(__file__).parent / "vectors")
LIMIT_SECTIONS = (
    "defaults",
    "default_group",
    "groups",
    "user_overrides",
    "grants",
    "policies",
    "container_types",
    "show_holders",
)


def document(file: str = "policy.yaml") -> dict[str, Any]:
    """A vector file as plain data."""
    data = yaml.safe_load((VECTORS / file).read_text())
    assert isinstance(data, dict)
    return data


def case_params(section: str, file: str = "policy.yaml") -> list[Any]:
    """The cases of a section as pytest parameters with their ids; a section that the file lacks has none."""
    cases = document(file).get(section, [])
    return [pytest.param(case["input"], case["expect"], id=str(case["id"])) for case in cases]


def policy_of(data: dict[str, Any]) -> Policy:
    """A policy from the sections of `resource-limits.yaml` as plain data, read as a file would be."""
    return policy_from_text(json.dumps({LIMITS: yaml.safe_dump(data, allow_unicode=True)}))


def fixture_policy(data: dict[str, Any] | None = None) -> Policy:
    """The policy that the fixture of a vector file describes."""
    fixture = (data or document())["fixture"]
    return policy_of({key: fixture[key] for key in LIMIT_SECTIONS if key in fixture})


def noon(day: date | str) -> datetime:
    """UTC noon of a day."""
    return datetime.combine(date.fromisoformat(str(day)), time(12), timezone.utc)


def fixture_time(data: dict[str, Any] | None = None) -> datetime:
    """The moment at which cases without a day are evaluated."""
    return noon((data or document())["fixture"]["at"])
