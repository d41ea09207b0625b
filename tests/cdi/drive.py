"""Start real containers on a CDI-capable engine with units read by real pynvml from the stub, and print JSON.

Run by test_cdi_engine.py with LD_LIBRARY_PATH (the stub) and DOCKER_HOST (the engine) set. Argument: the state folder.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import docker

from ds01spawner.body import HubSide
from ds01spawner.errors import Refusal
from ds01spawner.gpu.inventory import open_inventory
from ds01spawner.launch import Launch, Person
from ds01spawner.runtime import Runtime
from ds01spawner.servers import end
from ds01spawner.settings import Settings
from ds01spawner.watcher import Watcher


def start(runtime: Runtime, user: str, options: dict[str, Any]) -> dict[str, Any]:
    launch = Launch(runtime, Person(user), "", lambda *_args, **_more: None)
    try:
        admission = launch.admit(options, "rest")
    except Refusal as refusal:
        return {"refused": refusal.code.value}
    launch.fetch_image()
    launch.create(HubSide({}, ("sleep", "600"), (), 8888))
    launch.start()
    client = docker.from_env()
    try:
        container = client.containers.get(launch.container_id)
        nodes = container.exec_run(["sh", "-c", "ls /dev | grep nvidia; ls /dev/nvidia-caps 2>/dev/null"]).output
        return {
            "units": [unit.uuid for unit in admission.units],
            "requests": container.attrs["HostConfig"]["DeviceRequests"],
            "nodes": sorted(nodes.decode().split()),
        }
    finally:
        client.close()


def main(state: Path) -> None:
    settings = Settings.model_validate_json((state / "settings.json").read_text())
    runtime = Runtime.open(role="test", settings=settings)
    watcher = Watcher(runtime, open_inventory("nvml"))
    answer: dict[str, Any] = {"source": watcher.observe().inventory.source}
    image = json.loads((state / "image.json").read_text())
    client = docker.from_env()
    foreign = client.containers.run(
        image,
        ["sleep", "600"],
        detach=True,
        network_mode="host",
        device_requests=[docker.types.DeviceRequest(driver="cdi", device_ids=["nvidia.com/gpu=1:0"])],
    )
    try:
        answer["external"] = {e.unit_uuid: [e.holder, e.why] for e in watcher.observe().external}
        answer["whole"] = start(runtime, "anna", {"size": "whole"})
        answer["mig"] = start(runtime, "bert", {"size": "mig"})
        watcher.observe()
        answer["full"] = start(runtime, "carl", {"size": "mig"})
        time.sleep(0.1)
        for user in ("anna", "bert"):
            end(runtime, user, "", "", now=True)
        answer["held_after_stop"] = sorted(runtime.ledger.usage().taken())
        own = [c for c in runtime.engine.list_facts() if c.labels.get("ds01.instance") == runtime.ledger.instance]
        answer["requests_after_stop"] = [len(c.device_requests) for c in own]
    finally:
        foreign.remove(force=True)
        for container in runtime.engine.list_facts():
            if container.labels.get("ds01.instance") == runtime.ledger.instance:
                runtime.engine.remove(container.id, force=True)
        client.close()
        runtime.close()
    print(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
