"""The simulated box: what its file may say, what it may not, and that it stays itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds01spawner.errors import InventoryError
from ds01spawner.gpu.inventory import open_inventory
from ds01spawner.gpu.simulated import SimulatedInventory
from ds01spawner.gpu.source import NoInventory
from ds01spawner.model import Inventory

DEMO = Path(__file__).parents[2] / "deploy" / "demo-box.yaml"


def write(path: Path, text: str) -> Path:
    file = path / "box.yaml"
    file.write_text(text)
    return file


def read(path: Path, text: str) -> Inventory:
    with open_inventory(str(write(path, text))) as source:
        return source.read()


def test_the_demo_box_is_what_it_says() -> None:
    with open_inventory(str(DEMO)) as source:
        box = source.read()
        assert source.processes() == () and source.external() == ()
    assert [gpu.mig_enabled for gpu in box.gpus] == [False, False, True, True]
    assert [[unit.mig_profile for unit in gpu.units] for gpu in box.gpus] == [
        [None],
        [None],
        ["1g.5gb"] * 7,
        ["3g.20gb", "2g.10gb", "1g.5gb", "1g.5gb"],
    ]
    assert all(unit.problem is None for unit in box.units)
    assert box.source == "simulated" and box.has_mig
    assert len({unit.uuid for unit in box.units}) == 13


def test_uuids_stay_over_reads_and_differ_between_boxes(tmp_path: Path) -> None:
    text = "gpus: [{model: A100-40GB}, {model: A100-40GB, mig: [1g.5gb, 1g.5gb]}]"
    (tmp_path / "other").mkdir()
    here, again, there = read(tmp_path, text), read(tmp_path, text), read(tmp_path / "other", text)
    assert here == again
    assert not {u.uuid for u in here.units} & {u.uuid for u in there.units}
    assert here.units[1].uuid.startswith("MIG-") and here.units[0].uuid.startswith("GPU-")


def test_an_instance_that_is_cut_anew_is_another_one(tmp_path: Path) -> None:
    before = read(tmp_path, "gpus: [{model: A100-40GB, mig: [3g.20gb, 1g.5gb]}]")
    after = read(tmp_path, "gpus: [{model: A100-40GB, mig: [4g.20gb, 1g.5gb]}]")
    assert before.gpus[0].uuid == after.gpus[0].uuid
    assert before.units[0].uuid != after.units[0].uuid
    assert before.fingerprint != after.fingerprint


def test_everything_that_a_file_may_say(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
driver: "580.95.05"
gpus:
  - {model: L40S, uuid: GPU-mine, processes: [4711, {pid: 12, memory_mib: 3}], external: exporter}
  - {model: H100-80GB, problem: "lost: simulated"}
  - {model: My Card, memory_mib: 1024}
  - model: H100-80GB
    mig:
      - {profile: 1g.20gb, start: 4, problem: "ecc: simulated"}
      - {profile: 1g.10gb, start: 6, uuid: MIG-mine, external: other, processes: [7]}
nvlinks: [[0, 1, 2]]
""",
    )
    with open_inventory(str(file)) as source:
        box, processes, external = source.read(), source.processes(), source.external()
    assert box.driver == "580.95.05"
    assert [gpu.problem for gpu in box.gpus] == [None, "lost: simulated", None, None]
    assert [unit.problem for unit in box.units] == [None, "lost: simulated", None, "ecc: simulated", None]
    assert [(unit.start, unit.memory_slices) for unit in box.gpus[3].units] == [(4, 2), (6, 1)]
    assert [(p.unit_uuid, p.pid, p.memory_bytes) for p in processes] == [
        ("GPU-mine", 4711, None),
        ("GPU-mine", 12, 3 * 1024**2),
        ("MIG-mine", 7, None),
    ]
    assert [(e.unit_uuid, e.holder) for e in external] == [("GPU-mine", "exporter"), ("MIG-mine", "other")]
    assert box.gpus[0].links[box.gpus[1].uuid] == 220 and box.gpus[2].links["GPU-mine"] == 20
    assert box.gpus[2].memory_bytes == 1024**3 and box.gpus[2].compute_capability is None


