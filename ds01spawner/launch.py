"""One start, step by step, and what takes it back. Plain functions that run in threads; no Hub, no event loop.

A second spawner for another engine would reuse this order: admit (policy, quota, units in one transaction) → fetch
the image → create (folders, cgroup, container) → start (verify, activate). Whatever fails, `undo` leaves no
container that was not there before, no lease and no pending row (design, point 7).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from . import admission
from .body import HubSide, Plan, build_spec
from .containers import aime
from .containers.cgroups import Aggregate
from .containers.engine import ContainerFacts, EngineConflict, PullProgress
from .containers.host import populate_welcome, prepare_home, prepare_workspace, verify_mounted
from .containers.spec import ContainerSpec, Reuse, api_token, decide_reuse
from .errors import Code, Ds01Error, EngineError, HostError, Refusal
from .form.choice import choose
from .form.request import SpawnRequest
from .images import ImageChoice, SavedImage, choose_image, profile_image
from .keep import begin_anew, forget_missing, keep_changes, saved_images
from .ledger.records import Claim, RequestRecord
from .model import Admission, Allocation, Limits, Snapshot, Usage
from .policy.quantity import format_size
from .policy.resolve import may_log_in, offered_profiles, resolve
from .policy.schema import Policy, Profile
from .progress import CREATE, GPU, IMAGE
from .runtime import Runtime, require_isolation
from .welcome import welcome_notebook

Report = Callable[..., None]

SNAPSHOT_PATIENCE_S = 8.0
"""How long a GPU request waits for the watcher's next snapshot before it is refused as `inventory_stale`."""


@dataclass(frozen=True)
class Person:
    """A Hub user with the Hub groups of this moment."""

    name: str
    hub_groups: tuple[str, ...] = ()


class Cancelled(Ds01Error):
    """The Hub gave this start up (timeout, DELETE while pending)."""


@dataclass(frozen=True)
class Scene:
    """Everything that is known before a request is judged, read once so that one start sees one truth."""

    policy: Policy
    snapshot: Snapshot | None
    limits: Limits
    profiles: tuple[Profile, ...]
    saved: tuple[SavedImage, ...]


def look(runtime: Runtime, person: Person) -> Scene:
    """Policy, snapshot and limits of this moment.

    Raises:
        Refusal: not_allowed, when the policy does not name the user. PolicyInvalid: there never was a valid policy.
    """
    policy = runtime.policies.current()
    unix = runtime.unix_groups(person.name)
    if not may_log_in(policy, person.name, hub_groups=person.hub_groups, unix_groups=unix):
        raise Refusal(
            Code.NOT_ALLOWED,
            f"{person.name} is in no group of this server's policy. Ask the admin to be added to one.",
            facts={"user": person.name},
        )
    snapshot = runtime.ledger.read_snapshot()
    limits = resolve(
        policy,
        person.name,
        at=runtime.now(),
        hub_groups=person.hub_groups,
        unix_groups=unix,
        has_mig=snapshot is not None and snapshot.inventory.has_mig,
    )
    return Scene(policy, snapshot, limits, offered_profiles(policy, limits), saved_images(runtime, person.name))


