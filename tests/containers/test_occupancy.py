"""Who outside holds which GPU: every way of asking for one, whose container it is, and what state it is in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ds01spawner.containers import aime, occupancy
from ds01spawner.containers.facts import ContainerFacts, DeviceNode, DeviceRequest, MountPoint, container_facts
from ds01spawner.containers.occupancy import LocatedProcess, external
from ds01spawner.model import External, Gpu, Inventory, Unit

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=timezone.utc)
INSTANCE = "3d6f0f4e"
G0, G1 = "GPU-aaaaaaaa-0000-4000-8000-000000000000", "GPU-bbbbbbbb-0000-4000-8000-000000000001"
G2 = "GPU-cccccccc-0000-4000-8000-000000000002"
M0, M1 = "MIG-d0d0d0d0-0000-5000-8000-000000000000", "MIG-d1d1d1d1-0000-5000-8000-000000000001"
ALL = {G0, G1, M0, M1}


def whole(uuid: str, index: int) -> Gpu:
    unit = Unit(uuid, uuid, index, "A100", 40 * 2**30)
    return Gpu(uuid, index, f"00000000:{index + 0x3A:02X}:00.0", "A100", 40 * 2**30, False, (unit,), minor=index + 3)


def cut(uuid: str, index: int, instances: tuple[str, ...]) -> Gpu:
    units = tuple(
        Unit(m, uuid, index, "A100", 5 * 2**30, 1, 1, 7, 8, place, "1g.5gb", place, gi_id=place + 7, ci_id=0)
        for place, m in enumerate(instances)
    )
    return Gpu(uuid, index, f"00000000:{index + 0x3A:02X}:00.0", "A100", 40 * 2**30, True, units, 7, 8, minor=index + 3)


BOX = Inventory((whole(G0, 0), whole(G1, 1), cut(G2, 2, (M0, M1))), "nvml", "570")


@dataclass(frozen=True)
class Rule:
    name: str
    image: str


def foreign(**changes: object) -> ContainerFacts:
    values: dict[str, object] = {
        "id": "f" * 64,
        "name": "theirs",
        "image_ref": "site/tool:1",
        "state": "running",
        "running": True,
        "runtime": "runc",
    }
    return ContainerFacts(**{**values, **changes})  # type: ignore[arg-type]


def ours(token: int, instance: str = INSTANCE, **changes: object) -> ContainerFacts:
    labels = {"ds01.managed": "true", "ds01.interface": "hub", "ds01.instance": instance, "ds01.token": str(token)}
    return foreign(**{"id": "0" * 64, "name": "main._.70000", "labels": labels, **changes})


def look(
    *facts: ContainerFacts,
    processes: tuple[LocatedProcess, ...] = (),
    live: dict[int, tuple[str, ...]] | None = None,
    rules: tuple[Rule, ...] = (),
    box: Inventory = BOX,
    now: datetime | None = NOW,
) -> tuple[External, ...]:
    return external(facts, box, processes, instance=INSTANCE, live=live or {}, rules=rules, now=now)


def held(*facts: ContainerFacts, **rest: object) -> set[str]:
    return {e.unit_uuid for e in look(*facts, **rest)}  # type: ignore[arg-type]


def asks(*ids: str, count: int = 0, driver: str = "") -> tuple[DeviceRequest, ...]:
    return (DeviceRequest(driver, count, ids, frozenset({"gpu"})),)


# --------------------------------------------------------------------------- device requests

DEVICE_IDS = [
    (("0",), {G0}),
    (("1", "0"), {G0, G1}),
    (("0,1",), {G0, G1}),
    ((" 1 ",), {G1}),
    (("2",), {M0, M1}),
    (("2:0",), {M0}),
    (("2.1",), {M1}),
    (("2:5",), {M0, M1}),
    (("0:3",), {G0}),
    (("7",), ALL),
    (("7:0",), ALL),
    ((G0,), {G0}),
    ((G0.lower(),), {G0}),
    ((G0[:10],), {G0}),
    ((G2,), {M0, M1}),
    ((M1,), {M1}),
    ((f"MIG-{G2}/7/0",), {M0}),
    ((f"MIG-{G2}/9/0",), {M0, M1}),
    (("MIG-GPU-nothing/1/0",), ALL),
    (("MIG-eeeeeeee-0000-5000-8000-00000000000e",), {M0, M1}),
    (("GPU-eeeeeeee-0000-4000-8000-00000000000e",), set()),
    (("GPU-",), ALL),
    (("GPU-zzz",), ALL),
    (("MIG-",), ALL),
    (("00000000:3B:00.0",), {G1}),
    (("3b:00.0",), {G1}),
    (("ff:00.0",), ALL),
    (("all",), ALL),
    (("ALL",), ALL),
    (("none",), set()),
    (("void",), set()),
    (("",), set()),
    (("-1",), ALL),
    (("0-1",), ALL),
    (("gpu0",), ALL),
    (("0x0",), ALL),
    (("nvidia.com/gpu=0",), {G0}),
    (("99999999999",), ALL),
]


@pytest.mark.parametrize(("ids", "units"), DEVICE_IDS)
@pytest.mark.parametrize("driver", ["", "nvidia"])
def test_device_ids(ids: tuple[str, ...], units: set[str], driver: str) -> None:
    assert held(foreign(device_requests=asks(*ids, driver=driver))) == units


CDI = [
    ("nvidia.com/gpu=all", ALL),
    ("nvidia.com/gpu=0", {G0}),
    ("nvidia.com/gpu=2:1", {M1}),
    (f"nvidia.com/gpu={G1}", {G1}),
    (f"nvidia.com/gpu={M0}", {M0}),
    (f"nvidia.com/gpu={G2}", {M0, M1}),
    ("nvidia.com/gpu=odd", ALL),
    ("management.nvidia.com/gpu=all", ALL),
    ("runtime.nvidia.com/gpu=1", {G1}),
    ("nvidia.com/gds=all", set()),
    ("nvidia.com/imex-channel=0", set()),
    ("nvidia.com/new-thing=all", ALL),
    ("amd.com/gpu=all", set()),
    ("site.example/gpu=all", ALL),
    ("notnvidia.com/gpu=0", ALL),
    ("nvidia.com/gpu", ALL),
    ("", ALL),
]


@pytest.mark.parametrize(("name", "units"), CDI)
def test_b3_cdi_names_do_not_look_free(name: str, units: set[str]) -> None:
    assert held(foreign(device_requests=asks(name, driver="cdi"))) == units


@pytest.mark.parametrize("count", [-1, -7])
def test_b3_gpus_all_of_an_unmanaged_container_blocks_every_unit(count: int) -> None:
    found = look(foreign(device_requests=asks(count=count)))
    assert {e.unit_uuid for e in found} == ALL
    assert all(e.kind == "container" and e.holder == "theirs" and "--gpus all" in e.why for e in found)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_b3_a_count_cannot_be_located_and_blocks_every_unit(count: int) -> None:
    found = look(foreign(device_requests=asks(count=count)))
    assert {e.unit_uuid for e in found} == ALL
    assert f"--gpus {count}" in found[0].why


def test_b3_an_unmanaged_container_with_one_gpu_holds_that_one() -> None:
    assert held(foreign(device_requests=asks(G1))) == {G1}


def test_b4_the_parent_of_mig_instances_blocks_all_of_them() -> None:
    assert held(foreign(device_requests=asks(G2))) == {M0, M1}
    assert held(foreign(device_requests=asks("2"))) == {M0, M1}


def test_b4_one_instance_leaves_its_sisters_free() -> None:
    assert held(foreign(device_requests=asks(M0))) == {M0}


def test_b9_a_container_of_several_gpus_without_device_requests_is_seen() -> None:
    """The lab's tools start those with the nvidia runtime and a variable."""
    container = foreign(runtime="nvidia", env={"NVIDIA_VISIBLE_DEVICES": f"{G0},{M1}"})
    assert held(container) == {G0, M1}


