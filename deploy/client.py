"""A person in front of the Hub, without the person: logs in, fills in the form, waits, runs a cell, stops.

Everything goes through the doors that a browser uses: HTML forms with their XSRF fields, session cookies, the
progress stream, the notebook server's own API and kernel channels.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urljoin

import requests
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from .forms import Form, forms_of, text_of

SECONDS_PER_ANSWER = 30
SECONDS_FOR_START = 180
SECONDS_FOR_CELL = 60

# What browsers add by themselves, and JupyterHub's XSRF checks go by.
_NAVIGATE = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Sec-Fetch-Site": "same-origin"}
_FETCH = {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty", "Sec-Fetch-Site": "same-origin"}


class ClientFailed(Exception):
    """The Hub did not do what a person would expect; the message says at which step and what it answered."""


@dataclass
class Person:
    """One account with its browser session.

    Args:
        hub: address of the Hub's page (`http://127.0.0.1:8000`).
    """

    hub: str
    name: str
    password: str = field(repr=False)
    session: requests.Session = field(default_factory=requests.Session, repr=False)

    @property
    def server(self) -> str:
        """Address of the default server."""
        return f"{self.hub}/user/{self.name}/"

    # ------------------------------------------------------------------ pages

    def log_in(self) -> None:
        """Through the login form."""
        page = self._get(f"{self.hub}/hub/login")
        form = _form_with(page, "password")
        answer = self._submit(page, form.action, form.filled(username=self.name, password=self.password))
        if "/hub/login" in answer.url or answer.status_code >= 400:
            raise ClientFailed(f"{self.name} could not log in: {answer.status_code} {text_of(answer.text)[:300]}")

    def spawn_form(self) -> tuple[requests.Response, Form]:
        """The page with the spawn form, and the form."""
        page = self._get(f"{self.hub}/hub/spawn/{self.name}")
        found = [form for form in forms_of(page.text) if form.id == "spawn_form"]
        if not found:
            raise ClientFailed(f"no spawn form for {self.name} at {page.url}: {text_of(page.text)[:300]}")
        return page, found[0]

    def start(self, **choice: str) -> list[str]:
        """Send the form as it is preselected, with `choice` set in it, and wait until the server answers.

        Returns:
            The messages of the progress stream.

        Raises:
            ClientFailed: refused, failed or too slow, with the Hub's own words.
        """
        page, form = self.spawn_form()
        answer = self._submit(page, form.action or page.url, form.filled(**choice))
        if answer.status_code >= 400 or "/hub/spawn/" in answer.url:
            raise ClientFailed(f"{self.name}'s start was refused: {text_of(answer.text)[:600]}")
        return self._follow_progress()

    def _follow_progress(self) -> list[str]:
        messages: list[str] = []
        deadline = time.monotonic() + SECONDS_FOR_START
        url = f"{self.hub}/hub/api/users/{self.name}/server/progress"
        with self.session.get(
            url, headers=self._xsrf(f"{self.hub}/hub/"), stream=True, timeout=SECONDS_PER_ANSWER
        ) as stream:
            if stream.status_code >= 400:
                raise ClientFailed(f"no progress stream for {self.name}: {stream.status_code} {stream.text[:300]}")
            for line in stream.iter_lines(decode_unicode=True):
                if time.monotonic() > deadline:
                    break
                if not line.startswith("data:"):
                    continue
                event = json.loads(line[5:])
                messages.append(str(event.get("message", "")))
                if event.get("failed"):
                    raise ClientFailed(f"{self.name}'s server did not start: {messages[-1]}")
                if event.get("ready"):
                    return messages
        raise ClientFailed(f"{self.name}'s server was not ready in {SECONDS_FOR_START} s: {' / '.join(messages)}")

    def stop(self) -> None:
        """Stop the default server and wait until it is gone."""
        url = f"{self.hub}/hub/api/users/{self.name}/server"
        answer = self.session.delete(url, headers=self._xsrf(f"{self.hub}/hub/"), timeout=SECONDS_PER_ANSWER)
        if answer.status_code not in (202, 204):
            raise ClientFailed(f"{self.name}'s server could not be stopped: {answer.status_code} {answer.text[:300]}")
        deadline = time.monotonic() + SECONDS_FOR_START
        while time.monotonic() < deadline:
            model = self.session.get(
                f"{self.hub}/hub/api/users/{self.name}",
                headers=self._xsrf(f"{self.hub}/hub/"),
                timeout=SECONDS_PER_ANSWER,
            ).json()
            if not model.get("server") and not model.get("pending"):
                return
            time.sleep(0.2)
        raise ClientFailed(f"{self.name}'s server did not stop within {SECONDS_FOR_START} s")

    # ------------------------------------------------------------------ the notebook server

    def run_cell(self, code: str) -> str:
        """Run `code` in a new kernel of the default server and return what it printed.

        Raises:
            ClientFailed: no kernel, an error in the cell, or no answer in `SECONDS_FOR_CELL`.
        """
        self._get(self.server)  # the first visit: the Hub's OAuth round trip, by redirects
        headers = self._xsrf(self.server)
        made = self.session.post(f"{self.server}api/kernels", headers=headers, json={}, timeout=SECONDS_PER_ANSWER)
        if made.status_code != 201:
            raise ClientFailed(f"no kernel for {self.name}: {made.status_code} {text_of(made.text)[:300]}")
        kernel = made.json()["id"]
        try:
            return asyncio.run(asyncio.wait_for(self._execute(kernel, code), SECONDS_FOR_CELL))
        except asyncio.TimeoutError as error:
            raise ClientFailed(f"{self.name}'s cell gave no answer in {SECONDS_FOR_CELL} s") from error
        finally:
            self.session.delete(f"{self.server}api/kernels/{kernel}", headers=headers, timeout=SECONDS_PER_ANSWER)

    async def _execute(self, kernel: str, code: str) -> str:
        address = f"{self.server}api/kernels/{kernel}/channels?{urlencode(self._token_field(self.server))}"
        request = HTTPRequest("ws" + address.removeprefix("http"), headers={"Cookie": self._cookies(self.server)})
        connection = await websocket_connect(request, max_message_size=2**24)
        message = _execute_request(code)
        await connection.write_message(json.dumps(message))
        printed: list[str] = []
        idle = replied = False
        try:
            while not (idle and replied):
                raw = await connection.read_message()
                if raw is None:
                    raise ClientFailed(f"{self.name}'s kernel closed the connection")
                reply = json.loads(raw)
                if reply.get("parent_header", {}).get("msg_id") != message["header"]["msg_id"]:
                    continue
                kind, content = reply["msg_type"], reply["content"]
                if kind == "stream":
                    printed.append(content["text"])
                elif kind == "error":
                    raise ClientFailed(f"{self.name}'s cell failed: {content['ename']}: {content['evalue']}")
                idle = idle or (kind == "status" and content["execution_state"] == "idle")
                replied = replied or kind == "execute_reply"
        finally:
            connection.close()
        return "".join(printed)

    # ------------------------------------------------------------------ cookies and XSRF

    def _get(self, url: str) -> requests.Response:
        answer = self.session.get(url, headers=_NAVIGATE, timeout=SECONDS_PER_ANSWER)
        if answer.status_code >= 400:
            raise ClientFailed(f"{self.name}: {url} answered {answer.status_code}: {text_of(answer.text)[:300]}")
        return answer

    def _submit(self, page: requests.Response, action: str, fields: list[tuple[str, str]]) -> requests.Response:
        # The spawn form is multipart, the login form is not; the Hub reads both.
        return self.session.post(
            urljoin(page.url, action),
            data=fields,
            headers={**_NAVIGATE, "Referer": page.url},
            timeout=SECONDS_PER_ANSWER,
        )

    def _token_field(self, base: str) -> dict[str, str]:
        """The `_xsrf` cookie that a page below `base` would see, as a field."""
        found = {cookie.path: cookie.value or "" for cookie in self.session.cookies if cookie.name == "_xsrf"}
        path = "/" + base.removeprefix(self.hub).lstrip("/")
        fitting = [cookie_path for cookie_path in found if path.startswith(cookie_path)]
        return {"_xsrf": found[max(fitting, key=len)]} if fitting else {}

    def _xsrf(self, base: str) -> dict[str, str]:
        token = self._token_field(base).get("_xsrf")
        return {**_FETCH, "Referer": base} | ({"X-XSRFToken": token} if token else {})

    def _cookies(self, base: str) -> str:
        prepared = requests.Request("GET", base, cookies=self.session.cookies).prepare()
        return prepared.headers.get("Cookie", "")


def _form_with(page: requests.Response, field_name: str) -> Form:
    for form in forms_of(page.text):
        if any(name == field_name for name, _ in form.fields):
            return form
    raise ClientFailed(f"{page.url} has no form with a field {field_name!r}: {text_of(page.text)[:300]}")


def _execute_request(code: str) -> dict[str, Any]:
    header = {"msg_id": uuid.uuid4().hex, "username": "", "session": uuid.uuid4().hex, "version": "5.3"}
    return {
        "header": {**header, "msg_type": "execute_request"},
        "parent_header": {},
        "metadata": {},
        "content": {"code": code, "silent": False, "store_history": False, "allow_stdin": False},
        "channel": "shell",
        "buffers": [],
    }
