"""A crowd of processes that fight for units while one of them is killed again and again. Run by the race test.

    python ledger_crowd.py URL FOLDER SECONDS [PROCESSES] [UNITS]

Who holds a unit also locks the file FOLDER/<unit>: an independent witness, which the kernel frees when its
holder is killed. A lock that cannot be taken means that two processes held one unit at the same time. Prints
the counts as JSON.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from ledger_world import admission, bound, claim, unit

from ds01spawner.errors import Code, Refusal
from ds01spawner.ledger.store import Ledger
from ds01spawner.model import Admission, Usage

RESERVED, REFUSED, DOUBLE, BROKEN = b"+", b"-", b"2", b"!"


def first_free(usage: Usage, units: int) -> Admission:
    """Everybody wants the same unit: the first free one."""
    taken = usage.taken()
    for number in range(units):
        if unit(number).uuid not in taken:
            return admission(unit(number))
    raise Refusal(Code.NO_GPU, "No GPU is free.")


def one_start(ledger: Ledger, user: str, folder: Path, units: int) -> bytes:
    """Reserve, use and give back one unit; what came of it."""
    try:
        made = ledger.reserve(claim(user), lambda usage: first_free(usage, units))
    except Refusal:
        return REFUSED
    witnesses = []
    try:
        for lease in made.leases:
            witness = os.open(folder / lease.unit_uuid, os.O_CREAT | os.O_RDWR)
            witnesses.append(witness)
            try:
                fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return DOUBLE
        ledger.activate(bound(ledger, made).id)
        if random.random() < 0.3:
            ledger.hold(made.id, until=None, reason="stopped")
    finally:
        for witness in witnesses:
            os.close(witness)
    ledger.release(made.id, "over")
    return RESERVED


def work(url: str, number: int, folder: Path, until: float, units: int) -> None:
    """One process of the crowd; the user of a killed one comes back and finds what it left."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    user = f"user{number}"
    with Ledger.open(url) as ledger:
        left = ledger.find(user, "")
        if left is not None:
            ledger.release(left.id, "its process was killed")
        while time.monotonic() < until:
            try:
                outcome = one_start(ledger, user, folder, units)
            except Exception as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
                outcome = BROKEN
            os.write(log, outcome)


def begin(url: str, number: int, folder: Path, until: float, units: int) -> int:
    """Fork one process of the crowd; its pid."""
    child = os.fork()
    if child:
        return child
    try:
        random.seed(os.getpid())
        work(url, number, folder, until, units)
    finally:
        os._exit(0)


def main(url: str, folder: Path, seconds: float, processes: int = 16, units: int = 8) -> dict[str, int]:
    """Run the crowd; the counts."""
    Ledger.open(url).close()  # the schema, and every import that a forked child would otherwise make again
    until = time.monotonic() + seconds
    crowd = {begin(url, number, folder, until, units): number for number in range(processes)}
    chance = random.Random(1)
    kills = 0
    while time.monotonic() < until - 0.5:
        time.sleep(0.15)
        victim = chance.choice(sorted(crowd))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        kills += 1
        number = crowd.pop(victim)
        crowd[begin(url, number, folder, until, units)] = number
    for child in crowd:
        os.waitpid(child, 0)
    told = Counter((folder / "log").read_bytes())
    return {
        "processes": processes,
        "units": units,
        "tried": sum(told.values()),
        "granted": told[RESERVED[0]],
        "refused": told[REFUSED[0]],
        "doubles": told[DOUBLE[0]],
        "errors": told[BROKEN[0]],
        "kills": kills,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))))