def test_several_requests_add_up() -> None:
    requests = asks(G0) + asks("nvidia.com/gpu=1", driver="cdi")
    assert held(foreign(device_requests=requests)) == {G0, G1}


@pytest.mark.parametrize(("driver", "units"), [("amd", set()), ("tpu", ALL), ("NVIDIA", ALL)])
def test_other_drivers(driver: str, units: set[str]) -> None:
    assert held(foreign(device_requests=asks("0", driver=driver))) == units


# --------------------------------------------------------------------------- environment

VALUES = [
    ("all", ALL),
    ("none", set()),
    ("void", set()),
    ("", set()),
    ("0", {G0}),
    ("0,2:1", {G0, M1}),
    (G1, {G1}),
    ("nvidia.com/gpu=1", {G1}),
    ("odd", ALL),
]


@pytest.mark.parametrize(("value", "units"), VALUES)
@pytest.mark.parametrize("runtime", ["nvidia", "nvidia-cdi", "runsc", "site-runtime"])
def test_variable_under_a_runtime_that_may_read_it(value: str, units: set[str], runtime: str) -> None:
    assert held(foreign(runtime=runtime, env={"NVIDIA_VISIBLE_DEVICES": value})) == units


@pytest.mark.parametrize("runtime", ["runc", "crun", "io.containerd.runc.v2", "kata-runtime"])
def test_variable_under_a_plain_runtime_means_nothing(runtime: str) -> None:
    assert held(foreign(runtime=runtime, env={"NVIDIA_VISIBLE_DEVICES": "all"})) == set()


