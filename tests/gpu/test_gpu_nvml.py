"""The NVML inventory through real pynvml, against the stub library of tests/nvml_stub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.nvml_stub.topology import A30, A100, H100, L40S, Model, Topology, gpu_uuid

ReadNvml = Callable[..., list[dict[str, Any]]]
"""Type of the `read_nvml` fixture."""

MIB = 1024**2
LOST, RESET_REQUIRED, MISMATCH, NOT_LOADED, UNKNOWN = 15, 16, 18, 9, 999
NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND = 3, 4, 13


def gpus(answer: dict[str, Any]) -> list[dict[str, Any]]:
    assert "inventory" in answer, answer
    found: list[dict[str, Any]] = answer["inventory"]["gpus"]
    return found


def units(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {unit["uuid"]: unit for gpu in gpus(answer) for unit in gpu["units"]}


def shares(answer: dict[str, Any]) -> list[float]:
    return [
        1.0
        if unit["mig_profile"] is None
        else max(unit["compute_slices"] / unit["gpu_compute_slices"], unit["memory_slices"] / unit["gpu_memory_slices"])
        for unit in units(answer).values()
    ]


def mixed_a100() -> tuple[Topology, list[str]]:
    """One A100-40GB whose MIG index has holes at 1, 3, 4 and 6."""
    box = Topology()
    gpu = box.gpu(A100, "00000000:3B:00.0", mig=True)
    uuids = [box.mig(gpu, 0, "3g.20gb", 4), box.mig(gpu, 2, "1g.5gb", 0), box.mig(gpu, 5, "1g.10gb", 2)]
    return box, uuids


# --------------------------------------------------------------------------- identity and geometry


def test_mig_instances_are_found_over_holes_in_the_index(read_nvml: ReadNvml) -> None:
    box, uuids = mixed_a100()
    [answer] = read_nvml(box)
    found = units(answer)
    assert list(found) == uuids
    assert [unit["mig_index"] for unit in found.values()] == [0, 2, 5]
    assert [unit["mig_profile"] for unit in found.values()] == ["3g.20gb", "1g.5gb", "1g.10gb"]
    assert [unit["start"] for unit in found.values()] == [4, 0, 2]
    assert [(u["compute_slices"], u["memory_slices"]) for u in found.values()] == [(3, 4), (1, 1), (1, 2)]
    assert [unit["memory_bytes"] // MIB for unit in found.values()] == [19968, 4864, 9856]
    assert shares(answer) == pytest.approx([0.5, 1 / 7, 0.25])
    assert answer["has_mig"] is True
    [gpu] = gpus(answer)
    assert (gpu["uuid"], gpu["mig_enabled"], gpu["problem"]) == (gpu_uuid("00000000:3B:00.0"), True, None)
    assert (gpu["compute_slices"], gpu["memory_slices"], gpu["compute_capability"]) == (7, 8, [8, 0])
    assert answer["inventory"]["driver"] == "580.95.05"


def test_the_same_mig_name_has_other_slices_on_an_h100(read_nvml: ReadNvml) -> None:
    box = Topology()
    whole = box.gpu(H100, "00000000:18:00.0")
    cut = box.gpu(H100, "00000000:2A:00.0", mig=True)
    small, wide = box.mig(cut, 0, "1g.10gb", 6), box.mig(cut, 1, "1g.20gb", 0)
    [answer] = read_nvml(box)
    found = units(answer)
    assert whole == 0 and found[gpu_uuid("00000000:18:00.0")]["mig_profile"] is None
    assert (found[small]["compute_slices"], found[small]["memory_slices"]) == (1, 1)
    assert (found[wide]["compute_slices"], found[wide]["memory_slices"]) == (1, 2)
    assert shares(answer) == pytest.approx([1.0, 1 / 7, 0.25])


def test_totals_of_an_a30_are_its_own(read_nvml: ReadNvml) -> None:
    box = Topology()
    gpu = box.gpu(A30, "00000000:81:00.0", mig=True)
    box.add(
        f"profile {gpu} 0 14 1 5888 1 0,1,2,3 1g.6gb",
        f"profile {gpu} 1 5 2 11968 2 0,2 2g.12gb",
        f"profile {gpu} 3 0 4 24000 4 0 4g.24gb",
        f"mig {gpu} 0 MIG-a 3 0 14 1 1 5888 0 1 NVIDIA A30 MIG 1g.6gb",
        f"mig {gpu} 1 MIG-b 1 0 5 2 2 11968 2 2 NVIDIA A30 MIG 2g.12gb",
    )
    [answer] = read_nvml(box)
    assert (gpus(answer)[0]["compute_slices"], gpus(answer)[0]["memory_slices"]) == (4, 4)
    assert shares(answer) == pytest.approx([0.25, 0.5])


@pytest.mark.parametrize("model", [A100, H100, A30])
def test_without_privileges_geometry_comes_from_the_model(read_nvml: ReadNvml, model: Model) -> None:
    name, compute, memory = ("1g.6gb", 4, 4) if model is A30 else (model.profiles[0][0], 7, 8)
    box = Topology()
    gpu = box.gpu(model, "00000000:81:00.0", mig=True)
    size = 5888 if model is A30 else model.profiles[0][1]
    box.add(
        f"mig {gpu} 0 MIG-a 3 0 19 1 1 {size} 0 1 {model.name} MIG {name}",
        f"error {gpu} nvmlDeviceGetGpuInstancePossiblePlacements_v2 {NO_PERMISSION}",
        f"error {gpu} nvmlDeviceGetGpuInstanceById {NO_PERMISSION}",
    )
    [answer] = read_nvml(box)
    unit = units(answer)["MIG-a"]
    assert (unit["gpu_compute_slices"], unit["gpu_memory_slices"]) == (compute, memory)
    assert (unit["mig_profile"], unit["memory_slices"], unit["start"], unit["problem"]) == (name, 1, None, None)


def test_an_unknown_model_is_measured_by_nvml(read_nvml: ReadNvml) -> None:
    model = Model("NVIDIA Future X1", 40960, "11.0", A100.profiles)
    box = Topology()
    gpu = box.gpu(model, "00000000:81:00.0", mig=True)
    box.mig(gpu, 0, "1g.10gb", 2)
    box.add(f"error {gpu}.0 nvmlDeviceGetName {NOT_SUPPORTED}")
    blind = Topology(list(box.lines), list(box.models))
    blind.add(
        f"error {gpu} nvmlDeviceGetGpuInstancePossiblePlacements_v2 {NO_PERMISSION}",
        f"error {gpu} nvmlDeviceGetGpuInstanceById {NO_PERMISSION}",
    )
    for answer in (read_nvml(box)[0], read_nvml(blind)[0]):
        [unit] = units(answer).values()
        assert (unit["mig_profile"], unit["compute_slices"], unit["memory_slices"]) == ("1g.10gb", 1, 2)
        assert (unit["gpu_compute_slices"], unit["gpu_memory_slices"]) == (7, 8)


def test_compute_instances_of_one_gpu_instance_are_units_of_their_own(read_nvml: ReadNvml) -> None:
    box = Topology()
    gpu = box.gpu(A100, "00000000:3B:00.0", mig=True)
    one = box.mig(gpu, 0, "3g.20gb", 4, ci=0, ci_slices=1)
    other = box.mig(gpu, 1, "3g.20gb", 4, ci=1, ci_slices=2)
    [answer] = read_nvml(box)
    found = units(answer)
    assert (found[one]["mig_profile"], found[other]["mig_profile"]) == ("1c.3g.20gb", "2c.3g.20gb")
    assert (found[one]["gi_id"], found[one]["ci_id"], found[other]["ci_id"]) == (5, 0, 1)


def test_gpus_are_ordered_by_pci_number_not_by_text(read_nvml: ReadNvml) -> None:
    buses = [f"{n:08X}:{bus}:00.0" for n, bus in ((0, "A1"), (0, "0A"), (0, "10"), (0, "9"), (1, "01"), (0, "f0"))]
    buses += [f"00000000:{n:02X}:00.0" for n in (0x20, 0x21, 0x22, 0x23, 0x24)]
    box = Topology()
    for bus in buses:
        box.gpu(L40S, bus)
    [answer] = read_nvml(box)
    order = [gpu["pci_bus_id"] for gpu in gpus(answer)]
    expected = ["9", "0A", "10", "20", "21", "22", "23", "24", "A1", "F0", "01"]
    assert [bus.split(":")[1] for bus in order] == expected
    assert [gpu["index"] for gpu in gpus(answer)] == list(range(11))
    assert [unit["gpu_index"] for unit in units(answer).values()] == list(range(11))
    assert gpus(answer)[0]["minor"] == 3, "the device node keeps NVML's own number"


def test_mig_mode_without_instances_is_a_gpu_without_units(read_nvml: ReadNvml) -> None:
    box = Topology()
    box.gpu(A100, "00000000:3B:00.0", mig=True)
    box.gpu(A100, "00000000:5E:00.0")
    [answer] = read_nvml(box)
    assert [(gpu["mig_enabled"], len(gpu["units"])) for gpu in gpus(answer)] == [(True, 0), (False, 1)]
    assert answer["has_mig"] is False


# --------------------------------------------------------------------------- failures


@pytest.mark.parametrize("code", [LOST, UNKNOWN, RESET_REQUIRED])
def test_failure_of_one_gpu_does_not_hide_the_others(read_nvml: ReadNvml, code: int) -> None:
    box = Topology()
    for bus in ("00000000:01:00.0", "00000000:02:00.0", "00000000:03:00.0"):
        box.gpu(L40S, bus)
    broken = Topology(list(box.lines), list(box.models)).add(f"error 1 * {code}")
    healthy, lost, again, back = read_nvml(box, broken, broken, box)
    assert [gpu["problem"] for gpu in gpus(healthy)] == [None] * 3
    for answer in (lost, again):
        assert [gpu["index"] for gpu in gpus(answer)] == [0, 1, 2]
        assert [bool(gpu["problem"]) for gpu in gpus(answer)] == [False, True, False]
        problem = units(answer)[gpu_uuid("00000000:02:00.0")]["problem"]
        assert problem.startswith("reset:" if code == RESET_REQUIRED else "lost:")
        assert answer["fingerprint"] == healthy["fingerprint"], "health is no identity"
    assert units(back) == units(healthy), "handles are opened anew after an error"


def test_failure_before_a_gpu_was_ever_seen_still_shows_it(read_nvml: ReadNvml) -> None:
    box = Topology()
    for bus in ("00000000:01:00.0", "00000000:02:00.0"):
        box.gpu(L40S, bus)
    box.add(f"error 0 nvmlDeviceGetHandleByIndex_v2 {LOST}")
    [answer] = read_nvml(box)
    assert [(gpu["model"], bool(gpu["problem"]), len(gpu["units"])) for gpu in gpus(answer)] == [
        ("NVIDIA L40S", False, 1),
        ("unknown", True, 0),
    ]


def test_failure_that_removes_a_gpu_from_the_list_keeps_its_units_as_lost(read_nvml: ReadNvml) -> None:
    box, uuids = mixed_a100()
    box.gpu(L40S, "00000000:5E:00.0")
    rest = Topology()
    rest.gpu(L40S, "00000000:5E:00.0")
    before, after = read_nvml(box, rest)
    assert list(units(after)) == list(units(before))
    assert {units(after)[uuid]["problem"] for uuid in uuids} == {"lost: the driver no longer lists the GPU"}
    assert units(after)[gpu_uuid("00000000:5E:00.0")]["problem"] is None
    assert after["processes"] == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rows 0 0 1", "ecc: remapping a memory row failed"),
        ("rows 0 1 0", "ecc: a memory row waits to be remapped"),
        ("ecc 0 3", "ecc: 3 uncorrected memory errors"),
    ],
)
def test_failure_ecc_quarantines_every_unit_of_the_gpu(read_nvml: ReadNvml, line: str, expected: str) -> None:
    box, uuids = mixed_a100()
    box.gpu(A100, "00000000:5E:00.0")
    [answer] = read_nvml(box.add(line))
    assert all(units(answer)[uuid]["problem"].startswith(expected) for uuid in uuids)
    assert gpus(answer)[0]["problem"].startswith(expected)
    assert gpus(answer)[1]["problem"] is None


def test_failure_ecc_of_one_instance_quarantines_that_instance(read_nvml: ReadNvml) -> None:
    box, uuids = mixed_a100()
    [answer] = read_nvml(box.add("sram 0 2 1"))
    assert [bool(units(answer)[uuid]["problem"]) for uuid in uuids] == [False, True, False]


def test_a_gpu_without_ecc_or_mig_or_processes_is_healthy(read_nvml: ReadNvml) -> None:
    box = Topology()
    box.gpu(L40S, "00000000:01:00.0")
    for function in (
        "nvmlDeviceGetRemappedRows",
        "nvmlDeviceGetTotalEccErrors",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetGraphicsRunningProcesses_v3",
        "nvmlDeviceGetMinorNumber",
    ):
        box.add(f"error 0 {function} {NOT_SUPPORTED}")
    [answer] = read_nvml(box)
    assert [unit["problem"] for unit in units(answer).values()] == [None]


def test_a_mig_mode_that_waits_for_a_reset_is_a_problem(read_nvml: ReadNvml) -> None:
    box = Topology()
    box.gpu(A100, "00000000:01:00.0", mig=False, pending=True)
    [answer] = read_nvml(box)
    assert gpus(answer)[0]["problem"] == "mig: mode on waits for a reset of the GPU"


@pytest.mark.parametrize(
    "line", [f"init {MISMATCH}", f"init {NOT_LOADED}", f"error -1 nvmlDeviceGetCount_v2 {UNKNOWN}"]
)
@pytest.mark.parametrize("setting", ["auto", "nvml"])
def test_failure_of_the_library_is_an_error_and_never_no_gpus(read_nvml: ReadNvml, line: str, setting: str) -> None:
    box, _ = mixed_a100()
    [answer] = read_nvml(box.add(line), setting=setting)
    assert "NVML does not work" in answer["error"]
    assert answer["facts"]["nvml_error"] in (MISMATCH, NOT_LOADED, UNKNOWN)


def test_failure_of_the_library_in_between_heals_with_it(read_nvml: ReadNvml) -> None:
    box, uuids = mixed_a100()
    broken = Topology(list(box.lines), list(box.models)).add(f"error -1 nvmlDeviceGetCount_v2 {UNKNOWN}")
    before, between, after = read_nvml(box, broken, box)
    assert "error" in between
    assert list(units(after)) == uuids == list(units(before))


def test_auto_without_the_library_is_a_box_without_gpus(read_nvml: ReadNvml) -> None:
    [answer] = read_nvml(Topology(), setting="auto", library=None)
    assert answer["inventory"] == {"gpus": [], "source": "none", "driver": None}


def test_auto_with_the_library_but_no_gpu_is_a_box_without_gpus(read_nvml: ReadNvml) -> None:
    [answer] = read_nvml(Topology(), setting="auto")
    assert answer["inventory"]["source"] == "none"


def test_nvml_without_the_library_is_an_error(read_nvml: ReadNvml) -> None:
    [answer] = read_nvml(Topology(), setting="nvml", library=None)
    assert "libnvidia-ml.so.1 is missing" in answer["error"]


def test_auto_with_gpus_is_nvml(read_nvml: ReadNvml) -> None:
    box, uuids = mixed_a100()
    [answer] = read_nvml(box, setting="auto")
    assert answer["inventory"]["source"] == "nvml" and list(units(answer)) == uuids


# --------------------------------------------------------------------------- what changes


def test_an_instance_that_ends_is_seen_at_once_and_a_new_one_within_a_minute(read_nvml: ReadNvml) -> None:
    full, uuids = mixed_a100()
    less = Topology()
    gpu = less.gpu(A100, "00000000:3B:00.0", mig=True)
    kept = less.mig(gpu, 0, "3g.20gb", 4)
    answers = read_nvml(full, less, *[full] * 7)
    assert list(units(answers[0])) == uuids
    assert list(units(answers[1])) == [kept]
    assert list(units(answers[-1])) == uuids
    assert answers[0]["fingerprint"] != answers[1]["fingerprint"]


def test_a_reused_handle_is_not_taken_for_the_old_instance(read_nvml: ReadNvml) -> None:
    before, _ = mixed_a100()
    after = Topology([line.replace("MIG-00000000", "MIG-11111111") for line in before.lines], before.models)
    old, new = read_nvml(before, after)
    assert not units(old).keys() & units(new).keys()
    assert len(units(new)) == 3


def test_a_gpu_that_takes_the_place_of_another_is_read_anew(read_nvml: ReadNvml) -> None:
    before, after = Topology(), Topology()
    before.gpu(A100, "00000000:3B:00.0")
    after.gpu(H100, "00000000:3B:00.0")
    after.lines = [line.replace(gpu_uuid("00000000:3B:00.0"), "GPU-new") for line in after.lines]
    old, new = read_nvml(before, after)
    assert [gpu["model"] for gpu in gpus(old)] == ["NVIDIA A100-SXM4-40GB"]
    assert [(gpu["uuid"], gpu["model"]) for gpu in gpus(new)] == [("GPU-new", "NVIDIA H100 80GB HBM3")]


def test_switching_mig_on_changes_the_units(read_nvml: ReadNvml) -> None:
    whole, (cut, uuids) = Topology(), mixed_a100()
    whole.gpu(A100, "00000000:3B:00.0")
    before, after = read_nvml(whole, cut)
    assert list(units(before)) == [gpu_uuid("00000000:3B:00.0")]
    assert list(units(after)) == uuids


# --------------------------------------------------------------------------- processes and links


def test_processes_belong_to_their_unit(read_nvml: ReadNvml) -> None:
    box, uuids = mixed_a100()
    box.gpu(L40S, "00000000:5E:00.0")
    box.add("process 0 2 4711 300 c", "process 1 -1 11 10 g", "process 1 -1 12 20 c", "process 1 -1 11 5 c")
    [answer] = read_nvml(box)
    whole = gpu_uuid("00000000:5E:00.0")
    assert answer["processes"] == [[uuids[1], 4711, 300 * MIB], [whole, 11, 5 * MIB], [whole, 12, 20 * MIB]]


def test_an_older_driver_tells_processes_by_the_older_call(read_nvml: ReadNvml) -> None:
    box = Topology()
    box.gpu(L40S, "00000000:5E:00.0")
    box.add(
        "process 0 -1 12 20 c",
        f"error 0 nvmlDeviceGetComputeRunningProcesses_v3 {FUNCTION_NOT_FOUND}",
        f"error 0 nvmlDeviceGetGraphicsRunningProcesses_v3 {FUNCTION_NOT_FOUND}",
    )
    [answer] = read_nvml(box)
    assert [pid for _, pid, _ in answer["processes"]] == [12]


def test_failure_to_list_processes_makes_the_unit_unusable(read_nvml: ReadNvml) -> None:
    box, uuids = mixed_a100()
    [answer] = read_nvml(box.add(f"error 0.2 nvmlDeviceGetComputeRunningProcesses_v3 {NO_PERMISSION}"))
    assert [bool(units(answer)[uuid]["problem"]) for uuid in uuids] == [False, True, False]
    assert units(answer)[uuids[1]]["problem"].startswith("blind:")


def test_links_are_scored_by_ancestor_and_nvlinks(read_nvml: ReadNvml) -> None:
    box = Topology()
    for bus in ("01", "02", "03"):
        box.gpu(L40S, f"00000000:{bus}:00.0")
    box.add("topo 0 1 10", "topo 0 2 50", "topo 1 2 40", "nvlink 0 1 4")
    [answer] = read_nvml(box)
    one, two, three = (gpu["uuid"] for gpu in gpus(answer))
    links = {gpu["uuid"]: gpu["links"] for gpu in gpus(answer)}
    assert links == {one: {two: 450, three: 10}, two: {one: 450, three: 20}, three: {one: 10, two: 20}}


def test_links_over_a_switch_join_every_two_gpus(read_nvml: ReadNvml) -> None:
    box = Topology()
    for bus in ("01", "02", "03"):
        box.gpu(L40S, f"00000000:{bus}:00.0")
    box.add("topo 0 1 50", "topo 0 2 50", "topo 1 2 50", "nvlink 0 -1 12", "nvlink 1 -1 12")
    [answer] = read_nvml(box)
    _, two, three = (gpu["uuid"] for gpu in gpus(answer))
    assert gpus(answer)[0]["links"] == {two: 1210, three: 10}


def test_links_that_cannot_be_told_count_nothing(read_nvml: ReadNvml) -> None:
    box = Topology()
    for bus in ("01", "02"):
        box.gpu(L40S, f"00000000:{bus}:00.0")
    box.add(
        f"error 0 nvmlDeviceGetTopologyCommonAncestor {UNKNOWN}", f"error 0 nvmlDeviceGetNvLinkState {NOT_SUPPORTED}"
    )
    [answer] = read_nvml(box)
    assert [list(gpu["links"].values()) for gpu in gpus(answer)] == [[0], [0]]
    assert [gpu["problem"] for gpu in gpus(answer)] == [None, None]
