"""DS01Spawner: the glue between the Hub's life cycle and the start path. The only file that knows DockerSpawner.

Everything that decides or touches Docker is in `launch` and `servers`; this class keeps to the Hub's contract: which
hook is called when, what survives a restart, and how a refusal reaches a person (traps T1..T21 of the JupyterHub
facts are named where they are handled).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dockerspawner import DockerSpawner
from tornado import web
from traitlets import Unicode, default

from . import servers
from .body import HubSide
from .containers import aime
from .errors import Code, Ds01Error, Refusal
from .form.request import SpawnRequest, options_from_form, options_from_query
from .launch import Launch, Person
from .progress import ANSWER, CREATE, IMAGE, QUEUE, QUOTA, READY, START, ProgressLog
from .runtime import Runtime
from .servers import Ended
from .spawn_page import spawn_form

try:  # JupyterHub 6
    from jupyterhub.spawner import SpawnException as _SpawnException
except ImportError:  # JupyterHub 5
    _SpawnException = None

T = TypeVar("T")


def spawn_error(error: Ds01Error) -> web.HTTPError:
    """`error` as the exception that the Hub shows on the form, in the progress stream and on REST (trap T12).

    JupyterHub 6.1 reads only `jupyterhub_message` on the pages, so it is set besides SpawnException's own fields.
    """
    text = error.sentence() if isinstance(error, Refusal) else error.message
    refused: web.HTTPError
    if _SpawnException is not None:
        refused = _SpawnException(text, reason=error.code.value, status_code=error.http_status)
    else:
        refused = web.HTTPError(error.http_status, text.replace("%", "%%"), reason=error.code.value)
    vars(refused).update(jupyterhub_message=text, ds01_error=error)
    return refused


class DS01Spawner(DockerSpawner):  # type: ignore[misc]  # dockerspawner has no types
    """Starts each server as a container with exactly what the policy grants its owner."""

    settings_file = Unicode(
        config=True,
        help="""Path of the installation's settings, as `ds01spawner.setup(c)` wrote them.""",
    )

    _runtimes: ClassVar[dict[str, Runtime]] = {}
    _opening: ClassVar[threading.Lock] = threading.Lock()

    # ---------------------------------------------------------------- parts

    @property
    def runtime(self) -> Runtime:
        """The process's one Runtime for these settings (ledger, Docker, policy, threads)."""
        return self.runtime_of(self.settings_file)

    @classmethod
    def runtime_of(cls, settings_file: str) -> Runtime:
        """The Runtime of an installation, opened at the first call."""
        with cls._opening:
            found = cls._runtimes.get(settings_file)
            if found is None:
                found = cls._runtimes[settings_file] = Runtime.open(Path(settings_file), role="hub")
            return found

    @property
    def executor(self) -> Any:
        """DockerSpawner's own calls use our pool: its single thread would let one slow call block all (trap T1)."""
        return self.runtime.threads

    @property
    def client(self) -> Any:
        """One Docker client per thread (docker-py's is not thread-safe)."""
        return self.runtime.engine.client

    @property
    def person(self) -> Person:
        """Who starts: the Hub user with the Hub groups of this moment."""
        return Person(self.user.name, tuple(sorted(group.name for group in self.user.groups)))

    async def _thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.runtime.threads, function, *args)

    # ---------------------------------------------------------------- names

    @default("name_template")
    def _default_name_template(self) -> str:
        return "{ds01_name}"

    def template_namespace(self) -> dict[str, Any]:
        namespace: dict[str, Any] = super().template_namespace()
        namespace["ds01_name"] = self._launch.container_name if self._launch else self._known_name
        return namespace

    _launch: Launch | None = None
    _known_name: str = "unnamed"
    _log: ProgressLog | None = None
    _options_error: Ds01Error | None = None
    _ended: bool = False

    # ---------------------------------------------------------------- the form

    @default("options_form")
    def _default_options_form(self) -> Any:
        return DS01Spawner._render_form

    async def _render_form(self) -> str:
        return await self._thread(spawn_form, self.runtime, self.person, self.name)

    @default("options_from_form")
    def _default_options_from_form(self) -> Any:
        return options_from_form

    def options_from_query(self, query_data: Mapping[str, Any]) -> dict[str, Any]:
        """`GET /hub/spawn?opt-size=…`: the same fields, and nothing but those (trap T10)."""
        return options_from_query(query_data)

    @default("apply_user_options")
    def _default_apply_user_options(self) -> Any:
        """The one door for form, query, REST and stale options (traps T10, T11)."""
        return DS01Spawner._check_options

    def _check_options(self, user_options: Mapping[str, Any]) -> None:
        try:
            SpawnRequest.parse(user_options, server_name=self.name, door=self._door)
        except Ds01Error as error:
            raise spawn_error(error) from error

    @property
    def _door(self) -> str:
        handler = getattr(self, "handler", None)
        if handler is None:
            return "admin"
        if "/api/" in handler.request.path:
            return "rest"
        return "form" if handler.request.method == "POST" else "query"

    # ---------------------------------------------------------------- start

    async def start(self) -> tuple[str, int]:
        """Admit, fetch the image, create, start, verify; or leave nothing behind (design, point 7)."""
        runtime = self.runtime
        log = self._log = ProgressLog(asyncio.get_running_loop())
        self._ended = False
        self.object_id = ""
        job = self._launch = Launch(runtime, self.person, self.name, log.add)
        queued = False
        try:
            log.add(QUOTA, "Checking your quota")
            await self._step(job, job.admit, dict(self.user_options or {}), self._door)
            log.add(IMAGE, "Looking for the image")
            await self._step(job, job.fetch_image, pool=runtime.pulls)
            log.add(QUEUE, "Waiting for a free start slot")
            await runtime.starts.enter(log)
            queued = True
            log.add(CREATE, "Preparing folders, limits and the container")
            await self._step(job, job.create, self._hub_side())
            self.object_id, self.object_name = job.container_id, job.container_name
            if job.api_token:
                self.api_token = job.api_token
            log.add(START, "Starting the container")
            address = await self._step(job, job.start)
            if job.once:  # the Hub keeps the options for starts that name none (REST without a body, its admin page)
                self.orm_spawner.user_options = {k: v for k, v in self.user_options.items() if k not in job.once}
            log.add(ANSWER, "Jupyter is starting; waiting for its first answer")
            if queued:
                self._release_slot_when_answered()
                queued = False
            return address, self.port
        except BaseException as error:
            # A timeout and a DELETE while pending arrive as CancelledError (trap T6), so nothing less will do.
            # Neither stop() nor poll() is called for a start that failed (trap T5): all is taken back here.
            if queued:
                runtime.starts.leave()
            await asyncio.shield(asyncio.ensure_future(self._undo(job, error)))
            if isinstance(error, Ds01Error):
                raise spawn_error(error) from error
            raise

    async def _step(self, job: Launch, step: Callable[..., T], *args: Any, pool: Any = None) -> T:
        """Run one step in a thread. A cancelled start lets the running step end before anything is taken back."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(pool or self.runtime.threads, step, *args)
        job.current = future
        return await asyncio.shield(future)

    async def _undo(self, job: Launch, error: BaseException) -> None:
        job.cancel()
        if job.current is not None:
            await asyncio.wait([job.current])
            if not job.current.cancelled():
                job.current.exception()  # seen: the error that counts is the one being handled
        await self._thread(job.undo, error)
        self.object_id = ""
        self._launch = None
        if self._log is not None:
            self._log.close()

    def _release_slot_when_answered(self) -> None:
        """Keep the start slot while the server boots: that is the CPU-bound part."""

        async def wait() -> None:
            try:
                deadline = asyncio.get_running_loop().time() + self.http_timeout
                while self._start_pending and asyncio.get_running_loop().time() < deadline:
                    await asyncio.sleep(0.2)
            finally:
                self.runtime.starts.leave()
                if self._log is not None:
                    self._log.add(READY, "Your server is ready")
                    self._log.close()

        self._slot_task = asyncio.ensure_future(wait())

    def _hub_side(self) -> HubSide:
        command = list(self.cmd) if self.cmd else []
        return HubSide(
            environment={key: str(value) for key, value in self.get_env().items() if value is not None},
            command=tuple(command),
            args=tuple(self.get_args()),
            port=self.port,
            extra_host_config=dict(self._render_templates(self._plain(self.extra_host_config))),
            extra_create_kwargs=dict(self._render_templates(self._plain(self.extra_create_kwargs))),
        )

    def _plain(self, value: Any) -> Mapping[str, Any]:
        result = self._eval_if_callable(value)
        if asyncio.iscoroutine(result):
            result.close()
            raise Ds01Error(
                "extra_host_config and extra_create_kwargs may be plain or a function here, not asynchronous.",
                code=Code.SETTINGS_INVALID,
            )
        return result or {}

    async def progress(self) -> AsyncIterator[dict[str, Any]]:
        """All events of the running start, from its beginning, for any number of readers (trap T19)."""
        if self._log is None:
            yield {"progress": QUOTA.percent, "message": "Starting"}
            return
        async for event in self._log.read():
            yield event

    # ---------------------------------------------------------------- running and stopped

    async def poll(self) -> int | str | None:
        """None while running, and while Docker gives no answer (design, point 8; trap T8)."""
        if self._launch is None and not self.object_id:
            return 0
        try:
            state = await self._thread(servers.observe, self.runtime, self.object_id)
        except Ds01Error as error:
            self.log.warning("%s: assuming that it still runs: %s", self._log_name, error.message)
            return None
        if state.running:
            return None
        if not self._ended:
            self._ended = True
            await self._settle(Ended(str(state.summary()), own_stop=False))
        return state.summary()

    async def stop(self, now: bool = False) -> None:
        """Stop the container and give back what it held. Files outside the mounts are kept (see `servers.settle`)."""
        self._ended = True
        halt = partial(servers.stop, self.runtime, self.user.name, self.name, self.object_id, now=now)
        await self._thread(halt)
        await self._settle(Ended("stopped", own_stop=True))
        self.clear_state()

    async def _settle(self, ended: Ended) -> None:
        self._launch = None
        try:
            self._resumes = await self._thread(servers.settle, self.runtime, self.user.name, self.name, ended)
        except Ds01Error as error:
            # The lease stays held (design, point 1); the watcher tries again.
            self._resumes = True
            self.log.warning("%s: what it held stays held for now: %s", self._log_name, error.message)

    _resumes: bool = True

    @property
    def will_resume(self) -> bool:
        """True if the same container, with the API token inside, will be started again; else the Hub revokes it."""
        return self._resumes

    async def run_post_stop_hook(self) -> None:
        """Runs for every end, also those that never called `stop` (trap T5)."""
        if not self._ended and self.object_id:
            self._ended = True
            await self._settle(Ended("ended", own_stop=False))
        result = super().run_post_stop_hook()
        if asyncio.iscoroutine(result):
            await result

    # ---------------------------------------------------------------- state, names, deletion

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._known_name = state.get("object_name") or self._known_name

    def clear_state(self) -> None:
        """Forget the container (DockerSpawner does not, trap T17: the object may be used for the next start)."""
        super().clear_state()
        self.object_id = ""

    async def rename(self, old_name: str, new_name: str) -> None:
        """Refuse while a container of the old name exists: its files would be out of reach (trap T14)."""
        kept = await self._thread(servers.has_container, self.runtime, self.user.name, old_name)
        if kept:
            raise web.HTTPError(
                409,
                f"Server {old_name or aime.DEFAULT_NAME!r} has a stopped container with its own files. "
                f"Delete the server first, or make a new one called {new_name!r}.",
            )

    async def delete_forever(self) -> None:
        """Remove the container of a server that its owner deleted; saved images and folders stay."""
        await self._thread(servers.forget, self.runtime, self.user.name, self.name)