def test_the_default_runtime_counts_where_a_container_names_none() -> None:
    facts = (foreign(runtime="", env={"NVIDIA_VISIBLE_DEVICES": "1"}),)
    found = external(facts, BOX, (), instance=INSTANCE, live={}, default_runtime="nvidia")
    assert {e.unit_uuid for e in found} == {G1}
    assert external(facts, BOX, (), instance=INSTANCE, live={}) == ()


@pytest.mark.parametrize(
    ("env", "units"),
    [
        ({"CUDA_VERSION": "8.0"}, ALL),
        ({"CUDA_VERSION": "11", "NVIDIA_REQUIRE_CUDA": "cuda>=11"}, set()),
        ({"CUDA_VERSION": "8.0", "NVIDIA_VISIBLE_DEVICES": "void"}, set()),
        ({}, set()),
    ],
)
def test_trap_an_old_cuda_image_asks_for_all_by_asking_for_nothing(env: dict[str, str], units: set[str]) -> None:
    assert held(foreign(runtime="nvidia", env=env)) == units


def test_a_request_without_devices_reads_the_images_variable() -> None:
    assert held(foreign(device_requests=asks(), env={"NVIDIA_VISIBLE_DEVICES": "1"})) == {G1}


def test_docker_overrides_the_images_variable_for_a_request_with_devices() -> None:
    container = foreign(runtime="nvidia", env={"NVIDIA_VISIBLE_DEVICES": "all"}, device_requests=asks(G0))
    assert held(container) == {G0}


# --------------------------------------------------------------------------- nodes, rules, mounts, privileged

NODES = [
    (("/dev/nvidia3",), {G0}),
    (("/dev/nvidia4", "/dev/nvidiactl", "/dev/nvidia-uvm"), {G1}),
    (("/dev/nvidia5",), {M0, M1}),
    (("/dev/nvidia99",), ALL),
    (("/dev/char/195:3",), {G0}),
    (("/dev/char/195:255",), ALL),
    (("/dev/nvidiactl",), ALL),
    (("/dev/nvidia-uvm-tools",), ALL),
    (("/dev/nvidia-caps/nvidia-cap12",), {M0, M1}),
    (("/dev/nvidia-caps",), {M0, M1}),
    (("/dev/nvidia-nvswitch0",), ALL),
    (("/dev",), ALL),
    (("/dev/",), ALL),
    (("/dev/../dev",), ALL),
    (("/",), ALL),
    (("/mnt/hostdev/nvidia3",), {G0}),
    (("/dev/dri",), set()),
    (("/dev/kfd",), set()),
    (("/dev/snd", "/dev/video0"), set()),
]


