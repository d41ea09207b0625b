"""The demo on the real Docker: the main job, Ctrl-C, and what a killed one leaves. The first is also the smoke test
of the reduced run with JupyterHub 5 (`hub5`)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from deploy.instance import STATE_PARENT, STATE_PREFIX, Plan, remove_leftovers
from ds01spawner.containers.aime import LABEL_INSTANCE
from ds01spawner.containers.network import network_name
from ds01spawner.ledger.store import Ledger

pytestmark = [pytest.mark.docker, pytest.mark.hub]

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 120


@pytest.fixture(scope="module")
def client() -> Iterator[docker.APIClient]:
    connection = docker.APIClient(timeout=60)
    yield connection
    connection.close()


def start(demo_image: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "deploy.demo", *arguments],
        cwd=ROOT,
        env=os.environ | {"DS01_DEMO_IMAGE": demo_image},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(demo: subprocess.Popen[str], text: str) -> str:
    """What the demo printed up to the line with `text`."""
    assert demo.stdout is not None
    printed = ""
    for line in demo.stdout:
        printed += line
        if text in line:
            return printed
    raise AssertionError(f"the demo ended ({demo.wait()}) without {text!r}:\n{printed}")


def plan_of(printed: str) -> Plan:
    """The plan of the demo that printed its welcome."""
    found = re.search(rf"({STATE_PARENT}/{STATE_PREFIX}\w+)/policy", printed)
    assert found is not None, printed
    return Plan.load(Path(found[1]) / "plan.json")


def instance_of(plan: Plan) -> str:
    ledger = Ledger.open(plan.resolved().url)
    try:
        return ledger.instance
    finally:
        ledger.close()


def traces(client: docker.APIClient, plan: Plan, instance: str) -> list[str]:
    """Everything on this machine that belongs to that demo."""
    mine = {"label": f"{LABEL_INSTANCE}={instance}"}
    uids = range(plan.settings["uid_range"][0], plan.settings["uid_range"][1] + 1)
    name = network_name(instance)
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    found = [f"container {row['Names']}" for row in client.containers(all=True, filters=mine)]
    found += [f"network {row['Name']}" for row in client.networks(names=[name]) if row["Name"] == name]
    found += [
        f"image {tag}"
        for image in client.images()
        for tag in image.get("RepoTags") or ()
        if any(tag.endswith(f"._.{uid}") for uid in uids)
    ]
    found += [f"rule {line}" for line in rules.splitlines() if name in line]
    root = plan.settings["cgroup_root"]
    found += [f"cgroup {path}" for top in ("*", "*/*") for path in Path("/sys/fs/cgroup").glob(f"{top}/{root}*")]
    found += [f"process {pid}" for pid in processes(plan.state)]
    return found + ([f"folder {plan.state}"] if plan.state.exists() else [])


def processes(state: Path) -> list[str]:
    marks = (f"DS01_DEMO={state}/".encode(), f"DS01_SETTINGS={state}/".encode())
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(value.startswith(marks) for value in (folder / "environ").read_bytes().split(b"\0")):
                found.append(folder.name)
        except OSError:
            continue
    return found


def test_demo_check_does_the_main_job_hub5(demo_image: str) -> None:
    demo = start(demo_image, "--check")
    try:
        printed, _ = demo.communicate(timeout=SECONDS * 2)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 0, printed
    assert "✓ all of it equals the policy" in printed
    assert "✗" not in printed
    assert printed.count("│ ✓ │") > 75
    assert "  error: " not in printed


def test_demo_ends_cleanly_on_ctrl_c(client: docker.APIClient, demo_image: str) -> None:
    demo = start(demo_image, "--port", "8000")
    try:
        printed = wait_for(demo, "Ctrl-C")
        assert "student1" in printed and "researcher1" in printed and "http://127.0.0.1:" in printed
        plan = plan_of(printed)
        instance = instance_of(plan)
        assert len(traces(client, plan, instance)) > 3
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=60)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 0
    assert traces(client, plan, instance) == []


def test_demo_that_was_killed_is_cleaned_up_by_the_next(client: docker.APIClient, demo_image: str) -> None:
    demo = start(demo_image)
    try:
        plan = plan_of(wait_for(demo, "Ctrl-C"))
        instance = instance_of(plan)
        remove_leftovers(client)
        assert plan.state.exists(), "a demo that lives was taken for a dead one"
    finally:
        demo.kill()
        demo.communicate(timeout=30)
    assert traces(client, plan, instance) != []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and traces(client, plan, instance):
        remove_leftovers(client)
    assert traces(client, plan, instance) == []
