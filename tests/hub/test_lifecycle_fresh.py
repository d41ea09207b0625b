"""The way back to a pristine image on a real Hub: what was changed is saved and listed, and can be taken up again."""

from __future__ import annotations

import docker
import pytest
from live_hub import LiveHub

from ds01spawner.images import SavedImage
from ds01spawner.keep import saved_images

pytestmark = [pytest.mark.docker, pytest.mark.hub]


def change(hub: LiveHub, user: str, text: str) -> None:
    """Change something outside the mounts."""
    _inside(hub, user, f"mkdir -p /opt/mine; echo {text} >> /opt/mine/file")


def changes(hub: LiveHub, user: str, server: str = "") -> list[str]:
    """What was changed, as the running container has it."""
    return _inside(hub, user, "cat /opt/mine/file 2> /dev/null", server).split()


def _inside(hub: LiveHub, user: str, script: str, server: str = "") -> str:
    container = hub.container(user, server)
    assert container is not None
    client = docker.APIClient()
    try:
        made = client.exec_create(container.id, ["sh", "-c", script], user="root")
        return str(client.exec_start(made["Id"]).decode())
    finally:
        client.close()


def saved(hub: LiveHub, user: str) -> tuple[SavedImage, ...]:
    return saved_images(hub.runtime, user)


def test_lifecycle_fresh_start_does_not_use_a_container_again_that_would_do(hub: LiveHub) -> None:
    hub.spawn("researcher1", {"profile": "cpu"})
    change(hub, "researcher1", "first")
    hub.halt("researcher1")
    hub.spawn("researcher1", {"profile": "cpu", "fresh": True})
    assert changes(hub, "researcher1") == [], "the profile's image as it is"
    (first,) = saved(hub, "researcher1")
    image = hub.runtime.engine.image_facts(first.ref)
    assert image is not None and image.id == first.image_id, "nothing is lost"
    change(hub, "researcher1", "second")
    hub.halt("researcher1")
    hub.spawn("researcher1")  # with the Hub's stored options: the wish is not repeated
    assert changes(hub, "researcher1") == ["second"]
    hub.halt("researcher1")


def test_lifecycle_fresh_start_is_not_taken_back_and_what_was_set_aside_can_be_taken_up(hub: LiveHub) -> None:
    hub.spawn("admin", {"profile": "small"})
    change(hub, "admin", "first")
    hub.halt("admin")
    hub.spawn("admin", {"profile": "small", "fresh": True})
    hub.halt("admin")
    (first,) = saved(hub, "admin")
    assert first.aside
    hub.spawn("admin")  # a container of its own each time, because the last one names no GPU any more
    assert changes(hub, "admin") == []
    change(hub, "admin", "second")
    hub.halt("admin")

    hub.spawn("admin", {"profile": "small", "image": first.ref})
    assert changes(hub, "admin") == ["first"]
    assert {image.ref: image.aside for image in saved(hub, "admin")}[first.ref] is False
    assert len(saved(hub, "admin")) == 2, "what was left for it is listed"
    change(hub, "admin", "third")
    hub.halt("admin")
    hub.spawn("admin")
    assert changes(hub, "admin") == ["first", "third"]
    hub.halt("admin")


def test_lifecycle_image_saved_from_one_server_goes_on_in_another(hub: LiveHub) -> None:
    user = "student1"
    hub.spawn(user, {"profile": "cpu"})
    change(hub, user, "tools")
    hub.halt(user)
    hub.spawn(user, {"profile": "cpu", "fresh": True})
    hub.halt(user)
    (tools,) = saved(hub, user)

    hub.spawn(user, {"profile": "small", "image": tools.ref}, "lab")
    assert changes(hub, user, "lab") == ["tools"]
    hub.halt(user, "lab")  # its container is replaced by one without a GPU, and at the next start once more
    hub.spawn(user, {"profile": "small"}, "lab")
    assert changes(hub, user, "lab") == ["tools"]
    hub.halt(user, "lab")
    assert {(image.server_name, image.aside) for image in saved(hub, user)} == {("", True), ("lab", False)}