@pytest.mark.parametrize(("paths", "units"), NODES)
def test_device_nodes(paths: tuple[str, ...], units: set[str]) -> None:
    assert held(foreign(devices=tuple(DeviceNode(path, path) for path in paths))) == units


def test_a_node_of_an_unknown_minor_number_may_be_any_gpu() -> None:
    unknown = replace(BOX, gpus=tuple(replace(gpu, minor=None) for gpu in BOX.gpus))
    assert held(foreign(devices=(DeviceNode("/dev/nvidia0", "/dev/nvidia0"),)), box=unknown) == ALL


def test_a_simulated_node_is_that_unit_and_only_over_the_harmless_host_node() -> None:
    assert held(foreign(devices=(DeviceNode("/dev/null", f"/dev/ds01/{M0}", "rw"),))) == {M0}
    assert held(foreign(devices=(DeviceNode("/dev/null", "/dev/ds01/GPU-of-another-box", "rw"),))) == set()
    assert held(foreign(devices=(DeviceNode("/dev/nvidia3", "/dev/ds01/GPU-of-another-box"),))) == {G0}


RULES = [
    ("c 195:* rwm", ALL),
    ("c 195:3 rw", {G0}),
    ("c 195:5 r", {M0, M1}),
    ("c 195:255 rwm", set()),
    ("c *:* rwm", ALL),
    ("a *:* rwm", ALL),
    ("b 8:* r", set()),
    ("c 1:3 rw", set()),
    ("c 195 rw", ALL),
    ("anything", ALL),
    ("", ALL),
]


@pytest.mark.parametrize(("rule", "units"), RULES)
def test_device_cgroup_rules(rule: str, units: set[str]) -> None:
    assert held(foreign(device_rules=(rule,))) == units


MOUNTS = [
    ("/var/run/nvidia-container-devices/all", ALL),
    ("/var/run/nvidia-container-devices/0", {G0}),
    (f"/var/run/nvidia-container-devices/{M1}", {M1}),
    ("/var/run/nvidia-container-devices/cdi/nvidia.com/gpu/1", {G1}),
    ("/run/nvidia-container-devices/", ALL),
    ("/var/run/nvidia-container-devices2/all", set()),
    ("/workspace", set()),
]


@pytest.mark.parametrize(("target", "units"), MOUNTS)
def test_mounts_that_ask_for_devices(target: str, units: set[str]) -> None:
    assert held(foreign(mounts=(MountPoint("bind", "/dev/null", target),))) == units


def test_privileged_reaches_everything_while_it_runs() -> None:
    assert held(foreign(privileged=True)) == ALL
    assert held(foreign(privileged=True, state="exited", running=False)) == set()


def test_mounts_of_dev_and_of_the_socket_are_noted_and_hold_nothing() -> None:
    sock = MountPoint("bind", "/var/run/docker.sock", "/var/run/docker.sock")
    container = foreign(mounts=(sock, MountPoint("bind", "/dev", "/hostdev")))
    assert held(container) == set()
    notes = occupancy.notes([container, foreign(state="exited", running=False, mounts=(sock,))])
    assert len(notes) == 2 and "socket" in notes[0] and "/dev" in notes[1]


def test_what_cannot_be_read_blocks_everything_whatever_its_state() -> None:
    broken = container_facts({"Id": "x", "Name": "/odd", "State": None, "Config": {"Labels": {"a": "b"}}})
    assert broken.unreadable and broken.name == "odd"
    found = look(broken, rules=(Rule("*", "*"),))
    assert {e.unit_uuid for e in found} == ALL
    assert {e.kind for e in found} == {"unreadable"}


def test_a_container_without_gpu_holds_nothing() -> None:
    assert look(foreign(env={"NVIDIA_VISIBLE_DEVICES": "all"})) == ()


# --------------------------------------------------------------------------- states of foreign containers


@pytest.mark.parametrize("state", ["running", "paused", "restarting", "removing", "something-new"])
def test_states_in_which_it_may_run(state: str) -> None:
    running = state in ("running", "paused", "restarting")
    assert held(foreign(state=state, running=running, device_requests=asks(count=-1))) == ALL


