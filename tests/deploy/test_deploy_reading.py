"""What the deploy commands read: apt sources, HTML forms, routes, the Hub's log, certificates."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from deploy.apt_sources import Source, for_release, parse_deb822, parse_one_line, read_sources
from deploy.demo import interesting
from deploy.forms import forms_of, text_of
from deploy.image import certificates_in
from deploy.surroundings import NothingFree, free_port, host_routes

DEB822 = """\
# the distribution
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
Components: main
"""

ONE_LINE = """\
# deb http://commented.example/ubuntu noble main
deb [arch=amd64 signed-by=/usr/share/keyrings/ubuntu-archive-keyring.gpg] http://m.example/u noble main universe # x
deb-src http://m.example/u noble main
deb http://cloud.example/apt cloud-sdk main
deb broken
"""


def test_apt_sources_deb822() -> None:
    found = parse_deb822(DEB822)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert found == (
        Source("http://mirror.example/debian", "bookworm", ("main", "contrib"), keyring),
        Source("http://mirror.example/debian", "bookworm-updates", ("main", "contrib"), keyring),
        Source("http://mirror.example/debian-security", "bookworm-security", ("main",)),
    )


def test_apt_sources_inline_key_is_no_path() -> None:
    stanza = "Types: deb\nURIs: http://x/\nSuites: s\nComponents: main\nSigned-By:\n -----BEGIN PGP-----\n .\n abc\n"
    assert parse_deb822(stanza) == (Source("http://x/", "s", ("main",), None),)


def test_apt_sources_one_line() -> None:
    found = parse_one_line(ONE_LINE)
    assert [source.line() for source in found] == [
        "deb [signed-by=/usr/share/keyrings/ubuntu-archive-keyring.gpg] http://m.example/u noble main universe",
        "deb http://cloud.example/apt cloud-sdk main",
    ]


def test_apt_sources_of_the_release_come_in_order_and_without_others() -> None:
    mixed = (
        *parse_one_line("deb http://a/ bookworm-security main\n"),
        *parse_deb822(DEB822),
        *parse_one_line(ONE_LINE),
    )
    assert [source.suite for source in for_release(mixed, "bookworm")] == [
        "bookworm",
        "bookworm-updates",
        "bookworm-security",
        "bookworm-security",
    ]
    assert for_release(mixed, "trixie") == ()


def test_apt_sources_reads_all_files_of_a_host(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://one/ bookworm main\n")
    (tmp_path / "sources.list.d/a.sources").write_text(DEB822)
    (tmp_path / "sources.list.d/b.list").write_text("deb http://two/ bookworm main\n")
    (tmp_path / "sources.list.d/c.list.disabled").write_text("deb http://three/ bookworm main\n")
    uris = [source.uri for source in read_sources(tmp_path)]
    assert uris[0] == "http://one/" and uris[-1] == "http://two/" and len(uris) == 5


PAGE = """\
<head><title>x</title><style>p { }</style></head>
<form action="/login?next=%2F" method="post"><input type="hidden" name="_xsrf" value="a&amp;b">
  <input name="username"><input type="password" name="password"><input type="submit" name="go" value="Go"></form>
<form id="spawn_form" action="?" method="POST">
  <input type="radio" name="choice" value="small/standard" checked>
  <input type="radio" name="choice" value="cpu/standard">
  <input type="radio" name="choice" value="whole/standard" disabled>
  <select name="image:small"><option value="">own</option><option value="x:1">x</option></select>
  <input type="checkbox" name="quiet"><input name="cpus" value=""></form>
<p>Hello<script>no()</script> you</p>
"""


def test_forms_are_read_as_a_browser_sends_them() -> None:
    login, spawn = forms_of(PAGE)
    assert login.fields == [("_xsrf", "a&b"), ("username", ""), ("password", "")]
    assert (spawn.id, spawn.method) == ("spawn_form", "post")
    assert spawn.fields == [("choice", "small/standard"), ("image:small", ""), ("cpus", "")]
    assert spawn.choices["choice"] == ["small/standard", "cpu/standard"]
    assert spawn.disabled["choice"] == ["whole/standard"]
    assert dict(spawn.filled(choice="cpu/standard"))["choice"] == "cpu/standard"
    with pytest.raises(KeyError, match="no field profil;"):
        spawn.filled(profil="x")


def test_forms_text_is_what_a_person_reads() -> None:
    assert text_of(PAGE) == "own x Hello you"


def test_routes_are_read_in_the_kernels_byte_order() -> None:
    table = (
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
        "lo0\t0100007F\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n"
    )
    assert host_routes(table) == (ipaddress.IPv4Network("172.17.0.0/16"), ipaddress.IPv4Network("127.0.0.1/32"))


def test_ports_in_use_are_left_alone() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        used = server.getsockname()[1]
        assert free_port(used) != used
    assert free_port(used) == used
    assert free_port(used, taken=[used]) != used
    with pytest.raises(NothingFree):
        free_port(host="203.0.113.1")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("[I 2026-01-02 03:04:05.006 JupyterHub log:192] 302 GET / -> /hub/", None),
        ("[I 2026-01-02 03:04:05.006 JupyterHub base:984] User logged in: student1", "User logged in: student1"),
        ("[W 2026-01-02 03:04:05.006 JupyterHub app:1] no such thing", "warning: no such thing"),
        ("[E 2026-01-02 03:04:05.006 JupyterHub user:9] it broke", "error: it broke"),
        ("    at line 3 of a stack trace", None),
    ],
)
def test_log_lines_that_are_shown(line: str, shown: str | None) -> None:
    assert interesting(line) == shown


def test_certificates_are_taken_out_of_a_bundle(tmp_path: Path) -> None:
    one = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"
    two = "-----BEGIN CERTIFICATE-----\nBBBB\n-----END CERTIFICATE-----"
    bundle = tmp_path / "bundle.crt"
    bundle.write_text(f"# first\n{one}\n\n# second\n{two.replace(chr(10), chr(13) + chr(10))}\n")
    assert certificates_in(bundle) == (one, two)