def test_users_of_a_cut_gpu_count_for_each_of_its_instances(tmp_path: Path) -> None:
    file = write(tmp_path, "gpus: [{model: A100-40GB, external: all of it, mig: [1g.5gb, 1g.5gb]}]")
    with open_inventory(str(file)) as source:
        assert {e.unit_uuid for e in source.external()} == {unit.uuid for unit in source.read().units}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("gpus:\n  - {model: A100-40GB}\n  - {model: A101}\n", 3, "unknown model 'A101'; known: A100-40GB"),
        (
            "gpus:\n  - model: A100-40GB\n    mig: [3g.20gb,\n      1g.7gb]\n",
            4,
            "no MIG profile '1g.7gb'; it has: 1g.5gb",
        ),
        ("gpus:\n  - {model: A100-40GB, mig: [4g.20gb, 4g.20gb]}\n", 2, "do not fit together"),
        ("gpus:\n  - {model: L40S, mig: [1g.5gb]}\n", 2, "no MIG at all"),
        ("gpus:\n  - {model: L40S, migs: []}\n", 2, "no key 'migs'"),
        ("gpu: []\n", 1, "no key 'gpu'"),
        ("{}\n", 1, "'gpus' must be a list"),
        ("", 0, "must be a mapping"),
        ("gpus:\n  - A100-40GB\n", 2, "a GPU must be a mapping"),
        ("gpus:\n  - {mig: []}\n", 2, "needs a model"),
        ("gpus:\n  - {model: A100-40GB, mig: [{profile: 3g.20gb, start: 2}]}\n", 2, "cannot start at memory slice 2"),
        ("gpus:\n  - {model: A100-40GB, mig: [{profile: 3g.20gb, start: 0}, 1g.5gb]}\n", 2, "to every MIG instance"),
        (
            "gpus:\n  - model: A100-40GB\n    mig:\n"
            "      - {profile: 3g.20gb, start: 0}\n      - {profile: 1g.5gb, start: 3}\n",
            5,
            "overlaps",
        ),
        ("gpus:\n  - {model: L40S, uuid: GPU-a}\n  - {model: L40S, uuid: GPU-a}\n", 0, "two units have the uuid GPU-a"),
        ("gpus: [{model: L40S}]\nnvlinks: [[0, 1, 4]]\n", 2, "must join two of the GPUs 0..0"),
        ("gpus: [{model: L40S, processes: [init]}]\n", 1, "a process is a pid"),
        ("gpus: [{model: X, memory_mib: -1}]\n", 1, "positive number of MiB"),
        ("gpus: [{model: L40S, model: L4}]\n", 1, "twice"),
        ("gpus: [", 0, "no valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(InventoryError) as caught:
        read(tmp_path, text)
    assert words in caught.value.message
    assert (f"box.yaml:{line}:" in caught.value.message) == bool(line)


def test_an_edit_shows_at_the_next_read_and_a_wrong_one_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, "gpus: [{model: L40S}]")
    source = SimulatedInventory(file)
    assert len(source.read().gpus) == 1
    file.write_text("gpus: [{model: L40S}, {model: L40S}]")
    assert len(source.read().gpus) == 2
    file.write_text("gpus: [{model: L40")
    with pytest.raises(InventoryError):
        source.read()
    file.write_text("gpus: [{model: L40S}]")
    os.utime(file, ns=(1, 1))
    assert len(source.read().gpus) == 1
    file.unlink()
    with pytest.raises(InventoryError, match="cannot be read"):
        source.read()


def test_settings_of_the_inventory(tmp_path: Path) -> None:
    source = open_inventory("none")
    assert isinstance(source, NoInventory)
    assert source.read().gpus == () and source.processes() == ()
    with pytest.raises(InventoryError, match="neither auto, nvml, none nor a file"):
        open_inventory(str(tmp_path / "missing.yaml"))