@pytest.mark.parametrize("state", ["exited", "dead"])
def test_a_stopped_foreign_container_holds_nothing(state: str) -> None:
    assert held(foreign(state=state, running=False, device_requests=asks(G0))) == set()


@pytest.mark.parametrize(("policy", "units"), [("always", {G0}), ("unless-stopped", set()), ("on-failure", set())])
def test_a_stopped_one_that_docker_starts_again_holds_what_it_names(policy: str, units: set[str]) -> None:
    assert held(foreign(state="exited", running=False, restart=policy, device_requests=asks(G0))) == units


def test_a_stopped_one_that_docker_starts_again_does_not_block_the_whole_box() -> None:
    assert held(foreign(state="exited", running=False, restart="always", device_requests=asks(count=-1))) == set()


@pytest.mark.parametrize(
    ("age", "units"), [(timedelta(seconds=5), {G0}), (timedelta(minutes=3), set()), (timedelta(days=9), set())]
)
def test_a_created_one_counts_as_about_to_start_for_a_while(age: timedelta, units: set[str]) -> None:
    container = foreign(state="created", running=False, created=NOW - age, device_requests=asks(G0))
    assert held(container) == units
    assert held(container, now=None) == {G0}


# --------------------------------------------------------------------------- ours and other installations


def test_ours_with_a_live_token_holds_by_the_ledger() -> None:
    container = ours(5, device_requests=asks(G0, driver="nvidia"))
    assert look(container, live={5: (G0,)}) == ()
    assert look(replace(container, state="exited", running=False), live={5: (G0,)}) == ()


def test_ours_with_more_than_its_lease_is_external_for_the_rest() -> None:
    (found,) = look(ours(5, device_requests=asks(G0, G1)), live={5: (G0,)})
    assert found.unit_uuid == G1 and "not leased" in found.why


@pytest.mark.parametrize("token", [4, 6, 999999])
@pytest.mark.parametrize("running", [True, False])
def test_ours_with_a_token_that_is_not_live_is_external_in_any_state(token: int, running: bool) -> None:
    state = "running" if running else "exited"
    found = look(ours(token, device_requests=asks(G0), state=state, running=running), live={5: (G0,)})
    assert [e.unit_uuid for e in found] == [G0]
    assert str(token) in found[0].why and "reconcile" in found[0].remedy


def test_ours_cannot_be_exempted_by_a_rule() -> None:
    assert held(ours(4, device_requests=asks(G0)), rules=(Rule("*", "*"),)) == {G0}


def test_ours_without_a_readable_token_is_external() -> None:
    container = ours(0, device_requests=asks(G0))
    assert held(replace(container, labels={**container.labels, aime.LABEL_TOKEN: "x"}), live={0: (G0,)}) == {G0}


def test_another_installations_container_is_external_running_or_not() -> None:
    running = ours(5, instance="another", device_requests=asks(M0))
    stopped = replace(running, state="exited", running=False)
    for container in (running, stopped):
        (found,) = look(container, live={5: (M0,)})
        assert found.unit_uuid == M0 and "another" in found.why
    assert held(replace(stopped, device_requests=asks(count=-1))) == set()


# --------------------------------------------------------------------------- processes


def test_process_in_the_container_that_leases_the_unit_is_fine() -> None:
    container = ours(5, device_requests=asks(G0))
    process = LocatedProcess(G0, 11, container.id)
    assert look(container, processes=(process,), live={5: (G0,)}) == ()


def test_process_known_only_on_the_parent_gpu_of_its_lease_is_fine() -> None:
    container = ours(5, device_requests=asks(M0))
    assert look(container, processes=(LocatedProcess(G2, 11, container.id),), live={5: (M0,)}) == ()


def test_process_on_a_unit_that_its_container_does_not_lease() -> None:
    container = ours(5, device_requests=asks(G0))
    (found,) = look(container, processes=(LocatedProcess(G1, 11, container.id),), live={5: (G0,)})
    assert (found.kind, found.unit_uuid) == ("process", G1)
    assert "main._.70000" in found.why


