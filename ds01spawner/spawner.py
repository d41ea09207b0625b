"""DS01Spawner: the glue between the Hub's life cycle and the start path. The only file that knows DockerSpawner.

Everything that decides or touches Docker is in `launch` and `servers`; this class keeps to the Hub's contract: which
hook is called when, what survives a restart, and how a refusal reaches a person (traps T1..T21 of the JupyterHub
facts are named where they are handled).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from dockerspawner import DockerSpawner
from jupyterhub import orm
from jupyterhub.utils import url_path_join
from tornado import web
from traitlets import Unicode, default, validate

from . import servers
from .answer import answers
from .body import HubSide
from .containers import aime
from .containers.engine import ContainerFacts
from .containers.spec import api_token
from .errors import Code, Ds01Error, Refusal, SettingsInvalid
from .form.request import options_from_form, options_from_query
from .launch import Cancelled, Launch
from .overruled import exposed, overruled
from .progress import ANSWER, CREATE, IMAGE, QUEUE, QUOTA, READY, START, ProgressLog
from .runtime import Runtime
from .scene import Person
from .servers import Ended
from .spawn_error import spawn_error
from .spawn_page import spawn_form
from .stored_options import acceptable, guard

T = TypeVar("T")

BROKEN = (
    "Something went wrong inside the Hub; it is not your fault, and nothing was started. Please try again, and tell "
    "the admin if it happens again: the Hub's log has the details."
)

ANSWER_PATIENCE_S = 1.0
"""How often a booting server's container is looked at: one that has ended never answers."""
STOP_PATIENCE_S = 120.0
"""How long a stop goes on asking a Docker that does not answer before it is left to the watcher."""
STOP_RETRY_S = 2.0


def _seen(future: asyncio.Future[Any]) -> None:
    """Nobody may be waiting for a step any more when it fails; its error was not forgotten by accident."""
    if not future.cancelled():
        future.exception()


