"""From inside one user's real container: the host, the neighbours, the Hub. Nothing gives."""

from __future__ import annotations

import contextlib
import json
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from intruder import MEMORY, PIDS, SHM, Foothold, Lab

pytestmark = [pytest.mark.docker, pytest.mark.hub]

SECRET = "alice-s-thesis-0d1f"


@pytest.fixture(scope="module")
def alice(lab: Lab) -> Foothold:
    """The victim: a server with a GPU, and a file with a secret in its workspace and home."""
    lab.hub.add_user("alice")
    lab.stop_all("alice")
    lab.hub.spawn("alice", {"profile": "small"})
    inside = lab.inside("alice")
    status, output = inside.run("sh", "-c", f"echo {SECRET} > /workspace/{SECRET}; echo {SECRET} > $HOME/{SECRET}")
    assert status == 0, output
    return inside


@pytest.fixture(scope="module")
def mallory(lab: Lab, alice: Foothold) -> Foothold:
    """The attacker, while the victim's server runs."""
    return lab.inside("mallory")


# --------------------------------------------------------------------------- rights


def test_isolation_the_process_has_no_right_that_could_be_used(mallory: Foothold) -> None:
    lines = dict(line.split(":", 1) for line in mallory.run("cat", "/proc/self/status")[1].splitlines() if ":" in line)
    assert {lines[f"Cap{name}"].strip("\t 0") for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {""}
    assert lines["NoNewPrivs"].strip() == "1"
    assert lines["Seccomp"].strip() == "2"
    assert lines["Uid"].split() == lines["Gid"].split() == [str(mallory.uid)] * 4
    assert lines["Groups"].split() in ([], [str(mallory.uid)])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of the system calls are x86_64's")
def test_isolation_system_calls_that_lead_out_are_refused(mallory: Foothold) -> None:
    tries = {
        "unshare(NEWUSER)": "call(272, 0x10000000)",
        "unshare(NEWNS)": "call(272, 0x20000)",
        "unshare(NEWNET)": "call(272, 0x40000000)",
        "clone(NEWUSER)": "call(56, 0x10000011, 0, 0, 0, 0)",
        "clone3": "call(435, 0, 0)",
        "setns": "call(308, os.open('/proc/1/ns/net', 0), 0)",
        "mount": "call(165, b'none', b'/mnt', b'tmpfs', 0, 0)",
        "umount": "call(166, b'/workspace', 0)",
        "fsopen": "call(430, b'tmpfs', 0)",
        "pivot_root": "call(155, b'/', b'/')",
        "chroot": "os.chroot('/tmp')",
        "mknod": "os.mknod('/tmp/disk', 0o666 | stat.S_IFBLK, os.makedev(8, 0))",
        "open_by_handle_at": "call(304, 3, ctypes.create_string_buffer(128), 0)",
        "keyctl": "call(250, 0, -3, 0)",
        "add_key": "call(248, b'user', b'x', b'y', 1, -3)",
        "request_key": "call(249, b'user', b'x', 0, 0)",
        "bpf": "call(321, 0, ctypes.create_string_buffer(128), 48)",
        "perf_event_open": "call(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
        "userfaultfd": "call(323, 0)",
        "syslog": "call(103, 3, ctypes.create_string_buffer(100), 100)",
        "kexec_load": "call(246, 0, 0, 0, 0)",
        "init_module": "call(175, b'', 0, b'')",
        "reboot": "call(169, 0xfee1dead, 672274793, 0, 0)",
        "sethostname": "call(170, b'x', 1)",
        "swapon": "call(167, b'/tmp/x', 0)",
        "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
        "packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)",
        "setuid": "os.setuid(0)",
        "setgid": "os.setgid(0)",
        "setgroups": "os.setgroups([0])",
        "another's id": "os.setuid(os.getuid() + 1)",
        "less likely to be killed": "write('/proc/self/oom_score_adj', '-500')",
        "higher priority": "os.setpriority(os.PRIO_PROCESS, 0, -5)",
        "chown": "os.chown('/workspace', 0, 0)",
    }
    found = mallory.outcomes("", tries)
    assert {name: got for name, got in found.items() if got not in ("EPERM", "EACCES", "ENOSYS")} == {}


def test_isolation_setuid_programs_give_nothing(lab: Lab, mallory: Foothold) -> None:
    """S7: the image's have no effect, and what a user makes is theirs alone, inside and on the host."""
    _, found = mallory.run("sh", "-c", "find / -xdev -perm -4000 -user root -type f 2>/dev/null")
    assert "/usr/bin/su" in found, "the image has some, as every image"
    assert mallory.run("su", "-c", "id")[0] != 0
    mallory.run("sh", "-c", "cd /workspace && cp /usr/bin/id mine && chmod 6755 mine; chown 0 mine; chown :0 mine")
    workspace = lab.hub.plan.resolved().workspaces / str(mallory.uid)
    planted = (workspace / "mine").stat()
    assert (planted.st_uid, planted.st_gid) == (mallory.uid, mallory.uid)
    told = subprocess.run(
        # A shell in between: setpriv itself still has root's capabilities when it runs the program.
        ["setpriv", "--reuid=65001", "--regid=65001", "--clear-groups", "sh", "-c", f"exec {workspace}/mine -u"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert told.stdout == "" and "Permission denied" in told.stderr, "closed to the host's other accounts"
    assert workspace.stat().st_mode & 0o077 == 0


def test_isolation_sudo_says_what_to_do_instead(mallory: Foothold) -> None:
    status, output = mallory.run("sudo", "apt", "install", "x")
    assert status == 1
    assert "pip install" in output and "ask the people" in output


# --------------------------------------------------------------------------- files


def test_isolation_nothing_of_another_users_is_there(lab: Lab, mallory: Foothold, alice: Foothold) -> None:
    _, found = mallory.run("sh", "-c", f"find / -name '*{SECRET}*' 2>/dev/null; grep -rl {SECRET} /tmp /data /dev/shm")
    assert found.strip() == ""
    _, mounts = mallory.run("cat", "/proc/self/mountinfo")
    assert f"/{mallory.uid} " in mounts and f"/{alice.uid}" not in mounts
    settings = lab.hub.plan.resolved()
    for secret in (settings.state_dir, settings.workspaces / str(alice.uid), settings.homes / str(alice.uid)):
        assert Path(secret).exists()
        assert mallory.run("ls", str(secret))[0] != 0


def test_isolation_of_processes(mallory: Foothold) -> None:
    owners = mallory.run("sh", "-c", "stat -c %u /proc/[0-9]*")[1].split()
    assert set(owners) == {str(mallory.uid)}, "only the user's own, the init included"


def test_isolation_what_belongs_to_the_host_is_read_only_or_hidden(mallory: Foothold) -> None:
    paths = [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/hostname",
        "/proc/sys/vm/drop_caches",
        "/proc/sys/net/ipv4/ip_forward",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/pids/pids.max",
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/cgroup.procs",
        "/sys/fs/cgroup/devices/devices.allow",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/proc/sysrq-trigger",
        "/dev/kmsg",
        "/dev/mem",
        "/etc/passwd",
        "/etc/group",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/data/README.txt",
    ]
    found = mallory.outcomes("", {path: f"write({path!r}, '1')" for path in paths})
    assert {path: got for path, got in found.items() if got not in ("EACCES", "EPERM", "EROFS", "ENOENT")} == {}
    more = mallory.outcomes(
        "",
        {
            "a cgroup of one's own": "os.mkdir('/sys/fs/cgroup/memory/mine')",
            "the same in version 2": "os.mkdir('/sys/fs/cgroup/mine')",
            "a shared file under another name": "os.link('/data/README.txt', '/workspace/mine.txt')",
            "the engine": "socket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')",
            "the engine, elsewhere": "socket.socket(socket.AF_UNIX).connect('/run/docker.sock')",
            "kernel memory": "open('/proc/kcore', 'rb').read(1) or [][0]",
            "the kernel's keys": "len(open('/proc/keys').read()) and 'keys'",
        },
    )
    assert {name: got for name, got in more.items() if got.startswith("OK") and got != "OK 0"} == {}


def test_isolation_of_a_gpu_that_is_not_leased(alice: Foothold, mallory: Foothold) -> None:
    assert alice.run("sh", "-c", "ls /dev/ds01 | wc -l")[1].strip() == "1"
    listed = mallory.run("sh", "-c", "ls -d /dev/ds01 /dev/nvidia* /dev/dri 2>/dev/null; echo $NVIDIA_VISIBLE_DEVICES")
    assert listed[1].split() == ["void"]


# --------------------------------------------------------------------------- network


@contextlib.contextmanager
def listening(host: str) -> Iterator[int]:
    """A service of the host."""
    with socket.create_server((host, 0)) as server:
        yield int(server.getsockname()[1])


def test_isolation_of_the_network(lab: Lab, alice: Foothold, mallory: Foothold) -> None:
    """S8: neighbours, the host's services and the cloud's metadata are out of reach; the Hub's API is not."""
    settings = lab.hub.plan.resolved()
    neighbour = lab.hub.container("alice")
    assert neighbour is not None
    address = neighbour.networks[lab.hub.runtime.network]
    own = [line.split()[3].split("/")[0] for line in _addresses()]
    with listening("0.0.0.0") as service:
        doors = {
            "neighbour": (address, 8888),
            "metadata": ("169.254.169.254", 80),
            "proxy": (settings.gateway, lab.hub.plan.port),
            "proxy API": (settings.gateway, lab.hub.plan.proxy_api_port),
            "ssh": (settings.gateway, 22),
            "engine": (settings.gateway, 2375),
            **{f"service by {host}": (host, service) for host in own},
            **{f"Hub by {host}": (host, settings.hub_port) for host in own if host != settings.gateway},
        }
        found = _connect(mallory, doors)
    hub = {"Hub": (settings.gateway, settings.hub_port)}
    lab.hub.wait(lambda: _connect(mallory, hub) == {"Hub": "open"}, "the Hub is in reach: the probe can tell", 20)
    assert {name for name, got in found.items() if got == "open"} == set(), found


def _addresses() -> list[str]:
    listed = subprocess.run(["ip", "-o", "-4", "address"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if " lo " not in line]


def _connect(inside: Foothold, doors: dict[str, tuple[str, int]]) -> dict[str, str]:
    code = f"""
import json, socket
from concurrent.futures import ThreadPoolExecutor
def knock(door):
    with socket.socket() as probe:
        probe.settimeout(1.5)
        try:
            probe.connect(tuple(door))
            return "open"
        except OSError as error:
            return type(error).__name__
doors = {json.dumps(doors)}
with ThreadPoolExecutor(32) as pool:
    print(json.dumps(dict(zip(doors, pool.map(knock, doors.values())))))
"""
    found: dict[str, str] = inside.python(code)
    return found


# --------------------------------------------------------------------------- using everything up


def test_isolation_a_fork_bomb_ends_at_the_limit_and_others_go_on(alice: Foothold, mallory: Foothold) -> None:
    code = """
import json, os, signal, time
made = []
try:
    while len(made) < 5000:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        made.append(child)
except OSError:
    pass
for child in made:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print(json.dumps(len(made)))
"""
    assert 0 < mallory.python(code) < PIDS
    assert alice.run("true")[0] == 0


def test_isolation_a_memory_bomb_hits_only_its_owner(alice: Foothold, mallory: Foothold) -> None:
    status, _ = mallory.run("python3", "-c", f"x = bytearray({4 * MEMORY}); x[::4096] = b'1' * len(x[::4096])")
    assert status == 137
    assert mallory.run("true")[0] == alice.run("true")[0] == 0, "the server itself goes on"


def test_isolation_shared_memory_has_an_end(mallory: Foothold) -> None:
    status, output = mallory.run(
        "sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=64; s=$?; rm /dev/shm/x; exit $s"
    )
    assert status != 0 and "No space left" in output
    assert f"{SHM // 2**20}+0 records out" in output


def test_isolation_printing_does_not_fill_the_disk(lab: Lab, mallory: Foothold) -> None:
    written = 48 * 2**20
    status, output = mallory.run("sh", "-c", f"yes 0123456789abcdef0123456789abcdef | head -c {written} > /proc/1/fd/1")
    assert status == 0, output
    folder = Path(lab.hub.runtime.info.root_dir) / "containers" / mallory.container
    deadline = time.monotonic() + 20
    while (size := sum(f.stat().st_size for f in folder.glob("*-json.log*"))) < 20 * 2**20:
        assert time.monotonic() < deadline, size
        time.sleep(0.2)
    time.sleep(0.5)
    assert sum(f.stat().st_size for f in folder.glob("*-json.log*")) < 32 * 2**20