def test_process_on_the_host_occupies() -> None:
    (found,) = look(processes=(LocatedProcess(G1, 4321, None, "python"),))
    assert found == External(G1, "process", "pid 4321 (python)", "compute process on the host", "", found.remedy)
    assert "4321" in found.remedy


def test_process_of_a_container_that_is_not_listed_occupies() -> None:
    (found,) = look(processes=(LocatedProcess(G1, 7, "ab" * 32),))
    assert "abababababab" in found.why


def test_process_of_a_foreign_container_occupies_unless_exempt() -> None:
    container = foreign()
    process = LocatedProcess(M1, 9, container.id)
    (found,) = look(container, processes=(process,))
    assert found.image == "site/tool:1"
    assert look(container, processes=(process,), rules=(Rule("theirs", "site/*"),)) == ()


def test_process_on_a_mig_parent_occupies_all_instances() -> None:
    assert held(processes=(LocatedProcess(G2, 9, None),)) == {M0, M1}


# --------------------------------------------------------------------------- exemptions


@pytest.mark.parametrize(
    ("rule", "exempt"),
    [
        (Rule("theirs", "site/tool:1"), True),
        (Rule("theirs", "site/tool:*"), True),
        (Rule("the?rs", "site/*"), True),
        (Rule("theirs", "other/*"), False),
        (Rule("other", "site/tool:1"), False),
        (Rule("their", "site/tool:1"), False),
        (Rule("THEIRS", "site/tool:1"), False),
        (Rule("[t]heirs", "site/tool:1"), False),
    ],
)
def test_exemption_needs_name_and_image(rule: Rule, exempt: bool) -> None:
    assert (held(foreign(privileged=True), rules=(rule,)) == set()) is exempt


@pytest.mark.parametrize("name", ["dcgm", 'odd"name', "a: b", "x'y", "*"])
def test_the_remedy_is_the_line_that_exempts(name: str) -> None:
    container = foreign(name=name, image_ref="nvcr.io/dcgm-exporter:3.3.5@sha256:ab", privileged=True)
    line = look(container)[0].remedy
    (row,) = yaml.safe_load(line)
    assert row["reason"]
    assert held(container, rules=(Rule(row["name"], row["image"]),)) == set()


def test_order_is_by_unit_and_holder_and_each_holder_is_named_once() -> None:
    one = foreign(name="b", device_requests=asks(count=-1), privileged=True)
    two = foreign(id="e" * 64, name="a", device_requests=asks(M0))
    found = look(one, two)
    assert [(e.unit_uuid, e.holder) for e in found] == [(G0, "b"), (G1, "b"), (M0, "a"), (M0, "b"), (M1, "b")]
    assert found[0].why == "--privileged, --gpus all"


@given(st.text(max_size=40))
def test_no_device_id_breaks_the_reading_and_odd_ones_block(name: str) -> None:
    units = held(foreign(device_requests=asks(name)))
    assert units <= ALL
    for driver in ("cdi", "x"):
        assert held(foreign(device_requests=asks(name, driver=driver))) <= ALL


@given(st.text(max_size=30))
def test_no_path_or_rule_breaks_the_reading(text: str) -> None:
    assert held(foreign(devices=(DeviceNode(text, text),))) <= ALL
    assert held(foreign(device_rules=(text,))) <= ALL
    assert held(foreign(mounts=(MountPoint("bind", text, text),))) <= ALL


def test_an_empty_box_has_no_holder() -> None:
    assert look(foreign(privileged=True), box=Inventory((), "none")) == ()


def test_on_a_simulated_box_only_who_names_a_unit_holds_it() -> None:
    box = replace(BOX, source="simulated")
    assert look(foreign(privileged=True), box=box) == ()
    node = DeviceNode("/dev/null", f"/dev/ds01/{M0}")
    assert [e.unit_uuid for e in look(foreign(devices=(node,)), box=box)] == [M0]
    assert {e.unit_uuid for e in look(foreign(unreadable="KeyError: 'State'"), box=box)} == {G0, G1, M0, M1}
