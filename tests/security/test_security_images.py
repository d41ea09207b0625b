"""Images: what their author wrote into them, and other people's, by whatever name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from intruder import Lab

from ds01spawner.containers import aime
from ds01spawner.containers.accounts import read_image_accounts
from ds01spawner.ledger.records import ImageRecord

pytestmark = [pytest.mark.docker, pytest.mark.hub]


# --------------------------------------------------------------------------- what an image says of itself


@pytest.fixture(scope="module")
def evil(lab: Lab) -> str:
    """An image with forged labels, GPU variables, a root user, an entry point, a volume and a health check."""
    return lab.evil_image()


def test_an_evil_image_gets_no_more_than_any_other(lab: Lab, evil: str) -> None:
    """S4: labels, variables, user, entry point, volume and health check of an image give nobody anything."""
    volumes = {v["Name"] for v in lab.client.volumes()["Volumes"] or ()}
    lab.hub.spawn("mallory", {"profile": "evil"}, "evil")
    inside = lab.inside("mallory", "evil")
    facts, allocation = lab.hub.container("mallory", "evil"), lab.hub.allocation("mallory", "evil")
    assert facts is not None and allocation is not None
    assert facts.labels["ds01.user"] == facts.labels["aime.mlc.USER"] == facts.labels["aime.mlc"] == "mallory"
    assert facts.labels["ds01.token"] == str(allocation.token)
    assert facts.labels["note"] == facts.labels["broken"] == facts.labels["ds01.probe"] == ""
    assert not [value for value in facts.labels.values() if "," in value]
    assert facts.user == f"{inside.uid}:{inside.uid}"
    assert inside.run("cat", "/tmp/entry")[1].startswith(f"uid={inside.uid}"), "its entry point runs as the user"
    told = inside.run("sh", "-c", "echo $NVIDIA_VISIBLE_DEVICES $DS01_GPUS- $JUPYTERHUB_USER $HOME; ls /tmp/health")[1]
    assert told.splitlines()[0] == "void - mallory /home/mallory"
    assert "No such file" in told, "its health check does not run"
    snapshot = lab.hub.runtime.ledger.read_snapshot()
    assert snapshot is not None
    assert not [e for e in snapshot.external if facts.name in str(e)]
    lab.hub.halt("mallory", "evil")
    assert lab.hub.api("DELETE", "users/mallory/servers/evil", json={"remove": True}).status_code in (202, 204)
    lab.hub.wait(lambda: facts.id not in {c.id for c in lab.hub.containers()}, "its container is gone")
    assert {v["Name"] for v in lab.client.volumes()["Volumes"] or ()} <= volumes, "and its volume with it"


def test_a_probe_of_an_evil_image_is_never_taken_for_a_server_of_ours(
    lab: Lab, evil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its accounts are read there is a container of it: ours by no label, holding no GPU by no variable."""
    seen: list[str] = []
    remove = lab.client.remove_container

    def look(container: str, **options: object) -> None:
        facts = lab.hub.runtime.engine.inspect_facts(container)
        assert facts is not None
        assert not aime.is_ours(facts.labels, lab.hub.runtime.ledger.instance)
        assert aime.token_of(facts.labels, lab.hub.runtime.ledger.instance) is None
        assert facts.env["NVIDIA_VISIBLE_DEVICES"] == "void"
        seen.append(container)
        remove(container, **options)

    monkeypatch.setattr(lab.client, "remove_container", look)
    passwd, _ = read_image_accounts(lab.client, evil)
    assert "root:x:0:0" in passwd and len(seen) == 1
    made = lab.hub.runtime.engine
    monkeypatch.setattr(made, "remove", lambda container, force=False: look(container, v=True, force=force))
    assert made.read_file(evil, "/etc/passwd") == passwd.encode()
    assert len(seen) == 2


# --------------------------------------------------------------------------- other people's images


@pytest.fixture
def saved(lab: Lab) -> Iterator[ImageRecord]:
    """An image that alice's server saved, with her secret in it."""
    ledger, engine = lab.hub.runtime.ledger, lab.hub.runtime.engine
    lab.hub.add_user("alice")
    uid = ledger.uid_of("alice", lab.hub.plan.resolved().uid_range, lambda uid: False)
    base = lab.hub.plan.image
    ref = aime.kept_image(aime.private_image(base, f"main._.{uid}"), "20260102T030405")
    probe = lab.client.create_container(
        base, command=["true"], host_config=lab.client.create_host_config(network_mode="none")
    )
    repo, _, tag = ref.rpartition(":")
    image = lab.client.commit(probe["Id"], repository=repo, tag=tag, message="alice's secret")["Id"]
    lab.client.remove_container(probe["Id"])
    yield ledger.remember_image(ImageRecord(owner="alice", ref=ref, image_id=image, base_image=base, server_name=""))
    ledger.forget_image(ref, "test")
    engine.remove_image(ref)


def test_isolation_of_saved_images_by_every_name(lab: Lab, saved: ImageRecord) -> None:
    """S3: not by its name, its name's other spellings, its id or the beginning of it, whatever the policy's pattern."""
    number = saved.image_id.removeprefix("sha256:")
    repo, _, tag = saved.ref.rpartition(":")
    names = [
        saved.ref,
        f"docker.io/library/{saved.ref}",
        f"index.docker.io/library/{saved.ref}",
        f"library/{saved.ref}",
        saved.image_id,
        number,
        *(number[:length] for length in (4, 6, 12, 20, 63)),
        f"sha256:{number[:12]}",
        f"{repo}@sha256:{number}",
        f"{repo}:{tag}@sha256:{number}",
        f"{saved.ref}/../x",
        f"../{saved.ref}",
        saved.ref.upper(),
    ]
    token = lab.token("mallory")
    for name in names:
        answer = lab.as_user(token, "POST", "users/mallory/servers/thief", json={"profile": "any", "image": name})
        assert 400 <= answer.status_code < 600 and answer.status_code != 500, (name, answer.status_code, answer.text)
        assert lab.hub.container("mallory", "thief") is None
    assert not [c for c in lab.hub.containers() if c.image_id == saved.image_id]


def test_isolation_the_image_list_is_ones_own(lab: Lab, saved: ImageRecord) -> None:
    assert saved.ref in {image.ref for image in lab.hub.runtime.ledger.images_of("alice")}
    assert saved.ref not in {image.ref for image in lab.hub.runtime.ledger.images_of("mallory")}


def test_only_what_the_policy_offers_is_ever_asked_from_a_registry(lab: Lab) -> None:
    """A wish outside of the profile is refused before anybody is asked for it."""
    token = lab.token("mallory")
    base, asked = lab.hub.plan.image, lab.hub.logged("Pulling")
    for name in (
        "busybox",
        f"evil.example/{base}",
        f"evil.example:5000/{base}",
        f"{base}-evil",
        f"{base}/evil",
        "scratch",
    ):
        answer = lab.as_user(token, "POST", "users/mallory/servers/thief", json={"profile": "cpu", "image": name})
        assert answer.status_code == 403, (name, answer.text)
    assert lab.hub.logged("Pulling") == asked
