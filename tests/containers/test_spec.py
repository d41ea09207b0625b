"""The create body: what it always holds, what nobody can add, what forces a new container and what does not."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds01spawner.containers import aime, spec
from ds01spawner.containers.facts import ContainerFacts, DeviceNode, DeviceRequest, MountPoint
from ds01spawner.containers.pins import PINS
from ds01spawner.containers.spec import Bind, DevicePlan, Reuse, SpecInput, Ulimit, build, decide_reuse, plan_devices
from ds01spawner.errors import SettingsInvalid
from ds01spawner.model import Mount, Resources, Unit

GPU, MIG = "GPU-11111111-0000-4000-8000-000000000000", "MIG-22222222-0000-5000-8000-000000000000"
U_GPU = Unit(GPU, GPU, 0, "A100", 40 * 2**30)
U_MIG = Unit(MIG, "GPU-x", 3, "A100", 5 * 2**30, 1, 1, 7, 8, 0, "1g.5gb", 0)
RESOURCES = Resources(cpus=2.5, memory=4 * 2**30, memory_swap=6 * 2**30, shm_size=2**30, pids_limit=512)
BASE_ID = "sha256:" + "1" * 64


def want(**changes: Any) -> SpecInput:
    values: dict[str, Any] = {
        "name": "lab._.70000",
        "image": "img:lab._.70000",
        "base_image": "img:1",
        "base_image_id": BASE_ID,
        "command": ("jupyterhub-singleuser",),
        "env": {"JUPYTERHUB_API_TOKEN": "t0k3n", "HOME": "/home/ada"},
        "labels": {"ds01.image": "img:1", "ds01.image_id": BASE_ID},
        "uid": 70000,
        "gid": 70000,
        "groups": (44,),
        "resources": RESOURCES,
        "mounts": (Bind("/srv/ws/70000", "/workspace"), Bind("/data", "/data", True)),
        "cgroup_parent": "/ds01/students/ada",
        "network": "ds01-1234",
        "hostname": "lab",
    }
    return SpecInput(**{**values, **changes})


def host(**changes: Any) -> dict[str, Any]:
    return dict(build(want(**changes)).config["HostConfig"])


def as_docker_tells(made: spec.ContainerSpec, **changes: Any) -> ContainerFacts:
    """The facts of a stopped container that was created from `made`."""
    config, hosted = made.config, made.config["HostConfig"]
    facts = ContainerFacts(
        id="c" * 64,
        name=made.name,
        image_ref=config["Image"],
        labels=config["Labels"],
        state="exited",
        env=dict(line.split("=", 1) for line in config["Env"]),
        command=tuple(config["Cmd"] or ()),
        user=config["User"],
        working_dir=config["WorkingDir"],
        device_requests=tuple(DeviceRequest(r["Driver"], 0, tuple(r["DeviceIDs"])) for r in hosted["DeviceRequests"]),
        devices=tuple(DeviceNode(d["PathOnHost"], d["PathInContainer"], "rw") for d in hosted["Devices"]),
        cgroup_parent=hosted["CgroupParent"],
        network_mode=hosted["NetworkMode"],
        memory=hosted.get("Memory", 0),
        memory_swap=hosted.get("MemorySwap", 0),
        cpu_period=hosted.get("CpuPeriod", 0),
        cpu_quota=hosted.get("CpuQuota", 0),
        pids_limit=hosted.get("PidsLimit", 0),
        mounts=tuple(MountPoint("bind", m["Source"], m["Target"], m["ReadOnly"]) for m in hosted["Mounts"]),
    )
    return dataclasses.replace(facts, **changes)


# --------------------------------------------------------------------------- the body


def test_the_body_is_plain_json_and_complete() -> None:
    made = build(want())
    assert json.loads(json.dumps(made.config)) == made.config
    assert made.name == "lab._.70000"
    assert made.config["User"] == "70000:70000"
    assert made.config["WorkingDir"] == "/workspace"
    assert made.config["Hostname"] == "lab"
    assert made.config["ExposedPorts"] == {"8888/tcp": {}}
    assert made.config["Labels"]["ds01.spec"] == made.hash
    assert made.config["NetworkingConfig"] == {"EndpointsConfig": {"ds01-1234": {}}}
    hosted = made.config["HostConfig"]
    assert hosted["CgroupParent"] == "/ds01/students/ada"
    assert hosted["GroupAdd"] == ["44"]
    assert hosted["PortBindings"] == {}


SECURITY = {
    "Privileged": False,
    "CapDrop": ["ALL"],
    "CapAdd": [],
    "SecurityOpt": ["no-new-privileges"],
    "Devices": [],
    "DeviceRequests": [],
    "DeviceCgroupRules": [],
    "Binds": [],
    "PidMode": "",
    "IpcMode": "private",
    "UTSMode": "",
    "UsernsMode": "",
    "NetworkMode": "ds01-1234",
    "CgroupnsMode": "private",
    "PublishAllPorts": False,
    "Init": True,
    "AutoRemove": False,
    "RestartPolicy": {"Name": "no"},
}


def test_security_is_always_stated() -> None:
    hosted = host()
    assert {key: hosted[key] for key in SECURITY} == SECURITY
    assert "Runtime" not in hosted
    assert "MaskedPaths" not in hosted and "ReadonlyPaths" not in hosted, "Docker's own lists stay in force"


WEAKENING = {
    "Privileged": True,
    "CapAdd": ["SYS_ADMIN", "NET_RAW"],
    "CapDrop": [],
    "SecurityOpt": ["seccomp=unconfined", "apparmor=unconfined"],
    "Devices": [{"PathOnHost": "/dev/nvidia0", "PathInContainer": "/dev/nvidia0", "CgroupPermissions": "rwm"}],
    "DeviceRequests": [{"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu"]]}],
    "DeviceCgroupRules": ["c 195:* rwm"],
    "Binds": ["/:/host"],
    "Mounts": [{"Type": "bind", "Source": "/", "Target": "/host"}],
    "VolumesFrom": ["other"],
    "PidMode": "host",
    "IpcMode": "host",
    "UTSMode": "host",
    "UsernsMode": "host",
    "CgroupnsMode": "host",
    "NetworkMode": "host",
    "Runtime": "nvidia",
    "CgroupParent": "/",
    "GroupAdd": ["docker"],
    "MaskedPaths": [],
    "ReadonlyPaths": [],
    "Sysctls": {"kernel.msgmax": "1"},
    "Init": False,
    "AutoRemove": True,
    "RestartPolicy": {"Name": "always"},
    "PortBindings": {"8888/tcp": [{"HostPort": "80"}]},
    "PublishAllPorts": True,
    "OomKillDisable": True,
    "OomScoreAdj": -1000,
    "Memory": 0,
    "NanoCpus": 10**12,
    "CpuQuota": -1,
    "PidsLimit": -1,
    "Links": ["x:y"],
    "ContainerIDFile": "/etc/passwd",
}


@pytest.mark.parametrize("key", sorted(WEAKENING))
def test_nothing_an_admin_adds_weakens_the_container(key: str) -> None:
    made = build(want(extra_host={key: WEAKENING[key]}))
    plain = build(want())
    assert made.config == plain.config
    assert len(made.ignored) == 1 and key in made.ignored[0]


def test_every_weakening_together_changes_nothing_either() -> None:
    made = build(want(extra_host=WEAKENING, extra_config={"User": "0", "Env": ["A=1"], "Labels": {}, "Volumes": {}}))
    assert made.config == build(want()).config
    assert len(made.ignored) == len(WEAKENING) + 4


def test_harmless_extras_of_an_admin_are_taken() -> None:
    extra = {
        "Dns": ["10.0.0.1"],
        "CpusetCpus": "0-3",
        "LogConfig": {"Type": "journald", "Config": {}},
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}, {"Name": "memlock", "Soft": 1, "Hard": 1}],
    }
    made = build(want(extra_host=extra, extra_config={"StopTimeout": 30}, ulimits=(Ulimit("memlock", -1, -1),)))
    hosted = made.config["HostConfig"]
    assert made.ignored == ()
    assert hosted["Dns"] == ["10.0.0.1"] and hosted["CpusetCpus"] == "0-3"
    assert hosted["LogConfig"]["Type"] == "journald"
    assert made.config["StopTimeout"] == 30
    assert {u["Name"]: u["Soft"] for u in hosted["Ulimits"]} == {"memlock": -1, "core": 0}


def test_the_log_cannot_fill_the_disk() -> None:
    assert host()["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}


@pytest.mark.parametrize(
    ("uid", "gid", "groups"),
    [(0, 70000, ()), (999, 70000, ()), (65534, 70000, ()), (70000, 0, ()), (70000, 70000, (0,)), (-1, 1000, ())],
)
def test_root_and_system_accounts_are_refused(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    with pytest.raises(SettingsInvalid, match="uid"):
        build(want(uid=uid, gid=gid, groups=groups))


# --------------------------------------------------------------------------- environment


def test_void_is_always_the_last_variable() -> None:
    hostile = {"NVIDIA_VISIBLE_DEVICES": "all", "zzz": "1", "NVIDIA_MIG_MONITOR_DEVICES": "all", "DS01_GPUS": "x"}
    env = build(want(env=hostile, units=(U_GPU, U_MIG))).config["Env"]
    assert env[-1] == "NVIDIA_VISIBLE_DEVICES=void"
    assert env[-2] == f"DS01_GPUS=0 A100 {GPU};3.0 1g.5gb {MIG}"
    assert [line for line in env if "NVIDIA" in line] == ["NVIDIA_VISIBLE_DEVICES=void"]
    assert "zzz=1" in env


@pytest.mark.parametrize(("name", "value"), [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "x\0y")])
def test_broken_variables_are_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsInvalid):
        build(want(env={name: value}))


@given(st.dictionaries(st.text(st.characters(exclude_characters="=\0"), min_size=1), st.text()))
def test_no_environment_gets_around_void(env: dict[str, str]) -> None:
    try:
        lines = build(want(env=env)).config["Env"]
    except SettingsInvalid:
        return
    effective = dict(line.split("=", 1) for line in lines)
    assert effective["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert lines[-1] == "NVIDIA_VISIBLE_DEVICES=void"


# --------------------------------------------------------------------------- limits


def test_limits_in_dockers_words() -> None:
    made = build(want())
    assert made.update == {
        "Memory": 4 * 2**30,
        "MemorySwap": 6 * 2**30,
        "CpuPeriod": 100_000,
        "CpuQuota": 250_000,
        "PidsLimit": 512,
    }
    hosted = made.config["HostConfig"]
    assert {key: hosted[key] for key in made.update} == made.update
    assert hosted["ShmSize"] == 2**30


def test_trap_t20_a_quota_and_never_nano_cpus() -> None:
    assert "NanoCpus" not in host() and "CpuShares" not in host()


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        (Resources(None, None, None, None, None), {}),
        (Resources(None, 2**30, None, None, None), {"Memory": 2**30, "MemorySwap": 2**30}),
        (Resources(None, 2**30, 2**20, None, None), {"Memory": 2**30, "MemorySwap": 2**30}),
        (Resources(None, 2**30, -1, None, None), {"Memory": 2**30, "MemorySwap": -1}),
        (Resources(None, 1, None, None, None), {"Memory": 6 * 2**20, "MemorySwap": 6 * 2**20}),
        (Resources(0.001, None, None, None, None), {"CpuPeriod": 100_000, "CpuQuota": 1000}),
        (Resources(1 / 3, None, None, None, None), {"CpuPeriod": 100_000, "CpuQuota": 33_333}),
        (Resources(None, None, 2**30, None, 7), {"PidsLimit": 7}),
    ],
)
def test_limits_that_are_set_or_not(resources: Resources, expected: dict[str, int]) -> None:
    hosted = host(resources=resources)
    assert {key: hosted[key] for key in spec.UPDATE_KEYS if key in hosted} == expected
    assert "ShmSize" not in hosted


# --------------------------------------------------------------------------- devices


def test_units_by_cdi_name_where_the_engine_has_all_of_them() -> None:
    names = {f"nvidia.com/gpu={GPU}", f"nvidia.com/gpu={MIG}", "nvidia.com/gpu=0"}
    plan = plan_devices((U_GPU, U_MIG), source="nvml", cdi_devices=names)
    hosted = host(units=(U_GPU, U_MIG), devices=plan)
    assert hosted["DeviceRequests"] == [
        {"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={GPU}", f"nvidia.com/gpu={MIG}"]}
    ]
    assert hosted["Devices"] == []


@pytest.mark.parametrize("names", [set(), {f"nvidia.com/gpu={GPU}"}, {"nvidia.com/gpu=0", "nvidia.com/gpu=all"}])
def test_units_by_the_nvidia_driver_otherwise_and_always_by_uuid(names: set[str]) -> None:
    plan = plan_devices((U_GPU, U_MIG), source="nvml", cdi_devices=names)
    assert host(devices=plan)["DeviceRequests"] == [
        {"Driver": "nvidia", "DeviceIDs": [GPU, MIG], "Capabilities": [["gpu"]]}
    ]


def test_simulated_units_are_harmless_nodes() -> None:
    plan = plan_devices((U_GPU, U_MIG), source="simulated", cdi_devices={f"nvidia.com/gpu={GPU}"})
    hosted = host(devices=plan)
    assert hosted["DeviceRequests"] == []
    assert hosted["Devices"] == [
        {"PathOnHost": "/dev/null", "PathInContainer": f"/dev/ds01/{uuid}", "CgroupPermissions": "rw"}
        for uuid in (GPU, MIG)
    ]
    assert spec.simulated_unit(hosted["Devices"][0]["PathInContainer"]) == GPU


@pytest.mark.parametrize("path", ["/dev/nvidia0", "/dev/ds01/", "/dev/ds01", "", "dev/ds01/x"])
def test_other_nodes_are_no_simulated_units(path: str) -> None:
    assert spec.simulated_unit(path) is None


@pytest.mark.parametrize("source", ["nvml", "simulated", "none"])
def test_no_unit_no_device(source: str) -> None:
    hosted = host(devices=plan_devices((), source=source, cdi_devices=set()))
    assert hosted["DeviceRequests"] == [] and hosted["Devices"] == []


# --------------------------------------------------------------------------- mounts


def test_mounts_never_make_a_missing_source() -> None:
    hosted = host()
    assert hosted["Binds"] == []
    assert [(m["Type"], m["Source"], m["Target"], m["ReadOnly"]) for m in hosted["Mounts"]] == [
        ("bind", "/data", "/data", True),
        ("bind", "/srv/ws/70000", "/workspace", False),
    ]
    assert all(m["BindOptions"] == {"Propagation": "rprivate"} for m in hosted["Mounts"])


@pytest.mark.parametrize(
    "mounts",
    [
        (Bind("relative", "/x"),),
        (Bind("/a", "x"),),
        (Bind("/a", "/"),),
        (Bind("/a", "/x/../etc"),),
        (Bind("/a", "/x"), Bind("/b", "/x")),
    ],
)
def test_wrong_mounts_are_refused(mounts: tuple[Bind, ...]) -> None:
    with pytest.raises(SettingsInvalid, match="mounted"):
        build(want(mounts=mounts))


def test_the_policys_mounts_are_read_only_unless_it_says_otherwise() -> None:
    assert spec.policy_binds([Mount("/data", "/data"), Mount("/m", "/models", False)]) == (
        Bind("/data", "/data", True),
        Bind("/m", "/models", False),
    )


def test_host_network_has_no_endpoint() -> None:
    made = build(want(network="host"))
    assert made.config["NetworkingConfig"] == {"EndpointsConfig": {}}
    assert made.config["HostConfig"]["NetworkMode"] == "host"


@pytest.mark.parametrize(
    ("wanted", "hostname"), [("lab", "lab"), ("a_b.c", "a-b-c"), ("-x-", "x"), ("é" * 3, ""), ("x" * 99, "x" * 63)]
)
def test_hostnames(wanted: str, hostname: str) -> None:
    assert build(want(hostname=wanted)).config["Hostname"] == hostname


# --------------------------------------------------------------------------- hash and reuse

FORCING: list[dict[str, Any]] = [
    {"units": (U_GPU,), "devices": DevicePlan(nvidia=(GPU,))},
    {"cgroup_parent": "/ds01/other/ada"},
    {"mounts": ()},
    {"mounts": (Bind("/srv/ws/70000", "/workspace", True), Bind("/data", "/data", True))},
    {"network": "other"},
    {"env": {"HOME": "/elsewhere"}},
    {"env": {"HOME": "/home/ada", "NEW": "1"}},
    {"command": ("other",)},
    {"uid": 70001},
    {"groups": ()},
    {"port": 9999},
    {"working_dir": "/"},
    {"resources": dataclasses.replace(RESOURCES, shm_size=2**29)},
    {"ulimits": (Ulimit("memlock", -1, -1),)},
    {"extra_host": {"Dns": ["10.0.0.1"]}},
]


@pytest.mark.parametrize("change", FORCING)
def test_what_forces_a_new_container(change: dict[str, Any]) -> None:
    old, new = build(want()), build(want(**change))
    assert new.hash != old.hash
    assert decide_reuse(as_docker_tells(old), old.hash, new) is Reuse.RECREATE


UNFORCING: list[dict[str, Any]] = [
    {"env": {"JUPYTERHUB_API_TOKEN": "another", "HOME": "/home/ada"}},
    {"env": {"JPY_API_TOKEN": "another", "HOME": "/home/ada"}},
    {"env": {"HOME": "/home/ada", "ONE_TIME": "1"}, "volatile": frozenset({"ONE_TIME"})},
    {"labels": {"ds01.image": "img:1", "ds01.image_id": BASE_ID, "ds01.token": "77"}},
    {"image": "img:lab._.70000@sha256:moved"},
    {"mounts": (Bind("/data", "/data", True), Bind("/srv/ws/70000", "/workspace"))},
]


@pytest.mark.parametrize("change", UNFORCING)
def test_what_is_new_at_every_start_forces_nothing(change: dict[str, Any]) -> None:
    old, new = build(want()), build(want(**change))
    assert new.hash == old.hash
    assert decide_reuse(as_docker_tells(old), old.hash, new) is Reuse.START


@pytest.mark.parametrize(
    "change",
    [
        {"cpus": 4.0},
        {"cpus": 0.5},
        {"memory": 2**30, "memory_swap": 2**30},
        {"memory": 8 * 2**30, "memory_swap": 9 * 2**30},
        {"memory_swap": 5 * 2**30},
        {"pids_limit": 9},
    ],
)
def test_limits_change_in_place(change: dict[str, Any]) -> None:
    old, new = build(want()), build(want(resources=dataclasses.replace(RESOURCES, **change)))
    assert new.hash == old.hash
    assert decide_reuse(as_docker_tells(old), old.hash, new) is Reuse.UPDATE


def test_a_limit_that_was_none_is_set_in_place() -> None:
    old = build(want(resources=Resources(None, None, None, 2**30, None)))
    assert decide_reuse(as_docker_tells(old), old.hash, build(want())) is Reuse.UPDATE


@pytest.mark.parametrize("key", ["cpus", "memory", "pids_limit"])
def test_a_limit_that_must_go_needs_a_new_container(key: str) -> None:
    """Docker cannot take a limit away in place."""
    old, new = build(want()), build(want(resources=dataclasses.replace(RESOURCES, **{key: None})))
    assert decide_reuse(as_docker_tells(old), old.hash, new) is Reuse.RECREATE


@pytest.mark.parametrize(
    "change",
    [
        {"base_image": "img:2", "labels": {"ds01.image": "img:2"}},
        {"base_image_id": "sha256:" + "2" * 64},
        {"base_image": "img:2", "units": (U_GPU,)},
    ],
)
def test_another_image_means_a_container_from_the_new_image(change: dict[str, Any]) -> None:
    old, new = build(want()), build(want(**change))
    assert decide_reuse(as_docker_tells(old), old.hash, new) is Reuse.NEW_IMAGE


def test_a_base_that_was_pruned_is_not_a_new_image() -> None:
    old, new = build(want()), build(want(base_image_id=""))
    assert decide_reuse(as_docker_tells(old), old.hash, new) is Reuse.RECREATE


@pytest.mark.parametrize(
    "change",
    [
        {"device_requests": (DeviceRequest("nvidia", 0, (GPU,)),)},
        {"device_requests": (DeviceRequest("", -1, ()),)},
        {"devices": (DeviceNode("/dev/nvidia0", "/dev/nvidia0"),)},
        {"device_rules": ("c 195:* rwm",)},
        {"privileged": True},
        {"user": "0:0"},
        {"cgroup_parent": ""},
        {"network_mode": "host"},
        {"nano_cpus": 10**9, "cpu_quota": 0, "cpu_period": 0},
        {"unreadable": "odd"},
    ],
)
def test_a_container_that_reaches_something_else_is_never_started_again(change: dict[str, Any]) -> None:
    made = build(want())
    assert decide_reuse(as_docker_tells(made, **change), made.hash, made) is Reuse.RECREATE


@pytest.mark.parametrize("known", [None, "", "other"])
def test_ledger_and_label_must_agree(known: str | None) -> None:
    made = build(want())
    assert decide_reuse(as_docker_tells(made), known, made) is Reuse.RECREATE
    forged = as_docker_tells(made, labels={**made.config["Labels"], "ds01.spec": "other"})
    assert decide_reuse(forged, made.hash, made) is Reuse.RECREATE


def test_the_hash_is_the_same_in_every_process() -> None:
    units = {"units": (U_GPU,), "devices": DevicePlan(cdi=(f"nvidia.com/gpu={GPU}",))}
    assert build(want(**units)).hash == build(want(**units)).hash
    assert len(build(want()).hash) == 32


# --------------------------------------------------------------------------- stand-in and token


def test_the_stand_in_names_no_device_and_keeps_the_rest() -> None:
    made = build(
        want(units=(U_GPU,), devices=DevicePlan(simulated=(GPU,)), labels={"ds01.gpus": GPU, "ds01.token": "3"})
    )
    old = as_docker_tells(made)
    body = spec.without_devices(old)
    text = json.dumps(body)
    assert GPU not in text
    assert body["HostConfig"]["Devices"] == body["HostConfig"]["DeviceRequests"] == []
    assert body["Env"][-1] == "NVIDIA_VISIBLE_DEVICES=void"
    assert body["Image"] == "img:lab._.70000"
    assert body["Labels"]["ds01.token"] == "3" and body["Labels"]["ds01.gpus"] == ""
    assert [m["Target"] for m in body["HostConfig"]["Mounts"]] == ["/data", "/workspace"]
    assert body["HostConfig"]["Memory"] == 4 * 2**30
    assert spec.without_devices(old, "saved:1")["Image"] == "saved:1"
    standing = dataclasses.replace(old, devices=(), labels=body["Labels"])
    assert decide_reuse(standing, made.hash, made) is not Reuse.START


def test_the_stand_in_names_no_pinned_folder_for_after_a_reboot_it_is_not_there() -> None:
    made = build(want(mounts=(Bind(f"{PINS}/70000/abc", "/workspace"), Bind("/srv/data", "/data", read_only=True))))
    body = spec.without_devices(as_docker_tells(made))
    assert [m["Source"] for m in body["HostConfig"]["Mounts"]] == ["/srv/data"]


def test_the_api_token_of_an_old_container_is_found() -> None:
    assert spec.api_token(as_docker_tells(build(want()))) == "t0k3n"
    assert spec.api_token(ContainerFacts("x", env={"JPY_API_TOKEN": "old"})) == "old"
    assert spec.api_token(ContainerFacts("x")) is None


def test_secrets_are_not_in_the_hash_label_or_repr() -> None:
    made = build(want())
    assert "t0k3n" not in json.dumps(made.config["Labels"])
    assert "t0k3n" not in repr(as_docker_tells(made))


# --------------------------------------------------------------------------- hostile values


@given(
    st.text(min_size=1, max_size=30),
    st.text(max_size=30),
    st.dictionaries(st.sampled_from(["ds01.user", "aime.mlc", "note"]), st.text(max_size=10)),
)
def test_hostile_texts_stay_values(image: str, folder: str, labels: dict[str, str]) -> None:
    made = build(
        want(image=image, base_image=image, labels=labels, hostname=folder, env={"X": folder.replace("\0", "")})
    )
    hosted = made.config["HostConfig"]
    assert {key: hosted[key] for key in SECURITY} == SECURITY
    assert made.config["Image"] == image
    assert set(made.config["Labels"]) == {*labels, "ds01.spec"}


@pytest.mark.parametrize("key", ["LABEL_USER", "LABEL_TOKEN", "LABEL_SPEC", "LABEL_INSTANCE"])
def test_our_labels_have_one_prefix(key: str) -> None:
    assert getattr(aime, key).startswith("ds01.")
