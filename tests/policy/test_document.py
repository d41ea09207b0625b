"""What is generated from the schema is up to date, and what is shipped is valid by both checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from vectors_support import LIMIT_SECTIONS, document, noon

from ds01spawner.policy import document as generator
from ds01spawner.policy.load import read_policy
from ds01spawner.policy.resolve import resolve

ROOT = Path(__file__).parents[2]


def editor_errors(name: str, data: Any) -> list[str]:
    """What an editor that knows the schema would underline."""
    schema = json.loads((ROOT / "config/schema" / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    plain = json.loads(json.dumps(data, default=str))
    return [error.message for error in Draft202012Validator(schema).iter_errors(plain)]


@pytest.mark.parametrize("path", generator.generated(), ids=str)
def test_generated_files_are_up_to_date(path: Path) -> None:
    expected = generator.generated()[path]
    assert (ROOT / path).read_text() == expected, "run: python -m ds01spawner.policy.document"


def test_the_generator_writes_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generator.main([str(tmp_path), "--check"]) == 1
    assert generator.main([str(tmp_path)]) == 0
    assert generator.main([str(tmp_path), "--check"]) == 0
    (tmp_path / "docs/configuration.md").write_text("edited by hand")
    assert generator.main([str(tmp_path), "--check"]) == 1
    assert "configuration.md is not up to date" in capsys.readouterr().out


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    for name in generator.schemas():
        schema = json.loads((ROOT / "config/schema" / name).read_text())
        for section in (schema, *schema["$defs"].values()):
            missing = [
                key for key in section.get("properties", {}) if f"`{key}`" not in text and f"`{key}:`" not in text
            ]
            assert not missing


@pytest.mark.parametrize("name", ["resource-limits", "profiles", "external"])
def test_shipped_files_fit_the_editor_schema(name: str) -> None:
    text = (ROOT / "config" / f"{name}.yaml").read_text()
    assert text.startswith(f"# yaml-language-server: $schema=schema/{name}.json\n")
    assert editor_errors(name, yaml.safe_load(text)) == []


def test_shipped_policy_is_valid_without_warnings() -> None:
    loaded = read_policy(ROOT / "config")
    assert loaded.problems == ()
    policy = loaded.policy
    assert policy is not None and set(policy.groups) == {"students", "researchers", "admins"}
    hour, at = 3600, noon("2027-01-01")
    students, researchers, admins = (resolve(policy, "u", at=at, hub_groups=[name]) for name in policy.groups)
    assert [limits["gpu_idle_timeout"] for limits in (students, researchers, admins)] == [hour, 2 * hour, 2 * hour]
    assert [limits["max_runtime"] for limits in (students, researchers, admins)] == [24 * hour, 168 * hour, None]
    for limits in (students, researchers, admins):
        assert limits["idle_timeout"] == 48 * hour
        assert limits["unknown_gpu_idle_timeout"] == 4 * hour
        assert limits["gpu_hold_after_stop"] == 0
        assert limits["container_hold_after_stop"] == 30 * 24 * hour
    profile = policy.profile(None)
    assert profile is not None and (profile.name, profile.framework, profile.default_size) == (
        "pytorch",
        "Pytorch",
        "small",
    )


def test_commented_examples_of_the_shipped_files_are_valid(tmp_path: Path) -> None:
    for name in ("resource-limits", "external", "profiles"):
        lines = (ROOT / "config" / f"{name}.yaml").read_text().splitlines()
        text = "\n".join(lines)
        for empty in ("user_overrides: {}", "grants: []", "external: []"):
            text = text.replace(empty, empty.split(":")[0] + ":")
        shown = text.replace("#   ", "  ").replace("# mounts:", "mounts:").replace("# default_group", "default_group")
        (tmp_path / f"{name}.yaml").write_text(shown.replace("  #   - /srv", "    - /srv"))
    loaded = read_policy(tmp_path)
    assert loaded.errors == ()
    assert loaded.policy is not None
    assert loaded.policy.limits.user_overrides and loaded.policy.limits.grants and loaded.policy.external
    assert loaded.policy.limits.defaults.mounts and loaded.policy.default_group == "students"


def test_the_editor_schema_takes_the_vector_fixture_and_both_generations() -> None:
    fixture = document()["fixture"]
    assert editor_errors("resource-limits", {key: fixture[key] for key in LIMIT_SECTIONS if key in fixture}) == []
    for value in (48, 0.5, "48h", "1d 12h", "never", None):
        assert editor_errors("resource-limits", {"defaults": {"idle_timeout": value, "idle_timeout_h": value}}) == []
    assert editor_errors("resource-limits", {"defaults": None, "groups": {"g": None}, "x-base": {"a": 1}}) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"defaults": {"max_cpu": 8}},
        {"default": {}},
        {"defaults": {"memory": "lots"}},
        {"defaults": {"idle_timeout": "soon"}},
        {"defaults": {"allow_full_gpu": "maybe"}},
        {"show_holders": "everybody"},
        {"groups": {"g": {"members": 3}}},
        {"grants": [{"user": "u", "memory": "1g"}]},
    ],
    ids=str,
)
def test_the_editor_schema_underlines_what_is_wrong(wrong: dict[str, Any]) -> None:
    assert editor_errors("resource-limits", wrong)