class Launch:
    """One start. The steps are called in order, each in some thread, never two at a time.

    Attributes:
        container_id, container_name: once known. api_token: the Hub token inside a container that is used again.
        current: the future of the running step, for whoever has to wait before taking things back.
    """

    def __init__(self, runtime: Runtime, person: Person, server_name: str, report: Report) -> None:
        self.container_id = ""
        self.container_name = ""
        self.api_token: str | None = None
        self.current: asyncio.Future[Any] | None = None
        self._runtime = runtime
        self._person = person
        self._server = server_name
        self._report = report
        self._cancelled = threading.Event()
        self._held = ExitStack()
        self._made: str | None = None
        self._started = False
        self._replaced = False
        self._allocation: Allocation | None = None

    @property
    def once(self) -> tuple[str, ...]:
        """Options that were meant for this start only: to begin anew is nothing to repeat."""
        if not self._image.anew:
            return ()
        return ("fresh",) if self._image.saved is None else ("fresh", "image")

    def cancel(self) -> None:
        """Make the running step stop at its next safe point."""
        self._cancelled.set()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("The start was cancelled.")

    # ---------------------------------------------------------------- admit

    def admit(self, options: Mapping[str, Any], door: str) -> Admission:
        """Judge the request and reserve what it gets, in one transaction. Every request becomes a row.

        Raises:
            Refusal: the rules say no. Ds01Error: something is broken, and nothing was reserved.
        """
        usage: list[Usage] = []
        scene: Scene | None = None
        try:
            scene = look(self._runtime, self._person)
            admission_ = self._reserve(scene, options, door, usage)
        except Ds01Error as error:
            self._record(scene, options, door, usage, error)
            raise
        self._record(scene, options, door, usage, None)
        return admission_

    def _reserve(self, scene: Scene, options: Mapping[str, Any], door: str, usage: list[Usage]) -> Admission:
        runtime = self._runtime
        self._account = runtime.account(self._person.name)
        self.container_name = aime.container_name(self._server, self._account.uid)
        request = SpawnRequest.parse(options, server_name=self._server, door=door)
        profile, size = choose(request, scene.profiles)
        default = profile_image(profile, runtime.newest_image(scene.snapshot))
        self._image = choose_image(request, profile, default, scene.saved)
        if (request.gpu or size.gpu.ask()).count:
            self._report(GPU, "Choosing a GPU")
            scene = replace(scene, snapshot=self._fresh_snapshot(scene.snapshot))
        self._scene, self._profile, self._request = scene, profile, request

        def decide(held: Usage) -> Admission:
            usage[:] = [held]
            return admission.check(
                request, profile, size, self._image.base, scene.limits, held, scene.snapshot, runtime.now()
            )

        claim = Claim(self._person.name, self._server, scene.limits.group, scene.limits.groups, self._account.uid)
        granted: list[Admission] = []

        def grant(held: Usage) -> Admission:
            granted[:] = [decide(held)]
            return granted[0]

        self._allocation = runtime.ledger.reserve(claim, grant)
        self._held.enter_context(runtime.ledger.operation(self._allocation.id, "start", runtime.who))
        self._admission = granted[0]
        labels = ", ".join(f"{unit.mig_profile or unit.model} ({unit.label})" for unit in self._admission.units)
        self._report(GPU, f"Reserved for you: {labels}" if labels else "No GPU asked for")
        for note in self._admission.notes:
            self._report(GPU, note)
        return self._admission

    def _fresh_snapshot(self, snapshot: Snapshot | None) -> Snapshot | None:
        """A fresh picture of the GPUs, waiting a little for it: a Hub that just started has its watcher starting."""
        deadline = time.monotonic() + SNAPSHOT_PATIENCE_S
        while (snapshot is None or snapshot.stale(self._runtime.now())) and time.monotonic() < deadline:
            self._report(GPU, "Waiting for news of the GPUs")
            time.sleep(0.5)
            self._check()
            snapshot = self._runtime.ledger.read_snapshot()
        return snapshot

    def _record(
        self,
        scene: Scene | None,
        options: Mapping[str, Any],
        door: str,
        usage: list[Usage],
        error: Ds01Error | None,
    ) -> None:
        outcome = "granted" if error is None else "refused" if isinstance(error, Refusal) else "failed"
        self._runtime.ledger.record_request(
            RequestRecord(
                user=self._person.name,
                server_name=self._server,
                door=door,
                outcome=outcome,  # type: ignore[arg-type]
                request=dict(options),
                group=scene.limits.group if scene else None,
                groups=scene.limits.groups if scene else (),
                usage=usage[0] if usage else None,
                policy_hash=scene.policy.hash if scene else "",
                inventory_hash=scene.snapshot.inventory.fingerprint if scene and scene.snapshot else "",
                code=error.code.value if error else "",
                message=error.message if error else "",
                allocation_id=self._allocation.id if self._allocation else None,
            )
        )

    # ---------------------------------------------------------------- image

    def fetch_image(self) -> None:
        """Make sure that the image is on this machine; tells bytes while pulling.

        Raises:
            EngineError: image_missing or Docker away.
        """
        self._check()
        engine, saved = self._runtime.engine, self._image.saved
        facts = engine.image_facts(self._image.source)
        if facts is None and saved is not None:
            self._report(IMAGE, f"{saved.ref}, which you had saved, is gone; starting from {self._image.base}")
            forget_missing(self._runtime, saved)
            self._image = ImageChoice(self._image.base, self._image.base)
            facts = engine.image_facts(self._image.base)
        if facts is None:
            self._report(IMAGE, f"Fetching {self._image.source}")
            facts = engine.pull(self._image.source, self._pulled)
            self._check()
        self._facts = facts
        base = facts if self._image.saved is None else engine.image_facts(self._image.base)
        # The base may have been pruned since: a saved image goes on without it.
        self._base_id = base.id if base else ""
        self._report(IMAGE, f"Image {self._image.base} is here", fraction=1.0)

    def _pulled(self, progress: PullProgress) -> None:
        self._check()
        done, total = format_size(progress.done), format_size(progress.total)
        text = f"Fetching {self._image.source}: {done} of {total}, {progress.layers_done} of {progress.layers} layers"
        self._report(IMAGE, text, fraction=progress.done / progress.total if progress.total else 0.0)

    # ---------------------------------------------------------------- create

    def create(self, hub: HubSide) -> None:
        """Folders, accounts, cgroup parent, then the container: used again, changed in place, or made anew.

        Raises:
            HostError: a folder or limit cannot be had. Refusal: name_taken, disk_full. EngineError.
        """
        self._check()
        runtime, account, allocation = self._runtime, self._account, self._must()
        require_isolation(runtime)
        home = prepare_home(runtime.settings.homes, account.uid, account.gid, account.name)
        self._workspace = prepare_workspace(
            runtime.settings.workspaces, account.uid, account.gid, self._request.project
        )
        notebook = welcome_notebook(account.name, self._admission.units)
        populate_welcome(self._workspace, notebook, account.uid, account.gid)
        limits = self._scene.limits
        parent = runtime.cgroups.ensure(limits.group, limits.user, Aggregate.of(limits))
        for note in parent.notes:
            self._report(CREATE, note)
        files = runtime.accounts.write(runtime.engine.client, self._facts.id, account)
        self._home = home
        plan = Plan(
            admission=self._admission,
            profile=self._profile,
            account=account,
            image=self._image,
            image_facts=self._facts,
            base_id=self._base_id,
            container_name=self.container_name,
            server_name=self._server,
            token=allocation.token,
            home=home,
            workspace=self._workspace,
            files=files,
            cgroup_parent=parent.path,
        )
        self._check()
        self._create_or_reuse(hub, plan)

    def _create_or_reuse(self, hub: HubSide, plan: Plan) -> None:
        runtime = self._runtime
        old = runtime.engine.inspect_facts(self.container_name)
        if old is not None:
            self._require_own(old)
            spec = build_spec(runtime, hub, plan)
            reuse = decide_reuse(old, self._must().spec_hash, spec)
            if reuse in (Reuse.START, Reuse.UPDATE) and not plan.image.leaves(old.image_id):
                self._use_again(old, spec, reuse)
                return
            plan = self._replace(old, plan)
        token = runtime.ledger.renew_token(self._must().id, actor=runtime.who)
        spec = build_spec(runtime, hub, plan.with_token(token))
        for key in spec.ignored:
            self._report(CREATE, key)
        runtime.engine.tag(plan.image_facts.id, plan.private_image)
        self._check()
        self._made = self._create(spec)
        self.container_id = self._made
        self._bind(spec)
        if plan.image.anew:
            begin_anew(runtime, self._person.name, self._server, self.container_name, plan.image)

    def _create(self, spec: ContainerSpec) -> str:
        try:
            return self._runtime.engine.create(spec.name, spec.config)
        except EngineConflict as error:
            raise Refusal(
                Code.NAME_TAKEN,
                f"A container called {spec.name} appeared on this machine meanwhile. Please try again; if it stays, "
                "ask the admin whose it is.",
                facts={"container": spec.name},
            ) from error

    def _require_own(self, old: ContainerFacts) -> None:
        if not aime.is_ours(old.labels, self._runtime.ledger.instance):
            raise Refusal(
                Code.NAME_TAKEN,
                f"A container called {self.container_name} is already on this machine and was not made by this Hub; "
                "it is left alone. Give your server another name, or ask the admin to rename that container.",
                facts={"container": self.container_name, "image": old.image_ref},
            )
        if old.running:
            # Docker started it behind our back: nobody may use it as it is (design, point 1).
            self._runtime.engine.stop(old.id)

    def _use_again(self, old: ContainerFacts, spec: ContainerSpec, reuse: Reuse) -> None:
        self.container_id, self.api_token = old.id, api_token(old)
        if reuse is Reuse.UPDATE:
            self._report(CREATE, "Your container gets its new limits")
            self._runtime.engine.update(old.id, spec.update)
        else:
            self._report(CREATE, "Your container is used again as it is")
        self._bind(spec)

    def _replace(self, old: ContainerFacts, plan: Plan) -> Plan:
        """Save what the old container changed outside the mounts, then remove it."""
        self._report(CREATE, "Your container is made anew; changes outside your folders are being saved first")
        same_base = old.labels.get(aime.LABEL_IMAGE, "") == aime.clean(plan.image.base)
        limit = self._scene.limits["max_container_disk"]
        kept = keep_changes(self._runtime, self._person.name, self._server, old, max_size=limit)
        self._check()
        self._runtime.engine.remove(old.id)
        self._replaced = True
        if kept is None or not same_base or plan.image.leaves(old.image_id):
            return plan
        facts = self._runtime.engine.image_facts(kept.ref)
        return plan if facts is None else plan.from_saved(kept, facts)

    def _bind(self, spec: ContainerSpec) -> None:
        self._runtime.ledger.bind(
            self._must().id,
            container_id=self.container_id,
            container_name=self.container_name,
            image=str(spec.config["Image"]),
            spec_hash=spec.hash,
            actor=self._runtime.who,
        )

    # ---------------------------------------------------------------- start

    def start(self) -> str:
        """Start the container, verify what it got, and only then call the allocation active.

        Returns:
            The address at which the server will answer.

        Raises:
            EngineError: it did not start. HostError: device_mismatch or storage_refused.
        """
        self._check()
        engine = self._runtime.engine
        self._started = True
        engine.start(self.container_id)
        facts = engine.inspect_facts(self.container_id)
        if facts is None or not facts.running:
            raise EngineError(self._died(facts), code=Code.INTERNAL)
        self._verify(facts)
        self._check()
        self._runtime.ledger.activate(self._must().id, actor=self._runtime.who)
        self._held.close()
        if self._runtime.settings.network_mode == "host":
            return "127.0.0.1"
        return facts.networks[self._runtime.network]

    def _died(self, facts: ContainerFacts | None) -> str:
        if facts is None:
            return "The container vanished while it was being started. Please try again."
        tail = self._runtime.engine.logs(facts.id, lines=20).strip()
        why = " It ran out of memory." if facts.oom_killed else ""
        return f"The container ended at once (exit code {facts.exit_code}).{why} Its last words: {tail or 'none'}"

    def _verify(self, facts: ContainerFacts) -> None:
        """Devices and folders are the ones that were meant (design, data flow; T-resistant against swapped paths)."""
        wanted = {unit.uuid for unit in self._admission.units}
        found = held_units(facts)
        if found != wanted:
            raise HostError(
                "The container did not get exactly the GPUs that were reserved for it, so it was not started. "
                "Please tell the admin.",
                code=Code.DEVICE_MISMATCH,
                facts={"reserved": sorted(wanted), "found": sorted(found)},
            )
        verify_mounted(facts.pid, "/workspace", self._workspace)
        verify_mounted(facts.pid, self._account.home, self._home)

    # ---------------------------------------------------------------- undo

    def undo(self, error: BaseException) -> None:
        """Take everything back, whatever point the start died at. What cannot be taken back now is left marked
        as reserved or held in the ledger, for the reconciler; a unit is never freed on hope."""
        with self._held:
            if self._allocation is None:
                return
            reason = f"start failed: {error.code.value if isinstance(error, Ds01Error) else type(error).__name__}"
            self._clear_container()
            allocation = self._runtime.ledger.get(self._allocation.id)
            if allocation is None:
                return
            if self._made or self._replaced:
                # The container that the allocation stood for is gone; its saved changes are in the image list.
                self._runtime.ledger.release(allocation.id, reason, actor=self._runtime.who)
            elif allocation.state.value == "active":
                self._runtime.ledger.hold(allocation.id, until=None, reason=reason, actor=self._runtime.who)
            elif allocation.state.value == "reserved":
                self._runtime.ledger.rollback(allocation.id, reason, actor=self._runtime.who)

    def _clear_container(self) -> None:
        engine = self._runtime.engine
        if self._made is not None:
            engine.remove(self._made, force=True)
        elif self._started:
            engine.stop(self.container_id, timeout=5)
        if self._made is None and not self._started:
            # A create that was still under way when it was given up may have come through all the same.
            self._remove_unbound()

    def _remove_unbound(self) -> None:
        found = self._runtime.engine.inspect_facts(self.container_name) if self.container_name else None
        instance = self._runtime.ledger.instance
        if found is None or not aime.is_ours(found.labels, instance):
            return
        allocation = self._runtime.ledger.get(self._must().id)
        token = aime.token_of(found.labels, instance)
        if allocation is not None and token == allocation.token and allocation.container_id != found.id:
            self._runtime.engine.remove(found.id, force=True)
            self._made = found.id

    def _must(self) -> Allocation:
        if self._allocation is None:
            raise Ds01Error("The start has not been admitted.")
        return self._allocation


def held_units(facts: ContainerFacts) -> set[str]:
    """Units that a container of ours was created with, by uuid, whichever way they reach it."""
    from .containers.spec import CDI_KIND, simulated_unit

    found = {unit for node in facts.devices if (unit := simulated_unit(node.container)) is not None}
    for request in facts.device_requests:
        found |= {name.removeprefix(f"{CDI_KIND}=") for name in request.device_ids}
        if request.count:
            found.add(f"count {request.count}")
    return found
