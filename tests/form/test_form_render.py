"""The form as HTML, alone and inside the Hub's own pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from bs4 import BeautifulSoup, Tag
from form_scene import box, held, profiles, snapshot, units, view
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PrefixLoader
from jupyterhub._data import DATA_FILES_PATH

from ds01spawner.errors import Alternative, Code, Refusal
from ds01spawner.form.render import TEMPLATES, render_form
from ds01spawner.form.request import SpawnRequest, options_from_form
from ds01spawner.form.view import FormView
from ds01spawner.images import SavedImage
from ds01spawner.model import Usage
from ds01spawner.progress import STAGES

EVIL = "<img src=x onerror=alert(1)>\"'{{ 7*7 }}"


def soup(html: str) -> BeautifulSoup:
    return BeautifulSoup(html, "html5lib")


def busy() -> FormView:
    inventory = box()
    return view(usage=Usage((held("bo", units(inventory, "3g.20gb")),)), snapshot=snapshot(inventory))


def radios(page: BeautifulSoup) -> list[Tag]:
    return page.select('input[type="radio"][name="choice"]')


def submitted(page: BeautifulSoup) -> dict[str, list[str]]:
    """What a browser without JavaScript would send."""
    fields: dict[str, list[str]] = {}
    for field in page.select("[data-ds01-form] input, [data-ds01-form] select"):
        if field.has_attr("disabled") or (field.get("type") == "radio" and not field.has_attr("checked")):
            continue
        value = field.get("value", "")
        if field.name == "select":
            option = field.select_one("option[selected]") or field.select_one("option")
            assert option is not None
            value = option["value"]
        fields.setdefault(str(field["name"]), []).append(str(value))
    return fields


def test_one_card_is_preselected_and_each_has_label_and_description() -> None:
    page = soup(render_form(busy()))
    found = radios(page)
    assert [radio["value"] for radio in found if radio.has_attr("checked")] == ["pytorch/small"]
    for radio in found:
        label = page.select_one(f'label[for="{radio["id"]}"]')
        assert label is not None
        title = page.find(id=radio["aria-labelledby"])
        assert isinstance(title, Tag)
        assert title.get_text(strip=True)
        for name in str(radio["aria-describedby"]).split():
            assert page.find(id=name) is not None, name
    ids = [tag["id"] for tag in page.select("[id]")]
    assert len(ids) == len(set(ids))
    legend = page.select_one("fieldset > legend")
    assert legend is not None


def test_a_card_that_cannot_start_is_disabled_and_says_why() -> None:
    page = soup(render_form(busy()))
    disabled = [radio for radio in radios(page) if radio.has_attr("disabled")]
    assert [radio["value"] for radio in disabled] == ["pytorch/medium"]
    label = page.select_one(f'label[for="{disabled[0]["id"]}"]')
    assert label is not None
    assert "none free now" in label.get_text()
    assert "held by servers" in label.get_text()


def test_every_field_has_a_label() -> None:
    page = soup(render_form(view()))
    for field in page.select('input:not([type="hidden"]), select'):
        assert page.select_one(f'label[for="{field["id"]}"]') is not None, field


def test_without_javascript_the_form_sends_a_valid_request() -> None:
    request = SpawnRequest.parse(options_from_form(submitted(soup(render_form(view())))), server_name="", door="form")
    assert (request.profile, request.size, request.image) == ("pytorch", "small", None)


def test_a_greyed_out_preselected_card_is_still_what_is_sent() -> None:
    inventory = box(mixed=False)
    busy_small = Usage((held("bo", units(inventory, "1g.5gb")),))
    only = profiles({"p": {"image": "i", "sizes": {"small": {"gpu": {"kind": "mig", "mig_profile": "1g.5gb"}}}}})
    page = soup(render_form(view(profiles=only, usage=busy_small, snapshot=snapshot(inventory))))
    assert radios(page)[0].has_attr("disabled")
    assert options_from_form(submitted(page)) == {"profile": "p", "size": "small"}


def test_a_last_choice_is_sent_again() -> None:
    last = {
        "profile": "pytorch",
        "size": "cpu",
        "project": "thesis",
        "memory": "4g",
        "image": "aimehub/pytorch-2.7.1-aime",
    }
    assert options_from_form(submitted(soup(render_form(view(last_choice=last))))) == last


def hostile_view() -> FormView:
    source = {
        "p": {
            "title": EVIL,
            "description": EVIL,
            "image": EVIL,
            "images": [EVIL],
            "sizes": {"s": {"title": EVIL, "description": EVIL}},
        }
    }
    return view(
        profiles=profiles(source),
        private_images=[SavedImage(EVIL, "sha256:1", EVIL, EVIL)],
        last_choice={"profile": EVIL},
    )


def test_nothing_is_markup_but_ours() -> None:
    page = soup(render_form(hostile_view()))
    assert page.find("img") is None
    assert "49" not in page.get_text().replace("{{ 7*7 }}", "")
    assert EVIL in page.get_text()
    option = page.select_one("optgroup option")
    assert option is not None
    assert option["value"] == EVIL
    for tag in page.find_all(True):
        assert not [name for name in tag.attrs if name.startswith("on")], tag


def test_a_form_without_cards_says_so() -> None:
    page = soup(render_form(view(profiles=())))
    assert not radios(page)
    assert "Nothing is offered" in page.get_text()


def test_live_parts_are_named_once() -> None:
    names = [tag["data-ds01-live"] for tag in soup(render_form(view())).select("[data-ds01-live]")]
    assert len(names) == len(set(names))
    assert {"notes", "quota", "sheets", "now pytorch/small"} <= set(names)


def test_one_disclosure_shows_the_chosen_card_s_part() -> None:
    page = soup(render_form(view()))
    assert len(page.select("details")) == 1
    assert not page.select("details[open]")
    rules = str(page.select("style")[1])
    for radio in radios(page):
        number = str(radio["id"]).removeprefix("ds01-")
        assert f'.ds01:has(#ds01-{number}:checked) [data-ds01-for~="{number}"] {{ display: block; }}' in rules
        sheet, *others = page.select(f'.ds01-for[data-ds01-for~="{number}"]')
        title = page.find(id=radio["aria-labelledby"])
        heading = sheet.select_one("h3")
        assert title is not None and heading is not None
        assert heading.get_text().startswith(title.get_text())
        profile = str(radio["value"]).partition("/")[0]
        assert [select["name"] for other in others for select in other.select("select")] == [
            f"image:{profile}" for _ in others
        ]
    assert soup(render_form(view(last_choice={"size": "cpu", "project": "thesis"}))).select("details[open]")


def test_a_title_is_said_once_for_a_profile_with_one_card() -> None:
    single = {"a": {"title": "Alpha", "image": "i"}, "b": {"title": "Beta", "image": "i"}, "c": {"image": "i"}}
    page = soup(render_form(view(profiles=profiles(single))))
    assert not page.select("h2")
    assert [title.get_text() for title in page.select(".ds01-title")] == ["Alpha", "Beta", "c"]
    assert len(page.select(".ds01-cards")) == 1
    assert [tag.get_text() for tag in soup(render_form(view())).select("h2")] == ["PyTorch", "Also offered"]


def test_a_fresh_start_is_offered_and_sent() -> None:
    assert "@fresh" not in render_form(view())
    page = soup(render_form(view(last_choice={"size": "cpu"})))
    option = page.select_one('select[name="image:pytorch"] option[value="@fresh"]')
    assert option is not None
    assert "Start fresh from the profile's image" in option.get_text()
    option["selected"] = ""
    assert options_from_form(submitted(page)) == {"profile": "pytorch", "size": "cpu", "fresh": True}


# --------------------------------------------------------------------------- inside the Hub's pages


def hub_page(name: str, **values: Any) -> BeautifulSoup:
    """A page as JupyterHub renders it with our template path (app.py, init_tornado_settings)."""
    hub = f"{DATA_FILES_PATH}/templates"
    loader = ChoiceLoader(
        [PrefixLoader({"templates": FileSystemLoader([hub])}, "/"), FileSystemLoader([TEMPLATES, hub])]
    )
    user = SimpleNamespace(name="ada", json_escaped_name="ada", spawner=SimpleNamespace(options_form=True))
    values = {
        "base_url": "/hub/",
        "prefix": "/",
        "user": user,
        "static_url": lambda path, **_: f"/hub/static/{path}",
        "xsrf_token": "token",
        "logout_url": "/hub/logout",
        **values,
    }
    return soup(Environment(loader=loader, autoescape=True).get_template(name).render(**values))


def spawn_page(url: str = "/hub/spawn/ada?_xsrf=t", **values: Any) -> BeautifulSoup:
    user = SimpleNamespace(name="ada")
    return hub_page("spawn.html", url=url, for_user=user, spawner_options_form=render_form(view()), **values)


def test_the_spawn_page_posts_where_the_hub_says() -> None:
    page = spawn_page()
    form = page.select_one("form#spawn_form")
    assert form is not None
    assert form["action"] == "/hub/spawn/ada?_xsrf=t"
    assert form.select_one("[data-ds01-form]") is not None
    assert form.select_one('.feedback-container > button[type="submit"]') is not None
    heading = page.select_one("h1")
    assert heading is not None
    assert heading.get_text(" ", strip=True) == "Start your server"


@pytest.mark.parametrize("url", ["/hub/spawn/ada/lab?_xsrf=t", "/hub/spawn/ada/lab"])
def test_trap_t13_the_heading_names_the_server_of_the_address(url: str) -> None:
    heading = spawn_page(url).select_one("h1")
    assert heading is not None
    assert heading.get_text(" ", strip=True) == "Start your server lab"


def test_an_admin_sees_for_whom_they_start() -> None:
    page = hub_page(
        "spawn.html",
        url="/hub/spawn/bo",
        for_user=SimpleNamespace(name="<bo>"),
        spawner_options_form=render_form(view()),
    )
    assert "a server of <bo>" in page.get_text()


def test_trap_t12_a_refusal_is_a_sentence_with_a_list_of_alternatives() -> None:
    refusal = Refusal(
        Code.NO_GPU, f"None is free {EVIL}.", alternatives=[Alternative("Small GPU: 3 free now"), Alternative("No GPU")]
    )
    alert = spawn_page(error_message=refusal.sentence()).select_one(".spawn-error-msg")
    assert alert is not None
    assert alert["role"] == "alert"
    assert [item.get_text() for item in alert.select("li")] == ["Small GPU: 3 free now", "No GPU"]
    assert f"None is free {EVIL}." in alert.get_text()
    plain = spawn_page(error_message="No.").select_one(".spawn-error-msg")
    assert plain is not None
    assert plain.select_one("ul") is None


def test_no_error_no_alert() -> None:
    assert spawn_page().select_one(".spawn-error-msg") is None


@pytest.mark.parametrize("name", ["", "lab", '"><b>'])
def test_trap_t13_the_pending_page_stops_this_very_server(name: str) -> None:
    page = hub_page("spawn_pending.html", spawner=SimpleNamespace(name=name), progress_url="/hub/api/progress?_xsrf=t")
    place = page.select_one("[data-ds01-pending]")
    assert place is not None
    assert (place["data-server"], place["data-user"], place["data-api"]) == (name, "ada", "/hub/api/")
    assert "stop_server(" not in page.decode()
    assert place["data-progress"] == "/hub/api/progress?_xsrf=t"


def test_the_pending_page_knows_every_stage() -> None:
    page = hub_page("spawn_pending.html", spawner=SimpleNamespace(name=""), progress_url="/p")
    shown = [item["data-ds01-stage"] for item in page.select("li[data-ds01-stage]")]
    assert shown == [stage.name for stage in STAGES]
    assert page.select_one("noscript > meta[http-equiv=refresh]") is not None or "http-equiv" in page.decode()


def test_a_failed_start_shows_the_refusal() -> None:
    refusal = Refusal(Code.NO_GPU, "None is free <now>.", alternatives=[Alternative("No GPU")])
    page = hub_page(
        "not_running.html",
        failed=True,
        failed_message=refusal.sentence(),
        server_name="lab",
        spawn_url="/hub/spawn/ada/lab",
    )
    alert = page.select_one(".ds01-refusal")
    assert alert is not None
    assert "None is free <now>." in alert.get_text()
    assert [item.get_text() for item in alert.select("li")] == ["No GPU"]
    start = page.select_one("#start")
    assert start is not None
    assert start["href"] == "/hub/spawn/ada/lab"


def test_a_stopped_server_is_not_a_failure() -> None:
    text = hub_page("not_running.html", server_name="", spawn_url="/s", implicit_spawn_seconds=3).get_text()
    assert "Your server is not running" in text
    assert "Your files are kept." in text


def home(**values: Any) -> BeautifulSoup:
    user = SimpleNamespace(
        name="ada", json_escaped_name="ada", spawner=SimpleNamespace(options_form=True), all_spawners=lambda **_: []
    )
    return hub_page(
        "home.html",
        user=user,
        default_server=SimpleNamespace(active=False),
        url="/hub/spawn/ada",
        allow_named_servers=True,
        named_server_limit_per_user=20,
        **values,
    )


def test_the_home_page_shows_the_quota_line_only_if_there_is_one() -> None:
    line = home(ds01_quota_line="GPU in use 0 of 1 <b>").select_one("[data-ds01-quota]")
    assert line is not None
    assert line.get_text() == "GPU in use 0 of 1 <b>"
    assert home().select_one("[data-ds01-quota]") is None
    assert home(ds01_quota_line="").select_one("[data-ds01-quota]") is None
    assert home().select_one("#start") is not None
