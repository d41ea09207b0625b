"""One start, step by step. Plain functions that run in threads; no Hub, no event loop.

A second spawner for another engine would reuse this order: admit (policy, quota, units in one transaction) → fetch
the image → create (folders, cgroup, container) → start (verify, activate) → finish. Whatever fails, `take_back`
leaves no container that was not there before, no lease and no pending row (design, point 7).
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from typing import Any

from . import admission, servers, undo
from .body import HubSide, Plan, build_spec, require_folders, require_limits
from .containers import aime
from .containers.cgroups import Aggregate
from .containers.commit import disk_use
from .containers.engine import ContainerFacts, EngineConflict, PullProgress
from .containers.host import populate_welcome, prepare_home, prepare_workspace
from .containers.spec import ContainerSpec, Reuse, api_token, decide_reuse
from .errors import Busy, Code, Ds01Error, EngineError, Refusal
from .form.choice import choose
from .form.request import SpawnRequest
from .images import ImageChoice, choose_image, profile_image
from .keep import begin_anew, forget_missing, keep_changes, require_permitted
from .ledger.operations import Operation
from .ledger.records import Claim
from .model import Admission, Allocation, Snapshot, State, Usage
from .policy.quantity import format_size
from .progress import CREATE, GPU, IMAGE, QUOTA
from .runtime import Runtime, require_isolation
from .scene import Asking, Person, look
from .spawn_page import with_offers
from .undo import Trail
from .verify import address_of, last_words, parent_full, require_running, verify
from .welcome import welcome_notebook

log = logging.getLogger("ds01.launch")

Report = Callable[..., None]

SNAPSHOT_PATIENCE_S = 8.0
"""How long a GPU request waits for the watcher's next snapshot before it is refused as `inventory_stale`."""
PATIENCE_S = 120.0
"""How long a start waits for another hand at the same server's container (a commit of gigabytes takes that long)."""
DISK_WARN = 0.8
"""Part of `max_container_disk` from which on its owner is told."""


class Cancelled(Ds01Error):
    """The Hub gave this start up (timeout, DELETE while pending)."""