class DS01Spawner(DockerSpawner):  # type: ignore[misc]  # dockerspawner has no types
    """Starts each server as a container with exactly what the policy grants its owner."""

    settings_file = Unicode(
        config=True,
        help="""Path of the installation's settings, as `ds01spawner.setup(c)` wrote them.""",
    )

    _runtimes: ClassVar[dict[str, Runtime]] = {}
    _opening: ClassVar[threading.Lock] = threading.Lock()
    _told: ClassVar[set[str]] = set()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        guard()
        for sentence in (*overruled(self.config, type(self).section_names()), *exposed(self.config)):
            if sentence not in self._told:
                self._told.add(sentence)
                self.log.warning("ds01: %s", sentence)

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
        groups = tuple(sorted(group.name for group in self.user.groups))
        return Person(self.user.name, groups, bool(self.user.admin))

    async def _thread(self, function: Callable[..., T], *args: Any, pool: ThreadPoolExecutor | None = None) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool or self.runtime.threads, function, *args)

    # ---------------------------------------------------------------- names

    @default("name_template")
    def _default_name_template(self) -> str:
        return "{ds01_name}"

    def template_namespace(self) -> dict[str, Any]:
        namespace: dict[str, Any] = super().template_namespace()
        namespace["ds01_name"] = self._launch.container_name if self._launch else self._known_name
        return namespace

    _launch: Launch | None = None
    """The start under way."""
    _undoing: asyncio.Future[None] | None = None
    """The last failed start being taken back."""
    _known_name: str = "unnamed"
    _log: ProgressLog | None = None
    _ended: bool = False
    """What the container held was given back, or somebody is at it."""
    _resumes: bool = True

    # ---------------------------------------------------------------- the form

    @default("options_form")
    def _default_options_form(self) -> Any:
        return DS01Spawner._render_form

    async def _render_form(self) -> str:
        try:
            return await self._thread(spawn_form, self.runtime, self.person, self.name)
        except Exception:
            self.log.exception("%s: the spawn form could not be made", self._log_name)
            return f'<p class="alert alert-danger" role="alert">{BROKEN}</p>'

    @default("options_from_form")
    def _default_options_from_form(self) -> Any:
        return options_from_form

    def options_from_query(self, query_data: Mapping[str, Any]) -> dict[str, Any]:
        """`GET /hub/spawn?opt-size=…`: the same fields, and nothing but those (trap T10).

        A link on somebody else's page must not start anything in the name of whoever clicks it: such a request gets
        the form instead.
        """
        handler = getattr(self, "handler", None)
        site = handler.request.headers.get("Sec-Fetch-Site", "none") if handler is not None else "none"
        if site not in ("none", "same-origin"):
            raise spawn_error(
                Refusal(Code.NOT_ALLOWED, "A link on another page asked for this start. Choose below and press Start.")
            )
        return options_from_query(query_data)

    @default("apply_user_options")
    def _default_apply_user_options(self) -> Any:
        """Nothing here, so that every request, also the one that is refused, goes one way: `Launch.admit` parses,
        judges and writes down what form, query, REST and stale options ask for (traps T10, T11)."""
        return DS01Spawner._leave_options

    def _leave_options(self, _options: Mapping[str, Any]) -> None:
        return None

    _asked: Mapping[str, Any] = MappingProxyType({})
    """What was asked for, as it came."""

    @validate("user_options")
    def _shown_options(self, proposal: Any) -> Any:
        """What the Hub shows of it on its admin page, which an object in the place of a text would break."""
        self._asked = proposal.value or {}
        return proposal.value if acceptable(proposal.value) else {}

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
        """Admit, fetch the image, create, start, verify, wait for the first answer; or leave nothing behind.

        The server has answered when this returns, so that whatever goes wrong before is one failed start, is told as
        such, and is taken back as a whole (design, point 7). Neither stop() nor poll() is called by the Hub for a start
        that failed (trap T5).
        """
        await self._undone()
        # The Hub may use this object again after a failure (trap T17).
        self._ended, self._resumes, self.object_id = False, False, ""
        log = self._fresh_log()
        job = self._launch = Launch(self.runtime, self.person, self.name, log.add)
        try:
            return await self._run(job, log)
        except Exception as error:
            told = self._tell(error)
            await asyncio.shield(self._take_back(job, error))
            raise told from error
        except BaseException as error:
            # start_timeout and DELETE while pending arrive as CancelledError (trap T6). The Hub looks again within a
            # second and then polls: poll() waits for the end of this.
            self._take_back(job, error)
            raise
        finally:
            self._launch = None
            log.close()

    async def _run(self, job: Launch, log: ProgressLog) -> tuple[str, int]:
        runtime = self.runtime
        if self.internal_ssl:
            raise SettingsInvalid("internal_ssl is not supported: containers are separated by the network's own rules.")
        log.add(QUOTA, "Checking your quota")
        # Admission may wait (for a snapshot, for another hand): in threads of its own, not in those of poll and form.
        await self._step(job, job.admit, dict(self._asked), self._door, pool=runtime.admissions)
        log.add(IMAGE, "Looking for the image")
        await self._step(job, job.fetch_image, self.pull_policy.lower(), pool=runtime.pulls)
        log.add(QUEUE, "Waiting for a free start slot")
        # The slot is kept while the server boots: that is the CPU-bound part.
        async with runtime.starts.slot(log):
            log.add(CREATE, "Preparing folders, limits and the container")
            await self._step(job, job.create, self._hub_side())
            self.object_id, self.object_name = job.container_id, job.container_name
            log.add(START, "Starting the container")
            address = await self._step(job, job.start)
            log.add(ANSWER, "Jupyter is starting; waiting for its first answer")
            beside = asyncio.ensure_future(self._note_disk(job, log))
            try:
                await self._first_answer(job, address)
            finally:
                beside.cancel()
        await self._step(job, job.finish)
        self._settle_token(job)
        if job.once:  # the Hub keeps the options for starts that name none (REST without a body, its admin page)
            self.orm_spawner.user_options = {k: v for k, v in self.user_options.items() if k not in job.once}
        self._resumes = True
        log.add(READY, "Your server answers")
        return address, self.port

    async def _step(self, job: Launch, step: Callable[..., T], *args: Any, pool: ThreadPoolExecutor | None = None) -> T:
        """Run one step in a thread. A cancelled start lets the running step end before anything is taken back."""
        current: concurrent.futures.Future[T] = (pool or self.runtime.threads).submit(step, *args)
        job.current = current
        future = asyncio.wrap_future(current)
        future.add_done_callback(_seen)
        return await asyncio.shield(future)

    async def _first_answer(self, job: Launch, address: str) -> None:
        """Wait until the server answers on HTTP, its container ends, or `http_timeout` is over."""
        clock = asyncio.get_running_loop().time
        path = url_path_join(self.server.base_url if self.server else "/", "api")
        deadline, look, pause = clock() + self.http_timeout, clock() + ANSWER_PATIENCE_S, 0.05
        while not await answers(address, self.port, path):
            now = clock()
            if now >= deadline:
                raise await self._step(job, job.never_answered, self.http_timeout)
            if now >= look:
                await self._step(job, job.require_running)
                look = clock() + ANSWER_PATIENCE_S
            await asyncio.sleep(pause)
            pause = min(0.25, pause * 1.5)

    async def _note_disk(self, job: Launch, log: ProgressLog) -> None:
        try:
            note = await self._thread(job.disk_note, pool=self.runtime.pulls)
        except Exception:
            self.log.warning("%s: the size of its container is not known", self._log_name, exc_info=True)
            return
        if note:
            log.add(ANSWER, note)

    def _tell(self, error: Exception) -> Exception:
        """`error` as one sentence for the person; the log gets the whole story of what nobody foresaw."""
        if isinstance(error, web.HTTPError):
            return error
        if isinstance(error, Ds01Error):
            return spawn_error(error)
        self.log.error("%s: a start failed by a fault of the Hub", self._log_name, exc_info=error)
        return spawn_error(Ds01Error(BROKEN))

    def _take_back(self, job: Launch, error: BaseException) -> asyncio.Future[None]:
        """Begin to undo a start, in a thread that nothing can cancel."""
        self._undoing = asyncio.wrap_future(self.runtime.ends.submit(job.take_back, error))
        self.object_id = ""
        return self._undoing

    async def _undone(self) -> None:
        """Wait until a failed start is taken back; whoever waits may be cancelled, the undo goes on."""
        if self._undoing is not None:
            await asyncio.shield(self._undoing)
            self._undoing = None

    # ---------------------------------------------------------------- the token inside

    async def _token_lives(self, token: str) -> bool:
        found = orm.APIToken.find(self.user.db, token) if token else None
        return found is not None and found.user is self.user.orm_user

    def _settle_token(self, job: Launch) -> None:
        """A container that is used again goes on with its own token. In a new one every older token of this server is
        of no use to anybody: the Hub forgets it."""
        if job.api_token:
            self.api_token = job.api_token
            return
        db, owner = self.user.db, self.user.orm_user
        current = orm.APIToken.find(db, self.api_token)
        if current is None:
            return
        for old in db.query(orm.APIToken).filter_by(user_id=owner.id, note=current.note):
            if old is not current:
                db.delete(old)
        db.commit()

    def _hub_side(self) -> HubSide:
        command = list(self.cmd) if self.cmd else []
        loop = asyncio.get_running_loop()

        def token_lives(token: str) -> bool:
            """Asked from a thread; the Hub's database belongs to its event loop."""
            return asyncio.run_coroutine_threadsafe(self._token_lives(token), loop).result(timeout=60)

        return HubSide(
            environment={key: str(value) for key, value in self.get_env().items() if value is not None},
            command=tuple(command),
            args=tuple(self.get_args()),
            port=self.port,
            extra_host_config=dict(self._render_templates(self._plain(self.extra_host_config))),
            extra_create_kwargs=dict(self._render_templates(self._plain(self.extra_create_kwargs))),
            token_lives=token_lives,
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

    def _fresh_log(self) -> ProgressLog:
        """A log for the next start: the one that early readers already follow, if it is unused."""
        if self._log is None or self._log.used:
            self._log = ProgressLog(asyncio.get_running_loop())
        return self._log

    async def progress(self) -> AsyncIterator[dict[str, Any]]:
        """All events of the running start, from its beginning, for any number of readers (trap T19)."""
        begun = self._log is not None and (self._launch is not None or self.object_id)
        log = self._log if begun and self._log is not None else self._fresh_log()
        async for event in log.read():
            yield event

    # ---------------------------------------------------------------- running and stopped

    async def poll(self) -> int | str | None:
        """None while it starts, while it runs, and while nobody can say (design, point 8; trap T8)."""
        if self._launch is not None:
            return None
        try:
            await self._undone()
            state = await self._thread(servers.observe, self.runtime, self.user.name, self.name, self.object_id)
        except Ds01Error as error:
            self.log.warning("%s: assuming that it still runs: %s", self._log_name, error.message)
            return None
        except Exception:
            # The Hub would take an exception for "not running", and forget the server.
            self.log.exception("%s: assuming that it still runs", self._log_name)
            return None
        if state.running:
            self._adopt(state.facts)
            return None
        if not self._ended and (self.object_id or state.facts is not None):
            self._ended = True
            await self._settle(Ended(str(state.summary()), own_stop=False))
        return state.summary()

    def _adopt(self, facts: ContainerFacts | None) -> None:
        """A Hub that was killed while the server started has no state of it; the ledger has."""
        if facts is not None and not self.object_id:
            self.log.warning("%s: going on with container %s, by the ledger", self._log_name, facts.name)
            self.object_id, self.object_name = facts.id, facts.name
            self.api_token = api_token(facts) or self.api_token

    async def get_url(self) -> str:
        """Where the running container answers, asked by a Hub that restarted; what it remembers if nobody can say."""
        known: str = self.server.url
        try:
            address = await self._thread(servers.address, self.runtime, self.object_id)
        except Exception as error:  # one that came out of here would end the Hub
            self.log.warning("%s: keeping its address: %s", self._log_name, error, exc_info=True)
            return known
        return url_path_join(f"http://{address}:{self.port}", self.server.base_url) if address else known

    async def stop(self, now: bool = False) -> None:
        """Stop the container and give back what it held. Files outside the mounts stay (see `servers.give_back`)."""
        self._ended = True
        if self._launch is not None:
            await asyncio.shield(self._take_back(self._launch, Cancelled("The server was stopped.")))
            return
        await self._undone()
        halt = partial(servers.end, self.runtime, self.user.name, self.name, self.object_id, now=now)
        try:
            self._resumes = await self._insist(halt)
        except Exception as error:
            self.log.error("%s: left to the watcher to stop: %s", self._log_name, error, exc_info=True)
            await self._postpone(error)
        self.clear_state()

    async def _insist(self, action: Callable[[], T]) -> T:
        """Try for a while: the Hub forgets a server whose stop() or delete_forever() raises."""
        clock = asyncio.get_running_loop().time
        give_up = clock() + STOP_PATIENCE_S
        while True:
            try:
                return await self._thread(action, pool=self.runtime.ends)
            except Exception as error:
                if clock() >= give_up:
                    raise
                story = not isinstance(error, Ds01Error)
                self.log.warning("%s: not ended yet: %s", self._log_name, error, exc_info=story)
            await asyncio.sleep(STOP_RETRY_S)

    async def _postpone(self, error: Exception) -> None:
        self._resumes = True  # what still runs needs its token
        try:
            await self._thread(servers.postpone, self.runtime, self.user.name, self.name, f"stop: {error}")
        except Exception:
            self.log.exception("%s: it may run on without the Hub", self._log_name)

    async def _settle(self, ended: Ended) -> None:
        settle = partial(servers.settle, self.runtime, self.user.name, self.name, ended, self.object_id)
        try:
            self._resumes = await self._thread(settle, pool=self.runtime.ends)
        except Exception as error:
            # The lease stays held (design, point 1); the watcher tries again.
            self._resumes = True
            self.log.warning("%s: what it held stays held for now: %s", self._log_name, error, exc_info=True)

    @property
    def will_resume(self) -> bool:
        """True if the same container, with the API token inside, can be started again; else the Hub revokes it."""
        return self._resumes

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
        try:
            aime.container_name(new_name, 0)
            kept = await self._thread(servers.has_container, self.runtime, self.user.name, old_name)
        except Ds01Error as error:
            raise spawn_error(error) from error
        if kept:
            raise web.HTTPError(
                409,
                f"Server {old_name or aime.DEFAULT_NAME!r} has a stopped container with its own files. "
                f"Delete the server first, or make a new one called {new_name!r}.",
            )

    async def delete_forever(self) -> None:
        """Remove the container of a server that its owner deleted; saved images and folders stay."""
        try:
            await self._insist(partial(servers.forget, self.runtime, self.user.name, self.name))
        except Ds01Error as error:
            raise spawn_error(error) from error
