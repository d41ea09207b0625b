"""An installation on the machine's Docker for tests of the reconciler, with the time of the real world."""

from __future__ import annotations

import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from reconcile_world import World
from tiny_image import TINY_TAG

from ds01spawner.containers import aime
from ds01spawner.containers.engine import Engine
from ds01spawner.containers.facts import ContainerFacts
from ds01spawner.containers.spec import SIMULATED_FOLDER, SIMULATED_HOST_NODE
from ds01spawner.errors import EngineError
from ds01spawner.model import Allocation

SLEEP = ["sleep", "600"]


@dataclass
class DockerWorld(World):
    """Containers of busybox without a network; their names end in something that no other test has."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def make_engine(self) -> Engine:
        return Engine()

    def clock(self) -> datetime:
        """The real time, and what the test added to it."""
        return datetime.now(timezone.utc) + self.ahead

    ahead: timedelta = timedelta()

    def turn(self, **parts: float) -> None:
        self.ahead += timedelta(**parts)

    # ------------------------------------------------------------- what the Hub does

    def create(self, allocation: Allocation, *units: str) -> str:
        token = self.ledger.renew_token(allocation.id)
        name = f"dstest-{allocation.user}-{self.mark}"
        private = aime.private_image(TINY_TAG, name)
        labels = aime.labels(
            aime.LabelInput(allocation.user, allocation.user, "main", self.ledger.instance, token, TINY_TAG)
        )
        nodes = [
            {"PathOnHost": SIMULATED_HOST_NODE, "PathInContainer": SIMULATED_FOLDER + unit, "CgroupPermissions": "rw"}
            for unit in units
        ]
        self.engine.tag(TINY_TAG, private)
        host = {"Devices": nodes, "NetworkMode": "none", "Init": True}
        body = {"Image": private, "Cmd": SLEEP, "Labels": labels, "HostConfig": host}
        return str(self.engine.create(name, body))

    def start(self, user: str = "alice", *units: str) -> Allocation:
        allocation = self.reserve(user, *units)
        made = self.create(allocation, *units)
        self.bind(allocation, made)
        self.engine.start(made)
        return self.ledger.activate(allocation.id)

    def hold(self, allocation: Allocation, **until: float) -> Allocation:
        self.engine.stop(allocation.container_id or "", timeout=1)
        end = self.clock() + timedelta(**until) if until else None
        return self.ledger.hold(allocation.id, until=end, reason="stopped")

    # ------------------------------------------------------------- what is really there

    def facts(self, allocation: Allocation) -> ContainerFacts:
        """The container of an allocation, asked now."""
        found = self.engine.inspect_facts(self.again(allocation).container_id or "-")
        assert isinstance(found, ContainerFacts)
        return found

    def ours(self) -> dict[str, ContainerFacts]:
        """All containers of this installation by id."""
        mine = (c for c in self.engine.list_facts() if c.labels.get(aime.LABEL_INSTANCE) == self.ledger.instance)
        return {c.id: c for c in mine}

    def running(self) -> set[str]:
        """Ids of those that run."""
        return {key for key, facts in self.ours().items() if facts.running}

    def clear(self) -> None:
        """Remove every container and image of this installation, and close it."""
        with suppress(EngineError):
            for facts in self.ours().values():
                self.engine.remove(facts.id, force=True)
            for row in self.engine.client.images(TINY_TAG.partition(":")[0]):
                for tag in row["RepoTags"] or ():
                    if self.mark in tag:
                        self.engine.remove_image(tag)
        self.close()