class Launch:
    """One start. The steps are called in order, each in some thread, never two at a time.

    Attributes:
        container_id, container_name: once known. api_token: the Hub token inside a container that is used again.
        current: the future of the running step, for `take_back` to wait for.
    """

    def __init__(self, runtime: Runtime, person: Person, server_name: str, report: Report) -> None:
        self.api_token: str | None = None
        self.current: concurrent.futures.Future[Any] | None = None
        self._runtime = runtime
        self._person = person
        self._server = server_name
        self._report = report
        self._cancelled = threading.Event()
        self._held = ExitStack()
        self._operation: Operation | None = None
        self._trail = Trail()
        self._claimed_at: datetime | None = None
        self._finished = False

    @property
    def container_id(self) -> str:
        """The container of this start; "" before there is one."""
        return self._trail.container

    @property
    def container_name(self) -> str:
        """Its name; "" before it is known."""
        return self._trail.container_name

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
        """Stop here if the start was given up, or if another hand took it for dead and works on the container."""
        if self._cancelled.is_set():
            raise Cancelled("The start was cancelled.")
        if self._operation is not None:
            self._operation.check()

    # ---------------------------------------------------------------- admit

    def admit(self, options: Mapping[str, Any], door: str) -> Admission:
        """Judge the request and reserve what it gets, in one transaction. Every request becomes a row.

        Raises:
            Refusal: the rules say no. Ds01Error: something is broken. What was reserved is for `take_back`.
        """
        asking = Asking(self._person, self._server, door, options)
        try:
            granted = self._reserve(asking)
            require_folders(granted.mounts)
        except Refusal as refusal:
            asking.write(self._runtime, refusal)
            raise with_offers(self._runtime, refusal, asking.scene, self._person, self._server) from refusal
        except Exception as error:
            asking.write(self._runtime, error)
            raise
        asking.write(self._runtime, None)
        labels = ", ".join(f"{unit.mig_profile or unit.model} ({unit.label})" for unit in granted.units)
        self._report(GPU, f"Reserved for you: {labels}" if labels else "No GPU asked for")
        for note in granted.notes:
            self._report(GPU, note)
        return granted

    def _reserve(self, asking: Asking) -> Admission:
        runtime = self._runtime
        scene = asking.scene = look(runtime, self._person)
        request = SpawnRequest.parse(asking.options, server_name=self._server, door=asking.door)
        self._account = runtime.account(self._person.name)
        self._trail.container_name = aime.container_name(self._server, self._account.uid)
        profile, size = choose(request, scene.profiles)
        default = profile_image(profile, runtime.newest_image(scene.snapshot))
        self._image = choose_image(request, profile, default, scene.saved)
        if (request.gpu or size.gpu.ask()).count:
            self._report(GPU, "Choosing a GPU")
            scene = asking.scene = replace(scene, snapshot=self._fresh_snapshot(scene.snapshot))
        self._scene, self._profile, self._request = scene, profile, request
        granted: list[Admission] = []

        def decide(held: Usage) -> Admission:
            asking.usage = held
            found = admission.check(
                request, profile, size, self._image.base, scene.limits, held, scene.snapshot, runtime.now()
            )
            require_limits(found)
            granted[:] = [found]
            return found

        claim = Claim(self._person.name, self._server, scene.limits.group, scene.limits.groups, self._account.uid)
        allocation = self._reserve_alone(claim, decide)
        self._trail.allocation, asking.allocation_id = allocation, allocation.id
        self._admission = granted[0]
        return self._admission

    def _reserve_alone(self, claim: Claim, decide: Callable[[Usage], Admission]) -> Allocation:
        """Reserve while no other hand is at this server: the row is taken before, where the server has one yet, so
        that nobody can mistake the fresh reservation for a leftover."""
        ledger = self._runtime.ledger
        before = ledger.find(claim.user, claim.server_name)
        if before is not None:
            self._take_operation(before.id)
            before = ledger.find(claim.user, claim.server_name)
        self._trail.before, self._claimed_at = before, self._runtime.now()
        allocation = ledger.reserve(claim, decide)
        if before is None or before.id != allocation.id:
            self._take_operation(allocation.id)
        return allocation

    def _take_operation(self, allocation_id: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self._check()
            try:
                ledger = self._runtime.ledger
                self._operation = self._held.enter_context(ledger.operation(allocation_id, "start", self._runtime.who))
                return
            except Busy as busy:
                if time.monotonic() >= deadline:
                    raise
                self._report(QUOTA, f"Waiting for the end of “{busy.facts.get('what', 'work')}” on your container")
            time.sleep(0.25)

    def _fresh_snapshot(self, snapshot: Snapshot | None) -> Snapshot | None:
        """A fresh picture of the GPUs, waiting a little for it: a Hub that just started has its watcher starting."""
        deadline = time.monotonic() + SNAPSHOT_PATIENCE_S
        while (snapshot is None or snapshot.stale(self._runtime.now())) and time.monotonic() < deadline:
            self._report(GPU, "Waiting for news of the GPUs")
            time.sleep(0.5)
            self._check()
            snapshot = self._runtime.ledger.read_snapshot()
        return snapshot

    # ---------------------------------------------------------------- image

    def fetch_image(self, policy: str = "ifnotpresent") -> None:
        """Make sure that the image is on this machine; tells bytes while pulling.

        Args:
            policy: DockerSpawner's `pull_policy`: ifnotpresent, always, never, skip. A saved image is never pulled.

        Raises:
            EngineError: image_missing or Docker away. Refusal: image_not_allowed.
        """
        self._check()
        engine, saved = self._runtime.engine, self._image.saved
        facts = engine.image_facts(self._image.source)
        if facts is None and saved is not None:
            self._report(IMAGE, f"{saved.ref}, which you had saved, is gone; starting from {self._image.base}")
            forget_missing(self._runtime, saved)
            self._image = ImageChoice(self._image.base, self._image.base, anew=self._image.anew)
            facts, saved = engine.image_facts(self._image.base), None
        if saved is None and (policy == "always" or (facts is None and policy == "ifnotpresent")):
            self._report(IMAGE, f"Fetching {self._image.source}")
            facts = engine.pull(self._image.source, self._pulled)
            self._check()
        if facts is None:
            raise EngineError(
                f"Image {self._image.source} is not on this server, and pull_policy says that it is never fetched.",
                code=Code.IMAGE_MISSING,
            )
        require_permitted(self._runtime, self._person.name, self._image.source, facts)
        self._facts = facts
        base = facts if saved is None else engine.image_facts(self._image.base)
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
            fits = reuse in (Reuse.START, Reuse.UPDATE) and not plan.image.leaves(old.image_id)
            if fits and hub.token_lives(api_token(old) or ""):
                self._use_again(old, spec, reuse)
                return
            plan = self._replace(old, plan)
        token = runtime.ledger.renew_token(self._must().id, actor=runtime.who)
        spec = build_spec(runtime, hub, plan.with_token(token))
        for key in spec.ignored:
            self._report(CREATE, key)
        runtime.engine.tag(plan.image_facts.id, plan.private_image)
        self._check()
        self._trail.tried = True
        self._trail.made = self._trail.container = self._create(spec)
        self._bind(spec)
        if plan.image.saved is not None:
            runtime.ledger.touch_image(plan.image.saved.ref)
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
        """Refuse a container that is not this very server's; stop one that runs although its Hub does not know."""
        runtime = self._runtime
        ours = aime.is_ours(old.labels, runtime.ledger.instance)
        if not ours or old.labels.get(aime.LABEL_USER) != aime.clean(self._person.name):
            raise Refusal(
                Code.NAME_TAKEN,
                f"A container called {self.container_name} is already on this machine and "
                f"{'belongs to another user' if ours else 'was not made by this Hub'}; it is left alone. Give your "
                "server another name, or ask the admin to rename that container.",
                facts={"container": self.container_name, "image": old.image_ref},
            )
        if not old.may_run:
            return
        token = aime.token_of(old.labels, runtime.ledger.instance)
        if token is None or runtime.ledger.by_token(token) is None:
            # The ledger is older than the container (a backup was restored): nothing proves that it may be stopped.
            raise Refusal(
                Code.BUSY,
                f"Your container {self.container_name} is running, but this Hub's records do not know it. Save your "
                "work in it and ask the admin to stop it; then start your server again.",
                facts={"container": self.container_name, "token": token},
            )
        # The Hub lost it, or Docker started it behind our back: nobody may use it as it is (design, point 1).
        self._report(CREATE, "Your container was still running; it is being stopped first")
        runtime.engine.stop(old.id, timeout=servers.grace_seconds(self._must()))

    def _use_again(self, old: ContainerFacts, spec: ContainerSpec, reuse: Reuse) -> None:
        self._trail.container, self.api_token = old.id, api_token(old)
        if reuse is Reuse.UPDATE:
            self._report(CREATE, "Your container gets its new limits")
            self._runtime.engine.update(old.id, spec.update)
        else:
            self._report(CREATE, "Your container is used again as it is")
        self._bind(spec)

    def _replace(self, old: ContainerFacts, plan: Plan) -> Plan:
        """Save what the old container changed outside the mounts, then remove it."""
        self._report(CREATE, "Your container is made anew; your files stay")
        same_base = old.labels.get(aime.LABEL_IMAGE, "") == aime.clean(plan.image.base)
        limit = self._scene.limits["max_container_disk"]
        kept = keep_changes(self._runtime, self._person.name, self._server, old, max_size=limit)
        self._check()
        self._runtime.engine.remove(old.id)
        self._trail.replaced = True
        if kept is None:
            return plan
        self._report(CREATE, "What you had changed outside your folders was saved")
        kept.tidy(self._runtime)
        if not same_base or plan.image.leaves(old.image_id):
            return plan
        facts = self._runtime.engine.image_facts(kept.image.ref)
        return plan if facts is None else plan.from_saved(kept.image, facts)

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
            EngineError: it did not start. Refusal: no memory or process is left to this user.
            HostError: device_mismatch or storage_refused.
        """
        self._check()
        runtime = self._runtime
        self._trail.started = True
        try:
            runtime.engine.start(self.container_id)
            facts = require_running(runtime, self.container_id)
        except EngineError as error:
            refusal = parent_full(runtime, self._scene.limits, error)
            if refusal is None:
                raise
            raise refusal from error
        folders = {"/workspace": self._workspace, self._account.home: self._home}
        verify(runtime, facts, self._admission, folders)
        self._check()
        address = address_of(runtime, facts)
        runtime.ledger.activate(self._must().id, actor=self._runtime.who)
        return address

    def require_running(self) -> None:
        """Return while the container runs.

        Raises:
            EngineError: it has ended; with its last words.
        """
        self._check()
        require_running(self._runtime, self.container_id)

    def never_answered(self, seconds: float) -> EngineError:
        """The error for a server that runs and does not answer."""
        words = last_words(self._runtime, self.container_id)
        return EngineError(
            f"Your server started but did not answer within {seconds:.0f} seconds. {words}", code=Code.INTERNAL
        )

    def disk_note(self) -> str:
        """A sentence when a container that is used again nears its `max_container_disk`; "" otherwise. Docker walks
        the container's files for it, so it is asked beside the start and never in its way."""
        limit = self._scene.limits["max_container_disk"]
        if limit is None or self._trail.made is not None:
            return ""
        facts = self._runtime.engine.inspect_facts(self.container_id)
        if facts is None:
            return ""
        use = disk_use(self._runtime.engine, facts, self._image.base)
        if use.total < DISK_WARN * limit:
            return ""
        return (
            f"Your container has {format_size(use.total)} outside your folders; {format_size(limit)} can be kept. "
            "Move what you need to your folders: with more than that it cannot be made anew."
        )

    def finish(self) -> None:
        """The server answered: this start is over."""
        self._check()
        self._finished = True
        self._held.close()

    # ---------------------------------------------------------------- undo

    def take_back(self, error: BaseException) -> None:
        """Take everything back; waits for the running step first. Never raises: what is left is the reconciler's."""
        self.cancel()
        if self.current is not None and not self.current.cancel():
            concurrent.futures.wait([self.current])
        reason = f"start failed: {error.code.value if isinstance(error, Ds01Error) else type(error).__name__}"
        try:
            with self._held:
                self._find_reservation()
                if self._trail.allocation is not None and (self._finished or self._operation is None):
                    again = servers.operation(self._runtime, self._trail.allocation, "take back")
                    self._held.enter_context(again)
                undo.take_back(self._runtime, self._trail, reason)
        except Ds01Error as left:
            log.warning("%s: the watcher has to take back the rest of a start: %s", self.container_name, left.message)
        except Exception:
            log.exception("%s: the watcher has to take back the rest of a start", self.container_name)

    def _find_reservation(self) -> None:
        """A reservation that was written although its answer never came back is this start's as well."""
        if self._trail.allocation is not None or self._claimed_at is None:
            return
        found = self._runtime.ledger.find(self._person.name, self._server)
        if found is not None and found.state is State.RESERVED and found.reserved_at is not None:
            self._trail.allocation = found if found.reserved_at >= self._claimed_at else None

    def _must(self) -> Allocation:
        if self._trail.allocation is None:
            raise Ds01Error("The start has not been admitted.")
        return self._trail.allocation
