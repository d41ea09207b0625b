"""The spawn form in a real Chromium on a real JupyterHub (browser): keyboard, no JavaScript, phone, dark, live."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from ds01spawner.form.view import FRESH

pytestmark = pytest.mark.browser

CONFIG = Path(__file__).parent / "form_hub.py"
PASSWORD = "form-and-nothing-else"
SMALL, MEDIUM, WHOLE, CPU = ("pytorch/small", "pytorch/medium", "pytorch/whole", "pytorch/cpu")


@dataclass(frozen=True)
class Hub:
    """A running Hub and the file that tells its form what is free."""

    url: str
    world: Path

    def set(self, **values: Any) -> None:
        """Rewrite the world; what a start was asked or told to stop is forgotten."""
        for name in ("asked", "stopped"):
            Path(f"{self.world}.{name}").unlink(missing_ok=True)
        draft = self.world.with_suffix(".new")
        draft.write_text(json.dumps(values))
        draft.replace(self.world)

    def told(self, name: str) -> str:
        """What the spawner wrote, as soon as it did ("asked": server and options; "stopped": server)."""
        path = Path(f"{self.world}.{name}")
        for _ in range(200):
            if path.exists() and path.read_text():
                return path.read_text()
            time.sleep(0.05)
        raise AssertionError(f"the spawner was not {name}")

    def asked(self) -> dict[str, Any]:
        options: dict[str, Any] = json.loads(self.told("asked"))[1]
        return options


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = Hub(f"http://127.0.0.1:{port}/hub", folder / "world.json")
    found.set()
    environment = os.environ | {"DS01_FORM_WORLD": str(found.world), "DS01_FORM_PORT": str(port)}
    command = [sys.executable, "-m", "jupyterhub", "-f", str(CONFIG)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(found.url, process, folder / "log")
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/login", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"the Hub did not answer: {log.read_text()}")


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


Opened = Callable[..., Page]


@pytest.fixture
def open_form(hub: Hub, browser: Browser) -> Iterator[Opened]:
    """`open_form(user, server="", **context options)`: log in and open the form; page errors fail the test."""
    contexts: list[BrowserContext] = []
    errors: list[str] = []

    def open_it(user: str, server: str = "", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{hub.url}/login")
        page.fill("#username_input", user)
        page.fill("#password_input", PASSWORD)
        page.click("#login_submit")
        page.wait_for_url(lambda url: "login" not in url)
        page.goto(f"{hub.url}/spawn/{_quoted(user)}" + (f"/{server}" if server else ""))
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not errors


def _quoted(user: str) -> str:
    return urllib.request.quote(user, safe="@")  # as jupyterhub.user.User.escaped_name


def card(page: Page, value: str) -> Any:
    return page.locator(f'input[name="choice"][value="{value}"]')


def test_browser_keyboard_only_choice_progress_and_stop_of_the_right_server(hub: Hub, open_form: Opened) -> None:
    user = "ada <b>&'\"x"
    hub.set(taken={"3g.20gb": 1})
    page = open_form(user, "lab")
    expect(page.locator("h1")).to_have_text(re.compile(r"Start your server\s+lab"))
    expect(card(page, SMALL)).to_be_checked()
    card(page, SMALL).focus()
    page.keyboard.press("ArrowDown")
    expect(card(page, WHOLE)).to_be_checked()  # the medium one is greyed out and passed over
    page.keyboard.press("ArrowDown")
    expect(card(page, CPU)).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle")
    assert outline == "solid", "the focus can be seen"
    expect(page.locator("[data-ds01-chosen]")).to_have_text("No GPU")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "submit":
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/spawn-pending/**")
    assert hub.asked() == {"profile": "pytorch", "size": "cpu"}
    expect(page.locator("h1")).to_have_text(re.compile(r"Starting your server\s+lab"))
    expect(page.locator('li[data-ds01-stage="image"]')).to_have_attribute("aria-current", "step")
    expect(page.locator('li[data-ds01-stage="quota"]')).to_have_attribute("data-done", "")
    expect(page.locator("#progress-message")).to_have_text("Fetching <the> image.")
    expect(page.locator("#ds01-progress")).not_to_have_attribute("aria-valuenow", "0")
    page.click("#stop-server-btn")
    page.wait_for_url("**/hub/home")
    assert hub.told("stopped") == "lab"


def test_browser_without_javascript_the_form_works(hub: Hub, open_form: Opened) -> None:
    hub.set()
    page = open_form("nojs", java_script_enabled=False)
    expect(card(page, SMALL)).to_be_checked()
    expect(page.locator("#noscript")).to_be_hidden()
    page.locator("label", has=page.get_by_text("writing and looking at data")).click()
    page.locator("details summary").click()
    page.fill("#ds01-project", "thesis")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/spawn-pending/**")
    assert hub.asked() == {"profile": "pytorch", "size": "cpu", "project": "thesis"}


def test_browser_without_javascript_a_refusal_of_a_greyed_out_card_is_shown(hub: Hub, open_form: Opened) -> None:
    hub.set(own=1, limits={"max_containers_per_user": 1})
    page = open_form("full", java_script_enabled=False)
    expect(card(page, SMALL)).to_be_disabled()
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("may run 1 at a time")
    assert hub.asked() == {"profile": "pytorch", "size": "small"}


def test_browser_a_refused_start_shows_sentence_and_alternatives(hub: Hub, open_form: Opened) -> None:
    hub.set()
    page = open_form("late", "lab")
    hub.set(taken={"1g.5gb": 9})
    page.get_by_role("button", name="Start").click()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("Not started.")
    expect(alert).to_contain_text("none is free")
    expect(alert.locator("li").first).to_be_visible()
    expect(page.locator("h1")).to_have_text(re.compile(r"Start your server\s+lab"))
    expect(card(page, SMALL)).to_be_disabled()
    assert page.evaluate("location.search") == "", "opened again, the token would be taken for an option"
    page.reload()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_browser_a_link_starts_or_is_refused(hub: Hub, open_form: Opened) -> None:
    hub.set()
    page = open_form("link")
    page.goto(f"{hub.url}/spawn/link?opt-size=huge%3Cb%3E")
    expect(page.get_by_role("alert")).to_contain_text("size must be a plain name")
    expect(card(page, SMALL)).to_be_checked()
    page.goto(f"{hub.url}/spawn/link?opt-profile=r")
    page.wait_for_url("**/spawn-pending/**")
    assert hub.asked() == {"profile": "r"}


def test_browser_availability_is_live_and_the_choice_stays(hub: Hub, open_form: Opened) -> None:
    hub.set(taken={"3g.20gb": 1})
    page = open_form("live")
    page.clock.install()
    page.reload()
    expect(page.locator(f'[data-ds01-live="now {SMALL}"]')).to_contain_text("9 of 9 free now")
    page.locator("details summary").click()
    page.fill("#ds01-project", "thesis")
    page.locator("label", has=page.get_by_text("right for coursework")).click()
    start = page.get_by_role("button", name="Start")

    hub.set(taken={"1g.5gb": 4})
    page.clock.fast_forward(10_000)
    expect(page.locator(f'[data-ds01-live="now {SMALL}"]')).to_contain_text("5 of 9 free now")
    expect(card(page, MEDIUM)).to_be_enabled()
    expect(card(page, SMALL)).to_be_checked()
    expect(start).to_be_enabled()
    assert page.input_value("#ds01-project") == "thesis"

    hub.set(taken={"1g.5gb": 9})
    page.clock.fast_forward(10_000)
    expect(card(page, SMALL)).to_be_disabled()
    expect(start).to_be_disabled()
    expect(page.get_by_role("status").first).to_contain_text("cannot start any more")
    card(page, MEDIUM).check()
    expect(start).to_be_enabled()

    page.select_option("#ds01-image-1", "aimehub/pytorch-2.7.1-aime")
    hub.set(limits={"allow_full_gpu": False})
    page.clock.fast_forward(10_000)
    expect(card(page, WHOLE)).to_have_count(0)
    expect(card(page, MEDIUM)).to_be_checked()
    expect(page.locator("details")).to_have_attribute("open", "")
    assert page.input_value("#ds01-project") == "thesis", "what was typed stays when the cards change"
    assert page.input_value("#ds01-image-1") == "aimehub/pytorch-2.7.1-aime"
    expect(page.locator(".ds01-sheet:visible h3")).to_contain_text("Medium GPU, 20 GB")


def test_browser_a_preselection_that_nobody_touched_follows_what_is_free(hub: Hub, open_form: Opened) -> None:
    hub.set()
    page = open_form("untouched")
    page.clock.install()
    page.reload()
    expect(card(page, SMALL)).to_be_checked()
    hub.set(taken={"1g.5gb": 9})
    page.clock.fast_forward(10_000)
    expect(card(page, MEDIUM)).to_be_checked()
    expect(page.locator("[data-ds01-chosen]")).to_have_text("Medium GPU, 20 GB")


def test_browser_an_outdated_page_says_so(hub: Hub, open_form: Opened) -> None:
    hub.set()
    page = open_form("twice")
    page.clock.install()
    page.reload()
    other = page.context.new_page()
    other.goto(f"{hub.url}/spawn/twice?opt-size=cpu")
    other.wait_for_url("**/spawn-pending/**")
    page.clock.fast_forward(10_000)
    expect(page.get_by_text("This page is out of date")).to_be_visible()
    page.get_by_role("link", name="Open it again").click()
    page.wait_for_url("**/spawn-pending/**")


@pytest.mark.parametrize("size", [(360, 740), (844, 390)], ids=["upright", "on its side"])
def test_browser_phone(hub: Hub, open_form: Opened, size: tuple[int, int]) -> None:
    hub.set(taken={"1g.5gb": 9})
    page = open_form("phone", viewport={"width": size[0], "height": size[1]}, is_mobile=True, has_touch=True)
    page.locator(".ds01-details summary").first.tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "nothing sticks out sideways"
    expect(page.get_by_role("button", name="Start")).to_be_in_viewport()
    page.locator("label", has=page.get_by_text("for training a small model")).tap()
    expect(card(page, MEDIUM)).to_be_checked()


SINGLES: dict[str, Any] = {
    "small": {"title": "Small GPU", "image": "i", "sizes": {"s": {"gpu": {"mig_profile": "1g.5gb"}}}},
    "whole": {"title": "Whole GPU", "image": "i", "sizes": {"s": {"gpu": {"kind": "full"}}}},
    "cpu": {"title": "CPU only", "image": "i", "description": "for writing and plotting"},
}


def test_browser_three_profiles_stand_in_one_row_with_start_in_sight(hub: Hub, open_form: Opened) -> None:
    hub.set(profiles=SINGLES)
    page = open_form("rows", viewport={"width": 1100, "height": 900})
    boxes = [box for found in page.locator(".ds01-card").all() if (box := found.bounding_box())]
    assert len(boxes) == 3
    assert len({round(box["y"]) for box in boxes}) == len({round(box["height"]) for box in boxes}) == 1
    start = page.get_by_role("button", name="Start").bounding_box()
    assert start is not None
    assert start["y"] + start["height"] < 600, "no need to scroll, nor to look for it"
    assert page.evaluate("document.documentElement.scrollHeight") <= 900
    expect(page.get_by_text("Small GPU", exact=False).locator("visible=true")).to_have_count(2)  # card, Start bar
    page.mouse.click(boxes[2]["x"] + boxes[2]["width"] - 8, boxes[2]["y"] + boxes[2]["height"] - 8)
    expect(card(page, "cpu/standard")).to_be_checked()  # the whole card can be clicked


@pytest.mark.parametrize("javascript", [True, False])
def test_browser_the_one_disclosure_follows_the_choice(hub: Hub, open_form: Opened, javascript: bool) -> None:
    hub.set()
    page = open_form("details", java_script_enabled=javascript)
    shown, selects = page.locator(".ds01-sheet:visible"), page.locator("select:visible")
    expect(shown).to_have_count(0)
    page.locator("details summary").click()
    expect(shown).to_have_count(1)
    expect(shown).to_contain_text("1g.5gb")
    expect(selects).to_have_count(1)
    card(page, WHOLE).check()
    expect(shown).to_contain_text("whole GPU")
    card(page, "r/cpu").check()
    expect(shown).to_contain_text("lab/rstudio:4")
    expect(selects).to_have_count(0)


def test_browser_a_fresh_start_is_asked_for_under_details(hub: Hub, open_form: Opened) -> None:
    hub.set(last_choice={"size": "cpu"})
    page = open_form("fresh")
    page.locator("details summary").click()
    page.get_by_label("Start from").locator("visible=true").select_option(label=FRESH)
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/spawn-pending/**")
    assert hub.asked() == {"profile": "pytorch", "size": "cpu", "fresh": True}


CONTRASTS = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const background = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.unshift(parse(getComputedStyle(at).backgroundColor));
    return layers.reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const light = colour => {
    const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = colour.slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const places = ".ds01-title, .ds01-tagline, .ds01-takes, .ds01-badge, .ds01-reason, .ds01-when, .ds01-note," +
    " .ds01-gives, .ds01-sheet dt, .ds01-sheet dd, .ds01-sheet small," +
    " .ds01-quota dt, .ds01-quota small, .ds01-hint, .ds01-start button," +
    " [data-ds01-chosen]";
  for (const element of document.querySelectorAll(places)) {
    const card = element.closest(".ds01-card");
    const greyed = card && card.querySelector("input").disabled;
    if (greyed && element.matches(".ds01-title, .ds01-lines *")) continue;  // WCAG 1.4.3: inactive components
    const under = background(element);
    const [one, two] = [light(over(parse(getComputedStyle(element).color), under)), light(under)];
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    found.push([element.className || element.tagName, Math.round(ratio * 100) / 100]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_every_text_has_contrast(hub: Hub, open_form: Opened, scheme: str) -> None:
    hub.set(taken={"3g.20gb": 1}, last_choice={"size": "medium"})
    page = open_form("contrast", color_scheme=scheme, reduced_motion="reduce")
    assert page.evaluate("document.documentElement.dataset.bsTheme") == scheme
    page.locator("details summary").click()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 20
    assert [item for item in found if item[1] < 4.5] == []


def test_browser_home_shows_the_quota_line(hub: Hub, open_form: Opened) -> None:
    hub.set()
    page = open_form("homely")
    page.goto(f"{hub.url}/home")
    expect(page.locator("[data-ds01-quota]")).to_have_text("GPU in use 0 of 1")


def test_browser_a_start_that_fails_late_leads_back_to_the_form(hub: Hub, open_form: Opened) -> None:
    hub.set(start_s=1.5)
    page = open_form("failing")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/spawn-pending/**")
    expect(page.locator("#ds01-failed")).to_contain_text("never ready")
    expect(page.locator("h1")).to_contain_text("Not started")
    expect(page.locator("#stop-server-btn")).to_be_hidden()
    page.get_by_role("link", name="Choose again").click()
    expect(card(page, SMALL)).to_be_checked()
