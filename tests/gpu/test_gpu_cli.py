"""`ds01-admin gpus` and `ds01-admin place`: the same answers as a start, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from ds01spawner.cli.admin import main
from ds01spawner.errors import Code, Refusal
from ds01spawner.gpu.inventory import open_inventory
from ds01spawner.ledger.records import Claim
from ds01spawner.ledger.store import Ledger
from ds01spawner.model import Admission, External, Limits, Request, Resources, Snapshot, Unit
from ds01spawner.settings import SETTINGS_ENV, Settings
from tests.vectors_support import VECTORS, document

DEMO = Path(__file__).parents[2] / "deploy" / "demo-box.yaml"
POLICY = """
default_group: students
defaults: {max_gpu_equivalents: 2.0, max_gpu_slots_per_container: 2, allow_full_gpu: false}
groups:
  students: {}
  staff: {members: [eve], allow_full_gpu: true, group_total: {max_gpu_equivalents: 2.0}}
"""


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SETTINGS_ENV, raising=False)
    monkeypatch.setattr("ds01spawner.cli.installation.DEFAULT_STATE_DIR", tmp_path / "nothing")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "resource-limits.yaml").write_text(POLICY)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answer(*arguments: object, code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def place(policy: Path, *arguments: object, code: int = 0, inventory: Path = DEMO) -> Any:
    return answer("place", "--config", policy, "--inventory", inventory, *arguments, code=code)


def labels(data: Any) -> list[str]:
    return [unit["label"] for unit in data["units"]]


# --------------------------------------------------------------------------- gpus


def test_cli_gpus_draws_every_gpu_to_scale() -> None:
    result = run("gpus", "--inventory", DEMO)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == "4 GPUs (simulated): 13 free"
    bars = [line for line in lines if line.startswith("[")]
    assert {len(bar) for bar in bars} == {64}
    assert bars[2] == "[1g.5gb]" * 7 + "·" * 8
    assert bars[3].count("[") == 4 and bars[3].index("3g.20gb") > 32
    assert all(unit.uuid in result.output for unit in open_inventory(str(DEMO)).read().units)


def test_cli_gpus_json_is_in_base_units() -> None:
    data = answer("gpus", "--inventory", DEMO)
    assert data["units"] == {"free": 13, "leased": 0, "external": 0, "unhealthy": 0}
    small = data["gpus"][2]["units"][0]
    assert (small["label"], small["memory_bytes"], small["state"]) == ("2.0", 4864 * 1024**2, "free")
    assert small["share"] == pytest.approx(1 / 7)


def test_cli_gpus_tells_what_is_wrong(tmp_path: Path) -> None:
    box = tmp_path / "box.yaml"
    box.write_text(
        "gpus: [{model: L40S, problem: 'lost: test'}, {model: L40S, processes: [7]}, {model: L40S, external: exporter}]"
    )
    data = answer("gpus", "--inventory", box)
    assert [gpu["units"][0]["state"] for gpu in data["gpus"]] == ["unhealthy", "external", "external"]
    output = run("gpus", "--inventory", box).output
    assert "lost: test" in output and "pid 7" in output and "exporter" in output


def test_cli_gpus_with_a_wrong_box_is_an_error(tmp_path: Path) -> None:
    box = tmp_path / "box.yaml"
    box.write_text("gpus:\n  - {model: A100-40GB, mig: [4g.20gb, 4g.20gb]}\n")
    result = run("gpus", "--inventory", box)
    assert result.exit_code == 30 and "box.yaml:2:" in result.stderr


def test_cli_gpus_without_gpus() -> None:
    assert run("gpus", "--inventory", "none").output.startswith("0 GPUs (none): no units")


def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Path) -> tuple[Settings, Ledger]:
    settings = Settings(config_dir=policy, state_dir=tmp_path / "state", inventory=str(DEMO))
    monkeypatch.setenv(SETTINGS_ENV, str(settings.save()))
    return settings, Ledger.open(settings.url)


def lease(ledger: Ledger, user: str, units: Sequence[Unit]) -> None:
    limits = Limits(user, "students", ("students",), {})
    granted = Admission(Request(), limits, "image", tuple(units), Resources(None, None, None, None, None))
    ledger.reserve(
        Claim(user=user, server_name="", group="students", groups=("students",), uid=70001), lambda _: granted
    )


def test_cli_gpus_shows_the_picture_of_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Path
) -> None:
    _, ledger = installation(tmp_path, monkeypatch, policy)
    box = open_inventory(str(DEMO)).read()
    units = {unit.label: unit for unit in box.units}
    with ledger:
        lease(ledger, "ann", [units["0"]])
        ledger.write_snapshot(
            Snapshot(
                datetime.now(timezone.utc), box, (External(units["2.0"].uuid, "process", "pid 7 (python)", "compute"),)
            )
        )
    data = answer("gpus")
    states = {unit["label"]: (unit["state"], unit["why"]) for gpu in data["gpus"] for unit in gpu["units"]}
    assert states["0"] == ("leased", "ann/main (reserved)")
    assert states["2.0"] == ("external", "pid 7 (python): compute")
    assert states["1"] == ("free", "") and data["stale"] is False


def test_cli_place_in_an_installation_sees_its_leases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Path
) -> None:
    settings, ledger = installation(tmp_path, monkeypatch, policy)
    box = open_inventory(str(DEMO)).read()
    with ledger:
        lease(ledger, "ann", [next(unit for unit in box.units if unit.label == "0")])
        ledger.write_snapshot(Snapshot(datetime.now(timezone.utc), box))
    assert labels(answer("place", "--user", "eve")) == ["1"]
    with Ledger.open(settings.url) as ledger:
        ledger.write_snapshot(Snapshot(datetime.now(timezone.utc) - timedelta(minutes=1), box))
    assert answer("place", "--user", "eve", code=30)["error"]["code"] == "inventory_stale"
    assert answer("gpus")["stale"] is True


# --------------------------------------------------------------------------- place


def test_cli_place_answers_units(policy: Path) -> None:
    data = place(policy, "--user", "ann", "--gpus", 1)
    assert labels(data) == ["2.0"]
    assert data["units"][0]["uuid"].startswith("MIG-") and data["share"] == pytest.approx(1 / 7)
    assert labels(place(policy, "--user", "eve", "--gpus", 2)) == ["0", "1"]
    assert labels(place(policy, "--user", "ann", "--mig-profile", "2g.10gb")) == ["3.1"]
    assert labels(place(policy, "--user", "ann", "--gpus", 1, "--kind", "mig")) == ["2.0"]
    assert labels(place(policy, "--user", "ann", "--group", "staff")) == ["0"]
    assert labels(place(policy, "--user", "ann", "--gpus", 0)) == []
    text = run("place", "--config", policy, "--inventory", DEMO, "--user", "eve")
    assert text.exit_code == 0 and "whole A100-40GB" in text.output


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--user", "ann", "--gpus", "2"], Code.FULL_NOT_ALLOWED),
        (["--user", "ann", "--kind", "full"], Code.FULL_NOT_ALLOWED),
        (["--user", "eve", "--gpus", "3"], Code.CONTAINER_CAP),
        (["--user", "ann", "--mig-profile", "4g.20gb"], Code.NO_GPU),
        (["--user", "ann", "--mig-profile", "1g.5gb", "--gpus", "2"], Code.BAD_REQUEST),
    ],
)
def test_cli_place_refuses_with_code_and_sentence(policy: Path, arguments: list[str], code: Code) -> None:
    error = place(policy, *arguments, code=Refusal(code, "").exit_code)["error"]
    assert error["code"] == code.value and error["message"]
    assert all("profile" not in alternative["options"] for alternative in error["alternatives"])
    text = run("place", "--config", policy, "--inventory", DEMO, *arguments)
    assert text.exit_code == Refusal(code, "").exit_code and error["message"] in text.stderr


def test_cli_place_with_what_is_held(policy: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.json"
    held.write_text(
        json.dumps(
            [
                {"name": "a", "user": "bo", "device": "0", "state": "running"},
                {"name": "b", "user": None, "device": "1", "state": "exited", "stopped_s": 10, "gpu_hold_s": 900},
                {"name": "c", "user": "eve", "device": "2.0", "state": "running"},
            ]
        )
    )
    assert labels(place(policy, "--user", "eve", "--held", held)) == ["2.1"]
    refused = place(policy, "--user", "eve", "--kind", "full", "--held", held, code=15)["error"]
    assert (refused["facts"]["leased"], refused["facts"]["external"]) == (1, 1)
    allowed = tmp_path / "held.yaml"
    allowed.write_text("held:\n  - {user: eve, device: [0, 1]}\n")
    assert place(policy, "--user", "eve", "--held", allowed, code=13)["error"]["facts"]["held"] == 2.0


@pytest.mark.parametrize("text", ["- 1", "- {user: a, gpu: 1}", "a: 1", "[", "just text"])
def test_cli_place_with_a_wrong_list_is_a_usage_error(policy: Path, tmp_path: Path, text: str) -> None:
    held = tmp_path / "held.yaml"
    held.write_text(text)
    result = run("place", "--config", policy, "--inventory", DEMO, "--user", "eve", "--held", held)
    assert result.exit_code == 2 and "--held" in result.output + result.stderr


def test_cli_place_with_contradicting_options_is_a_usage_error(policy: Path) -> None:
    result = run(
        "place", "--config", policy, "--inventory", DEMO, "--user", "a", "--kind", "full", "--mig-profile", "1g.5gb"
    )
    assert result.exit_code == 2


def test_cli_place_counts_users_of_the_box_as_strangers(policy: Path, tmp_path: Path) -> None:
    box = tmp_path / "box.yaml"
    box.write_text("gpus: [{model: L40S, processes: [7]}, {model: L40S, external: exporter}, {model: L40S}]")
    assert labels(place(policy, "--user", "eve", inventory=box)) == ["2"]


def test_cli_place_with_a_wrong_policy_is_an_error(policy: Path) -> None:
    (policy / "resource-limits.yaml").write_text("groups: {staff: {max_gpu_equivalent: 1}}")
    assert place(policy, "--user", "eve", code=31)["error"]["code"] == "policy_invalid"


@pytest.mark.parametrize("case", document()["gpus"], ids=lambda case: str(case["id"]))
def test_cli_place_answers_the_vectors(case: dict[str, Any], tmp_path: Path) -> None:
    """The same cases as `test_vectors_gpu`, through files and the command line, as of today."""
    given, expect = case["input"], case["expect"]
    if given["count"] == 0 or any(not isinstance(gpu, list) for gpu in given["box"]) or "day" in given:
        pytest.skip("this form has no command line")
    fixture = yaml.safe_load((VECTORS / "policy.yaml").read_text())["fixture"]
    folder = tmp_path / "policy"
    folder.mkdir()
    keys = {"defaults", "default_group", "groups", "policies"}
    (folder / "resource-limits.yaml").write_text(yaml.safe_dump({k: v for k, v in fixture.items() if k in keys}))
    box, held = tmp_path / "box.yaml", tmp_path / "held.yaml"
    gpus = [{"model": fixture["gpu_model"], **({"mig": profiles} if profiles else {})} for profiles in given["box"]]
    box.write_text(yaml.safe_dump({"gpus": gpus}))
    held.write_text(yaml.safe_dump(given.get("held") or []))
    wanted = [
        "place",
        "--config",
        folder,
        "--inventory",
        box,
        "--held",
        held,
        "--user",
        given["user"],
        "--gpus",
        given["count"],
    ]
    result = run(*wanted, "--json")
    data = json.loads(result.stdout)
    assert (data["error"]["code"] if "error" in data else labels(data)) == expect
