"""CDI for real: an engine that knows it gives containers exactly their leased units. Opt-in.

`DS01_TEST_CDI_HOST` names such an engine (`unix:///run/docker-cdi.sock`, Docker 25 or newer with CDI on, whose CDI
folder this test may write to); an image with a shell must be in it (`DS01_TEST_CDI_IMAGE`). No GPU is needed: the
units come from the stub NVML, the device nodes of the specification are harmless.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import docker
import pytest
import yaml

from ds01spawner.settings import Settings
from tests.gpu.conftest import stub_library as stub_library
from tests.nvml_stub.topology import A100, Topology, gpu_uuid

ROOT = Path(__file__).parents[2]
HOST = os.environ.get("DS01_TEST_CDI_HOST", "")
IMAGE = os.environ.get("DS01_TEST_CDI_IMAGE", "")

pytestmark = pytest.mark.skipif(
    not (HOST and IMAGE), reason="DS01_TEST_CDI_HOST and DS01_TEST_CDI_IMAGE name no engine"
)


def _spec(devices: dict[str, list[str]]) -> str:
    nodes = {name: [{"path": path, "hostPath": "/dev/null"} for path in paths] for name, paths in devices.items()}
    return json.dumps(
        {
            "cdiVersion": "0.5.0",
            "kind": "nvidia.com/gpu",
            "devices": [{"name": name, "containerEdits": {"deviceNodes": list_}} for name, list_ in nodes.items()],
        }
    )


def test_cdi_containers_get_exactly_their_units(stub_library: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    state = Path("/var/lib") / f"ds01-cdi-test-{os.getpid()}"
    topology = Topology()
    topology.gpu(A100, "00000000:01:00.0")
    topology.gpu(A100, "00000000:02:00.0", mig=True)
    first, second = (topology.mig(1, index, "3g.20gb", 4 * index) for index in (0, 1))
    whole = gpu_uuid("00000000:01:00.0")
    client = docker.APIClient(HOST)
    folder = Path(client.info()["CDISpecDirs"][0])
    client.close()
    specification = folder / "ds01-test.json"
    devices = {
        whole: ["/dev/nvidia0"],
        first: ["/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap1"],
        second: ["/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap2"],
        "1:0": ["/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap1"],
    }
    specification.write_text(_spec(devices))
    state.mkdir(mode=0o755)
    try:
        settings = Settings(
            config_dir=state / "policy",
            state_dir=state,
            workspaces=state / "workspaces",
            homes=state / "homes",
            inventory="nvml",
            cgroup_root="ds01cditest",
            network_mode="host",
            unsafe_no_isolation=True,
            uid_range=(99800, 99899),
        )
        settings.save()
        (state / "image.json").write_text(json.dumps(IMAGE))
        policy = {"default_group": "all", "groups": {"all": {"max_gpu_equivalents": 1, "allow_full_gpu": True}}}
        sizes = {"whole": {"gpu": {"kind": "full"}}, "mig": {"gpu": {"mig_profile": "3g.20gb"}}}
        (state / "policy").mkdir()
        (state / "policy" / "resource-limits.yaml").write_text(yaml.safe_dump({"defaults": {"memory": "1g"}, **policy}))
        profiles = {"p": {"image": IMAGE, "command": ["sleep", "600"], "sizes": sizes}}
        (state / "policy" / "profiles.yaml").write_text(yaml.safe_dump({"profiles": profiles}))
        (state / "topology").write_text(topology.text)
        environment = os.environ | {
            "DOCKER_HOST": HOST,
            "LD_LIBRARY_PATH": str(stub_library),
            "DS01_NVML_STUB": str(state / "topology"),
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.cdi.drive", str(state)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        answer = json.loads(done.stdout)
    finally:
        specification.unlink()
        subprocess.run(["rm", "-rf", str(state)], check=True)
    print(json.dumps(answer, indent=2))
    assert answer["source"] == "nvml"
    assert set(answer["external"]) == {first}, "a foreign container by CDI index holds exactly that instance"
    assert answer["whole"]["units"] == [whole]
    assert answer["whole"]["requests"][0]["Driver"] == "cdi"
    assert answer["whole"]["requests"][0]["DeviceIDs"] == [f"nvidia.com/gpu={whole}"]
    assert answer["whole"]["nodes"] == ["nvidia0"]
    assert answer["mig"]["units"] == [second], "the instance that the foreign container holds is not given"
    assert answer["mig"]["nodes"] == ["nvidia-cap2", "nvidia-caps", "nvidia1"]
    assert answer["full"] == {"refused": "no_gpu"}
    assert answer["held_after_stop"] == []
    assert answer["requests_after_stop"] == [0, 0], "a released unit is named by no container"
